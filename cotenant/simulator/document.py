"""Our own JSON: a trace with times, or a snapshot of a live cluster; amounts in bytes, and GPUs of any size.

What it holds becomes the same Nodes and Pods that the extender reads from the API server, and so is read by the same
code: what a pod may ask is for `cotenant.contract.request` to say.
"""

import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Annotated, Any

import msgspec

from cotenant.contract import inventory as inventories
from cotenant.contract.compute import checked, requests
from cotenant.contract.inventory import GPU, Family, Health, Inventory, Mode
from cotenant.contract.names import DEFAULT_DOMAIN, Names
from cotenant.contract.pods import Container, Metadata, Pod, Resources, Spec
from cotenant.contract.request import PodRequest, RequestError, Wishes, parse
from cotenant.contract.units import MIB, parse_bytes
from cotenant.simulator.trace import TraceError
from extender.ledger import Node

VERSION = 1

Quantity = str | int
Text = Annotated[str, msgspec.Meta(min_length=1, max_length=512)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e10)]


class DocumentError(TraceError):
    """Say what is wrong with a file: its name, where in it, and what was expected."""

    def __init__(self, path: Path, place: str, expected: str) -> None:
        ValueError.__init__(self, path, place, expected)

    def __str__(self) -> str:
        path, place, expected = self.args
        return f"{path}, {place}: {expected}"


class _Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True, rename="camel"):
    """Refuse unknown keys, so that a typo is told and not ignored."""


class GPUEntry(_Part, frozen=True, kw_only=True):
    """Describe GPUs that are alike: *memory* is what pods may be given of each; a *uuid* is of one."""

    model: Text
    memory: Quantity
    count: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    uuid: str = ""
    mode: Mode = Mode.TIME_SLICING
    healthy: bool = True


class Taint(_Part, frozen=True, kw_only=True):
    """Keep pods off a node that do not tolerate it, as Kubernetes has it."""

    key: str
    value: str = ""
    effect: str = "NoSchedule"


class NodeEntry(_Part, frozen=True, kw_only=True):
    """Describe a node."""

    name: Text
    cpu: Quantity
    memory: Quantity
    gpus: Annotated[tuple[GPUEntry, ...], msgspec.Meta(max_length=64)] = ()
    # the annotation of a live node instead, as it stood there
    inventory: str = ""
    labels: dict[str, str] = {}
    taints: tuple[Taint, ...] = ()
    # nothing new may come here
    cordoned: bool = False


class Asking(_Part, frozen=True, kw_only=True):
    """Say what one container asks: *gpu_mem* units over all of its GPUs."""

    name: str
    gpu_mem: int
    role: str = "main"


class Toleration(_Part, frozen=True, kw_only=True):
    """Let a pod onto a tainted node, as Kubernetes has it."""

    key: str = ""
    operator: str = "Equal"
    value: str = ""
    effect: str = ""


class PodEntry(_Part, frozen=True, kw_only=True):
    """Describe a pod: *gpu_mem* units for its one container, or several *containers*; seconds since the trace began.

    One without *departure* stays. *node* and *grant* are where it was when the snapshot was taken.
    """

    name: Text
    namespace: Text = "default"
    uid: str = ""
    cpu: Quantity = 0
    memory: Quantity = 0
    gpu_mem: int | None = None
    containers: tuple[Asking, ...] = ()
    gpu_count: int = 1
    isolation: str = ""
    models: tuple[str, ...] = ()
    uuids: tuple[str, ...] = ()
    policy: str = ""
    # spec.schedulerName: the profile of kube-scheduler
    scheduler: str = ""
    arrival: Seconds = 0.0
    departure: Seconds | None = None
    node: str = ""
    grant: str = ""
    priority: int = 0
    # kind/name of what would make it anew
    owner: str = ""
    node_selector: dict[str, str] = {}
    tolerations: tuple[Toleration, ...] = ()
    # why it must stay where it is: "DaemonSet", "affinity", ...
    stays: str = ""

    @property
    def key(self) -> str:
        """Name the pod for people: namespace/name."""
        return f"{self.namespace}/{self.name}"

    @property
    def identity(self) -> str:
        """Name the pod for good."""
        return self.uid or self.key


class Event(_Part, frozen=True, kw_only=True):
    """Say that a node, or its GPU of this index, is lost or back *at* so many seconds."""

    at: Seconds
    node: Text
    gpu: Annotated[int, msgspec.Meta(ge=0, le=63)] | None = None
    back: bool = False


class Budget(_Part, frozen=True, kw_only=True):
    """Hold a PodDisruptionBudget: how many of *pods*, by UID, may be evicted just now."""

    name: Text
    namespace: Text = "default"
    allowed: int = 0
    pods: tuple[str, ...] = ()


class Document(_Part, frozen=True, kw_only=True):
    """Hold a trace or a snapshot."""

    version: int = VERSION
    domain: str = DEFAULT_DOMAIN
    unit: Quantity = "1GiB"
    # when it was taken, for people
    taken: str = ""
    nodes: tuple[NodeEntry, ...] = ()
    pods: tuple[PodEntry, ...] = ()
    events: tuple[Event, ...] = ()
    budgets: tuple[Budget, ...] = ()

    @property
    def names(self) -> Names:
        """Give the names under its domain."""
        return Names(self.domain)

    @property
    def unit_bytes(self) -> int:
        """Give the bytes of one unit."""
        return parse_bytes(self.unit)


