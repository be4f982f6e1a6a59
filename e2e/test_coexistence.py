"""Pods that go around us, on the real kubelet: by nodeName, from a file, and with a GPU from another device plugin.

What such a pod gets, what the extender then places, and what people are told.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cotenant.contract import grant as grants
from cotenant.contract import inventory as inventories
from cotenant.contract.inventory import Inventory
from e2e import policies, programs
from e2e.agreement import GPU_MEM, GRANT, phase
from e2e.cluster import ControlPlane
from e2e.node import RealNode, container, pod
from e2e.plugin import ScriptedPlugin, held
from e2e.processes import wait_until
from e2e.programs import RunningExtender, RunningPlugin
from e2e.rest import Object

# of each 79 units
GPUS = "gpus: [{model: NVIDIA H100 80GB HBM3, memory: 80GiB, reserved: 640MiB, count: 2}]"
CONFIGURATION = "inventoryInterval: 1\nwatchdog: {interval: 1}"


class Ground(programs.Ground):
    def inventory(self) -> Inventory:
        return inventories.decode(self.api.get("Node", self.node.name)["metadata"]["annotations"]["cotenant.io/gpus"])

    def uuids(self) -> list[str]:
        return [gpu.uuid for gpu in self.inventory().gpus]

    def told(self, reason: str) -> list[str]:
        events = self.api.call("GET", "/apis/events.k8s.io/v1/events")["items"]
        return [event["note"] for event in events if event["reason"] == reason]


@pytest.fixture
def ground(control_plane: ControlPlane, real_node: RealNode, tmp_path: Path) -> Iterator[Ground]:
    """Extender, kube-scheduler and device plugin on the real node; no admission until a test asks for it."""
    api = control_plane.api()
    plugin = RunningPlugin(real_node, tmp_path / "plugin", gpus=GPUS, configuration=CONFIGURATION)
    with (
        RunningExtender(control_plane, tmp_path / "extender") as extender,
        control_plane.scheduling(extender.scheduler_config()),
        plugin,
    ):
        yield Ground(api, real_node, extender, plugin)
        api.delete_pods()


def asking(name: str, units: int, **spec: object) -> Object:
    return pod(name, container(limits={GPU_MEM: units}), spec=spec)


@contextmanager
def static(node: RealNode, new: Object) -> Iterator[str]:
    """Run a pod from a file of the node's; gives the name that the API server shows it by."""
    path = node.static_pods / f"{new['metadata']['name']}.json"
    path.write_text(json.dumps(new))
    try:
        yield f"{new['metadata']['name']}-{node.name}"
    finally:
        path.unlink()


def test_a_pod_with_a_node_name_gets_nothing_and_takes_nothing(ground: Ground) -> None:
    ground.api.create(asking("around", 70, nodeName=ground.node.name))

    seen = ground.settled("around")

    assert "Failed" == phase(seen)
    assert "has no grant" in seen["status"]["message"]
    assert {} == held(ground.node.pod_resources_socket, GPU_MEM)
    assert wait_until(lambda: any("has no grant" in note for note in ground.told("NoGrant")), timeout_s=30)
    with policies.installed(ground.api):
        # both GPUs are there for those who ask
        for name in ("first", "second"):
            ground.api.create(asking(name, 79))
            assert "Running" == phase(ground.settled(name))


def test_a_static_pod_that_asks_gets_nothing_and_takes_nothing(ground: Ground) -> None:
    with static(ground.node, asking("rooted", 70)):
        # a kubelet shows no static pod that it has rejected to the API server: only the plugin can tell
        assert wait_until(lambda: "70 of cotenant.io/gpu-mem" in ground.plugin.logs[-1].read_text(), timeout_s=60)
        assert {} == held(ground.node.pod_resources_socket, GPU_MEM)
        with policies.installed(ground.api):
            for one in ("first", "second"):
                ground.api.create(asking(one, 79))
                assert "Running" == phase(ground.settled(one))


