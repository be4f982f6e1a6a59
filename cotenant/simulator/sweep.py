"""Policies beside each other, over traces and seeds: what to replay, and what the replays say together."""

import csv
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

import msgspec

from cotenant.simulator.replay import replay
from cotenant.simulator.report import Report, report
from cotenant.simulator.trace import draw_order, read_nodes, read_order, read_pods

_COLUMNS = ("100", "130")


class Task(msgspec.Struct, frozen=True):
    """Name one replay."""

    trace: str
    nodes: Path
    pods: Path
    sequence: Path | None
    policy: str
    seed: int
    ratio: float
    sample: bool

    @property
    def inputs(self) -> tuple[Path, ...]:
        """Name the files that it reads."""
        return (self.nodes, self.pods) if self.sequence is None else (self.nodes, self.pods, self.sequence)

    @property
    def title(self) -> str:
        """Name it."""
        return f"{self.trace}-{self.policy.replace('/', '+')}-{self.seed}"

    @property
    def sign(self) -> str:
        """Say what else decides the report."""
        return f"{self.ratio} {self.sample} {self.policy}"

    def at(self, inputs: Mapping[Path, Path]) -> "Task":
        """Give the same replay on copies of its files."""
        sequence = inputs[self.sequence] if self.sequence is not None else None
        return msgspec.structs.replace(self, nodes=inputs[self.nodes], pods=inputs[self.pods], sequence=sequence)

    def work(self) -> Report:
        """Replay."""
        nodes = read_nodes(self.nodes)
        pods = read_pods(self.pods, nodes)
        if self.sequence is None:
            order = draw_order(pods, nodes, seed=self.seed, ratio=self.ratio)
        else:
            order = read_order(self.sequence, nodes=len(nodes), pods=len(pods))
        done = replay(nodes, pods, order, self.policy, sample=self.sample)
        return report(done, policy=self.policy, seed=self.seed)


class Summary(msgspec.Struct, frozen=True):
    """Hold one policy's figures on one trace over its seeds: means, and the standard deviation of allocation."""

    trace: str
    policy: str
    seeds: int
    allocation_100: float
    deviation_100: float
    allocation_130: float
    deviation_130: float
    fragmentation_100: float
    dropped_share: float
    dropped_1: float
    dropped_8: float
    decision_p50_ms: float
    seconds: float


def summarise(results: Iterable[tuple[Task, Report]]) -> list[Summary]:
    """Average over seeds, in the order in which traces and policies came."""
    grouped: defaultdict[tuple[str, str], list[Report]] = defaultdict(list)
    for task, found in results:
        grouped[task.trace, task.policy].append(found)
    return [_summary(trace, policy, reports) for (trace, policy), reports in grouped.items()]


def write_csv(rows: Sequence[msgspec.Struct], path: Path) -> None:
    """Write a row for each of *rows*, which are of one type."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].__struct_fields__ if rows else ())
        writer.writeheader()
        writer.writerows(msgspec.structs.asdict(row) for row in rows)


def _summary(trace: str, policy: str, reports: list[Report]) -> Summary:
    def average(values: Iterable[float]) -> float:
        return round(mean(values), 3)

    def at(curve: str, column: str) -> list[float]:
        # a trace may end before that much has arrived: its last column then
        curves: list[dict[str, float]] = [getattr(found, curve) for found in reports]
        return [values.get(column, list(values.values())[-1]) for values in curves]

    def spread(values: list[float]) -> float:
        return round(stdev(values), 3) if len(values) > 1 else 0.0

    first, last = (at("allocation", column) for column in _COLUMNS)
    return Summary(
        trace=trace,
        policy=policy,
        seeds=len(reports),
        allocation_100=average(first),
        deviation_100=spread(first),
        allocation_130=average(last),
        deviation_130=spread(last),
        fragmentation_100=average(at("fragmentation", "100")),
        dropped_share=average(found.dropped.get("share", 0.0) for found in reports),
        dropped_1=average(found.dropped.get("1", 0.0) for found in reports),
        dropped_8=average(found.dropped.get("8", 0.0) for found in reports),
        decision_p50_ms=average(found.decision_ms["p50"] for found in reports),
        seconds=average(found.seconds for found in reports),
    )
