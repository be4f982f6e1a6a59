"""`cotenant sweep`: policies beside each other, over traces and seeds."""

import os
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import click

from cotenant.cli.simulate import read
from cotenant.simulator.sweep import Summary, Task, run, summarise, write_csv

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
    plot: Path | None,
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
    try:
        out.mkdir(parents=True, exist_ok=True)
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
                folder=out,
            )
            for (name, path), policy, seed in product(zip(names, traces, strict=True), policies, seeds)
        ]
        with click.progressbar(length=len(tasks), label="replays", file=sys.stderr) as bar:
            results = run(tasks, workers=os.cpu_count() or 1, progress=bar.update)
        found = summarise(results)
        write_csv(found, out / "summary.csv")
        if plot is not None:
            from cotenant.simulator.plot import curves  # noqa: PLC0415 - matplotlib is optional, and slow to import

            curves([report for _, report in results], plot)
    except OSError as error:
        raise click.ClickException(str(error)) from error
    except ImportError as error:
        raise click.ClickException(f"--plot needs matplotlib: install cotenant[plots] ({error})") from error
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
