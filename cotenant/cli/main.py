"""The command line of `cotenant`."""

import errno
import os
import sys
from typing import IO, Any

import click

from cotenant import __version__
from cotenant.cli.capacity import COMMANDS
from cotenant.cli.mig import mig
from cotenant.cli.options import HELP, Command, examples, names_of_domain, which_extender

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_TABLE_OUTPUTS = click.Choice(["table", "wide", "json", "yaml", "csv"])
_TEXT_OUTPUTS = click.Choice(["table", "wide", "json", "yaml"])


class _Program(click.Group):
    """End with a sentence, too, where what is printed cannot be written; where nobody reads it, click ends quietly."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().main(*args, **kwargs)
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            # what is left of it is not tried again as Python ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            click.echo(f"Error: the output cannot be written: {error.strerror}; have it written elsewhere", err=True)
            sys.exit(1)


@click.group(
    cls=_Program, context_settings=HELP, epilog=examples("cotenant demo", "cotenant explain POD", "cotenant COMMAND -h")
)
@click.version_option(__version__, message="%(prog)s %(version)s")
def main() -> None:
    """Share GPUs between Kubernetes pods by memory."""


main.add_command(mig)
for _command in COMMANDS:
    main.add_command(_command)


@main.command()
def version() -> None:
    """Print the version."""
    click.echo(__version__)


@main.command(
    short_help="Share made-up GPUs between pods, without a cluster.", epilog=examples("cotenant demo --serve")
)
@click.option("--serve/--no-serve", default=False, help="Stay up afterwards, until Ctrl-C.")
@click.option("--plain", is_flag=True, help="No colours, and ASCII only.")
def demo(*, serve: bool, plain: bool) -> None:
    """Share made-up GPUs between pods: no cluster, no GPU, no root, a few seconds.

    The extender and the device plugins are the real programs. The API server, kube-scheduler and the kubelets are
    stand-ins. Ends with status 1 if anything disagrees.
    """
    from cotenant.cli.demo import run  # noqa: PLC0415 - gRPC and the Kubernetes client take seconds to import

    sys.exit(run(serve=serve, plain=plain))


def _name_of_pod(_context: click.Context, _argument: click.Parameter, pod: str) -> str:
    name = pod.removeprefix("pods/").removeprefix("pod/")
    if not name or "/" in name:
        raise click.BadParameter(f"{pod!r} is no pod's name; of which namespace it is, --namespace says")
    return name


_pod = click.argument("pod", callback=_name_of_pod)
_namespace = click.option(
    "-n", "--namespace", metavar="NAME", help="The pod's namespace  [default: that of the kubeconfig's context]"
)


def _source(function: Command) -> Command:
    """Add the options that say which extender to ask."""
    server = click.option(
        "--server", metavar="URL", help="Ask the extender here instead, such as http://127.0.0.1:9481."
    )
    return server(which_extender(function))


@main.group(
    short_help="Show who holds what of which GPU.",
    epilog=examples("cotenant inspect nodes", "cotenant inspect pods -n team-a -o wide"),
)
def inspect() -> None:
    """Show who holds what of which GPU, as the extender knows it."""


@inspect.command(
    "nodes",
    short_help="Show every GPU: allocated, free, and its health.",
    epilog=examples("cotenant inspect nodes --filter a100 -o wide", "cotenant inspect nodes -o csv > gpus.csv"),
)
@click.option("-o", "--output", type=_TABLE_OUTPUTS, default="table", help="How to print; csv has plain bytes.")
@click.option("--filter", "query", default="", metavar="TEXT", help="Only nodes whose name, model or problem has it.")
@click.option("--all", "everything", is_flag=True, help="Nodes without GPUs as well.")
@_source
def inspect_nodes(*, output: str, query: str, everything: bool, **where: Any) -> None:
    """Show every GPU: what is allocated, what is free, and whether it is well."""
    from cotenant.cli import inspection  # noqa: PLC0415 - the Kubernetes client takes a second to import

    asked = {"filter": query, "all": "1" if everything else "0"}
    inspection.answer(lambda ask: inspection.nodes(ask, output, asked), **where)


@inspect.command(
    "pods",
    short_help="Show every pod: where it is, or why it waits.",
    epilog=examples("cotenant inspect pods --state waiting", "cotenant inspect pods -n team-a -o json"),
)
@click.option("-o", "--output", type=_TABLE_OUTPUTS, default="table", help="How to print; csv has plain bytes.")
@click.option("-n", "--namespace", default="", metavar="NAME", help="Only pods of this namespace; else of all.")
@click.option("-A", "--all-namespaces", "everywhere", is_flag=True, help="Pods of all namespaces, whatever -n says.")
@click.option("--state", type=click.Choice(["waiting", "binding", "bound", "ungranted"]), help="Only pods that are so.")
@click.option("--filter", "query", default="", metavar="TEXT", help="Only pods whose name or node has it.")
@_source
def inspect_pods(*, output: str, namespace: str, everywhere: bool, state: str | None, query: str, **where: Any) -> None:
    """Show every pod that asks for GPU memory: where it is and what it holds, or why it waits."""
    from cotenant.cli import inspection  # noqa: PLC0415 - the Kubernetes client takes a second to import

    asked = {"filter": query, "namespace": "" if everywhere else namespace, "state": state or "all"}
    inspection.answer(lambda ask: inspection.pods(ask, output, asked), **where)


@inspect.command("namespaces", short_help="Show what namespaces hold, and their limits.")
@click.option("-o", "--output", type=_TABLE_OUTPUTS, default="table", help="How to print; csv has plain bytes.")
@click.option("--filter", "query", default="", metavar="TEXT", help="Only namespaces whose name has it.")
@_source
def inspect_namespaces(*, output: str, query: str, **where: Any) -> None:
    """Show what the pods of each namespace hold, and the limits that they are held to."""
    from cotenant.cli import inspection  # noqa: PLC0415 - the Kubernetes client takes a second to import

    inspection.answer(lambda ask: inspection.namespaces(ask, output, {"filter": query}), **where)


@inspect.command("mix", short_help="Show the pods that policies expect.")
@click.option("-o", "--output", type=_TABLE_OUTPUTS, default="table", help="How to print; csv has plain bytes.")
@_source
def inspect_mix(*, output: str, **where: Any) -> None:
    """Show the pods that policies expect: learned from those that came last, or pinned by the configuration."""
    from cotenant.cli import inspection  # noqa: PLC0415 - the Kubernetes client takes a second to import

    inspection.answer(lambda ask: inspection.mix(ask, output), **where)


@main.command(
    short_help="Say why a pod is pending, and what would help.",
    epilog=examples("cotenant explain train-7", "cotenant explain train-7 -n team-a -o wide"),
)
@_pod
@_namespace
@click.option("-o", "--output", type=_TEXT_OUTPUTS, default="table", help="How to print; wide has every GPU.")
@_source
def explain(*, pod: str, namespace: str | None, output: str, **where: Any) -> None:
    """Say why POD is pending: the reason and the shortfall, and the least that would make it fit."""
    from cotenant.cli import inspection  # noqa: PLC0415 - the Kubernetes client takes a second to import

    of = namespace or inspection.current_namespace(**where)
    inspection.answer(lambda ask: inspection.explanation(ask, output, of, pod), **where)


@main.command(
    short_help="Have an autoscaler add a node for a pod.",
    epilog=examples("cotenant grow train-7 -n team-a | kubectl apply -f -"),
)
@_pod
@_namespace
@click.option("--image", default="registry.k8s.io/pause:3.10", show_default=True, help="What its twin runs.")
@click.option(
    "--minutes", default=30, show_default=True, type=click.IntRange(1, 10_000), help="How long its twin may run."
)
@names_of_domain
@_source
def grow(*, pod: str, names: Any, namespace: str | None, image: str, minutes: int, **where: Any) -> None:
    """Print what has an autoscaler add a node for POD, which waits because free memory lies in pieces.

    The autoscaler counts sums, so it thinks that POD fits. Its twin asks the same and may run on none of the nodes
    where POD does not fit, so a node is added for it, on which it gives way to all others. Pipe it to kubectl apply
    -f -, and delete it once POD runs.
    """
    from cotenant.cli import grow as growing  # noqa: PLC0415 - the Kubernetes client takes a second to import
    from cotenant.cli import inspection  # noqa: PLC0415

    of = namespace or inspection.current_namespace(**where)
    growing.run(pod, names=names, namespace=of, image=image, minutes=minutes, **where)


@main.command(
    short_help="Check how a cluster is wired, and say what to do.",
    epilog=examples("cotenant doctor", "cotenant doctor --context staging -o json"),
)
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", help="How to print.")
@which_extender
def doctor(*, output: str, service: str, context: str | None, kubeconfig: str | None) -> None:
    """Check how a cluster is wired: scheduler, extender, admission, nodes, plugins, pods. Says what to do.

    Only reads. Ends with status 1 if something is broken.
    """
    from cotenant.cli import doctor as examination  # noqa: PLC0415 - the Kubernetes client takes a second to import

    sys.exit(examination.run(kubeconfig=kubeconfig, context=context, service=service, output=output))


@main.command(
    short_help="Turn other systems' manifests into ours.",
    epilog=examples(
        "cotenant migrate deployment.yaml > ours.yaml",
        "helm template RELEASE | cotenant migrate --gpu-memory 79GiB --strict -",
    ),
)
@click.argument("files", nargs=-1, required=True, type=click.File(encoding="utf-8"))
@click.option("--unit", default="1GiB", show_default=True, metavar="SIZE", help="What one gpu-mem is worth here.")
@click.option(
    "--gpu-memory", metavar="SIZE", help="What a GPU has for pods, such as 79GiB of 80 GB: where they ask parts."
)
@click.option("--replicas", type=click.IntRange(1), help="How many shares NVIDIA's plugin made of a GPU.")
@click.option("--keep-limits", is_flag=True, help="Ask for isolation: limited where the other system held limits.")
@click.option("--strict", is_flag=True, help="End with status 1 if anything is not kept.")
def migrate(
    *,
    files: tuple[IO[str], ...],
    unit: str,
    gpu_memory: str | None,
    replicas: int | None,
    keep_limits: bool,
    strict: bool,
) -> None:
    """Print manifests of gpushare, HAMi, KAI, Volcano or NVIDIA's sharing in our words; - reads from standard input.

    What cannot be kept, or has to be seen to, is said on standard error. Comments are lost.
    """
    from cotenant.cli.migrate import command  # noqa: PLC0415 - YAML takes a while to import

    documents = command.read(files)
    sys.exit(
        command.run(
            documents, unit=unit, gpu_memory=gpu_memory, replicas=replicas, keep_limits=keep_limits, strict=strict
        )
    )
