"""The scheduler extender. A pod's way through it, top to bottom: http, verbs, placement, policies, ledger, cluster."""
