"""Tell people about pods that break the rules, once each, by Events on the pod."""

import queue
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import NamedTuple

import structlog
from cachetools import TLRUCache

from cotenant.cluster import Cluster, ClusterError, Conflict, writes
from cotenant.threads import Threads

_log = structlog.get_logger(__name__)

_AGAIN_SECONDS = 3600.0
# An API server keeps Events a minute longer than that (etcd3/lease_manager.go), and when one of an earlier process ends
# is not known.
_STILL_THERE_SECONDS = 300.0
_QUEUE = 1_000
# Who stands by says nothing, but keeps what it would have said for the time that a take-over takes: the LIST of a new
# writer comes before it is one.
_KEPT = 1_000
_KEPT_SECONDS = 60.0
_LOOK_SECONDS = 0.5
_THREAD = "events"

# Told of a pod: its UID, namespace/name, a reason, and a sentence.
Tell = Callable[[str, str, str, str], None]


class _Told(NamedTuple):
    """Hold what is to be said of a pod."""

    uid: str
    key: str
    reason: str
    sentence: str
    since: float


class Events:
    """Write Events in the background; an Event that cannot be written is logged and dropped.

    *may_write* tells whether this extender is the one that writes. An Event's name follows from pod and reason, so that
    the next writer, or the next process, does not say again what was said within the hour that Events are kept.
    """

    def __init__(
        self,
        cluster: Cluster,
        instance: str,
        *,
        may_write: Callable[[], bool],
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        clock: Callable[[], float] = time.monotonic,
        threads: Threads,
    ) -> None:
        self._cluster = cluster
        self._instance = instance
        self._may_write = may_write
        self._now = now
        # for how many seconds it is not said again
        self._told: TLRUCache[tuple[str, str], float] = TLRUCache(
            10_000, ttu=lambda _key, seconds, now: now + seconds, timer=clock
        )
        self._queue: queue.Queue[_Told | None] = queue.Queue(_QUEUE)
        # only the thread's
        self._kept: list[_Told] = []
        self._threads = threads
        self._thread = self._threads.of(_THREAD, self._turn)
        self._thread.start()

    def complain(self, uid: str, key: str, reason: str, sentence: str) -> None:
        """Say of the pod *key* (namespace/name) what is wrong with it, unless that was said within the hour."""
        if (uid, reason) in self._told:
            return
        try:
            self._queue.put_nowait(_Told(uid, key, str(reason), sentence, time.monotonic()))
        except queue.Full:
            _log.warning("too many events wait, one is dropped", pod=key, pod_uid=uid)

    def stop(self) -> None:
        """End after the Event under way."""
        self._queue.put(None)
        self._thread.join(5)

    def _turn(self) -> bool:
        try:
            item = self._queue.get(timeout=_LOOK_SECONDS if self._kept else None)
        except queue.Empty:
            self._say_kept()
            return True
        if item is None:
            return False
        if self._may_write():
            self._say(item)
        else:
            self._kept = [*self._kept[1 - _KEPT :], item]
        return True

    def _say_kept(self) -> None:
        fresh = time.monotonic() - _KEPT_SECONDS
        self._kept = [one for one in self._kept if one.since > fresh]
        if self._may_write():
            kept, self._kept = self._kept, []
            for one in kept:
                with self._threads.surviving(_THREAD):
                    self._say(one)

    def _say(self, told: _Told) -> None:
        if (told.uid, told.reason) in self._told:
            return
        self._told[told.uid, told.reason] = _AGAIN_SECONDS
        _log.warning(told.sentence, pod=told.key, pod_uid=told.uid, reason=told.reason)
        namespace, _, name = told.key.partition("/")
        try:
            writes.record_event(
                self._cluster,
                regarding=writes.Regarding(kind="Pod", name=name, namespace=namespace, uid=told.uid),
                kind="Warning",
                reason=told.reason,
                action="Scheduling",
                note=told.sentence,
                at=self._now(),
                reporter="cotenant.io/extender",
                instance=self._instance,
                once=True,
            )
        except Conflict:
            self._told[told.uid, told.reason] = _STILL_THERE_SECONDS
            _log.info("this was said within the hour already", pod=told.key, pod_uid=told.uid, reason=told.reason)
        except ClusterError as error:
            _log.warning("event not written", pod=told.key, pod_uid=told.uid, why=str(error))
