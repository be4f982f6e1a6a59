"""Tells people by Events why a pod got no GPU: best effort, and never inside a call of the kubelet's."""

import queue
import threading
from datetime import UTC, datetime

import structlog

from cotenant.cluster import Cluster, ClusterError, writes
from device_plugin.refusal import RefusedError

log = structlog.get_logger(__name__)

_REPORTER = "cotenant.io/device-plugin"
# A container that may not start is refused again and again; more than these wait only while the API server is away.
_WAITING = 100


class PodEvents:
    """Write Events about refused pods of *node*, in a thread of its own."""

    def __init__(self, cluster: Cluster, node: str) -> None:
        self._cluster = cluster
        self._node = node
        self._waiting: queue.Queue[tuple[str, RefusedError, datetime] | None] = queue.Queue(_WAITING)
        self._told: dict[str, str] = {}
        self._thread = threading.Thread(target=self._run, name="events", daemon=True)

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    def stop(self) -> None:
        """End without waiting for what is still unsaid."""
        try:
            self._waiting.put_nowait(None)
        except queue.Full:
            return
        self._thread.join(timeout=1.0)

    def refused(self, call: str, error: RefusedError) -> None:
        """Take a refusal; drop it when too many wait, or when it is not known whom it is about."""
        # The same text about the same pod says nothing new, however often the kubelet asks again.
        if error.pod is None or self._told.get(error.pod.uid) == str(error):
            return
        if len(self._told) > _WAITING:
            self._told.clear()
        self._told[error.pod.uid] = str(error)
        try:
            self._waiting.put_nowait((call, error, datetime.now(UTC)))
        except queue.Full:
            log.warning("event.dropped", pod=error.pod.key)

    def _run(self) -> None:
        while (item := self._waiting.get()) is not None:
            call, error, at = item
            pod = error.pod
            if pod is None:
                continue
            try:
                writes.record_event(
                    self._cluster,
                    regarding=writes.Regarding(
                        kind="Pod", name=pod.metadata.name, uid=pod.uid, namespace=pod.metadata.namespace
                    ),
                    kind="Warning",
                    reason=str(error.reason),
                    action=call,
                    note=str(error),
                    at=at,
                    reporter=_REPORTER,
                    instance=self._node,
                )
            except ClusterError as failure:
                log.warning("event.not_written", pod=pod.key, error=str(failure))
