"""Ties a stand-in kubelet to an API server: it gets the pods bound to its node and writes their status back."""

import queue
import threading
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import structlog

from cotenant.cluster import Cluster, ClusterError, NotFound, Reflector, Unreadable
from cotenant.standins.kubelet import Kubelet
from cotenant.standins.kubelet_pods import KubeletPod

log = structlog.get_logger(__name__)

_ATTEMPTS = 5
_RETRY_SECONDS = 0.2


class ApiLink:
    """Follow the pods of one node and write what the kubelet reports, in the order it reports it.

    *delete* ends a pod that was asked to go, as the kubelet does with a grace of 0, by namespace and name.
    """

    def __init__(self, cluster: Cluster, node: str, *, delete: Callable[[str, str], None]) -> None:
        self._cluster = cluster
        self._node = node
        self._delete = delete
        self._kubelet: Kubelet | None = None
        self._seen: dict[str, KubeletPod] = {}
        self._writes: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write_all, name=f"kubelet {node} writes", daemon=True)
        self._stopping = threading.Event()
        self._reflector = Reflector(
            cluster, "/api/v1/pods", KubeletPod, self, selector={"fieldSelector": f"spec.nodeName={node}"}
        )

    def start(self, kubelet: Kubelet) -> None:
        """Begin to feed *kubelet*."""
        self._kubelet = kubelet
        self._writer.start()
        self._reflector.start()

    def stop(self) -> None:
        """End both directions."""
        self._reflector.stop()
        self._stopping.set()
        self._writes.put(None)
        if self._writer.is_alive():
            self._writer.join()

    # The reflector's sink.

    def replaced(self, objects: list[KubeletPod], started: int, unreadable: list[Unreadable]) -> None:  # noqa: ARG002
        """Take the pods for all there are."""
        for uid in self._seen.keys() - {pod.metadata.uid for pod in objects}:
            self.changed("DELETED", self._seen[uid])
        for pod in objects:
            self.changed("MODIFIED", pod)

    def changed(self, change: str, obj: KubeletPod) -> None:
        """Tell the kubelet of one pod."""
        if self._kubelet is None:
            return
        if change == "DELETED":
            self._seen.pop(obj.metadata.uid, None)
            self._kubelet.remove(obj.metadata.uid)
        else:
            self._seen[obj.metadata.uid] = obj
            self._kubelet.update(obj)

    def unreadable(self, change: str, obj: Unreadable) -> None:
        """Skip a pod that is no pod."""

    # The kubelet's reporter.

    def pod_status(self, pod: KubeletPod, status: dict[str, Any]) -> None:
        """Write the pod's status, if it is still the same pod."""
        body = msgspec.json.encode({"metadata": {"uid": pod.metadata.uid}, "status": status})
        path = f"/api/v1/namespaces/{pod.metadata.namespace}/pods/{pod.metadata.name}/status"
        self._writes.put(lambda: self._ignore_reply(path, body))

    def pod_gone(self, pod: KubeletPod) -> None:
        """Delete the pod for good."""
        self._writes.put(lambda: self._delete(pod.metadata.namespace, pod.metadata.name))

    def node_status(self, capacity: Mapping[str, int], allocatable: Mapping[str, int]) -> None:
        """Write what the node has; a real kubelet does so every 10 s, this one at once."""
        amounts = {
            key: {resource: str(count) for resource, count in counts.items()}
            for key, counts in (("capacity", capacity), ("allocatable", allocatable))
        }
        body = msgspec.json.encode({"status": amounts})
        self._writes.put(lambda: self._ignore_reply(f"/api/v1/nodes/{self._node}/status", body))

    def _ignore_reply(self, path: str, body: bytes) -> None:
        self._cluster.patch(path, body)

    def _write_all(self) -> None:
        while (write := self._writes.get()) is not None:
            for _ in range(_ATTEMPTS):
                try:
                    write()
                    break
                except NotFound:
                    break
                except ClusterError as error:
                    log.warning("standin.write_failed", node=self._node, error=str(error))
                    if self._stopping.wait(_RETRY_SECONDS):
                        return
