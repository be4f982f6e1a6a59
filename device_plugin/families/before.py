"""How a plugin before this one had the GPUs of its node: what it published, as far as an inventory tells."""

import random
import time
from pathlib import PurePath

import structlog

from cotenant.cluster import Cluster, ClusterError
from cotenant.cluster.backoff import Backoff
from cotenant.contract import inventory as inventories
from cotenant.contract.inventory import GPU, MIG, Family, InventoryError
from cotenant.contract.names import Names, mig_suffix
from device_plugin.cluster.notes import Node, read_node
from device_plugin.families.rules import Assigned
from device_plugin.mps.plan import group_of

log = structlog.get_logger(__name__)

# After a reboot the way to the API server may not be there yet, or everybody asks it at once. For longer the containers
# that start again are not to wait.
_SECONDS = 5.0


def read(cluster: Cluster, node: str, names: Names) -> dict[str, Assigned] | None:
    """Read how each GPU of *node* was, by UUID: nothing at a first start, None where that cannot be told."""
    try:
        annotations = _read(cluster, node).metadata.annotations or {}
        published = inventories.decode(annotations[names.inventory]).gpus if names.inventory in annotations else ()
    except (ClusterError, InventoryError) as error:
        log.warning("configuration.before_unknown", error=str(error))
        return None
    return {gpu.uuid: as_published(gpu) for gpu in published}


def _read(cluster: Cluster, node: str) -> Node:
    """Read the node, asking again for some seconds; raise as read_node does."""
    until = time.monotonic() + _SECONDS
    backoff = Backoff(random.Random())  # noqa: S311 - spreads load, guards nothing
    while True:
        try:
            return read_node(cluster, node)
        except ClusterError:
            pause = backoff.next()
            if time.monotonic() + pause > until:
                raise
            time.sleep(pause)


def as_published(gpu: GPU) -> Assigned:
    """Say how a GPU was assigned; of shares of a GPU nobody says how many there were, so it is none."""
    mig = gpu.mig or MIG()
    return Assigned(
        gpu.family,
        gpu.mode,
        group=group_of(PurePath(gpu.mps_pipe).parent.name),
        replicas=0 if gpu.family is Family.REPLICAS else 1,
        profiles=tuple(sorted((mig_suffix(one.profile), one.replicas) for one in mig.shares)),
        renamed=any(one.renamed for one in mig.shares),
    )
