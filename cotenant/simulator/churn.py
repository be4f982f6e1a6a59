"""Pods that come and go: a trace's pods and lifetimes, arriving at random, on a cluster that is in use already."""

from collections.abc import Mapping, Sequence
from math import inf, sqrt
from pathlib import Path
from statistics import mean, stdev

import msgspec
import numpy as np

from cotenant.simulator import cluster
from cotenant.simulator.relocation import Mover
from cotenant.simulator.scheduler import Scheduler
from cotenant.simulator.timeline import Job, Timeline
from cotenant.simulator.times import TimesReport, times_report
from cotenant.simulator.trace import MILLI, TraceError, TraceNode, TracePod, read_lives, read_nodes, read_pods
from extender.placement.learning import WINDOW
from extender.policies.mix import Mix

# The two-sided 95 percent quantile of Student's t, by degrees of freedom; beyond, it is that of the normal distribution
# and two terms more (Abramowitz and Stegun 26.7.5), which is right to a thousandth.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
_NORMAL = 1.959964


def fewer(nodes: Sequence[TraceNode], every: int) -> list[TraceNode]:
    """Keep one of *every* nodes of each kind, so that the cluster is smaller and of the same mixture."""
    alike = sorted(nodes, key=lambda node: (node.model, node.gpus, node.cpu_milli, node.memory_mib, node.name))
    return sorted(alike[:: max(1, every)], key=lambda node: node.name)


def draw(
    nodes: Sequence[TraceNode],
    pods: Sequence[TracePod],
    lives: Sequence[float],
    *,
    load: float,
    hours: float,
    seed: int,
    together: bool = False,
    drift: Sequence[TracePod] = (),
) -> list[Job]:
    """Draw pods that come at random times (Poisson) for so many hours, and those that are there when it begins.

    *load* is what they would hold together if all fitted, as a part of the cluster. *lives* are the seconds each of
    *pods* ran for; a pod drawn gets its own where *together*, else that of another, so that the mix of what is there is
    the trace's. Those in the beginning are the ones that a cluster without end or limits would have: long lives are as
    much likelier as they are longer, and part of each is over.

    With *drift* more and more of those that come are of these pods instead: none in the beginning, all in the end. The
    rate at which pods come is such that what they ask stays the load.
    """
    random = np.random.default_rng(seed)
    work = np.array(lives, float)
    milli = np.array([pod.milli for pod in pods], float)
    asked = (milli * work).mean() if together else milli.mean() * work.mean()
    capacity = load * MILLI * sum(node.gpus for node in nodes)
    a_second = capacity / asked
    residents = random.poisson(a_second * work.mean())
    arrivals = random.poisson(a_second * hours * 3600)
    requests = [cluster.request(pod) for pod in pods]

    longer = random.choice(len(work), residents, p=work / work.sum())
    which = longer if together else random.integers(len(pods), size=residents)
    jobs = [
        Job(f"resident-{n}", pods[pod].kind, requests[pod], 0.0, life)
        for n, (pod, life) in enumerate(zip(which, random.random(residents) * work[longer], strict=True))
    ]
    which = random.integers(len(pods), size=arrivals)
    living = which if together else random.integers(len(pods), size=arrivals)
    times = np.sort(random.random(arrivals)) * hours * 3600
    jobs += [
        Job(f"arrival-{n}", pods[pod].kind, requests[pod], float(at), float(work[life]))
        for n, (pod, life, at) in enumerate(zip(which, living, times, strict=True))
    ]
    return _drifted(jobs, drift, asked=float(milli.mean()), until=hours * 3600, random=random) if drift else jobs


