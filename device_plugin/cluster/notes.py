"""Keeps what the plugin writes on its node beside the inventory: few notes, rarely, and only when they differ."""

import threading
from collections.abc import Callable, Mapping

import msgspec
import structlog

from cotenant.cluster import Cluster, ClusterError, writes
from cotenant.cluster.reading import answered
from cotenant.contract.configuration import ConfigurationError
from device_plugin.threads import THREADS

log = structlog.get_logger(__name__)

_RETRY_SECONDS = (0.2, 10.0)
_WRITE_SECONDS = 3.0
_LAST_WRITE_SECONDS = 1.0
_NODE_SECONDS = 5.0


class NodeMetadata(msgspec.Struct, frozen=True, rename="camel"):
    """Hold the fields of a Node's metadata that the plugin reads."""

    name: str
    uid: str = ""
    resource_version: str | None = None
    annotations: dict[str, str] | None = None
    labels: dict[str, str] | None = None


class Node(msgspec.Struct, frozen=True):
    """Hold what the plugin reads of a Node."""

    class Status(msgspec.Struct, frozen=True):
        """Hold what the kubelet offers."""

        allocatable: dict[str, str | int] | None = None

    metadata: NodeMetadata
    status: Status = Status()


class _NodeList(msgspec.Struct, frozen=True):
    items: tuple[Node, ...] = ()


_nodes = msgspec.json.Decoder(_NodeList)


def read_node(cluster: Cluster, node: str) -> Node:
    """Read the node as it is now, one without anything where there is none.

    Raises ClusterError.
    """
    reply = cluster.get("/api/v1/nodes", query={"fieldSelector": f"metadata.name={node}"}, timeout=_NODE_SECONDS)
    nodes = answered(_nodes, reply.body).items
    return nodes[0] if nodes else Node(NodeMetadata(name=node))


def labels_of(cluster: Cluster, node: str) -> dict[str, str]:
    """Read the labels of the node; raise ConfigurationError where it cannot be asked for what its label says."""
    try:
        return read_node(cluster, node).metadata.labels or {}
    except ClusterError as error:
        raise ConfigurationError(f"the label that selects rules for node {node} cannot be read: {error}") from error


class NodeNotes:
    """Hold annotations and labels of one node at what is wanted, from a thread of its own.

    *erased* is told the key of an annotation that stood as wanted and that somebody has taken away.
    """

    def __init__(self, cluster: Cluster, node: str, erased: Callable[[str], None]) -> None:
        self._cluster = cluster
        self._node = node
        self._erased = erased
        self._changed = threading.Condition()
        self._annotations: dict[str, str | None] = {}
        self._labels: dict[str, str | None] = {}
        # what the watch showed last, and the same with our own writes since
        self._watched: NodeMetadata | None = None
        self._seen: NodeMetadata | None = None
        self._stopping = False
        self._loop = THREADS.of("node notes", self._run)

    def start(self) -> None:
        """Begin to write."""
        self._loop.start()

    def stop(self, *, withdraw: tuple[str, ...] = ()) -> None:
        """End, with the annotations in *withdraw* taken away if that can be done quickly."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
            for key in withdraw:
                if key in self._annotations:
                    self._annotations[key] = None
            due = self._due()
        self._loop.join(_WRITE_SECONDS)
        if due is not None:
            try:
                self._write(due, seconds=_LAST_WRITE_SECONDS)
            except ClusterError as error:
                log.warning("notes.not_withdrawn", error=str(error))

    def annotate(self, key: str, text: str | None) -> None:
        """Want *text* in an annotation, None for none."""
        self._want(self._annotations, key, text)

    def label(self, key: str, text: str | None) -> None:
        """Want *text* in a label, None for none."""
        self._want(self._labels, key, text)

    def seen(self, metadata: NodeMetadata | None) -> None:
        """Take the node's newest state, None where there is none."""
        with self._changed:
            before, self._watched = self._watched, metadata
            self._seen = metadata
            same = before is not None and metadata is not None and before.uid == metadata.uid
            had, has = _annotations(before), _annotations(metadata)
            erased = [
                key
                for key, text in self._annotations.items()
                if same and text is not None and had.get(key) == text and key not in has
            ]
            # before the thread looks, which would write them again
            self._annotations |= dict.fromkeys(erased)
            self._changed.notify_all()
        for key in erased:
            self._erased(key)

    def _want(self, wanted: dict[str, str | None], key: str, text: str | None) -> None:
        with self._changed:
            if key not in wanted or wanted[key] != text:
                wanted[key] = text
                self._changed.notify_all()

    def _due(self) -> tuple[dict[str, str | None], dict[str, str | None]] | None:
        """Give what differs from the node, None where nothing does or there is no node."""
        if self._seen is None:
            return None
        annotations = _differing(self._annotations, _annotations(self._seen))
        labels = _differing(self._labels, self._seen.labels or {})
        return (annotations, labels) if annotations or labels else None

    def _run(self) -> None:
        pause = _RETRY_SECONDS[0]
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or self._due() is not None)
                if self._stopping:
                    return
                due = self._due()
            if due is None:
                continue
            try:
                self._write(due, seconds=_WRITE_SECONDS)
                pause = _RETRY_SECONDS[0]
            except ClusterError as error:
                log.warning("notes.not_written", error=str(error), retry_seconds=pause)
                with self._changed:
                    self._changed.wait_for(lambda: self._stopping, timeout=pause)
                pause = min(2 * pause, _RETRY_SECONDS[1])

    def _write(self, due: tuple[dict[str, str | None], dict[str, str | None]], *, seconds: float) -> None:
        annotations, labels = due
        writes.annotate_node(self._cluster, self._node, annotations, labels=labels, timeout=seconds)
        with self._changed:
            # as the watch is about to show it; if it shows older states meanwhile, the same is written once more
            if self._seen is not None:
                self._seen = msgspec.structs.replace(
                    self._seen,
                    annotations=_applied(_annotations(self._seen), annotations),
                    labels=_applied(self._seen.labels or {}, labels),
                )


def _annotations(metadata: NodeMetadata | None) -> dict[str, str]:
    return {} if metadata is None else metadata.annotations or {}


def _differing(wanted: Mapping[str, str | None], found: Mapping[str, str]) -> dict[str, str | None]:
    return {key: text for key, text in wanted.items() if found.get(key) != text}


def _applied(before: Mapping[str, str], change: Mapping[str, str | None]) -> dict[str, str]:
    return {key: text for key, text in {**before, **change}.items() if text is not None}
