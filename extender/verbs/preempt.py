"""preempt: hold kube-scheduler's victims to single GPUs, and find better ones where they would not help."""

from collections.abc import Sequence
from typing import Protocol

from cotenant.contract.request import PodRequest, RequestError
from extender.fit import Placement, place
from extender.ledger import Ledger, NodeView
from extender.preemption import Budget, Neighbour, victims
from extender.verbs.judge import Judge
from extender.verbs.wire import MetaPod, MetaVictims, PreemptionArgs, PreemptionResult

# kube-scheduler picks one node of those that come back. Each that its own victims do not free costs a call to the API
# server while the scheduling of all pods waits.
_SEARCHED_NODES = 8


class Neighbourhood(Protocol):
    """Read from the API server what the ledger does not keep."""

    def on(self, node: str) -> Sequence[Neighbour]:
        """List the pods of a node that have not ended and are not terminating."""

    def budgets(self) -> Sequence[Budget]:
        """List all disruption budgets."""


class Preempt:
    """Answer preempt."""

    def __init__(self, ledger: Ledger, judge: Judge, neighbourhood: Neighbourhood) -> None:
        self._ledger = ledger
        self._judge = judge
        self._neighbourhood = neighbourhood

    def __call__(self, args: PreemptionArgs) -> PreemptionResult:
        """Give for each node that evicting pods can free for the pod the victims that it takes.

        kube-scheduler's own victims free a node's sums. Where they also free GPUs that hold the pod they stay as they
        are; if there is any such node, it is one of those. Else nodes are searched, a few of them, for pods of lower
        priority that do. Raises ClusterError where the API server cannot be asked.
        """
        proposed = args.proposed()
        try:
            request = self._judge.request(args.Pod)
        except RequestError:
            return PreemptionResult({})
        if request is None:
            return PreemptionResult(proposed)
        if self._judge.excess(args.Pod.metadata.namespace, request) is not None:
            return PreemptionResult({})
        enough = {
            node: meta
            for node, meta in proposed.items()
            if self._fits(node, request, frozenset(one.UID for one in meta.Pods or ()))
        }
        if enough:
            return PreemptionResult(enough)
        return PreemptionResult(self._search(args.Pod.spec.priority or 0, request, proposed))

    def _search(self, priority: int, request: PodRequest, proposed: dict[str, MetaVictims]) -> dict[str, MetaVictims]:
        found: dict[str, MetaVictims] = {}
        budgets: Sequence[Budget] | None = None
        # nodes for which kube-scheduler would evict least come first
        for node in sorted(proposed, key=lambda name: (len(proposed[name].Pods or ()), name))[:_SEARCHED_NODES]:
            lower = [one for one in self._neighbourhood.on(node) if one.priority < priority]
            if budgets is None:
                budgets = self._neighbourhood.budgets()
            uids = frozenset(one.UID for one in proposed[node].Pods or ())
            chosen = victims(
                [self._weighed(one) for one in lower],
                budgets,
                lambda gone, node=node: self._fits(node, request, gone),  # type: ignore[misc]
                frozenset() if self._explained(node, request) else uids,
            )
            if chosen is not None and chosen.pods:
                found[node] = MetaVictims([MetaPod(one.uid) for one in chosen.pods], chosen.violations)
        return found

    def _weighed(self, one: Neighbour) -> Neighbour:
        hold = self._ledger.hold(one.uid)
        held = sum(hold.charges.values()) + hold.everywhere_bytes if hold else 0
        return Neighbour(one.uid, one.namespace, one.priority, one.started, one.labels, held)

    def _fits(self, node: str, request: PodRequest, gone: frozenset[str]) -> bool:
        """Tell whether the pod would fit without those, by GPUs, CPU and memory."""
        view = self._ledger.without(node, gone)
        return view is not None and _has_compute(view, request) and isinstance(place(view, request), Placement)

    def _explained(self, node: str, request: PodRequest) -> bool:
        """Tell whether what we count is why kube-scheduler did not place the pod there.

        Otherwise its victims are in the way for another reason, such as a port or an anti-affinity, and must go.
        """
        view = self._ledger.view(node)
        if view is None:
            return False
        free = sum(state.free_bytes for state in view.gpus)
        asked = sum(container.share_bytes for container in request.containers) * request.wishes.gpu_count
        return free < asked or not _has_compute(view, request)


def _has_compute(view: NodeView, request: PodRequest) -> bool:
    free, asked = view.free_compute, request.compute
    return asked.cpu_milli <= free.cpu_milli and asked.memory_bytes <= free.memory_bytes
