"""All who answer about a pod agree: filter, prioritize, bind, preempt, explain, simulate and the list of pods.

Clusters are drawn with all kinds of GPUs and pods, and something happens to nodes under the pods that are there.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from cotenant.contract.configuration import NamespaceLimits
from cotenant.contract.inventory import Foreign, Health
from cotenant.contract.pods import Pod
from cotenant.contract.reasons import Reason
from cotenant.contract.request import RequestError
from cotenant.contract.units import GIB
from extender.inspect.inspector import Inspector
from extender.ledger import Hold, Ledger
from extender.placement.fit import Placement, choosing, place
from extender.placement.preemption import Budget, Neighbour
from extender.placement.tenants import Tenants
from extender.verbs.bind import Bind, Refusal
from extender.verbs.expected import Expected
from extender.verbs.filter import Filter
from extender.verbs.judge import Judge
from extender.verbs.preempt import Preempt
from extender.verbs.prioritize import Prioritize
from extender.verbs.victims import Search
from extender.verbs.wire import BindArgs, Candidates, ExtenderArgs, MetaVictims, PreemptionArgs
from tests.builders import NAMES, NodeBuilder, PodBuilder, a_node, a_pod

SMALL, LARGE = "10GiB", "16GiB"
CUT = ["1g.5gb@0", "1g.5gb@1", "2g.10gb@2", "3g.20gb@4"]
SHAPES: list[Callable[[NodeBuilder], NodeBuilder]] = [
    lambda n: n.with_gpus(2, SMALL),
    lambda n: n.with_gpu(SMALL).with_gpu(LARGE, model="NVIDIA L4"),
    lambda n: n.with_gpu(SMALL).with_gpu(LARGE).under_mps(max_clients=2),
    lambda n: n.with_gpu(SMALL).under_mps(max_clients=48).with_gpu(LARGE),
    lambda n: n.with_gpus(3, SMALL).under_mps_each(),
    lambda n: n.with_gpu(SMALL).with_mig(),
    lambda n: n.with_mig(static=CUT).with_mig(static=["7g.40gb@0"]),
    lambda n: n.with_mig(static=CUT).with_shares("1g.5gb", 3).with_mig(static=CUT),
]
HAPPENINGS: list[Callable[[NodeBuilder], NodeBuilder]] = [
    lambda n: n,
    lambda n: n,
    lambda n: n.not_serving(),
    lambda n: n.advertising("0"),
    lambda n: n.counting_in(1 << 20),
    lambda n: with_first_gpu(n, foreign=Foreign(bytes=3 * GIB)),
    lambda n: with_first_gpu(n, foreign=Foreign(fenced=True)),
    lambda n: with_first_gpu(n, health=Health.UNHEALTHY),
]
LIMITS: list[dict[str, Any]] = [
    {},
    {"gpu_memory": "12GiB"},
    {"gpus": 2},
    {"gpu_memory": "25GiB", "models": ("A100", "H100")},
    {"isolations": ("strict", "exclusive")},
]
NONE: dict[str, Any] = {}
WISHES = [NONE, NONE, NONE, {"isolation": "exclusive"}, {"isolation": "limited"}, {"gpu_model": "L4"}, {"gpu_count": 2}]
PROFILES = ["1g.5gb", "2g.10gb", "3g.20gb", "7g.40gb"]


def with_first_gpu(node: NodeBuilder, **fields: Any) -> NodeBuilder:
    first, *others = node.gpus
    return replace(node, gpus=(msgspec.structs.replace(first, **fields), *others))


@st.composite
def a_drawn_pod(draw: st.DrawFn) -> PodBuilder:
    pod = a_pod().in_namespace(draw(st.sampled_from(["default", "team"]))).running_as(draw(st.sampled_from([None, 7])))
    pod = pod.of_priority(draw(st.sampled_from([0, 10])))
    profiles = draw(st.lists(st.sampled_from(PROFILES), max_size=2))
    if profiles:
        for profile in profiles:
            pod = pod.asking("1", of=f"{NAMES.mig_prefix}{profile}")
        return pod.wishing(isolation="strict") if draw(st.booleans()) else pod
    for units in draw(st.lists(st.sampled_from([2, 4, 6, 8, 10]), min_size=1, max_size=2)):
        pod = pod.asking(units)
    if draw(st.integers(0, 4)) == 0:
        pod = pod.with_init(4)
    return pod.wishing(**draw(st.sampled_from(WISHES)))


class Extender:
    """What answers, on one ledger; Bindings are made at once, and it is what neighbours are read from."""

    def __init__(self, policy: str, limits: dict[str, Any]) -> None:
        tenants = Tenants({"team": NamespaceLimits(**limits)} if limits else {}, NAMES)
        self.ledger = Ledger(NAMES, GIB)
        self.judge = Judge(self.ledger, NAMES, GIB, policy, tenants=tenants)
        self.search = Search(self.ledger, self.judge, self)
        self.prioritize = Prioritize(self.judge)
        self.preempt = Preempt(self.judge, self.search, synced=lambda: True)
        self.bind_verb = Bind(self.ledger, self.judge, self, NAMES, synced=lambda: True)
        self.inspector = Inspector(self.ledger, self.judge)
        self.priorities: dict[str, int] = {}

    # As the API server.

    def deadline(self) -> float:
        return 0.0

    def read(self, args: BindArgs, *, deadline: float) -> Pod | Refusal:  # noqa: ARG002
        return Refusal.of(args, Reason.POD_GONE)

    def bind(
        self,
        args: BindArgs,
        annotations: dict[str, str],  # noqa: ARG002
        hold: Hold | None,  # noqa: ARG002
        *,
        deadline: float,  # noqa: ARG002
        again: bool = False,  # noqa: ARG002
    ) -> Refusal | None:
        self.ledger.confirm(args.PodUID)
        return None

    def on(self, node: str) -> Sequence[Neighbour]:
        return [
            Neighbour(hold.uid, hold.namespace, self.priorities[hold.uid], "", {})
            for hold in self.ledger.holds()
            if hold.node == node
        ]

    def budgets(self) -> Sequence[Budget]:
        return []

    # As kube-scheduler.

    def fitting(self, pod: Pod, names: list[str], *, decide: bool = False) -> tuple[list[str], dict[str, str]]:
        """Give the nodes that filter lets the pod onto, and why not the others."""
        verb = Filter(self.ledger, self.judge, synced=lambda: True, decide=decide, expected=Expected(patience=0.0))
        result = verb(ExtenderArgs(pod, Candidates(list(names), msgspec.json.encode(names))))
        fits = msgspec.json.decode(msgspec.json.encode(result.NodeNames), type=list[str])
        return fits, {**result.FailedNodes, **result.FailedAndUnresolvableNodes}

    def bound(self, pod: Pod, node: str) -> Refusal | None:
        self.priorities[pod.uid] = pod.spec.priority or 0
        return self.bind_verb(BindArgs(pod.metadata.name, pod.metadata.namespace, pod.uid, node))

    def promise(self, pod: Pod, node: str, gone: list[str]) -> None:
        request = self.judge.request(pod)
        assert request is not None
        self.ledger.promise(pod.uid, pod.key, node, gone, choosing(request))


@given(
    shapes=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=3),
    happenings=st.lists(st.sampled_from(HAPPENINGS), min_size=3, max_size=3),
    pods=st.lists(a_drawn_pod(), min_size=2, max_size=9),
    limits=st.sampled_from(LIMITS),
    policy=st.sampled_from(["priced-leftovers", "binpack", "spread"]),
    gone=st.sets(st.integers(0, 8)),
)
def test_all_who_answer_about_a_pod_agree(
    *,
    shapes: list[Callable[[NodeBuilder], NodeBuilder]],
    happenings: list[Callable[[NodeBuilder], NodeBuilder]],
    pods: list[PodBuilder],
    limits: dict[str, Any],
    policy: str,
    gone: set[int],
) -> None:
    extender = Extender(policy, limits)
    nodes = [shape(a_node(f"n{n}")) for n, shape in enumerate(shapes)]
    names = [node.name for node in nodes]
    for node in nodes:
        extender.ledger.observe_node(node.build())
    *residents, vip, last = [pod.named(f"p{n}").with_uid(f"uid-{n}").build() for n, pod in enumerate(pods)]
    for pod in (*residents, vip, last):
        extender.ledger.observe_pod(pod)
    for pod in residents:
        fits, _ = answered(extender, pod, names)
        assert not fits or extender.bound(pod, fits[0]) is None
    for node, happens in zip(nodes, happenings, strict=False):
        extender.ledger.observe_node(happens(node).build())
    evicted = [pod.uid for n, pod in enumerate(residents) if n in gone]
    if answered(extender, vip, names)[1] and allowed_words(extender, vip) >= {Reason.NO_GPU_FITS.sentence}:
        extender.promise(vip, names[0], evicted)

    check_the_last(extender, last, names)
    check_victims(extender, last, names, evicted)
    for pod in (vip, last):
        fits, why_not = answered(extender, pod, names)
        for name, why in why_not.items():
            # a pod that something is kept for is offered that node alone
            if why != Reason.UNSETTLED.sentence:
                assert isinstance(extender.bound(pod, name), Refusal)
        assert not fits or extender.bound(pod, fits[-1]) is None


def answered(extender: Extender, pod: Pod, names: list[str]) -> tuple[list[str], dict[str, str]]:
    """Give filter's answer, which says yes or no to every node, and no with a Reason."""
    fits, why_not = extender.fitting(pod, names)
    assert sorted([*fits, *why_not]) == names
    assert allowed_words(extender, pod) >= set(why_not.values())
    return fits, why_not


