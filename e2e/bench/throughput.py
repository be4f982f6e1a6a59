"""How many pods a second a real kube-scheduler places, with and without us.

Five ways side by side, in interleaved rounds of one run, since only ratios mean anything on a machine that others use:
no extender, one that decides nothing but binds (idle_extender), and Cotenant; the last two both returning all nodes
(advise) and one (decide).
"""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import yaml

from e2e.audit import Write
from e2e.bench import load
from e2e.cluster import ControlPlane, Scheduler
from e2e.processes import Program, free_ports, wait_until
from e2e.programs import SCHEDULER_CONFIG, RunningExtender

FLOORS = {"Cotenant advise": "idle advise", "Cotenant decide": "idle decide"}
WAYS = ("no extender", *FLOORS.values(), *FLOORS)
_PATIENCE_S = 300
_ALGORITHM = "scheduler_scheduling_algorithm_duration_seconds"


@dataclass(frozen=True)
class Round:
    """What one round of one way measured."""

    pods_per_s: float
    # writes to pods and bindings, of each pod, by whomever; and all other writes of the extender
    writes_per_pod: float
    other_writes_per_pod: float
    # of what kube-scheduler itself counts: filters, extenders and scores of one pod, without the binding
    algorithm_ms: float
    extender_cpu_ms_per_pod: float
    scheduler_cpu_ms_per_pod: float


def measure(cluster: ControlPlane, directory: Path, *, pods: int, rounds: int) -> dict[str, list[Round]]:
    """Place so many pods a round, in all ways, as often."""
    found: dict[str, list[Round]] = {way: [] for way in WAYS}
    with click.progressbar(length=rounds * len(WAYS), label="rounds of throughput") as progress:
        for number in range(rounds):
            # each round begins with another way, so that none is always the first
            for way in WAYS[number % len(WAYS) :] + WAYS[: number % len(WAYS)]:
                name = f"{way.replace(' ', '-').lower()}-{number}"
                found[way].append(_round(cluster, directory / name, way, name, pods))
                progress.update(1)
    return found


def scheduler_config(name: str, listen: str | None) -> dict[str, Any]:
    """Return the configuration that we ship, for a scheduler of this name, with or without its extender."""
    config: dict[str, Any] = yaml.safe_load(SCHEDULER_CONFIG.read_text())
    config.pop("leaderElection")
    profile = config["profiles"][0]
    profile["schedulerName"] = name
    if listen is None:
        # what the extender's managedResources would say
        fit = next(one for one in profile["pluginConfig"] if one["name"] == "NodeResourcesFit")
        fit["args"]["ignoredResources"] = [load.NAMES.managed]
        del config["extenders"]
    else:
        config["extenders"][0]["urlPrefix"] = f"http://{listen}"
    return config


class Bindings:
    """Read the audit log as it grows: what was written to the pods whose names begin with *prefix*."""

    def __init__(self, cluster: ControlPlane, prefix: str) -> None:
        """Begin with what is written from now on."""
        self._cluster = cluster
        self._prefix = prefix
        _, self._offset = cluster.audit()
        self.all: list[Write] = []

    def read(self) -> list[Write]:
        """Return the Bindings so far that were accepted, the earliest first."""
        more, self._offset = self._cluster.audit(offset=self._offset)
        self.all += more
        return sorted(
            (w for w in self.writes() if w.subresource == "binding" and w.code < 300), key=lambda write: write.at
        )

    def writes(self) -> list[Write]:
        """Return what was written to the pods themselves, their creation and deletion left out."""
        ours = (w for w in self.all if w.resource == "pods" and w.name.startswith(self._prefix))
        return [w for w in ours if w.subresource or w.verb not in {"create", "delete"}]

    def wait_for(self, count: int) -> list[Write]:
        """Wait until so many are bound; raise RuntimeError where that takes too long."""
        if not wait_until(lambda: len(self.read()) >= count, timeout_s=_PATIENCE_S, every_s=0.25):
            raise RuntimeError(f"{len(self.read())} of {count} pods were bound in {_PATIENCE_S} s")
        return self.read()


@contextmanager
def extender_of(cluster: ControlPlane, directory: Path, way: str) -> Iterator[tuple[str | None, Program | None]]:
    """Run the extender of one way; give its address and its process, or neither."""
    directory.mkdir(parents=True)
    decide = way.endswith("decide")
    if way == "no extender":
        yield None, None
        return
    if way.startswith("Cotenant"):
        with RunningExtender(cluster, directory, flags=[f"--placement={'decide' if decide else 'advise'}"]) as extender:
            yield extender.listen, extender.program
        return
    listen = f"127.0.0.1:{free_ports(1)[0]}"
    flags = ["--decide"] if decide else []
    module = "e2e.bench.idle_extender"
    idle = Program(
        [sys.executable, "-m", module, cluster.kubeconfig("extender"), listen, *flags], log=directory / "idle.log"
    )
    try:
        idle.wait_ready(lambda: "ready" in idle.log.read_text())
        yield listen, idle
    finally:
        idle.stop()


def _round(cluster: ControlPlane, directory: Path, way: str, name: str, pods: int) -> Round:
    api = cluster.api()
    names = [f"{name}-{n}" for n in range(pods)]
    with extender_of(cluster, directory, way) as (listen, extender):
        # All pods are there before the scheduler starts, so that it never waits for the one who creates them.
        load.create(api, [load.for_scheduler(one, 8, name) for one in names])
        bindings = Bindings(cluster, f"{name}-")
        before = load.cpu_seconds(extender.pid) if extender else 0.0
        scheduler = cluster.start_scheduler(scheduler_config(name, listen))
        ready_cpu = load.cpu_seconds(scheduler.program.pid)
        bound = bindings.wait_for(pods)
        cpu = load.cpu_seconds(extender.pid) - before if extender else 0.0
        scheduler_cpu = load.cpu_seconds(scheduler.program.pid) - ready_cpu
        algorithm_s = _mean_algorithm_seconds(scheduler)
        cluster.stop_scheduler(scheduler)
    load.remove(api, names)
    others = [w for w in bindings.all if "cotenant-extender" in w.user and w.resource != "pods"]
    return Round(
        pods_per_s=round((pods - 1) / _seconds(bound), 1),
        writes_per_pod=round(len(bindings.writes()) / pods, 3),
        other_writes_per_pod=round(len(others) / pods, 3),
        algorithm_ms=round(algorithm_s * 1e3, 3),
        extender_cpu_ms_per_pod=round(cpu * 1e3 / pods, 3),
        scheduler_cpu_ms_per_pod=round(scheduler_cpu * 1e3 / pods, 3),
    )


def _seconds(bound: list[Write]) -> float:
    return (bound[-1].at - bound[0].at).total_seconds()


def _mean_algorithm_seconds(scheduler: Scheduler) -> float:
    text = scheduler.metrics()
    found = {
        part: float(match[1]) if (match := re.search(rf"^{_ALGORITHM}_{part} (\S+)$", text, re.MULTILINE)) else 0.0
        for part in ("sum", "count")
    }
    return found["sum"] / found["count"] if found["count"] else 0.0
