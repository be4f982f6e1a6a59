"""The command line of `cotenant`."""

import sys

import click

from cotenant import __version__
from cotenant.cli.mig import mig


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
