"""Keeps the node's annotation equal to what this node has, and writes it only when it differs."""

import threading
from collections.abc import Callable

import msgspec
import structlog

from cotenant.cluster import Cluster, ClusterError, Reflector, Unreadable, writes
from cotenant.contract import inventory as inventories
from cotenant.contract.inventory import GPU, Inventory, InventoryError
from cotenant.contract.names import Names
from device_plugin.cluster.notes import Node, NodeMetadata
from device_plugin.inventory import next_inventory
from device_plugin.threads import THREADS

log = structlog.get_logger(__name__)

_RETRY_SECONDS = (0.2, 10.0)
# What the node is told at the end, and the watch, take half of the 10 s in which a plugin has to be gone after SIGTERM,
# whatever the API server does. With one that vanished the rest of it may take longer: nothing is left to withdraw then.
_WRITE_SECONDS = 3.0
_LAST_WRITE_SECONDS = 2.0
_STOP_SECONDS = 1.0


class Publisher:
    """Publish the inventory of *node*, from a thread of its own.

    The node is watched, so that a node that lost the annotation, or was created anew, gets it again, and so that the
    generation goes on from what the plugin before this one had published. *noticed* is told of the node each time
    before anything is written, None where there is none.
    """

    def __init__(
        self,
        cluster: Cluster,
        node: str,
        names: Names,
        *,
        unit_bytes: int,
        noticed: Callable[[NodeMetadata | None], None] = lambda _: None,
    ) -> None:
        self._cluster = cluster
        self._node = node
        self._names = names
        self._unit_bytes = unit_bytes
        self._noticed = noticed
        self._changed = threading.Condition()
        self._gpus: tuple[GPU, ...] = ()
        self._serving = False
        # None: no node seen yet; "" a node without our annotation
        self._seen: str | None = None
        # the last that was written, and whether the watch has yet to show it
        self._last: Inventory | None = None
        self._echo_due = False
        self._wanted = False
        self._stopping = False
        self._reflector = Reflector(
            cluster, "/api/v1/nodes", Node, self, selector={"fieldSelector": f"metadata.name={node}"}
        )
        self._loop = THREADS.of("publisher", self._run)

    def start(self) -> None:
        """Begin to watch and to write; return at once."""
        self._reflector.start()
        self._loop.start()

    def stop(self) -> None:
        """Say on the node that nothing is served any more, if that can be said quickly, and end."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._loop.join()
        self._reflector.stop(_STOP_SECONDS)
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

    def ask_serving(self, serving: Callable[[], bool]) -> None:
        """Ask *serving* whether a kubelet follows our devices, and take what it says."""
        with self._changed:
            # asked under the lock: else of two threads the one that asked first could be taken last
            self._serving = serving()
            self._changed.notify_all()

    # The reflector's sink.

    def replaced(self, objects: list[Node], started: int, unreadable: list[Unreadable]) -> None:  # noqa: ARG002
        """Take the node, or that there is none."""
        with self._changed:
            self._echo_due = False  # a list shows the newest, so no echo of anything older can follow
        self._saw(objects[0] if objects else None)

    def changed(self, change: str, obj: Node) -> None:
        """Take the node's newest state."""
        self._saw(None if change == "DELETED" else obj)

    def unreadable(self, change: str, obj: Unreadable) -> None:
        """Keep what was seen last."""

    def _saw(self, node: Node | None) -> None:
        self._noticed(None if node is None else node.metadata)
        with self._changed:
            self._seen = None if node is None else (node.metadata.annotations or {}).get(self._names.inventory, "")
            if self._last is not None and self._seen == inventories.encode(self._last):
                self._echo_due = False
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
        # until the watch shows our last write, what it shows is older than that
        before = self._last if self._echo_due else self._read(self._seen)
        after = next_inventory(before, self._gpus, unit_bytes=self._unit_bytes, serving=self._serving)
        if after == before:
            return None
        if self._last is not None and after.generation <= self._last.generation:
            # a generation is not given to two inventories, nor two of them to the same one that has to be written again
            same = msgspec.structs.replace(after, generation=self._last.generation) == self._last
            after = self._last if same else msgspec.structs.replace(after, generation=self._last.generation + 1)
        return after

    @staticmethod
    def _read(text: str) -> Inventory | None:
        try:
            return inventories.decode(text) if text else None
        except InventoryError:
            return None  # written by an older or newer plugin, or by hand: ours replaces it

    def _write(self, inventory: Inventory, *, seconds: float) -> None:
        with self._changed:
            # before it is sent: its echo can be here sooner than its reply
            self._last, self._echo_due = inventory, True
        try:
            text = inventories.encode(inventory)
            writes.annotate_node(self._cluster, self._node, {self._names.inventory: text}, timeout=seconds)
        except ClusterError:
            with self._changed:
                self._echo_due = False
            raise
        log.info(
            "inventory.published",
            generation=inventory.generation,
            serving=inventory.serving,
            gpus=len(inventory.gpus),
            unhealthy=sum(gpu.health is not inventories.Health.HEALTHY for gpu in inventory.gpus),
        )
