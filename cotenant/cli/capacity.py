"""The commands that simulate and plan, as they are typed; what they do is imported when they run."""

from collections.abc import Callable
from functools import wraps
from importlib.util import find_spec
from math import inf, isnan
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from cotenant.cli.options import Command, examples, names_of_domain, which_cluster


class Numbers(click.FloatRange):
    """Refuse what is no number (nan) as well: it is neither less than a limit nor more."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Read a number within the range."""
        number = super().convert(value, param, ctx)
        if isnan(number):
            self.fail(f"{value!r} is not a number.", param, ctx)
        return number


FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
OUT = click.Path(dir_okay=False, writable=True, path_type=Path)
_PICTURES = (".svg", ".png", ".pdf")
FOLDER = click.Path(file_okay=False, path_type=Path)
_MOST_SEEDS = 10_000
_NODES = "CSV: sn, cpu_milli, memory_mib, gpu, model."
_PODS = "CSV: name, cpu_milli, memory_mib, num_gpu, gpu_milli, gpu_spec."
_PLOT = "as .svg, .png or .pdf."


def _drawable(_context: click.Context, _option: click.Parameter, path: Path | None) -> Path | None:
    """Refuse a picture of another kind, or one that nothing here draws, before the run, and not after it."""
    if path is not None and path.suffix not in _PICTURES:
        raise click.BadParameter(f"expected a name that ends in {', '.join(_PICTURES)}, not {str(path)!r}")
    if path is not None and find_spec("matplotlib") is None:
        raise click.ClickException("pictures need matplotlib: pip install '.[plots]' in Cotenant's checkout")
    return path


def _picture(flag: str, what: str) -> Callable[[Command], Command]:
    return click.option(flag, type=OUT, callback=_drawable, help=f"{what} there, {_PLOT}")


def policies_known(context: click.Context, option: click.Parameter, value: Any) -> Any:
    """Refuse a policy that does not exist."""
    from extender.policies import PolicyError, named  # noqa: PLC0415

    try:
        for name in (value,) if isinstance(value, str) else value or ():
            named(name)
    except PolicyError as error:
        raise click.BadParameter(str(error), ctx=context, param=option) from error
    return value


def _seeds(_context: click.Context, _option: click.Parameter, text: str) -> list[int]:
    """Read seeds such as 1,5,42-46."""
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        numbers = first.isdecimal() and (last.isdecimal() or not dash)
        if not numbers or not int(first) <= int(last or first) <= int(first) + _MOST_SEEDS:
            raise click.BadParameter(f"expected numbers and ranges such as 1,5,42-46, not {text!r}")
        seeds += range(int(first), int(last or first) + 1)
    return list(dict.fromkeys(seeds))


def _loads(_context: click.Context, _option: click.Parameter, text: str) -> list[float]:
    """Read loads in percent such as 70,80,90."""
    try:
        loads = [float(part) for part in text.split(",")]
    except ValueError:
        loads = []
    if not loads or not all(0 < load <= 1000 for load in loads):  # noqa: PLR2004
        raise click.BadParameter(f"expected percents such as 70,80,90, not {text!r}")
    return list(dict.fromkeys(loads))


def _either(trace: Path | None, *csv: Path | None) -> None:
    """Refuse both kinds of trace at once, and less than one."""
    if any(csv) if trace is not None else None in csv:
        raise click.UsageError("give either --nodes and --pods, or --trace")


def _policy(function: Command) -> Command:
    """Add the options that say how nodes and GPUs are chosen, and hand their *choices* on."""

    @wraps(function)
    def chosen(*, policy: str | None, config: Path | None, **options: Any) -> None:
        from cotenant.cli.simulate import choices  # noqa: PLC0415

        function(choices=choices(policy, config), **options)

    for option in (
        click.option("--config", type=FILE, help="The extender's, for its policies by profile and node pool as well."),
        click.option(
            "--policy",
            callback=policies_known,
            help="How to choose nodes and GPUs; NODE/GPU for two policies, one for each level. "
            "[default: priced-leftovers]",
        ),
    ):
        chosen = option(chosen)
    return chosen


def _policies(function: Command) -> Command:
    return click.option(
        "--policy",
        "policies",
        multiple=True,
        callback=policies_known,
        help="May be given often; all where none is given.",
    )(function)


