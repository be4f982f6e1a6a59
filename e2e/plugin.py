"""A device plugin without a mind: it advertises and answers what it is told, for the ground's own tests.

It stands for no GPU and decides nothing; what it measures is the kubelet.
"""

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

import grpc

from device_plugin.api import deviceplugin_pb2 as pb
from device_plugin.api import deviceplugin_pb2_grpc as rpc
from device_plugin.api import podresources_pb2 as pod_pb
from device_plugin.api import podresources_pb2_grpc as pod_rpc
from e2e.node import DEVICE_PLUGINS

_LONG_MESSAGES = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))


def list_pods(socket: Path) -> Sequence[pod_pb.PodResources]:
    """Return the pods that the kubelet has admitted or is admitting, with the ids of each container."""
    with grpc.insecure_channel(f"unix://{socket}", options=_LONG_MESSAGES) as channel:
        return pod_rpc.PodResourcesListerStub(channel).List(pod_pb.ListPodResourcesRequest(), timeout=300).pod_resources


def held(socket: Path, resource: str) -> dict[tuple[str, str], set[str]]:
    """Return which ids of a resource the kubelet keeps, by pod and container; those without any are left out."""
    found: dict[tuple[str, str], set[str]] = {}
    for pod in list_pods(socket):
        for container in pod.containers:
            for devices in container.devices:
                if devices.resource_name == resource:
                    found.setdefault((pod.name, container.name), set()).update(devices.device_ids)
    return found


class ScriptedPlugin(rpc.DevicePluginServicer):
    """Serves one resource at the kubelet and registers again whenever the kubelet has started anew."""

    def __init__(
        self,
        resource: str,
        ids: Sequence[str],
        *,
        pod_resources: Path | None = None,
        cdi_device: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        """Prepare a plugin; Allocate answers with `env` and the CDI name, the same for every container.

        With `pod_resources` it calls List from inside GetPreferredAllocation and Allocate, as a plugin does that has to
        learn whose allocation this is, and keeps the seconds of each call in `list_seconds`.
        """
        self._resource = resource
        self._devices = [pb.Device(ID=device, health="Healthy") for device in ids]
        self._pod_resources = pod_resources
        self._answer = pb.ContainerAllocateResponse(envs=dict(env or {}))
        if cdi_device is not None:
            self._answer.cdi_devices.add(name=cdi_device)
        self._socket = DEVICE_PLUGINS / f"{resource.replace('/', '-')}.sock"
        self._stopped = threading.Event()
        self._server: grpc.Server | None = None
        self._keeper = threading.Thread(target=self._keep_registered, daemon=True)
        self.registrations: list[float] = []
        """Times (time.monotonic) at which a registration was answered."""
        self.list_seconds: list[float] = []

    def __enter__(self) -> Self:
        self._keeper.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._keeper.join()
        if self._server is not None:
            self._server.stop(grace=None).wait()

    def _keep_registered(self) -> None:
        while not self._stopped.wait(0.02):
            # A kubelet that starts removes every socket in its directory (devicemanager/manager.go, removeContents).
            if (DEVICE_PLUGINS / "kubelet.sock").exists() and not self._socket.exists():
                self._register()

    def _register(self) -> None:
        if self._server is not None:
            self._server.stop(grace=None).wait()
        self._server = grpc.server(ThreadPoolExecutor(8), options=_LONG_MESSAGES)
        rpc.add_DevicePluginServicer_to_server(self, self._server)
        self._server.add_insecure_port(f"unix://{self._socket}")
        self._server.start()
        request = pb.RegisterRequest(version="v1beta1", endpoint=self._socket.name, resource_name=self._resource)
        with grpc.insecure_channel(f"unix://{DEVICE_PLUGINS / 'kubelet.sock'}") as channel:
            try:
                rpc.RegistrationStub(channel).Register(request, timeout=20)
            except grpc.RpcError:
                self._socket.unlink(missing_ok=True)  # the kubelet has just gone, or is not serving yet: once more
                return
        self.registrations.append(time.monotonic())

    def _list(self) -> None:
        if self._pod_resources is None:
            return
        start = time.monotonic()
        list_pods(self._pod_resources)
        self.list_seconds.append(time.monotonic() - start)

    def GetDevicePluginOptions(  # noqa: N802
        self, request: pb.Empty, context: grpc.ServicerContext
    ) -> pb.DevicePluginOptions:
        del request, context
        return pb.DevicePluginOptions(get_preferred_allocation_available=True, pre_start_required=False)

    def ListAndWatch(  # noqa: N802
        self, request: pb.Empty, context: grpc.ServicerContext
    ) -> Iterator[pb.ListAndWatchResponse]:
        del request
        yield pb.ListAndWatchResponse(devices=self._devices)
        ended = threading.Event()
        if context.add_callback(ended.set):
            ended.wait()

    def GetPreferredAllocation(  # noqa: N802
        self, request: pb.PreferredAllocationRequest, context: grpc.ServicerContext
    ) -> pb.PreferredAllocationResponse:
        del context
        self._list()
        asked = request.container_requests[0]
        chosen = sorted(asked.available_deviceIDs)[: asked.allocation_size]
        return pb.PreferredAllocationResponse(
            container_responses=[pb.ContainerPreferredAllocationResponse(deviceIDs=chosen)]
        )

    def Allocate(self, request: pb.AllocateRequest, context: grpc.ServicerContext) -> pb.AllocateResponse:  # noqa: N802
        del request, context
        self._list()
        return pb.AllocateResponse(container_responses=[self._answer])
