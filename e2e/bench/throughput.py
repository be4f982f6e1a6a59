"""How many pods a second a real kube-scheduler places, with and without us.

Ways side by side, in interleaved rounds of one run, since only ratios mean anything on a machine that others use: no
extender; one that decides nothing but binds (idle_extender), on Flask as extenders in Python are, and on the server of
our own calls (lean); and Cotenant. All but the first both returning all nodes (advise) and one (decide).
"""

import sys
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import yaml

from e2e.audit import Write
from e2e.bench import load
from e2e.bench.histogram import quantiles_ms
from e2e.cluster import ControlPlane
from e2e.processes import Program, free_ports, wait_until
from e2e.programs import SCHEDULER_CONFIG, RunningExtender

# each way, and those that it is measured against
FLOORS = {f"Cotenant {mode}": (f"idle {mode}", f"lean idle {mode}") for mode in ("advise", "decide")}
# each beside what it is measured against, since the machine is not the same a minute later
WAYS = ("no extender", *(way for ours, (idle, lean) in FLOORS.items() for way in (idle, ours, lean)))
_PATIENCE_S = 300
# of what kube-scheduler itself counts: filters, extenders and scores of one pod; and all of that with the binding
_ALGORITHM = "scheduler_scheduling_algorithm_duration_seconds"
_ATTEMPT = "scheduler_scheduling_attempt_duration_seconds"
_VERBS = ("filter", "prioritize", "bind")


@dataclass(frozen=True)
class Round:
    """What one round of one way measured."""

    pods_per_s: float
    # writes to pods and bindings, of each pod, by whomever; and all other writes of the extender
    writes_per_pod: float
    other_writes_per_pod: float
    # of all programs, since they share the machine: what one of them does may be paid by another
    extender_cpu_ms_per_pod: float
    scheduler_cpu_ms_per_pod: float
    api_server_cpu_ms_per_pod: float
    etcd_cpu_ms_per_pod: float
    extender_mib: float
    # median, 99th percentile and mean: as kube-scheduler counts them, and each verb as the extender does
    algorithm: dict[str, float]
    attempt: dict[str, float]
    verbs: dict[str, dict[str, float]]


def measure(
    cluster: ControlPlane, directory: Path, *, pods: int, rounds: int, ways: Sequence[str]
) -> dict[str, list[Round]]:
    """Place so many pods a round, in each of *ways*, as often."""
    found: dict[str, list[Round]] = {way: [] for way in ways}
    with click.progressbar(length=rounds * len(ways), label="rounds of throughput") as progress:
        for number in range(rounds):
            # each round begins with another way, so that none is always the first
            for way in (*ways[number % len(ways) :], *ways[: number % len(ways)]):
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


@dataclass(frozen=True)
class _Running:
    """An extender that runs, or none: its process, where its verbs and where its metrics are."""

    program: Program | None = None
    listen: str | None = None
    metrics: str | None = None


@contextmanager
def extender_of(cluster: ControlPlane, directory: Path, way: str) -> Iterator[_Running]:
    """Run the extender of one way."""
    directory.mkdir(parents=True)
    decide = way.endswith("decide")
    if way == "no extender":
        yield _Running()
        return
    if way.startswith("Cotenant"):
        with RunningExtender(cluster, directory, flags=[f"--placement={'decide' if decide else 'advise'}"]) as extender:
            yield _Running(extender.program, extender.listen, extender.serve)
        return
    listen = f"127.0.0.1:{free_ports(1)[0]}"
    flags = [*(["--decide"] if decide else []), *(["--lean"] if way.startswith("lean") else [])]
    module = "e2e.bench.idle_extender"
    idle = Program(
        [sys.executable, "-m", module, cluster.kubeconfig("extender"), listen, *flags], log=directory / "idle.log"
    )
    try:
        idle.wait_ready(lambda: "ready" in idle.log.read_text())
        yield _Running(idle, listen)
    finally:
        idle.stop()


def _round(cluster: ControlPlane, directory: Path, way: str, name: str, pods: int) -> Round:
    api = cluster.api()
    names = [f"{name}-{n}" for n in range(pods)]
    with extender_of(cluster, directory, way) as running:
        # All pods are there before the scheduler starts, so that it never waits for the one who creates them.
        load.create(api, [load.for_scheduler(one, 8, name) for one in names])
        bindings = Bindings(cluster, f"{name}-")
        pid = running.program.pid if running.program else None
        scheduler = cluster.start_scheduler(scheduler_config(name, running.listen))
        # once the scheduler is ready, or what it reads at its start would be told of the pods
        pids = {"scheduler": scheduler.program.pid} | {one: cluster.pid(one) for one in ("kube-apiserver", "etcd")}
        pids |= {"extender": pid} if pid else {}
        before = {one: load.cpu_seconds(its) for one, its in pids.items()}
        bound = bindings.wait_for(pods)
        cpu = {one: (load.cpu_seconds(its) - before[one]) * 1e3 / pods for one, its in pids.items()}
        theirs = scheduler.metrics()
        verbs = _verbs(running.metrics) if running.metrics else {}
        mib = load.memory_mib(pid, "VmRSS") if pid else 0.0
        cluster.stop_scheduler(scheduler)
    load.remove(api, names)
    others = [w for w in bindings.all if "cotenant-extender" in w.user and w.resource != "pods"]
    return Round(
        pods_per_s=round((pods - 1) / _seconds(bound), 1),
        writes_per_pod=round(len(bindings.writes()) / pods, 3),
        other_writes_per_pod=round(len(others) / pods, 3),
        extender_cpu_ms_per_pod=round(cpu.get("extender", 0.0), 3),
        scheduler_cpu_ms_per_pod=round(cpu["scheduler"], 3),
        api_server_cpu_ms_per_pod=round(cpu["kube-apiserver"], 3),
        etcd_cpu_ms_per_pod=round(cpu["etcd"], 3),
        extender_mib=mib,
        algorithm=quantiles_ms(theirs, _ALGORITHM, {}),
        attempt=quantiles_ms(theirs, _ATTEMPT, {"result": "scheduled"}),
        verbs=verbs,
    )


def _seconds(bound: list[Write]) -> float:
    return (bound[-1].at - bound[0].at).total_seconds()


def _verbs(metrics: str) -> dict[str, dict[str, float]]:
    with urllib.request.urlopen(f"http://{metrics}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    name = "cotenant_extender_request_duration_seconds"
    return {verb: found for verb in _VERBS if (found := quantiles_ms(text, name, {"verb": verb, "outcome": "ok"}))}
