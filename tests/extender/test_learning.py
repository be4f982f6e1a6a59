"""The extender learns from the pods it binds what pods to expect, and goes by that from the twentieth on."""

from __future__ import annotations

from cotenant.contract.request import PodRequest, parse
from cotenant.contract.units import GIB
from extender.learning import Learner
from extender.ledger import Ledger
from extender.ranking import Rankings
from tests.builders import NAMES, PodBuilder, a_grant, a_node, a_pod, granted


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

    def note(self, count: int, pod: PodBuilder, *, first: int = 0) -> None:
        for n in range(first, first + count):
            self.learner.note(f"uid-{pod}-{n}", request_of(pod))

    @property
    def mix(self) -> dict[tuple[int, int, int, tuple[str, ...]], int]:
        self.learner.teach()
        mix = self.rankings.mix
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
