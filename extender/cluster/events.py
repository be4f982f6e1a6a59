"""Tell people about pods that break the rules, once each, by Events on the pod."""

import queue
import threading
from collections.abc import Callable
from datetime import UTC, datetime

import structlog
from cachetools import TTLCache

from cotenant.cluster import Cluster, ClusterError, writes

_log = structlog.get_logger(__name__)

_AGAIN_AFTER_SECONDS = 3600
_QUEUE = 1_000


def _now() -> datetime:
    return datetime.now(UTC)


class Events:
    """Write Events in the background; an Event that cannot be written is logged and dropped."""

    def __init__(self, cluster: Cluster, instance: str, now: Callable[[], datetime] = _now) -> None:
        self._cluster = cluster
        self._instance = instance
        self._now = now
        self._told: TTLCache[tuple[str, str], bool] = TTLCache(10_000, _AGAIN_AFTER_SECONDS)
        self._queue: queue.Queue[tuple[str, str, str, str] | None] = queue.Queue(_QUEUE)
        self._thread = threading.Thread(target=self._run, name="events", daemon=True)
        self._thread.start()

    def complain(self, uid: str, key: str, reason: str, sentence: str) -> None:
        """Say of the pod *key* (namespace/name) what is wrong with it, unless that was said within the hour."""
        if (uid, reason) in self._told:
            return
        self._told[uid, reason] = True
        _log.warning(sentence, pod=key, pod_uid=uid, reason=str(reason))
        try:
            self._queue.put_nowait((uid, key, reason, sentence))
        except queue.Full:
            _log.warning("too many events wait, one is dropped", pod=key, pod_uid=uid)

    def stop(self) -> None:
        """End after the Event under way."""
        self._queue.put(None)
        self._thread.join(timeout=5)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            uid, key, reason, sentence = item
            namespace, _, name = key.partition("/")
            try:
                writes.record_event(
                    self._cluster,
                    regarding=writes.Regarding(kind="Pod", name=name, namespace=namespace, uid=uid),
                    kind="Warning",
                    reason=str(reason),
                    action="Scheduling",
                    note=sentence,
                    at=self._now(),
                    reporter="cotenant.io/extender",
                    instance=self._instance,
                )
            except ClusterError as error:
                _log.warning("event not written", pod=key, pod_uid=uid, why=str(error))
