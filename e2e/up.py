"""The ground for a human: `python -m e2e.up [--scheduler CONFIG] [--node]` stays until Ctrl-C or SIGTERM."""

import signal
import tempfile
from contextlib import ExitStack
from pathlib import Path

import click

from e2e.cluster import ControlPlane
from e2e.node import RealNode
from e2e.processes import MissingProgramError, StartError


@click.command()
@click.option(
    "--scheduler",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Start kube-scheduler with this KubeSchedulerConfiguration; its kubeconfig is filled in.",
)
@click.option("--node", is_flag=True, help="Join this machine as a node (root).")
@click.option(
    "--directory",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where logs, kubeconfigs and data go, and stay; by default a temporary directory that goes with the ground.",
)
def main(scheduler: Path | None, *, node: bool, directory: Path | None) -> None:
    """Start etcd and kube-apiserver, and what else is asked for, and print the kubeconfig of an admin."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with ExitStack() as ground:
            if directory is None:
                directory = Path(ground.enter_context(tempfile.TemporaryDirectory(prefix="cotenant-up-")))
            cluster = ground.enter_context(ControlPlane(directory / "control-plane"))
            if scheduler is not None:
                cluster.start_scheduler(scheduler)
            if node:
                joined = ground.enter_context(RealNode(cluster, directory / "node"))
                click.echo(f"node {joined.name}, CDI specs in {joined.cdi_directory}", err=True)
            click.echo(f"logs in {directory}; Ctrl-C stops everything", err=True)
            click.echo(cluster.kubeconfig())
            signal.pause()
    except KeyboardInterrupt:
        click.echo("stopped", err=True)
    except (MissingProgramError, StartError, RuntimeError) as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
