"""Feed the ledger with every node and pod of the cluster."""

from collections.abc import Callable

import structlog

from cotenant.cluster import Cluster, Reflector, Unreadable
from cotenant.cluster.reflector import Change
from cotenant.contract.pods import Pod
from cotenant.contract.reasons import Reason
from extender.ledger import Ledger, Node

_log = structlog.get_logger(__name__)

# Told of a pod that breaks the rules: its UID, namespace/name, why, and a sentence.
Complain = Callable[[str, str, Reason, str], None]


class Feed:
    """Keep the ledger equal to the API server's nodes and pods."""

    def __init__(self, cluster: Cluster, ledger: Ledger, complain: Complain) -> None:
        self.nodes: Reflector[Node] = Reflector(cluster, "/api/v1/nodes", Node, _Nodes(ledger))
        self.pods: Reflector[Pod] = Reflector(cluster, "/api/v1/pods", Pod, _Pods(ledger, complain), mark=ledger.mark)

    def start(self) -> None:
        """Begin to follow; return at once."""
        self.nodes.start()
        self.pods.start()

    def stop(self) -> None:
        """End both watches."""
        self.nodes.stop()
        self.pods.stop()

    def synced(self) -> bool:
        """Tell whether the ledger has been handed all nodes and all pods once."""
        return self.nodes.synced.is_set() and self.pods.synced.is_set()


class _Nodes:
    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def replaced(self, objects: list[Node], started: int, unreadable: list[Unreadable]) -> None:  # noqa: ARG002
        self._ledger.nodes_replaced(objects, [node.name for node in unreadable if node.name])

    def changed(self, change: Change, obj: Node) -> None:
        if change == "DELETED":
            self._ledger.node_gone(obj.metadata.name)
        else:
            self._ledger.observe_node(obj)

    def unreadable(self, change: Change, obj: Unreadable) -> None:
        if change == "DELETED" and obj.name:
            self._ledger.node_gone(obj.name)


class _Pods:
    def __init__(self, ledger: Ledger, complain: Complain) -> None:
        self._ledger = ledger
        self._complain = complain

    def replaced(self, objects: list[Pod], started: int, unreadable: list[Unreadable]) -> None:
        self._ledger.pods_replaced(objects, started, [pod.uid for pod in unreadable if pod.uid])
        for hold in self._ledger.holds():
            if hold.problem:
                self._complain(hold.uid, hold.key, Reason.BAD_GRANT, hold.problem)
        for uid, key in self._ledger.ungranted().items():
            self._ungranted(uid, key)

    def changed(self, change: Change, obj: Pod) -> None:
        if change == "DELETED":
            self._ledger.pod_gone(obj.uid)
            return
        self._ledger.observe_pod(obj)
        hold = self._ledger.hold(obj.uid)
        if hold is not None and hold.problem:
            self._complain(hold.uid, hold.key, Reason.BAD_GRANT, hold.problem)
        elif self._ledger.is_ungranted(obj.uid):
            self._ungranted(obj.uid, obj.key)

    def unreadable(self, change: Change, obj: Unreadable) -> None:
        if change == "DELETED" and obj.uid:
            self._ledger.pod_gone(obj.uid)

    def _ungranted(self, uid: str, key: str) -> None:
        self._complain(
            uid,
            key,
            Reason.NO_GRANT,
            f"{Reason.NO_GRANT.sentence}: give it no spec.nodeName and no other scheduler, and create it again",
        )
