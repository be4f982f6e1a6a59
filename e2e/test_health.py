"""Health and the memory watchdog on real components: made-up GPUs fall ill and are overused, all else is real."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest

from cotenant.contract import grant as grants
from cotenant.contract import inventory as inventories
from cotenant.contract.names import Names
from e2e import policies
from e2e.cluster import ControlPlane
from e2e.node import RealNode, container, pod
from e2e.processes import wait_until
from e2e.programs import RunningExtender, RunningPlugin
from e2e.rest import Api, Object

NAMES = Names()
PLUGIN = """
inventoryInterval: 0.5
health: {cleanProbes: 3}
watchdog: {interval: 0.5, margin: 256MiB}
"""
EXTENDER = "evictOverusersAfter: 1\n"


class Ground(NamedTuple):
    """All that runs here."""

    api: Api
    node: RealNode
    plugin: RunningPlugin

    def set_gpus(self, *gpus: dict[str, Any]) -> None:
        """Say how the two GPUs are, in the file that the plugin reads again when it changes."""
        all_ = [{"model": "Made up", "memory": "10GiB", **gpu} for gpu in gpus]
        new = self.plugin.fake_gpus.with_suffix(".new")
        new.write_text(json.dumps({"node": "e2e", "gpus": all_}))
        new.rename(self.plugin.fake_gpus)

    def running(self, name: str) -> Object:
        return self.api.wait("Pod", name, in_phase("Running"), saying="its start", timeout_s=60)

    def told(self, name: str, reason: str) -> bool:
        events = self.api.list("Event", namespace="default", api_version="events.k8s.io/v1")
        return any(one["regarding"]["name"] == name and one["reason"] == reason for one in events)


def in_phase(phase: str) -> Callable[[Object | None], bool]:
    return lambda seen: bool(seen) and seen["status"].get("phase") == phase  # type: ignore[index]


def advertises(units: int) -> Callable[[Object | None], bool]:
    return lambda node: bool(node and node["status"]["allocatable"].get(NAMES.gpu_mem) == str(units))


def is_served(*, no: bool = False) -> Callable[[Object | None], bool]:
    def check(node: Object | None) -> bool:
        text = (node or {"metadata": {}})["metadata"].get("annotations", {}).get(NAMES.inventory)
        return bool(text) and inventories.decode(text).serving is not no

    return check


def asking(name: str, units: int) -> Object:
    """A pod that goes where it lies tightest."""
    wish = {NAMES.policy: "best-fit"}
    return pod(name, container("c0", "sleep 1000000", limits={NAMES.gpu_mem: units}), annotations=wish)


def gpu_of(seen: Object) -> str:
    return grants.decode(seen["metadata"]["annotations"][NAMES.grant]).containers[0].gpus[0].uuid


def restarts(seen: Object) -> list[int]:
    return [status["restartCount"] for status in seen["status"]["containerStatuses"]]


@contextmanager
def forgotten_faults(api: Api, node: str) -> Iterator[None]:
    """Leave no GPU ill: a test that failed would, and the next plugin on this node believes what it reads there."""
    try:
        yield
    finally:
        api.patch("Node", node, {"metadata": {"annotations": {NAMES.gpu_faults: None}}})


@pytest.fixture(scope="module")
def ground(
    control_plane: ControlPlane, real_node: RealNode, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Ground]:
    """Two GPUs of 10 GiB on the real node, the extender, a kube-scheduler, and our admission policies."""
    directory = tmp_path_factory.mktemp("health")
    config = directory / "extender.yaml"
    config.write_text(EXTENDER)
    api = control_plane.api()
    plugin = RunningPlugin(
        real_node,
        directory / "plugin",
        gpus="node: e2e\ngpus: [{model: Made up, memory: 10GiB, count: 2}]\n",
        configuration=PLUGIN,
    )
    extender = RunningExtender(control_plane, directory / "extender", flags=[f"--config={config}"])
    with (
        forgotten_faults(api, real_node.name),
        policies.installed(api),
        extender,
        plugin,
        control_plane.scheduling(extender.scheduler_config()),
    ):
        yield Ground(api, real_node, plugin)
        api.delete_pods()


def test_an_ill_gpu_gets_no_new_pod_its_running_one_goes_on_and_once_well_it_is_used_again(ground: Ground) -> None:
    ground.api.create(asking("first", 7))
    first = ground.running("first")
    ill = gpu_of(first)
    index = int(ill != uuids(ground)[0])
    ground.set_gpus(*({"xids": [48], "recoveryAction": "reset"} if n == index else {} for n in range(2)))
    assert wait_until(lambda: ground.told(ground.node.name, "GPUUnhealthy"), timeout_s=30), ground.plugin.program.tail()
    ground.api.wait("Node", ground.node.name, advertises(17), saying="fewer units", timeout_s=60)

    # 3 are left of the ill one, where it would lie tightest
    ground.api.create(asking("small", 3))
    assert ill != gpu_of(ground.running("small"))
    # and 7 of the other, which are not enough
    ground.api.create(asking("second", 8))
    ground.api.unschedulable("second")
    # but the 7 can be had: what the first pod holds of the ill one is not taken from them
    ground.api.create(asking("rest", 7))
    assert ill != gpu_of(ground.running("rest"))

    # a kubelet that starts anew meanwhile leaves the running pod alone
    ground.node.kill_kubelet()
    ground.api.wait("Node", ground.node.name, is_served(no=True), saying="the plugin to notice")
    ground.node.start_kubelet()
    ground.api.wait("Node", ground.node.name, is_served(), saying="the plugin's registration", timeout_s=60)

    # the driver wants nothing more: it was reset
    ground.set_gpus(*({"xids": [48], "recoveryAction": "none"} if n == index else {} for n in range(2)))
    assert wait_until(lambda: ground.told(ground.node.name, "GPUHealthy"), timeout_s=30)
    ground.api.wait("Node", ground.node.name, advertises(20), saying="all units", timeout_s=60)
    ground.api.create(asking("third", 3))
    assert ill == gpu_of(ground.running("third"))  # tightest again
    still = ground.api.get("Pod", "first")
    assert ("Running", [0]) == (still["status"]["phase"], restarts(still))
    assert ground.node.pid(first, "c0") == ground.node.pid(still, "c0")
    for name in ("first", "small", "second", "rest", "third"):
        ground.api.delete("Pod", name)
    for name in ("first", "small", "second", "rest", "third"):
        ground.api.gone(name)


def uuids(ground: Ground) -> list[str]:
    node = ground.api.get("Node", ground.node.name)
    return [gpu.uuid for gpu in inventories.decode(node["metadata"]["annotations"][NAMES.inventory]).gpus]


def test_the_container_of_a_process_that_uses_too_much_is_found_marked_and_evicted(ground: Ground) -> None:
    for name in ("greedy", "victim"):
        ground.api.create(asking(name, 4))
    greedy, victim = ground.running("greedy"), ground.running("victim")
    assert gpu_of(greedy) == gpu_of(victim)
    index = uuids(ground).index(gpu_of(greedy))
    pids = {name: ground.node.pid(seen, "c0") for name, seen in (("greedy", greedy), ("victim", victim))}

    def use(gibibytes: float) -> None:
        held = [
            {"pid": pids["greedy"], "memory": f"{int(gibibytes * 1024)}MiB"},
            {"pid": pids["victim"], "memory": "4GiB"},
        ]
        ground.set_gpus(*({"processes": held} if n == index else {} for n in range(2)))

    use(4.1)  # within the margin
    use(5)
    marked = ground.api.wait(
        "Pod", "greedy", lambda seen: bool(seen and NAMES.overuse in seen["metadata"]["annotations"]), saying="its mark"
    )
    assert (
        f"container c0 uses 5 GiB of GPU {gpu_of(greedy)}, but was granted 4 GiB"
        == marked["metadata"]["annotations"][NAMES.overuse]
    )
    assert wait_until(lambda: ground.told("greedy", "GPUMemoryOverused"), timeout_s=10)
    amounts = iter(range(1, 100))

    def evicted() -> bool:
        use(5 + next(amounts) / 4)  # so that a new report comes before the next beat
        return ground.told("greedy", "GPUMemoryEvicted")

    assert wait_until(evicted, timeout_s=30)
    ground.api.gone("greedy")
    untouched = ground.api.get("Pod", "victim")
    assert ("Running", [0]) == (untouched["status"]["phase"], restarts(untouched))
    assert NAMES.overuse not in untouched["metadata"]["annotations"]
