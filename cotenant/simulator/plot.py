"""Pictures of simulations. The only module that knows matplotlib, which is optional: the extra `plots`."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from cotenant.simulator.churn import Point
from cotenant.simulator.report import Report
from cotenant.simulator.times import TimesReport
from extender.policies.table import MILLI

# Told apart by people who see no red or green, too (Okabe and Ito).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999", "#8C6D31")
_FREE = LinearSegmentedColormap.from_list("free", ["#0072B2", "#9ecae1", "#fdae61", "#e34a33", "#67001f"])


def curves(reports: Sequence[Report], path: Path) -> None:
    """Draw allocation and fragmentation against arrived load, a line for each policy; raise OSError, ImportError.

    Several reports of one policy are its mean, with the range between the least and the most as a band. The file's
    name says the format: .svg, .png or .pdf.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for colour, (policy, several) in zip(_cycle(), _by_policy(reports).items(), strict=False):
        for axes, curve in ((left, "allocation"), (right, "fragmentation")):
            found: list[dict[str, float]] = [getattr(one, curve) for one in several]
            columns = [column for column in found[0] if all(column in values for values in found)]
            table = np.array([[values[column] for column in columns] for values in found])
            _line(axes, [int(column) for column in columns], table, policy, colour)
    left.set_ylabel("allocated, % of all GPUs")
    right.set_ylabel("fragmented, % of all GPUs")
    for axes in (left, right):
        axes.set_xlabel("arrived, % of all GPUs")
        axes.grid(alpha=0.3)
    # where policies part: below that all lie on one line
    if any(int(column) > 90 for one in reports for column in one.allocation):  # noqa: PLR2004
        near = left.inset_axes((0.50, 0.10, 0.47, 0.45))
        for line in left.lines:
            near.plot(line.get_xdata(), line.get_ydata(), color=line.get_color(), linewidth=1)
        late = (values for one in reports for column, values in one.allocation.items() if int(column) >= 98)  # noqa: PLR2004
        near.set_xlim(80, 130)
        near.set_ylim(min([79, *late]) - 1, 100)
        near.tick_params(labelsize="x-small")
        near.grid(alpha=0.3)
    left.legend(loc="upper left", fontsize="small")
    _save(figure, path)


def latency(reports: Sequence[Report], path: Path) -> None:
    """Draw how long choosing a node took: which part of the choices took less than so long."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for colour, (policy, several) in zip(_cycle(), _by_policy(reports).items(), strict=False):
        found = np.median([one.decision_curve_ms for one in several if one.decision_curve_ms], axis=0)
        axes.plot(found, np.arange(101), label=policy, color=colour, linewidth=1.4)
    axes.set_xscale("log")
    axes.set_xlabel("milliseconds to choose a node and a GPU")
    axes.set_ylabel("choices that took less, %")
    axes.grid(alpha=0.3, which="both")
    axes.legend(loc="lower right", fontsize="small")
    _save(figure, path)


def strips(reports: Sequence[Report], path: Path) -> None:
    """Draw every GPU as it was in the end: a column for each node, a cell for each of its GPUs, by what is free."""
    figure = Figure(figsize=(11, 0.6 + 1.3 * len(reports)), layout="constrained")
    rows = figure.subplots(len(reports), 1, squeeze=False)[:, 0]
    image = None
    for axes, one in zip(rows, reports, strict=True):
        nodes = sorted((sorted(left) for left in one.left if left), key=lambda left: (len(left), sum(left)))
        most = max(map(len, nodes), default=1)
        cells = np.full((most, len(nodes)), np.nan)
        for n, left in enumerate(nodes):
            cells[: len(left), n] = left
        image = axes.imshow(
            cells / MILLI * 100, aspect="auto", origin="lower", cmap=_FREE, vmin=0, vmax=100, interpolation="nearest"
        )
        free = sum(map(sum, nodes)) / MILLI
        slivers = sum(1 for left in nodes for milli in left if 0 < milli < MILLI)
        idle = sum(1 for left in nodes for milli in left if milli == MILLI)
        axes.set_title(
            f"{one.policy}: {free:.1f} GPUs' worth free, on {idle} empty and {slivers} partly used ones",
            fontsize="small",
            loc="left",
        )
        axes.set_yticks([])
        axes.set_ylabel("GPUs", fontsize="small")
    rows[-1].set_xlabel("nodes, by their number of GPUs and by what is free", fontsize="small")
    if image is not None:
        figure.colorbar(image, ax=list(rows), label="free, % of the GPU")
    _save(figure, path)


def moments(reports: Sequence[TimesReport], path: Path) -> None:
    """Draw allocation, fragmentation and what waits over time."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    rows = figure.subplots(3, 1, sharex=True)
    for colour, one in zip(_cycle(), reports, strict=False):
        hours = np.array(one.moments["at_s"]) / 3600
        for axes, key in zip(rows, ("allocated", "fragmented", "waiting"), strict=True):
            axes.step(hours, one.moments[key], where="post", color=colour, linewidth=1.2, label=one.policy)
    for axes, label in zip(rows, ("allocated, %", "fragmented, %", "pods that wait"), strict=True):
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    rows[0].legend(loc="lower right", fontsize="small")
    rows[-1].set_xlabel("hours")
    _save(figure, path)


