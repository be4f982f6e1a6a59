"""The extender learns from the pods it binds what pods to expect, and goes by that from the twentieth on."""

from collections.abc import Iterator

import numpy as np
import pytest

from cotenant.contract.configuration import ConfigurationError, ExtenderConfiguration, convert
from cotenant.contract.units import GIB
from extender.ledger import Ledger
from extender.placement.learning import Learner
from extender.placement.ranking import Rankings
from extender.policies import POLICIES
from extender.policies.mix import Mix, PodClass
from extender.verbs.judge import Judge
from tests.builders import NAMES, PodBuilder, a_grant, a_node, a_pod, granted, request_of


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


def test_pods_that_wait_count_like_those_that_got_something_and_once() -> None:
    learning = Learning()
    learning.note(3, a_pod().asking(5))
    large = a_pod().named("large").asking(40).wishing(gpu_count=2)
    learning.ledger.observe_pod(large.build())
    learning.ledger.observe_pod(a_pod().named("odd").asking(-1).build())
    learning.ledger.observe_pod(a_pod().named("slice").asking("1", of=NAMES.mig("1g.5gb")).build())
    expected = {(0, 1, 250, ()): 3, (0, 2, 1000, ()): 1}

    assert expected == learning.mix
    learning.learner.note(large.build().uid, request_of(large))
    learning.note(2, a_pod().asking(5), first=3)
    assert {(0, 1, 250, ()): 5, (0, 2, 1000, ()): 1} == learning.mix


def test_a_pod_that_waits_for_more_cpu_than_any_node_has_tells_nothing_of_those_to_come() -> None:
    learning = Learning()
    learning.note(3, a_pod().asking(5))
    for n, cpu in enumerate(("65", "1M", "10P")):
        pod = a_pod().named(f"huge-{n}").with_container({NAMES.gpu_mem: 10}, {NAMES.gpu_mem: 10, "cpu": cpu})
        learning.ledger.observe_pod(pod.build())
    # the builder's nodes offer 64 cores
    pod = a_pod().named("large").with_container({NAMES.gpu_mem: 10}, {NAMES.gpu_mem: 10, "cpu": "64"})
    learning.ledger.observe_pod(pod.build())

    assert {(0, 1, 250, ()): 3, (64_000, 1, 500, ()): 1} == learning.mix


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


class TestPinned:
    """A mix that the configuration names is gone by from the start, and nothing is learned."""

    MIX = convert(
        "mix: [{weight: 3, memory: 5GiB, cpu: 500m}, {weight: 1, gpus: 2, alone: true, models: [H100]}]",
        ExtenderConfiguration,
    ).mix

    def judge(self, *gpus: str) -> tuple[Ledger, Judge]:
        ledger = Ledger(NAMES, GIB)
        node = a_node()
        for gpu in gpus:
            node = node.with_gpu(gpu)
        ledger.observe_node(node.build())
        judge = Judge(ledger, NAMES, GIB, "priced-leftovers", mix=self.MIX)
        judge.learn()
        return ledger, judge

    def test_kinds_come_as_often_as_they_weigh(self) -> None:
        _, judge = self.judge("20GiB")

        # 5 of 20 GiB are 250 milli; one alone takes all
        small = PodClass(cpu_milli=500, gpus=1, share_milli=250)
        alone = PodClass(cpu_milli=0, gpus=2, share_milli=1000, models=("H100",), alone=True)
        # 3 and 1 are 4, and five times that are the 20 from which a mix counts
        assert Mix(classes=(small, alone), counts=(15, 5)) == judge.mix

    def test_what_is_bound_changes_nothing(self) -> None:
        _, judge = self.judge("20GiB")
        before = judge.mix

        for n in range(300):
            judge.bound(f"uid-{n}", request_of(a_pod().asking(20)))
        judge.learn()

        assert before == judge.mix

    def test_a_larger_gpu_changes_what_a_thousandth_is(self) -> None:
        ledger, judge = self.judge("20GiB")
        ledger.observe_node(a_node("larger").with_gpu("40GiB").build())
        judge.judge(request_of(a_pod().asking(1)), ["larger"])

        judge.bound("uid", request_of(a_pod().asking(1)))
        assert judge.news.is_set()
        judge.learn()

        # 5 of 40 GiB
        assert 125 == judge.mix.classes[0].share_milli

    @pytest.mark.parametrize(
        ("kind", "sentence"),
        [
            ("{memory: 5GiB}", "mix[0].weight: missing, but required"),
            ("{weight: 1}", "mix[0]: memory: a pod with GPUs asks some memory of each, or wants them alone"),
            ("{weight: 1, memory: -5GiB}", "mix[0]: memory: '-5GiB' is negative"),
            ("{weight: 1, gpus: 0, cpu: much}", "mix[0]: cpu: 'much' is not a quantity such as 8, 2k or 80Gi"),
        ],
    )
    def test_a_kind_that_cannot_be_is_refused_by_its_path(self, kind: str, sentence: str) -> None:
        with pytest.raises(ConfigurationError) as refused:
            convert(f"mix: [{kind}]", ExtenderConfiguration)
        assert sentence == str(refused.value)
