"""Read pods and disruption budgets for preempt, which is rare: the ledger need not keep labels and priorities."""

from collections.abc import Sequence
from typing import TypeVar

import msgspec

from cotenant.cluster import Cluster, Unreachable
from cotenant.cluster.nesting import decoded
from extender.placement.preemption import Budget, Neighbour, Selector

T = TypeVar("T")

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
            for pod in _decoded(body, _Pods).items or ()
            if pod.metadata.deletion_timestamp is None and pod.status.phase not in {"Succeeded", "Failed"}
        ]

    def budgets(self) -> Sequence[Budget]:
        """List all disruption budgets."""
        body = self._cluster.get("/apis/policy/v1/poddisruptionbudgets", timeout=_REQUEST_SECONDS).body
        return [
            Budget(one.metadata.namespace, one.spec.selector, one.status.disruptions_allowed)
            for one in _decoded(body, _Budgets).items or ()
        ]


def _decoded(body: bytes, kind: type[T]) -> T:
    try:
        return decoded(msgspec.json.Decoder(kind).decode, body)
    except msgspec.MsgspecError as error:
        raise Unreachable(f"the API server's answer is no {kind.__name__.strip('_')}: {error}") from error
