"""`cotenant simulate`: what a policy would do with a trace."""

import sys
from pathlib import Path

import click
import msgspec

from cotenant.simulator.replay import replay
from cotenant.simulator.report import Report, report
from cotenant.simulator.trace import (
    Order,
    TraceError,
    TraceNode,
    TracePod,
    draw_order,
    read_nodes,
    read_order,
    read_pods,
)

# The columns that people compare policies by.
_SHOWN = ("50", "90", "95", "100", "110", "130")
_KINDS = {"cpu": "without GPUs", "share": "part of a GPU"}


def read(
    nodes: Path, pods: Path, sequence: Path | None, *, seed: int, ratio: float
) -> tuple[list[TraceNode], list[TracePod], Order]:
    """Read a trace; raise click.ClickException with a sentence where it cannot be read."""
    try:
        found = read_nodes(nodes)
        asking = read_pods(pods, found)
        if not any(node.gpus for node in found):
            raise click.ClickException(f"{nodes}: no node has a GPU, so there is nothing to allocate")
        if sequence is not None:
            return found, asking, read_order(sequence, nodes=len(found), pods=len(asking))
        return found, asking, draw_order(asking, found, seed=seed, ratio=ratio)
    except (TraceError, OSError) as error:
        raise click.ClickException(str(error)) from error


def run(
    *,
    nodes: Path,
    pods: Path,
    sequence: Path | None,
    policy: str,
    seed: int,
    ratio: float,
    sample: bool,
    json: Path | None,
    plot: Path | None,
) -> None:
    """Replay a trace, print the figures, and write them where that is asked for."""
    trace = read(nodes, pods, sequence, seed=seed, ratio=ratio)
    _, _, order = trace
    with click.progressbar(length=len(order.arrivals), label=policy, file=sys.stderr) as bar:
        done = replay(*trace, policy, sample=sample, progress=bar.update)
    found = report(done, policy=policy, seed=seed)
    try:
        if json is not None:
            json.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=2) + b"\n")
        if plot is not None:
            from cotenant.simulator.plot import curves  # noqa: PLC0415 - matplotlib is optional, and slow to import

            curves([found], plot)
    except OSError as error:
        raise click.ClickException(str(error)) from error
    except ImportError as error:
        raise click.ClickException(f"--plot needs matplotlib: install cotenant[plots] ({error})") from error
    click.echo(table(found))


def table(found: Report) -> str:
    """Write a report for people."""
    median, slow = found.decision_ms["p50"], found.decision_ms["p99"]
    lines = [
        f"{found.policy}, seed {found.seed}: {found.placed} of {found.arrivals} pods placed in {found.seconds} s",
        f"choosing a node took {median} ms (median), {slow} ms (99 of 100)",
        "",
        f"{'arrived, % of all GPUs':28}" + "".join(f"{column:>8}" for column in _SHOWN),
    ]
    for name, values in (
        ("allocated, %", found.allocation),
        ("fragmented, %", found.fragmentation),
        ("of what is free, %", found.fragmentation_ratio),
    ):
        cells = (f"{values[column]:8.2f}" if column in values else f"{'-':>8}" for column in _SHOWN)
        lines.append(f"{name:28}" + "".join(cells))
    lines += ["", f"{'dropped by 100 % arrived':28}{'%':>8}  of what pods of this kind asked"]
    for kind, percent in found.dropped.items():
        lines.append(f"{_KINDS.get(kind, f'{kind} GPU' + ('s' if kind != '1' else '')):28}{percent:8.2f}")
    return "\n".join(lines)
