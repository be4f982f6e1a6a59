"""The stand-in kubelet does to a device plugin what the real one does, its faults included."""

import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from cotenant.standins.kubelet import Kubelet
from device_plugin.api import deviceplugin_pb2 as pb
from device_plugin.api import deviceplugin_pb2_grpc as rpc
from device_plugin.api import podresources_pb2 as pod_pb
from device_plugin.api import podresources_pb2_grpc as pod_rpc

RESOURCE = "example.com/thing"


class Plugin(rpc.DevicePluginServicer):
    """Advertise *ids* and write down every call; refuse those named in *refuses*."""

    def __init__(self, kubelet: Kubelet, ids: Sequence[str], socket: str = "thing.sock") -> None:
        self.kubelet = kubelet
        self.ids = ids
        self.socket = socket
        self.calls: list[tuple[str, frozenset[str]]] = []
        self.refuses: set[str] = set()
        self.listed_in_allocate: list[pod_pb.PodResources] = []
        self._end = threading.Event()
        self._server = grpc.server(ThreadPoolExecutor(8))
        rpc.add_DevicePluginServicer_to_server(self, self._server)

    @property
    def _folder(self) -> Path:
        return self.kubelet.directory / "device-plugins"

    def register(self, version: str = "v1beta1") -> None:
        lists = self.kubelet.devices.lists
        self._server.add_insecure_port(f"unix:{self._folder / self.socket}")
        self._server.start()
        with grpc.insecure_channel(f"unix:{self._folder / 'kubelet.sock'}") as channel:
            request = pb.RegisterRequest(version=version, endpoint=self.socket, resource_name=RESOURCE)
            rpc.RegistrationStub(channel).Register(request, timeout=10)
        self.kubelet.wait(lambda: self.kubelet.devices.lists > lists, "the device list")

    def end_stream(self) -> None:
        self._end.set()

    def stop(self) -> None:
        self._end.set()
        self._server.stop(grace=None).wait()

    def _note(self, call: str, ids: Sequence[str], context: grpc.ServicerContext) -> None:
        self.calls.append((call, frozenset(ids)))
        if call in self.refuses:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"{call} says no")

    def GetDevicePluginOptions(self, request: pb.Empty, context: grpc.ServicerContext) -> pb.DevicePluginOptions:  # noqa: ARG002, N802
        self.calls.append(("options", frozenset()))
        return pb.DevicePluginOptions(pre_start_required=True, get_preferred_allocation_available=True)

    def ListAndWatch(self, request: pb.Empty, context: grpc.ServicerContext) -> Iterator[pb.ListAndWatchResponse]:  # noqa: ARG002, N802
        yield pb.ListAndWatchResponse(devices=[pb.Device(ID=device, health="Healthy") for device in self.ids])
        context.add_callback(self._end.set)
        self._end.wait()

    def GetPreferredAllocation(  # noqa: N802
        self, request: pb.PreferredAllocationRequest, context: grpc.ServicerContext
    ) -> pb.PreferredAllocationResponse:
        (asked,) = request.container_requests
        self._note("prefer", asked.must_include_deviceIDs, context)
        chosen = [*asked.must_include_deviceIDs, *sorted(asked.available_deviceIDs, reverse=True)]
        answer = pb.ContainerPreferredAllocationResponse(deviceIDs=list(dict.fromkeys(chosen))[: asked.allocation_size])
        return pb.PreferredAllocationResponse(container_responses=[answer])

    def Allocate(self, request: pb.AllocateRequest, context: grpc.ServicerContext) -> pb.AllocateResponse:  # noqa: N802
        (asked,) = request.container_requests
        self.listed_in_allocate = pod_resources(self.kubelet)
        self._note("allocate", asked.devices_ids, context)
        answer = pb.ContainerAllocateResponse(envs={"FROM": "plugin", "ONLY": "plugin"})
        return pb.AllocateResponse(container_responses=[answer])

    def PreStartContainer(  # noqa: N802
        self, request: pb.PreStartContainerRequest, context: grpc.ServicerContext
    ) -> pb.PreStartContainerResponse:
        self._note("prestart", request.devices_ids, context)
        return pb.PreStartContainerResponse()


@pytest.fixture
def kubelet() -> Iterator[Kubelet]:
    folder = Path(tempfile.mkdtemp(prefix="cotenant-"))
    with Kubelet("n", folder, retry_seconds=0.02) as running:
        yield running
    shutil.rmtree(folder)


@pytest.fixture
def plugin(kubelet: Kubelet) -> Iterator[Plugin]:
    registered = Plugin(kubelet, [f"id-{n}" for n in range(8)])
    registered.register()
    yield registered
    registered.stop()


