"""A real kube-scheduler with the configuration that we ship calls the extender; the API alone is the judge."""

import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cotenant.contract import grant as grants
from cotenant.contract import inventory as inventories
from cotenant.contract.units import GIB
from e2e import nodes, policies
from e2e.cluster import ControlPlane
from e2e.nodes import Shape
from e2e.processes import MissingProgramError, wait_until
from e2e.programs import RunningExtender
from e2e.rest import Api, Object

GRANT = "cotenant.io/grant"


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[ControlPlane]:
    """A control plane of the test's own, with our admission policies: what other tests leave would be scheduled."""
    try:
        with ControlPlane(tmp_path / "control-plane") as started, policies.installed(started.api()):
            yield started
    except MissingProgramError as missing:
        pytest.skip(str(missing))


def a_pod(name: str, *units: int, init: int = 0, annotations: dict[str, str] | None = None) -> Object:
    """Return a pod as a user writes it: containers that ask for so many units, and nothing else of ours."""
    containers = [
        {"name": f"c{n}", "image": "x", "resources": {"limits": {"cotenant.io/gpu-mem": str(amount)}}}
        for n, amount in enumerate(units)
    ]
    before = [{"name": "init", "image": "x", "resources": {"limits": {"cotenant.io/gpu-mem": str(init)}}}]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "default", "annotations": annotations or {}},
        "spec": {
            "containers": containers,
            "initContainers": before if init else [],
            "automountServiceAccountToken": False,
        },
    }


def held(api: Api) -> dict[str, int]:
    """Add up what the pods of the API hold of each GPU, by UUID, in bytes."""
    total: Counter[str] = Counter()
    for pod in api.list("Pod"):
        if "nodeName" in pod["spec"] and pod["status"].get("phase") not in {"Succeeded", "Failed"}:
            total.update(grants.decode(pod["metadata"]["annotations"][GRANT]).charges())
    return dict(total)


def usable(api: Api) -> dict[str, int]:
    """List the usable bytes of every GPU of the API's nodes, by UUID."""
    found = {}
    for node in api.list("Node"):
        inventory = inventories.decode(node["metadata"]["annotations"]["cotenant.io/gpus"])
        found.update({gpu.uuid: gpu.usable_bytes for gpu in inventory.gpus})
    return found


def bound(api: Api) -> int:
    return sum("nodeName" in pod["spec"] for pod in api.list("Pod"))


@pytest.mark.parametrize("placement", ["advise", "decide"])
def test_200_pods_of_mixed_sizes_are_bound_with_one_write_each(
    cluster: ControlPlane, tmp_path: Path, placement: str
) -> None:
    api = cluster.api()
    nodes.register(api, 10, Shape(gpus=8, gpu_bytes=80 * GIB), prefix="large")
    nodes.register(api, 10, Shape(gpus=4, gpu_bytes=24 * GIB, model="NVIDIA A30"), prefix="small")
    # Every ten pods hold 8 + 4, 24, 16, 6 (the init container's; the main one's 5 come after it), 2 x 20, 3, 40, 8, 1
    # and 12 units: 162. So 200 pods hold 3,240, of 10 * 8 * 80 + 10 * 4 * 24 = 7,360.
    mix = [
        a_pod("p0", 8, 4),
        a_pod("p1", 24),
        a_pod("p2", 16),
        a_pod("p3", 5, init=6),
        a_pod("p4", 40, annotations={"cotenant.io/gpu-count": "2"}),
        a_pod("p5", 3),
        a_pod("p6", 40),
        a_pod("p7", 8),
        a_pod("p8", 1),
        a_pod("p9", 12),
    ]
    pods = [
        {**mix[n % 10], "metadata": {**mix[n % 10]["metadata"], "name": f"p{n}"}}  # a name each
        for n in range(200)
    ]
    with RunningExtender(cluster, tmp_path / "extender", flags=[f"--placement={placement}"]) as extender:
        cluster.start_scheduler(extender.scheduler_config())
        _, offset = cluster.audit()
        started = time.monotonic()
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(api.create, pods))

        assert wait_until(lambda: bound(api) == 200, timeout_s=60), f"{bound(api)} of 200 bound"

        print(f"\n200 pods bound in {time.monotonic() - started:.1f} s, placement {placement}")
        room = usable(api)
        holdings = held(api)
        assert 3240 * GIB == sum(holdings.values())
        assert [] == [uuid for uuid, amount in holdings.items() if amount > room[uuid]]
        writes, _ = cluster.audit(offset=offset)
        ours = [w for w in writes if w.user.endswith(":cotenant-extender") and w.resource in {"pods", "bindings"}]
        binds = Counter(w.name for w in ours if w.subresource == "binding")
        assert {pod["metadata"]["name"]: 1 for pod in pods} == dict(binds)
        assert {"binding"} == {w.subresource for w in ours}
        assert {201} == {w.code for w in ours}


def test_a_node_that_prioritize_names_alone_wins_over_those_that_it_leaves_out(
    cluster: ControlPlane, tmp_path: Path
) -> None:
    api = cluster.api()
    nodes.register(api, 8, Shape(gpus=1, gpu_bytes=80 * GIB), prefix="n")
    with RunningExtender(cluster, tmp_path / "extender", flags=["--policy=best-fit"]) as extender:
        cluster.start_scheduler(extender.scheduler_config())
        # 80 - 45 = 35 and 80 - 50 = 30: of eight nodes that all have room for 30 and for 35, one each is the tightest
        for name, amount in (("a", 45), ("b", 50), ("into-b", 30), ("into-a", 35)):
            api.create(a_pod(name, amount))
            api.bound(name)
        where = {name: api.get("Pod", name)["spec"]["nodeName"] for name in ("a", "b", "into-a", "into-b")}

    assert where["a"] == where["into-a"]
    assert where["b"] == where["into-b"]
    assert where["a"] != where["b"]


def test_the_only_node_that_fits_among_5000_is_nominated(cluster: ControlPlane, tmp_path: Path) -> None:
    api = cluster.api()
    # 4,999 nodes have 8 x 16 units free, more than the pod's 40 together, but no single GPU of theirs has 40: only the
    # extender sees that, and kube-scheduler shows it 500 nodes at a time.
    nodes.register(api, 4999, Shape(gpus=8, gpu_bytes=16 * GIB, model="NVIDIA T4"), prefix="many")
    nodes.register(api, 1, Shape(gpus=1, gpu_bytes=80 * GIB), prefix="one")
    with RunningExtender(cluster, tmp_path / "extender") as extender:
        cluster.start_scheduler(extender.scheduler_config())
        api.create(a_pod("warm", 1))  # kube-scheduler's first attempt after its start is slower than the rest
        api.bound("warm")
        _, offset = cluster.audit()
        names = [f"large-{n}" for n in range(5)]
        for name in names:
            started = time.monotonic()
            api.create(a_pod(name, 40))
            # Without a nomination its next attempt could come after the scheduler's flush of 5 minutes.
            api.bound(name, timeout_s=20)

            print(f"\nthe one node of 5,000 found in {time.monotonic() - started:.2f} s")
            assert "one-0" == api.get("Pod", name)["spec"]["nodeName"]
            api.delete("Pod", name, grace_s=0)
            api.gone(name)
        writes, _ = cluster.audit(offset=offset)
        nominated = Counter(w.name for w in writes if w.subresource == "status" and "extender" in w.user)
        # One in ten finds the node in its first sample; kube-scheduler may take a nomination away untried.
        assert nominated
        assert max(nominated.values()) <= 2
