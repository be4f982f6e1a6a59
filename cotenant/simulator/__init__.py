"""Replay traces on the extender's own ledger, fit and policies."""
