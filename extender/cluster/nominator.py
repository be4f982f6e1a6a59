"""Point kube-scheduler at a node that fits when none of its sample does.

It samples 500 of 5,000 nodes per attempt; a pod that fits only elsewhere could wait for minutes. A pod with
status.nominatedNodeName is tried on that node alone first (schedule_one.go, evaluateNominatedNode).
"""

import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple, Protocol

import structlog
from cachetools import TTLCache

from cotenant.cluster import Cluster, ClusterError, writes
from cotenant.contract.pods import Pod
from cotenant.contract.reasons import Reason
from cotenant.contract.request import PodRequest
from extender.ledger import Ledger

_log = structlog.get_logger(__name__)

# A pod's first failure is followed by a second attempt at once, since kube-scheduler's own note of the failure is an
# update of the pod; and at the end of an attempt it takes away a nomination that arrived meanwhile. So wait until the
# pod has been left alone for this long.
_QUIET_SECONDS = 0.05
# What keeps a node out of the sample may also be a taint or a full CPU, which we do not see. Each vain nomination makes
# kube-scheduler try again at once, so a pod gets a few of them, and then none for a while. A node gets more than one:
# it may have been taken away untried all the same.
_TRIES = 8
_TRIES_PER_NODE = 2
_TRIES_LAST_SECONDS = 300
_WAITING = 1_000
_PIECE = 250


class Judging(Protocol):
    """Be what tells which nodes fit."""

    def judge(self, request: PodRequest, nodes: list[str]) -> list[float | Reason]:
        """Give for each node its cost, or why it does not fit."""


class _Asked(NamedTuple):
    """Hold a pod that fits nowhere in its sample, and when to look for it."""

    due: float
    pod: Pod
    request: PodRequest
    sampled: frozenset[str]


class Nominator:
    """Nominate nodes in the background, one pod after the other."""

    def __init__(
        self, cluster: Cluster, ledger: Ledger, judge: Judging, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._cluster = cluster
        self._ledger = ledger
        self._judge = judge
        self._clock = clock
        self._condition = threading.Condition()
        self._stopping = False
        # by pod UID, the one that is due first standing first: each waits for the same time
        self._asked: dict[str, _Asked] = {}
        # how often each node was nominated lately, by pod UID
        self._tried: TTLCache[str, Counter[str]] = TTLCache(10_000, _TRIES_LAST_SECONDS)
        self._thread = threading.Thread(target=self._run, name="nominate", daemon=True)
        self._thread.start()

    def look(self, pod: Pod, request: PodRequest, sampled: frozenset[str]) -> None:
        """Note that nothing in *sampled* fits *pod*; where too many wait, its next attempt asks again."""
        with self._condition:
            if self._asked.pop(pod.uid, None) is None and len(self._asked) >= _WAITING:
                _log.warning("too many pods to nominate for", pod=pod.key, pod_uid=pod.uid)
                return
            self._asked[pod.uid] = _Asked(self._clock() + _QUIET_SECONDS, pod, request, sampled)
            self._condition.notify()

    def stop(self) -> None:
        """End after the nomination under way."""
        with self._condition:
            self._stopping = True
            self._condition.notify()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        while (asked := self._next()) is not None:
            try:
                self._nominate(asked)
            except ClusterError as error:
                _log.warning("nomination failed", pod=asked.pod.key, pod_uid=asked.pod.uid, why=str(error))

    def _next(self) -> _Asked | None:
        """Wait for the next pod that is due; None when it is time to stop."""
        with self._condition:
            while not self._stopping:
                first = next(iter(self._asked.values()), None)
                left = None if first is None else first.due - self._clock()
                if first is not None and left is not None and left <= 0:
                    return self._asked.pop(first.pod.uid)
                self._condition.wait(left)
        return None

    def _nominate(self, asked: _Asked) -> None:
        pod = asked.pod
        tried = self._tried.setdefault(pod.uid, Counter())
        nominated = pod.status.nominated_node_name
        # Not ours: victims are ending on that node for this pod.
        preempting = bool(nominated) and nominated not in tried
        if preempting or tried.total() >= _TRIES:
            return
        others = [view.name for view in self._ledger.views() if view.name not in asked.sampled]
        node = self._best(asked.request, others, tried)
        if node is None:
            return
        tried[node] += 1
        writes.nominate(self._cluster, namespace=pod.metadata.namespace, name=pod.metadata.name, uid=pod.uid, node=node)
        _log.info("nominated", pod=pod.key, pod_uid=pod.uid, node=node)

    def _best(self, request: PodRequest, nodes: list[str], tried: Counter[str]) -> str | None:
        """Find the cheapest node that fits, of those least often nominated."""
        open_to = [node for node in nodes if tried[node] < _TRIES_PER_NODE]
        fitting: list[tuple[int, float, str]] = []
        # in pieces, since kube-scheduler's next filter waits for the judge meanwhile
        for start in range(0, len(open_to), _PIECE):
            names = open_to[start : start + _PIECE]
            verdicts = zip(self._judge.judge(request, names), names, strict=True)
            fitting += [(tried[name], cost, name) for cost, name in verdicts if not isinstance(cost, Reason)]
        return min(fitting)[2] if fitting else None
