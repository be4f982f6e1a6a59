"""`cotenant-extender`: the command line of the extender."""

import gc
import sys
import threading

import click

from cotenant import __version__, logs
from cotenant.cluster import ClusterError, connect
from cotenant.contract.configuration import ConfigurationError, ExtenderConfiguration, Placement, is_address, load
from cotenant.signals import at_the_end
from extender.placement.choices import Choices
from extender.policies import PolicyError, named
from extender.program import Extender, with_flags

_CONNECTIONS = 32
# Objects made before a collection of the young, and collections of these before one of the older.
_GC_THRESHOLDS = 20_000, 20, 100


def _address(_context: click.Context, _option: click.Parameter, value: str | None) -> str | None:
    if value is not None and not is_address(value):
        raise click.BadParameter(f"{value!r} is not HOST:PORT, such as 127.0.0.1:9480")
    return value


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--config", type=click.Path(dir_okay=False), metavar="FILE", help="A YAML file; flags win over its keys.")
@click.option("--kubeconfig", metavar="FILE", help="How to reach the API server from outside of a pod.")
@click.option("--listen", metavar="HOST:PORT", callback=_address, help="Answer kube-scheduler's calls here.")
@click.option(
    "--serve", metavar="HOST:PORT", callback=_address, help="Answer health, metrics, admission and people here."
)
@click.option(
    "--placement",
    type=click.Choice([placement.value for placement in Placement]),
    help="Return all nodes that fit, or the best alone.",
)
@click.option("--policy", metavar="NAME", help="How to choose nodes and GPUs; NODE/GPU for two policies.")
@click.version_option(__version__, message="%(prog)s %(version)s")
def main(  # noqa: PLR0917 - click calls it by name
    config: str | None,
    kubeconfig: str | None,
    listen: str | None,
    serve: str | None,
    placement: str | None,
    policy: str | None,
) -> None:
    """Filter, score and bind pods that ask for GPU memory, called by kube-scheduler."""
    logs.configure("cotenant-extender")
    stopping = threading.Event()
    at_the_end(stopping.set)
    try:
        configuration = with_flags(
            load(config, ExtenderConfiguration), listen=listen, serve=serve, placement=placement, policy=policy
        )
        check_policies(configuration)
        # sixteen for Bindings, and the watches, writes and reads beside them; one that is not kept costs a handshake
        with connect(kubeconfig, pool_size=_CONNECTIONS) as cluster:
            # what is read at the start is kept, so looking for garbage in it is in vain
            gc.set_threshold(*_GC_THRESHOLDS)
            Extender(configuration, cluster).run(stopping, _ready)
    except (ConfigurationError, ClusterError, OSError) as error:
        sys.exit(f"cotenant-extender: {error}")


def check_policies(configuration: ExtenderConfiguration) -> None:
    """Raise ConfigurationError for a policy that does not exist."""
    try:
        Choices.configured(configuration)
    except PolicyError as error:
        raise ConfigurationError(str(error)) from error
    try:
        named(configuration.shadow or configuration.policy)
    except PolicyError as error:
        raise ConfigurationError(f"shadow: {error}") from error


def _ready(sentence: str) -> None:
    """Say so, and keep the garbage collector from holding up a verb from now on.

    A full collection walks all that the ledger holds: 0.1 s at 50,000 pods, for nothing, since none of it is garbage.
    Frozen, it is not walked again (docs/decisions/0077).
    """
    gc.collect()
    gc.freeze()
    print(sentence, flush=True)  # noqa: T201
