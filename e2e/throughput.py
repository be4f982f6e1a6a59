"""Measure how many pods a second a real kube-scheduler places, with and without us: `make throughput`.

Five ways side by side, in interleaved rounds of one run, since only ratios mean anything on a machine that others use:
no extender, one that decides nothing but binds (e2e.idle_extender), and Cotenant; the last two both returning all nodes
(advise) and one (decide). Prints a table, writes bench-results/throughput.json.
"""

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click
import yaml

from e2e import bench, nodes
from e2e.audit import Write
from e2e.cluster import ControlPlane
from e2e.processes import Program, free_ports, wait_until
from e2e.programs import SCHEDULER_CONFIG, RunningExtender
from e2e.rest import Api, Object

WAYS = ("no extender", "idle advise", "idle decide", "Cotenant advise", "Cotenant decide")
_CREATORS = 16
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Figures:
    """What one round of one way measured."""

    pods_per_s: float
    writes_per_pod: float
    extender_cpu_ms_per_pod: float


def asking(name: str, scheduler: str) -> Object:
    """Return a pod of 8 units as admission would leave it: with the resource that makes the scheduler call."""
    pod = bench.a_pod(name, 8)
    pod["spec"]["schedulerName"] = scheduler
    pod["spec"]["containers"][0]["resources"]["limits"][bench.NAMES.managed] = "0"
    return pod


def scheduler_config(name: str, listen: str | None) -> dict[str, Any]:
    """Return the configuration that we ship, for a scheduler of this name, with or without its extender."""
    config: dict[str, Any] = yaml.safe_load(SCHEDULER_CONFIG.read_text())
    config.pop("leaderElection")
    profile = config["profiles"][0]
    profile["schedulerName"] = name
    if listen is None:
        # what the extender's managedResources would say
        fit = next(one for one in profile["pluginConfig"] if one["name"] == "NodeResourcesFit")
        fit["args"]["ignoredResources"] = [bench.NAMES.managed]
        del config["extenders"]
    else:
        config["extenders"][0]["urlPrefix"] = f"http://{listen}"
    return config


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process (proc(5), utime and stime)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


class Measurement:
    """One control plane, measured round after round."""

    def __init__(self, cluster: ControlPlane, directory: Path, *, pods: int) -> None:
        """Measure on `cluster`, placing so many pods a round."""
        self._cluster = cluster
        self._directory = directory
        self._pods = pods
        self._rounds = 0

    def run(self, way: str) -> Figures:
        """Place the pods in one way, and remove them again."""
        self._rounds += 1
        name = f"round-{self._rounds}"
        directory = self._directory / name
        directory.mkdir(parents=True)
        decide = way.endswith("decide")
        if way == "no extender":
            return self._place(name, None, None)
        if way.startswith("Cotenant"):
            flags = [f"--placement={'decide' if decide else 'advise'}"]
            with RunningExtender(self._cluster, directory, flags=flags) as extender:
                return self._place(name, extender.listen, extender.program)
        listen = f"127.0.0.1:{free_ports(1)[0]}"
        kubeconfig = self._cluster.kubeconfig("extender")
        command: list[str | Path] = [
            sys.executable,
            "-m",
            "e2e.idle_extender",
            kubeconfig,
            listen,
            *(["--decide"] if decide else []),
        ]
        idle = Program(command, log=directory / "idle.log")
        try:
            idle.wait_ready(lambda: "ready" in idle.log.read_text())
            return self._place(name, listen, idle)
        finally:
            idle.stop()

    def _place(self, name: str, listen: str | None, extender: Program | None) -> Figures:
        api = self._cluster.api()
        names = [f"{name}-{n}" for n in range(self._pods)]
        # All pods are there before the scheduler starts, so that it never waits for the one who creates them.
        with ThreadPoolExecutor(_CREATORS) as pool:
            list(pool.map(lambda one: api.create(asking(one, name)), names))
        _, offset = self._cluster.audit()
        before = cpu_seconds(extender.pid) if extender else 0.0
        scheduler = self._cluster.start_scheduler(scheduler_config(name, listen))
        done = wait_until(lambda: len(self._bindings(offset, name)) >= self._pods, timeout_s=300, every_s=0.5)
        cpu = cpu_seconds(extender.pid) - before if extender else 0.0
        self._cluster.stop_scheduler(scheduler)
        bindings = self._bindings(offset, name)
        if not done:
            raise RuntimeError(f"{len(bindings)} of {self._pods} pods were bound in 300 s")
        writes = self._writes(offset, name)
        self._remove(api, names)
        seconds = (bindings[-1].at - bindings[0].at).total_seconds()
        return Figures(
            pods_per_s=(self._pods - 1) / seconds,
            writes_per_pod=len(writes) / self._pods,
            extender_cpu_ms_per_pod=cpu * 1e3 / self._pods,
        )

    def _writes(self, offset: int, name: str) -> list[Write]:
        """List the writes to this round's pods, Events left out, in the order they were answered."""
        writes, _ = self._cluster.audit(offset=offset)
        ours = [w for w in writes if w.resource == "pods" and w.name.startswith(f"{name}-") and w.verb != "delete"]
        return sorted(ours, key=lambda write: write.at)

    def _bindings(self, offset: int, name: str) -> list[Write]:
        return [w for w in self._writes(offset, name) if w.subresource == "binding" and w.code < 300]

    @staticmethod
    def _remove(api: Api, names: Sequence[str]) -> None:
        with ThreadPoolExecutor(_CREATORS) as pool:
            list(pool.map(lambda one: api.delete("Pod", one, grace_s=0), names))


