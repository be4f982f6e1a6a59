"""Options that several commands have: which cluster, and which extender in it."""

import os
import sys
from collections.abc import Callable, MutableMapping
from functools import wraps
from pathlib import Path
from typing import Any

import click

Command = Callable[..., None]

# As manifests/second-scheduler and manifests/attached name it.
SERVICE = "cotenant-system/http:cotenant-extender:serve"


_OWN_KUBECONFIG = "~/.kube/config"

# of a command or a group, and so of all below it
HELP = {"help_option_names": ["-h", "--help"]}


def examples(*lines: str) -> str:
    """Make the end of a command's help of command lines that one could type, each as it stands."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def _warned(_logger: Any, level: str, line: MutableMapping[str, Any]) -> str:
    """Make a sentence of a warning, and nothing of what is only said to be looked up later."""
    import structlog  # noqa: PLC0415

    if level not in {"warning", "error", "critical"}:
        raise structlog.DropEvent
    more = ", ".join(str(value) for key, value in line.items() if key != "event")
    return f"{level}: {line['event']}" + (f" ({more})" if more else "")


def _ours_in_a_pod(_context: click.Context, _option: click.Parameter, kubeconfig: str) -> str | None:
    """Name no file in a pod that has none: it is somebody by its service account, to kubectl too."""
    missing = kubeconfig == _OWN_KUBECONFIG and not Path(kubeconfig).expanduser().exists()
    return None if missing and os.environ.get("KUBERNETES_SERVICE_HOST") else kubeconfig


def warn_on_stderr() -> None:
    """Have what is logged beside a command stand on stderr as a sentence where it warns, and nowhere else."""
    import structlog  # noqa: PLC0415 - a third of a second, which the commands without a cluster do not need

    # asked for at each line, and never kept by who logs, as tests have another one by then
    structlog.configure(
        processors=[_warned],
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
        cache_logger_on_first_use=False,
    )


def which_cluster(function: Command) -> Command:
    """Add the options that say which cluster, and as whom; what the client logs stays off standard output."""

    @wraps(function)
    def logging(**options: Any) -> None:
        warn_on_stderr()
        function(**options)

    for option in (
        click.option("--context", metavar="NAME", help="A context of the kubeconfig instead of the current one."),
        click.option(
            "--kubeconfig",
            envvar="KUBECONFIG",
            default=_OWN_KUBECONFIG,
            show_default=True,
            callback=_ours_in_a_pod,
            metavar="FILE",
            help="Which cluster, and as whom.",
        ),
    ):
        logging = option(logging)
    return logging


def _namespaced(_context: click.Context, _option: click.Parameter, service: str) -> str:
    namespace, _, name = service.partition("/")
    if not namespace or not name or "/" in name:
        raise click.BadParameter(f"expected NAMESPACE/SCHEME:NAME:PORT, such as {SERVICE}, not {service!r}")
    return service


def _names(_context: click.Context, _option: click.Parameter, domain: str) -> Any:
    from cotenant.contract.names import Names  # noqa: PLC0415

    try:
        return Names(domain)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


names_of_domain = click.option(
    "--domain",
    "names",
    default="cotenant.io",
    show_default=True,
    callback=_names,
    help="Prefix of resources and annotations.",
)


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
