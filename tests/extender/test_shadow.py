"""A shadow places the same pods as another policy would have, and nothing notices it but its metrics."""

from collections.abc import Callable
from functools import partial
from random import Random

import pytest

from cotenant.contract.grant import Grant
from cotenant.contract.request import PodRequest, parse
from cotenant.contract.units import GIB
from cotenant.standins.api_server import ApiServer
from cotenant.threads import Threads
from extender.ledger import Hold, Ledger, NodeView
from extender.placement.fit import Placement, grant, place
from extender.placement.ranking import Rankings
from extender.policies.mix import Mix, PodClass
from extender.policies.table import Table
from extender.shadow.live import Shadowing
from extender.shadow.placements import Agreement, Free, Shadow, free_of
from tests.builders import NAMES, PodBuilder, a_node, a_pod
from tests.extender.running import Running, eventually, submit

MIX = Mix.of([PodClass(0, 1, 500)] * 10 + [PodClass(0, 1, 1000)] * 10)


class Both:
    """A ledger that policy A places on, and a shadow of policy B beside it."""

    def __init__(self, live: str, shadow: str, *, nodes: int = 2, gpus: int = 1) -> None:
        self.ledger = Ledger(NAMES, GIB)
        for n in range(nodes):
            self.ledger.observe_node(a_node(f"n{n}").with_gpus(gpus, "10GiB").build())
        self.live = live
        self.rankings = Rankings(self.ledger, MIX)
        self.shadow = Shadow(NAMES, GIB, shadow)
        self.requests: dict[str, PodRequest] = {}

    def place(self, pod: PodBuilder) -> str | None:
        built = pod.build()
        request = parse(built, NAMES, GIB)
        assert request is not None
        ranking = self.rankings.of(request, self.live)
        costs = ranking.costs()
        rows = self.rankings.table.rows
        row = rows[min(rows, key=lambda name: (costs[rows[name]], name))]
        if costs[row] == float("inf"):
            return None
        prefer = ranking.preference(self.rankings.table.names[row])

        def choose(view: NodeView) -> Grant:
            placed = place(view, request, prefer)
            assert isinstance(placed, Placement)
            return grant(request, placed)

        held = self.ledger.assume(built.uid, built.key, self.rankings.table.names[row], choose, request.compute)
        assert isinstance(held, Hold)
        self.ledger.confirm(built.uid)
        self.requests[built.uid] = request
        return built.uid

    def follow(self) -> None:
        self.shadow.follow(self.ledger.views(), self.ledger.holds(), self.ledger.takes, self.requests, MIX)

    def free_live(self) -> Free:
        return free_of(Table(self.ledger), MIX)


def named(n: int, gib: int) -> PodBuilder:
    return a_pod().named(f"p{n}").asking(gib)


def test_what_is_there_when_it_begins_is_taken_as_it_is() -> None:
    both = Both("spread", "binpack")
    for n in range(2):
        both.place(named(n, 5))
    both.follow()

    assert both.free_live() == both.shadow.free()
    assert {} == both.shadow.agreements


def test_pods_that_come_later_are_placed_by_the_other_policy() -> None:
    both = Both("spread", "binpack")
    both.follow()
    for n in range(2):
        both.place(named(n, 5))
    both.follow()

    # spread has half of both, binpack both on one
    assert (5 * GIB, 10 * GIB) == (free_of(Table(both.ledger), MIX).largest_bytes, both.shadow.free().largest_bytes)
    assert 0 == both.shadow.free().fragmented_bytes < free_of(Table(both.ledger), MIX).fragmented_bytes
    assert 2 == both.shadow.agreements.total()


def test_pods_that_end_and_nodes_that_go_are_gone_from_it_too() -> None:
    both = Both("spread", "binpack")
    both.follow()
    uids = [both.place(named(n, 5)) for n in range(2)]
    both.follow()
    for uid in uids:
        assert uid is not None
        both.ledger.pod_gone(uid)
    both.ledger.node_gone("n1")
    both.follow()

    assert both.free_live() == both.shadow.free()
    assert 10 * GIB == both.shadow.free().free_bytes


def test_what_it_has_no_room_for_is_counted_until_it_ends() -> None:
    both = Both("binpack", "spread")
    both.follow()
    both.place(named(0, 4))
    both.place(named(1, 4))
    both.follow()
    # binpack has them on one GPU, spread on both
    uid = both.place(named(2, 10))
    both.follow()

    assert 1 == both.shadow.refused
    assert 1 == both.shadow.agreements[Agreement.REFUSED]
    assert uid is not None
    both.ledger.pod_gone(uid)
    both.follow()
    assert 0 == both.shadow.refused


