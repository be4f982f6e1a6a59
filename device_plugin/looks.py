"""When the GPUs are looked at: at every interval; and what pods leave behind is swept as soon as they end."""

import threading
import time
from collections.abc import Callable

from device_plugin.threads import INVENTORY, THREADS

# A look that failed is made good by the next; without several the plugin is better started anew.
_STALE_INTERVALS = 3
_STALE_SECONDS = 30.0
# Pods often end together; what they leave is cleared together.
_PAUSE_SECONDS = 0.05
_END_SECONDS = 1.0


class Looks:
    """Call *look* every *interval* seconds, and *sweep* between two looks when somebody wakes it, from a thread."""

    def __init__(self, interval: float, *, look: Callable[[], None], sweep: Callable[[], None]) -> None:
        self._interval = interval
        self._look = look
        self._sweep = sweep
        self._woken = threading.Event()
        self._stopping = threading.Event()
        self._looked_at = time.monotonic()
        self._loop = THREADS.of(INVENTORY, self._run)

    def start(self) -> None:
        """Begin, with a look at once."""
        self._loop.start()

    def retire(self) -> None:
        """Begin to end; return at once."""
        self._stopping.set()
        self._woken.set()

    def stop(self) -> None:
        """End after the look under way, if that comes soon."""
        self.retire()
        self._loop.join(_END_SECONDS)

    def wake(self) -> None:
        """Have a sweep soon, or the look that is due."""
        self._woken.set()

    def looked(self) -> None:
        """Note that a look was a whole one, which found GPUs that can be read, or none at all."""
        self._looked_at = time.monotonic()

    @property
    def unwell(self) -> str:
        """Say that there was no whole look for too long; "" where there was."""
        ago = time.monotonic() - self._looked_at
        if ago > _STALE_INTERVALS * self._interval + _STALE_SECONDS:
            return f"the GPUs could not be looked at for {ago:.0f} s"
        return ""

    def _run(self) -> None:
        due = 0.0
        while not self._stopping.is_set():
            woken = self._woken.wait(max(0.0, due - time.monotonic()))
            self._woken.clear()
            if self._stopping.wait(_PAUSE_SECONDS if woken else 0):
                return
            if time.monotonic() < due:
                self._sweep()
            else:
                due = time.monotonic() + self._interval
                self._look()
