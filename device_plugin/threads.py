"""The plugin's threads: one whose work fails in a way that nobody foresaw is noticed, and begins anew.

Ending the process instead would end the MPS daemons and with them their clients, for a fault of one part; and a part
that fails for good shows where it is missed: in /healthz where GPUs are looked at no more, in /readyz where no kubelet
is served, in a GPU's health where its daemon is.
"""

from cotenant.threads import Threads

INVENTORY = "inventory"
"""Name the thread that looks at the GPUs; it survives what the parts raise that health does not need."""

THREADS = Threads(pauses=(1.0, 30.0))
"""Of this process."""
