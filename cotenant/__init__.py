"""Shares GPUs between Kubernetes pods by memory."""

__version__ = "0.2.0"