def pod(name: str, *containers: dict[str, Any], init: Sequence[dict[str, Any]] = (), **metadata: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "uid": name, **metadata},
        "spec": {"containers": list(containers), "initContainers": list(init)},
    }


def container(name: str, amount: int, **more: Any) -> dict[str, Any]:
    return {"name": name, "resources": {"limits": {RESOURCE: str(amount)}}, **more}


def add(kubelet: Kubelet, manifest: dict[str, Any]) -> str:
    """Add a pod and wait until it runs or has failed; return its phase."""
    uid = manifest["metadata"]["uid"]
    kubelet.add(manifest)
    kubelet.wait(lambda: kubelet.phase(uid) in {"Running", "Failed"}, f"{uid} to settle")
    return kubelet.phase(uid)


def held(kubelet: Kubelet, uid: str, name: str) -> frozenset[str]:
    return kubelet.devices.held(uid, name).get(RESOURCE, frozenset())


def pod_resources(kubelet: Kubelet) -> list[pod_pb.PodResources]:
    with grpc.insecure_channel(f"unix:{kubelet.pod_resources.socket}") as channel:
        return list(pod_rpc.PodResourcesListerStub(channel).List(pod_pb.ListPodResourcesRequest()).pod_resources)


class TestRegistration:
    """Register dials back before it answers, and the kubelet never dials again."""

    def test_options_are_asked_for_inside_register(self, plugin: Plugin) -> None:
        assert [("options", frozenset())] == plugin.calls
        assert 8 == plugin.kubelet.allocatable(RESOURCE)

    def test_another_version_is_refused(self, kubelet: Kubelet) -> None:
        with pytest.raises(grpc.RpcError, match=r'requested API version "v2" is not supported by kubelet'):
            Plugin(kubelet, []).register("v2")

    def test_a_start_deletes_every_socket_and_forgets_every_plugin(self, plugin: Plugin) -> None:
        plugin.kubelet.restart()
        names = {path.name for path in (plugin.kubelet.directory / "device-plugins").iterdir()}
        assert {"kubelet.sock"} == names
        assert ({RESOURCE: 0}, {RESOURCE: 0}) == plugin.kubelet.devices.capacity()

    def test_the_end_of_an_old_stream_takes_the_new_plugin_down(self, plugin: Plugin) -> None:
        newer = Plugin(plugin.kubelet, ["new-0", "new-1"], "newer.sock")
        newer.register()
        plugin.kubelet.wait(lambda: plugin.kubelet.allocatable(RESOURCE) == 2, "the new devices")
        plugin.end_stream()
        plugin.kubelet.wait(lambda: plugin.kubelet.allocatable(RESOURCE) == 0, "kubernetes#121994")
        newer.stop()

    def test_a_plugin_that_leaves_keeps_its_capacity_but_not_its_allocatable(self, plugin: Plugin) -> None:
        plugin.end_stream()
        plugin.kubelet.wait(lambda: plugin.kubelet.allocatable(RESOURCE) == 0, "the devices to be unhealthy")
        assert ({RESOURCE: 8}, {RESOURCE: 0}) == plugin.kubelet.devices.capacity()


