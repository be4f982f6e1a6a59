"""The extender's own threads: none ends on what nobody expected, and one that has ended all the same is known by name.

A thread calls its *turn* again and again. What a turn raises is logged with its traceback, counted (the metric
cotenant_thread_failures), and the next turn comes after a pause. What the turn was about is lost with it, so turns that
go through several things guard each of them by surviving().
"""

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

import structlog

_log = structlog.get_logger(__name__)

# So that one that fails at every turn does not keep a core, and the log, busy.
_PAUSE_SECONDS = 0.5


class Threads:
    """Make threads, and know what became of them."""

    def __init__(self, pause: float = _PAUSE_SECONDS) -> None:
        self._pause = pause
        self._guard = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._done: set[threading.Thread] = set()
        self._failures: Counter[str] = Counter()

    def of(self, name: str, turn: Callable[[], bool]) -> threading.Thread:
        """Make a thread, to be started, that calls *turn* until it gives False."""
        thread = threading.Thread(target=lambda: self._run(thread, turn), name=name, daemon=True)
        with self._guard:
            self._threads.append(thread)
            self._failures[name] += 0
        return thread

    @contextlib.contextmanager
    def surviving(self, name: str) -> Iterator[None]:
        """Log and count what is raised inside, in the thread called *name*, and go on behind it."""
        try:
            yield
        except Exception:  # noqa: BLE001 - whatever it is, what comes next is not to suffer from it
            with self._guard:
                self._failures[name] += 1
            _log.exception(f"the thread {name!r} met what nobody expected, and goes on; please report it", thread=name)

    def ended(self) -> list[str]:
        """Name the threads that have ended without being told to."""
        with self._guard:
            return [one.name for one in self._threads if one.ident and not one.is_alive() and one not in self._done]

    def failures(self) -> dict[str, int]:
        """Count what was survived, by the thread's name."""
        with self._guard:
            return dict(self._failures)

    def _run(self, thread: threading.Thread, turn: Callable[[], bool]) -> None:
        goes_on = True
        while goes_on:
            finished = False
            with self.surviving(thread.name):
                goes_on = turn()
                finished = True
            if not finished:
                time.sleep(self._pause)
        with self._guard:
            self._done.add(thread)
