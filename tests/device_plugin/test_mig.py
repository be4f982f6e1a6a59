"""MIG on a node: the device plugin against a stand-in kubelet and API server, and a made-up NVML that outlives it."""

import json
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from cotenant.cluster import connect, writes
from cotenant.contract.configuration import ConfigurationError, DevicePluginConfiguration, convert
from cotenant.contract.grant import ContainerGrant, GPUShare, Isolation, IsolationRecord, MIGPlacement, Role
from cotenant.contract.inventory import Family, Health, Inventory, MIGInstance, Mode, UnhealthyInstance
from cotenant.contract.units import GIB, id_prefix
from cotenant.standins.api_rules import NODES
from device_plugin.families.occupants import OccupiedError
from device_plugin.nvml import NVML
from device_plugin.nvml.fake_mig import Fault, StateFile
from device_plugin.threads import INVENTORY, THREADS
from tests.device_plugin.node import NAMES, NODE, SECONDS, Node, container, container_grant, granted, uuid

A100 = {"model": "NVIDIA A100-SXM4-40GB", "memory": "40GiB", "mig": "true", "computeCapability": "[8, 0]"}
DYNAMIC = "gpus: [{family: mig-dynamic}]\ndeviceListStrategy: cdi-cri\n"
STATIC = "gpus: [{family: mig-static}]\n"
# NVIDIA's own, with a number for the GPUs of this node
DOCUMENTED = """
version: v1
flags:
  migStrategy: mixed
sharing:
  timeSlicing:
    resources:
    - name: nvidia.com/gpu
      replicas: 8
    - name: nvidia.com/mig-1g.5gb
      replicas: 2
    - name: nvidia.com/mig-2g.10gb
      replicas: 2
"""
SIZES = {"1g.5gb": 1, "2g.10gb": 2, "3g.20gb": 4, "7g.40gb": 8}


class Cut:
    """A node whose GPUs are cut by MIG."""

    def __init__(self, node: Node, config: str) -> None:
        self.node = node
        self.cdi = node.folder / "cdi"
        self.config = f"inventoryInterval: 0.1\ncdiDirectory: {self.cdi}\n{config}"
        self.state = StateFile(node.gpu_file)

    def start(self, *gpus: dict[str, Any], resource: str = NAMES.mig("1g.5gb")) -> None:
        """Start the plugin with these GPUs, and wait until the kubelet has *resource*."""
        if gpus:
            self.node.write_gpus(gpus)
        self.node.configuration = convert(self.config, DevicePluginConfiguration)
        self.node.edit(self.config)
        try:
            self.node.start_plugin(wait=False)
        except OccupiedError:
            self.node.plugin = None  # it has not begun
            raise
        self.node.kubelet.wait(lambda: self.node.kubelet.allocatable(resource), resource)
        found = self.node.wait_published("serving", lambda inventory: inventory.serving)
        # a kubelet that has not had a plugin's list yet starts pods without asking it
        for gpu in found.gpus:
            for profile in gpu.mig.profiles if gpu.family is Family.MIG_DYNAMIC and gpu.mig else ():
                name = NAMES.mig(profile.name)
                self.node.kubelet.wait(lambda name=name: self.node.kubelet.allocatable(name), name)  # type: ignore[misc]

    def cut(self, *instances: tuple[str, int], gpu: int = 0) -> None:
        """Make instances as a person would."""
        nvml = NVML.open(fake=self.node.gpu_file)
        for profile, start in instances:
            nvml.create_mig_instance(gpu, profile, start)

    def start_cut_since_the_drivers_spec(self, *instances: tuple[str, int]) -> None:
        """Start the plugin, handing out by CDI, with instances that the driver's own spec does not name."""
        self.cdi.mkdir()
        (self.cdi / "nvidia.yaml").write_text("{kind: nvidia.com/gpu, devices: []}")
        self.node.write_gpus([A100])
        self.cut(*instances)
        self.config += "deviceListStrategy: cdi-cri\n"
        self.start()

    def there(self) -> list[tuple[str, int]]:
        """List the instances that are there, complete ones."""
        return sorted((one.profile, one.start) for one in self.state.read().instances if one.uuid)

    def modes(self) -> list[bool | None]:
        """Tell of which GPUs MIG mode is on."""
        return [gpu.mig_enabled for gpu in NVML.open(fake=self.node.gpu_file).gpus()]

    def uuid_at(self, start: int) -> str:
        return next(one.uuid for one in self.state.read().instances if one.start == start)

    def add(self, name: str, *grants: ContainerGrant) -> str:
        containers = [
            {**container(one.name, 1), "resources": {"limits": {NAMES.mig(one.mig.profile if one.mig else ""): "1"}}}
            for one in grants
        ]
        spec = {"nodeName": "gpu-1", "containers": containers}
        return self.node.add_pod(name, annotations=granted(*grants), spec=spec)

    def wait(self, condition: Callable[[], Any], what: str) -> None:
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < deadline, f"waited {SECONDS} s for {what}"
            time.sleep(0.02)

    def notes(self) -> list[str]:
        """List what Events say."""
        return [str(event["note"]) for event in self.node.api.events()]

    def spec(self, name: str) -> dict[str, Any]:
        """Read the CDI spec that has a device of that name."""
        found = [json.loads(path.read_text()) for path in self.cdi.glob("*.json")]
        return next(one for one in found if f"{one['kind']}={one['devices'][0]['name']}" == name)


