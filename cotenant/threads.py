"""Threads of both programs: none ends on what nobody expected, and one that has ended all the same is known by name.

A thread calls its *turn* until that says that there is no other. What a turn raises is logged with its traceback and
counted, and after a pause it is called again: a turn may be one of many or the whole of the work, which then begins
anew. What it was about is lost with it, so turns that go through several things guard each of them by surviving().
"""

import contextlib
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import structlog

_log = structlog.get_logger(__name__)

_PAUSES_SECONDS = (0.5, 5.0)
# A turn that lasted so long before it failed has earned a quick one after it.
_STEADY_SECONDS = 60.0
# After how long a thread that works for long has to let another one have the interpreter.
_SWITCH_SECONDS = 0.0005


class Threads:
    """Make threads, and know what became of them; safe to use from many threads.

    After failures in a row a thread pauses for as long as the first of *pauses*, in seconds, and twice as long each
    time up to the second, so that it keeps neither a core nor the log busy.
    """

    def __init__(self, *, pauses: tuple[float, float] = _PAUSES_SECONDS) -> None:
        self.pauses = pauses
        self._guard = threading.Lock()
        self._under_way: set[threading.Thread] = set()
        self._failures: Counter[str] = Counter()

    def of(
        self, name: str, turn: Callable[[], bool | None], *, failed: Callable[[Exception], None] = lambda _: None
    ) -> "Loop":
        """Make a thread, to be started, that calls *turn* until it gives nothing or False.

        *failed* is told what a turn raises, before the next one, in the same thread.
        """
        return Loop(self, name, turn, failed)

    @contextlib.contextmanager
    def surviving(self, name: str) -> Iterator[None]:
        """Log and count what is raised inside, in the thread called *name*, and go on behind it."""
        try:
            yield
        except Exception:  # noqa: BLE001 - whatever it is, what comes next is not to suffer from it
            self.survived(name)

    def ended(self) -> list[str]:
        """Name the threads that have ended without being told to."""
        with self._guard:
            return [one.name for one in self._under_way if one.ident and not one.is_alive()]

    def failures(self) -> dict[str, int]:
        """Count what was survived, by the thread's name."""
        with self._guard:
            return dict(self._failures)

    # What the threads tell.

    def survived(self, name: str) -> None:
        """Log and count the exception that is being handled."""
        with self._guard:
            self._failures[name] += 1
        _log.exception(f"the thread {name!r} met what nobody expected, and goes on; please report it", thread=name)

    def begins(self, thread: threading.Thread) -> None:
        """Know it from its beginning, with no failure: of a count that begins at 1 Prometheus sees no increase."""
        with self._guard:
            self._under_way.add(thread)
        self.register(thread.name)

    def register(self, name: str) -> None:
        """Count what is survived under *name* from now on, from 0."""
        with self._guard:
            self._failures[name] += 0

    def is_done(self, thread: threading.Thread) -> None:
        """Know that it ends as it should."""
        with self._guard:
            self._under_way.discard(thread)


class _Courtesy:
    """Have all threads give way sooner as long as anybody asks for it; the setting is the interpreter's."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._asking = 0
        self._usual = 0.0

    def __enter__(self) -> None:
        with self._guard:
            if not self._asking:
                self._usual = sys.getswitchinterval()
                sys.setswitchinterval(_SWITCH_SECONDS)
            self._asking += 1

    def __exit__(self, *_: object) -> None:
        with self._guard:
            self._asking -= 1
            if not self._asking:
                sys.setswitchinterval(self._usual)


_courtesy = _Courtesy()


def giving_way() -> contextlib.AbstractContextManager[None]:
    """Give way to other threads within half a millisecond, where Python's 5 ms would be longer than a verb takes.

    For what works for long beside the verbs. Not for the verbs themselves: threads that take half a millisecond each
    then cut each other short, which cost a fifth of all pods/s (docs/decisions/0104).
    """
    return _courtesy


def all_there(workers: int, name: str) -> ThreadPoolExecutor:
    """Make a pool whose threads are there from the beginning; raise RuntimeError where so many are not allowed.

    For gRPC's servers. Their own thread ends without a word on a call for which no other can be made: the socket stays,
    all looks well, and who asks waits for an answer for ever. The kubelet does, which admits one pod after the other.
    """
    pool, together = ThreadPoolExecutor(workers, thread_name_prefix=name), threading.Event()
    try:
        for _ in range(workers):
            pool.submit(together.wait)
    finally:
        together.set()
    return pool


class Loop:
    """One of the threads; Threads.of() makes it."""

    def __init__(
        self, threads: Threads, name: str, turn: Callable[[], bool | None], failed: Callable[[Exception], None]
    ) -> None:
        self._threads = threads
        self._name = name
        self._turn = turn
        self._failed = failed
        self._ending = threading.Event()
        # a daemon: a driver that hangs, say, must not keep the process from ending
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin; return at once."""
        self._threads.begins(self._thread)
        self._thread.start()

    def retire(self) -> None:
        """Try no more after the next failure; return at once."""
        self._ending.set()

    def join(self, seconds: float | None = None) -> None:
        """Retire, and wait for the end of one whose turns have been told to end, *seconds* at most."""
        self._ending.set()
        if self._thread.is_alive():
            self._thread.join(seconds)

    @property
    def alive(self) -> bool:
        """Tell whether it has begun and not ended."""
        return self._thread.is_alive()

    def _run(self) -> None:
        first, most = self._threads.pauses
        pause, goes_on = first, True
        while goes_on:
            began = time.monotonic()
            try:
                goes_on = bool(self._turn())
                pause = first
            except Exception as error:  # noqa: BLE001 - see above
                self._threads.survived(self._name)
                with self._threads.surviving(self._name):
                    self._failed(error)
                if time.monotonic() - began > _STEADY_SECONDS:
                    pause = first
                goes_on = not self._ending.wait(pause)
                pause = min(2 * pause, most)
        self._threads.is_done(self._thread)
