"""The command `cotenant`."""