def label(node: Node, geometry: str) -> None:
    """Ask for a geometry as kubectl label does."""
    labels = {"nvidia.com/mig.config": geometry}
    with connect(node.kubeconfig) as cluster:
        writes.annotate_node(cluster, "gpu-1", {}, labels=labels)


def placed(
    profile: str, start: int, *, gpu: int = 0, name: str = "main", instance: str = "", replicas: int = 1
) -> ContainerGrant:
    return ContainerGrant(
        name=name,
        role=Role.MAIN,
        family=Family.MIG_STATIC if instance else Family.MIG_DYNAMIC,
        mode=Mode.MIG,
        gpus=(GPUShare(uuid=uuid(gpu), bytes=SIZES[profile] * 5 * GIB),),
        units=1,
        mig=MIGPlacement(profile=profile, start=start, size=SIZES[profile], uuid=instance, replicas=replicas),
        isolation=IsolationRecord(asked=Isolation.NONE, given=Isolation.STRICT, enforced_by="MIG partition"),
    )


@pytest.fixture
def dynamic() -> Iterator[Cut]:
    with Node(plugin=False) as node:
        yield Cut(node, DYNAMIC)


@pytest.fixture
def static() -> Iterator[Cut]:
    with Node(plugin=False) as node:
        yield Cut(node, STATIC)


