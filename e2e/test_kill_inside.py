"""Plugin or kubelet are killed exactly inside a call: before the plugin sees it, within it, and with its answer lost.

A proxy between the two holds the call there (e2e/faults/plugin_proxy.py). And what comes after the last call fails, as
the disk is full. One GPU is counted by memory, one cut by MIG, and on each runs a pod that must not notice.
"""

import itertools
import json
import os
import re
import stat
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cotenant.contract import grant as grants
from device_plugin.nvml.fake_mig import StateFile
from e2e import policies, programs
from e2e.agreement import GPU_MEM, GRANT, disagreements, phase, why_failed, wrong_guesses
from e2e.cluster import ControlPlane
from e2e.faults.invariants import Picture, broken, leaks
from e2e.faults.plugin_proxy import PluginProxy, Where
from e2e.node import RealNode, container, pod
from e2e.processes import wait_until
from e2e.programs import RunningExtender, RunningPlugin
from e2e.rest import Object

# 79 units, of which the bystander has 39; and seven slices, of which it has four of the eight places of memory.
GPUS = """gpus:
- {{model: NVIDIA H100 80GB HBM3, memory: 80GiB, reserved: 640MiB, uuid: {uuid}}}
- {{model: NVIDIA A100-SXM4-40GB, memory: 40GiB, mig: true, computeCapability: [8, 0], device: {device}}}
"""
UUID = "GPU-00000000-0000-4000-8000-00000000000a"
MIG = "nvidia.com/mig-{}"
# What fits beside the bystander once, and not twice: who runs next has what the killed call did not keep.
REST = {GPU_MEM: 40, MIG.format("3g.20gb"): 1}
# What the kubelet says of a pod whose question was open when the plugin went.
CUT_OFF = re.compile(r"rpc error: code = (Unavailable|Canceled)")
# What it says of a pod that it finds bound as it starts, while no plugin has registered yet.
UNREGISTERED = re.compile(r"Allocate failed due to (no healthy devices present|.*Available: 0|.*unregistered device)")


@dataclass
class Ground(programs.Ground):
    """All that runs, and what there has been."""

    proxy: PluginProxy
    state: StateFile
    bystanders: dict[str, tuple[Object, int]] = field(default_factory=dict)
    # all pods there have been, by UID
    ever: dict[str, Object] = field(default_factory=dict)

    def settled(self, name: str) -> Object:
        seen = super().settled(name)
        self.ever[seen["metadata"]["uid"]] = seen
        return seen

    def kill(self) -> None:
        """Kill the plugin and start it again."""
        self.plugin.kill()
        self.plugin.start()

    def remove(self, *names: str) -> None:
        for name in names:
            self.api.delete("Pod", name)
        for name in names:
            self.api.gone(name)

    def instances(self) -> dict[str, tuple[str, str, int]]:
        """List the instances that there are, by UUID: GPU, profile and start."""
        return {one.uuid: (one.gpu, one.profile, one.start) for one in self.state.read().instances}


def asking(name: str, resource: str, count: int) -> Object:
    return pod(name, container("c0", limits={resource: count}))


@pytest.fixture(scope="module")
def ground(
    control_plane: ControlPlane, real_node: RealNode, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Ground]:
    directory = tmp_path_factory.mktemp("inside")
    api = control_plane.api()
    device = directory / "fake-gpu"
    os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))  # what /dev/null is
    # what nvidia-ctk writes down of whole GPUs: where MIG is cut, containers get these by their CDI names as well
    device_spec = {"name": UUID, "containerEdits": {"env": [f"INJECTED={UUID}"]}}
    spec = real_node.cdi_directory / "nvidia.json"
    spec.write_text(json.dumps({"cdiVersion": "0.6.0", "kind": "nvidia.com/gpu", "devices": [device_spec]}))
    with (
        policies.installed(api),
        RunningExtender(control_plane, directory / "extender") as extender,
        control_plane.scheduling(extender.scheduler_config()),
        PluginProxy(real_node.pod_resources_socket) as proxy,
    ):
        plugin = RunningPlugin(
            real_node,
            directory / "plugin",
            pod_resources=proxy.pod_resources,
            gpus=GPUS.format(uuid=UUID, device=device),
            configuration="gpus: [{indices: [1], family: mig-dynamic}]\ndeviceListStrategy: cdi-cri\n"
            f"inventoryInterval: 60\ncdiDirectory: {real_node.cdi_directory}\n",
            flags=[f"--kubelet-dir={proxy.kubelet_directory}"],
        )
        state = StateFile(plugin.fake_gpus)
        with plugin:
            found = Ground(api, real_node, extender, plugin, proxy, state)
            for name, resource, count in (
                ("by-memory", GPU_MEM, 39),
                ("by-mig", MIG.format("4g.20gb"), 1),
            ):
                api.create(asking(name, resource, count))
                seen = found.running(name)
                found.bystanders[name] = seen, real_node.pid(seen, "c0")
            yield found
            proxy.release()
            found.remove(*(left["metadata"]["name"] for left in api.list("Pod", namespace="default")))
            assert wait_until(lambda: found.instances() == {}, timeout_s=30)
    spec.unlink()


