"""filter for the next pod waits for the bind of the pod before it where there may not be room for both."""

import threading
from functools import partial

import pytest

from cotenant.contract.reasons import Reason
from cotenant.contract.request import PodRequest, parse
from cotenant.contract.units import GIB
from extender.ledger import Ledger, NodeView
from extender.verbs.bind import Bind
from extender.verbs.expected import Expected
from extender.verbs.filter import Filter
from extender.verbs.judge import Judge
from extender.verbs.wire import BindArgs, Candidates, ExtenderArgs
from tests.builders import NAMES, PodBuilder, a_node, a_pod

# far longer than anything takes: a wait that reaches it is a failure
PATIENCE = 30.0


def request(pod: PodBuilder) -> PodRequest:
    found = parse(pod.build(), NAMES, GIB)
    assert found is not None
    return found


def node_of(gpus: int) -> NodeView:
    """Show a node of so many GPUs of 10 GiB."""
    ledger = Ledger(NAMES, GIB)
    ledger.observe_node(a_node("n1").with_gpus(gpus, "10GiB").build())
    found = ledger.view("n1")
    assert found is not None
    return found


class Asking(threading.Thread):
    """Have filter of a pod wait, or not, in a thread of its own."""

    def __init__(self, expected: Expected, uid: str, node: NodeView, pod: PodBuilder) -> None:
        super().__init__()
        self._wait = partial(expected.wait, uid, request(pod), [node])
        self.has_waited: bool | None = None
        self.start()

    def run(self) -> None:
        self.has_waited = self._wait()

    def goes_on(self, within: float = PATIENCE / 2) -> bool:
        self.join(within)
        return not self.is_alive()


def test_filter_waits_for_the_binds_of_the_pods_before_it() -> None:
    expected = Expected(patience=PATIENCE)
    for uid in ("first", "second"):
        expected.expect(uid, request(a_pod().asking(4)))
    third = Asking(expected, "third", node_of(1), a_pod().asking(4))  # 3 x 4 on a GPU of 10

    expected.came("first")
    assert not third.goes_on(within=0.05)

    expected.came("second")
    assert third.goes_on()
    assert third.has_waited


@pytest.mark.parametrize(
    ("gpus", "before", "asking", "waits"),
    [
        (1, a_pod().asking(5), a_pod().asking(5), False),  # 2 x 5 on a GPU of 10
        (1, a_pod().asking(6), a_pod().asking(4), True),  # 2 x the larger are 12, so it is not certain
        (2, a_pod().asking(6), a_pod().asking(6), False),  # one on each
        (2, a_pod().asking(8).wishing(gpu_count=2), a_pod().asking(1), True),  # more than one GPU each
        (9, a_pod().asking(1).wishing(isolation="exclusive"), a_pod().asking(1), True),  # more than it asks
        (9, a_pod().asking(1).wishing(gpu_model="H100"), a_pod().asking(1), True),  # not any GPU
    ],
)
def test_where_there_is_certainly_room_for_both_it_does_not_wait(
    *, gpus: int, before: PodBuilder, asking: PodBuilder, waits: bool
) -> None:
    expected = Expected(patience=0.0)
    expected.expect("first", request(before))

    assert waits == expected.wait("second", request(asking), [node_of(gpus)])


def test_a_bind_that_came_already_is_not_waited_for() -> None:
    expected = Expected(patience=PATIENCE)
    expected.expect("first", request(a_pod().asking(8)))
    expected.came("first")

    assert Asking(expected, "second", node_of(1), a_pod().asking(8)).goes_on()


def test_a_pod_that_is_tried_again_does_not_wait_for_itself() -> None:
    expected = Expected(patience=PATIENCE)
    expected.expect("only", request(a_pod().asking(8)))

    assert Asking(expected, "only", node_of(1), a_pod().asking(8)).goes_on()


def test_a_bind_that_never_comes_holds_up_one_filter_and_no_more() -> None:
    expected = Expected(patience=0.01)
    expected.expect("never bound", request(a_pod().asking(8)))

    assert expected.wait("second", request(a_pod().asking(8)), [node_of(1)])
    assert not expected.wait("third", request(a_pod().asking(8)), [node_of(1)])


def test_a_pod_is_not_let_through_to_what_the_bind_on_its_way_takes() -> None:
    class NoCluster:
        def deadline(self) -> float:
            return 0.0

        def bind(self, *_: object, deadline: float, again: bool = False) -> None:
            """Write nothing: what was reserved is what counts."""

    ledger, expected = Ledger(NAMES, GIB), Expected(patience=PATIENCE)
    ledger.observe_node(a_node("n1").with_gpus(1, "10GiB").build())
    judge = Judge(ledger, NAMES, GIB, "best-fit")
    filtering = Filter(ledger, judge, synced=lambda: True, expected=expected)
    binding = Bind(ledger, judge, NoCluster(), NAMES, synced=lambda: True, expected=expected)  # type: ignore[arg-type]
    first, second = (a_pod().named(name).asking(8).build() for name in ("first", "second"))
    ledger.observe_pods([first, second])
    assert {} == filtering(ExtenderArgs(first, Candidates(["n1"]))).FailedAndUnresolvableNodes

    refused: list[dict[str, str]] = []
    next_one = threading.Thread(
        target=lambda: refused.append(filtering(ExtenderArgs(second, Candidates(["n1"]))).FailedAndUnresolvableNodes)
    )
    next_one.start()
    next_one.join(0.05)
    assert [] == refused
    assert not judge.news.is_set()
    assert binding(BindArgs(PodName="first", PodNamespace="default", PodUID=first.uid, Node="n1")) is None
    next_one.join(PATIENCE / 2)

    assert [{"n1": Reason.NO_GPU_FITS.sentence}] == refused
    # what pods this cluster gets is learned from binds
    assert judge.news.is_set()