class TestDynamic:
    def test_an_instance_is_made_for_a_pod_and_goes_with_it(self, dynamic: Cut) -> None:
        dynamic.start(A100)
        kubelet = dynamic.node.kubelet
        # what an empty A100 could hold, whatever is there
        bound = {"1g.5gb": 7, "2g.10gb": 3, "3g.20gb": 2, "7g.40gb": 1}
        kubelet.wait(lambda: bound == {one: kubelet.allocatable(NAMES.mig(one)) for one in SIZES}, "all profiles")

        pod = dynamic.add("p", placed("3g.20gb", 4, name="a"), placed("1g.5gb", 0, name="b"))
        dynamic.node.running(pod)

        assert [("1g.5gb", 0), ("3g.20gb", 4)] == dynamic.there()
        (response,) = kubelet.devices.responses(pod, "a")
        (device,) = response.cdi_devices
        assert f"cotenant.io/mig={id_prefix(uuid(0))}-4-3g.20gb" == device.name
        edits = dynamic.spec(device.name)["devices"][0]["containerEdits"]
        # NVIDIA's runtime is to inject nothing besides
        assert ["NVIDIA_VISIBLE_DEVICES=void", f"COTENANT_MIG_UUID={dynamic.uuid_at(4)}"] == edits["env"]
        assert "void" == dynamic.node.gpus_seen(pod, "a")

        before = dynamic.uuid_at(4)
        kubelet.restart_container(pod, "a")
        assert before == dynamic.uuid_at(4), "a container that starts again keeps its instance"

        dynamic.node.api.delete_pod("p")
        dynamic.wait(lambda: dynamic.there() == [], "the instances to go")
        dynamic.wait(lambda: not list(dynamic.cdi.glob("cotenant-mig-*")), "their specs to go")

    def test_whichever_call_fails_the_container_starts_in_the_end(self, dynamic: Cut) -> None:
        dynamic.start(A100)
        for calls in range(1, 40, 3):
            dynamic.state.arm(Fault(calls=calls, error=999, when="after" if calls % 2 else "before"))
            pod = dynamic.add(f"p{calls}", placed("2g.10gb", 2))
            dynamic.node.running(pod)
            assert [("2g.10gb", 2)] == dynamic.there()
            dynamic.node.api.delete_pod(f"p{calls}")
            dynamic.wait(lambda: dynamic.state.read().instances == [], "the instance to go")

    def test_a_plugin_that_starts_anew_clears_what_nobody_holds_and_touches_nothing_else(self, dynamic: Cut) -> None:
        dynamic.start(A100, A100)
        pod = dynamic.add("p", placed("3g.20gb", 4))
        dynamic.node.running(pod)
        before = dynamic.uuid_at(4)
        dynamic.node.stop_plugin()
        dynamic.cut(("1g.5gb", 0), ("2g.10gb", 2))  # left behind
        with dynamic.state.change() as state:
            state.instances[1].in_use = True  # by a process that we know nothing of
            state.instances[2].uuid = ""  # a destroy that was cut short

        dynamic.start()

        dynamic.wait(lambda: dynamic.there() == [("1g.5gb", 0), ("3g.20gb", 4)], "the orphan to go")
        assert before == dynamic.uuid_at(4)
        found = dynamic.node.wait_published(
            "aware of it", lambda inventory: inventory.gpus[0].mig and inventory.gpus[0].mig.unexplained
        )
        (odd,) = found.gpus[0].mig.unexplained if found.gpus[0].mig else ()
        assert MIGInstance(profile="1g.5gb", start=0, size=1, uuid=dynamic.uuid_at(0)) == odd
        with dynamic.state.change() as state:
            state.instances[1].in_use = False
        dynamic.node.wait_published(
            "rid of it", lambda inventory: inventory.gpus[0].mig and not inventory.gpus[0].mig.unexplained
        )

    def test_where_an_instance_met_a_trouble_nothing_new_lies_until_it_is_over_and_the_rest_goes_on(
        self, dynamic: Cut
    ) -> None:
        dynamic.config += "health: {cleanProbes: 30}\n"
        dynamic.start(A100)
        first = dynamic.add("p", placed("1g.5gb", 5))
        dynamic.node.running(first)
        (there,) = NVML.open(fake=dynamic.node.gpu_file).mig_instances(0)
        dynamic.node.write_gpus([{**A100, "xids": f"[{{xid: 1000, gpuInstance: {there.id}, computeInstance: 0}}]"}])

        def ill(inventory: Inventory) -> tuple[UnhealthyInstance, ...]:
            return inventory.gpus[0].mig.unhealthy if inventory.gpus[0].mig is not None else ()

        found = dynamic.node.wait_published("an ill instance", ill)
        (unwell,) = ill(found)
        assert (there.uuid, MIGInstance(profile="1g.5gb", start=5, size=1)) == (unwell.uuid, unwell.place)
        assert unwell.detail.startswith("XID 1000;")
        assert Health.HEALTHY == found.gpus[0].health
        told = f"MIG instance {there.uuid}, 1g.5gb at 5 of GPU 0 gets no new pods"
        dynamic.wait(lambda: any(told in one for one in dynamic.notes()), "an Event")
        # the instance goes with its pod, and the place stays marked; pods elsewhere on the GPU run
        dynamic.node.api.delete_pod("p")
        dynamic.wait(lambda: not dynamic.there(), "the instance to go")
        dynamic.node.running(dynamic.add("q", placed("2g.10gb", 0)))
        assert (unwell,) == ill(dynamic.node.wait_published("anything", bool))
        dynamic.node.wait_published("well again", lambda inventory: not ill(inventory))

    def test_a_gpu_whose_driver_hangs_takes_no_pods_and_holds_up_none_of_the_others(self, dynamic: Cut) -> None:
        node = dynamic.node
        node.patience = 0.1
        dynamic.start(A100, A100)
        node.write_gpus([{**A100, "hang": True}, A100])
        found = node.wait_published("unhealthy", lambda i: i.gpus[0].health is Health.UNHEALTHY)
        assert Health.HEALTHY is found.gpus[1].health
        # and the other one is still cared for
        node.write_gpus([{**A100, "hang": True}, {**A100, "lost": True}])
        node.wait_published("lost", lambda i: "fallen off the bus" in i.gpus[1].detail)
        node.write_gpus([A100, A100])

    def test_what_is_in_the_way_and_in_use_holds_the_pod_back_until_it_ends(self, dynamic: Cut) -> None:
        dynamic.start(A100)
        first = dynamic.add("p", placed("1g.5gb", 5))
        dynamic.node.running(first)
        with dynamic.state.change() as state:
            state.instances[0].in_use = True
        dynamic.node.api.delete_pod("p")
        second = dynamic.add("q", placed("3g.20gb", 4))
        kubelet = dynamic.node.kubelet
        kubelet.wait(lambda: "it is in use; it is tried again" in kubelet.last_error(second), "a refusal")
        assert [("1g.5gb", 5)] == dynamic.there()
        with dynamic.state.change() as state:
            state.instances[0].in_use = False
        dynamic.node.running(second)
        assert [("3g.20gb", 4)] == dynamic.there()

    def test_a_pod_with_another_ones_place_is_never_given_it(self, dynamic: Cut) -> None:
        dynamic.start(A100)
        first = dynamic.add("p", placed("3g.20gb", 4))
        dynamic.node.running(first)
        second = dynamic.add("q", placed("1g.5gb", 5))  # no extender of ours grants that
        kubelet = dynamic.node.kubelet
        kubelet.wait(lambda: "pod default/p holds 3g.20gb at 4" in kubelet.last_error(second), "a refusal")
        assert [("3g.20gb", 4)] == dynamic.there()

    def test_mig_mode_is_switched_on_where_that_needs_no_reset(self, dynamic: Cut) -> None:
        h100 = {"model": "NVIDIA H100 80GB HBM3", "memory": "80GiB", "mig": "false"}
        guest = {**h100, "virtualization": 2}
        dynamic.start(h100, {**A100, "mig": "false"}, guest, resource=NAMES.mig("1g.10gb"))
        found = dynamic.node.wait_published("complete", lambda inventory: len(inventory.gpus) == 3).gpus
        assert [Health.HEALTHY, Health.UNHEALTHY, Health.UNHEALTHY] == [gpu.health for gpu in found]
        assert "MIG mode is off: `nvidia-smi -i 1 -mig 1`" == found[1].detail
        assert found[2].detail.startswith("a vGPU is cut by the hypervisor, not in the virtual machine")

    def test_mig_mode_stays_off_where_another_plugin_serves_the_names(self, dynamic: Cut) -> None:
        path = dynamic.node.folder / "kubelet" / "device-plugins" / "nvidia-mig-1g.10gb.sock"
        with socket.socket(socket.AF_UNIX) as theirs:
            theirs.bind(str(path))
            theirs.listen()
            with pytest.raises(OccupiedError, match=r"another device plugin serves nvidia\.com/mig-1g\.10gb"):
                dynamic.start({"model": "NVIDIA H100 80GB HBM3", "memory": "80GiB", "mig": "false"})
        assert [False] == dynamic.modes()

    def test_a_gpu_that_comes_to_the_family_by_an_edit_is_switched_on_when_nobody_uses_it(self, dynamic: Cut) -> None:
        h100 = {"model": "NVIDIA H100 80GB HBM3", "memory": "80GiB", "mig": "false"}
        a100 = {**A100, "mig": "false"}
        ruled = dynamic.config
        dynamic.config = ruled.replace("[{family: mig-dynamic}]", "[]")
        dynamic.start(h100, {**h100, "processes": "[{pid: 7, memory: 1GiB}]"}, a100, h100, resource=NAMES.gpu_mem)
        pod = dynamic.node.add_pod("p", container_grant(gpus=[3], units=8))
        dynamic.node.running(pod)
        dynamic.node.edit(ruled)
        kubelet = dynamic.node.kubelet
        # 7 of the first H100 alone
        kubelet.wait(lambda: kubelet.allocatable(NAMES.mig("1g.10gb")) == 7, "instances of the first")
        found = dynamic.node.wait_published("three switched", lambda i: i.gpus[0].health is Health.HEALTHY)
        assert ["mig-dynamic"] * 3 + ["memory"] == [str(gpu.family) for gpu in found.gpus]
        dynamic.wait(lambda: sum("MIG mode of GPU" in note for note in dynamic.notes()) >= 3, "an Event for each")
        said = {note.partition(" (")[0]: note for note in dynamic.notes() if note.startswith("MIG mode of GPU")}
        assert said["MIG mode of GPU 0"].endswith("was switched on: its rule is mig-dynamic")
        assert "processes use it (7); it is tried again when they have ended" in said["MIG mode of GPU 1"]
        assert "this model needs a reset for it: drain it, and `nvidia-smi -i 2 -mig 1`" in said["MIG mode of GPU 2"]
        assert any(f"GPU {uuid(3)} stays in family memory" in note for note in dynamic.notes())
        # the last two have become free
        dynamic.node.write_gpus([h100, h100, a100, h100])
        dynamic.node.api.delete_pod("p")
        kubelet.wait(lambda: kubelet.allocatable(NAMES.mig("1g.10gb")) == 21, "instances of three")

    @pytest.mark.parametrize("api_away", [False, True])
    def test_a_gpu_that_comes_to_the_family_by_a_new_start_is_left_to_pods_that_hold_it(
        self, dynamic: Cut, *, api_away: bool
    ) -> None:
        h100 = {"model": "NVIDIA H100 80GB HBM3", "memory": "80GiB", "mig": "false"}
        ruled, node = dynamic.config, dynamic.node
        dynamic.config = ruled.replace("[{family: mig-dynamic}]", "[]")
        dynamic.start(h100, h100, resource=NAMES.gpu_mem)
        pod = node.add_pod("p", container_grant(gpus=[0], units=8))
        node.running(pod)
        node.stop_plugin()
        node.configuration = convert(ruled, DevicePluginConfiguration)
        node.edit(ruled)

        if api_away:
            node.api.stop()
        node.start_plugin(wait=False)
        if api_away:
            assert [False, False] == dynamic.modes(), "nobody can tell what pods hold"
            node.api.start()

        kubelet = node.kubelet
        kubelet.wait(lambda: kubelet.allocatable(NAMES.mig("1g.10gb")) == 7, "instances of the second")
        assert [False, True] == dynamic.modes()
        node.api.delete_pod("p")
        kubelet.wait(lambda: kubelet.allocatable(NAMES.mig("1g.10gb")) == 14, "instances of both")

    @pytest.mark.parametrize("api_away", [False, True])
    def test_after_a_reboot_mig_mode_is_switched_on_for_pods_that_hold_instances(
        self, dynamic: Cut, *, api_away: bool
    ) -> None:
        h100 = {"model": "NVIDIA H100 80GB HBM3", "memory": "80GiB", "mig": "false"}
        dynamic.start(h100, resource=NAMES.mig("1g.10gb"))
        grant = placed("1g.5gb", 0)
        place = MIGPlacement(profile="1g.10gb", start=0, size=1)
        dynamic.node.running(dynamic.add("p", msgspec.structs.replace(grant, mig=place)))
        dynamic.node.stop_plugin()
        with dynamic.state.change() as state:
            state.modes, state.instances = {}, []  # neither outlives a reboot
        if api_away:
            dynamic.node.api.stop()
        dynamic.node.start_plugin(wait=False)
        if api_away:
            assert [False] == dynamic.modes(), "nobody can tell what pods hold"
            dynamic.node.api.start()
        dynamic.wait(lambda: dynamic.modes() == [True], "MIG mode")

    def test_a_name_that_another_plugin_serves_is_not_taken_by_an_edit_either(self, static: Cut) -> None:
        static.node.write_gpus([A100, {"memory": "80GiB"}])
        static.cut(("1g.5gb", 0))
        ruled = static.config.replace("{family", "{indices: [0], family")
        static.config = static.config.replace(STATIC, "gpus: []\n")
        static.start(resource=NAMES.gpu_mem)
        path = static.node.folder / "kubelet" / "device-plugins" / "nvidia-mig-1g.5gb.sock"
        with socket.socket(socket.AF_UNIX) as theirs:
            theirs.bind(str(path))
            theirs.listen()
            static.node.edit(ruled)
            found = static.node.wait_published("refused", lambda i: "another device plugin serves" in i.gpus[0].detail)
            assert [Health.UNHEALTHY, Health.HEALTHY] == [gpu.health for gpu in found.gpus]
            assert NAMES.mig("1g.5gb") not in static.node.kubelet.devices.capacity()[0]
            told = "nvidia.com/mig-1g.5gb is not offered: another"
            static.wait(lambda: any(note.startswith(told) for note in static.notes()), "an Event")
        path.unlink()
        static.node.kubelet.wait(lambda: static.node.kubelet.allocatable(NAMES.mig("1g.5gb")) == 1, "our own")

    @pytest.mark.parametrize("text", ["gpus: [{family: mig-dynamic}]", "profiles: {cut: [{family: mig-dynamic}]}"])
    def test_instances_are_made_only_where_cdi_names_can_be_handed_out(self, text: str) -> None:
        with pytest.raises(
            ConfigurationError, match="deviceListStrategy: expected cdi-cri with a rule of family mig-dyn"
        ):
            convert(text, DevicePluginConfiguration)


