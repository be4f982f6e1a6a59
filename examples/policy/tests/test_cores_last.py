"""What the policy prefers, on small clusters; and what every policy must keep, on a random one."""

from collections import Counter
from random import Random

import pytest

from cotenant.simulator.document import Document, GPUEntry, NodeEntry, PodEntry
from cotenant.simulator.scene import Scene, scene
from cotenant.simulator.timeline import Timeline
from extender.policies import POLICIES

POLICY = "cores-last"


def cluster(nodes: dict[str, tuple[int, int]], pods: list[PodEntry]) -> Scene:
    """Nodes by name, of so many cores and GPUs of 10 GiB, and pods that come one after the other."""
    entries = tuple(
        NodeEntry(name=name, cpu=cores, memory="64Gi", gpus=(GPUEntry(model="G", memory="10GiB", count=gpus),))
        for name, (cores, gpus) in nodes.items()
    )
    return scene(Document(nodes=entries, pods=tuple(pods)))


def placed(found: Scene, policy: str = POLICY) -> dict[str, tuple[str, list[str]]]:
    """Place the pods; give by name the node and the GPUs of each that found a place."""
    Timeline(found.scheduler(policy), found.mix).play(found.jobs, until=1e6)
    holds = {hold.uid: hold for hold in found.ledger.holds()}
    return {
        job.uid.removeprefix("default/"): (holds[job.uid].node, sorted(holds[job.uid].charges))
        for job in found.jobs
        if job.uid in holds
    }


def test_it_is_found_by_its_name() -> None:
    assert POLICY in POLICIES


def test_the_node_with_the_fewest_cores_for_its_free_gpus_is_taken() -> None:
    found = placed(cluster({"many": (64, 2), "few": (8, 2)}, [PodEntry(name="p", cpu=1, gpu_mem=2)]))

    assert "few" == found["p"][0]


def test_of_its_gpus_the_emptiest_is() -> None:
    pods = [PodEntry(name=name, cpu=1, gpu_mem=2, arrival=n) for n, name in enumerate("ab")]
    found = placed(cluster({"n": (8, 2)}, pods))

    assert found["a"][1] != found["b"][1]


@pytest.mark.parametrize("seed", range(5))
def test_no_gpu_is_over_booked_and_nothing_that_fits_is_refused(seed: int) -> None:
    chance = Random(seed)
    pods = [
        PodEntry(name=f"p{n}", cpu=chance.randint(0, 4), gpu_mem=chance.randint(1, 10), arrival=n) for n in range(60)
    ]
    found = cluster({f"n{n}": (16, 1 + n % 4) for n in range(6)}, pods)

    places = placed(found)

    units = {pod.name: pod.gpu_mem or 0 for pod in pods}
    held: Counter[str] = Counter()
    for name, (_, gpus) in places.items():
        held.update(dict.fromkeys(gpus, units[name]))
    assert max(held.values()) <= 10
    scheduler = found.scheduler(POLICY)
    for job in found.jobs:
        if job.uid.removeprefix("default/") not in places:
            assert not scheduler.fitting(job.request).any()
