"""Feed the ledger with every node and pod of the cluster."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import structlog

from cotenant.cluster import Change, Cluster, Reflector, Unreadable
from cotenant.contract.pods import Metadata, Pod, Spec
from cotenant.contract.reasons import Reason
from extender.cluster import pods
from extender.cluster.events import Tell
from extender.ledger import Hold, Ledger, Node, Stage

_log = structlog.get_logger(__name__)

# What a dead connection hides (a pod's end, a GPU that is ill) is known this late at most. Another watch from where the
# last one ended costs the API server little, and where pods come and go no watch is ever silent for so long. client-go
# finds a dead connection out after 45 s (HTTP/2 pings); a pod that waits for room that is there is to wait 30.
_SILENCE_SECONDS = 15.0
# For one pod, while the watch waits.
_REQUEST_SECONDS = 4.0

# what is kept of a listed pod until all are here
_BOUND, _UNBOUND = Spec(node_name="bound"), Spec()


class NodeOnlooker(Protocol):
    """Be told of nodes' annotations beside the ledger's; must be quick."""

    def node_seen(self, name: str, annotations: Mapping[str, str] | None) -> None:
        """Take a node's annotations."""

    def node_gone(self, name: str) -> None:
        """Take over that a node is gone."""


class Onlooker(NodeOnlooker, Protocol):
    """Be told of pods' annotations as well."""

    def pod_seen(self, uid: str, key: str, annotations: Mapping[str, str] | None) -> None:
        """Take a pod's annotations."""

    def pod_gone(self, uid: str) -> None:
        """Take over that a pod is gone."""


class Feed:
    """Keep the ledger equal to the API server's nodes and pods."""

    def __init__(
        self, cluster: Cluster, ledger: Ledger, complain: Tell, onlooker: Onlooker, *of_nodes: NodeOnlooker
    ) -> None:
        nodes = _Nodes(ledger, (onlooker, *of_nodes))
        self.nodes: Reflector[Node] = Reflector(
            cluster, "/api/v1/nodes", Node, nodes, by_page=nodes.take_page, silence=_SILENCE_SECONDS
        )
        sink = _Pods(cluster, ledger, complain, onlooker)
        self.pods: Reflector[Pod] = Reflector(
            cluster, "/api/v1/pods", Pod, sink, mark=ledger.mark, by_page=sink.take_page, silence=_SILENCE_SECONDS
        )

    def start(self) -> None:
        """Begin to follow; return at once."""
        self.nodes.start()
        self.pods.start()

    def stop(self) -> None:
        """End both watches."""
        self.nodes.stop()
        self.pods.stop()

    def ended(self) -> list[str]:
        """Name the watches whose threads have ended without being told to."""
        return [f"watch {name}" for name, watch in (("nodes", self.nodes), ("pods", self.pods)) if watch.ended]

    def synced(self) -> bool:
        """Tell whether the ledger has been handed all nodes and all pods once."""
        return self.nodes.synced.is_set() and self.pods.synced.is_set()


class _Nodes:
    def __init__(self, ledger: Ledger, onlookers: Sequence[NodeOnlooker]) -> None:
        self._ledger = ledger
        self._onlookers = onlookers

    def take_page(self, objects: list[Node]) -> list[Node]:
        """Take over part of a LIST, and keep who was in it: the annotations of 20,000 nodes are 30 MiB."""
        for node in objects:
            self._ledger.observe_node(node)
            self._seen(node)
        return [Node(metadata=Node.Metadata(name=node.metadata.name)) for node in objects]

    def replaced(self, objects: list[Node], started: int, unreadable: list[Unreadable]) -> None:  # noqa: ARG002
        listed = {*(node.metadata.name for node in objects), *(node.name for node in unreadable if node.name)}
        for name in self._ledger.nodes_replaced(listed):
            self._gone(name)

    def changed(self, change: Change, obj: Node) -> None:
        if change == "DELETED":
            self._ledger.node_gone(obj.metadata.name)
            self._gone(obj.metadata.name)
        else:
            self._ledger.observe_node(obj)
            self._seen(obj)

    def unreadable(self, change: Change, obj: Unreadable) -> None:
        if change == "DELETED" and obj.name:
            self._ledger.node_gone(obj.name)
            self._gone(obj.name)

    def _gone(self, name: str) -> None:
        for onlooker in self._onlookers:
            onlooker.node_gone(name)

    def _seen(self, node: Node) -> None:
        for onlooker in self._onlookers:
            onlooker.node_seen(node.metadata.name, node.metadata.annotations)


