"""Policies by pod, by scheduler profile and by node pool: which counts where, and how their nodes are compared."""

from dataclasses import dataclass, field
from typing import Any, Self

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotenant.contract.configuration import ConfigurationError, ExtenderConfiguration, convert
from cotenant.contract.reasons import Reason
from cotenant.contract.request import PodRequest, RequestError, parse
from cotenant.contract.units import GIB
from cotenant.simulator.document import Asking, Document, GPUEntry, NodeEntry, PodEntry, kube_node, kube_pod
from extender.ledger import Hold, Ledger
from extender.main import check_policies
from extender.placement.choices import Choices, Pool
from extender.placement.fit import Placement, choosing, place
from extender.placement.pooled_ranking import exchanged
from extender.policies import PolicyError
from extender.verbs.judge import Judge
from tests.builders import a_pod

NAMES = Document().names
POOL = (Pool((("pool", "calm"),), "spread"),)
CHOICES = Choices("binpack", {"interactive": "spread"}, POOL)


@dataclass
class Ground:
    """Nodes of one GPU of 10 GiB, or more of them, some in use."""

    choices: Choices = CHOICES
    ledger: Ledger = field(init=False)
    judge: Judge = field(init=False)

    def __post_init__(self) -> None:
        self.ledger = Ledger(NAMES, GIB, labels=self.choices.labels)
        self.judge = Judge(self.ledger, NAMES, GIB, self.choices)

    def node(self, name: str, *held: int, **labels: str) -> Self:
        """Have a node whose GPUs have so much in use each."""
        entry = NodeEntry(
            name=name, cpu=64, memory="64Gi", gpus=(GPUEntry(model="G", memory="10GiB", count=len(held)),)
        )
        self.ledger.observe_node(kube_node(msgspec.structs.replace(entry, labels=labels), Document()))
        for index, units in enumerate(held):
            if units:
                self.hold(name, index, units)
        return self

    def hold(self, node: str, index: int, units: int) -> None:
        choose = choosing(asking(units), lambda state, _: abs(state.gpu.index - index))
        assert isinstance(self.ledger.assume(f"{node}-{index}", f"x/{node}-{index}", node, choose), Hold)

    def costs(self, request: PodRequest, *nodes: str) -> list[float | Reason]:
        return self.judge.judge(request, nodes)

    def best(self, request: PodRequest, *nodes: str) -> str:
        """Name the one node that costs the least."""
        costs = dict(zip(nodes, self.costs(request, *nodes), strict=True))
        numbers = {name: cost for name, cost in costs.items() if not isinstance(cost, Reason)}
        (found,) = [name for name, cost in numbers.items() if cost == min(numbers.values())]
        return found

    def gpu(self, request: PodRequest, node: str) -> int:
        """Say the index of the GPU that bind would take."""
        view = self.ledger.view(node)
        assert view is not None
        placed = place(view, request, self.judge.preference(request, node))
        assert isinstance(placed, Placement)
        return placed.gpus[0][0].gpu.index


def asking(units: int, **more: Any) -> PodRequest:
    pod = PodEntry(name="p", containers=(Asking(name="main", gpu_mem=units),), **more)
    found = parse(kube_pod(pod, Document()), NAMES, GIB)
    assert found is not None
    return found


class TestWhoseCounts:
    """The pod's wish, else its node pool's, else its profile's, else the default."""

    def test_a_profiles_policy_is_for_its_pods_alone(self) -> None:
        ground = Ground().node("used", 4).node("empty", 0)

        assert "used" == ground.best(asking(5), "used", "empty")
        assert "used" == ground.best(asking(5, scheduler="another"), "used", "empty")
        assert "empty" == ground.best(asking(5, scheduler="interactive"), "used", "empty")

    def test_a_pools_policy_chooses_among_its_nodes_and_their_gpus(self) -> None:
        ground = Ground().node("calm-used", 4, 2, pool="calm").node("calm-empty", 0, 0, pool="calm").node("other", 4, 2)

        assert "calm-empty" == ground.best(asking(5), "calm-used", "calm-empty")
        # the emptiest and the fullest that fits
        assert [1, 0] == [ground.gpu(asking(5), name) for name in ("calm-used", "other")]

    def test_a_pods_wish_holds_wherever_it_goes(self) -> None:
        ground = Ground().node("calm-used", 4, 2, pool="calm").node("calm-empty", 0, 0, pool="calm")
        wish = asking(5, scheduler="interactive", policy="binpack")

        assert "calm-used" == ground.best(wish, "calm-used", "calm-empty")
        assert 0 == ground.gpu(wish, "calm-used")

    @pytest.mark.parametrize("wish", ["fastest", "fgd/fastest", "fgd/"])
    def test_a_wish_for_no_policy_is_refused(self, wish: str) -> None:
        with pytest.raises(RequestError, match=f"'{wish.removeprefix('fgd/')}' is none of"):
            Ground().node("n", 0).costs(asking(5, policy=wish), "n")

    def test_the_first_pool_that_has_a_node_counts_and_all_of_its_labels_must_match(self) -> None:
        pools = (Pool((("kind", "a"), ("pool", "x")), "spread"), Pool((("pool", "x"),), "binpack"))
        choices = Choices("best-fit", {}, pools)

        assert ["spread", "binpack", "best-fit"] == [
            choices.on(asking(1), labels) for labels in ({"pool": "x", "kind": "a"}, {"pool": "x"}, {"kind": "a"})
        ]

    def test_a_node_that_gets_another_label_changes_its_pool(self) -> None:
        ground = Ground().node("a", 4).node("b", 0)
        assert "a" == ground.best(asking(5), "a", "b")

        ground.node("a", 0, pool="calm").node("b", 0, pool="calm")

        assert "b" == ground.best(asking(5), "a", "b")

    def test_mig_instances_are_kept_apart_where_the_pool_says_so(self) -> None:
        ground = Ground().node("calm", 0, pool="calm").node("other", 0)

        instance = parse(a_pod().asking("1", of=NAMES.mig("1g.5gb")).build(), NAMES, GIB)
        assert instance is not None

        assert [True, False] == [ground.judge.aim(instance, node).spread for node in ("calm", "other")]


