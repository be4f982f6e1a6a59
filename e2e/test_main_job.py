"""The main job, on real components: a pod that asks for GPU memory and names nothing else gets what bind chose.

User's pod -> admission policies -> kube-scheduler -> extender -> Binding -> kubelet -> device plugin -> container. What
the API says (annotation), what the container sees (its environment) and what the kubelet keeps (PodResources) must be
the same for every container that started, also while plugin and kubelet are killed.
"""

import os
import re
import stat
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cotenant.contract import grant as grants
from e2e import policies
from e2e.agreement import GPU_MEM, GRANT, disagreements, has_started, output, phase, settled, why_failed, wrong_guesses
from e2e.cluster import ControlPlane
from e2e.node import RealNode, container, pod
from e2e.processes import wait_until
from e2e.programs import Ground, RunningExtender, RunningPlugin
from e2e.rest import Api, Object

# 8 GPUs of 80 GiB of which the driver keeps 640 MiB: 79 units each, 632 in all.
GPUS = """
gpus:
- {model: NVIDIA H100 80GB HBM3, memory: 80GiB, reserved: 640MiB, count: 8}
"""
PRINT_ENVIRONMENT = "env"
STAY = f"{PRINT_ENVIRONMENT}; sleep 1000000"


@pytest.fixture(scope="module")
def api(control_plane: ControlPlane) -> Iterator[Api]:
    """A client as admin of a cluster with our admission policies, which go again afterwards."""
    client = control_plane.api()
    with policies.installed(client):
        yield client


@pytest.fixture
def ground(control_plane: ControlPlane, api: Api, real_node: RealNode, tmp_path: Path) -> Iterator[Ground]:
    """Extender, kube-scheduler and device plugin on the real node; the pods go with them."""
    plugin = RunningPlugin(real_node, tmp_path / "plugin", gpus=GPUS)
    with (
        RunningExtender(control_plane, tmp_path / "extender") as extender,
        control_plane.scheduling(extender.scheduler_config()),
        plugin,
    ):
        yield Ground(api, real_node, extender, plugin)
        api.delete_pods()


def asking(name: str, *units: int, init: int = 0, annotations: dict[str, str] | None = None) -> Object:
    """Return a pod as a user writes it: containers that ask for so many units, and nothing else of ours."""
    return pod(
        name,
        *(container(f"c{n}", STAY, limits={GPU_MEM: amount}) for n, amount in enumerate(units)),
        init=[container("before", PRINT_ENVIRONMENT, limits={GPU_MEM: init})] if init else [],
        annotations=annotations,
    )


def submit(ground: Ground, pods: Sequence[Object]) -> None:
    with ThreadPoolExecutor(10) as pool:
        list(pool.map(ground.api.create, pods))


def wait_settled(ground: Ground, names: Sequence[str], *, timeout_s: float) -> list[Object]:
    """Wait until each pod runs or was rejected, and return them."""
    deadline = time.monotonic() + timeout_s
    return [
        ground.api.wait("Pod", name, settled, saying="an end", timeout_s=max(1, deadline - time.monotonic()))
        for name in names
    ]


def test_a_pod_that_names_nothing_but_its_memory_sees_the_gpu_and_the_limit_that_bind_chose(ground: Ground) -> None:
    ground.api.create(asking("eight", 8))

    seen = ground.api.wait("Pod", "eight", settled, saying="its start")

    grant = grants.decode(seen["metadata"]["annotations"][GRANT])
    got = ground.node.environment(seen, "c0")
    assert "cotenant-scheduler" == seen["spec"]["schedulerName"]
    assert grant.containers[0].gpus[0].uuid == got["NVIDIA_VISIBLE_DEVICES"]
    assert "0=8192M" == got["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"]
    assert str(8 << 30) == got["COTENANT_GPU_MEM_BYTES"]
    assert (1, []) == disagreements(ground.node, [seen])


def test_two_gpus_an_exclusive_one_and_a_request_by_alias(ground: Ground) -> None:
    alias = pod("alias", container("c0", STAY, limits={"nvidia.com/gpumem": 3000}))  # MiB: 2.93 GiB, so 3 units
    submit(
        ground,
        [
            asking("pair", 20, annotations={"cotenant.io/gpu-count": "2"}),
            asking("alone", 4, annotations={"cotenant.io/isolation": "exclusive"}),
            alias,
        ],
    )

    seen = wait_settled(ground, ["pair", "alone", "alias"], timeout_s=60)

    pair, alone, by_alias = (grants.decode(one["metadata"]["annotations"][GRANT]).containers[0] for one in seen)
    assert (3, []) == disagreements(ground.node, seen)
    assert [10 << 30, 10 << 30] == [share.bytes for share in pair.gpus]
    assert [79 << 30] == [share.bytes for share in alone.gpus]
    assert [3 << 30] == [share.bytes for share in by_alias.gpus]
    others = {share.uuid for granted in (pair, by_alias) for share in granted.gpus}
    assert alone.gpus[0].uuid not in others


