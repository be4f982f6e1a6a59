"""`cotenant sweep`: policies beside each other, over traces and seeds."""

import os
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import click

from cotenant.cli.simulate import check_folders, read, sentences
from cotenant.simulator.errands import Kept, run
from cotenant.simulator.report import Report
from cotenant.simulator.sweep import Summary, Task, summarise, write_csv

_PREFIX = "openb_pod_list_"


def sweep(
    *,
    nodes: Path,
    traces: Sequence[Path],
    sequences: Path | None,
    policies: Sequence[str],
    seeds: Sequence[int],
    ratio: float,
    sample: bool,
    out: Path,
    scheduler: str | None,
    plot: Path | None,
    latency: Path | None,
    strips: Path | None,
) -> None:
    """Replay everything that *out* has no report of, print a table and write it as CSV."""
    names = [path.stem.removeprefix(_PREFIX) for path in traces]
    if len(set(names)) != len(names):
        raise click.ClickException("two traces have files of one name, and so would their reports: rename one")
    orders = {
        (name, seed): sequences / f"{name}_{seed}.txt" if sequences is not None else None
        for name, seed in product(names, seeds)
    }
    # what cannot be read is told before the first replay, not after the last
    for name, path in zip(names, traces, strict=True):
        for seed in seeds if sequences is not None else seeds[:1]:
            read(nodes, path, orders[name, seed], seed=seed, ratio=ratio)
    with sentences():
        out.mkdir(parents=True, exist_ok=True)
        check_folders(plot, latency, strips)
        tasks = [
            Task(
                trace=name,
                nodes=nodes,
                pods=path,
                sequence=orders[name, seed],
                policy=policy,
                seed=seed,
                ratio=ratio,
                sample=sample,
            )
            for (name, path), policy, seed in product(zip(names, traces, strict=True), policies, seeds)
        ]
        with click.progressbar(length=len(tasks), label="replays", file=sys.stderr) as bar:
            reports = run(
                tasks, Kept(out, Report), workers=os.cpu_count() or 1, scheduler=scheduler, progress=bar.update
            )
        found = summarise(zip(tasks, reports, strict=True))
        write_csv(found, out / "summary.csv")
        if plot is not None or latency is not None or strips is not None:
            from cotenant.simulator import plot as plots  # noqa: PLC0415 - matplotlib is optional, and slow to import

            if plot is not None:
                plots.curves(reports, plot)
            if latency is not None:
                plots.latency(reports, latency)
            if strips is not None:
                # one for each policy: the first trace and seed
                first = {task.policy: one for task, one in reversed(list(zip(tasks, reports, strict=True)))}
                plots.strips([first[policy] for policy in policies], strips)
    click.echo(table(found))
    click.echo(f"\nwritten to {out / 'summary.csv'}")


def table(summaries: Sequence[Summary]) -> str:
    """Write summaries for people."""
    lines = [
        f"{'':32}{'allocated, % (deviation) at':>30}{'dropped by 100 %, % of its kind':>34}",
        f"{'trace':16}{'policy':18}{'100 %':>14}{'130 %':>14}{'share':>12}{'1 GPU':>11}{'8 GPUs':>11}",
    ]
    for one in summaries:
        first = f"{one.allocation_100:.2f} ({one.deviation_100:.2f})"
        last = f"{one.allocation_130:.2f} ({one.deviation_130:.2f})"
        drops = f"{one.dropped_share:12.2f}{one.dropped_1:11.2f}{one.dropped_8:11.2f}"
        lines.append(f"{one.trace:16}{one.policy:18}{first:>14}{last:>14}{drops}")
    return "\n".join(lines)
