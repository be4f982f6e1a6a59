"""The command line of `cotenant`."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from cotenant import __version__
from cotenant.cli.mig import mig

# As manifests/second-scheduler and manifests/attached name it.
_SERVICE = "cotenant-system/http:cotenant-extender:serve"
_TABLE_OUTPUTS = click.Choice(["table", "wide", "json", "yaml", "csv"])
_TEXT_OUTPUTS = click.Choice(["table", "wide", "json", "yaml"])


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="%(prog)s %(version)s")
def main() -> None:
    """Share GPUs between Kubernetes pods by memory."""


main.add_command(mig)


@main.command()
def version() -> None:
    """Print the version."""
    click.echo(__version__)


@main.command()
@click.option("--serve/--no-serve", default=False, help="Stay up afterwards, until Ctrl-C.")
@click.option("--plain", is_flag=True, help="No colours, and ASCII only.")
def demo(*, serve: bool, plain: bool) -> None:
    """Share made-up GPUs between pods: no cluster, no GPU, no root, a few seconds.

    The extender and the device plugins are the real programs. The API server, kube-scheduler and the kubelets are
    stand-ins. Ends with status 1 if anything disagrees.
    """
    from cotenant.cli.demo import run  # noqa: PLC0415 - gRPC and the Kubernetes client take seconds to import

    sys.exit(run(serve=serve, plain=plain))


_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_MOST_SEEDS = 10_000
_OUT = click.Path(dir_okay=False, writable=True, path_type=Path)


@main.command()
@click.option("--nodes", required=True, type=_FILE, help="CSV: sn, cpu_milli, memory_mib, gpu, model.")
@click.option(
    "--pods", required=True, type=_FILE, help="CSV: name, cpu_milli, memory_mib, num_gpu, gpu_milli, gpu_spec."
)
@click.option("--sequence", type=_FILE, help="The order of arrival, and of nodes that are equal; else drawn by --seed.")
@click.option("--policy", default="priced-leftovers", show_default=True, help="How to choose nodes and GPUs.")
@click.option("--seed", required=True, type=int, help="Of the order in which pods arrive.")
@click.option("--ratio", default=1.3, show_default=True, type=click.FloatRange(0, 10), help="Load, in clusters.")
@click.option("--sample", is_flag=True, help="Show the policy only the nodes that kube-scheduler would.")
@click.option("--json", type=_OUT, help="Write all figures there.")
@click.option("--plot", type=_OUT, help="Draw allocation and fragmentation there, as .svg, .png or .pdf.")
def simulate(
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
    """Replay a trace: how much of the GPUs a policy allocates as pods arrive, and what it drops.

    Pods arrive one by one, never leave, and are dropped for good where they fit nowhere. The ledger, the fit and the
    policies are the extender's own.
    """
    from cotenant.cli import simulate as simulation  # noqa: PLC0415 - numpy takes a while to import
    from extender.policies import POLICIES  # noqa: PLC0415

    if policy not in POLICIES:
        raise click.BadParameter(f"{policy!r} is none of {', '.join(sorted(POLICIES))}", param_hint="--policy")
    simulation.run(
        nodes=nodes,
        pods=pods,
        sequence=sequence,
        policy=policy,
        seed=seed,
        ratio=ratio,
        sample=sample,
        json=json,
        plot=plot,
    )


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


@main.command()
@click.option("--nodes", required=True, type=_FILE, help="CSV: sn, cpu_milli, memory_mib, gpu, model.")
@click.option("--pods", "traces", required=True, multiple=True, type=_FILE, help="A trace; may be given often.")
@click.option(
    "--sequences",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of <trace>_<seed>.txt, the orders of arrival; else drawn.",
)
@click.option("--policy", "policies", multiple=True, help="May be given often; all where none is given.")
@click.option("--seeds", default="42-46", show_default=True, callback=_seeds, help="Such as 1,5,42-46.")
@click.option("--ratio", default=1.3, show_default=True, type=click.FloatRange(0, 10), help="Load, in clusters.")
@click.option("--sample", is_flag=True, help="Show policies only the nodes that kube-scheduler would.")
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder for the reports.")
@click.option("--plot", type=_OUT, help="Draw all runs there, as .svg, .png or .pdf.")
def sweep(
    *,
    nodes: Path,
    traces: tuple[Path, ...],
    sequences: Path | None,
    policies: tuple[str, ...],
    seeds: list[int],
    ratio: float,
    sample: bool,
    out: Path,
    plot: Path | None,
) -> None:
    """Replay traces under several policies and seeds on all cores, and compare.

    Every replay's report stays in the folder, so that a sweep that was ended goes on where it was.
    """
    from cotenant.cli import sweep as sweeping  # noqa: PLC0415 - numpy takes a while to import
    from extender.policies import POLICIES  # noqa: PLC0415

    for policy in policies:
        if policy not in POLICIES:
            raise click.BadParameter(f"{policy!r} is none of {', '.join(sorted(POLICIES))}", param_hint="--policy")
    sweeping.sweep(
        nodes=nodes,
        traces=traces,
        sequences=sequences,
        policies=policies or tuple(POLICIES),
        seeds=seeds,
        ratio=ratio,
        sample=sample,
        out=out,
        plot=plot,
    )


def _source(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options that say which extender to ask."""
    for option in (
        click.option(
            "--service",
            default=_SERVICE,
            show_default=True,
            metavar="NAMESPACE/SCHEME:NAME:PORT",
            help="The extender's Service.",
        ),
        click.option("--context", metavar="NAME", help="A context of the kubeconfig instead of the current one."),
        click.option(
            "--kubeconfig",
            envvar="KUBECONFIG",
            default=str(Path("~/.kube/config")),
            show_default=True,
            metavar="FILE",
            help="Ask through this API server's proxy to the Service.",
        ),
        click.option("--server", metavar="URL", help="Ask the extender here instead, such as http://127.0.0.1:9481."),
    ):
        function = option(function)
    return function


