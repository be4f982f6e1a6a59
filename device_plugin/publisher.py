"""Keeps the node's annotation equal to what this node has, and writes it only when it differs."""

import threading

import msgspec
import structlog

from cotenant.cluster import Cluster, ClusterError, Reflector, Unreadable, writes
from cotenant.contract import inventory as inventories
from cotenant.contract.inventory import GPU, Inventory, InventoryError
from cotenant.contract.names import Names
from device_plugin.inventory import next_inventory

log = structlog.get_logger(__name__)

_RETRY_SECONDS = (0.2, 10.0)
_WRITE_SECONDS = 5.0
_LAST_WRITE_SECONDS = 2.0


class _Metadata(msgspec.Struct, frozen=True, rename="camel"):
    name: str
    resource_version: str | None = None
    annotations: dict[str, str] | None = None


class _Node(msgspec.Struct, frozen=True):
    metadata: _Metadata


class Publisher:
    """Publish the inventory of *node*, from a thread of its own.

    The node is watched, so that a node that lost the annotation, or was created anew, gets it again, and so that the
    generation goes on from what the plugin before this one had published.
    """

    def __init__(self, cluster: Cluster, node: str, names: Names, *, unit_bytes: int) -> None:
        self._cluster = cluster
        self._node = node
        self._names = names
        self._unit_bytes = unit_bytes
        self._changed = threading.Condition()
        self._gpus: tuple[GPU, ...] = ()
        self._serving = False
        # None: no node seen yet; "" a node without our annotation
        self._seen: str | None = None
        self._last: Inventory | None = None
        self._wanted = False
        self._stopping = False
        self._reflector = Reflector(
            cluster, "/api/v1/nodes", _Node, self, selector={"fieldSelector": f"metadata.name={node}"}
        )
        self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)

    def start(self) -> None:
        """Begin to watch and to write; return at once."""
        self._reflector.start()
        self._thread.start()

    def stop(self) -> None:
        """Say on the node that nothing is served any more, if that can be said quickly, and end."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()
        self._reflector.stop()
        with self._changed:
            self._serving = False
            update = self._update()
        if update is not None:
            try:
                self._write(update, seconds=_LAST_WRITE_SECONDS)
            except ClusterError as error:
                log.warning("inventory.not_withdrawn", error=str(error))

    def set_gpus(self, gpus: tuple[GPU, ...]) -> None:
        """Take the node's GPUs."""
        with self._changed:
            self._gpus, self._wanted = gpus, True
            self._changed.notify_all()

    def set_serving(self, *, serving: bool) -> None:
        """Take whether a kubelet follows our devices."""
        with self._changed:
            self._serving = serving
            self._changed.notify_all()

    # The reflector's sink.

    def replaced(self, objects: list[_Node], started: int, unreadable: list[Unreadable]) -> None:  # noqa: ARG002
        """Take the node, or that there is none."""
        self._saw(objects[0] if objects else None)

    def changed(self, change: str, obj: _Node) -> None:
        """Take the node's newest state."""
        self._saw(None if change == "DELETED" else obj)

    def unreadable(self, change: str, obj: Unreadable) -> None:
        """Keep what was seen last."""

    def _saw(self, node: _Node | None) -> None:
        with self._changed:
            self._seen = None if node is None else (node.metadata.annotations or {}).get(self._names.inventory, "")
            self._changed.notify_all()

    def _run(self) -> None:
        pause = _RETRY_SECONDS[0]
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or self._update() is not None)
                if self._stopping:
                    return
                update = self._update()
            if update is None:
                continue
            try:
                self._write(update, seconds=_WRITE_SECONDS)
                pause = _RETRY_SECONDS[0]
            except ClusterError as error:
                log.warning("inventory.not_published", error=str(error), retry_seconds=pause)
                with self._changed:
                    self._changed.wait_for(lambda: self._stopping, timeout=pause)
                pause = min(2 * pause, _RETRY_SECONDS[1])

    def _update(self) -> Inventory | None:
        """Give the inventory to write; None when the node has it, or is not there, or nothing is known yet."""
        if self._seen is None or not self._wanted:
            return None
        try:
            before = inventories.decode(self._seen) if self._seen else None
        except InventoryError:
            # by an older or newer plugin, or by hand: ours replaces it, and its generation is lost with it
            before = None
        after = next_inventory(before, self._gpus, unit_bytes=self._unit_bytes, serving=self._serving)
        if after == before:
            return None
        # The watch may still show what stood there before our last write; a generation is not given twice.
        if self._last is not None and after != self._last and after.generation <= self._last.generation:
            return msgspec.structs.replace(after, generation=self._last.generation + 1)
        return after

    def _write(self, inventory: Inventory, *, seconds: float) -> None:
        text = inventories.encode(inventory)
        writes.annotate_node(self._cluster, self._node, {self._names.inventory: text}, timeout=seconds)
        with self._changed:
            # the watch shows it in a moment; until then this is what the node has
            self._seen, self._last = text, inventory
        log.info(
            "inventory.published",
            generation=inventory.generation,
            serving=inventory.serving,
            gpus=len(inventory.gpus),
            unhealthy=sum(gpu.health is not inventories.Health.HEALTHY for gpu in inventory.gpus),
        )
