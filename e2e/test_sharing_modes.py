"""The examples of time slicing, MPS and shared MIG instances, on the real control plane: what reaches their containers.

docs/modes.md has the same in a table. GPUs are made up, and so is NVIDIA's control daemon, which is a real process.
"""

import os
import stat
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import yaml

from cotenant.contract import grant as grants
from cotenant.contract import inventory as inventories
from device_plugin.mps.control import Control
from device_plugin.nvml import NVML
from e2e import policies
from e2e.agreement import phase, settled
from e2e.cluster import ControlPlane
from e2e.node import RealNode, container, pod
from e2e.plugin import held
from e2e.processes import wait_until
from e2e.programs import RunningExtender, RunningPlugin
from e2e.rest import Api, Object

MANIFESTS = Path(__file__).parent.parent / "manifests"
EXAMPLES = MANIFESTS / "examples"
FAKE_CONTROL = Path(sys.executable).parent / "cotenant-fake-mps-control"
# one board of 80 GiB, of which 79 whole GiB are usable
GPUS = "node: e2e\ngpus: [{{model: NVIDIA H100 80GB HBM3, memory: 80GiB, reserved: 640MiB, device: {device}}}]"
SHOW = 'ls "$CUDA_MPS_PIPE_DIRECTORY"; ls /dev/shm /dev/nvidia0; sleep 1000000'


@pytest.fixture(scope="module")
def api(control_plane: ControlPlane) -> Iterator[Api]:
    client = control_plane.api()
    with policies.installed(client):
        yield client
        client.delete_pods()


@pytest.fixture
def device(tmp_path: Path) -> Path:
    """A device node that containers can open in a GPU's place."""
    path = tmp_path / "fake-gpu-0"
    os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))  # what /dev/null is
    return path


def pods_of(api: Api, example: str) -> list[Object]:
    """Apply an example's Deployment, and make its pods as its controllers would, with an image that is here."""
    (deployment,) = api.apply(EXAMPLES / example)
    template, count = deployment["spec"]["template"], deployment["spec"]["replicas"]
    made = []
    for n in range(count):
        (main,) = template["spec"]["containers"]
        new = pod(
            f"{deployment['metadata']['name']}-{n}",
            {**container(main["name"], SHOW), "resources": main["resources"]},
            annotations=template["metadata"].get("annotations"),
            spec={"securityContext": template["spec"].get("securityContext") or {}},
        )
        made.append(api.create(new))
    return made


def names(pods: list[Object]) -> list[str]:
    return [one["metadata"]["name"] for one in pods]


def running(api: Api, name: str) -> Object:
    seen = api.wait("Pod", name, settled, saying="its start", timeout_s=120)
    assert "Running" == phase(seen), seen["status"]
    return seen


def held_by(pods: list[Object], node: RealNode, resource: str) -> list[set[str]]:
    """List the ids of a resource that each of the pods holds; each has one container."""
    by_pod = {pod: ids for (pod, _), ids in held(node.pod_resources_socket, resource).items()}
    return [by_pod[name] for name in names(pods)]


def allocatable(api: Api, node: RealNode, resource: str, count: int) -> None:
    api.wait(
        "Node",
        node.name,
        lambda one: one is not None and one["status"]["allocatable"].get(resource) == str(count),
        saying=f"{count} of {resource}",
        timeout_s=60,
    )


def uuid_of(api: Api, node: RealNode) -> str:
    text = api.get("Node", node.name)["metadata"]["annotations"]["cotenant.io/gpus"]
    (gpu,) = inventories.decode(text).gpus
    return gpu.uuid


