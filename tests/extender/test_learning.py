"""The extender learns from the pods it binds what pods to expect, and goes by that from the twentieth on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from cotenant.contract.request import PodRequest, parse
from cotenant.contract.units import GIB
from extender.learning import Learner
from extender.ledger import Ledger
from extender.mix import Mix, PodClass
from extender.policies import POLICIES
from extender.ranking import Rankings
from extender.verbs.judge import Judge
from tests.builders import NAMES, PodBuilder, a_grant, a_node, a_pod, granted

if TYPE_CHECKING:
    from collections.abc import Iterator


def request_of(pod: PodBuilder) -> PodRequest:
    request = parse(pod.build(), NAMES, GIB)
    assert request is not None
    return request


class Learning:
    """A learner on a cluster of one node with GPUs of 10 and 20 GiB."""

    def __init__(self, window: int = 1000) -> None:
        self.ledger = Ledger(NAMES, GIB)
        self.ledger.observe_node(a_node().with_gpu("10GiB").with_gpu("20GiB").build())
        self.rankings = Rankings(self.ledger)
        self.learner = Learner(self.ledger, self.rankings, window=window)
        self._mix = Mix()

    def note(self, count: int, pod: PodBuilder, *, first: int = 0) -> None:
        for n in range(first, first + count):
            self.learner.note(f"uid-{pod}-{n}", request_of(pod))

    @property
    def mix(self) -> dict[tuple[int, int, int, tuple[str, ...]], int]:
        if self.learner.due:
            self._mix = Mix.of(self.learner.pods())
        mix = self._mix
        return {
            (c.cpu_milli, c.gpus, c.share_milli, c.models): count
            for c, count in zip(mix.classes, mix.counts, strict=True)
        }


def test_pods_that_are_alike_are_counted_together() -> None:
    learning = Learning()
    learning.note(3, a_pod().asking(5))
    learning.note(1, a_pod().asking(20).wishing(gpu_count=2, gpu_model="H100"))

    # 5 of 20 GiB are 250 milli, 20 on two GPUs are 500 of each
    assert {(0, 1, 250, ()): 3, (0, 2, 500, ("H100",)): 1} == learning.mix


def test_a_pod_that_is_bound_again_counts_once() -> None:
    learning = Learning()
    learning.note(3, a_pod().asking(5))
    learning.note(3, a_pod().asking(5))

    assert {(0, 1, 250, ()): 3} == learning.mix


def test_the_oldest_pods_are_forgotten() -> None:
    learning = Learning(window=10)
    learning.note(10, a_pod().asking(5))
    learning.note(7, a_pod().asking(10))

    assert {(0, 1, 500, ()): 7, (0, 1, 250, ()): 3} == learning.mix


def test_after_a_restart_those_that_hold_something_stand_for_those_before() -> None:
    learning = Learning()
    pod = a_pod().with_container({NAMES.gpu_mem: 10}, {NAMES.gpu_mem: 10, "cpu": 2})
    learning.ledger.observe_pod(pod.bound_to("n", a_grant(granted({"GPU-n-1": 10 * GIB}))).build())

    assert {(2000, 1, 500, ()): 1} == learning.mix


def test_the_mix_is_taken_anew_by_and_by() -> None:
    learning = Learning()
    learning.note(100, a_pod().asking(5))
    assert {(0, 1, 250, ()): 100} == learning.mix

    learning.note(25, a_pod().asking(10))
    assert {(0, 1, 250, ()): 100} == learning.mix  # a quarter and one more are needed

    learning.note(10, a_pod().asking(10), first=25)
    assert {(0, 1, 250, ()): 100, (0, 1, 500, ()): 35} == learning.mix


class Cluster:
    """Nodes with two GPUs of 10 GiB, some in use, and rankings of them by a mix of pods of 5 GiB."""

    OLD = Mix((PodClass(0, 1, 500),), (100,))
    NEW = Mix((PodClass(0, 1, 300), PodClass(0, 1, 700), PodClass(0, 2, 1000)), (60, 30, 10))

    def __init__(self, nodes: int = 1200) -> None:
        self.ledger = Ledger(NAMES, GIB)
        for n in range(nodes):
            self.ledger.observe_node(a_node(f"n{n}").with_gpus(2, "10GiB").build())
        for n in range(0, nodes, 7):
            self.hold(n, 1 + n % 9)
        self.rankings = Rankings(self.ledger, self.OLD)

    def hold(self, n: int, gib: int) -> None:
        pod = a_pod().named(f"on-{n}-{gib}").asking(gib)
        self.ledger.observe_pod(pod.bound_to(f"n{n}", a_grant(granted({f"GPU-n{n}-0": gib * GIB}))).build())

    def costs(self, policy: str, rankings: Rankings | None = None) -> list[float]:
        asked = rankings or self.rankings
        costs = asked.of(request_of(a_pod().asking(3)), policy).costs()
        return [float(costs[asked.table.rows[view.name]]) for view in self.ledger.views()]

    def anew(self, mix: Mix, policy: str) -> list[float]:
        """Rank as if nothing had ever been ranked before."""
        return self.costs(policy, Rankings(self.ledger, mix))

    def adopting(self) -> Iterator[None]:
        return self.rankings.adopt(self.NEW, ["priced-leftovers"])


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_new_mix_is_gone_over_to_in_steps_that_nobody_sees(policy: str) -> None:
    cluster = Cluster()
    before = cluster.costs(policy)

    for step, _ in enumerate(cluster.adopting()):
        if step == 1:
            assert before == cluster.costs(policy)
            cluster.hold(0, 2)  # on a row that the new policy has seen, and on one that it has not
            cluster.hold(1199, 2)
        assert cluster.rankings.mix == Cluster.OLD

    assert cluster.rankings.mix == Cluster.NEW
    np.testing.assert_allclose(cluster.costs(policy), cluster.anew(Cluster.NEW, policy))


def test_nodes_that_come_between_the_steps_count_as_well() -> None:
    cluster = Cluster()
    cluster.costs("priced-leftovers")

    for step, _ in enumerate(cluster.adopting()):
        if step == 1:
            cluster.ledger.observe_node(a_node("late").with_gpus(4, "40GiB").build())
            cluster.costs("priced-leftovers")

    np.testing.assert_allclose(cluster.costs("priced-leftovers"), cluster.anew(Cluster.NEW, "priced-leftovers"))


def test_what_goes_by_no_mix_is_not_ranked_again() -> None:
    cluster = Cluster(nodes=10)
    request = request_of(a_pod().asking(3))
    ranking = cluster.rankings.of(request, "binpack")

    for _ in cluster.adopting():
        pass

    assert ranking is cluster.rankings.of(request, "binpack")


def test_a_judge_learns_what_was_bound_and_says_when_there_is_something_to_learn() -> None:
    cluster = Cluster(nodes=40)
    judge = Judge(cluster.ledger, NAMES, GIB, "priced-leftovers")
    judge.learn()
    assert not judge.news.is_set()

    for n in range(60):
        judge.bound(f"uid-{n}", request_of(a_pod().asking(4 + n % 3)))
    assert judge.news.is_set()
    judge.learn()

    # the six pods of 1 to 9 GiB that there were, and those of 4, 5 and 6 of 10 GiB
    assert {400, 500, 600} <= {c.share_milli for c in judge._rankings.mix.classes}
    assert 66 == sum(judge._rankings.mix.counts)
    assert not judge.news.is_set()
