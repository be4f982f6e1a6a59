"""The device manager of the stand-in kubelet, as kubernetes 1.36 has it in pkg/kubelet/cm/devicemanager.

The order of calls, the reuse of an init container's ids, the sentences of errors and the known faults are the real
one's: device plugins are tested against what they will meet. Functions name the Go function that they follow.
"""

import random
import stat
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import grpc
import structlog

from cotenant.threads import all_there
from device_plugin.api import deviceplugin_pb2 as pb
from device_plugin.api import deviceplugin_pb2_grpc as rpc

log = structlog.get_logger(__name__)

VERSION = "v1beta1"
HEALTHY = "Healthy"
SOCKET = "kubelet.sock"

_DIAL_SECONDS = 10.0
_PRE_START_SECONDS = 30.0
# The real one dials each plugin anew; gRPC for Python would share a connection, and its back-off, between channels.
_CHANNEL = (("grpc.use_local_subchannel_pool", 1), ("grpc.default_authority", "localhost"))


class DeviceError(Exception):
    """Say why devices cannot be had, in the real kubelet's words."""


class Allocation(NamedTuple):
    """Hold the ids that a container got of one resource, and what the plugin said to it."""

    ids: frozenset[str]
    response: pb.ContainerAllocateResponse


class _Endpoint:
    """Hold the connection to one registered plugin."""

    def __init__(self, resource: str, socket: Path) -> None:
        self.resource = resource
        self.channel = grpc.insecure_channel(f"unix:{socket}", options=_CHANNEL)
        self.stub = rpc.DevicePluginStub(self.channel)
        self.options = pb.DevicePluginOptions()
        self.stopped = False

    @contextmanager
    def call(self) -> Iterator[rpc.DevicePluginStub]:
        """Call the plugin; its errors read as Go's gRPC writes them."""
        if self.stopped:
            raise DeviceError(f"endpoint {self.resource} has been stopped")
        try:
            yield self.stub
        except grpc.RpcError as error:
            raise DeviceError(_go_text(error)) from error


