"""Where a pod would go, if it were asked about now."""

from collections.abc import Sequence
from typing import Protocol

from cotenant.contract.pods import Pod
from cotenant.contract.reasons import Reason
from cotenant.contract.request import PodRequest
from extender.ledger import NodeView
from extender.placement.fit import Placement, Preference, grant, place
from extender.placement.partition import Aim
from extender.placement.tenants import Excess, Tenants
from extender.policies.mix import Mix


class Judging(Protocol):
    """Be what tells which nodes fit."""

    def request(self, pod: Pod) -> PodRequest | None:
        """Read what a pod asks of us; raise RequestError where that cannot be met anywhere."""

    def preference(self, request: PodRequest, node: str) -> Preference:
        """Tell which of a node's GPUs the policy would take."""

    def aim(self, request: PodRequest, node: str) -> Aim:
        """Tell where the policy would have MIG instances lie on a node."""

    def policy(self, request: PodRequest) -> str:
        """Name the policy for a request; raise RequestError for one that does not exist."""

    def judge(self, request: PodRequest, nodes: list[str], *, namespace: str) -> list[float | Reason]:
        """Give for each node its cost, or why it does not fit, the limits of the pod's namespace included."""

    def excess(self, namespace: str, request: PodRequest) -> Excess | None:
        """Say which limit of its namespace a request exceeds beside what its pods hold now; None where none."""

    @property
    def tenants(self) -> Tenants:
        """Give the limits of namespaces."""

    @property
    def pinned(self) -> bool:
        """Tell whether the configuration names the mix."""

    @property
    def mix(self) -> Mix:
        """Give the mix of pods that policies expect just now."""

    @property
    def largest_bytes(self) -> int:
        """Give the size of the GPU that a mix counts thousandths of."""


def destination(request: PodRequest, namespace: str, views: Sequence[NodeView], judge: Judging) -> str:
    """Say which of the nodes the policy has a request go to, if no other scorer of kube-scheduler has a say."""
    by_name = {view.name: view for view in views}
    verdicts = zip(by_name, judge.judge(request, list(by_name), namespace=namespace), strict=True)
    costs = {name: cost for name, cost in verdicts if not isinstance(cost, Reason)}
    fits = f"it fits on {len(costs)} of {len(views)} nodes that are well"
    if not costs:
        return fits
    best = min(costs, key=lambda name: (costs[name], name))
    placed = place(by_name[best], request, judge.preference(request, best), judge.aim(request, best))
    if not isinstance(placed, Placement):
        return fits
    indices = {state.gpu.uuid: state.gpu.index for state in by_name[best].states}
    gpus = ", ".join(str(indices[uuid]) for uuid in grant(request, placed).charges())
    return f"{fits}, and would go to {best} GPU {gpus}, by the policy {judge.policy(request)}"
