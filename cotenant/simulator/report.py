"""What a replay shows: allocation and fragmentation as pods arrive, and what was dropped."""

from collections import defaultdict

import msgspec
import numpy as np

from cotenant.simulator.replay import Run
from extender.policies.table import MILLI, Floats

LAST_COLUMN = 130


class Report(msgspec.Struct, frozen=True):
    """Hold the figures of one replay, as its JSON has them.

    allocation, fragmentation: percent of the cluster's GPUs by arrived percent ("0".."130").
    fragmentation_ratio: percent of what is free, likewise.
    dropped: percent of what pods of each kind asked for, by the time that 100 percent had arrived: GPUs, or CPU for
    the kind "cpu".
    unallocated_gpus: GPUs' worth that no pod holds, by arrived percent.
    decision_ms: median, 99th percentile and worst of choosing a node for a pod; decision_curve_ms: all percentiles.
    left: by node, the thousandths left free of each of its GPUs in the end.
    """

    policy: str
    seed: int
    allocation: dict[str, float]
    fragmentation: dict[str, float]
    fragmentation_ratio: dict[str, float]
    unallocated_gpus: dict[str, float]
    dropped: dict[str, float]
    arrivals: int
    placed: int
    decision_ms: dict[str, float]
    seconds: float
    decision_curve_ms: list[float] = []
    left: list[list[int]] = []


def report(run: Run, *, policy: str, seed: int) -> Report:
    """Work out the figures of *run*."""
    asked = np.array([pod.milli for pod in run.pods])
    arrived = np.cumsum(asked) / run.capacity_milli * 100
    kept = np.where(run.row >= 0, asked, 0)
    allocated = np.cumsum(kept) / run.capacity_milli * 100
    milliseconds = run.decisions * 1e3
    return Report(
        policy=policy,
        seed=seed,
        allocation=_columns(arrived, allocated),
        fragmentation=_columns(arrived, run.fragmentation / run.capacity_milli * 100),
        fragmentation_ratio=_columns(arrived, run.fragmentation / np.maximum(1, run.free) * 100),
        unallocated_gpus=_columns(arrived, (run.capacity_milli - np.cumsum(kept)) / MILLI),
        dropped=_dropped(run, arrived),
        arrivals=len(run.pods),
        placed=int((run.row >= 0).sum()),
        decision_ms={
            "p50": round(float(np.median(milliseconds)), 3),
            "p99": round(float(np.percentile(milliseconds, 99)), 3),
            "max": round(float(milliseconds.max()), 3),
        },
        seconds=round(run.seconds, 2),
        decision_curve_ms=np.round(np.percentile(milliseconds, np.arange(101)), 4).tolist(),
        left=run.left,
    )


def _columns(arrived: Floats, values: Floats) -> dict[str, float]:
    """Average *values*, rounded to hundredths, over the events at which so many percent had arrived, rounded."""
    column = np.round(arrived).astype(int)
    rounded = np.round(values, 2)
    return {str(n): round(float(rounded[column == n].mean()), 2) for n in range(LAST_COLUMN + 1) if (column == n).any()}


def _dropped(run: Run, arrived: Floats) -> dict[str, float]:
    asked: defaultdict[str, int] = defaultdict(int)
    dropped: defaultdict[str, int] = defaultdict(int)
    for pod, row, percent in zip(run.pods, run.row, arrived, strict=True):
        if percent > 100:  # noqa: PLR2004
            break
        amount = pod.milli or pod.cpu_milli
        asked[pod.kind] += amount
        dropped[pod.kind] += amount if row < 0 else 0
    return {kind: round(100 * dropped[kind] / amount, 4) for kind, amount in sorted(asked.items()) if amount}
