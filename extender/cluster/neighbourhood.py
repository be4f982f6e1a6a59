"""Read pods and disruption budgets for preempt, which is rare: the ledger need not keep labels and priorities."""

from collections.abc import Sequence

import msgspec

from cotenant.cluster import Cluster
from cotenant.cluster.reading import answered
from extender.placement.preemption import Budget, Neighbour, Selector

# scheduling waits for it
_REQUEST_SECONDS = 2.0


class _Metadata(msgspec.Struct, frozen=True, rename="camel"):
    uid: str = ""
    namespace: str = ""
    labels: dict[str, str] | None = None
    deletion_timestamp: str | None = None


class _Spec(msgspec.Struct, frozen=True):
    priority: int | None = None


class _Status(msgspec.Struct, frozen=True, rename="camel"):
    phase: str | None = None
    start_time: str | None = None


class _Pod(msgspec.Struct, frozen=True):
    metadata: _Metadata
    spec: _Spec = _Spec()
    status: _Status = _Status()


class _Pods(msgspec.Struct, frozen=True):
    items: list[_Pod] | None = None


class _BudgetSpec(msgspec.Struct, frozen=True):
    selector: Selector | None = None


class _BudgetStatus(msgspec.Struct, frozen=True, rename="camel"):
    disruptions_allowed: int = 0


class _Budget(msgspec.Struct, frozen=True):
    metadata: _Metadata
    spec: _BudgetSpec = _BudgetSpec()
    status: _BudgetStatus = _BudgetStatus()


class _Budgets(msgspec.Struct, frozen=True):
    items: list[_Budget] | None = None


_pods = msgspec.json.Decoder(_Pods)
_budgets = msgspec.json.Decoder(_Budgets)


class Neighbourhood:
    """Ask the API server; raises ClusterError where it does not answer."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def on(self, node: str) -> Sequence[Neighbour]:
        """List the pods of a node that have not ended and are not terminating."""
        body = self._cluster.get(
            "/api/v1/pods", query={"fieldSelector": f"spec.nodeName={node}"}, timeout=_REQUEST_SECONDS
        ).body
        return [
            Neighbour(
                uid=pod.metadata.uid,
                namespace=pod.metadata.namespace,
                priority=pod.spec.priority or 0,
                started=pod.status.start_time or "",
                labels=pod.metadata.labels or {},
            )
            for pod in answered(_pods, body).items or ()
            if pod.metadata.deletion_timestamp is None and pod.status.phase not in {"Succeeded", "Failed"}
        ]

    def budgets(self) -> Sequence[Budget]:
        """List all disruption budgets."""
        body = self._cluster.get("/apis/policy/v1/poddisruptionbudgets", timeout=_REQUEST_SECONDS).body
        return [
            Budget(one.metadata.namespace, one.spec.selector, one.status.disruptions_allowed)
            for one in answered(_budgets, body).items or ()
        ]