def read(path: Path) -> Document:
    """Read a document; raise DocumentError for a bad one, OSError for one that cannot be opened."""
    raw = path.read_bytes()
    try:
        found = msgspec.json.decode(raw, type=Document)
    except msgspec.ValidationError as error:
        raise DocumentError(path, *_place(str(error))) from error
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        where = re.search(r"byte (\d+)", str(error))
        line = raw[: int(where[1])].count(b"\n") + 1 if where else 1
        raise DocumentError(path, f"line {line}", f"expected JSON: {error}") from error
    for place, problem in _problems(found):
        raise DocumentError(path, place, problem)
    return found


def write(document: Document, path: Path) -> None:
    """Write a document so that people can read it."""
    fields: dict[str, Any] = {"version": VERSION} | msgspec.to_builtins(document)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(fields), indent=1) + b"\n")


def inventory_of(node: NodeEntry, unit_bytes: int) -> Inventory:
    """Give a node's GPUs; raise InventoryError where a live node's annotation cannot be read."""
    if node.inventory:
        return inventories.decode(node.inventory)
    gpus: list[GPU] = []
    for described in node.gpus:
        usable = parse_bytes(described.memory) // unit_bytes * unit_bytes
        for _ in range(described.count):
            index = len(gpus)
            gpus.append(
                GPU(
                    uuid=described.uuid or f"{node.name}/{index}",
                    index=index,
                    model=described.model,
                    total_bytes=usable,
                    usable_bytes=usable,
                    mode=described.mode,
                    mps_pipe=f"/run/mps/{node.name}" if described.mode is Mode.MPS else "",
                    health=Health.HEALTHY if described.healthy else Health.UNHEALTHY,
                )
            )
    return Inventory(generation=0, unit_bytes=unit_bytes, gpus=tuple(gpus))


def kube_node(node: NodeEntry, document: Document, lost: Collection[int] = ()) -> Node:
    """Make the Node that a device plugin and a kubelet would show; GPUs of the indices in *lost* are unhealthy."""
    names, unit = document.names, document.unit_bytes
    text, units = node.inventory, 0
    try:
        inventory = inventory_of(node, unit)
    except inventories.InventoryError:
        pass  # the ledger refuses the node for what stands there
    else:
        gpus = tuple(
            msgspec.structs.replace(gpu, health=Health.UNHEALTHY) if gpu.index in lost else gpu
            for gpu in inventory.gpus
        )
        text = inventories.encode(msgspec.structs.replace(inventory, gpus=gpus)) if gpus else ""
        units = sum(gpu.usable_bytes for gpu in gpus if gpu.family is Family.MEMORY) // unit
    return Node(
        metadata=Node.Metadata(
            name=node.name, annotations={names.inventory: text} if text else None, labels=node.labels or None
        ),
        status=Node.Status(allocatable={"cpu": node.cpu, "memory": node.memory, names.gpu_mem: units}),
    )


def kube_pod(pod: PodEntry, document: Document, *, bound: bool = False) -> Pod:
    """Make the Pod that the API server would show, as it waits, or *bound* where the document has it."""
    names = document.names
    wishes = {
        names.gpu_count: str(pod.gpu_count) if pod.gpu_count != 1 else "",
        names.isolation: pod.isolation,
        names.gpu_model: ",".join(pod.models),
        names.gpu_uuid: ",".join(pod.uuids),
        names.policy: pod.policy,
        names.grant: pod.grant if bound else "",
    }
    asking = pod.containers
    if pod.gpu_mem is not None:
        asking = (Asking(name="main", gpu_mem=pod.gpu_mem), *asking)
    kinds: dict[str, list[Container]] = {"main": [], "init": []}
    for one in asking:
        resources = Resources(limits={names.gpu_mem: one.gpu_mem}, requests={names.gpu_mem: one.gpu_mem})
        always = "Always" if one.role == "sidecar" else None
        kinds["main" if one.role == "main" else "init"].append(
            Container(name=one.name, resources=resources, restart_policy=always)
        )
    return Pod(
        metadata=Metadata(
            name=pod.name,
            namespace=pod.namespace,
            uid=pod.identity,
            annotations={key: value for key, value in wishes.items() if value},
        ),
        spec=Spec(
            containers=tuple(kinds["main"]) or (Container(name="main"),),
            init_containers=tuple(kinds["init"]) or None,
            node_name=pod.node if bound and pod.node else None,
            scheduler_name=pod.scheduler or None,
            # as one sum, which a pod may name since Kubernetes 1.34
            resources=Resources(requests={"cpu": pod.cpu, "memory": pod.memory}),
        ),
    )


def request(pod: PodEntry, document: Document) -> PodRequest:
    """Say what a pod asks, one that asks no GPU memory included; raise RequestError for what cannot be asked."""
    made = kube_pod(pod, document)
    asked = parse(made, document.names, document.unit_bytes)
    return asked or PodRequest(containers=(), wishes=Wishes(), compute=requests(made))