class TestStatic:
    def test_a_pod_gets_the_instance_that_it_was_granted(self, static: Cut) -> None:
        static.node.write_gpus([A100, {"memory": "80GiB"}])
        static.cut(("3g.20gb", 4), ("1g.5gb", 0), ("1g.5gb", 1))
        static.config = static.config.replace("{family", "{indices: [0], family")
        static.start()
        kubelet = static.node.kubelet
        # each resource is registered by itself, in no order
        names = NAMES.mig("1g.5gb"), NAMES.mig("3g.20gb"), NAMES.gpu_mem
        kubelet.wait(lambda: tuple(map(kubelet.allocatable, names)) == (2, 1, 80), "all three resources")
        wanted = static.uuid_at(1)
        pod = static.add("p", placed("1g.5gb", 1, instance=wanted))
        static.node.running(pod)
        assert wanted == static.node.gpus_seen(pod)
        assert frozenset({wanted}) == kubelet.devices.held(pod, "main")[NAMES.mig("1g.5gb")]
        other = static.add("q", placed("1g.5gb", 1, instance=wanted))
        static.node.settled(other)
        assert f"was granted the MIG instance {wanted}, which the kubelet has not free" in kubelet.message(other)

    def test_an_instance_that_was_cut_since_the_drivers_cdi_spec_was_written_is_handed_out_by_ours(
        self, static: Cut
    ) -> None:
        static.start_cut_since_the_drivers_spec(("1g.5gb", 0))

        pod = static.add("p", placed("1g.5gb", 0, instance=static.uuid_at(0)))
        static.node.running(pod)

        (response,) = static.node.kubelet.devices.responses(pod, "main")
        (device,) = response.cdi_devices
        assert f"cotenant.io/mig={static.uuid_at(0)}" == device.name
        edits = static.spec(device.name)["devices"][0]["containerEdits"]
        # of GPU 0 the access to instance 1 and to its compute instance 0
        assert 2 == sum(node["path"].startswith("/dev/nvidia-caps/nvidia-cap") for node in edits["deviceNodes"])

    def test_one_ill_or_cordoned_instance_gets_no_new_pods_and_the_others_do(self, static: Cut) -> None:
        static.node.write_gpus([A100])
        static.cut(("1g.5gb", 0), ("1g.5gb", 1), ("1g.5gb", 2))
        static.config += "health: {cleanProbes: 20}\n"
        static.start()
        kubelet, resource = static.node.kubelet, NAMES.mig("1g.5gb")
        kubelet.wait(lambda: kubelet.allocatable(resource) == 3, "all three")
        ill, cordoned = static.uuid_at(1), static.uuid_at(2)
        number = next(one.id for one in NVML.open(fake=static.node.gpu_file).mig_instances(0) if one.uuid == ill)
        static.node.write_gpus([{**A100, "xids": f"[{{xid: 1000, gpuInstance: {number}, computeInstance: 0}}]"}])
        static.node.api.patch(NODES, NODE, {"metadata": {"annotations": {NAMES.gpu_cordon: cordoned}}})
        found = static.node.wait_published(
            "unhealthy in two", lambda i: i.gpus[0].mig is not None and i.gpus[0].mig.unfit == {ill, cordoned}
        )
        kubelet.wait(lambda: kubelet.allocatable(resource) == 1, "one to be left")
        (gpu,) = found.gpus
        assert gpu.mig is not None
        details = {one.uuid: one.detail for one in gpu.mig.unhealthy}
        assert details[ill].startswith("XID 1000;")
        assert "cordoned by the node's annotation cotenant.io/gpu-cordon" == details[cordoned]
        assert (Health.HEALTHY, 3) == (gpu.health, len(gpu.mig.instances))
        # well again after 20 clean probes
        static.node.wait_published("well", lambda i: i.gpus[0].mig is not None and i.gpus[0].mig.unfit == {cordoned})
        kubelet.wait(lambda: kubelet.allocatable(resource) == 2, "two")

    def test_the_configmap_of_nvidias_documentation_shares_instances_and_gpus(self, static: Cut) -> None:
        static.node.write_gpus([A100, {"memory": "80GiB"}])
        static.cut(("3g.20gb", 4), ("1g.5gb", 0), ("1g.5gb", 1))
        theirs = static.node.folder / "nvidia.yaml"
        theirs.write_text(DOCUMENTED)
        static.config = static.config.replace(STATIC, f"nvidiaConfig: {theirs}\n")
        static.start()
        kubelet = static.node.kubelet
        # two 1g of 2 shares each, a whole 3g, and the GPU without MIG in 8 shares
        expected = {NAMES.mig("1g.5gb"): 4, NAMES.mig("3g.20gb"): 1, "nvidia.com/gpu": 8, NAMES.gpu_mem: 0}
        kubelet.wait(lambda: kubelet.devices.capacity()[1] == expected, "all resources")
        wanted = static.uuid_at(1)
        pods = [static.add(f"p{n}", placed("1g.5gb", 1, instance=wanted, replicas=2)) for n in range(2)]
        static.node.running(pods[0])
        static.node.running(pods[1])
        assert [wanted, wanted] == [static.node.gpus_seen(pod) for pod in pods]
        held = [kubelet.devices.held(pod, "main")[NAMES.mig("1g.5gb")] for pod in pods]
        assert {frozenset({f"{wanted}::{n}"}) for n in range(2)} == set(held)
        third = static.add("third", placed("1g.5gb", 1, instance=wanted, replicas=2))
        static.node.settled(third)
        assert f"was granted the MIG instance {wanted}, which the kubelet has not free" in kubelet.message(third)
        # an edit waits for those who hold shares of the GPU
        theirs.write_text(DOCUMENTED.replace("replicas: 2", "replicas: 3"))
        static.wait(lambda: any("stays in family mig-static" in one for one in static.notes()), "an Event")
        assert 4 == kubelet.allocatable(NAMES.mig("1g.5gb"))
        for pod in ("p0", "p1", "third"):
            static.node.api.delete_pod(pod)
        kubelet.wait(lambda: kubelet.allocatable(NAMES.mig("1g.5gb")) == 6, "three shares of each")

    def test_shares_of_instances_that_are_called_gpus(self, static: Cut) -> None:
        static.config = static.config.replace("mig-static}", "mig-static, replicas: 3, renameShared: true}")
        static.config = static.config.replace(
            "renameShared: true}", "renameShared: true, failRequestsGreaterThanOne: true}"
        )
        static.config += "migStrategy: single\n"
        static.node.write_gpus([A100])
        static.cut(("3g.20gb", 0), ("3g.20gb", 4))
        shared = "nvidia.com/gpu.shared"
        static.start(resource=shared)
        kubelet = static.node.kubelet
        kubelet.wait(lambda: kubelet.allocatable(shared) == 6, "three shares of two instances")
        pods = [
            static.node.add_pod(
                f"p{n}",
                annotations={},
                spec={
                    "nodeName": "gpu-1",
                    "containers": [{"name": "main", "resources": {"limits": {shared: count}}}],
                },
            )
            for n, count in enumerate((1, 1, 2))
        ]
        static.node.settled(*pods)
        # to different instances as long as there are some
        assert {static.uuid_at(0), static.uuid_at(4)} == {static.node.gpus_seen(pod) for pod in pods[:2]}
        assert "failRequestsGreaterThanOne refuses them; ask for 1" in kubelet.message(pods[2])

    def test_a_gpu_that_fails_keeps_its_instances_and_offers_those_that_are_held(self, static: Cut) -> None:
        static.start_cut_since_the_drivers_spec(("1g.5gb", 0), ("1g.5gb", 1))
        pod = static.add("p", placed("1g.5gb", 0, instance=static.uuid_at(0)))
        static.node.running(pod)
        static.node.write_gpus([{**A100, "lost": True}])
        kubelet, resource = static.node.kubelet, NAMES.mig("1g.5gb")
        kubelet.wait(lambda: kubelet.allocatable(resource) == 1, "the pod's to be left")
        found = static.node.wait_published("lost", lambda i: i.gpus[0].health is Health.UNHEALTHY)
        assert found.gpus[0].mig is not None
        assert 2 == len(found.gpus[0].mig.instances)
        assert 2 == kubelet.devices.capacity()[0][resource]
        assert "Running" == kubelet.phase(pod)
        # which its container needs to start again
        assert static.spec(f"cotenant.io/mig={static.uuid_at(0)}")

    def test_instances_that_a_person_makes_and_destroys_are_followed(self, static: Cut) -> None:
        static.node.write_gpus([A100])
        static.cut(("1g.5gb", 0))
        static.start()
        static.cut(("2g.10gb", 2))
        kubelet = static.node.kubelet
        kubelet.wait(lambda: kubelet.allocatable(NAMES.mig("2g.10gb")) == 1, "the new one")
        nvml = NVML.open(fake=static.node.gpu_file)
        nvml.destroy_mig_instance(0, nvml.mig_instances(0)[0])
        kubelet.wait(lambda: kubelet.allocatable(NAMES.mig("1g.5gb")) == 0, "the old one to go")

    @pytest.mark.parametrize(("strategy", "count"), [("single", 2), ("none", 1)])
    def test_strategies_that_call_everything_a_gpu(self, static: Cut, strategy: str, count: int) -> None:
        static.config += f"migStrategy: {strategy}\n"
        static.node.write_gpus([A100])
        static.cut(("3g.20gb", 0), ("3g.20gb", 4))
        static.start(resource="nvidia.com/gpu")
        kubelet = static.node.kubelet
        kubelet.wait(lambda: kubelet.allocatable("nvidia.com/gpu") == count, f"{count} GPUs")
        pod = static.node.add_pod(
            "p",
            annotations={},
            spec={
                "nodeName": "gpu-1",
                "containers": [{"name": "main", "resources": {"limits": {"nvidia.com/gpu": 1}}}],
            },
        )
        static.node.running(pod)
        (held,) = static.node.kubelet.devices.held(pod, "main")["nvidia.com/gpu"]
        assert held == static.node.gpus_seen(pod)
        assert held in ({static.uuid_at(0), static.uuid_at(4)} if strategy == "single" else {uuid(0)})

    def test_under_single_a_gpu_that_is_cut_wrong_is_unhealthy_and_the_others_go_on(self, static: Cut) -> None:
        static.config = static.config.replace("{family", "{indices: [0, 1, 2], family") + "migStrategy: single\n"
        static.node.write_gpus([A100, A100, A100, {}])
        static.cut(("3g.20gb", 0), ("3g.20gb", 4))
        static.cut(("3g.20gb", 0), ("3g.20gb", 4), gpu=1)
        static.cut(("3g.20gb", 4), ("1g.5gb", 0), gpu=2)
        static.start(resource="nvidia.com/gpu")
        kubelet = static.node.kubelet
        # two of each of the first two, and the fourth by memory
        kubelet.wait(lambda: kubelet.allocatable("nvidia.com/gpu") == 4, "four instances")
        kubelet.wait(lambda: kubelet.allocatable(NAMES.gpu_mem) == 80, "the units")
        found = static.node.wait_published("all four", lambda i: len(i.gpus) == 4).gpus
        assert ["healthy", "healthy", "unhealthy", "healthy"] == [str(gpu.health) for gpu in found]
        why = (
            "migStrategy: single needs instances of one profile on every GPU of family mig-static, and it has "
            "1g.5gb, 3g.20gb, where most GPUs have 3g.20gb; use mixed, or cut the GPUs alike"
        )
        assert why == found[2].detail

        # somebody destroys what is on the second, and then the fourth is lost
        nvml = NVML.open(fake=static.node.gpu_file)
        for one in nvml.mig_instances(1):
            nvml.destroy_mig_instance(1, one)
        kubelet.wait(lambda: kubelet.allocatable("nvidia.com/gpu") == 2, "those of the first")
        static.node.write_gpus([A100, A100, A100, {"lost": True}])
        found = static.node.wait_published("of a lost GPU", lambda i: i.gpus[3].health is Health.UNHEALTHY).gpus
        assert ["healthy", "unhealthy", "unhealthy"] == [str(gpu.health) for gpu in found[:3]]
        assert "and it has no instances, where most GPUs have 3g.20gb;" in found[1].detail
        assert "fallen off the bus" in found[3].detail

    def test_instances_are_not_offered_beside_gpus_of_the_same_name(self, static: Cut) -> None:
        static.config = static.config.replace("{family", "{indices: [0], family").replace(
            "mig-static}", "mig-static}, {indices: [1], family: replicas, replicas: 3}"
        )
        static.config += "migStrategy: single\n"
        static.node.write_gpus([A100, {}])
        static.cut(("3g.20gb", 0), ("3g.20gb", 4))
        static.start(resource="nvidia.com/gpu")
        kubelet = static.node.kubelet
        kubelet.wait(lambda: kubelet.allocatable("nvidia.com/gpu") == 3, "the shares of the second")
        first, second = static.node.wait_published("of two", lambda i: len(i.gpus) == 2).gpus
        why = "migStrategy: single offers it as nvidia.com/gpu, which GPU 1 is offered as too; use mixed"
        assert why == first.detail
        assert Health.HEALTHY is second.health

    def test_names_that_another_plugin_serves_are_left_to_it(self, static: Cut) -> None:
        static.node.write_gpus([A100])
        static.cut(("1g.5gb", 0))
        path = static.node.folder / "kubelet" / "device-plugins" / "nvidia-mig-1g.5gb.sock"
        with socket.socket(socket.AF_UNIX) as theirs:
            theirs.bind(str(path))
            theirs.listen()
            with pytest.raises(OccupiedError, match=r"another device plugin serves nvidia\.com/mig-1g\.5gb"):
                static.start()
            static.config += "migDomain: cotenant.io\n"
            static.start(resource="cotenant.io/mig-1g.5gb")


