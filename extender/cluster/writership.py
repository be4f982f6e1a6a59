"""Know whether this extender is the one that may bind, and take over from the one before it.

Three things keep two extenders from giving the same memory twice:

- The fence. Every Binding names the term under which it was sent, and a ValidatingAdmissionPolicy refuses those of any
  other term than the Lease's (manifests/*/writer.yaml). Neither a frozen process nor a packet that was long on its way
  gets past it.
- The settling. API servers learn of a new term by a watch, each at its own time, so a new writer first waits. After
  that nothing of an earlier term can be written any more, and one LIST tells all that was.
- This class, which is asked before each Binding. By itself it is no fence: between its yes and the write, anything may
  happen. It saves calls that would be refused, and it is all there is on clusters without the policy.
"""

import threading
import time
from collections.abc import Callable
from typing import Protocol

import msgspec
import structlog

from cotenant.threads import Threads

_log = structlog.get_logger(__name__)


class Writer(Protocol):
    """Be asked before each Binding."""

    def token(self) -> str | None:
        """Give what a Binding must carry now, "" for nothing; None where this extender must not bind."""

    def wait(self, seconds: float) -> bool:
        """Wait until it may bind, at most so many seconds, and not where another one may; tell whether it may."""


class Sole:
    """Be the writer always: there is one extender only, and no Lease."""

    def token(self) -> str | None:
        """Have Bindings carry nothing."""
        return ""

    def wait(self, seconds: float) -> bool:  # noqa: ARG002 - it never has to
        """May bind."""
        return True


class _Standing(msgspec.Struct, frozen=True):
    """Hold what the Lease said last, until when to believe it, and how many terms there have been with this one."""

    holder: str
    mine: bool
    token: str
    until: float
    terms: int = 0


class Writership:
    """Follow a Lease and be the writer while it is ours, from the end of each take-over on.

    Args:
        settle: seconds to wait at the beginning of a term.
        list_again: begins a LIST of all pods and gives what is set once the ledger has it.
        begin: called after that, before the first Binding of a term.
        clock: monotonic seconds.

    """

    def __init__(
        self,
        *,
        settle: float,
        list_again: Callable[[], threading.Event],
        begin: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        threads: Threads | None = None,
    ) -> None:
        self._settle = settle
        self._list_again = list_again
        self._begin = begin
        self._clock = clock
        self._condition = threading.Condition()
        self._standing = _Standing("", mine=False, token="", until=0.0)
        # How many terms there had been with the last one that was taken over. Not its token, which may come back after
        # another one's: a Lease that was deleted counts from 0 again, and one of a backup from long ago.
        self._ready = 0
        self._stopping = threading.Event()
        self._thread = (threads or Threads()).of("take over", self._turn)

    def start(self) -> None:
        """Begin to take over what becomes ours."""
        self._thread.start()

    def stop(self) -> None:
        """Be the writer no more."""
        self._stopping.set()
        with self._condition:
            self._condition.notify_all()

    def observe(self, holder: str, transitions: int, *, mine: bool, until: float) -> None:
        """Take over what the Lease says; *until* is the clock up to which that may be believed without hearing more."""
        token = f"{holder}/{transitions}" if holder else ""
        before = self._standing
        with self._condition:
            terms = before.terms + (token != before.token)
            self._standing = _Standing(holder, mine and bool(token), token, until, terms)
            self._condition.notify_all()
        if before.token != token:
            _log.info("the writer is another one now", holder=holder or "nobody", term=transitions, ours=mine)

    def token(self) -> str | None:
        """Give the term that Bindings must name; None where this extender must not bind."""
        standing = self._standing
        ours = standing.mine and standing.terms == self._ready and not self._stopping.is_set()
        return standing.token if ours and self._clock() < standing.until else None

    def wait(self, seconds: float) -> bool:
        """Wait until it may bind, at most so many seconds; not at all while the Lease is another's."""
        deadline = self._clock() + seconds
        while self.token() is None:
            with self._condition:
                standing, now = self._standing, self._clock()
                others = bool(standing.holder) and not standing.mine and now < standing.until
                if others or now >= deadline or self._stopping.is_set():
                    return False
                # in short steps, as the end of another's term makes no sound
                self._condition.wait(min(0.1, deadline - now))
        return True

    def _turn(self) -> bool:
        with self._condition:
            while not (self._stopping.is_set() or (self._standing.mine and self._standing.terms != self._ready)):
                self._condition.wait()
            term = self._standing.terms
        if self._stopping.wait(self._settle):
            return False
        listed = self._list_again()
        while not listed.wait(0.02):
            if self._stopping.is_set() or self._standing.terms != term:
                return True
        self._take(term)
        return True

    def _take(self, term: int) -> None:
        with self._condition:
            if self._standing.terms != term:
                return
            self._begin()
            self._ready, token = term, self._standing.token
            self._condition.notify_all()
        _log.info("taken over: this extender binds", term=token)
