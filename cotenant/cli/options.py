"""Options that several commands have: which cluster, and which extender in it."""

from collections.abc import Callable
from pathlib import Path

import click

Command = Callable[..., None]

# As manifests/second-scheduler and manifests/attached name it.
SERVICE = "cotenant-system/http:cotenant-extender:serve"


# of a command or a group, and so of all below it
HELP = {"help_option_names": ["-h", "--help"]}


def examples(*lines: str) -> str:
    """Make the end of a command's help of command lines that one could type, each as it stands."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def which_cluster(function: Command) -> Command:
    """Add the options that say which cluster, and as whom."""
    for option in (
        click.option("--context", metavar="NAME", help="A context of the kubeconfig instead of the current one."),
        click.option(
            "--kubeconfig",
            envvar="KUBECONFIG",
            default=str(Path("~/.kube/config")),
            show_default=True,
            metavar="FILE",
            help="Which cluster, and as whom.",
        ),
    ):
        function = option(function)
    return function


def _namespaced(_context: click.Context, _option: click.Parameter, service: str) -> str:
    namespace, _, name = service.partition("/")
    if not namespace or not name or "/" in name:
        raise click.BadParameter(f"expected NAMESPACE/SCHEME:NAME:PORT, such as {SERVICE}, not {service!r}")
    return service


def which_extender(function: Command) -> Command:
    """Add the options that say which cluster's extender, reached through the API server's proxy."""
    service = click.option(
        "--service",
        callback=_namespaced,
        envvar="COTENANT_SERVICE",
        default=SERVICE,
        show_default=True,
        metavar="NAMESPACE/SCHEME:NAME:PORT",
        help="The extender's Service.",
    )
    return which_cluster(service(function))
