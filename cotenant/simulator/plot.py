"""Pictures of replays. The only module that knows matplotlib, which is optional: cotenant[plots]."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from cotenant.simulator.report import Report


def curves(reports: Sequence[Report], path: Path) -> None:
    """Draw allocation and fragmentation against arrived load, one line per report; raise OSError, ImportError.

    The file's name says the format: .svg, .png or .pdf.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for found in reports:
        label = f"{found.policy} ({found.seed})"
        for axes, values in ((left, found.allocation), (right, found.fragmentation)):
            axes.plot([int(column) for column in values], list(values.values()), label=label, linewidth=1.2)
    left.set_ylabel("allocated, % of all GPUs")
    right.set_ylabel("fragmented, % of all GPUs")
    for axes in (left, right):
        axes.set_xlabel("arrived, % of all GPUs")
        axes.grid(alpha=0.3)
    left.legend(loc="lower right", fontsize="small")
    try:
        figure.savefig(path)
    except ValueError as error:  # a format that it does not know
        raise OSError(f"{path}: {error}") from error
