"""What every node is worth to a request, remembered until the node changes."""

import threading
from typing import cast

from cachetools import LRUCache

from cotenant.contract.names import Names
from cotenant.contract.pods import Pod
from cotenant.contract.reasons import Reason
from cotenant.contract.request import PodRequest, RequestError, parse
from extender.fit import Placement, place
from extender.ledger import Ledger
from extender.policies import POLICIES, Policy

# Requests that are alike share one memory, so this is the number of different sizes in flight, not of pods.
_SHAPES = 32


class Judge:
    """Read requests and judge nodes for them; safe to use from many threads."""

    def __init__(self, ledger: Ledger, names: Names, unit_bytes: int, default_policy: str) -> None:
        self._ledger = ledger
        self._names = names
        self._unit_bytes = unit_bytes
        self._default_policy = default_policy
        self._memory: LRUCache[object, _Memory] = LRUCache(_SHAPES)
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
        # One at a time: a verdict on an old view must not be written after one on a newer view.
        with self._lock:
            memory = self._memory.get(request.shape)
            if memory is None:
                memory = self._memory[request.shape] = _Memory(self._ledger.changes(0)[0])
            memory.forget_changed(self._ledger)
            known = memory.verdicts
            found = [known.get(name) for name in nodes]
            # Mostly nothing is missing; that test costs a tenth of looking at each node in Python.
            if None in found:
                for n, name in enumerate(nodes):
                    if found[n] is None:
                        found[n] = known[name] = self._judge(name, request, policy)
            return cast("list[float | Reason]", found)

    def _judge(self, node: str, request: PodRequest, policy: Policy) -> float | Reason:
        view = self._ledger.view(node)
        if view is None:
            return Reason.UNKNOWN_NODE
        placed = place(view, request, policy)
        # The cost alone: a placement is ten times larger, and bind must choose anew under the ledger's lock anyway.
        return placed.cost if isinstance(placed, Placement) else placed


class _Memory:
    """Remember the verdicts on nodes for requests of one shape, as long as the nodes do not change."""

    def __init__(self, seen: int) -> None:
        self.verdicts: dict[str, float | Reason] = {}
        self._seen = seen

    def forget_changed(self, ledger: Ledger) -> None:
        self._seen, changed = ledger.changes(self._seen)
        if changed is None:
            self.verdicts.clear()
            return
        for name in changed:
            self.verdicts.pop(name, None)