def test_a_gpu_that_an_unprivileged_plugin_may_not_read_is_published_unwell_and_the_others_go_on() -> None:
    with Node(plugin=False, config="gpus: [{indices: [0], family: mig-static}]") as node:
        secret = "{nvmlDeviceGetMemoryInfo: 4, nvmlDeviceGetMemoryInfo_v2: 4}"
        node.write_gpus([{**A100, "fail": secret}, {}])
        node.start_plugin()
        first, second = node.wait_published("serving", lambda inventory: inventory.serving).gpus
        assert (Health.UNHEALTHY, 0) == (first.health, first.usable_bytes)
        assert "SYS_ADMIN" in first.detail
        assert Health.HEALTHY is second.health


# No file can have such a name, of which nobody is warned.
NO_NAME = r'"\0"'


@pytest.mark.parametrize(
    "config",
    [
        f"gpus: [{{indices: [0], family: mig-static}}]\nmigConfigs: {NO_NAME}",
        f"gpus: [{{indices: [0], family: mig-static}}]\ndeviceListStrategy: cdi-cri\ncdiDirectory: {NO_NAME}",
        f"gpus: [{{indices: [0], family: mig-dynamic}}]\ndeviceListStrategy: cdi-cri\ncdiDirectory: {NO_NAME}",
    ],
    ids=["geometry", "CDI specs", "sweep"],
)
def test_what_nobody_expected_of_mig_is_counted_and_the_health_of_gpus_is_told_all_the_same(config: str) -> None:
    with Node(plugin=False) as node:
        cut = Cut(node, "")
        cut.cdi.mkdir()
        (cut.cdi / "nvidia.yaml").write_text("{kind: nvidia.com/gpu, devices: []}")
        cut.config = f"inventoryInterval: 0.1\ncdiStaticDirectories: [{cut.cdi}]\n{config}\n"
        label(node, "small")
        node.write_gpus([A100, {}])
        cut.cut(("1g.5gb", 0))
        cut.start()
        before = THREADS.failures()[INVENTORY]

        node.write_gpus([A100, {"lost": True}])

        node.wait_published("unhealthy", lambda i: i.gpus[1].health is Health.UNHEALTHY)
        # the look that found the GPU lost may have been half done before
        cut.wait(lambda: before < THREADS.failures()[INVENTORY], "the count")