class TestAllocation:
    """Ids are chosen, reused and refused as pkg/kubelet/cm/devicemanager does."""

    def test_the_plugins_preference_is_followed(self, plugin: Plugin) -> None:
        assert "Running" == add(plugin.kubelet, pod("p", container("c", 2)))
        assert {"id-6", "id-7"} == held(plugin.kubelet, "p", "c")
        assert ["options", "prefer", "allocate", "prestart"] == [call for call, _ in plugin.calls]

    def test_an_init_containers_ids_go_to_the_next_container_without_asking(self, plugin: Plugin) -> None:
        add(plugin.kubelet, pod("p", container("c", 2), init=[container("i", 4)]))
        assert held(plugin.kubelet, "p", "c") < held(plugin.kubelet, "p", "i")
        assert ["prefer", "allocate", "allocate"] == [
            call for call, _ in plugin.calls if call in {"prefer", "allocate"}
        ]

    def test_more_than_the_init_container_had_must_include_its_ids(self, plugin: Plugin) -> None:
        add(plugin.kubelet, pod("p", container("c", 4), init=[container("i", 2)]))
        first = held(plugin.kubelet, "p", "i")
        assert [frozenset(), first] == [must for call, must in plugin.calls if call == "prefer"]
        assert first < held(plugin.kubelet, "p", "c")

    def test_a_sidecars_ids_are_its_own(self, plugin: Plugin) -> None:
        add(plugin.kubelet, pod("p", container("c", 4), init=[container("s", 4, restartPolicy="Always")]))
        assert not held(plugin.kubelet, "p", "s") & held(plugin.kubelet, "p", "c")

    @pytest.mark.parametrize(
        ("refuses", "message"),
        [
            ("allocate", "Allocate failed due to rpc error: code = FailedPrecondition desc = allocate says no"),
            (
                "prefer",
                (
                    "Allocate failed due to device plugin GetPreferredAllocation rpc failed with err: "
                    "rpc error: code = FailedPrecondition desc = prefer says no"
                ),
            ),
        ],
    )
    def test_a_no_fails_the_pod_for_good(self, plugin: Plugin, refuses: str, message: str) -> None:
        plugin.refuses = {refuses}
        assert "Failed" == add(plugin.kubelet, pod("p", container("c", 2)))
        assert "UnexpectedAdmissionError" == plugin.kubelet.reason("p")
        assert f"Pod was rejected: {message}, which is unexpected" == plugin.kubelet.message("p")
        plugin.refuses = set()
        assert "Running" == add(plugin.kubelet, pod("q", container("c", 8)))  # what the first had taken is free again

    def test_more_than_there_is_fails(self, plugin: Plugin) -> None:
        add(plugin.kubelet, pod("p", container("c", 6)))
        assert "Failed" == add(plugin.kubelet, pod("q", container("c", 4)))
        assert "devices unavailable for example.com/thing. Requested: 4, Available: 2" in plugin.kubelet.message("q")

    def test_a_resource_that_nobody_serves_is_not_asked_for(self, kubelet: Kubelet) -> None:
        assert "Running" == add(kubelet, pod("p", container("c", 2)))
        assert not held(kubelet, "p", "c")

    def test_pods_bound_while_the_kubelet_was_down_are_rejected_before_a_plugin_can_register(
        self, plugin: Plugin
    ) -> None:
        add(plugin.kubelet, pod("p", container("c", 2)))
        before = held(plugin.kubelet, "p", "c")
        plugin.kubelet.stop()
        plugin.kubelet.add(pod("q", container("c", 2)))
        plugin.kubelet.start()
        plugin.kubelet.wait(lambda: plugin.kubelet.phase("q") == "Failed", "q to be rejected")
        assert "no healthy devices present; cannot allocate unhealthy devices" in plugin.kubelet.message("q")
        assert ("Running", before) == (plugin.kubelet.phase("p"), held(plugin.kubelet, "p", "c"))


class TestStarts:
    """A container starts once the plugin lets it, with the plugin's environment under the pod's own."""

    def test_a_start_that_is_refused_is_tried_again(self, plugin: Plugin) -> None:
        plugin.refuses = {"prestart"}
        plugin.kubelet.add(pod("p", container("c", 2)))
        plugin.kubelet.wait(lambda: plugin.kubelet.last_error("p"), "the refusal")
        assert "PreStartContainer rpc failed with err: rpc error: code = Failed" in plugin.kubelet.last_error("p")
        plugin.refuses = set()
        plugin.kubelet.wait(lambda: plugin.kubelet.phase("p") == "Running", "p to run")

    def test_the_pods_environment_wins_even_when_it_is_empty(self, plugin: Plugin) -> None:
        missing = {"fieldRef": {"fieldPath": "metadata.annotations['not.there/key']"}}
        named = {"fieldRef": {"fieldPath": "metadata.annotations['is.there/key']"}}
        env = [{"name": "FROM", "valueFrom": missing}, {"name": "MINE", "valueFrom": named}]
        add(plugin.kubelet, pod("p", container("c", 1, env=env), annotations={"is.there/key": "yes"}))
        started = plugin.kubelet.started("p", "c")
        assert started is not None
        assert {"FROM": "", "MINE": "yes", "ONLY": "plugin"} == started.env


class TestPodResources:
    """List shows the pod being admitted without devices, and no ordinary init containers."""

    def test_the_pod_being_admitted_is_listed_without_devices(self, plugin: Plugin) -> None:
        add(plugin.kubelet, pod("p", container("a", 1), container("b", 1), init=[container("i", 1)]))
        (listed,) = plugin.listed_in_allocate  # from inside the last Allocate, b's
        assert [("a", 1), ("b", 0)] == [(c.name, len(c.devices)) for c in listed.containers]

    def test_rejected_pods_are_listed_by_old_kubelets_only(self, plugin: Plugin) -> None:
        add(plugin.kubelet, pod("p", container("c", 9)))
        assert [] == pod_resources(plugin.kubelet)
        plugin.kubelet.faults.list_inactive_pods = True
        assert ["p"] == [listed.name for listed in pod_resources(plugin.kubelet)]

    def test_too_many_calls_at_once_are_refused(self, plugin: Plugin) -> None:
        plugin.kubelet.pod_resources.PER_SECOND = 0.0
        for _ in range(plugin.kubelet.pod_resources.BURST):
            pod_resources(plugin.kubelet)
        with pytest.raises(grpc.RpcError, match="rejected by rate limit"):
            pod_resources(plugin.kubelet)
