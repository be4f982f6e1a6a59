"""Have filter wait for the bind of the pod before it where there may not be room for both.

kube-scheduler sends the bind while it asks about the next pod, whose filter may come first, see the same room, and
promise it again: 1 % of the binds of a herd onto a nearly full cluster, each with its pod sent into a back-off. To wait
costs little, since the bind is on its way (docs/decisions/0076).
"""

import threading
from collections.abc import Iterable

from cotenant.contract.request import PodRequest
from extender.ledger import NodeView

# A bind that has not come by then may never come: its pod waits for a volume, or another plugin has refused it.
_PATIENCE_SECONDS = 0.05


class Expected:
    """Keep the pods that filter has let through and bind has not seen yet; safe to use from many threads."""

    def __init__(self, *, patience: float = _PATIENCE_SECONDS) -> None:
        self._patience = patience
        self._condition = threading.Condition()
        self._requests: dict[str, PodRequest] = {}

    def wait(self, uid: str, request: PodRequest, nodes: Iterable[NodeView | None]) -> bool:
        """Wait for the others' binds, not for ever, where one of *nodes* may not hold them and the pod; tell whether.

        Those that have not come by then are not waited for again.
        """
        if not self._requests:
            return False
        with self._condition:
            # it is asked about again, so its bind is not on its way
            self._requests.pop(uid, None)
            together = [request, *self._requests.values()]
            if not self._requests or all(_has_room(node, together) for node in nodes):
                return False
            self._condition.wait_for(lambda: not self._requests, self._patience)
            self._requests.clear()
            return True

    def expect(self, uid: str, request: PodRequest) -> None:
        """Note that filter lets the pod of that UID through."""
        with self._condition:
            self._requests[uid] = request

    def came(self, uid: str) -> None:
        """Note that the ledger knows what the pod's bind has taken, or that it takes nothing."""
        with self._condition:
            self._requests.pop(uid, None)
            if not self._requests:
                self._condition.notify_all()


def _has_room(node: NodeView | None, requests: list[PodRequest]) -> bool:
    """Tell whether the node certainly holds all of them, as if each were as large as the largest.

    Of those that are not plainly so much of one GPU nothing is certain.
    """
    plain = all(
        len(request.containers) == 1
        and request.wishes.gpu_count == 1
        and not (
            request.profiles or request.wishes.isolation.whole_gpu or request.wishes.models or request.wishes.uuids
        )
        for request in requests
    )
    if node is None or node.problem is not None or not plain:
        return False
    need = max(request.containers[0].share_bytes for request in requests)
    return sum(state.free_bytes // need for state in node.healthy) >= len(requests)