@click.command()
@click.option("--nodes", "node_count", default=5000, show_default=True, help="Nodes of 8 GPUs of 80 GiB.")
@click.option("--bound", default=0, show_default=True, help="Pods bound beforehand.")
@click.option("--pods", default=1000, show_default=True, help="Pods that each round places.")
@click.option("--rounds", default=5, show_default=True, help="Rounds of each way.")
@click.option(
    "--out", default="bench-results", show_default=True, type=click.Path(path_type=Path), help="For the JSON."
)
def main(*, node_count: int, bound: int, pods: int, rounds: int, out: Path) -> None:
    """Measure pods a second."""
    figures: dict[str, list[Figures]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory(prefix="cotenant-throughput-") as scratch:
        directory = Path(scratch)
        with ControlPlane(directory / "control-plane") as cluster:
            api = cluster.api()
            nodes.register(api, node_count, nodes.Shape(), prefix="bench")
            bench.fill(api, bound)
            measurement = Measurement(cluster, directory, pods=pods)
            with click.progressbar(length=rounds * len(WAYS), label="rounds") as progress:
                for number in range(rounds):
                    # each round begins with another way, so that none is always the first
                    for way in WAYS[number % len(WAYS) :] + WAYS[: number % len(WAYS)]:
                        figures[way].append(measurement.run(way))
                        progress.update(1)
    report(figures, {"nodes": node_count, "bound": bound, "pods": pods, "rounds": rounds}, out)


def report(figures: dict[str, list[Figures]], settings: dict[str, int], out: Path) -> None:
    """Print the medians, and each way's ratio to its floor, and write all rounds."""
    rates = {way: [one.pods_per_s for one in measured] for way, measured in figures.items()}
    click.echo(f"\n{settings['nodes']} nodes, {settings['bound']} pods bound, {settings['pods']} placed a round")
    click.echo(f"{'':18}{'pods/s':>8}{'least':>8}{'most':>8}{'of none':>9}{'of idle':>9}{'writes':>8}{'CPU ms':>8}")
    for way in WAYS:
        floor = {"Cotenant advise": "idle advise", "Cotenant decide": "idle decide"}.get(way)
        # within a round, so that what else the machine does falls on both
        of_none = median(a / b for a, b in zip(rates[way], rates["no extender"], strict=True))
        of_idle = f"{median(a / b for a, b in zip(rates[way], rates[floor], strict=True)):9.2f}" if floor else f"{'':9}"
        writes = median(one.writes_per_pod for one in figures[way])
        cpu = median(one.extender_cpu_ms_per_pod for one in figures[way])
        click.echo(
            f"{way:18}{median(rates[way]):8.0f}{min(rates[way]):8.0f}{max(rates[way]):8.0f}"
            f"{of_none:9.2f}{of_idle}{writes:8.2f}{cpu:8.2f}"
        )
    out.mkdir(parents=True, exist_ok=True)
    target = out / "throughput.json"
    rounds = {way: [vars(one) for one in measured] for way, measured in figures.items()}
    target.write_text(json.dumps(settings | {"ways": rounds}, indent=2) + "\n")
    click.echo(f"\nwritten to {target}")


if __name__ == "__main__":
    main()
