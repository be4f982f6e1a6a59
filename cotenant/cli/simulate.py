"""`cotenant simulate`: what a policy would do with a trace."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import msgspec

from cotenant.contract.configuration import ConfigurationError, ExtenderConfiguration, load
from cotenant.contract.request import RequestError
from cotenant.contract.units import counted
from cotenant.simulator import document, scene
from cotenant.simulator.replay import replay
from cotenant.simulator.report import Report, report
from cotenant.simulator.timeline import Timeline
from cotenant.simulator.times import TimesReport, times_report
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
from extender.placement.choices import Choices
from extender.policies import PolicyError

# The columns that people compare policies by.
_SHOWN = ("50", "90", "95", "100", "110", "130")
_KINDS = {"cpu": "without GPUs", "share": "part of a GPU"}
# Pods that come at the very end are given this much longer, so that the last moment is seen.
_AFTER_SECONDS = 60.0


def read(
    nodes: Path, pods: Path, sequence: Path | None, *, seed: int, ratio: float
) -> tuple[list[TraceNode], list[TracePod], Order]:
    """Read a trace; raise click.ClickException with a sentence where it cannot be read."""
    with sentences():
        found = read_nodes(nodes)
        asking = read_pods(pods, found)
        if not any(node.gpus for node in found):
            raise click.ClickException(f"{nodes}: no node has a GPU, so there is nothing to allocate")
        if sequence is not None:
            return found, asking, read_order(sequence, nodes=len(found), pods=len(asking))
        return found, asking, draw_order(asking, found, seed=seed, ratio=ratio)


def read_scene(trace: Path, *, afresh: bool = False) -> scene.Scene:
    """Read a document; raise click.ClickException with a sentence where it cannot be read."""
    with sentences():
        found = scene.scene(document.read(trace), afresh=afresh)
    if not any(view.gpus for view in found.ledger.views()):
        raise click.ClickException(f"{trace}: no node has a GPU, so there is nothing to allocate")
    for pod, why in found.refused.items():
        click.echo(f"{pod} is left out: {why}", err=True)
    return found


def choices(policy: str | None, config: Path | None) -> Choices:
    """Say which policies place pods: an extender's configuration, whose `policy` the option stands for; or that alone.

    Raises click.ClickException for a bad configuration.
    """
    try:
        configuration = load(config, ExtenderConfiguration)
        if policy is not None:
            configuration = msgspec.structs.replace(configuration, policy=policy)
        return Choices.configured(configuration)
    except (ConfigurationError, PolicyError) as error:
        raise click.ClickException(str(error)) from error


@contextmanager
def sentences() -> Iterator[None]:
    """Turn what is raised for bad files, and for what is not installed, into the command's own error."""
    try:
        yield
    except (TraceError, RequestError, OSError) as error:
        raise click.ClickException(str(error)) from error
    except ImportError as error:
        sentence = "--scheduler needs Dask: pip install '.[dask]' in Cotenant's checkout"
        raise click.ClickException(f"{sentence} ({error})") from error


def check_folders(*paths: Path | None) -> None:
    """Refuse to begin what could not be written down in the end; raise click.ClickException for a missing folder."""
    for path in paths:
        if path is not None and not path.parent.is_dir():
            raise click.ClickException(f"{path}: there is no folder {path.parent}; make it, or name another")


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
    strips: Path | None,
) -> None:
    """Replay a trace, print the figures, and write them where that is asked for."""
    check_folders(json, plot, strips)
    trace = read(nodes, pods, sequence, seed=seed, ratio=ratio)
    _, _, order = trace
    with click.progressbar(length=len(order.arrivals), label=policy, file=sys.stderr) as bar:
        done = replay(*trace, policy, sample=sample, progress=bar.update)
    found = report(done, policy=policy, seed=seed)
    with sentences():
        _write(json, found)
        if plot is not None or strips is not None:
            from cotenant.simulator import plot as plots  # noqa: PLC0415 - matplotlib is optional, and slow to import

            if plot is not None:
                plots.curves([found], plot)
            if strips is not None:
                plots.strips([found], strips)
    click.echo(table(found))


