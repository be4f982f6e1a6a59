"""Marks pods that use more GPU memory than they were granted, and evicts them where that is configured."""

import queue
import threading
import time
from collections.abc import Callable, Mapping

import structlog
from cachetools import TTLCache

from cotenant.cluster import Cluster, ClusterError, NotFound, writes
from cotenant.contract.names import Names
from cotenant.threads import Threads
from extender.cluster.events import Tell
from extender.cluster.evictions import Cause, Evictions, Outcome
from extender.ledger import Ledger
from extender.overuse import Reports, Suspect

_log = structlog.get_logger(__name__)

_REQUEST_SECONDS = 5.0
_REMEMBERED = 10_000
_HOUR = 3600.0
_LOOK_SECONDS = 0.05
# How often who stands by looks whether it has become the one that writes; nothing tells it so.
_TAKEN_OVER_SECONDS = 0.5
_THREAD = "overuse"


class Evictor:
    """Follow the device plugins' reports from a thread of its own; never touch anybody but the over-user itself.

    *grace* is for how many seconds a pod may be over before it is evicted, None for ever. *may_write* tells whether
    this extender is the one that writes.
    """

    def __init__(
        self,
        cluster: Cluster,
        ledger: Ledger,
        names: Names,
        tell: Tell,
        evictions: Evictions,
        *,
        grace: float | None,
        may_write: Callable[[], bool] = lambda: True,
        threads: Threads | None = None,
    ) -> None:
        self._cluster = cluster
        self._ledger = ledger
        self._names = names
        self._tell = tell
        self._grace = grace
        self._synced: Callable[[], bool] = lambda: False
        self._evictions = evictions
        self._may_write = may_write
        self._reports = Reports(self._node_of)
        self._texts: dict[str, str] = {}
        # what stands on pods, as the watch shows it
        self._marks: dict[str, tuple[str, str]] = {}
        # marked by somebody else, and perhaps no longer over
        self._unsure: set[str] = set()
        self._told: TTLCache[str, None] = TTLCache(_REMEMBERED, _HOUR)
        self._evicted: TTLCache[str, None] = TTLCache(_REMEMBERED, _HOUR)
        self._queue: queue.Queue[tuple[str, str | None] | None] = queue.Queue()
        self._stopping = threading.Event()
        self._threads = threads or Threads()
        self._thread = self._threads.of(_THREAD, self._turn)

    def start(self, synced: Callable[[], bool]) -> None:
        """Begin to follow; *synced* tells whether all nodes and pods have been read once."""
        self._synced = synced
        self._thread.start()

    def stop(self) -> None:
        """End after the write under way."""
        self._stopping.set()
        self._queue.put(None)
        self._thread.join(_REQUEST_SECONDS)

    # What the watches tell; quick, since the ledger waits.

    def node_seen(self, name: str, annotations: Mapping[str, str] | None) -> None:
        """Take a node's annotations."""
        text = (annotations or {}).get(self._names.overusers)
        if text is None and name not in self._texts:
            return
        if text != self._texts.get(name):
            if text is None:
                del self._texts[name]
            else:
                self._texts[name] = text
            self._queue.put((name, text))

    def node_gone(self, name: str) -> None:
        """Take over that a node is gone."""
        self.node_seen(name, None)

    def pod_seen(self, uid: str, key: str, annotations: Mapping[str, str] | None) -> None:
        """Take a pod's annotations."""
        text = (annotations or {}).get(self._names.overuse)
        if text is not None:
            if uid not in self._marks:
                self._queue.put(("", uid))  # it may be over since, while nobody was there to say so
            self._marks[uid] = (key, text)
        elif uid in self._marks:
            del self._marks[uid]

    def pod_gone(self, uid: str) -> None:
        """Take over that a pod is gone."""
        self._marks.pop(uid, None)

    # The thread.

    def _turn(self) -> bool:
        # a report says something of pods, and those are not known before
        if not self._synced():
            return not self._stopping.wait(_LOOK_SECONDS)
        try:
            item = self._queue.get(timeout=_TAKEN_OVER_SECONDS if self._unsure else None)
        except queue.Empty:
            self._clear_up()
            return True
        if item is None:
            return False
        node, text = item
        if node:
            self._follow(node, text)
        elif text is not None:
            self._unsure.add(text)
        if self._queue.empty():
            self._clear_up()
        return True

    def _clear_up(self) -> None:
        """Take away the marks of those that are no longer over, as soon as we may."""
        if self._may_write():
            unsure, self._unsure = self._unsure - self._reports.all_over(), set()
            for uid in unsure:
                with self._threads.surviving(_THREAD):
                    self._unmark(uid)

    def _follow(self, node: str, text: str | None) -> None:
        outcome = self._reports.take(node, text, time.monotonic())
        for problem in outcome.problems:
            if problem not in self._told:
                self._told[problem] = None
                _log.warning("overuse not believed", node=node, why=problem)
        if not self._may_write():
            self._unsure.update(outcome.ended)  # for when we are the one that writes
            return
        for uid in outcome.ended:
            with self._threads.surviving(_THREAD):
                self._unmark(uid)
        for suspect in outcome.over.values():
            with self._threads.surviving(_THREAD):
                self._mark(suspect)
                if self._grace is not None and suspect.last - suspect.since >= self._grace:
                    self._evict(suspect)

    def _mark(self, suspect: Suspect) -> None:
        hold = self._ledger.hold(suspect.uid)
        if hold is not None and self._marks.get(suspect.uid, ("", ""))[1] != suspect.sentence:
            self._annotate(suspect.uid, hold.key, suspect.sentence)

    def _unmark(self, uid: str) -> None:
        marked = self._marks.get(uid)
        hold = self._ledger.hold(uid)
        if marked is not None or hold is not None:
            self._annotate(uid, marked[0] if marked else hold.key if hold else "", None)

    def _annotate(self, uid: str, key: str, text: str | None) -> None:
        namespace, _, name = key.partition("/")
        try:
            writes.annotate_pod(
                self._cluster,
                namespace=namespace,
                name=name,
                uid=uid,
                annotations={self._names.overuse: text},
                timeout=_REQUEST_SECONDS,
            )
        except NotFound:
            _log.info("overuse of a pod that is gone", pod=key, pod_uid=uid)
        except ClusterError as error:
            _log.warning("overuse not written", pod=key, pod_uid=uid, why=str(error))

    def _evict(self, suspect: Suspect) -> None:
        hold = self._ledger.hold(suspect.uid)
        if hold is None or hold.node != suspect.node or suspect.uid in self._evicted:
            return
        sentence = suspect.sentence
        # what failed otherwise is tried again upon the next report
        match self._evictions.evict(suspect.uid, hold.key, Cause.OVERUSE):
            case Outcome.OK:
                self._evicted[suspect.uid] = None
                told = "GPUMemoryEvicted", f"{sentence}; evicted after {self._grace:g} s of it"
            case Outcome.BLOCKED:
                told = "GPUMemoryEvictionBlocked", f"{sentence}; a disruption budget keeps it from being evicted"
            case Outcome.FORBIDDEN:
                why = "it is not evicted, since the extender may not: apply manifests/eviction"
                told = "GPUMemoryEvictionForbidden", f"{sentence}; {why}"
            case _:
                return
        self._tell(suspect.uid, hold.key, *told)

    def _node_of(self, uid: str) -> str:
        hold = self._ledger.hold(uid)
        return hold.node if hold is not None else ""
