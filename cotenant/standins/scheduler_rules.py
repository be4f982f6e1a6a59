"""What kube-scheduler 1.36 makes of pods and nodes, as far as the stand-in needs it: values and pure functions."""

from collections import Counter
from typing import Any

import msgspec

from cotenant.contract.grant import Role, peak
from cotenant.contract.units import parse_quantity

_MIN_FEASIBLE = 100
_MIN_PERCENTAGE = 5


class PodMetadata(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """Hold the metadata that a scheduler's cache keeps: managed fields are trimmed."""

    name: str
    uid: str
    namespace: str = "default"
    resource_version: str | None = None
    generation: int | None = None
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None
    annotations: dict[str, str] | None = None
    labels: dict[str, str] | None = None
    owner_references: list[dict[str, Any]] | None = None


class Pod(msgspec.Struct, frozen=True):
    """Hold a pod as it is sent to extenders: without apiVersion and kind."""

    metadata: PodMetadata
    spec: dict[str, Any] = {}
    status: dict[str, Any] = {}


class NodeMetadata(msgspec.Struct, frozen=True, rename="camel"):
    """Hold a node's name."""

    name: str
    resource_version: str | None = None


class Node(msgspec.Struct, frozen=True):
    """Hold what the scheduler reads of a node."""

    metadata: NodeMetadata
    status: dict[str, Any] = {}

    @property
    def allocatable(self) -> dict[str, int]:
        """Give how much there is of each extended resource."""
        return _extended(self.status.get("allocatable") or {})


def requested(pod: Pod) -> dict[str, int]:
    """Add up what a pod asks of extended resources, the way the scheduler counts init containers and sidecars."""
    counted: list[tuple[Role, dict[str, int]]] = []
    for container in pod.spec.get("initContainers") or ():
        role = Role.SIDECAR if container.get("restartPolicy") == "Always" else Role.INIT
        counted.append((role, _asked(container)))
    counted += [(Role.MAIN, _asked(container)) for container in pod.spec.get("containers") or ()]
    return peak(counted)


def sample_size(nodes: int, percentage: int) -> int:
    """Say after how many nodes that fit the search ends (numFeasibleNodesToFind); *percentage* 0 adapts."""
    if nodes < _MIN_FEASIBLE:
        return nodes
    percentage = percentage or max(_MIN_PERCENTAGE, 50 - nodes // 125)
    return max(_MIN_FEASIBLE, nodes * percentage // 100)


def no_fit(nodes: int, reasons: dict[str, list[str]]) -> str:
    """Say why none of *nodes* fits: how often each reason came (framework.FitError)."""
    counts = Counter(reason for listed in reasons.values() for reason in listed)
    histogram = ", ".join(sorted(f"{count} {reason}" for reason, count in counts.items()))
    return f"0/{nodes} nodes are available:" + (f" {histogram}." if histogram else "")


def _asked(container: dict[str, Any]) -> dict[str, int]:
    return _extended((container.get("resources") or {}).get("requests") or {})


def _extended(amounts: dict[str, str | int]) -> dict[str, int]:
    return {name: parse_quantity(amount) for name, amount in amounts.items() if "/" in name}