def run_trace(
    *,
    trace: Path,
    choices: Choices,
    seed: int,
    sample: bool,
    afresh: bool,
    learn: bool,
    json: Path | None,
    plot: Path | None,
    strips: Path | None,
) -> None:
    """Play a document, print the figures, and write them where that is asked for."""
    if strips is not None:
        raise click.UsageError("--strips goes with --nodes and --pods")
    check_folders(json, plot)
    set_up = read_scene(trace, afresh=afresh)
    scheduler = set_up.scheduler(choices, seed=seed, sample=sample, learn=learn)
    times = [job.arrival for job in set_up.jobs] + [loss.at for loss in set_up.losses]
    known = [*set_up.jobs, *(job for job, _ in set_up.residents)]
    ends = [job.arrival + job.life for job in known if job.life < float("inf")]
    until = max([*times, *ends], default=0.0) + _AFTER_SECONDS
    with click.progressbar(length=len(set_up.jobs), label=choices.default, file=sys.stderr) as bar:
        played = Timeline(scheduler, set_up.mix, set_up.node).play(
            set_up.jobs, set_up.losses, residents=set_up.residents, until=until, progress=bar.update
        )
    found = times_report(played, policy=choices.default, seed=seed)
    with sentences():
        _write(json, found)
        if plot is not None:
            from cotenant.simulator import plot as plots  # noqa: PLC0415 - matplotlib is optional, and slow to import

            plots.moments([found], plot)
    click.echo(times_table(found))


def _write(path: Path | None, found: Report | TimesReport) -> None:
    if path is not None:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=2) + b"\n")


def table(found: Report) -> str:
    """Write a report for people."""
    median, slow = found.decision_ms["p50"], found.decision_ms["p99"]
    lines = [
        f"{found.policy}, seed {found.seed}: {found.placed} of {found.arrivals} pods placed in {found.seconds} s",
        f"choosing a node took {median} ms (median), {slow} ms (99 of 100)",
        "",
        f"{'arrived, % of all GPUs':28}" + "".join(f"{column:>9}" for column in _SHOWN),
    ]
    for name, values in (
        ("allocated, %", found.allocation),
        ("unallocated, GPUs", found.unallocated_gpus),
        ("fragmented, %", found.fragmentation),
        ("of what is free, %", found.fragmentation_ratio),
    ):
        cells = (f"{values[column]:9.2f}" if column in values else f"{'-':>9}" for column in _SHOWN)
        lines.append(f"{name:28}" + "".join(cells))
    lines += ["", f"{'dropped by 100 % arrived':28}{'%':>9}  of what pods of this kind asked"]
    lines += [f"{kind_name(kind):28}{percent:9.2f}" for kind, percent in found.dropped.items()]
    return "\n".join(lines)


def times_table(found: TimesReport) -> str:
    """Write a report with times for people."""
    median, slow = found.decision_ms["p50"], found.decision_ms["p99"]
    lines = [
        f"{found.policy}, seed {found.seed}: {found.pods} pods in {found.hours:g} hours, played in {found.seconds} s",
        f"choosing a node took {median} ms (median), {slow} ms (99 of 100)",
        f"allocated {found.allocation:.2f} %, fragmented {found.fragmentation:.2f} % of all GPU memory, over the time",
        "",
        f"{'waited, minutes':28}" + "".join(f"{name:>9}" for name in ("mean", "p50", "p95", "p99", "max", "waiting")),
    ]
    rows = [("all pods", found.waited_s, sum(found.unplaced.values()))]
    rows += [(kind_name(k), waited, found.unplaced.get(k, 0)) for k, waited in found.waited_s_by_kind.items()]
    for name, waited, still in rows:
        lines.append(f"{name:28}" + "".join(f"{seconds / 60:9.2f}" for seconds in waited.values()) + f"{still:9}")
    if found.restarts:
        lines += ["", f"{counted(found.restarts, 'pod')} came again after the loss of a node or GPU"]
    return "\n".join(lines)


def kind_name(kind: str) -> str:
    """Name a kind of pods for people."""
    return _KINDS.get(kind, f"{kind} GPU" + ("s" if kind != "1" else ""))