def _sweeping(function: Command) -> Command:
    """Add the options of commands that do much at once."""
    for option in (
        _picture("--plot", "Draw the results"),
        click.option("--scheduler", metavar="ADDRESS", help="Use the workers of this Dask scheduler, not these cores."),
        click.option(
            "--out", required=True, type=FOLDER, help="Folder for the reports; what it has is not done again."
        ),
        click.option("--seeds", default="42-46", show_default=True, callback=_seeds, help="Such as 1,5,42-46."),
    ):
        function = option(function)
    return function


@click.command(
    short_help="Replay a trace: what a policy allocates and drops.",
    epilog=examples(
        "cotenant simulate --trace cluster.json --afresh --policy fgd",
        "cotenant simulate --nodes nodes.csv --pods pods.csv --plot run.svg",
    ),
)
@click.option("--nodes", type=FILE, help=_NODES)
@click.option("--pods", type=FILE, help=_PODS)
@click.option("--trace", type=FILE, help="JSON with nodes and pods instead: a trace with times, or a snapshot.")
@click.option("--sequence", type=FILE, help="The order of arrival, and of nodes that are equal; else drawn by --seed.")
@_policy
@click.option("--seed", default=1, show_default=True, type=int, help="Of the order in which pods arrive.")
@click.option("--ratio", default=1.3, show_default=True, type=Numbers(0, 10), help="Load, in clusters.")
@click.option("--sample", is_flag=True, help="Show the policy only the nodes that kube-scheduler would.")
@click.option("--afresh", is_flag=True, help="With --trace: place pods anew that have a place.")
@click.option("--learn", is_flag=True, help="With --trace: learn the mix of pods as the extender does.")
@click.option("--json", type=OUT, help="Write all figures there.")
@_picture("--plot", "Draw allocation and fragmentation")
@_picture("--strips", "Draw every GPU of the cluster as it was in the end")
def simulate(**options: Any) -> None:
    """Replay a trace: how much of the GPUs a policy allocates as pods arrive, and what it drops.

    With --nodes and --pods, pods arrive one by one, never leave, and are dropped for good where they fit nowhere. With
    --trace, they come and go at their times, wait while they fit nowhere, and nodes and GPUs may be lost. The ledger,
    the fit and the policies are the extender's own.
    """
    from cotenant.cli import simulate as simulation  # noqa: PLC0415

    trace = options.pop("trace")
    _either(trace, options["nodes"], options["pods"])
    if trace is None:
        for name in ("afresh", "learn"):
            if options.pop(name):
                raise click.UsageError(f"--{name} goes with --trace")
        choices = options.pop("choices")
        if len(choices.policies) > 1:
            raise click.UsageError("policies by profile and node pool go with --trace: these files name neither")
        simulation.run(policy=choices.default, **options)
        return
    given = click.get_current_context().get_parameter_source
    for name in ("nodes", "pods", "sequence", "ratio"):
        options.pop(name)
        if given(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{name} goes with --nodes and --pods")
    simulation.run_trace(trace=trace, **options)


@click.command(
    short_help="Replay traces under several policies, and compare.",
    epilog=examples("cotenant sweep --nodes nodes.csv --pods pods.csv --policy fgd --policy best-fit --out sweep"),
)
@click.option("--nodes", required=True, type=FILE, help=_NODES)
@click.option("--pods", "traces", required=True, multiple=True, type=FILE, help="A trace; may be given often.")
@click.option(
    "--sequences",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of <trace>_<seed>.txt, the orders of arrival; else drawn.",
)
@_policies
@click.option("--ratio", default=1.3, show_default=True, type=Numbers(0, 10), help="Load, in clusters.")
@click.option("--sample", is_flag=True, help="Show policies only the nodes that kube-scheduler would.")
@_picture("--latency", "Draw how long choosing a node took")
@_picture("--strips", "Draw every GPU under each policy")
@_sweeping
def sweep(**options: Any) -> None:
    """Replay traces under several policies and seeds on all cores, and compare.

    Every replay's report stays in the folder, so that a sweep that was ended goes on where it was.
    """
    from cotenant.cli import sweep as sweeping  # noqa: PLC0415
    from extender.policies import POLICIES  # noqa: PLC0415

    sweeping.sweep(**options | {"policies": options["policies"] or tuple(POLICIES)})


@click.command(
    short_help="Let pods come and go, and measure how long they wait.",
    epilog=examples("cotenant churn --nodes nodes.csv --pods pods.csv --loads 80,90 --hours 24 --out churn"),
)
@click.option("--nodes", required=True, type=FILE, help=_NODES)
@click.option(
    "--pods", required=True, type=FILE, help="CSV as above with creation_time, scheduled_time and deletion_time."
)
@_policies
@click.option("--loads", default="70,80,90,100,110", show_default=True, callback=_loads, help="Percents of the GPUs.")
@click.option("--hours", default=48.0, show_default=True, type=Numbers(0.1, 10_000), help="How long to play.")
@click.option(
    "--every",
    default=1,
    show_default=True,
    type=click.IntRange(1, 1000),
    help="Keep one of so many nodes of each kind.",
)
@click.option("--together", is_flag=True, help="A pod drawn lives as long as it did in the trace, not as another did.")
@click.option("--longest", default=inf, type=Numbers(0.01), metavar="HOURS", help="Have no pod live longer.")
@click.option(
    "--drift", type=FILE, help="CSV of pods that take the place of --pods bit by bit, all of them in the end."
)
@click.option("--learn", is_flag=True, help="Learn the mix of pods as the extender does, instead of knowing it.")
@click.option(
    "--window", default=5000, show_default=True, type=click.IntRange(20), help="With --learn: from so many pods."
)
@click.option("--relocate", is_flag=True, help="Move a pod, at no cost, where that lets one fit that does not.")
@_sweeping
def churn(**options: Any) -> None:
    """Let pods come and go at random: how much of the GPUs is allocated, and how long pods wait.

    Pods arrive as a Poisson process on a cluster that is in use already, with requests and lifetimes drawn from a
    trace. Those that fit nowhere wait. The first policy is what the others are compared with, seed by seed.
    """
    from cotenant.cli import churn as churning  # noqa: PLC0415
    from extender.policies import POLICIES  # noqa: PLC0415

    churning.churn(**options | {"policies": options["policies"] or tuple(POLICIES)})


def _live(function: Command) -> Command:
    """Add the options that say which cluster to read."""
    return which_cluster(names_of_domain(function))


def _source(function: Command) -> Command:
    """Add the options that say where the cluster is read from."""
    snapshot = click.option("--snapshot", type=FILE, help="Plan on this snapshot, not on the live cluster.")
    return snapshot(_live(function))


def _asking(function: Command) -> Command:
    """Add the options that say what a pod asks."""
    for option in (
        click.option("--selector", multiple=True, callback=_pairs, metavar="KEY=VALUE", help="Node labels it needs."),
        click.option("--isolation", type=click.Choice(["none", "limited", "strict", "exclusive"])),
        click.option("--model", multiple=True, help="A GPU model it takes; may be given often."),
        click.option("--memory", callback=_amount, metavar="AMOUNT", help="Memory of the node it asks, such as 16Gi."),
        click.option("--cpu", callback=_amount, metavar="AMOUNT", help="CPU it asks, such as 4 or 500m."),
        click.option("--gpu-count", type=click.IntRange(1, 64), help="Over how many GPUs its units are split."),
        click.option("--gpu-mem", type=click.IntRange(1), metavar="UNITS", help="Units of GPU memory it asks."),
        click.option(
            "-f",
            "--file",
            type=click.File(encoding="utf-8"),
            help="A manifest instead, - for standard input: a Pod, Deployment, StatefulSet, Job, ...",
        ),
    ):
        function = option(function)
    return function


def _amount(_context: click.Context, _option: click.Parameter, value: str | None) -> str | None:
    from cotenant.contract.compute import checked  # noqa: PLC0415

    try:
        return value if value is None else str(checked(value))
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def _pairs(_context: click.Context, _option: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    for value in values:
        if not value.partition("=")[1]:
            raise click.BadParameter(f"expected KEY=VALUE, not {value!r}")
    return values


_output = click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", help="How to print.")


@click.command(short_help="Write a live cluster as JSON.", epilog=examples("cotenant snapshot --out cluster.json"))
@_live
@click.option("-o", "--out", required=True, type=OUT, help="Where to write it.")
def snapshot(**options: Any) -> None:
    """Write a live cluster as JSON: its GPUs, who holds what of them, and what waits.

    `cotenant plan` and `cotenant simulate --trace` read it. Names of pods, their requests, labels of nodes and
    PodDisruptionBudgets are in it; no images, environments or secrets. It only reads.
    """
    from cotenant.cli import snapshot as taking  # noqa: PLC0415

    taking.snapshot(**options)


@click.group(
    epilog=examples("cotenant plan fit --gpu-mem 40 --replicas 3", "cotenant plan moves --snapshot cluster.json")
)
def plan() -> None:
    """Say what a cluster could take, and which pods to move for it."""


def _planning(options: dict[str, Any]) -> Any:
    from cotenant.cli.plan import Source  # noqa: PLC0415

    return Source(**{name: options.pop(name) for name in ("snapshot", "kubeconfig", "context", "names")})


@plan.command(
    "fit",
    short_help="Say whether a deployment still fits, and where.",
    epilog=examples(
        "cotenant plan fit --gpu-mem 40 --replicas 3", "cotenant plan fit --snapshot cluster.json -f deployment.yaml"
    ),
)
@_source
@_asking
@click.option("--replicas", type=click.IntRange(1, 100_000), help="How many pods; else what the manifest says.")
@_policy
@_output
def plan_fit(**options: Any) -> None:
    """Say whether a deployment still fits, and where its pods would lie. Ends with status 1 where not all fit."""
    from cotenant.cli import plan as planning  # noqa: PLC0415

    planning.fit(_planning(options), **options)


@plan.command(
    "largest",
    short_help="Say the largest request that still fits.",
    epilog=examples("cotenant plan largest --snapshot cluster.json"),
)
@_source
@_output
def plan_largest(**options: Any) -> None:
    """Say the largest request that still fits, for each GPU model and for 1, 2, 4, ... GPUs of one node."""
    from cotenant.cli import plan as planning  # noqa: PLC0415

    planning.largest(_planning(options), **options)


@plan.command(
    "moves",
    short_help="Say which pods to move to make room.",
    epilog=examples(
        "cotenant plan moves --snapshot cluster.json --most 5",
        "cotenant plan moves --gpu-mem 158 --gpu-count 2 --apply",
    ),
)
@_source
@_asking
@click.option("--most", default=10, show_default=True, type=click.IntRange(1, 10_000), help="At most so many moves.")
@click.option("--priority", default=0, show_default=True, type=int, help="Move no pod of a higher priority.")
@click.option("--apply", is_flag=True, help="Evict the pods, one after the other; stop at the first refusal.")
@click.option("--patience", default=300.0, show_default=True, type=Numbers(0), help="Seconds for an evicted pod to go.")
@_policy
@_output
def plan_moves(**options: Any) -> None:
    """Say which pods to move so that free memory lies together, or so that a given request fits.

    A dry run, unless --apply is given. Pods stay that nothing would make anew, whose PodDisruptionBudget allows no
    eviction, whose priority is too high, or that are tied to their node.
    """
    from cotenant.cli import plan as planning  # noqa: PLC0415

    planning.moves(_planning(options), **options)


@plan.command(
    "nodes",
    short_help="Say how many nodes of a kind a trace needs.",
    epilog=examples("cotenant plan nodes --trace trace.json --like a100-8 --wait 300"),
)
@click.option("--trace", type=FILE, help="JSON with nodes and pods.")
@click.option("--nodes", "nodes_csv", type=FILE, help=_NODES)
@click.option("--pods", "pods_csv", type=FILE, help=_PODS)
@click.option("--like", required=True, metavar="NAME", help="A node of the trace: how many of its kind are needed?")
@_policy
@click.option("--wait", default=0.0, show_default=True, type=Numbers(0), help="Seconds a pod may wait.")
@click.option("--most", default=10_000, show_default=True, type=click.IntRange(1, 100_000), help="Try no more nodes.")
@click.option("--seed", default=1, show_default=True, type=int, help="Of the order of pods without times.")
@_output
def plan_nodes(**options: Any) -> None:
    """Say how many nodes of one kind a trace needs. Pods of a CSV trace all come, and none leaves."""
    from cotenant.cli import plan as planning  # noqa: PLC0415

    csv = options.pop("nodes_csv"), options.pop("pods_csv")
    _either(options["trace"], *csv)
    planning.nodes(csv=csv, **options)


COMMANDS = (simulate, sweep, churn, snapshot, plan)