def test_without_a_note_the_grant_tells_what_was_asked() -> None:
    both = Both("spread", "spread", gpus=2)
    both.follow()
    both.place(a_pod().named("two").asking(10).wishing(gpu_count=2))
    both.place(a_pod().named("alone").asking(3).wishing(isolation="exclusive"))
    both.requests.clear()
    both.follow()

    assert both.free_live() == both.shadow.free()


def _chosen(granted: Grant, _view: NodeView) -> Grant:
    return granted


def test_instances_of_mig_gpus_are_left_out_of_it() -> None:
    both = Both("spread", "spread", nodes=0)
    both.ledger.observe_node(a_node("n0").with_gpu("10GiB").with_mig().build())
    both.follow()
    free = both.shadow.free()
    for n, known in enumerate((True, False)):
        built = a_pod().named(f"slice-{n}").asking("1", of=NAMES.mig("1g.5gb")).build()
        request = parse(built, NAMES, GIB)
        view = both.ledger.view("n0")
        assert request is not None
        assert view is not None
        placed = place(view, request)
        assert isinstance(placed, Placement)
        granted = grant(request, placed)
        assert isinstance(both.ledger.assume(built.uid, built.key, "n0", partial(_chosen, granted)), Hold)
        if known:
            both.requests[built.uid] = request
        both.follow()

    assert (free, 0, {}) == (both.shadow.free(), both.shadow.refused, dict(both.shadow.agreements))


@pytest.mark.parametrize("policy", ["priced-leftovers", "fgd", "binpack/spread"])
def test_a_shadow_of_the_same_policy_agrees_in_everything(policy: str) -> None:
    random = Random(5)
    both = Both(policy, policy, nodes=5, gpus=3)
    both.follow()
    there: list[str] = []
    for n in range(150):
        if there and random.random() < 0.4:
            both.ledger.pod_gone(there.pop(random.randrange(len(there))))
        elif (uid := both.place(named(n, random.randint(1, 10)))) is not None:
            there.append(uid)
        both.follow()

    assert both.free_live() == both.shadow.free()
    assert {Agreement.SAME_GPUS} == both.shadow.agreements.keys()


class TestProgram:
    def test_metrics_tell_how_both_differ(self, api: ApiServer, start: Callable[..., Running]) -> None:
        extender = start(policy="spread", shadow="binpack")
        assert eventually(lambda: extender.metric('cotenant_shadow_free_bytes{policy="binpack",side="shadow"}'))
        for n in range(2):
            pod = submit(api, named(n, 5))
            assert "" == extender.bind(pod, f"n{n + 1}")
        shadowing = extender.extender._shadowing
        assert shadowing is not None
        shadowing.follow()

        # n1 and n2 have two GPUs of 10 GiB each
        assert 3 == extender.metric('cotenant_shadow_empty_gpus{policy="binpack",side="shadow"}')
        assert 2 == extender.metric('cotenant_shadow_empty_gpus{policy="spread",side="live"}')
        assert 'cotenant_thread_failures_total{thread="shadow"} 0.0' in extender.get("/metrics").body.decode()
        assert "Of 2 pods placed since the extender was started, binpack had" in extender.get("/").body.decode()

    def test_without_one_there_is_nothing_of_it(self, extender: Running) -> None:
        assert "cotenant_shadow" not in extender.get("/metrics").body.decode()

    def test_rounds_that_fail_are_counted_and_it_goes_on(self) -> None:
        both = Both("spread", "binpack")
        threads = Threads(pauses=(0.001, 0.001))
        shadowing = Shadowing(
            both.ledger, NAMES, GIB, live="spread", shadow="binpack", mix=lambda: MIX, interval=0.001, threads=threads
        )
        shadowing.start()
        try:
            assert eventually(lambda: 0 < value(shadowing, "cotenant_shadow_free_bytes"))
            # a note that is none
            shadowing.note("uid-of-p0", "no request")  # type: ignore[arg-type]
            both.place(named(0, 5))
            assert eventually(lambda: 0 < threads.failures()["shadow"])
            shadowing.note("uid-of-p0", both.requests["uid-of-p0"])
            both.place(named(1, 5))
            assert eventually(lambda: 2 == value(shadowing, "cotenant_shadow_placements"))
        finally:
            shadowing.stop()


def value(shadowing: Shadowing, name: str) -> float:
    """Add up the samples of a metric."""
    return sum(sample.value for metric in shadowing.collect() if metric.name == name for sample in metric.samples)
