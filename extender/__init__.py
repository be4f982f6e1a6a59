"""The scheduler extender. A pod's way through it, top to bottom: http, verbs, fit, policies, ledger, cluster."""
