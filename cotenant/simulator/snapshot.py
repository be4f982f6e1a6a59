"""A live cluster as a document: what it has, who holds what, and which pods could be moved."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import msgspec

from cotenant.contract.compute import requests
from cotenant.contract.names import Names
from cotenant.contract.pods import Pod, Quantity
from cotenant.contract.request import RequestError, parse
from cotenant.simulator.document import Asking, Budget, Document, NodeEntry, PodEntry, Taint, Toleration

_CONFIG_MIRROR = "kubernetes.io/config.mirror"
# What cluster-autoscaler asks as well before it moves a pod.
_SAFE_TO_EVICT = "cluster-autoscaler.kubernetes.io/safe-to-evict"
_ASKS_INSTANCES = "asks MIG instances, which no plan places; cotenant mig plan shows what has room on a board"


class _Wire(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Be a part of a Kubernetes object; what is not named is not read."""


class _Owner(_Wire, frozen=True, kw_only=True):
    kind: str
    name: str
    controller: bool | None = None


class _Metadata(_Wire, frozen=True, kw_only=True):
    name: str
    namespace: str = ""
    uid: str = ""
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None
    owner_references: tuple[_Owner, ...] | None = None


class _LiveToleration(_Wire, frozen=True, kw_only=True):
    key: str | None = None
    operator: str | None = None
    value: str | None = None
    effect: str | None = None


class _Affinity(_Wire, frozen=True, kw_only=True):
    node_affinity: dict[str, Any] | None = None
    pod_affinity: dict[str, Any] | None = None
    pod_anti_affinity: dict[str, Any] | None = None


class _Spread(_Wire, frozen=True, kw_only=True):
    when_unsatisfiable: str | None = None


class _PodSpec(_Wire, frozen=True, kw_only=True):
    priority: int | None = None
    node_selector: dict[str, str] | None = None
    tolerations: tuple[_LiveToleration, ...] | None = None
    affinity: _Affinity | None = None
    topology_spread_constraints: tuple[_Spread, ...] | None = None
    volumes: tuple[dict[str, Any], ...] | None = None


class _LivePod(_Wire, frozen=True, kw_only=True):
    metadata: _Metadata
    spec: _PodSpec = _PodSpec()


class _LiveTaint(_Wire, frozen=True, kw_only=True):
    key: str
    effect: str
    value: str | None = None


class _NodeSpec(_Wire, frozen=True, kw_only=True):
    unschedulable: bool | None = None
    taints: tuple[_LiveTaint, ...] | None = None


class _NodeStatus(_Wire, frozen=True, kw_only=True):
    allocatable: dict[str, Quantity] | None = None


class _LiveNode(_Wire, frozen=True, kw_only=True):
    metadata: _Metadata
    spec: _NodeSpec = _NodeSpec()
    status: _NodeStatus = _NodeStatus()


class _Expression(_Wire, frozen=True, kw_only=True):
    key: str
    operator: str
    values: tuple[str, ...] | None = None