def _place(message: str) -> tuple[str, str]:
    """Turn msgspec's message into a place and a sentence."""
    what, _, where = message.partition(" - at `")
    sentence = what.replace("`", "'")
    return where.rstrip("`") or "$", sentence[:1].lower() + sentence[1:]


def _problems(found: Document) -> Iterable[tuple[str, str]]:
    """Find what the types alone do not: the first problem is enough."""
    if found.version != VERSION:
        yield "$.version", f"expected {VERSION}, not {found.version}"
        return
    try:
        Names(found.domain)
        if found.unit_bytes < MIB or found.unit_bytes % MIB:
            raise ValueError(f"expected whole MiB, such as 1GiB, not {found.unit!r}")
    except ValueError as error:
        yield "$.unit or $.domain", str(error)
        return
    if not found.nodes:
        yield "$.nodes", "expected at least one node"
    nodes: dict[str, NodeEntry] = {}
    for n, node in enumerate(found.nodes):
        yield from _node_problems(f"$.nodes[{n}]", node, found.unit_bytes)
        if node.name in nodes:
            yield f"$.nodes[{n}].name", f"expected a name that no other node has, not {node.name!r}"
        nodes[node.name] = node
    seen: set[str] = set()
    for n, pod in enumerate(found.pods):
        yield from _pod_problems(f"$.pods[{n}]", pod, found, nodes)
        if pod.identity in seen:
            yield f"$.pods[{n}].name", f"expected a name or UID that no other pod has, not {pod.identity!r}"
        seen.add(pod.identity)
    for n, event in enumerate(found.events):
        yield from _event_problems(f"$.events[{n}]", event, found, nodes)


def _event_problems(
    place: str, event: Event, found: Document, nodes: dict[str, NodeEntry]
) -> Iterable[tuple[str, str]]:
    node = nodes.get(event.node)
    if node is None:
        yield f"{place}.node", f"expected the name of a node, not {event.node!r}"
    elif event.gpu is not None:
        try:
            gpus = inventory_of(node, found.unit_bytes).gpus
        except inventories.InventoryError as error:
            yield f"{place}.gpu", f"expected a node whose GPUs can be read: {error}"
            return
        if event.gpu not in {gpu.index for gpu in gpus}:
            yield f"{place}.gpu", f"expected the index of a GPU that {event.node} has, not {event.gpu}"


def _node_problems(place: str, node: NodeEntry, unit_bytes: int) -> Iterable[tuple[str, str]]:
    for key in ("cpu", "memory"):
        yield from _amount_problems(f"{place}.{key}", getattr(node, key))
    for n, gpu in enumerate(node.gpus):
        try:
            usable = parse_bytes(gpu.memory)
        except ValueError as error:
            yield f"{place}.gpus[{n}].memory", f"expected an amount such as 80GiB: {error}"
            continue
        if not unit_bytes <= usable <= inventories.MAX_GPU_BYTES:
            yield f"{place}.gpus[{n}].memory", f"expected at least one unit, and less than 1 EiB, not {gpu.memory!r}"
        if gpu.uuid and gpu.count > 1:
            yield f"{place}.gpus[{n}].count", f"expected 1 for a GPU with a uuid, not {gpu.count}"
        if gpu.mode in {Mode.MIG, Mode.EXCLUSIVE}:
            yield f"{place}.gpus[{n}].mode", f"expected time-slicing or mps, not {gpu.mode}"
    uuids = [gpu.uuid for gpu in node.gpus if gpu.uuid]
    if len(set(uuids)) < len(uuids) or sum(gpu.count for gpu in node.gpus) > 64:  # noqa: PLR2004
        yield f"{place}.gpus", "expected at most 64 GPUs, each with a uuid of its own"


def _pod_problems(
    place: str, pod: PodEntry, document: Document, nodes: dict[str, NodeEntry]
) -> Iterable[tuple[str, str]]:
    for key in ("cpu", "memory"):
        yield from _amount_problems(f"{place}.{key}", getattr(pod, key))
    if pod.gpu_mem is not None and pod.containers:
        yield f"{place}.gpuMem", "expected either gpuMem or containers"
    for n, one in enumerate(pod.containers):
        if one.role not in {"main", "init", "sidecar"}:
            yield f"{place}.containers[{n}].role", f"expected main, init or sidecar, not {one.role!r}"
    if pod.departure is not None and pod.departure < pod.arrival:
        yield f"{place}.departure", f"expected no less than its arrival, {pod.arrival:g}, not {pod.departure:g}"
    if pod.node and pod.node not in nodes:
        yield f"{place}.node", f"expected the name of a node, not {pod.node!r}"
    if pod.grant and not pod.node:
        yield f"{place}.grant", "expected a node beside the grant"
    if not pod.node:
        try:
            request(pod, document)
        except (RequestError, ValueError) as error:
            yield place, str(error)


def _amount_problems(place: str, amount: Quantity) -> Iterable[tuple[str, str]]:
    try:
        checked(amount)
    except ValueError as error:
        yield place, str(error)
