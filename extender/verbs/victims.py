"""Whose eviction frees a node for a pod: what the ledger knows, put together with what the API server is asked."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, Protocol

import msgspec

from cotenant.contract.inventory import Health
from cotenant.contract.names import mig_suffix
from cotenant.contract.pods import Pod
from cotenant.contract.request import PodRequest
from extender.ledger import Ledger, MIGState, NodeView, Stage
from extender.placement.fit import Placement, place
from extender.placement.preemption import Budget, Neighbour, Victims, victims
from extender.verbs.judge import Judge


class Neighbourhood(Protocol):
    """Read from the API server what the ledger does not keep."""

    def on(self, node: str) -> Sequence[Neighbour]:
        """List the pods of a node that have not ended and are not terminating."""

    def budgets(self) -> Sequence[Budget]:
        """List all disruption budgets."""


class Search:
    """Look for victims of a *pod*, node by node: what is kept for it already is no reason to evict."""

    def __init__(self, ledger: Ledger, judge: Judge, neighbourhood: Neighbourhood) -> None:
        self._ledger = ledger
        self._judge = judge
        self._neighbourhood = neighbourhood

    def budgets(self) -> Sequence[Budget]:
        """List all disruption budgets; raises ClusterError where the API server cannot be asked."""
        return self._neighbourhood.budgets()

    def fits(self, node: str, request: PodRequest, gone: frozenset[str], *, pod: Pod) -> bool:
        """Tell whether the pod would fit without those *gone*, by GPUs, CPU, memory and the limits of its namespace."""
        return self._fitting(node, request, gone, pod=pod)(gone)

    def on(
        self,
        node: str,
        request: PodRequest,
        budgets: Sequence[Budget],
        *,
        pod: Pod,
        always: frozenset[str] = frozenset(),
    ) -> Victims | None:
        """Choose victims of a lower priority on *node*, those of *always* among them; None where none would do.

        Raises ClusterError where the API server cannot be asked.
        """
        return self._among(self._neighbourhood.on(node), node, request, budgets, pod=pod, always=always)

    def among_holders(
        self, node: str, request: PodRequest, budgets: Sequence[Budget], *, pod: Pod
    ) -> Victims | Literal["wait"] | None:
        """Choose as on() does, only among pods that hold something of a GPU.

        "wait" where pods that are ending anyway make room enough.
        """
        # those that are only assumed are on their way here, and not known to the node yet
        holders = {hold.uid for hold in self._ledger.holds() if hold.node == node and hold.stage is Stage.BOUND}
        staying = self._neighbourhood.on(node)
        ending = frozenset(holders - {one.uid for one in staying})
        if ending and self.fits(node, request, ending, pod=pod):
            return "wait"
        return self._among([one for one in staying if one.uid in holders], node, request, budgets, pod=pod)

    def _among(
        self,
        neighbours: Iterable[Neighbour],
        node: str,
        request: PodRequest,
        budgets: Sequence[Budget],
        *,
        pod: Pod,
        always: frozenset[str] = frozenset(),
    ) -> Victims | None:
        priority = pod.spec.priority or 0
        lower = [self._weighed(one) for one in neighbours if one.priority < priority]
        fits = self._fitting(node, request, always.union(one.uid for one in lower), pod=pod)
        found = victims(lower, budgets, fits, always)
        return found if found is not None and found.pods else None

    def explained(self, node: str, request: PodRequest, *, pod: Pod) -> bool:
        """Tell whether what we count is why kube-scheduler, which counts sums, did not place the pod there.

        Otherwise its victims are in the way for another reason, such as a port or an anti-affinity, and must go.
        """
        view = self._ledger.without(node, [pod.uid])
        if view is None:
            return False
        if not _has_compute(view, request):
            return True
        if request.profiles:
            asked = Counter(request.profiles)
            return any(_advertised(view, profile) < count for profile, count in asked.items())
        # units of an ill GPU are not allocatable; of what others use or is promised it knows nothing
        well = sum(state.gpu.usable_bytes for state in view.gpus if state.gpu.health is Health.HEALTHY)
        free = well - sum(state.held_bytes for state in view.gpus)
        return free < sum(container.share_bytes for container in request.containers) * request.wishes.gpu_count

    def _fitting(
        self, node: str, request: PodRequest, uids: frozenset[str], *, pod: Pod
    ) -> Callable[[frozenset[str]], bool]:
        """Give what tells whether the pod would fit without some of those UIDs, as the node is now."""
        trial = self._ledger.trial(node, uids | {pod.uid})

        def fits(gone: frozenset[str]) -> bool:
            view = trial.without(gone | {pod.uid}) if trial is not None else None
            return (
                view is not None
                and _has_compute(view, request)
                and isinstance(place(view, request), Placement)
                and self._judge.excess(pod.metadata.namespace, request, view) is None
            )

        return fits

    def _weighed(self, one: Neighbour) -> Neighbour:
        hold = self._ledger.hold(one.uid)
        return msgspec.structs.replace(one, bytes=hold.bytes if hold is not None else 0)


def _has_compute(view: NodeView, request: PodRequest) -> bool:
    free, asked = view.free_compute, request.compute
    return asked.cpu_milli <= free.cpu_milli and asked.memory_bytes <= free.memory_bytes


def _advertised(view: NodeView, profile: str) -> int:
    """Count the instances of *profile* that kube-scheduler takes for free: what is advertised less what is held."""
    return sum(_bound(state, profile) for state in view.mig if state.healthy)


def _bound(state: MIGState, profile: str) -> int:
    if state.static:
        return sum(free for one, free in state.free_shares().items() if state.suffix(one.profile) == profile)
    most = {mig_suffix(name): count for name, count in state.geometry.room(()).items()}.get(profile, 0)
    return most - sum(mig_suffix(one.profile) == profile for one in state.taken)
