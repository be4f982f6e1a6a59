"""What device ids cost on the real kubelet: `python -m e2e.measure_ids [--ids N ...] [--json FILE]`, as root.

For each number of ids it joins a fresh node, has a plugin advertise them, gives nearly all of them to pods of equal
size that then sleep, and measures: how long a pod takes to run, what the kubelet writes while nothing happens, how
large a pod object gets, how long List takes from inside Allocate, and how long after a killed kubelet a new pod runs.

The record of the decision it served: docs/decisions/0001-device-ids.md.
"""

import json
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from cotenant.contract.units import device_ids
from e2e.audit import Write
from e2e.cluster import ControlPlane
from e2e.node import RealNode, container, pod
from e2e.plugin import ScriptedPlugin
from e2e.processes import wait_until
from e2e.rest import Api, Object

RESOURCE = "cotenant.io/gpu-mem"
GPUS = 8
ONE_AT_A_TIME = 5
"""Pods bound one after the other, each awaited; the rest is bound in one burst."""

SETTLE_S = 95.0
"""From the last pod's start until idle writes are counted.

A pod's first resync, at most 90 s after its start (kubelet/pod_workers.go, resyncInterval and its jitter), writes its
status once more, whatever it holds; only what comes after that is written for nothing.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one number of ids cost. Seconds unless the name says otherwise; None: not within the patience given."""

    ids: int
    pods: int
    ids_per_pod: int
    health_status: bool
    """Whether the kubelet's ResourceHealthStatus was on, as it is by default: pod status then lists every id."""
    advertised: float | None
    """From the plugin's registration until the Node's allocatable shows every id (status period: 10 s)."""
    pod_alone: float | None
    """From the binding until the pod runs, one pod at a time: the median."""
    pod_in_burst: float | None
    """The same for all other pods bound at once, divided by their number."""
    list_ms: float
    """PodResources List from inside GetPreferredAllocation and Allocate: the median of all calls."""
    list_slowest_ms: float
    idle_pod_writes_per_minute: float
    idle_kubelet_cpu_percent: float
    pod_object_kib: float
    restart_registered: float | None
    """From the kill of the kubelet until the plugin's new registration is answered."""
    restart_pod: float | None
    """From the same until a pod runs that was bound right after the registration."""
    restart_node: float | None
    """From the same until the Node shows every id allocatable; asked once that pod runs."""


class _Run:
    """One number of ids on one fresh node."""

    def __init__(self, node: RealNode, plugin: ScriptedPlugin, *, ids: int, pods: int, patience_s: float) -> None:
        self._api: Api = node.control_plane.api()
        self._node, self._plugin = node, plugin
        self._ids, self._pods, self._patience_s = ids, pods, patience_s
        self._per_pod = (ids - 1) // pods  # one is left for the pod that is bound after the restart

    def measure(self, *, idle_s: float, health: bool) -> Cost:
        """Measure everything; `idle_s` is how long nothing happens while writes are counted."""
        start = time.monotonic()
        self._wait("Node", self._node.name, self._shows_all)
        advertised = self._since(start)
        alone = [self._run_pod(f"alone-{number}", self._per_pod) for number in range(ONE_AT_A_TIME)]
        burst = self._burst(self._pods - ONE_AT_A_TIME)
        time.sleep(SETTLE_S)
        writes, cpu = self._idle(idle_s)
        kept = len(json.dumps(self._api.get("Pod", "alone-0")))
        lists = [seconds * 1e3 for seconds in self._plugin.list_seconds]
        return Cost(
            ids=self._ids,
            pods=self._pods,
            ids_per_pod=self._per_pod,
            health_status=health,
            advertised=advertised,
            pod_alone=_median(alone),
            pod_in_burst=burst,
            list_ms=round(statistics.median(lists), 1),
            list_slowest_ms=round(max(lists), 1),
            idle_pod_writes_per_minute=round(len(writes) / idle_s * 60, 1),
            idle_kubelet_cpu_percent=round(cpu / idle_s * 100, 1),
            pod_object_kib=round(kept / 1024, 1),
            **self._restart(),
        )

    def _burst(self, count: int) -> float | None:
        names = [f"burst-{number}" for number in range(count)]
        for name in names:
            self._api.create(self._pod(name, self._per_pod))
        start = time.monotonic()
        for name in names:
            self._api.bind(name, self._node.name)
        if not all(self._wait("Pod", name, _runs) for name in names):
            return None
        return round((time.monotonic() - start) / count, 3)

    def _idle(self, seconds: float) -> tuple[list[Write], float]:
        """Return the kubelet's writes to pods, and the CPU seconds it used, while nothing happens."""
        cluster = self._node.control_plane
        _, offset = cluster.audit()
        before = self._node.kubelet_cpu_seconds()
        time.sleep(seconds)
        used = self._node.kubelet_cpu_seconds() - before
        writes, _ = cluster.audit(offset=offset)
        return [write for write in writes if write.resource == "pods"], used

    def _restart(self) -> dict[str, float | None]:
        registrations = len(self._plugin.registrations)
        start = time.monotonic()
        self._node.restart_kubelet()
        wait_until(lambda: len(self._plugin.registrations) > registrations, timeout_s=self._patience_s)
        registered = self._since(start)
        ran = self._since(start) if self._run_pod("after-restart", 1) is not None else None
        self._wait("Node", self._node.name, self._shows_all)
        return {
            "restart_registered": registered,
            "restart_pod": ran,
            "restart_node": self._since(start),
        }

    def _pod(self, name: str, ids: int) -> Object:
        return pod(name, container(limits={RESOURCE: ids}))

    def _run_pod(self, name: str, ids: int) -> float | None:
        self._api.create(self._pod(name, ids))
        start = time.monotonic()
        self._api.bind(name, self._node.name)
        return self._since(start) if self._wait("Pod", name, _runs) else None

    def _wait(self, kind: str, name: str, condition: Callable[[Object | None], bool]) -> bool:
        """Wait within the patience given; raise RuntimeError for a pod that failed, since then nothing here counts."""
        try:
            found = self._api.wait(
                kind, name, lambda seen: condition(seen) or _failed(seen), timeout_s=self._patience_s
            )
        except TimeoutError:
            return False
        if _failed(found):
            raise RuntimeError(f"{kind} {name} failed: {found['status'].get('message')}")
        return True

    def _shows_all(self, node: Object | None) -> bool:
        return node is not None and node["status"].get("allocatable", {}).get(RESOURCE) == str(self._ids)

    def _since(self, start: float) -> float | None:
        seconds = time.monotonic() - start
        return round(seconds, 2) if seconds < self._patience_s else None