@pytest.fixture(autouse=True)
def nothing_left(ground: Ground) -> Iterator[None]:
    """Take away what a test that failed left, so that the next one shows faults of its own alone."""
    yield
    left = {one["metadata"]["name"] for one in ground.api.list("Pod", namespace="default")} - {*ground.bystanders}
    if left:
        ground.proxy.release()
        ground.remove(*left)


def judged(ground: Ground, *names: str) -> list[str]:
    """Hold the bystanders and the pods of these names, which run, to the API, their environment and the kubelet."""
    wrong = []
    for name, (before, pid) in ground.bystanders.items():
        now = ground.api.get("Pod", name)
        (was,), (is_,) = before["status"]["containerStatuses"], now["status"]["containerStatuses"]
        if (was["containerID"], 0) != (is_["containerID"], is_["restartCount"]) or not Path(f"/proc/{pid}").exists():
            wrong.append(f"{name} was disturbed: {now['status']}")
    seen = [ground.api.get("Pod", name) for name in ("by-memory", "by-mig", *names)]
    by_memory = [one for one in seen if GPU_MEM in one["spec"]["containers"][0]["resources"]["limits"]]
    compared, said = disagreements(ground.node, by_memory, lambda node, one, name: node.environment(one, name))
    wrong += said if compared == len(by_memory) else [*said, f"{compared} of {len(by_memory)} could be compared"]
    # an instance is known by the place that was granted, and there is one for each that runs and no other
    granted, saw = [], []
    for one in (one for one in seen if one not in by_memory):
        (asked,) = grants.decode(one["metadata"]["annotations"][GRANT]).containers
        assert asked.mig is not None
        granted.append((asked.gpus[0].uuid, asked.mig.profile, asked.mig.start))
        saw.append(ground.instances().get(ground.node.environment(one, "c0")["COTENANT_MIG_UUID"]))
    if granted != saw or sorted(granted) != sorted(ground.instances().values()):
        wrong.append(f"granted {granted}, seen {saw}, there are {ground.instances()}")
    picture = Picture.of(ground.api)
    wrong += broken(picture)
    leaked: list[str] = []

    def quiet() -> bool:
        with urllib.request.urlopen(f"http://{ground.extender.serve}/metrics", timeout=10) as answer:
            leaked[:] = leaks(picture, answer.read().decode())
        return not leaked

    wait_until(quiet, timeout_s=10)
    return [*wrong, *leaked, *wrong_guesses(ground.plugin.logs, list(ground.ever.values()))]


IN_ADMISSION = pytest.mark.parametrize(
    ("call", "where", "resource"),
    [
        ("GetPreferredAllocation", Where.INSIDE, GPU_MEM),
        ("Allocate", Where.BEFORE, GPU_MEM),
        ("Allocate", Where.AFTER, GPU_MEM),
        ("Allocate", Where.AFTER, MIG.format("3g.20gb")),
    ],
)


@IN_ADMISSION
def test_a_plugin_killed_while_a_pod_is_being_admitted_costs_that_pod_and_nobody_its_gpu(
    ground: Ground, call: str, where: Where, resource: str
) -> None:
    hold = ground.proxy.hold(resource, call, where)
    ground.api.create(asking("killed", resource, REST[resource]))
    assert hold.reached.wait(30)

    ground.kill()

    seen = ground.settled("killed")
    assert "Failed" == phase(seen)
    assert CUT_OFF.search(why_failed(seen)), why_failed(seen)
    assert [] == judged(ground)
    # the next one that its controller makes gets what it had, while it is still there to be looked at
    ground.api.create(asking("next", resource, REST[resource]))
    ground.running("next")
    assert [] == judged(ground, "next")
    ground.remove("killed", "next")


@IN_ADMISSION
def test_a_kubelet_killed_while_a_pod_is_being_admitted_admits_it_anew_or_rejects_it_and_nobody_loses_a_gpu(
    ground: Ground, call: str, where: Where, resource: str
) -> None:
    hold = ground.proxy.hold(resource, call, where)
    ground.api.create(asking("held", resource, REST[resource]))
    assert hold.reached.wait(30)

    ground.node.restart_kubelet()

    # what it had sent arrives; only where the plugin asks it who is meant there is nobody to say
    assert where is Where.INSIDE or hold.answered.wait(30)
    # The next kubelet knows of no ids for it, and admits it as a new one: before a plugin has registered it rejects it.
    seen = ground.settled("held")
    names = ["held"]
    if phase(seen) == "Failed":
        assert UNREGISTERED.search(why_failed(seen)), why_failed(seen)
        ground.api.create(asking("next", resource, REST[resource]))
        ground.running("next")
        names = ["next"]
    print(f"\nkubelet killed with {call} held {where} ({resource}): {phase(seen)} {seen['status'].get('message', '')}")
    assert [] == judged(ground, *names)
    ground.remove(*{"held", *names})


