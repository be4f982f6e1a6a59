"""`cotenant plan`: what a cluster could take, and which pods to move for it."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import IO, Any

import click
import msgspec

from cotenant.cli import manifests
from cotenant.cli.plan_tables import fit_table, largest_table, moves_table, needed_table
from cotenant.cli.simulate import read_scene, sentences
from cotenant.cli.snapshot import complain, read_live, told
from cotenant.cluster import ApiError, Cluster, NotFound, connect
from cotenant.cluster.writes import evict, get_pod
from cotenant.contract import inventory as inventories
from cotenant.contract.inventory import Health
from cotenant.contract.names import Names
from cotenant.contract.request import PodRequest, RequestError
from cotenant.simulator import capacity, cluster, document
from cotenant.simulator.document import Asking, NodeEntry, PodEntry
from cotenant.simulator.manifest import read_template
from cotenant.simulator.moves import Move, Planner
from cotenant.simulator.scene import Doors, Scene, scene
from cotenant.simulator.scheduler import Scheduler
from cotenant.simulator.timeline import Job
from cotenant.simulator.trace import read_nodes, read_pods
from extender.ledger import Ledger
from extender.placement.choices import Choices
from extender.policies.mix import Mix

_POLL_SECONDS = 0.5


class Source:
    """Know where the cluster is read from: a snapshot, or live."""

    def __init__(self, *, snapshot: Path | None, kubeconfig: str | None, context: str | None, names: Names) -> None:
        self._snapshot = snapshot
        self._kubeconfig = kubeconfig
        self._context = context
        self._names = names

    def scene(self) -> Scene:
        """Read the cluster."""
        if self._snapshot is not None:
            return read_scene(self._snapshot)
        with told(), self.connect() as live:
            taken = read_live(live, self._names)
        complain(taken)
        if not taken.document.nodes:
            raise click.ClickException("no node of this cluster has an inventory, so there is nothing to plan")
        return scene(taken.document)

    def connect(self) -> Cluster:
        """Give the live cluster; raise click.UsageError where a snapshot was given."""
        if self._snapshot is not None:
            raise click.UsageError("--apply goes with a live cluster, not with --snapshot")
        return connect(self._kubeconfig, context=self._context, pool_size=1)


class Wanted(msgspec.Struct, frozen=True):
    """Hold what a deployment asks: its pod, and how many of them."""

    pod: PodEntry
    replicas: int

    def request(self, found: Scene) -> PodRequest:
        """Say it in bytes; raise click.ClickException for what cannot be asked."""
        try:
            return document.request(self.pod, found.document)
        except (RequestError, ValueError) as error:
            raise click.ClickException(f"{self.pod.name}: {error}") from error


def wanted(*, file: IO[str] | None, replicas: int | None, found: Scene, **asked: Any) -> Wanted | None:
    """Read what is asked for, from a manifest or from options; None where neither asks anything."""
    if file is not None:
        if any(value is not None and value != () for value in asked.values()):
            raise click.UsageError("give either --file or what a pod asks")
        try:
            pod, count = read_template(manifests.read(file.read()), found.document)
        except (OSError, ValueError) as error:
            raise click.ClickException(f"{file.name}: {error}") from error
        return Wanted(pod, replicas if replicas is not None else count)
    if asked["gpu_mem"] is None:
        if any(value is not None and value != () for value in asked.values()):
            raise click.UsageError("--gpu-mem says how many units a pod asks")
        return None
    return Wanted(
        PodEntry(
            name="pod",
            cpu=asked["cpu"] or 0,
            memory=asked["memory"] or 0,
            containers=(Asking(name="main", gpu_mem=asked["gpu_mem"]),),
            gpu_count=asked["gpu_count"] or 1,
            isolation=asked["isolation"] or "",
            models=tuple(asked["model"]),
            node_selector=dict(pair.split("=", 1) for pair in asked["selector"]),
        ),
        replicas if replicas is not None else 1,
    )


def fit(source: Source, *, choices: Choices, output: str, **asked: Any) -> None:
    """Say whether a deployment still fits, and where."""
    found = source.scene()
    deployment = wanted(found=found, **asked)
    if deployment is None:
        raise click.UsageError("give --gpu-mem, or --file with a manifest")
    request = deployment.request(found)
    among = Doors(found.document).open_to(deployment.pod)
    answer = capacity.fit(
        found.scheduler(choices), request, name=deployment.pod.name, replicas=deployment.replicas, among=among
    )
    click.echo(_json(answer) if output == "json" else fit_table(answer, request))
    if len(answer.spots) < answer.wanted:
        sys.exit(1)


def largest(source: Source, *, output: str) -> None:
    """Say the largest request that still fits, by model."""
    found = source.scene()
    closed = {node.name for node in found.document.nodes if node.cordoned}
    answer = capacity.largest(found.ledger, unit_bytes=found.document.unit_bytes, closed=closed)
    click.echo(_json(answer) if output == "json" else largest_table(answer, found.document.unit_bytes))


def moves(
    source: Source,
    *,
    choices: Choices,
    most: int,
    priority: int,
    apply: bool,
    patience: float,
    output: str,
    **asked: Any,
) -> None:
    """Plan moves, print them, and make them where that is asked for."""
    live = source.connect() if apply else None
    found = source.scene()
    deployment = wanted(found=found, replicas=None, **asked)
    planner = Planner(found, found.scheduler(choices), priority=priority)
    if deployment is not None:
        room = deployment.request(found)
        plan = planner.make_room(room, Doors(found.document).open_to(deployment.pod), most=most)
    else:
        with click.progressbar(length=most, label="moves", file=sys.stderr) as bar:
            plan = planner.defragment(most=most, progress=bar.update)
    click.echo(_json(plan) if output == "json" else moves_table(plan))
    if live is not None:
        with told(), live:
            make(live, plan.moves, patience=patience)
    elif plan.moves:
        click.echo("\nnothing was done: --apply evicts these pods, one after the other", err=True)
    if plan.fits is False:
        sys.exit(1)


def make(live: Cluster, planned: Sequence[Move], *, patience: float) -> None:
    """Evict pods one after the other, each once the last is gone; raise click.ClickException at the first refusal."""
    for n, move in enumerate(planned, start=1):
        where = f"move {n} of {len(planned)}, {move.namespace}/{move.name}"
        try:
            evict(live, namespace=move.namespace, name=move.name, uid=move.uid)
        except ApiError as error:
            raise click.ClickException(
                f"{where}, was refused, and the moves after it were not tried: {error.message}"
            ) from error
        ends = time.monotonic() + patience
        while not _gone(live, move):
            if time.monotonic() > ends:
                raise click.ClickException(f"{where}, is still there after {patience:g} s: no further one is evicted")
            time.sleep(_POLL_SECONDS)
        click.echo(f"{where}: evicted, and gone")


def _gone(live: Cluster, move: Move) -> bool:
    try:
        body = get_pod(live, namespace=move.namespace, name=move.name)
    except NotFound:
        return True
    # another pod of that name, as a StatefulSet makes it
    uid: str = msgspec.json.decode(body)["metadata"]["uid"]
    return uid != move.uid


def nodes(
    *,
    trace: Path | None,
    csv: tuple[Path, Path],
    like: str,
    choices: Choices,
    wait: float,
    most: int,
    seed: int,
    output: str,
) -> None:
    """Say how many nodes of a kind a trace needs."""
    jobs, mix, make_ledger = _from_trace(trace, like) if trace else _from_csv(*csv, like, seed)

    def scheduler(count: int) -> Scheduler:
        names = [f"{like}-{n:06}" for n in range(count)]
        order = list(range(count))
        Random(seed).shuffle(order)  # noqa: S311
        return Scheduler(make_ledger(names), choices, ranks=dict(zip(names, order, strict=True)), mix=mix)

    answer = capacity.needed(
        jobs, scheduler, mix, patience=wait, most=most, progress=lambda what: click.echo(f"trying {what}", err=True)
    )
    click.echo(_json(answer) if output == "json" else needed_table(answer, like, most=most, wait=wait))
    if answer.nodes < 0:
        sys.exit(1)


def _from_trace(trace: Path, like: str) -> tuple[list[Job], Mix, Any]:
    found = read_scene(trace, afresh=True)
    kind = next((node for node in found.document.nodes if node.name == like), None)
    if kind is None:
        raise click.BadParameter(f"{trace} has no node {like!r}", param_hint="--like")
    entry: NodeEntry = kind
    try:
        document.inventory_of(entry, found.document.unit_bytes)
    except inventories.InventoryError as error:
        raise click.BadParameter(f"{like}: {error}", param_hint="--like") from error

    def make(names: Sequence[str]) -> Ledger:
        ledger = Ledger(found.document.names, found.document.unit_bytes, labels=entry.labels)
        for name in names:
            ledger.observe_node(document.kube_node(_copy(entry, name, found.document.unit_bytes), found.document))
        return ledger

    # the nodes that a pod may go to are others than the trace's
    return [msgspec.structs.replace(job, nodes=None) for job in found.jobs], found.mix, make


def _copy(node: NodeEntry, name: str, unit_bytes: int) -> NodeEntry:
    """Give a new node of that kind: another name, GPUs with UUIDs of their own that are well, and nobody's yet."""
    there = document.inventory_of(node, unit_bytes)
    gpus = tuple(
        msgspec.structs.replace(gpu, uuid=f"{name}/{gpu.index}", health=Health.HEALTHY, foreign=None)
        for gpu in there.gpus
    )
    text = inventories.encode(msgspec.structs.replace(there, serving=True, gpus=gpus)) if gpus else ""
    return NodeEntry(name=name, cpu=node.cpu, memory=node.memory, labels=node.labels, inventory=text)


def _from_csv(nodes_csv: Path, pods_csv: Path, like: str, seed: int) -> tuple[list[Job], Mix, Any]:
    with sentences():
        found = read_nodes(nodes_csv)
        pods = read_pods(pods_csv, found)
    kind = next((node for node in found if node.name == like), None)
    if kind is None:
        raise click.BadParameter(f"{nodes_csv} has no node {like!r}", param_hint="--like")
    order = list(range(len(pods)))
    Random(seed).shuffle(order)  # noqa: S311
    requests = {pod: cluster.request(pod) for pod in set(pods)}
    jobs = [Job(pods[pod].name, pods[pod].kind, requests[pods[pod]], float(at)) for at, pod in enumerate(order)]

    def make(names: Sequence[str]) -> Ledger:
        return cluster.new_ledger([msgspec.structs.replace(kind, name=name) for name in names])

    return jobs, Mix.of(pod.pod_class for pod in pods), make


def _json(answer: object) -> str:
    return msgspec.json.format(msgspec.json.encode(answer), indent=2).decode()
