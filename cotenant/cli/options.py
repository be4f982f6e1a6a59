"""Options that several commands have: which cluster, and which extender in it."""

from collections.abc import Callable
from pathlib import Path

import click

Command = Callable[..., None]

# As manifests/second-scheduler and manifests/attached name it.
SERVICE = "cotenant-system/http:cotenant-extender:serve"


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


def which_extender(function: Command) -> Command:
    """Add the options that say which cluster's extender, reached through the API server's proxy."""
    service = click.option(
        "--service",
        envvar="COTENANT_SERVICE",
        default=SERVICE,
        show_default=True,
        metavar="NAMESPACE/SCHEME:NAME:PORT",
        help="The extender's Service.",
    )
    return which_cluster(service(function))