class _Selector(_Wire, frozen=True, kw_only=True):
    match_labels: dict[str, str] | None = None
    match_expressions: tuple[_Expression, ...] | None = None

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Tell whether labels are selected (apimachinery/pkg/labels/selector.go); an empty selector selects all."""
        return all(labels.get(key) == value for key, value in (self.match_labels or {}).items()) and all(
            _meets(labels, one) for one in self.match_expressions or ()
        )


class _BudgetSpec(_Wire, frozen=True, kw_only=True):
    selector: _Selector | None = None


class _BudgetStatus(_Wire, frozen=True, kw_only=True):
    disruptions_allowed: int = 0


class _LiveBudget(_Wire, frozen=True, kw_only=True):
    metadata: _Metadata
    spec: _BudgetSpec = _BudgetSpec()
    status: _BudgetStatus = _BudgetStatus()


class Taken(msgspec.Struct, frozen=True):
    """Hold a snapshot, and what of the cluster could not be read, for people."""

    document: Document
    unreadable: tuple[str, ...]


def take(
    nodes: Iterable[bytes], pods: Iterable[bytes], budgets: Iterable[bytes], *, names: Names, unit_bytes: int, at: str
) -> Taken:
    """Make a document of Nodes, Pods and PodDisruptionBudgets as the API server has them, in JSON.

    Nodes without an inventory are left out, and so are pods that hold nothing of the others and ask nothing of ours,
    or wait for MIG instances.
    """
    reading = _Reading(names, unit_bytes)
    entries = {node.name: node for node in map(reading.node, nodes) if node is not None}
    found = [pod for pod in (reading.pod(raw, entries) for raw in pods) if pod is not None]
    first = min((born for _, _, born in found), default=0.0)
    covered = reading.budgets(budgets, [(pod, labels) for pod, labels, _ in found])
    # the eviction API refuses a pod that two budgets cover
    budgets_of = Counter(uid for budget in covered for uid in budget.pods)
    entries_of_pods = [
        msgspec.structs.replace(
            pod,
            arrival=born - first,
            stays=pod.stays or ("two PodDisruptionBudgets" if budgets_of[pod.uid] > 1 else ""),
        )
        for pod, _, born in found
    ]
    return Taken(
        Document(
            domain=names.domain,
            unit=unit_bytes,
            taken=at,
            nodes=tuple(entries[name] for name in sorted(entries)),
            pods=tuple(sorted(entries_of_pods, key=lambda pod: (pod.arrival, pod.key))),
            budgets=tuple(covered),
        ),
        tuple(reading.problems),
    )


def read_pod(raw: bytes, *, names: Names, unit_bytes: int, ready: Callable[[Pod], Pod]) -> PodEntry | None:
    """Read one pod that waits, once *ready* has made of it what the API server would; None for one that asks no GPU.

    Raises ValueError with a sentence for one that cannot be read, and what *ready* raises.
    """
    reading = _Reading(names, unit_bytes)
    found = reading.pod(raw, {}, ready)
    if reading.problems:
        raise ValueError(reading.problems[0])
    return found[0] if found is not None else None


class _Reading:
    """Read objects one by one; one that cannot be read costs only itself."""

    def __init__(self, names: Names, unit_bytes: int) -> None:
        self._names = names
        self._unit_bytes = unit_bytes
        self.problems: list[str] = []

    def node(self, raw: bytes) -> NodeEntry | None:
        try:
            node = msgspec.json.decode(raw, type=_LiveNode)
        except msgspec.MsgspecError as error:
            self.problems.append(f"a node: {error}")
            return None
        inventory = (node.metadata.annotations or {}).get(self._names.inventory)
        if inventory is None:
            return None
        amounts = node.status.allocatable or {}
        return NodeEntry(
            name=node.metadata.name,
            cpu=amounts.get("cpu", 0),
            memory=amounts.get("memory", 0),
            inventory=inventory,
            labels=node.metadata.labels or {},
            taints=tuple(Taint(key=t.key, value=t.value or "", effect=t.effect) for t in node.spec.taints or ()),
            cordoned=bool(node.spec.unschedulable),
        )

    def pod(
        self, raw: bytes, nodes: Mapping[str, NodeEntry], ready: Callable[[Pod], Pod] = lambda pod: pod
    ) -> tuple[PodEntry, Mapping[str, str], float] | None:
        """Give a pod, its labels and when it was made, None for one that is none of our business."""
        try:
            pod, live = msgspec.json.decode(raw, type=Pod), msgspec.json.decode(raw, type=_LivePod)
        except msgspec.MsgspecError as error:
            self.problems.append(f"a pod: {error}")
            return None
        pod = ready(pod)
        node = pod.spec.node_name or ""
        if pod.ended or (node and node not in nodes):
            return None
        try:
            asked = parse(pod, self._names, self._unit_bytes)
        except RequestError as error:
            self.problems.append(f"pod {pod.key}: {error}")
            if not node:
                return None
            asked = None
        if asked is None and not node:
            return None
        partitioned = asked is not None and bool(asked.profiles)
        if partitioned and not node:
            self.problems.append(f"pod {pod.key}: {_ASKS_INSTANCES}")
            return None
        compute = requests(pod)
        meta, spec = live.metadata, live.spec
        entry = PodEntry(
            name=pod.metadata.name,
            namespace=pod.metadata.namespace,
            uid=pod.uid,
            cpu=f"{compute.cpu_milli}m",
            memory=compute.memory_bytes,
            # what one with instances holds is in its grant
            containers=tuple(Asking(name=c.name, gpu_mem=c.units, role=c.role) for c in asked.containers)
            if asked and not partitioned
            else (),
            gpu_count=asked.wishes.gpu_count if asked else 1,
            isolation=pod.annotations.get(self._names.isolation, "") if asked else "",
            models=asked.wishes.models if asked else (),
            uuids=asked.wishes.uuids if asked else (),
            policy=asked.wishes.policy if asked else "",
            scheduler=asked.scheduler if asked else "",
            node=node,
            grant=pod.annotations.get(self._names.grant, "") if node else "",
            priority=spec.priority or 0,
            owner=next((f"{o.kind}/{o.name}" for o in meta.owner_references or () if o.controller), ""),
            node_selector=spec.node_selector or {},
            tolerations=tuple(
                Toleration(key=t.key or "", operator=t.operator or "Equal", value=t.value or "", effect=t.effect or "")
                for t in spec.tolerations or ()
            ),
            stays="it holds MIG instances, which a plan does not place" if partitioned else _stays(live),
        )
        return entry, meta.labels or {}, _seconds(meta.creation_timestamp)

    def budgets(self, raws: Iterable[bytes], pods: Sequence[tuple[PodEntry, Mapping[str, str]]]) -> list[Budget]:
        found = []
        bound = defaultdict(list)
        for pod, labels in pods:
            if pod.node:
                bound[pod.namespace].append((pod.uid, labels))
        for raw in raws:
            try:
                live = msgspec.json.decode(raw, type=_LiveBudget)
            except msgspec.MsgspecError as error:
                self.problems.append(f"a PodDisruptionBudget: {error}")
                continue
            selector = live.spec.selector
            if selector is None:
                continue
            uids = tuple(uid for uid, labels in bound[live.metadata.namespace] if selector.matches(labels))
            if uids:
                meta, allowed = live.metadata, live.status.disruptions_allowed
                found.append(Budget(name=meta.name, namespace=meta.namespace, allowed=allowed, pods=uids))
        return found


def _stays(pod: _LivePod) -> str:
    """Say why a pod must not be moved, "" where it may be."""
    meta, spec = pod.metadata, pod.spec
    annotations = meta.annotations or {}
    owner = next((o for o in meta.owner_references or () if o.controller), None)
    affinity = spec.affinity or _Affinity()
    key = "requiredDuringSchedulingIgnoredDuringExecution"
    reasons = (
        (meta.deletion_timestamp is not None, "it is being deleted"),
        (_CONFIG_MIRROR in annotations, "it is a static pod"),
        (owner is None, "nothing would make it anew"),
        (owner is not None and owner.kind == "DaemonSet", "it is a DaemonSet's"),
        (owner is not None and owner.kind == "Job", "it is a Job's, whose work would be lost"),
        (annotations.get(_SAFE_TO_EVICT) == "false", f"{_SAFE_TO_EVICT} is false"),
        (
            any((part or {}).get(key) for part in (affinity.node_affinity, affinity.pod_affinity))
            or bool((affinity.pod_anti_affinity or {}).get(key)),
            "it has affinities, which a plan does not weigh",
        ),
        (
            any(s.when_unsatisfiable != "ScheduleAnyway" for s in spec.topology_spread_constraints or ()),
            "it has topology spread constraints, which a plan does not weigh",
        ),
        (
            any("persistentVolumeClaim" in volume for volume in spec.volumes or ()),
            "it has a volume, which may be bound to its node",
        ),
    )
    return next((why for holds, why in reasons if holds), "")


def _meets(labels: Mapping[str, str], one: _Expression) -> bool:
    value = labels.get(one.key)
    if one.operator == "In":
        return value is not None and value in (one.values or ())
    if one.operator == "NotIn":
        return value is None or value not in (one.values or ())
    return (value is not None) == (one.operator == "Exists")


def _seconds(timestamp: str | None) -> float:
    try:
        return datetime.fromisoformat(timestamp or "").timestamp()
    except ValueError:
        return 0.0