def _drifted(
    jobs: Sequence[Job], drift: Sequence[TracePod], *, asked: float, until: float, random: np.random.Generator
) -> list[Job]:
    """Put pods of *drift* in the place of more and more of *jobs*.

    Those ask another amount of GPU than the *asked* milli of the others: so each comes in the place of as many as make
    the load stay, on average.
    """
    times = asked / float(np.mean([pod.milli for pod in drift]))
    requests = [cluster.request(pod) for pod in drift]
    found: list[Job] = []
    for job in jobs:
        if job.arrival == 0 or random.random() >= job.arrival / until:
            found.append(job)
            continue
        for n in range(int(times + random.random())):
            pod = int(random.integers(len(drift)))
            kind, request = drift[pod].kind, requests[pod]
            found.append(msgspec.structs.replace(job, uid=f"{job.uid}-{n}", kind=kind, request=request))
    return found


class Churn(msgspec.Struct, frozen=True):
    """Name one play: an errand.

    *warm* is the part of the hours that is not measured. *drift* is the trace that pods are of more and more. No life
    is longer than *longest* hours. With *learn*, *window* pods are what the mix is learned from. With *relocate* pods
    are moved for those that fit nowhere.
    """

    nodes: Path
    pods: Path
    policy: str
    load: float
    seed: int
    hours: float
    every: int = 1
    together: bool = False
    learn: bool = False
    warm: float = 0.1
    drift: Path | None = None
    longest: float = inf
    window: int = WINDOW
    relocate: bool = False

    @property
    def inputs(self) -> tuple[Path, ...]:
        """Name the files that it reads."""
        return (self.nodes, self.pods) if self.drift is None else (self.nodes, self.pods, self.drift)

    @property
    def title(self) -> str:
        """Name it."""
        return f"churn-{self.policy.replace('/', '+')}-{self.load:g}-{self.seed}"

    @property
    def sign(self) -> str:
        """Say what else decides the report."""
        sign = f"{self.policy} {self.load} {self.hours} {self.every} {self.together} {self.learn} {self.warm}"
        more = (self.drift is not None, self.longest, self.window, self.relocate)
        # as before there were these, so that what was kept then still counts
        return sign if more == (False, inf, WINDOW, False) else f"{sign} {more}"

    def at(self, inputs: Mapping[Path, Path]) -> "Churn":
        """Give the same play on copies of its files."""
        drift = None if self.drift is None else inputs[self.drift]
        return msgspec.structs.replace(self, nodes=inputs[self.nodes], pods=inputs[self.pods], drift=drift)

    def work(self) -> TimesReport:
        """Play."""
        everything = read_nodes(self.nodes)
        pods = read_pods(self.pods, everything)
        lives = read_lives(self.pods, pods)
        nodes = fewer(everything, self.every)
        usable = [n for n, pod in enumerate(pods) if _possible(pod, nodes)]
        if not any(lives[n] and pods[n].milli for n in usable):
            expected = "expected pods that live, ask GPUs, and fit the nodes kept"
            raise TraceError(self.pods, 1, "deletion_time", expected)
        pods, lives = [pods[n] for n in usable], [min(lives[n], self.longest * 3600) for n in usable]
        drift = [] if self.drift is None else read_pods(self.drift, everything)
        drift = [pod for pod in drift if _possible(pod, nodes)]
        if self.drift is not None and not any(pod.milli for pod in drift):
            raise TraceError(self.drift, 1, "num_gpu", "expected pods that ask GPUs, and fit the nodes kept")
        jobs = draw(
            nodes,
            pods,
            lives,
            load=self.load,
            hours=self.hours,
            seed=self.seed,
            together=self.together,
            drift=drift,
        )
        mix = Mix.of(pod.pod_class for pod in pods)
        order = np.random.default_rng(self.seed).permutation(len(nodes))
        ranks = {node.name: int(rank) for node, rank in zip(nodes, order, strict=True)}
        scheduler = Scheduler(
            cluster.new_ledger(nodes),
            self.policy,
            ranks=ranks,
            mix=None if self.learn else mix,
            learn=self.learn,
            window=self.window,
        )
        until = self.hours * 3600
        mover = Mover(scheduler) if self.relocate else None
        played = Timeline(scheduler, mix, mover=mover).play(jobs, until=until)
        return times_report(played, policy=self.policy, seed=self.seed, since=self.warm * until)


