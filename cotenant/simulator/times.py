"""What a trace with times shows: how much was allocated, and how long pods waited."""

from collections import defaultdict

import msgspec
import numpy as np

from cotenant.simulator.timeline import Played
from extender.policies.table import Floats


class TimesReport(msgspec.Struct, frozen=True):
    """Hold the figures of one play, as its JSON has them.

    allocation: percent of all GPU memory, mean over the time that was measured. fragmentation, waiting: percent, and
    how many pods wait, mean over the moments of that time. waited_s: mean, median, 95th and 99th percentile and worst
    of the seconds that pods waited, those that wait still as far as they have; by kind likewise. unplaced: how many
    wait still, by kind. decision_ms as in a report without times. moments: seconds, allocated, fragmented and waiting
    pods of each moment. moves: how many pods were moved for others.
    """

    policy: str
    seed: int
    hours: float
    pods: int
    allocation: float
    fragmentation: float
    waiting: float
    waited_s: dict[str, float]
    waited_s_by_kind: dict[str, dict[str, float]]
    unplaced: dict[str, int]
    restarts: int
    decision_ms: dict[str, float]
    seconds: float
    moments: dict[str, list[float]]
    moves: int = 0


def times_report(played: Played, *, policy: str, seed: int, since: float = 0.0) -> TimesReport:
    """Work out the figures of what came and was seen after *since* seconds."""
    counted = np.array([job.arrival >= since for job in played.jobs], bool)
    seen = played.at >= since
    by_kind: defaultdict[str, list[float]] = defaultdict(list)
    unplaced: defaultdict[str, int] = defaultdict(int)
    for job, counts, waited, started in zip(played.jobs, counted, played.waited, played.started, strict=True):
        if counts:
            by_kind[job.kind].append(float(waited))
            unplaced[job.kind] += not np.isfinite(started)
    return TimesReport(
        policy=policy,
        seed=seed,
        hours=round(float(played.at[-1] - since) / 3600, 3),
        pods=int(counted.sum()),
        allocation=round(_mean(played.allocated_seconds[seen], played.at[seen]), 3),
        fragmentation=round(float(played.fragmented[seen].mean()), 3),
        waiting=round(float(played.waiting[seen].mean()), 2),
        waited_s=spread(played.waited[counted]),
        waited_s_by_kind={kind: spread(np.array(values)) for kind, values in sorted(by_kind.items())},
        unplaced={kind: number for kind, number in sorted(unplaced.items()) if number},
        restarts=played.restarts,
        decision_ms=spread(played.decisions * 1e3),
        seconds=round(played.seconds, 2),
        moments={
            "at_s": np.round(played.at, 1).tolist(),
            "allocated": np.round(played.allocated, 2).tolist(),
            "fragmented": np.round(played.fragmented, 2).tolist(),
            "waiting": played.waiting.tolist(),
        },
        moves=played.moves,
    )


def _mean(amount_seconds: Floats, at: Floats) -> float:
    return float((amount_seconds[-1] - amount_seconds[0]) / (at[-1] - at[0]))


def spread(values: Floats) -> dict[str, float]:
    """Give mean, median, 95th and 99th percentile and the most, to thousandths; zeros of none."""
    if not len(values):
        return dict.fromkeys(("mean", "p50", "p95", "p99", "max"), 0.0)
    p50, p95, p99 = np.percentile(values, (50, 95, 99))
    found = {"mean": values.mean(), "p50": p50, "p95": p95, "p99": p99, "max": values.max()}
    return {name: round(float(value), 3) for name, value in found.items()}
