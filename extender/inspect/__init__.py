"""For people: what the ledger holds, and why a pod waits."""