def test_eight_notebooks_share_one_gpu_in_turns_and_a_ninth_waits(
    control_plane: ControlPlane, real_node: RealNode, api: Api, device: Path, tmp_path: Path
) -> None:
    (config_map,) = yaml.safe_load_all((MANIFESTS / "time-slicing" / "time-slicing-config.yaml").read_text())
    folder = tmp_path / "nvidia"
    folder.mkdir()
    for key, text in config_map["data"].items():
        (folder / key).write_text(text)
    plugin = RunningPlugin(
        real_node,
        tmp_path / "plugin",
        gpus=GPUS.format(device=device),
        configuration="{passDeviceSpecs: true, inventoryInterval: 0.5}",
        flags=[f"--nvidia-config={folder}"],
    )
    # as any pod of a cluster: these are not ours to place
    profile = {"profiles": [{"schedulerName": "default-scheduler"}]}
    head = {"apiVersion": "kubescheduler.config.k8s.io/v1", "kind": "KubeSchedulerConfiguration"}
    with ExitStack() as stack:
        stack.enter_context(control_plane.scheduling({**head, **profile}))
        stack.enter_context(plugin)
        allocatable(api, real_node, "nvidia.com/gpu", 8)
        created = pods_of(api, "time-slicing.yaml")
        seen = [running(api, name) for name in names(created)]

        uuid = uuid_of(api, real_node)
        for one in seen:
            environment = real_node.environment(one)
            assert uuid == environment["NVIDIA_VISIBLE_DEVICES"]
            assert ("time-slicing", "nothing") == (environment["COTENANT_MODE"], environment["COTENANT_ENFORCED_BY"])
            assert wait_until(lambda one=one: "/dev/nvidia0" in real_node.logs(one), timeout_s=10)  # type: ignore[misc]
        ids = held_by(created, real_node, "nvidia.com/gpu")
        assert {f"{uuid}::{n}" for n in range(8)} == set().union(*ids)

        api.create(pod("ninth", container(limits={"nvidia.com/gpu": 1})))
        api.unschedulable("ninth", "Insufficient nvidia.com/gpu")

        # edited while it runs: the shares change when the pods have ended, since they hold the GPU
        edited = folder / "any.new"
        edited.write_text(config_map["data"]["any"].replace("replicas: 8", "replicas: 2"))
        edited.rename(folder / "any")
        for name in [*names(created), "ninth"]:
            api.delete("Pod", name)
        allocatable(api, real_node, "nvidia.com/gpu", 2)


