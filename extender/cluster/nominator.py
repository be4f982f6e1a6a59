"""Point kube-scheduler at a node that fits when none of its sample does.

It samples 500 of 5,000 nodes per attempt; a pod that fits only elsewhere could wait for minutes. A pod with
status.nominatedNodeName is tried on that node alone first (schedule_one.go, evaluateNominatedNode).
"""

import queue
import threading
from typing import Protocol

import structlog
from cachetools import TTLCache

from cotenant.cluster import Cluster, ClusterError, writes
from cotenant.contract.pods import Pod
from cotenant.contract.reasons import Reason
from cotenant.contract.request import PodRequest
from extender.ledger import Ledger

_log = structlog.get_logger(__name__)

# What keeps a node out of the sample may also be a taint or a full CPU, which we do not see. Each vain nomination makes
# kube-scheduler try again at once, so a pod gets a few of them, and then none for a while.
_TRIES = 8
_TRIES_LAST_SECONDS = 300
_QUEUE = 1_000
_PIECE = 250


class Judging(Protocol):
    """Be what tells which nodes fit."""

    def judge(self, request: PodRequest, nodes: list[str]) -> list[float | Reason]:
        """Give for each node its cost, or why it does not fit."""


class Nominator:
    """Nominate nodes in the background, one pod after the other."""

    def __init__(self, cluster: Cluster, ledger: Ledger, judge: Judging) -> None:
        self._cluster = cluster
        self._ledger = ledger
        self._judge = judge
        self._asked: queue.Queue[tuple[Pod, PodRequest, frozenset[str]] | None] = queue.Queue(_QUEUE)
        # nodes nominated lately, by pod UID
        self._tried: TTLCache[str, set[str]] = TTLCache(10_000, _TRIES_LAST_SECONDS)
        self._thread = threading.Thread(target=self._run, name="nominate", daemon=True)
        self._thread.start()

    def look(self, pod: Pod, request: PodRequest, sampled: frozenset[str]) -> None:
        """Note that nothing in *sampled* fits *pod*; where too many wait, its next attempt asks again."""
        try:
            self._asked.put_nowait((pod, request, sampled))
        except queue.Full:
            _log.warning("too many pods to nominate for", pod=pod.key, pod_uid=pod.uid)

    def stop(self) -> None:
        """End after the nomination under way."""
        self._asked.put(None)
        self._thread.join(timeout=5)

    def _run(self) -> None:
        while (asked := self._asked.get()) is not None:
            pod, request, sampled = asked
            try:
                self._nominate(pod, request, sampled)
            except ClusterError as error:
                _log.warning("nomination failed", pod=pod.key, pod_uid=pod.uid, why=str(error))

    def _nominate(self, pod: Pod, request: PodRequest, sampled: frozenset[str]) -> None:
        tried = self._tried.setdefault(pod.uid, set())
        nominated = pod.status.nominated_node_name
        # Not ours: victims are ending on that node for this pod.
        preempting = bool(nominated) and nominated not in tried
        if preempting or len(tried) >= _TRIES:
            return
        others = [view.name for view in self._ledger.views() if view.name not in sampled and view.name not in tried]
        fitting = []
        # in pieces, since kube-scheduler's next filter waits for the judge meanwhile
        for start in range(0, len(others), _PIECE):
            names = others[start : start + _PIECE]
            verdicts = zip(self._judge.judge(request, names), names, strict=True)
            fitting += [(verdict, name) for verdict, name in verdicts if not isinstance(verdict, Reason)]
        if not fitting:
            return
        _, node = min(fitting)
        tried.add(node)
        writes.nominate(self._cluster, namespace=pod.metadata.namespace, name=pod.metadata.name, uid=pod.uid, node=node)
        _log.info("nominated", pod=pod.key, pod_uid=pod.uid, node=node, fitting=len(fitting))
