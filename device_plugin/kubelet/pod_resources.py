"""Asks the kubelet who holds which device ids."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import grpc

from device_plugin.admission.identity import Devices, ListedPod, PodName
from device_plugin.admission.refusal import PodResourcesError
from device_plugin.api import podresources_pb2 as pb
from device_plugin.api import podresources_pb2_grpc as rpc

# A node has 110 pods, a pod 10,000 ids at the very most; gRPC's default of 4 MiB would be reached by a few such.
_MAX_MESSAGE_BYTES = 64 << 20
_CHANNEL = (
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    # A kubelet that restarts is back in less than a second; gRPC's default would wait up to two minutes to look.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 500),
)
# The kubelet answers 100 calls a second and 10 at once (pkg/kubelet/apis/podresources/constants.go).
_RATE_LIMIT_PAUSE_SECONDS = 0.02


class PodResources:
    """Ask at *socket* for the ids of the resources that *counts* names."""

    def __init__(self, socket: Path, counts: Callable[[str], bool]) -> None:
        self._socket = socket
        self._counts = counts
        self._channel = grpc.insecure_channel(f"unix:{socket}", options=_CHANNEL)
        self._stub = rpc.PodResourcesListerStub(self._channel)

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def list(self, *, deadline: float) -> list[ListedPod]:
        """List the pods with the ids that count, asking again until the monotonic time *deadline*.

        Raises PodResourcesError.
        """
        return [self._listed(pod) for pod in self._ask(deadline)]

    def devices(self, *, deadline: float) -> Sequence[Devices]:
        """List what each container has of each resource, whoever's; raise PodResourcesError as *list* does."""
        return [
            Devices(PodName(pod.namespace, pod.name), held.resource_name, frozenset(held.device_ids))
            for pod in self._ask(deadline)
            for container in pod.containers
            for held in container.devices
        ]

    def _ask(self, deadline: float) -> Sequence[pb.PodResources]:
        while True:
            try:
                left = max(0.05, deadline - time.monotonic())
                reply = self._stub.List(pb.ListPodResourcesRequest(), timeout=left, wait_for_ready=True)
            except grpc.RpcError as error:
                limited = isinstance(error, grpc.Call) and error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                if not limited or time.monotonic() + _RATE_LIMIT_PAUSE_SECONDS > deadline:
                    details = error.details() if isinstance(error, grpc.Call) else error
                    raise PodResourcesError(
                        f"the kubelet does not list its pods at {self._socket}: {details}"
                    ) from error
            else:
                return reply.pod_resources
            time.sleep(_RATE_LIMIT_PAUSE_SECONDS)

    def _listed(self, pod: pb.PodResources) -> ListedPod:
        return ListedPod(
            name=PodName(pod.namespace, pod.name),
            ids={
                container.name: frozenset(
                    device
                    for devices in container.devices
                    if self._counts(devices.resource_name)
                    for device in devices.device_ids
                )
                for container in pod.containers
            },
        )
