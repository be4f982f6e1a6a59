"""The scheduling queue of the stand-in scheduler (pkg/scheduler/backend/queue/scheduling_queue.go)."""

import threading
import time
from collections.abc import Iterable
from typing import Literal

import msgspec

from cotenant.standins.scheduler_rules import Pod


class Waiting(msgspec.Struct):
    """Hold a pod without a node, and where in the queue it is."""

    pod: Pod
    arrival: int
    # busy: being scheduled or bound; parked: waits for something to change; backoff: for its time to come
    state: Literal["active", "busy", "parked", "backoff"] = "active"
    rejections: int = 0
    errors: int = 0
    until: float = 0.0
    # something changed while it was busy
    woken: bool = False


class Queue:
    """Order the pods that wait; *lock* guards it, and what a caller wants to change along with it.

    *first* and *longest* are the seconds of back-off after one failure, and at most.
    """

    def __init__(self, *, first: float, longest: float) -> None:
        self.lock = threading.RLock()
        self._changed = threading.Condition(self.lock)
        self._first = first
        self._longest = longest
        self._waiting: dict[str, Waiting] = {}
        self._arrivals = 0
        self._stopped = False

    def __contains__(self, uid: str) -> bool:
        return uid in self._waiting

    def put(self, pod: Pod) -> None:
        """Take a new pod, or the newest state of one that waits: any change of a pod wakes that pod."""
        with self._changed:
            if (known := self._waiting.get(pod.metadata.uid)) is not None:
                known.pod = pod
                self._wake([known])
            else:
                self._arrivals += 1
                self._waiting[pod.metadata.uid] = Waiting(pod, self._arrivals)
                self._changed.notify_all()

    def drop(self, uid: str) -> None:
        """Forget a pod that was bound or deleted."""
        with self._changed:
            self._waiting.pop(uid, None)

    def wake_all(self) -> None:
        """Have all pods tried again (MoveAllToActiveOrBackoffQueue)."""
        with self._changed:
            self._wake(self._waiting.values())

    def _wake(self, entries: Iterable[Waiting]) -> None:
        for entry in entries:
            if entry.state == "busy":
                entry.woken = True
            elif entry.state == "parked":
                entry.state = "backoff"
        self._changed.notify_all()

    def pop(self) -> Waiting | None:
        """Wait for the next pod; None once the queue was stopped.

        A pod whose back-off is not over comes early when no other is there (SchedulerPopFromBackoffQ), unless it backs
        off from an error.
        """
        with self._changed:
            while not self._stopped:
                now = time.monotonic()
                ready: list[Waiting] = []
                pauses: list[float] = []
                for entry in self._waiting.values():
                    if entry.state == "backoff" and entry.until <= now:
                        entry.state = "active"
                    if entry.state == "active" or (entry.state == "backoff" and not entry.errors):
                        ready.append(entry)
                    elif entry.state == "backoff":
                        pauses.append(entry.until - now)
                if ready:
                    entry = min(ready, key=lambda e: (e.state != "active", e.until, e.arrival))
                    entry.state, entry.woken = "busy", False
                    return entry
                self._changed.wait(min(pauses, default=None))
        return None

    def put_back(self, entry: Waiting, *, error: bool) -> bool:
        """Queue a pod again that was not placed; tell whether it still waits (AddUnschedulableIfNotPresent)."""
        with self._changed:
            if self._waiting.get(entry.pod.metadata.uid) is not entry:
                return False
            if error:
                entry.errors += 1
            else:
                entry.errors, entry.rejections = 0, entry.rejections + 1
            seconds = self._first * 2.0 ** min((entry.errors or entry.rejections) - 1, 16)
            entry.until = time.monotonic() + min(self._longest, seconds)
            entry.state = "backoff" if error or entry.woken else "parked"
            self._changed.notify_all()
            return True

    def stop(self) -> None:
        """Let pop return None from now on."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
