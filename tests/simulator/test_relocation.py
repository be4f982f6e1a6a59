"""A pod is moved where another fits then, and never otherwise; and mixes drift."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotenant.contract.units import GIB
from cotenant.simulator.churn import draw
from cotenant.simulator.document import Document, GPUEntry, NodeEntry, PodEntry
from cotenant.simulator.relocation import Mover, Running
from cotenant.simulator.scene import Scene, scene
from cotenant.simulator.timeline import Played, Timeline
from cotenant.simulator.trace import TraceNode, TracePod


def a_scene(pods: Sequence[PodEntry], *, nodes: Sequence[int] = (2,), last: int = 10) -> Scene:
    """Nodes of so many GPUs of 10 GiB each, the last of them of so many GiB."""
    entries = [
        NodeEntry(
            name=f"n{n}",
            cpu=8,
            memory="64Gi",
            gpus=(GPUEntry(model=f"G{gpus}", memory=f"{10 if n + 1 < len(nodes) else last}GiB", count=gpus),),
            labels={"name": f"n{n}"},
        )
        for n, gpus in enumerate(nodes)
    ]
    return scene(Document(nodes=tuple(entries), pods=tuple(pods)))


def a_pod(name: str, units: int, arrival: float, *, life: float | None = None, gpus: int = 1, **more: Any) -> PodEntry:
    departure = None if life is None else arrival + life
    return PodEntry(name=name, gpu_mem=units, gpu_count=gpus, arrival=arrival, departure=departure, **more)


def played(found: Scene, *, relocate: bool = True, until: float = 1000) -> Played:
    # spread puts each pod on a GPU of its own, as long as there is one
    scheduler = found.scheduler("spread")
    mover = Mover(scheduler) if relocate else None
    return Timeline(scheduler, found.mix, mover=mover).play(found.jobs, until=until)


def waited(found: Played) -> dict[str, float]:
    return {job.uid.removeprefix("default/"): float(s) for job, s in zip(found.jobs, found.waited, strict=True)}


class TestMoves:
    def test_a_pod_is_moved_so_that_another_fits(self) -> None:
        pods = [a_pod("a", 4, 0), a_pod("b", 3, 1), a_pod("large", 10, 2)]

        assert 998 == waited(played(a_scene(pods), relocate=False))["large"]
        found = played(a_scene(pods))
        assert ({"a": 0, "b": 0, "large": 0}, 1) == (waited(found), found.moves)

    def test_one_of_several_gpus_is_cleared(self) -> None:
        # the first is on the node of one GPU while a comes, which then has one of the two GPUs of the other
        first = a_pod("first", 20, 0, life=10, models=("G1",))
        found = played(a_scene([first, a_pod("a", 4, 1), a_pod("both", 20, 20, gpus=2)], nodes=(2, 1), last=20))

        assert ({"first": 0, "a": 0, "both": 0}, 1) == (waited(found), found.moves)

    def test_a_pod_is_moved_only_where_it_may_go(self) -> None:
        first = a_pod("first", 20, 0, life=10, models=("G1",))
        tied = a_pod("a", 4, 1, node_selector={"name": "n0"})
        found = played(a_scene([first, tied, a_pod("both", 20, 20, gpus=2)], nodes=(2, 1), last=20))

        assert (980, 0) == (waited(found)["both"], found.moves)

    def test_a_pod_that_was_moved_ends_when_it_would_have(self) -> None:
        pods = [a_pod("a", 4, 0, life=100), a_pod("b", 3, 1, life=200), a_pod("large", 10, 2, life=300)]
        last = a_pod("last", 10, 3)
        # a and b lie together from 2 on, and make room at 201
        found = played(a_scene([*pods, last]))

        assert 198 == waited(found)["last"]

    def test_where_no_move_helps_everything_stays_as_it_is(self) -> None:
        found = a_scene([a_pod("a", 6, 0), a_pod("b", 6, 1)])
        scheduler = found.scheduler("spread")
        Timeline(scheduler, found.mix).play(found.jobs, until=2)
        before = {hold.uid: hold.grant for hold in found.ledger.holds()}
        (large,) = a_scene([a_pod("large", 10, 2)]).jobs

        assert Mover(scheduler).make_room(large.request, [Running(job.uid, job.request) for job in found.jobs]) is None
        assert before == {hold.uid: hold.grant for hold in found.ledger.holds()}

    @settings(max_examples=30, deadline=None)
    @given(
        st.lists(
            st.tuples(st.integers(1, 10), st.integers(0, 400), st.integers(1, 300), st.integers(0, 4)), max_size=25
        ),
        st.lists(st.integers(1, 3), min_size=1, max_size=3),
    )
    def test_nothing_is_overbooked(self, drawn: list[tuple[int, int, int, int]], nodes: list[int]) -> None:
        pods = [a_pod(f"p{n}", units, at, life=life, cpu=cpu) for n, (units, at, life, cpu) in enumerate(drawn)]
        found = a_scene(pods, nodes=nodes)
        # 400 to come and 300 to live, for all of 25 one after the other
        seen = played(found, until=400 + 25 * 300)

        # all have ended
        assert all(s < np.inf for s in seen.started)
        assert [] == found.ledger.holds()
        assert {f"n{n}": [10 * GIB] * gpus for n, gpus in enumerate(nodes)} == {
            view.name: [state.free_bytes for state in view.gpus] for view in found.ledger.views()
        }


class TestDrift:
    NODES = tuple(TraceNode(f"n{n:02}", 64_000, 262_144, 8, "G2") for n in range(8))

    def test_more_and_more_of_those_that_come_are_others_and_the_load_stays(self) -> None:
        first, other = TracePod("first", 1000, 10, 1, 500), TracePod("other", 1000, 10, 2, 1000)
        halves: list[Counter[str]] = [Counter(), Counter()]
        held = Counter[int]()
        for seed in range(40):
            jobs = draw(self.NODES, [first], [3600.0], load=0.8, hours=20, seed=seed, drift=[other])
            for job in jobs:
                if job.arrival:
                    halves[int(job.arrival >= 36_000)][job.kind] += 1
                for moment in (18_000, 54_000, 71_000):
                    if job.arrival <= moment < job.arrival + job.life:
                        held[moment] += job.request.containers[0].units

        # a quarter of those that would have come in the first half, and three quarters in the second, are others; each
        # is four times as large, and so comes for four
        others = [2 / 4 * 1 / 2, 2 / 4 * 3 / 2]
        assert others == pytest.approx([4 * half["2"] / (4 * half["2"] + half["share"]) for half in halves], abs=0.03)
        # 80 percent of 64 GPUs
        assert [51_200] * 3 == [pytest.approx(total / 40, rel=0.08) for total in held.values()]
