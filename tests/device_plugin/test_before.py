"""How a plugin before this one had GPUs, by what it published."""

from pathlib import Path

import pytest

from cotenant.cluster import connect
from cotenant.contract.inventory import GPU, MIG, Family, InstanceShares, Mode
from cotenant.contract.units import GIB
from cotenant.standins.api_rules import NODES
from cotenant.standins.api_server import ApiServer
from device_plugin.families.before import as_published, read
from device_plugin.families.occupants import Occupants
from device_plugin.families.rules import Assigned
from tests.builders import NAMES


@pytest.mark.parametrize(
    ("expected", "published"),
    [
        (Assigned(), {}),
        (Assigned(mode=Mode.MPS), {"mode": Mode.MPS, "mps_pipe": "/run/cotenant/mps/GPU-0/pipe"}),
        (
            Assigned(mode=Mode.MPS, group="pair"),
            {"mode": Mode.MPS, "mps_pipe": "/run/cotenant/mps/group-pair/pipe"},
        ),
        (Assigned(Family.MIG_DYNAMIC, Mode.MIG), {"family": Family.MIG_DYNAMIC, "mode": Mode.MIG}),
        (
            Assigned(Family.MIG_STATIC, Mode.MIG, profiles=(("1g.5gb.me", 3),), renamed=True),
            {
                "family": Family.MIG_STATIC,
                "mode": Mode.MIG,
                "mig": MIG(shares=(InstanceShares(profile="1g.5gb+me", replicas=3, renamed=True),)),
            },
        ),
        # as how many shares, and under which name, an inventory does not say
        (Assigned(Family.REPLICAS, replicas=0), {"family": Family.REPLICAS}),
    ],
)
def test_a_gpu_was_what_its_inventory_says(expected: Assigned, published: dict[str, object]) -> None:
    gpu = GPU(uuid="GPU-0", index=0, model="A", total_bytes=GIB, usable_bytes=GIB, **published)  # type: ignore[arg-type]
    assert expected == as_published(gpu)


@pytest.mark.parametrize("status", [429, 503])
def test_an_api_server_that_refuses_once_is_asked_again(tmp_path: Path, status: int) -> None:
    with ApiServer() as api, connect(api.kubeconfig(tmp_path / "kubeconfig")) as cluster:
        api.add_node("gpu-1")
        api.faults.refuse(status, method="GET", path="/nodes")
        assert {} == read(cluster, "gpu-1", NAMES)


@pytest.mark.parametrize(
    ("taken", "published"),
    [
        (set(), {NAMES.inventory: '{"version":2}'}),  # a kubelet shows for seconds what a plugin offered that is gone
        ({"nvidia.com/gpu"}, {}),
    ],
)
def test_a_name_is_not_taken_by_a_plugin_of_ours_of_another_release(
    tmp_path: Path, taken: set[str], published: dict[str, str]
) -> None:
    with ApiServer() as api, connect(api.kubeconfig(tmp_path / "kubeconfig")) as cluster:
        api.add_node("gpu-1", annotations=published)
        api.patch(NODES, "gpu-1", {"status": {"allocatable": {"nvidia.com/gpu": "8"}}}, subresource="status")
        assert taken == Occupants(cluster, "gpu-1", tmp_path, NAMES).taken({"nvidia.com/gpu"}).keys()
