"""The pods bound to this node: a cache that follows the API server, and a fresh look where it may lag."""

import threading
import time
from collections.abc import Callable

import msgspec
import structlog

from cotenant.cluster import Cluster, NotFound, Reflector, Unreadable, writes
from cotenant.cluster.reading import answered
from cotenant.contract.names import Names
from cotenant.contract.pods import STATIC_UID, Pod, pod_decoder
from device_plugin.admission.identity import PodName

log = structlog.get_logger(__name__)


class NodePods:
    """Follow the pods of *node*."""

    def __init__(self, cluster: Cluster, node: str, names: Names, *, gone: Callable[[], None] = lambda: None) -> None:
        """Follow them; *gone* is told when a pod is gone or has ended, and must not block."""
        self._cluster = cluster
        self._gone = gone
        self._read_here = (names.grant, STATIC_UID)
        self._lock = threading.Lock()
        self._pods: dict[PodName, Pod] = {}
        # With the usual silence, not the extender's. This watch is quiet but for a bookmark a minute, which alone moves
        # its version on, and the API server keeps events for 75 s (apiserver/pkg/storage/cacher/cacher.go). Replaced
        # every 15 s it would hear no bookmark and soon have to list: from 5,000 nodes that is 333 new watches a second,
        # each a connection, and up to 60 LISTs. Who must not believe a dead watch asks kubelet or API server besides.
        self._reflector = Reflector(
            cluster,
            "/api/v1/pods",
            Pod,
            self,
            selector={"fieldSelector": f"spec.nodeName={node}"},
            by_page=lambda pods: [self._kept(pod) for pod in pods],
        )

    def start(self, *, wait_seconds: float) -> None:
        """Begin to follow; return when the pods are known, or after *wait_seconds* without them."""
        self._reflector.start()
        if not self._reflector.synced.wait(wait_seconds):
            log.warning("pods.not_listed", waited_seconds=wait_seconds)

    def stop(self) -> None:
        """End the watch."""
        self._reflector.stop(timeout=1.0)

    @property
    def synced(self) -> bool:
        """Tell whether the pods have been listed once."""
        return self._reflector.synced.is_set()

    def known(self, name: PodName) -> Pod | None:
        """Give the pod as the watch last showed it, which may be behind what the kubelet was shown."""
        with self._lock:
            return self._pods.get(name)

    def all_known(self) -> list[Pod]:
        """List all pods of the node as the watch last showed them."""
        with self._lock:
            return list(self._pods.values())

    def read(self, name: PodName, *, deadline: float) -> Pod | None:
        """Ask the API server for the pod before the monotonic time *deadline*; None when there is none.

        Raises ClusterError when it does not answer.
        """
        try:
            reply = writes.get_pod(
                self._cluster,
                namespace=name.namespace,
                name=name.name,
                timeout=max(0.05, deadline - time.monotonic()),
            )
            return answered(pod_decoder, reply)
        except NotFound:
            return None

    # The reflector's sink.

    def replaced(self, objects: list[Pod], started: int, unreadable: list[Unreadable]) -> None:  # noqa: ARG002
        """Take the pods for all there are."""
        with self._lock:
            self._pods = {PodName.of(pod): pod for pod in objects}
        self._gone()

    def changed(self, change: str, obj: Pod) -> None:
        """Take one pod's newest state."""
        name = PodName.of(obj)
        with self._lock:
            if change != "DELETED":
                self._pods[name] = self._kept(obj)
            elif (known := self._pods.get(name)) is not None and known.uid == obj.uid:
                del self._pods[name]
        if change == "DELETED" or obj.ended:
            self._gone()

    def unreadable(self, change: str, obj: Unreadable) -> None:
        """Forget a pod that no longer decodes, so that it is asked for anew."""
        log.warning("pods.unreadable", change=change, pod=f"{obj.namespace}/{obj.name}", why=obj.why)
        if obj.namespace is not None and obj.name is not None:
            with self._lock:
                self._pods.pop(PodName(obj.namespace, obj.name), None)

    def _kept(self, pod: Pod) -> Pod:
        """Keep of a pod's annotations those that are read here: all of them may have 256 KiB."""
        annotations = {key: pod.annotations[key] for key in self._read_here if key in pod.annotations}
        metadata = msgspec.structs.replace(pod.metadata, annotations=annotations)
        return msgspec.structs.replace(pod, metadata=metadata)
