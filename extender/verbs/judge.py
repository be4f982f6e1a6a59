"""What every node is worth to a request, remembered until the node changes."""

import threading

from cachetools import LRUCache

from cotenant.contract.names import Names
from cotenant.contract.pods import Pod
from cotenant.contract.reasons import Reason
from cotenant.contract.request import PodRequest, RequestError, parse
from extender.fit import Placement, place
from extender.ledger import Ledger, NodeView
from extender.policies import POLICIES, Policy

# Requests that are alike share one memory, so this is the number of different sizes in flight, not of pods.
_SHAPES = 32
_NODES_REMEMBERED = 20_000


class Judge:
    """Read requests and judge nodes for them; safe to use from many threads."""

    def __init__(self, ledger: Ledger, names: Names, unit_bytes: int, default_policy: str) -> None:
        self._ledger = ledger
        self._names = names
        self._unit_bytes = unit_bytes
        self._default_policy = default_policy
        # shape -> node -> the view that was judged, and its cost or why it does not fit. The costs alone: a placement
        # would be ten times larger, and bind must choose anew under the lock anyway.
        self._memory: LRUCache[object, dict[str, tuple[NodeView, float | Reason]]] = LRUCache(_SHAPES)
        self._lock = threading.Lock()

    def request(self, pod: Pod) -> PodRequest | None:
        """Read what *pod* asks of us, None for nothing; raise RequestError where that cannot be met anywhere."""
        request = parse(pod, self._names, self._unit_bytes)
        if request is not None:
            self.policy(request)
        return request

    def policy(self, request: PodRequest) -> Policy:
        """Give the policy that the pod wishes for, or the default; raise RequestError for one that does not exist."""
        name = request.wishes.policy or self._default_policy
        policy = POLICIES.get(name)
        if policy is None:
            raise RequestError(
                Reason.BAD_REQUEST, f"{self._names.policy}: {name!r} is none of {', '.join(sorted(POLICIES))}"
            )
        return policy

    def judge(self, request: PodRequest, nodes: list[str]) -> list[float | Reason]:
        """Give for each node its cost to the request, the lower the better, or why it does not fit."""
        policy = self.policy(request)
        shape = request.shape
        with self._lock:
            known = self._memory.get(shape)
            # Clusters that scale up and down never use a node's name twice; forget all now and then.
            if known is None or len(known) > 2 * len(nodes) + _NODES_REMEMBERED:
                known = self._memory[shape] = {}
        verdicts: list[float | Reason] = []
        view_of = self._ledger.view
        for name in nodes:
            view = view_of(name)
            if view is None:
                verdicts.append(Reason.UNKNOWN_NODE)
                continue
            remembered = known.get(name)
            # A changed node has another view, so an old verdict cannot be taken for a new one.
            if remembered is not None and remembered[0] is view:
                verdicts.append(remembered[1])
                continue
            placed = place(view, request, policy)
            verdict = placed.cost if isinstance(placed, Placement) else placed
            known[name] = (view, verdict)
            verdicts.append(verdict)
        return verdicts