def churn(points: Sequence[Point], path: Path) -> None:
    """Draw allocation and waiting against load, with 95 percent intervals, and both beside the first policy's."""
    figure = Figure(figsize=(10, 7.5), layout="constrained")
    (allocated, gained), (waited, longer) = figure.subplots(2, 2)
    by_policy: defaultdict[str, list[Point]] = defaultdict(list)
    for one in points:
        by_policy[one.policy].append(one)
    for n, (colour, (policy, several)) in enumerate(zip(_cycle(), by_policy.items(), strict=False)):
        # side by side, so that the intervals can be told apart
        loads = [100 * one.load + 0.25 * (n - len(by_policy) / 2) for one in several]
        for axes, name in (
            (allocated, "allocation"),
            (gained, "allocation_difference"),
            (waited, "waited_minutes"),
            (longer, "waited_difference"),
        ):
            values = [getattr(one, name) for one in several]
            halves = [getattr(one, f"{name}_half") for one in several]
            axes.errorbar(
                loads, values, halves, color=colour, label=policy, marker="o", markersize=3, capsize=2, linewidth=1
            )
    first = points[0].policy if points else ""
    for axes, label in (
        (allocated, "allocated, % of all GPUs"),
        (gained, f"allocated, less what {first} does, points"),
        (waited, "mean wait, minutes"),
        (longer, f"mean wait, less that of {first}, minutes"),
    ):
        axes.set_ylabel(label, fontsize="small")
        axes.set_xlabel("load, % of all GPUs", fontsize="small")
        axes.grid(alpha=0.3)
    waited.set_yscale("symlog", linthresh=1)
    waited.set_ylim(bottom=0)
    longer.set_yscale("symlog", linthresh=1)
    allocated.legend(loc="upper left", fontsize="x-small")
    _save(figure, path)


def _line(
    axes: Axes, at: Sequence[float], table: "np.ndarray[tuple[int, int], np.dtype[np.float64]]", label: str, colour: str
) -> None:
    axes.plot(at, table.mean(axis=0), label=label, color=colour, linewidth=1.4)
    if len(table) > 1:
        axes.fill_between(at, table.min(axis=0), table.max(axis=0), color=colour, alpha=0.2, linewidth=0)


def _by_policy(reports: Sequence[Report]) -> dict[str, list[Report]]:
    found: defaultdict[str, list[Report]] = defaultdict(list)
    for one in reports:
        found[one.policy].append(one)
    return found


def _cycle() -> Sequence[str]:
    return _COLOURS * 10


def _save(figure: Figure, path: Path) -> None:
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:  # a format that it does not know
        raise OSError(f"{path}: {error}") from error