def test_what_a_static_pod_uses_without_asking_counts_as_taken(ground: Ground) -> None:
    takes = pod("takes", container(env=[{"name": "NVIDIA_VISIBLE_DEVICES", "value": "all"}]))
    with static(ground.node, takes) as name, policies.installed(ground.api):
        seen = ground.settled(name)
        assert "Running" == phase(seen)
        pid = ground.node.pid(seen)
        processes = json.dumps([{"pid": pid, "memory": "9500MiB"}])
        ground.plugin.fake_gpus.write_text(
            "gpus:\n"
            f"  - {{model: NVIDIA H100 80GB HBM3, memory: 80GiB, reserved: 640MiB, uuid: {ground.uuids()[0]}, "
            f"processes: {processes}}}\n"
            f"  - {{model: NVIDIA H100 80GB HBM3, memory: 80GiB, reserved: 640MiB, uuid: {ground.uuids()[1]}}}\n"
        )

        def counted() -> bool:
            found = ground.inventory().gpus[0].foreign
            return found is not None and found.bytes == 10 << 30  # 9.3 GiB are 10 units

        assert wait_until(counted, timeout_s=30), ground.inventory()
        ground.api.create(asking("large", 79))
        large = ground.settled("large")
        assert ground.uuids()[1] in large["metadata"]["annotations"][GRANT]
        ground.api.create(asking("waits", 70))
        ground.api.unschedulable("waits", "no single GPU has the requested memory free")
        ground.api.create(asking("fits", 69))
        assert ground.uuids()[0] in ground.settled("fits")["metadata"]["annotations"][GRANT]
    ground.api.gone(name)


def test_a_gpu_that_another_plugin_has_handed_out_is_left_alone_until_it_is_given_back(ground: Ground) -> None:
    first, _ = ground.uuids()
    with ScriptedPlugin("nvidia.com/gpu", [first]), policies.installed(ground.api):

        def offered(seen: Object | None) -> bool:
            return seen is not None and seen["status"]["allocatable"].get("nvidia.com/gpu") == "1"

        ground.api.wait("Node", ground.node.name, offered, saying="nvidia.com/gpu", timeout_s=60)
        theirs = pod("theirs", container(limits={"nvidia.com/gpu": 1}), spec={"nodeName": ground.node.name})
        ground.api.create(theirs)
        assert "Running" == phase(ground.settled("theirs"))
        assert wait_until(lambda: ground.inventory().gpus[0].foreign is not None, timeout_s=30)
        fence = ground.inventory().gpus[0].foreign
        assert fence is not None
        assert (True, "held by pod default/theirs as nvidia.com/gpu") == (fence.fenced, fence.detail)
        assert wait_until(lambda: bool(ground.told("GPUFenced")), timeout_s=30)

        ground.api.create(asking("beside", 60))
        assert first not in ground.settled("beside")["metadata"]["annotations"][GRANT]
        ground.api.create(asking("waits", 60))
        ground.api.unschedulable("waits", "no single GPU has the requested memory free")

        ground.api.delete("Pod", "theirs")
        ground.api.gone("theirs")
        assert first in ground.settled("waits")["metadata"]["annotations"][GRANT]
        assert wait_until(lambda: bool(ground.told("GPUClear")), timeout_s=30)


def test_a_variable_of_ours_from_env_from_loses(ground: Ground) -> None:
    api, names = (
        ground.api,
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "ours", "namespace": "default"}},
    )
    everything = {"NVIDIA_VISIBLE_DEVICES": "all", "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": "0=80G", "MINE": "kept"}
    api.create({**names, "data": everything})
    with policies.installed(api):
        api.create(pod("told", {**container(limits={GPU_MEM: 2}), "envFrom": [{"configMapRef": {"name": "ours"}}]}))
        seen = ground.settled("told")
        assert "Running" == phase(seen)
        got = ground.node.environment(seen)
        (granted,) = grants.decode(seen["metadata"]["annotations"][GRANT]).containers
        assert (granted.gpus[0].uuid, "0=2048M", "kept") == (
            got["NVIDIA_VISIBLE_DEVICES"],
            got["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"],
            got["MINE"],
        )
    api.delete("ConfigMap", "ours")