class DeviceManager(rpc.RegistrationServicer):
    """Keep plugins, their devices and who holds them; *active* gives the UIDs of pods that are not over."""

    def __init__(
        self, directory: Path, *, active: Callable[[], Collection[str]], changed: Callable[[], None], rng: random.Random
    ) -> None:
        self._directory = directory
        self._active = active
        self._changed = changed
        self._rng = rng
        self._lock = threading.RLock()
        self._server: grpc.Server | None = None
        self._clients: dict[str, _Endpoint] = {}
        self._endpoints: dict[str, _Endpoint] = {}
        self._healthy: dict[str, set[str]] = {}
        self._unhealthy: dict[str, set[str]] = {}
        self._allocated: dict[str, set[str]] = {}
        # by pod UID, container, resource; written to the checkpoint by the real one, kept over restart() here
        self._held: dict[str, dict[str, dict[str, Allocation]]] = {}
        self._reusable: dict[str, dict[str, set[str]]] = {}
        self.lists = 0
        """Counts the device lists that plugins have sent."""
        self.sources_ready = False
        """Is false right after a start, until all pods that were there have been admitted again."""

    def start(self) -> None:
        """Begin to take registrations: after a restart, with the devices that were held and no plugins."""
        self._directory.mkdir(parents=True, exist_ok=True)
        for path in self._directory.iterdir():  # CleanupPluginDirectory: everybody's sockets
            with suppress(FileNotFoundError):
                if stat.S_ISSOCK(path.stat().st_mode):
                    path.unlink()
        with self._lock:
            known = set(self._healthy) | set(self._unhealthy)
            self._healthy = {resource: set() for resource in known}
            self._unhealthy = {resource: set() for resource in known}
            self._endpoints, self._clients, self._reusable = {}, {}, {}
            self._allocated = self._held_ids()
            self.sources_ready = False
        server = grpc.server(all_there(8, "registration"))
        rpc.add_RegistrationServicer_to_server(self, server)
        server.add_insecure_port(f"unix:{self._directory / SOCKET}")
        server.start()
        self._server = server

    def stop(self) -> None:
        """Drop all plugins as the end of the kubelet's process does; devices stay held."""
        if self._server is not None:
            self._server.stop(grace=None).wait()
            self._server = None
        with self._lock:
            clients, self._clients = list(self._clients.values()), {}
        for client in clients:
            client.channel.close()

    def Register(self, request: pb.RegisterRequest, context: grpc.ServicerContext) -> pb.Empty:  # noqa: N802
        """Dial the plugin and ask its options before answering (plugin/v1beta1/server.go, connectClient)."""
        if request.version != VERSION:
            context.abort(
                grpc.StatusCode.UNKNOWN,
                f'requested API version "{request.version}" is not supported by kubelet. '
                f"Supported versions are [{VERSION}]",
            )
        endpoint = _Endpoint(request.resource_name, self._directory / request.endpoint)
        with self._lock:
            self._clients[endpoint.resource] = endpoint
        try:
            # not grpc.channel_ready_future, whose thread raises when the channel is closed under it
            endpoint.options = endpoint.stub.GetDevicePluginOptions(
                pb.Empty(), timeout=_DIAL_SECONDS, wait_for_ready=True
            )
        except (grpc.RpcError, ValueError) as error:  # ValueError: our own stop() closed the channel
            with self._lock:
                self._clients.pop(endpoint.resource, None)
            context.abort(grpc.StatusCode.UNKNOWN, f"failed to dial device plugin: {error}")
        with self._lock:
            self._endpoints[endpoint.resource] = endpoint
        threading.Thread(target=self._follow, args=(endpoint,), name=f"follow {endpoint.resource}", daemon=True).start()
        return pb.Empty()

    def _follow(self, endpoint: _Endpoint) -> None:
        """Take device lists until the stream ends (client.Run, runClient)."""
        try:
            for answer in endpoint.stub.ListAndWatch(pb.Empty()):
                with self._lock:
                    healthy = {device.ID for device in answer.devices if device.health == HEALTHY}
                    self._healthy[endpoint.resource] = healthy
                    self._unhealthy[endpoint.resource] = {device.ID for device in answer.devices} - healthy
                    self.lists += 1
                self._changed()
        except (grpc.RpcError, ValueError) as error:  # ValueError: our own stop() closed the channel
            log.debug("standin.stream_ended", resource=endpoint.resource, error=str(error))
        # The real one disconnects whoever is registered *now*, which need not be the one whose stream ended
        # (kubernetes#121994). A plugin that registers again and then ends its old stream loses the new one.
        with self._lock:
            current = self._clients.pop(endpoint.resource, None)
            if current is None:
                return
            current.stopped = True
            self._unhealthy.setdefault(endpoint.resource, set()).update(self._healthy.get(endpoint.resource, ()))
            self._healthy[endpoint.resource] = set()
        current.channel.close()
        self._changed()

    def cancel_stream(self, resource: str) -> None:
        """Let the kubelet lose its connection to one plugin, both processes staying up."""
        with self._lock:
            endpoint = self._clients[resource]
        endpoint.channel.close()

    def capacity(self) -> tuple[dict[str, int], dict[str, int]]:
        """Count all devices and the healthy ones, by resource (GetCapacity)."""
        with self._lock:
            allocatable = {resource: len(ids) for resource, ids in self._healthy.items()}
            return {r: n + len(self._unhealthy.get(r, ())) for r, n in allocatable.items()}, allocatable

    def serves(self, resource: str) -> bool:
        """Tell whether the resource is a plugin's (isDevicePluginResource); others are nobody's business."""
        with self._lock:
            return resource in self._healthy or resource in self._allocated

    def held(self, uid: str, container: str) -> dict[str, frozenset[str]]:
        """Give the ids that a container holds, by resource."""
        with self._lock:
            return {r: allocation.ids for r, allocation in self._held.get(uid, {}).get(container, {}).items()}

    def responses(self, uid: str, container: str) -> list[pb.ContainerAllocateResponse]:
        """Give what the plugins answered for a container."""
        with self._lock:
            return [allocation.response for allocation in self._held.get(uid, {}).get(container, {}).values()]

    def allocated(self, resource: str) -> int:
        """Count the ids of a resource that are taken."""
        with self._lock:
            return len(self._allocated.get(resource, ()))

    def has_pod(self, uid: str) -> bool:
        """Tell whether the pod holds any devices."""
        with self._lock:
            return uid in self._held

    def forget_ended(self) -> None:
        """Free what ended pods held (UpdateAllocatedDevices).

        Like the real one this also forgets ids of an Allocate that is under way: List calls it at any time.
        """
        active = set(self._active())
        with self._lock:
            if not self.sources_ready:
                return
            ended = set(self._held) - active
            if ended:
                for uid in ended:
                    del self._held[uid]
                self._allocated = self._held_ids()

    def allocate(
        self, uid: str, container: str, limits: Mapping[str, int], *, init: bool, sidecar: bool, running: bool
    ) -> None:
        """Get one container its devices (ManagerImpl.Allocate); raise DeviceError when it cannot have them."""
        reusable = self._reusable.setdefault(uid, {})
        self._reusable = {uid: reusable}
        for resource, needed in limits.items():
            if not self.serves(resource):
                continue
            self.forget_ended()
            ids = self._pick(uid, container, resource, needed, reusable.get(resource, set()), running=running)
            if ids:
                self._call_allocate(uid, container, resource, ids)
        for resource, allocation in self._held.get(uid, {}).get(container, {}).items():
            if init and not sidecar:
                reusable[resource] = reusable.get(resource, set()) | allocation.ids
            else:
                reusable[resource] = reusable.get(resource, set()) - allocation.ids

    def _pick(
        self, uid: str, container: str, resource: str, required: int, reusable: set[str], *, running: bool
    ) -> set[str]:
        """Choose ids (devicesToAllocate); empty when there is nothing to do."""
        with self._lock:
            before = self._held.get(uid, {}).get(container, {}).get(resource)
            if before is not None and len(before.ids) != required:
                raise DeviceError(
                    f'pod "{uid}" container "{container}" changed request for resource "{resource}" '
                    f"from {len(before.ids)} to {required}"
                )
            if not self.sources_ready and running:
                return set()
            if resource not in self._healthy:
                raise DeviceError(f"cannot allocate unregistered device {resource}")
            if not self._healthy[resource]:
                raise DeviceError(f"no healthy devices present; cannot allocate unhealthy devices {resource}")
            if before is not None and not before.ids <= self._healthy[resource]:
                raise DeviceError(
                    f"previously allocated devices are no longer healthy; cannot allocate unhealthy devices {resource}"
                )
            if before is not None or required == 0:
                return set()
            taken = self._take(resource, reusable, required, set())
            if len(taken) == required:
                return taken
            available = self._healthy[resource] - self._allocated.get(resource, set())
            if len(available) < required - len(taken):
                raise DeviceError(
                    f"requested number of devices unavailable for {resource}. "
                    f"Requested: {required - len(taken)}, Available: {len(available)}"
                )
            endpoint = self._endpoints.get(resource)
        preferred = self._preferred(endpoint, resource, available | taken, taken, required)
        with self._lock:
            taken |= self._take(resource, preferred & available, required - len(taken), taken)
            return taken | self._take(resource, available, required - len(taken), taken)

    def _take(self, resource: str, source: Collection[str], count: int, without: Collection[str]) -> set[str]:
        # Go walks a set in random order, so no plugin may count on one.
        left = sorted(set(source) - set(without))
        taken = set(self._rng.sample(left, min(count, len(left))))
        self._allocated.setdefault(resource, set()).update(taken)
        return taken

    def _preferred(
        self, endpoint: _Endpoint | None, resource: str, available: set[str], must: set[str], size: int
    ) -> set[str]:
        if endpoint is None:
            raise DeviceError(f"endpoint not found in cache for a registered resource: {resource}")
        if not endpoint.options.get_preferred_allocation_available:
            return set()
        request = pb.ContainerPreferredAllocationRequest(
            available_deviceIDs=self._shuffled(available),
            must_include_deviceIDs=self._shuffled(must),
            allocation_size=size,
        )
        try:
            with endpoint.call() as plugin:
                answer = plugin.GetPreferredAllocation(pb.PreferredAllocationRequest(container_requests=[request]))
        except DeviceError as error:
            raise DeviceError(f"device plugin GetPreferredAllocation rpc failed with err: {error}") from error
        return set(answer.container_responses[0].deviceIDs) if answer.container_responses else set()

    def _call_allocate(self, uid: str, container: str, resource: str, ids: set[str]) -> None:
        with self._lock:
            endpoint = self._endpoints.get(resource)
        try:
            if endpoint is None:
                raise DeviceError(f"unknown Device Plugin {resource}")
            request = pb.ContainerAllocateRequest(devices_ids=self._shuffled(ids))
            with endpoint.call() as plugin:
                answer = plugin.Allocate(pb.AllocateRequest(container_requests=[request]))
        except DeviceError:
            with self._lock:
                self._allocated = self._held_ids()
            raise
        if not answer.container_responses:
            raise DeviceError(f"no containers return in allocation response {answer}")
        with self._lock:
            by_resource = self._held.setdefault(uid, {}).setdefault(container, {})
            by_resource[resource] = Allocation(frozenset(ids), answer.container_responses[0])

    def pre_start(self, uid: str, container: str, resources: Sequence[str]) -> None:
        """Tell the plugins that a container is about to start (callPreStartContainerIfNeeded)."""
        for resource in resources:
            if not self.serves(resource):
                continue
            with self._lock:
                endpoint = self._endpoints.get(resource)
                allocation = self._held.get(uid, {}).get(container, {}).get(resource)
            if endpoint is None or not endpoint.options.pre_start_required:
                continue
            if allocation is None:
                raise DeviceError(
                    f"no devices found allocated in local cache for pod {uid}, container {container}, "
                    f"resource {resource}"
                )
            try:
                with endpoint.call() as plugin:
                    request = pb.PreStartContainerRequest(devices_ids=self._shuffled(allocation.ids))
                    plugin.PreStartContainer(request, timeout=_PRE_START_SECONDS)
            except DeviceError as error:
                raise DeviceError(f"device plugin PreStartContainer rpc failed with err: {error}") from error

    def hand_out(self, uid: str, container: str, resource: str, ids: Collection[str]) -> None:
        """Have a container hold ids that nobody was asked for now: another plugin's, or of an earlier life."""
        with self._lock:
            by_resource = self._held.setdefault(uid, {}).setdefault(container, {})
            by_resource[resource] = Allocation(frozenset(ids), pb.ContainerAllocateResponse())
            self._allocated = self._held_ids()

    def _held_ids(self) -> dict[str, set[str]]:
        ids: dict[str, set[str]] = {}
        for containers in self._held.values():
            for by_resource in containers.values():
                for resource, allocation in by_resource.items():
                    ids.setdefault(resource, set()).update(allocation.ids)
        return ids

    def _shuffled(self, ids: Collection[str]) -> list[str]:
        return self._rng.sample(sorted(ids), len(ids))


def _go_text(error: grpc.RpcError) -> str:
    """Write a gRPC error as Go does: "rpc error: code = Unknown desc = ...", the code in Go's spelling."""
    if not isinstance(error, grpc.Call):
        return str(error)
    code = "".join(word.capitalize() for word in error.code().name.split("_"))
    return f"rpc error: code = {code} desc = {error.details()}"