def _possible(pod: TracePod, nodes: Sequence[TraceNode]) -> bool:
    return any(
        node.cpu_milli >= pod.cpu_milli
        and node.memory_mib >= pod.memory_mib
        and node.gpus >= pod.gpus
        and (not pod.models or node.model in pod.models)
        for node in nodes
    )


class Point(msgspec.Struct, frozen=True):
    """Hold one policy at one load over its seeds: means, and half the width of their 95 percent intervals.

    The differences are to the first policy, seed by seed, which tells policies apart better than the means do.
    """

    policy: str
    load: float
    seeds: int
    allocation: float
    allocation_half: float
    allocation_difference: float
    allocation_difference_half: float
    waited_minutes: float
    waited_minutes_half: float
    waited_difference: float
    waited_difference_half: float
    waited_share_minutes: float
    waited_8_minutes: float
    waiting: float
    fragmentation: float
    unplaced: float
    decision_p50_ms: float
    moves: float


def points(results: Sequence[tuple[Churn, TimesReport]]) -> list[Point]:
    """Average over seeds, policies and loads in the order they came."""
    found: dict[tuple[str, float], dict[int, TimesReport]] = {}
    for churn, report in results:
        found.setdefault((churn.policy, churn.load), {})[churn.seed] = report
    first = results[0][0].policy if results else ""
    return [_point(policy, load, reports, found[first, load]) for (policy, load), reports in found.items()]


def _point(policy: str, load: float, reports: dict[int, TimesReport], first: dict[int, TimesReport]) -> Point:
    def minutes(kind: str) -> float:
        of_kind = [r.waited_s_by_kind[kind]["mean"] / 60 for r in reports.values() if kind in r.waited_s_by_kind]
        return round(mean(of_kind), 2) if of_kind else 0.0

    seeds = [seed for seed in reports if seed in first]
    allocation = [r.allocation for r in reports.values()]
    waited = [r.waited_s["mean"] / 60 for r in reports.values()]
    gained = [reports[seed].allocation - first[seed].allocation for seed in seeds]
    longer = [(reports[seed].waited_s["mean"] - first[seed].waited_s["mean"]) / 60 for seed in seeds]
    return Point(
        policy=policy,
        load=load,
        seeds=len(reports),
        allocation=round(mean(allocation), 3),
        allocation_half=half_width(allocation),
        allocation_difference=round(mean(gained), 3),
        allocation_difference_half=half_width(gained),
        waited_minutes=round(mean(waited), 3),
        waited_minutes_half=half_width(waited),
        waited_difference=round(mean(longer), 3),
        waited_difference_half=half_width(longer),
        waited_share_minutes=minutes("share"),
        waited_8_minutes=minutes("8"),
        waiting=round(mean(r.waiting for r in reports.values()), 2),
        fragmentation=round(mean(r.fragmentation for r in reports.values()), 3),
        unplaced=round(mean(sum(r.unplaced.values()) for r in reports.values()), 1),
        decision_p50_ms=round(mean(r.decision_ms["p50"] for r in reports.values()), 3),
        moves=round(mean(r.moves for r in reports.values()), 1),
    )


def half_width(values: Sequence[float]) -> float:
    """Give half the width of the 95 percent interval of a mean, by Student's t; 0 for a single value."""
    freedom = len(values) - 1
    if freedom < 1:
        return 0.0
    quantile = _STUDENT[freedom - 1] if freedom <= len(_STUDENT) else _beyond(freedom)
    return round(quantile * stdev(values) / sqrt(len(values)), 3)


def _beyond(freedom: int) -> float:
    first, second = (_NORMAL**3 + _NORMAL) / 4, (5 * _NORMAL**5 + 16 * _NORMAL**3 + 3 * _NORMAL) / 96
    return _NORMAL + first / freedom + second / freedom**2