def test_twelve_servers_use_one_gpu_at_once_under_mps_each_within_its_limits(
    control_plane: ControlPlane, real_node: RealNode, api: Api, device: Path, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        # a short path, for the sockets in it
        root = Path(stack.enter_context(TemporaryDirectory(prefix="mps-")))
        rules = (MANIFESTS / "mps" / "device-plugin-config.yaml").read_text()
        plugin = RunningPlugin(
            real_node,
            tmp_path / "plugin",
            gpus=GPUS.format(device=device),
            configuration=f"{rules}\npassDeviceSpecs: true\ninventoryInterval: 0.5\n"
            f"mps: {{control: {FAKE_CONTROL}, root: {root}, shm: /dev/shm}}",
        )
        extender = stack.enter_context(RunningExtender(control_plane, tmp_path / "extender"))
        stack.enter_context(control_plane.scheduling(extender.scheduler_config()))
        stack.enter_context(plugin)
        allocatable(api, real_node, "cotenant.io/gpu-mem", 79)
        created = pods_of(api, "mps.yaml")
        seen = [running(api, name) for name in names(created)]

        uuid = uuid_of(api, real_node)
        pipe = f"{root}/{uuid}/pipe"
        for one in seen:
            (granted,) = grants.decode(one["metadata"]["annotations"]["cotenant.io/grant"]).containers
            assert ("mps", pipe, 1000) == (str(granted.mode), granted.mps_pipe, granted.user)
            environment = real_node.environment(one)
            assert {
                "NVIDIA_VISIBLE_DEVICES": uuid,
                "CUDA_MPS_PIPE_DIRECTORY": pipe,
                "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": "0=6144M",  # 6 GiB
                "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "25",
                "COTENANT_ENFORCED_BY": "MPS memory limit, per process",
            }.items() <= environment.items()
            # the daemon's own socket is in the container, and the GPU
            assert wait_until(lambda one=one: "/dev/nvidia0" in real_node.logs(one), timeout_s=10)  # type: ignore[misc]
            assert "control\n" in real_node.logs(one)
        assert [6] * 12 == [len(ids) for ids in held_by(created, real_node, "cotenant.io/gpu-mem")]

        # 79 - 12 x 6 = 7 GiB are free, but not for another user
        other = pod(
            "other-user", container(limits={"cotenant.io/gpu-mem": 6}), spec={"securityContext": {"runAsUser": 2000}}
        )
        api.create(other)
        api.unschedulable("other-user", "the GPU's mode conflicts with the pod")

        # a client's fault takes the GPU out of use, and only new pods notice
        control = Control(str(FAKE_CONTROL), root / uuid, [uuid])
        control.command("fake client 1000")
        control.command("fake fault")
        # what they hold stays, 12 x 6, and nothing is left for others
        allocatable(api, real_node, "cotenant.io/gpu-mem", 72)
        control.command("fake leave")
        allocatable(api, real_node, "cotenant.io/gpu-mem", 79)
        assert ["Running"] * 12 == [api.get("Pod", name)["status"]["phase"] for name in names(created)]
        for name in [*names(created), "other-user"]:
            api.delete("Pod", name)


def test_four_models_share_two_mig_instances_as_nvidias_documentation_says_and_a_fifth_waits(
    control_plane: ControlPlane, real_node: RealNode, api: Api, device: Path, tmp_path: Path
) -> None:
    (config_map,) = yaml.safe_load_all((EXAMPLES / "mig-shared-config.yaml").read_text())
    (text,) = config_map["data"].values()
    file = tmp_path / "nvidia.yaml"
    file.write_text(text)
    plugin = RunningPlugin(
        real_node,
        tmp_path / "plugin",
        gpus=f"node: e2e\ngpus: [{{model: NVIDIA A100-SXM4-40GB, memory: 40GiB, mig: true, device: {device}}}]",
        configuration="{passDeviceSpecs: true, inventoryInterval: 0.5}",
        flags=[f"--nvidia-config={file}"],
    )
    for profile, start in (("1g.5gb", 0), ("1g.5gb", 1), ("2g.10gb", 2)):
        NVML.open(fake=plugin.fake_gpus).create_mig_instance(0, profile, start)
    small = "nvidia.com/mig-1g.5gb"
    with ExitStack() as stack:
        extender = stack.enter_context(RunningExtender(control_plane, tmp_path / "extender"))
        stack.enter_context(control_plane.scheduling(extender.scheduler_config()))
        stack.enter_context(plugin)
        # two shares each of two instances, and of the larger one
        allocatable(api, real_node, small, 4)
        allocatable(api, real_node, "nvidia.com/mig-2g.10gb", 2)
        created = pods_of(api, "mig-shared.yaml")
        seen = [running(api, name) for name in names(created)]

        uuids = {one.start: one.uuid for one in NVML.open(fake=plugin.fake_gpus).mig_instances(0)}
        visible = []
        for one in seen:
            (granted,) = grants.decode(one["metadata"]["annotations"]["cotenant.io/grant"]).containers
            assert granted.mig is not None
            assert ("1g.5gb", 2, "none") == (granted.mig.profile, granted.mig.replicas, granted.isolation.given)
            environment = real_node.environment(one)
            assert uuids[granted.mig.start] == environment["NVIDIA_VISIBLE_DEVICES"]
            assert (
                "MIG partition around the instance, nothing between its shares" == environment["COTENANT_ENFORCED_BY"]
            )
            visible.append(environment["NVIDIA_VISIBLE_DEVICES"])
        assert {uuids[0]: 2, uuids[1]: 2} == Counter(visible)
        ids = held_by(created, real_node, small)
        assert {f"{uuids[start]}::{n}" for start in (0, 1) for n in (0, 1)} == set().union(*ids)

        api.create(pod("fifth", container(limits={small: 1})))
        api.unschedulable("fifth", f"Insufficient {small}")
        api.delete("Pod", names(created)[0], grace_s=1)
        running(api, "fifth")
        for name in [*names(created)[1:], "fifth"]:
            api.delete("Pod", name, grace_s=1)
