"""Serves the kubelet's device plugin interface: gRPC on one side, an allocator and a DeviceList on the other."""

import time
from collections.abc import Callable, Collection, Iterator
from typing import NoReturn, Protocol

import grpc
import structlog

from cotenant.contract.reasons import Reason
from device_plugin.admission.refusal import RefusedError
from device_plugin.api import deviceplugin_pb2 as pb
from device_plugin.api import deviceplugin_pb2_grpc as rpc
from device_plugin.kubelet.devices import DeviceList

log = structlog.get_logger(__name__)

OPTIONS = pb.DevicePluginOptions(pre_start_required=True, get_preferred_allocation_available=True)

_HEALTH = {True: "Healthy", False: "Unhealthy"}
# The kubelet shows code and text of whatever we answer to people, and treats all codes alike.
_CODES = {
    Reason.NOT_IDENTIFIED: grpc.StatusCode.ABORTED,
    Reason.WRONG_DEVICES: grpc.StatusCode.ABORTED,
    Reason.POD_GONE: grpc.StatusCode.NOT_FOUND,
}


class Streams(Protocol):
    """Be told when the kubelet begins and ends to follow the devices."""

    def opened(self) -> None:
        """Know that a stream has been opened and has its first list."""

    def ended(self) -> None:
        """Know that a stream has ended."""


class Allocator(Protocol):
    """Answer the kubelet's questions about one resource; any method may raise RefusedError, from any thread."""

    def prefer(self, available: Collection[str], must: Collection[str], count: int) -> list[str]:
        """Choose so many of the ids *available* for the container being admitted, with all that it *must* take."""

    def allocate(self, ids: Collection[str]) -> pb.ContainerAllocateResponse:
        """Say what a container gets that the kubelet gives *ids*."""

    def start(self, ids: Collection[str]) -> None:
        """Let the container with *ids* start, or not."""


class DevicePluginService(rpc.DevicePluginServicer):
    """Answer one kubelet for one resource.

    *refused* hears of every no, with the call it was given in, and *answered* of every call: its name, "ok" or
    "refused", and its seconds. Neither may block, since the kubelet admits nothing meanwhile.
    """

    def __init__(
        self,
        *,
        devices: DeviceList,
        allocator: Allocator,
        streams: Streams,
        refused: Callable[[str, RefusedError], None],
        answered: Callable[[str, str, float], None],
    ) -> None:
        self._devices = devices
        self._allocator = allocator
        self._streams = streams
        self._refused = refused
        self._answered = answered

    def GetDevicePluginOptions(  # noqa: N802
        self,
        request: pb.Empty,  # noqa: ARG002
        context: grpc.ServicerContext,  # noqa: ARG002
    ) -> pb.DevicePluginOptions:
        """Ask to be called before allocations and starts; the kubelet waits for this inside Register."""
        return OPTIONS

    def ListAndWatch(  # noqa: N802
        self,
        request: pb.Empty,  # noqa: ARG002
        context: grpc.ServicerContext,
    ) -> Iterator[pb.ListAndWatchResponse]:
        """Send all devices at once and again at every change, until the kubelet or we end it."""
        if not context.add_callback(self._devices.wake):
            return
        first = True
        try:
            for devices in self._devices.follow(context.is_active):
                yield pb.ListAndWatchResponse(
                    devices=[pb.Device(ID=device, health=_HEALTH[healthy]) for device, healthy in devices.items()]
                )
                if first:
                    first = False
                    self._streams.opened()
        finally:
            if not first:
                self._streams.ended()

    def GetPreferredAllocation(  # noqa: N802
        self, request: pb.PreferredAllocationRequest, context: grpc.ServicerContext
    ) -> pb.PreferredAllocationResponse:
        """Steer the kubelet to the ids of the granted GPU."""
        began = time.perf_counter()
        response = pb.PreferredAllocationResponse()
        for container in request.container_requests:
            try:
                chosen = self._allocator.prefer(
                    container.available_deviceIDs, container.must_include_deviceIDs, container.allocation_size
                )
            except RefusedError as error:
                self._refuse("GetPreferredAllocation", error, context, began)
            response.container_responses.add(deviceIDs=chosen)
        self._answered("GetPreferredAllocation", "ok", time.perf_counter() - began)
        return response

    def Allocate(self, request: pb.AllocateRequest, context: grpc.ServicerContext) -> pb.AllocateResponse:  # noqa: N802
        """Give the container being admitted what it was granted."""
        began = time.perf_counter()
        response = pb.AllocateResponse()
        for container in request.container_requests:
            try:
                response.container_responses.append(self._allocator.allocate(container.devices_ids))
            except RefusedError as error:
                self._refuse("Allocate", error, context, began)
        self._answered("Allocate", "ok", time.perf_counter() - began)
        return response

    def PreStartContainer(  # noqa: N802
        self, request: pb.PreStartContainerRequest, context: grpc.ServicerContext
    ) -> pb.PreStartContainerResponse:
        """Hold a container back that is not the one its device ids were answered for; the kubelet asks again."""
        began = time.perf_counter()
        try:
            self._allocator.start(request.devices_ids)
        except RefusedError as error:
            self._refuse("PreStartContainer", error, context, began)
        self._answered("PreStartContainer", "ok", time.perf_counter() - began)
        return pb.PreStartContainerResponse()

    def _refuse(self, call: str, error: RefusedError, context: grpc.ServicerContext, began: float) -> NoReturn:
        self._answered(call, "refused", time.perf_counter() - began)
        keys = {} if error.pod is None else {"pod": error.pod.key, "pod_uid": error.pod.uid}
        log.warning("call.refused", call=call, reason=str(error.reason), why=str(error), **keys)
        self._refused(call, error)
        context.abort(_CODES.get(error.reason, grpc.StatusCode.FAILED_PRECONDITION), str(error))
