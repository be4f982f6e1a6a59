"""`cotenant snapshot`: a live cluster as our JSON."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import click
import msgspec

from cotenant.cli.simulate import check_folders, sentences
from cotenant.cluster import Cluster, ClusterError, connect
from cotenant.cluster.listing import every
from cotenant.contract import inventory as inventories
from cotenant.contract.names import Names
from cotenant.contract.units import GIB, counted
from cotenant.simulator import document
from cotenant.simulator.snapshot import Taken, take


def snapshot(*, kubeconfig: str | None, context: str | None, names: Names, out: Path) -> None:
    """Write what a live cluster has and holds."""
    check_folders(out)
    with told(), connect(kubeconfig, context=context, pool_size=1) as live:
        taken = read_live(live, names)
        document.write(taken.document, out)
    complain(taken)
    found = taken.document
    bound = sum(bool(pod.node) for pod in found.pods)
    waiting = len(found.pods) - bound
    click.echo(
        f"{counted(len(found.nodes), 'node')} with GPUs, {counted(bound, 'pod')} on them and {waiting} waiting,"
        f" {counted(len(found.budgets), 'PodDisruptionBudget')}; written to {out}"
    )


def complain(taken: Taken) -> None:
    """Say what of a cluster could not be read."""
    for problem in taken.unreadable:
        click.echo(f"left out: {problem}", err=True)


@contextmanager
def told() -> Iterator[None]:
    """Turn what the API server and files say into the command's own error."""
    with sentences():
        try:
            yield
        except ClusterError as error:
            raise click.ClickException(error.sentence) from error


def read_live(live: Cluster, names: Names) -> Taken:
    """Read a live cluster; raise ClusterError."""
    nodes = [bytes(raw) for raw in every(live, "/api/v1/nodes")]
    return take(
        nodes,
        (bytes(raw) for raw in every(live, "/api/v1/pods")),
        (bytes(raw) for raw in every(live, "/apis/policy/v1/poddisruptionbudgets")),
        names=names,
        unit_bytes=_unit(nodes, names),
        at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


class _Metadata(msgspec.Struct, frozen=True):
    annotations: dict[str, str] | None = None


class _Annotated(msgspec.Struct, frozen=True):
    metadata: _Metadata = _Metadata()


def _unit(nodes: list[bytes], names: Names) -> int:
    """Give the unit that most device plugins of the cluster count in."""
    found: Counter[int] = Counter()
    for raw in nodes:
        try:
            annotations = msgspec.json.decode(raw, type=_Annotated).metadata.annotations or {}
            found[inventories.decode(annotations.get(names.inventory, "")).unit_bytes] += 1
        except (msgspec.MsgspecError, inventories.InventoryError):
            continue
    return found.most_common(1)[0][0] if found else GIB