@main.group()
def inspect() -> None:
    """Show who holds what of which GPU, as the extender knows it."""


@inspect.command("nodes")
@click.option("-o", "--output", type=_TABLE_OUTPUTS, default="table", help="How to print; csv has plain bytes.")
@click.option("--filter", "query", default="", metavar="TEXT", help="Only nodes whose name, model or problem has it.")
@click.option("--all", "everything", is_flag=True, help="Nodes without GPUs as well.")
@_source
def inspect_nodes(*, output: str, query: str, everything: bool, **where: Any) -> None:
    """Show every GPU: what is allocated, what is free, and whether it is well."""
    from cotenant.cli import inspection  # noqa: PLC0415 - the Kubernetes client takes a second to import

    asked = {"filter": query, "all": "1" if everything else "0"}
    inspection.answer(lambda ask: inspection.nodes(ask, output, asked), **where)


@inspect.command("pods")
@click.option("-o", "--output", type=_TABLE_OUTPUTS, default="table", help="How to print; csv has plain bytes.")
@click.option("-n", "--namespace", default="", metavar="NAME", help="Only pods of this namespace; else of all.")
@click.option("--filter", "query", default="", metavar="TEXT", help="Only pods whose name or node has it.")
@_source
def inspect_pods(*, output: str, namespace: str, query: str, **where: Any) -> None:
    """Show every pod that asks for GPU memory: where it is and what it holds, or why it waits."""
    from cotenant.cli import inspection  # noqa: PLC0415 - the Kubernetes client takes a second to import

    asked = {"filter": query, "namespace": namespace}
    inspection.answer(lambda ask: inspection.pods(ask, output, asked), **where)


@main.command()
@click.argument("pod")
@click.option("-n", "--namespace", default="default", show_default=True, metavar="NAME", help="The pod's namespace.")
@click.option("-o", "--output", type=_TEXT_OUTPUTS, default="table", help="How to print; wide has every GPU.")
@_source
def explain(*, pod: str, namespace: str, output: str, **where: Any) -> None:
    """Say why POD is pending: the reason and the shortfall, and the least that would make it fit."""
    from cotenant.cli import inspection  # noqa: PLC0415 - the Kubernetes client takes a second to import

    name = pod.removeprefix("pods/").removeprefix("pod/")
    inspection.answer(lambda ask: inspection.explanation(ask, output, namespace, name), **where)