def before_their_start(ground: Ground) -> list[str]:
    """Have pods stand before, within and behind PreStartContainer at once: the kubelet asks in each one's worker."""
    names = []
    for kind, resource, count in (("memory", GPU_MEM, 13), ("mig", MIG.format("1g.5gb"), 1)):
        for where in Where:
            hold = ground.proxy.hold(resource, "PreStartContainer", where)
            names.append(f"{kind}-{where}")
            ground.api.create(asking(names[-1], resource, count))
            assert hold.reached.wait(30), names[-1]
    # the last one's instance is made, and the kubelet does not know; those of the others are not
    assert ["1g.5gb", "4g.20gb"] == sorted(profile for _, profile, _ in ground.instances().values())
    return names


def test_a_kubelet_killed_while_containers_are_about_to_start_starts_each_once(ground: Ground) -> None:
    names = before_their_start(ground)

    ground.node.restart_kubelet()

    running = []
    for name in names:
        seen = ground.settled(name)
        if phase(seen) == "Failed":
            # admitted anew before the plugin had registered: nothing of ours can be done about it
            assert UNREGISTERED.search(why_failed(seen)), why_failed(seen)
        else:
            assert 0 == seen["status"]["containerStatuses"][0]["restartCount"]
            running.append(name)
    print(f"\nkubelet killed: {len(running)} of {len(names)} run")
    # what a rejected one had is free again
    assert wait_until(lambda: judged(ground, *running) == [], timeout_s=15), judged(ground, *running)
    ground.remove(*names)
    assert wait_until(lambda: judged(ground) == [], timeout_s=15), judged(ground)


def test_a_plugin_killed_while_containers_are_about_to_start_costs_them_a_moment(ground: Ground) -> None:
    names = before_their_start(ground)

    ground.kill()

    for name in names:
        seen = ground.running(name)
        assert 0 == seen["status"]["containerStatuses"][0]["restartCount"]
    assert [] == judged(ground, *names)
    ground.remove(*names)
    assert wait_until(lambda: judged(ground) == [], timeout_s=15), judged(ground)


@contextmanager
def full_disk_under_containers(node: RealNode) -> Iterator[Callable[[], None]]:
    """Have containerd find no room for further containers until what is given is called; those that run have theirs."""
    place = node.containers_directory
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,nr_inodes=64", "cotenant-test", str(place)], check=True)
    fillers: list[Path] = []

    def make_room() -> None:
        while fillers:
            fillers.pop().unlink()

    try:
        with suppress(OSError):
            for number in itertools.count():
                filler = place / f"filler-{number}"
                filler.touch(exist_ok=False)
                fillers.append(filler)
        yield make_room
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def held_back(seen: Object | None) -> bool:
    """Whether the container of a pod could not be made for want of room."""
    statuses = seen["status"].get("containerStatuses", []) if seen else []
    return any("no space left on device" in one["state"].get("waiting", {}).get("message", "") for one in statuses)


def test_a_full_disk_under_containers_holds_them_back_with_their_gpus_until_there_is_room_or_they_are_gone(
    ground: Ground,
) -> None:
    names = ["memory", "mig", "given-up"]
    with full_disk_under_containers(ground.node) as make_room:
        for name in names:
            resource, count = (GPU_MEM, 13) if name == "memory" else (MIG.format("1g.5gb"), 1)
            ground.api.create(asking(name, resource, count))
        for name in names:
            seen = ground.api.wait("Pod", name, held_back, saying="a disk that is full", timeout_s=60)
            ground.ever[seen["metadata"]["uid"]] = seen
        # theirs were made before their containers could not be
        assert ["1g.5gb", "1g.5gb", "4g.20gb"] == sorted(profile for _, profile, _ in ground.instances().values())

        ground.remove(names.pop())
        assert wait_until(lambda: len(ground.instances()) == 2, timeout_s=30), ground.instances()
        make_room()

        for name in names:
            seen = ground.running(name)
            assert 0 == seen["status"]["containerStatuses"][0]["restartCount"]
        assert [] == judged(ground, *names)
        ground.remove(*names)
    assert wait_until(lambda: judged(ground) == [], timeout_s=15), judged(ground)
