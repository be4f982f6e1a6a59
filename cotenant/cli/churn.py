"""`cotenant churn`: policies beside each other while pods come and go."""

import os
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import click

from cotenant.cli.simulate import check_folders, sentences
from cotenant.simulator.churn import Churn, Point, points
from cotenant.simulator.errands import Kept, run
from cotenant.simulator.sweep import write_csv
from cotenant.simulator.times import TimesReport
from cotenant.simulator.trace import read_lives, read_nodes, read_pods


def churn(
    *,
    nodes: Path,
    pods: Path,
    policies: Sequence[str],
    loads: Sequence[float],
    seeds: Sequence[int],
    hours: float,
    every: int,
    together: bool,
    longest: float,
    drift: Path | None,
    learn: bool,
    window: int,
    relocate: bool,
    out: Path,
    scheduler: str | None,
    plot: Path | None,
) -> None:
    """Play everything that *out* has no report of, print a table and write it as CSV."""
    with sentences():
        # what cannot be read is told before the first play, not after the last
        known = read_nodes(nodes)
        read_lives(pods, read_pods(pods, known))
        if drift is not None:
            read_pods(drift, known)
        out.mkdir(parents=True, exist_ok=True)
        check_folders(plot)
        plays = [
            Churn(
                nodes,
                pods,
                policy,
                load / 100,
                seed,
                hours,
                every,
                together=together,
                learn=learn,
                drift=drift,
                longest=longest,
                window=window,
                relocate=relocate,
            )
            for policy, load, seed in product(policies, loads, seeds)
        ]
        with click.progressbar(length=len(plays), label="plays", file=sys.stderr) as bar:
            reports = run(
                plays, Kept(out, TimesReport), workers=os.cpu_count() or 1, scheduler=scheduler, progress=bar.update
            )
        found = points(list(zip(plays, reports, strict=True)))
        write_csv(found, out / "churn.csv")
        if plot is not None:
            from cotenant.simulator import plot as plots  # noqa: PLC0415 - matplotlib is optional, and slow to import

            plots.churn(found, plot)
    click.echo(table(found))
    click.echo(f"\nwritten to {out / 'churn.csv'}")


def table(found: Sequence[Point]) -> str:
    """Write points for people."""
    less = f"less {found[0].policy}" if found else ""
    lines = [
        "".join(
            (f"{'':24}{'allocated, %':>18}{less:>24}{'waited, min':>20}{less:>24}", f"{'waiting':>10}{'moves':>8}")
        ),
    ]
    for one in found:
        cells = [
            f"{one.allocation:10.2f} ± {one.allocation_half:5.2f}",
            f"{one.allocation_difference:+16.2f} ± {one.allocation_difference_half:5.2f}",
            f"{one.waited_minutes:12.2f} ± {one.waited_minutes_half:5.2f}",
            f"{one.waited_difference:+16.2f} ± {one.waited_difference_half:5.2f}",
        ]
        lines.append(
            f"{one.load * 100:4.0f} % {one.policy:17}" + "".join(cells) + f"{one.waiting:10.1f}{one.moves:8.0f}"
        )
    return "\n".join(lines)
