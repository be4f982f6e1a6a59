"""From a document to what can be played: a scheduler on its nodes, its pods as jobs, its losses."""

from collections.abc import Collection
from math import inf
from random import Random

import msgspec

from cotenant.contract.request import PodRequest, RequestError
from cotenant.simulator.document import (
    Document,
    NodeEntry,
    PodEntry,
    Taint,
    Toleration,
    kube_node,
    kube_pod,
    request,
)
from cotenant.simulator.scheduler import Scheduler
from cotenant.simulator.timeline import Job, Loss
from extender.ledger import Ledger, Node
from extender.placement.choices import Choices
from extender.placement.fit import pieces
from extender.placement.learning import pod_class
from extender.policies import named
from extender.policies.mix import Mix
from extender.policies.table import Table


class Scene(msgspec.Struct, frozen=True):
    """Hold what a document says, ready to be played.

    *ledger* holds its nodes, and the pods that have a place already unless they are to be placed *afresh*. *jobs* are
    the others. *residents* are those that have a place, with its node, and that would be made anew were it lost: not a
    DaemonSet's, nor a static one, nor one of MIG instances. *refused* says of pods that no cluster could take why not.
    """

    document: Document
    ledger: Ledger
    mix: Mix
    jobs: tuple[Job, ...]
    residents: tuple[tuple[Job, str], ...]
    losses: tuple[Loss, ...]
    refused: dict[str, str]

    def scheduler(
        self, choices: Choices | str, *, seed: int = 0, sample: bool = False, learn: bool = False
    ) -> Scheduler:
        """Make a scheduler on the ledger; the seed says which node comes first where several are equal."""
        names = sorted(node.name for node in self.document.nodes)
        Random(seed).shuffle(names)  # noqa: S311
        ranks = {name: rank for rank, name in enumerate(names)}
        mix = None if learn else self.mix
        return Scheduler(self.ledger, choices, ranks=ranks, mix=mix, sample=sample, learn=learn)

    def node(self, name: str, lost: Collection[int]) -> Node:
        """Make a node anew, with these GPUs lost."""
        entry = next(node for node in self.document.nodes if node.name == name)
        return kube_node(entry, self.document, lost)


def scene(document: Document, *, afresh: bool = False) -> Scene:
    """Set the scene; with *afresh* all pods are to be placed anew, in the order they came."""
    ledger = Ledger(document.names, document.unit_bytes, labels={key for node in document.nodes for key in node.labels})
    for node in document.nodes:
        ledger.observe_node(kube_node(node, document))
    doors = Doors(document)
    jobs, residents, classes, refused = [], [], [], {}
    table = Table(ledger)
    for pod in document.pods:
        try:
            asked = request(pod, document)
            named(pod.policy or "binpack")
        except (RequestError, ValueError) as error:
            refused[pod.key] = str(error)
            asked = None
        if asked is not None:
            classes.append(pod_class(asked, table))
        if pod.node and not afresh:
            ledger.observe_pod(kube_pod(pod, document, bound=True))
            if asked is not None and _made_anew(pod, asked):
                residents.append((_job(pod, asked, table, doors), pod.node))
        elif asked is not None:
            jobs.append(_job(pod, asked, table, doors))
    losses = tuple(Loss(at=e.at, node=e.node, gpu=e.gpu, back=e.back) for e in document.events)
    return Scene(document, ledger, Mix.of(classes), tuple(jobs), tuple(residents), losses, refused)


def _made_anew(pod: PodEntry, asked: PodRequest) -> bool:
    """Tell whether a pod would come again elsewhere, asking what it asks."""
    with_instances = bool(pod.grant) and not asked.containers
    return not with_instances and pod.owner.partition("/")[0] not in {"DaemonSet", "Node"}


def kind(asked: PodRequest, table: Table) -> str:
    """Name a request's kind for reports: cpu, share, or its number of whole GPUs."""
    if not asked.containers:
        return "cpu"
    usable = table.usable_bytes[table.usable_bytes > 0]
    smallest = int(usable.min()) if usable.size else 0
    whole = asked.wishes.isolation.whole_gpu or max(pieces(asked)) >= smallest
    return str(asked.wishes.gpu_count) if whole else "share"


def _job(pod: PodEntry, asked: PodRequest, table: Table, doors: "Doors") -> Job:
    life = inf if pod.departure is None else pod.departure - pod.arrival
    return Job(pod.identity, kind(asked, table), asked, pod.arrival, life, doors.open_to(pod))


class Doors:
    """Know which nodes are open to which pods: cordons, taints and node selectors, as kube-scheduler judges them."""

    def __init__(self, document: Document) -> None:
        self._nodes = document.nodes
        self._plain = not any(node.cordoned or _repelling(node) for node in document.nodes)
        self._known: dict[object, frozenset[str]] = {}

    def open_to(self, pod: PodEntry) -> frozenset[str] | None:
        """Name the nodes that are open to a pod, None for all."""
        if self._plain and not pod.node_selector:
            return None
        key = tuple(sorted(pod.node_selector.items())), pod.tolerations
        if key not in self._known:
            self._known[key] = frozenset(node.name for node in self._nodes if _admits(node, pod))
        return self._known[key]


def _admits(node: NodeEntry, pod: PodEntry) -> bool:
    if node.cordoned or any(node.labels.get(key) != value for key, value in pod.node_selector.items()):
        return False
    return all(any(_tolerates(one, taint) for one in pod.tolerations) for taint in _repelling(node))


def _repelling(node: NodeEntry) -> list[Taint]:
    return [taint for taint in node.taints if taint.effect in {"NoSchedule", "NoExecute"}]


def _tolerates(toleration: Toleration, taint: Taint) -> bool:
    # k8s.io/api/core/v1/toleration.go, ToleratesTaint: an empty key with Exists is every taint, an empty effect all
    if toleration.effect not in {"", taint.effect} or toleration.key not in {"", taint.key}:
        return False
    if toleration.operator == "Exists":
        return True
    return toleration.key == taint.key and toleration.value == taint.value
