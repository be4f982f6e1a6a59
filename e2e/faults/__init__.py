"""Faults on purpose: a proxy before the API server, programs that are killed, and the judge of what must hold."""
