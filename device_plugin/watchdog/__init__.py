"""Watches who uses GPU memory: process by process, against what each container was granted."""