class _Pods:
    def __init__(self, cluster: Cluster, ledger: Ledger, complain: Tell, onlooker: Onlooker) -> None:
        self._cluster = cluster
        self._ledger = ledger
        self._complain = complain
        self._onlooker = onlooker

    def take_page(self, objects: list[Pod]) -> list[Pod]:
        """Take over part of a LIST, and keep who was in it, and whether bound."""
        self._ledger.observe_pods(objects)
        for pod in objects:
            self._onlooker.pod_seen(pod.uid, pod.key, pod.metadata.annotations)
        return [
            Pod(metadata=Metadata(name="", uid=pod.uid), spec=_BOUND if pod.spec.node_name else _UNBOUND)
            for pod in objects
        ]

    def replaced(self, objects: list[Pod], started: int, unreadable: list[Unreadable]) -> None:
        listed = {*(pod.uid for pod in objects), *(pod.uid for pod in unreadable if pod.uid)}
        for uid in self._ledger.pods_replaced(listed, started):
            self._onlooker.pod_gone(uid)
        unbound = {pod.uid for pod in objects if not pod.spec.node_name}
        for hold in self._ledger.holds():
            if hold.uid not in listed or (hold.uid in unbound and hold.stage is Stage.BOUND):
                self._look_again(hold)
        for hold in self._ledger.holds():
            if hold.problem:
                self._complain(hold.uid, hold.key, Reason.BAD_GRANT, hold.problem)
        for uid, key in self._ledger.ungranted().items():
            self._ungranted(uid, key)

    def changed(self, change: Change, obj: Pod) -> None:
        if change == "DELETED":
            self._gone(obj.uid)
            return
        self._ledger.observe_pod(obj)
        self._onlooker.pod_seen(obj.uid, obj.key, obj.metadata.annotations)
        hold = self._ledger.hold(obj.uid)
        if hold is not None and hold.problem:
            self._complain(hold.uid, hold.key, Reason.BAD_GRANT, hold.problem)
        elif self._ledger.is_ungranted(obj.uid):
            self._ungranted(obj.uid, obj.key)

    def unreadable(self, change: Change, obj: Unreadable) -> None:
        if change == "DELETED" and obj.uid:
            self._gone(obj.uid)

    def _gone(self, uid: str) -> None:
        self._ledger.pod_gone(uid)
        self._onlooker.pod_gone(uid)

    def _look_again(self, hold: Hold) -> None:
        """Ask for a pod that a LIST does not show as the ledger has it, as it was given its place beside the LIST.

        Mostly it is younger than the LIST, and the watch will tell of it. But it may have gone before the LIST, and
        nothing ever would; or its bind was undone, where the API server was given the data of a backup. Should that not
        be told now, ClusterError has all listed again.
        """
        namespace, _, name = hold.key.partition("/")
        pod = pods.read(self._cluster, namespace=namespace, name=name, uid=hold.uid, timeout=_REQUEST_SECONDS)
        if pod is None:
            self._gone(hold.uid)
        else:
            self._ledger.undo(hold, pod)

    def _ungranted(self, uid: str, key: str) -> None:
        self._complain(
            uid,
            key,
            Reason.NO_GRANT,
            f"{Reason.NO_GRANT.sentence}: give it no spec.nodeName and no other scheduler, and create it again",
        )