def test_device_nodes_reach_the_container_where_they_are_passed(
    control_plane: ControlPlane, real_node: RealNode, api: Api, tmp_path: Path
) -> None:
    device = tmp_path / "fake-gpu-0"
    os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))  # what /dev/null is
    plugin = RunningPlugin(
        real_node,
        tmp_path / "plugin",
        gpus=f"gpus: [{{model: Fake, memory: 8GiB, device: {device}}}]",
        configuration="passDeviceSpecs: true",
    )
    with (
        RunningExtender(control_plane, tmp_path / "extender") as extender,
        plugin,
        control_plane.scheduling(extender.scheduler_config()),
    ):
        script = "ls -l /dev/nvidia0; echo written > /dev/nvidia0 && echo OPENED=yes; sleep 1000000"
        api.create(pod("opens", container("c0", script, limits={GPU_MEM: 2})))

        seen = api.wait("Pod", "opens", settled, saying="its start")

        assert wait_until(lambda: "OPENED=yes" in real_node.logs(seen, "c0"), timeout_s=10), real_node.logs(seen, "c0")
        api.delete("Pod", "opens")
        api.gone("opens")


def test_100_pods_in_bursts_while_plugin_and_kubelet_are_killed(ground: Ground) -> None:
    # Of every ten: six alike of 4 units, two of 4 + 4, one of 4 after an init container of 6, one of 3 + 2 after 5.
    # They hold 6 * 4 + 2 * 8 + 6 + 5 = 51 units, so all 100 hold 510 of 632.
    def ten(burst: int) -> list[Object]:
        alike = [asking(f"p{burst}-{n}", 4) for n in range(6)]
        double = [asking(f"p{burst}-{n}", 4, 4) for n in (6, 7)]
        return [*alike, *double, asking(f"p{burst}-8", 4, init=6), asking(f"p{burst}-9", 3, 2, init=5)]

    names = []
    for burst in range(10):
        pods = ten(burst)
        names += [new["metadata"]["name"] for new in pods]
        submit(ground, pods)
        half = [new["metadata"]["name"] for new in pods][:5]
        wait_settled(ground, half, timeout_s=60)  # so that others of the burst are being admitted just now
        if burst in {2, 6}:
            ground.plugin.kill()
            ground.plugin.start()
        if burst in {4, 8}:
            ground.node.restart_kubelet()
    seen = wait_settled(ground, names, timeout_s=240)

    running = [one for one in seen if phase(one) == "Running"]
    rejected = [one for one in seen if phase(one) == "Failed"]
    # The kubelet's own rejections: it admits bound pods before a plugin can have registered. Cotenant frees them.
    reasons = sorted({why_failed(one) for one in rejected})
    compared, wrong = disagreements(ground.node, seen)
    print(f"\n{len(running)} running, {len(rejected)} rejected by the kubelet, {compared} containers compared")
    for reason in reasons:
        print(f"  rejected: {reason}")
    assert [] == wrong
    assert 100 == len(running) + len(rejected)
    assert len(running) >= 50, "too few ran to compare much"
    silent = [
        f"{one['metadata']['name']}/{granted.name}"
        for one in running
        for granted in grants.decode(one["metadata"]["annotations"][GRANT]).containers
        if has_started(one, granted.name) and not output(ground.node, one, granted.name)
    ]
    assert [] == silent, "containers that started and printed nothing could not be compared"
    assert [] == wrong_guesses(ground.plugin.logs, seen)
    # What is left free of each GPU is what running pods do not hold: the rejected hold nothing.
    held: dict[str, int] = {}
    for one in running:
        for uuid, amount in grants.decode(one["metadata"]["annotations"][GRANT]).charges().items():
            held[uuid] = held.get(uuid, 0) + amount
    assert wait_until(lambda: held == allocated(ground.extender), timeout_s=30), (held, allocated(ground.extender))


def allocated(extender: RunningExtender) -> dict[str, int]:
    """Read from the extender's metrics what is held of each GPU."""
    with urllib.request.urlopen(f"http://{extender.serve}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    samples = re.findall(r'^cotenant_gpu_memory_allocated_bytes{.*?uuid="(.*?)"} (\S+)$', text, re.MULTILINE)
    return {uuid: int(float(amount)) for uuid, amount in samples if float(amount)}
