"""The plugin's threads: one whose work fails in a way that nobody foresaw is noticed, and begins anew.

Each part catches what it expects. Whatever else is raised would end its thread without a word, and the plugin would go
on without hearing the driver, say, or without telling its node. Ending the process instead would end the MPS daemons
and with them their clients, for a fault of one part; and a part that fails for good shows where it is missed: in
/healthz where GPUs are looked at no more, in /readyz where no kubelet is served, in a GPU's health where its daemon is.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable

import structlog

log = structlog.get_logger(__name__)

_PAUSE_SECONDS = (1.0, 30.0)
# One that ran for so long has earned a quick start.
_STEADY_SECONDS = 60.0


class Failures:
    """Count the failures of threads, by their names; safe to use from many threads.

    A thread is known from its beginning, with none: of a count that begins at 1 Prometheus sees no increase.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def know(self, thread: str) -> None:
        """Count none of a thread that is new."""
        with self._lock:
            self._counts[thread] += 0

    def count(self, thread: str) -> None:
        """Count one more."""
        with self._lock:
            self._counts[thread] += 1

    @property
    def counts(self) -> dict[str, int]:
        """Give how often each thread failed."""
        with self._lock:
            return dict(self._counts)


# of this process, as its threads are
FAILURES = Failures()


class Loop:
    """Do *work* in a thread called *name* until it returns; where it raises, say so and do it again after a pause.

    *failed* is told of it first, in the same thread.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[], None],
        *,
        failed: Callable[[Exception], None] = lambda _: None,
        failures: Failures = FAILURES,
        pause_seconds: tuple[float, float] = _PAUSE_SECONDS,
    ) -> None:
        self._name = name
        self._work = work
        self._failed = failed
        self._failures = failures
        self._pauses = pause_seconds
        self._ending = threading.Event()
        # a daemon: a driver that hangs must not keep the process from ending
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin; return at once."""
        self._failures.know(self._name)
        self._thread.start()

    def retire(self) -> None:
        """Do the work no more once it has ended, however that is; return at once."""
        self._ending.set()

    def join(self, seconds: float | None = None) -> None:
        """Retire, and wait for the end of work that has been told to end, *seconds* at most."""
        self._ending.set()
        if self._thread.is_alive():
            self._thread.join(seconds)

    @property
    def alive(self) -> bool:
        """Tell whether it has begun and not ended."""
        return self._thread.is_alive()

    def _run(self) -> None:
        first, most = self._pauses
        pause = first
        while True:
            began = time.monotonic()
            try:
                self._work()
            except Exception as error:
                if time.monotonic() - began > _STEADY_SECONDS:
                    pause = first
                self._failures.count(self._name)
                log.exception("thread.failed", thread=self._name, retry_seconds=pause)
                self._tell(error)
            else:
                return
            if self._ending.wait(pause):
                return
            pause = min(2 * pause, most)

    def _tell(self, error: Exception) -> None:
        try:
            self._failed(error)
        except Exception:
            log.exception("thread.failure_not_told", thread=self._name)