def _runs(seen: Object | None) -> bool:
    return seen is not None and seen["status"].get("phase") == "Running"


def _failed(seen: Object | None) -> bool:
    return seen is not None and seen["status"].get("phase") == "Failed"


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(statistics.median(known), 2) if len(known) == len(values) else None


def measure(ids: int, *, pods: int, idle_s: float, patience_s: float, health: bool, directory: Path) -> Cost:
    """Measure one number of ids on a control plane and a node of its own, which lie in `directory`."""
    each = -(-ids // GPUS)
    names = [name for gpu in range(GPUS) for name in device_ids(f"GPU-{gpu}", each)][:ids]
    # The second gate needs the first: a kubelet that has the first alone turned off ends at once.
    kubelet = {"featureGates": {"ResourceHealthStatus": health, "ResourceHealthStatusMessage": health}}
    with (
        ControlPlane(directory / "control-plane") as cluster,
        RealNode(cluster, directory / "node", kubelet=kubelet) as node,
        ScriptedPlugin(RESOURCE, names, pod_resources=node.pod_resources_socket) as plugin,
    ):
        run = _Run(node, plugin, ids=ids, pods=pods, patience_s=patience_s)
        return run.measure(idle_s=idle_s, health=health)


def table(costs: Sequence[Cost]) -> str:
    """Write the costs as a Markdown table, one column for each number of ids."""
    rows = [asdict(cost) for cost in costs]
    lines = [
        [name.replace("_", " "), *("-" if row[name] is None else f"{row[name]:,}" for row in rows)] for name in rows[0]
    ]
    lines.insert(1, ["---", *("---:" for _ in rows)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@click.command()
@click.option("--ids", multiple=True, type=int, default=(41, 1120, 2240, 4480, 8960, 20480), show_default=True)
@click.option("--pods", default=40, show_default=True, help="How many pods share the ids.")
@click.option(
    "--idle",
    default=120.0,
    show_default=True,
    help="Seconds for which nothing happens while writes are counted.",
)
@click.option("--patience", default=240.0, show_default=True, help="Seconds after which one wait is given up.")
@click.option(
    "--health/--no-health", default=True, show_default=True, help="The kubelet's feature gate ResourceHealthStatus."
)
@click.option(
    "--json",
    "output",
    type=click.Path(path_type=Path),
    help="Where to write the figures, after each number of ids.",
)
def main(*, ids: Sequence[int], pods: int, idle: float, patience: float, health: bool, output: Path | None) -> None:
    """Measure what device ids cost on the real kubelet."""
    if pods <= ONE_AT_A_TIME or min(ids) <= pods:
        raise click.UsageError(f"there must be more pods than {ONE_AT_A_TIME}, and more ids than pods")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    costs: list[Cost] = []
    for number in ids:
        with tempfile.TemporaryDirectory(prefix="cotenant-ids-") as directory:
            try:
                cost = measure(
                    number, pods=pods, idle_s=idle, patience_s=patience, health=health, directory=Path(directory)
                )
            except RuntimeError as error:
                click.echo(f"{number} ids: {error}", err=True)
                continue
        click.echo(str(cost), err=True)
        costs.append(cost)
        if output is not None:
            output.write_text(json.dumps([asdict(cost) for cost in costs], indent=1) + "\n")
    if costs:
        click.echo(table(costs))


if __name__ == "__main__":
    main()
