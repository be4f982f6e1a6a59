"""Many replays at once, over all cores; each is kept on disk, so that a sweep goes on where it ended."""

import csv
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from hashlib import blake2b
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev

import msgspec

from cotenant.simulator.replay import replay
from cotenant.simulator.report import Report, report
from cotenant.simulator.trace import draw_order, read_nodes, read_order, read_pods

_COLUMNS = ("100", "130")


class Task(msgspec.Struct, frozen=True):
    """Name one replay, and where its report is kept."""

    trace: str
    nodes: Path
    pods: Path
    sequence: Path | None
    policy: str
    seed: int
    ratio: float
    sample: bool
    folder: Path

    @property
    def target(self) -> Path:
        """Name the file of its report; other inputs give another name, so that no stale report is taken for it."""
        digest = blake2b(f"{self.ratio} {self.sample}".encode(), digest_size=6)
        for path in (self.nodes, self.pods, self.sequence):
            digest.update(path.read_bytes() if path is not None else b"drawn")
        return self.folder / f"{self.trace}-{self.policy}-{self.seed}-{digest.hexdigest()}.json"


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


def run(
    tasks: Sequence[Task], *, workers: int, progress: Callable[[int], None] = lambda _count: None
) -> list[tuple[Task, Report]]:
    """Replay what has no report yet, and give all reports in the order of *tasks*; raise what a replay raises."""
    found: dict[Task, Report] = {}
    missing = []
    for task in tasks:
        kept = _kept(task.target)
        if kept is None:
            missing.append(task)
        else:
            found[task] = kept
            progress(1)
    # Read by the processes to come. The arrays are small: more threads would only get in each other's way.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if missing:
        with ProcessPoolExecutor(min(workers, len(missing)), get_context("spawn")) as pool:
            waiting = {pool.submit(_replay, task): task for task in missing}
            try:
                for done in as_completed(waiting):
                    found[waiting[done]] = done.result()
                    progress(1)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    return [(task, found[task]) for task in tasks]


def summarise(results: Iterable[tuple[Task, Report]]) -> list[Summary]:
    """Average over seeds, in the order in which traces and policies came."""
    grouped: defaultdict[tuple[str, str], list[Report]] = defaultdict(list)
    for task, found in results:
        grouped[task.trace, task.policy].append(found)
    return [_summary(trace, policy, reports) for (trace, policy), reports in grouped.items()]


def write_csv(summaries: Sequence[Summary], path: Path) -> None:
    """Write a row for each summary."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, Summary.__struct_fields__)
        writer.writeheader()
        writer.writerows(msgspec.structs.asdict(summary) for summary in summaries)


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


def _replay(task: Task) -> Report:
    nodes = read_nodes(task.nodes)
    pods = read_pods(task.pods, nodes)
    if task.sequence is None:
        order = draw_order(pods, nodes, seed=task.seed, ratio=task.ratio)
    else:
        order = read_order(task.sequence, nodes=len(nodes), pods=len(pods))
    done = replay(nodes, pods, order, task.policy, sample=task.sample)
    found = report(done, policy=task.policy, seed=task.seed)
    # whole or not at all, whenever the sweep is ended
    unfinished = task.target.with_suffix(".part")
    unfinished.write_bytes(msgspec.json.encode(found))
    unfinished.replace(task.target)
    return found


def _kept(path: Path) -> Report | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Report)
    except (FileNotFoundError, msgspec.DecodeError):
        return None