class TestGeometries:
    """mig-parted's format, chosen by a label of the node."""

    FILE = """
version: v1
mig-configs:
  large: [{devices: all, mig-enabled: true, mig-devices: {2g.10gb: 2, 3g.20gb: 1}}]
  small: [{devices: [0], mig-enabled: true, mig-devices: {1g.5gb: 7}}]
  odd: [{devices: all, mig-enabled: true, mig-devices: {2g.10gb: 4}}]
"""

    def test_a_label_cuts_gpus_that_nobody_uses_and_names_the_pods_of_those_that_are_used(self, static: Cut) -> None:
        file = static.node.folder / "geometries.yaml"
        file.write_text(self.FILE)
        static.config += f"migConfigs: {file}\n"
        node = static.node
        label(node, "large")
        static.start(A100, {**A100, "mig": "true"}, resource=NAMES.mig("3g.20gb"))
        static.wait(lambda: self.state(static) == "success", "the geometry")
        # on both GPUs
        assert sorted([("2g.10gb", 0), ("2g.10gb", 2), ("3g.20gb", 4)] * 2) == static.there()
        node.wait_published("well again", lambda inventory: all(gpu.health == "healthy" for gpu in inventory.gpus))

        held = next(one.uuid for one in static.state.read().instances if one.gpu == uuid(0) and one.start == 4)
        node.kubelet.wait(lambda: node.kubelet.allocatable(NAMES.mig("3g.20gb")) == 2, "both 3g")
        pod = static.add("busy", placed("3g.20gb", 4, instance=held))
        node.running(pod)
        label(node, "small")
        static.wait(lambda: self.state(static) == "failed", "a no")
        static.wait(
            lambda: any("which pods use: default/busy" in note for note in self.notes(static)), "the pod's name"
        )
        assert ("3g.20gb", 4) in static.there()

        node.api.delete_pod("busy")
        static.wait(lambda: self.state(static) == "success", "the geometry, once the pod is gone")
        on_first = [one.profile for one in static.state.read().instances if one.gpu == uuid(0)]
        assert ["1g.5gb"] * 7 == on_first

        label(node, "odd")
        static.wait(lambda: any("cannot hold 4 x 2g.10gb together" in note for note in self.notes(static)), "a no")
        assert ["1g.5gb"] * 7 == [one.profile for one in static.state.read().instances if one.gpu == uuid(0)]

    def test_gpus_that_were_never_cut_are_cut_under_the_strategy_single_too(self, static: Cut) -> None:
        file = static.node.folder / "geometries.yaml"
        file.write_text(self.FILE)
        static.config += f"migConfigs: {file}\nmigStrategy: single\n"
        label(static.node, "small")
        static.node.write_gpus([A100])

        static.start(resource="nvidia.com/gpu")

        static.wait(lambda: self.state(static) == "success", "the geometry")
        kubelet = static.node.kubelet
        kubelet.wait(lambda: kubelet.allocatable("nvidia.com/gpu") == 7, "its instances")

    @staticmethod
    def state(static: Cut) -> str | None:
        node = static.node.api.node("gpu-1") or {}
        found = (node["metadata"].get("labels") or {}).get("nvidia.com/mig.config.state")
        return None if found is None else str(found)

    @staticmethod
    def notes(static: Cut) -> list[str]:
        return [str(event["note"]) for event in static.node.api.events()]
