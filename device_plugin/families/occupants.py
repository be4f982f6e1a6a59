"""Looks for another device plugin that serves the names we are to serve: two would hand out the same silicon."""

import socket
from collections.abc import Collection, Sequence
from pathlib import Path

from cotenant.cluster import Cluster, ClusterError
from cotenant.contract import inventory as inventories
from cotenant.contract.inventory import Family, InventoryError
from cotenant.contract.names import NVIDIA_DOMAIN, Names
from cotenant.contract.units import count_of
from device_plugin.cluster.notes import read_node


class OccupiedError(Exception):
    """Say that another device plugin serves what this node's GPUs are to be offered as."""


class Occupants:
    """Look at the sockets in *folder* and at what *node* offers."""

    def __init__(self, cluster: Cluster, node: str, folder: Path, names: Names) -> None:
        self._cluster = cluster
        self._node = node
        self._folder = folder
        self._names = names

    def refuse(self, resources: Collection[str]) -> None:
        """Raise OccupiedError where another plugin serves one of *resources*."""
        for sentence in self.taken(resources).values():
            raise OccupiedError(sentence)

    def taken(self, resources: Collection[str], *, new_to_us: bool = False) -> dict[str, str]:
        """Name those of *resources* that another plugin serves, each with a sentence.

        Where none was ever offered by this process, they are *new_to_us*, whatever it has published.
        """
        foreign = sorted(name for name in resources if name.startswith(f"{NVIDIA_DOMAIN}/"))
        # NVIDIA's plugin: internal/plugin/server.go
        sockets = {name: self._folder / f"nvidia-{name.partition('/')[2]}.sock" for name in foreign}
        found = {name: f"{path} answers" for name, path in sockets.items() if is_served(path)}
        for name in self._offered_by_another([name for name in foreign if name not in found], new_to_us=new_to_us):
            found[name] = f"node {self._node} offers it, and publishes no GPU of ours that is"
        return {name: self._sentence(name, why) for name, why in found.items()}

    def _sentence(self, resource: str, why: str) -> str:
        way_out = (
            f", or set migDomain: {self._names.domain} here, in the extender's configuration and in the admission "
            "policies"
            if resource.startswith(f"{NVIDIA_DOMAIN}/mig-")
            else ""
        )
        return f"another device plugin serves {resource}: {why}. Remove it from this node{way_out}"

    def _offered_by_another(self, resources: Sequence[str], *, new_to_us: bool) -> list[str]:
        """Name those of *resources* that the kubelet has, though no plugin of ours has published GPUs for them."""
        if not resources:
            return []
        try:
            node = read_node(self._cluster, self._node)
        except ClusterError:
            return []  # the sockets have said what can be said
        text = (node.metadata.annotations or {}).get(self._names.inventory, "")
        try:
            ours = any(gpu.family is not Family.MEMORY for gpu in inventories.decode(text).gpus)
        except InventoryError:
            # of a plugin of ours too, of another release: the kubelet shows for seconds what that offered
            ours = bool(text)
        offered = (node.status.allocatable or {}) if new_to_us or not ours else {}
        return [name for name in resources if count_of(offered.get(name)) > 0]


def is_served(path: Path) -> bool:
    """Tell whether somebody listens on the Unix socket at *path*."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True
