"""The PodResources API of the stand-in kubelet (pkg/kubelet/apis/podresources/server_v1.go)."""

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import grpc

from cotenant.standins.devices import DeviceManager
from cotenant.standins.kubelet_pods import KubeletPod
from cotenant.threads import all_there
from device_plugin.api import podresources_pb2 as pb
from device_plugin.api import podresources_pb2_grpc as rpc


class PodResourcesServer(rpc.PodResourcesListerServicer):
    """Tell who holds which ids; *pods* gives the pods to list."""

    # pkg/kubelet/apis/podresources/constants.go
    PER_SECOND = 100.0
    BURST = 10

    def __init__(self, socket: Path, *, pods: Callable[[], Sequence[KubeletPod]], devices: DeviceManager) -> None:
        self.socket = socket
        self.fails: grpc.StatusCode | None = None
        """Is what List answers instead, where a test wants it to fail."""
        self._pods = pods
        self._devices = devices
        self._server: grpc.Server | None = None
        self._lock = threading.Lock()
        self._tokens = float(self.BURST)
        self._tokens_at = time.monotonic()

    def start(self) -> None:
        """Begin to serve."""
        self.socket.parent.mkdir(parents=True, exist_ok=True)
        self.socket.unlink(missing_ok=True)
        self._server = grpc.server(all_there(8, "pod-resources"))
        rpc.add_PodResourcesListerServicer_to_server(self, self._server)
        self._server.add_insecure_port(f"unix:{self.socket}")
        self._server.start()

    def stop(self) -> None:
        """Drop all connections."""
        if self._server is not None:
            self._server.stop(grace=None).wait()

    def List(  # noqa: N802
        self,
        request: pb.ListPodResourcesRequest,  # noqa: ARG002
        context: grpc.ServicerContext,
    ) -> pb.ListPodResourcesResponse:
        """List pods with what their containers hold; this also frees what ended pods held."""
        self._limit_rate(context)
        if self.fails is not None:
            context.abort(self.fails, "injected by the test")
        pods = self._pods()
        self._devices.forget_ended()
        return pb.ListPodResourcesResponse(pod_resources=[self._resources(pod) for pod in pods])

    def Get(  # noqa: N802
        self, request: pb.GetPodResourcesRequest, context: grpc.ServicerContext
    ) -> pb.GetPodResourcesResponse:
        """Give what one pod's containers hold."""
        self._limit_rate(context)
        wanted = (request.pod_namespace, request.pod_name)
        found = next((p for p in self._pods() if (p.metadata.namespace, p.metadata.name) == wanted), None)
        if found is None:
            text = f"pod {request.pod_name} in namespace {request.pod_namespace} not found"
            context.abort(grpc.StatusCode.UNKNOWN, text)
        return pb.GetPodResourcesResponse(pod_resources=self._resources(found))

    def _resources(self, pod: KubeletPod) -> pb.PodResources:
        """Tell of sidecars and containers; ordinary init containers are not listed."""
        containers = [
            pb.ContainerResources(
                name=container["name"],
                devices=[
                    pb.ContainerDevices(resource_name=resource, device_ids=sorted(ids))
                    for resource, ids in self._devices.held(pod.metadata.uid, container["name"]).items()
                ],
            )
            for container, role in pod.containers
            if role != "init"
        ]
        return pb.PodResources(name=pod.metadata.name, namespace=pod.metadata.namespace, containers=containers)

    def _limit_rate(self, context: grpc.ServicerContext) -> None:
        with self._lock:
            now = time.monotonic()
            self._tokens = min(self.BURST, self._tokens + (now - self._tokens_at) * self.PER_SECOND)
            self._tokens_at = now
            allowed = self._tokens >= 1
            self._tokens -= allowed
        if not allowed:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "rejected by rate limit")