def allowed_words(extender: Extender, pod: Pod) -> set[str]:
    """Say in which words filter may refuse a pod."""
    try:
        request = extender.judge.request(pod)
    except RequestError as error:
        return {str(error)}
    assert request is not None
    excess = extender.judge.excess(pod.metadata.namespace, request)
    return {excess.constant} if excess is not None else {reason.sentence for reason in Reason}


def check_the_last(extender: Extender, pod: Pod, names: list[str]) -> None:
    """Hold prioritize, explain, simulate and the list of pods to filter."""
    fits, why_not = answered(extender, pod, names)
    chosen, _ = extender.fitting(pod, names, decide=True)
    assert bool(fits) == bool(chosen)
    explained = extender.inspector.explain(pod.metadata.namespace, pod.metadata.name, limit=9)
    simulated = extender.inspector.simulate(pod, limit=9)
    (row,) = [row for row in extender.inspector.pods(limit=99).items if row.uid == pod.uid]
    assert explained is not None
    assert simulated is not None
    assert (len(fits), len(fits)) == (explained.fitting, simulated.fitting)
    assert (explained.pod.reason is None, row.reason is None) == (bool(fits), bool(fits))
    for told in explained.nodes:
        assert why_not.get(told.node) == (told.reason.sentence if told.reason is not None else None)
    if fits:
        assert f"fits on {len(fits)} of " in row.sentence
        assert f"it fits on {len(fits)} of " in simulated.summary
        assert f" would go to {chosen[0]} GPU " in simulated.summary
        scores = {one.Host: one.Score for one in extender.prioritize(ExtenderArgs(pod, Candidates(fits)))}
        assert max(scores.values(), default=0) == scores.get(chosen[0], 0)
    holds = {hold.key: hold.uid for hold in extender.ledger.holds()}
    for change in explained.changes:
        if change.kind == "ended":
            view = extender.ledger.without(change.node, [holds[key] for key in change.pods])
            request = extender.judge.request(pod)
            assert view is not None
            assert request is not None
            assert isinstance(place(view, request), Placement)


def check_victims(extender: Extender, pod: Pod, names: list[str], evicted: list[str]) -> None:
    """Hold preempt to what there is once its victims are gone."""
    there = {name: [one.uid for one in extender.on(name) if one.priority < (pod.spec.priority or 0)] for name in names}
    proposed = {
        name: msgspec.convert({"Pods": [{"UID": uid} for uid in uids if uid in evicted]}, MetaVictims)
        for name, uids in there.items()
    }
    found = extender.preempt(PreemptionArgs(pod, proposed)).NodeNameToMetaVictims
    for name, meta in found.items():
        victims = {one.UID for one in meta.Pods or ()}
        assert victims <= set(there[name])
        request = extender.judge.request(pod)
        view = extender.ledger.without(name, victims)
        assert view is not None
        assert request is not None
        assert isinstance(place(view, request), Placement)
        assert extender.judge.excess(pod.metadata.namespace, request, view) is None
