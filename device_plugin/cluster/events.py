"""Tells people by Events what went wrong: best effort, and never inside a call of the kubelet's."""

import queue
from datetime import UTC, datetime
from typing import Literal, NamedTuple

import structlog

from cotenant.cluster import Cluster, ClusterError, writes
from cotenant.contract.pods import Pod
from device_plugin.admission.refusal import RefusedError
from device_plugin.threads import THREADS

log = structlog.get_logger(__name__)

_REPORTER = "cotenant.io/device-plugin"
# A container that may not start is refused again and again; more than these wait only while the API server is away.
_WAITING = 100
_REMEMBERED = 1000


class _Item(NamedTuple):
    regarding: writes.Regarding
    kind: Literal["Normal", "Warning"]
    reason: str
    action: str
    note: str
    at: datetime


class PodEvents:
    """Write Events about *node* and its pods, in a thread of its own."""

    def __init__(self, cluster: Cluster, node: str) -> None:
        self._cluster = cluster
        self._node = node
        self._waiting: queue.Queue[_Item | None] = queue.Queue(_WAITING)
        self._told: dict[tuple[str, str], str] = {}
        self._loop = THREADS.of("events", self._run)

    def start(self) -> None:
        """Begin to write."""
        self._loop.start()

    def stop(self) -> None:
        """End without waiting for what is still unsaid."""
        try:
            self._waiting.put_nowait(None)
        except queue.Full:
            return
        self._loop.join(1.0)

    def refused(self, call: str, error: RefusedError) -> None:
        """Take a refusal; drop it when too many wait, or when it is not known whom it is about."""
        if error.pod is not None:
            # The same text about the same pod says nothing new, however often the kubelet asks again.
            self.about_pod(error.pod, str(error.reason), call, str(error), topic="refused")

    def about_pod(self, pod: Pod, reason: str, action: str, note: str, *, topic: str = "") -> None:
        """Warn on a pod, unless that was the last that was said of it on the *topic*, the reason by default."""
        if self._told.get((pod.uid, topic or reason)) == note:
            return
        if len(self._told) > _REMEMBERED:
            self._told.clear()
        self._told[pod.uid, topic or reason] = note
        regarding = writes.Regarding(kind="Pod", name=pod.metadata.name, uid=pod.uid, namespace=pod.metadata.namespace)
        self._put(_Item(regarding, "Warning", reason, action, note, datetime.now(UTC)))

    def about_node(self, reason: str, action: str, note: str, *, normal: bool = False) -> None:
        """Tell something of the node; whoever calls does so only when there is news."""
        # `kubectl describe node` looks for the name where a UID belongs, as kubelets write it
        regarding = writes.Regarding(kind="Node", name=self._node, uid=self._node)
        self._put(_Item(regarding, "Normal" if normal else "Warning", reason, action, note, datetime.now(UTC)))

    def _put(self, item: _Item) -> None:
        try:
            self._waiting.put_nowait(item)
        except queue.Full:
            log.warning("event.dropped", about=item.regarding.name, reason=item.reason)

    def _run(self) -> None:
        while (item := self._waiting.get()) is not None:
            try:
                writes.record_event(
                    self._cluster,
                    regarding=item.regarding,
                    kind=item.kind,
                    reason=item.reason,
                    action=item.action,
                    note=item.note,
                    at=item.at,
                    reporter=_REPORTER,
                    instance=self._node,
                )
            except ClusterError as failure:
                log.warning("event.not_written", about=item.regarding.name, error=str(failure))