class TestBetweenPools:
    """The policy between pools says what a pool is worth; nobody compares costs of two policies."""

    def test_the_best_node_of_a_pool_costs_what_its_cheapest_would(self) -> None:
        ground = Ground().node("calm-used", 4, pool="calm").node("calm-empty", 0, pool="calm").node("plain", 3)

        # 1 and 5 GiB would be left of the pool's by binpack, of 10 GiB that are 1000 milli; 2 of the plain one
        assert [500, 100, 200] == pytest.approx(ground.costs(asking(5), "calm-used", "calm-empty", "plain"), abs=1e-3)

    def test_a_node_that_is_asked_for_twice_is_one_of_its_pool(self) -> None:
        ground = Ground().node("calm-used", 4, pool="calm").node("calm-empty", 0, pool="calm")

        first, second, third = ground.costs(asking(5), "calm-used", "calm-empty", "calm-used")
        assert first == third
        assert not isinstance(first, Reason)
        assert not isinstance(second, Reason)
        assert second < first

    def test_what_does_not_fit_is_refused_as_ever(self) -> None:
        ground = Ground().node("calm-full", 8, pool="calm").node("calm-empty", 0, pool="calm")

        assert Reason.NO_GPU_FITS is ground.costs(asking(5), "calm-full", "calm-empty")[0]

    @given(st.lists(st.tuples(st.integers(-50, 50) | st.just(np.inf), st.integers(-50, 50)), min_size=1, max_size=30))
    def test_the_pools_policy_says_the_order_and_the_other_the_worth(self, both: list[tuple[float, float]]) -> None:
        costs, own = np.array([float(cost) for cost, _ in both]), np.array([float(one) for _, one in both])
        # what does not fit does so whatever the policy
        own[np.isinf(costs)] = np.inf
        found = exchanged(costs, own)

        assert costs.min() == found.min()
        # as many fit, and the same ones
        assert np.isinf(costs).tolist() == np.isinf(found).tolist()
        fitting = np.isfinite(costs)
        for n in np.flatnonzero(fitting):
            assert (own[fitting] < own[n]).tolist() == (found[fitting] < found[n]).tolist()
            # none is worth more than the pool's dearest
            assert found[n] <= costs[fitting].max() + 1e-6


class TestConfiguration:
    def test_profiles_and_pools_are_read(self) -> None:
        text = "policy: binpack\nprofilePolicies: {interactive: spread}\n"
        text += "nodePools: [{labels: {pool: calm}, policy: spread}]"

        assert CHOICES == Choices.configured(convert(text, ExtenderConfiguration))
        assert ("binpack", "spread") == CHOICES.policies
        assert {"pool"} == CHOICES.labels

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("policy: x", "policy: 'x' is none of"),
            ("profilePolicies: {batch: x}", "profilePolicies.batch: 'x' is none of"),
            ("nodePools: [{labels: {a: b}, policy: spread}, {labels: {a: c}, policy: x}]", "nodePools[1].policy: 'x'"),
            ("shadow: x", "shadow: 'x' is none of"),
            ("policy: fgd/", "policy: '' is none of"),
        ],
    )
    def test_a_policy_that_does_not_exist_stops_the_program(self, text: str, expected: str) -> None:
        with pytest.raises(ConfigurationError) as refusal:
            check_policies(convert(text, ExtenderConfiguration))

        assert expected in str(refusal.value)

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("nodePools: [{labels: {}, policy: spread}]", "nodePools[0].labels: expected object of length >= 1"),
            ("nodePools: [{labels: {a: b}}]", "nodePools[0].policy: missing"),
            ("profilePolicies: {a: 1}", "profilePolicies.a: expected str"),
        ],
    )
    def test_what_is_no_pool_is_refused(self, text: str, expected: str) -> None:
        with pytest.raises(ConfigurationError) as refusal:
            convert(text, ExtenderConfiguration)

        assert expected in str(refusal.value)

    def test_choices_of_no_policy_say_so(self) -> None:
        with pytest.raises(PolicyError):
            Choices("binpack").of(asking(1, policy="x"))
