"""MPS control daemons: which there are to be, starting and watching them, and what of them reaches containers."""
