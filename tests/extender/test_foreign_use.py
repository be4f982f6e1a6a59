"""GPUs that others have as well: fenced ones get nothing, and what others use of the rest is not given away."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotenant.contract.inventory import Foreign
from cotenant.contract.reasons import Reason
from cotenant.contract.units import GIB
from extender.inspect.explain import node_verdict
from extender.ledger import Ledger, NodeView
from extender.placement.fit import Placement, place
from extender.verbs.judge import Judge
from tests.builders import NAMES, NodeBuilder, PodBuilder, a_grant, a_node, a_pod, granted

FENCED = Foreign(fenced=True, detail="held by pod default/train as nvidia.com/gpu")


def used(gib: int) -> Foreign:
    return Foreign(bytes=gib * GIB, detail="used without a grant by processes of no pod")


class Cluster:
    """One node and whoever holds something on it."""

    def __init__(self, node: NodeBuilder) -> None:
        self.ledger = Ledger(NAMES, GIB)
        self.judge = Judge(self.ledger, NAMES, GIB, "best-fit")
        self.show(node)

    def show(self, node: NodeBuilder) -> None:
        self.ledger.observe_node(node.build())

    @property
    def view(self) -> NodeView:
        found = self.ledger.view("n")
        assert found is not None
        return found

    def verdict(self, pod: PodBuilder) -> float | Reason:
        """Ask filter, and find that the fit says the same."""
        request = self.judge.request(pod.build())
        assert request is not None
        (said,) = self.judge.judge(request, ["n"])
        placed = place(self.view, request)
        assert isinstance(said, Reason) is not isinstance(placed, Placement)
        return said

    def fits(self, pod: PodBuilder) -> bool:
        return not isinstance(self.verdict(pod), Reason)


@pytest.mark.parametrize(
    ("foreign", "wishes", "expected"),
    [
        (FENCED, {}, Reason.FENCED_GPU),
        (FENCED, {"gpu_uuid": "GPU-n-0"}, Reason.FENCED_GPU),
        (used(1), {"isolation": "exclusive"}, Reason.NO_EMPTY_GPU),
        # 80 - 73 = 7 are free
        (used(73), {}, Reason.NO_GPU_FITS),
    ],
)
def test_why_a_pod_of_8_does_not_get_the_only_gpu(foreign: Foreign, wishes: dict[str, str], expected: Reason) -> None:
    cluster = Cluster(a_node("n").with_gpu(foreign=foreign))
    pod = a_pod().asking(8).wishing(**wishes)
    assert expected is cluster.verdict(pod)
    request = cluster.judge.request(pod.build())
    assert request is not None
    assert [expected] == [gpu.reason for gpu in node_verdict(cluster.view, None, request).gpus]
    cluster.show(a_node("n").with_gpu())
    assert cluster.fits(pod)


def test_a_mig_gpu_that_others_have_gets_no_instances() -> None:
    cluster = Cluster(a_node("n").with_mig(foreign=FENCED))
    pod = a_pod().with_container({"nvidia.com/mig-1g.5gb": "1"})
    assert Reason.FENCED_GPU is cluster.verdict(pod)
    cluster.show(a_node("n").with_mig())
    assert cluster.fits(pod)


def test_an_ill_gpu_beside_a_fenced_one_is_not_the_reason_given() -> None:
    # somebody can end the fence now
    cluster = Cluster(a_node("n").with_gpu(foreign=FENCED).with_gpu().unhealthy(1))
    assert Reason.FENCED_GPU is cluster.verdict(a_pod().asking(8))


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 40), st.booleans()), min_size=1, max_size=4),
    st.integers(1, 24),
)
def test_pods_and_others_together_never_have_more_than_a_gpu(gpus: list[tuple[int, int, bool]], asked: int) -> None:
    # each GPU has 24 GiB, of which pods hold some and others use some, which may be more than there is
    node: Any = a_node("n")
    for _, gib, fenced in gpus:
        node = node.with_gpu("24GiB", foreign=Foreign(bytes=gib * GIB, fenced=fenced))
    cluster = Cluster(node)
    for n, (gib, _, _) in enumerate(gpus):
        if gib:
            holder = a_pod().named(f"p{n}").asking(gib).bound_to("n", a_grant(granted({f"GPU-n-{n}": gib * GIB})))
            cluster.ledger.observe_pod(holder.build())
    room = [held + gib + asked <= 24 and not fenced for held, gib, fenced in gpus]
    assert any(room) == cluster.fits(a_pod().named("new").asking(asked))
