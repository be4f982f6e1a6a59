"""Point kube-scheduler at a node that fits after all when none of its sample did.

It samples 500 of 5,000 nodes per attempt; a pod that fits only elsewhere could wait for minutes. So could one that was
tried again right after another had ended, on news that reached kube-scheduler before it reached the ledger: of room on
a node, or under the limit of the pod's namespace. A pod with status.nominatedNodeName is tried on that node alone first
(schedule_one.go, evaluateNominatedNode).
"""

import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import structlog
from cachetools import TTLCache

from cotenant.cluster import Cluster, ClusterError, Invalid, NotFound, writes
from cotenant.contract.pods import Pod
from cotenant.contract.reasons import Reason
from cotenant.contract.request import PodRequest
from cotenant.threads import Threads, giving_way
from extender.ledger import Ledger
from extender.verbs.judge import Judge

_log = structlog.get_logger(__name__)

# A pod's first failure is followed by a second attempt at once, since kube-scheduler's own note of the failure is an
# update of the pod; and at the end of an attempt it takes away a nomination that arrived meanwhile. So wait until the
# pod has been left alone for this long; and look again later, since our watch may lag behind kube-scheduler's, and not
# all that makes room is an event to kube-scheduler: a promise that ends, a doubtful hold that is given up. The last of
# these comes again and again while the pod waits.
_WAIT_SECONDS = (0.05, 0.5, 2.0, 5.0, 10.0)
# Below this many nodes kube-scheduler samples all that pass its own filters (schedule_one.go, minFeasibleNodesToFind),
# so a node outside of its sample has failed there and would fail again.
SAMPLED_FROM = 100
# What keeps a node out of the sample may also be a taint or a full CPU, which we do not see. Each vain nomination makes
# kube-scheduler try again at once, so a pod gets a few of them, and then none for a while. A node gets more than one:
# it may have been taken away untried all the same.
_TRIES = 8
_TRIES_PER_NODE = 2
_TRIES_LAST_SECONDS = 300
_WAITING = 1_000
_PIECE = 250
# kube-scheduler counts the pods nominated to a node as if they were there (RunFilterPluginsWithNominatedPods), so of a
# herd nominated to one node nobody fits: one at a time, for as long as an attempt may take. The others look again soon,
# but not for ever (docs/decisions/0078).
_NOMINEE_SECONDS = 1.0
_POSTPONEMENTS = 40


class _Asked(NamedTuple):
    """Hold a pod that fits nowhere in its sample, and when to look for it."""

    due: float
    # how often it was looked for, and how many changes the ledger had seen before the last time
    turn: int
    changes: int
    pod: Pod
    request: PodRequest
    # those it was tried on; none at all where they were a sample, of which later looks keep nothing: 0.06 MiB a pod
    sampled: frozenset[str]
    # nodes that fit but had a nominee each, and how often that was so
    among: tuple[str, ...] = ()
    postponed: int = 0


class Nominator:
    """Nominate nodes in the background, one pod after the other."""

    def __init__(
        self,
        cluster: Cluster,
        ledger: Ledger,
        judge: Judge,
        *,
        nominated: Callable[[str], None] = lambda _why: None,
        clock: Callable[[], float] = time.monotonic,
        threads: Threads | None = None,
    ) -> None:
        self._cluster = cluster
        self._ledger = ledger
        self._judge = judge
        self._nominated = nominated
        self._clock = clock
        self._condition = threading.Condition()
        self._stopping = False
        # by pod UID
        self._asked: dict[str, _Asked] = {}
        # how often each node was nominated lately, by pod UID
        self._tried: TTLCache[str, Counter[str]] = TTLCache(10_000, _TRIES_LAST_SECONDS)
        # the pod that each node, or the limit of each "/namespace", waits for, by UID, under the condition
        self._nominees: TTLCache[str, str] = TTLCache(10_000, _NOMINEE_SECONDS, timer=clock)
        self._thread = (threads or Threads()).of("nominate", self._turn)
        self._thread.start()

    def look(self, pod: Pod, request: PodRequest, sampled: frozenset[str]) -> None:
        """Note that nothing in *sampled* fits *pod*; where too many wait, its next attempt asks again."""
        with self._condition:
            # an attempt of its own has failed, the nomination with it
            for node in [node for node, uid in self._nominees.items() if uid == pod.uid]:
                self._nominees.pop(node, None)  # it may have expired just now
            if self._asked.pop(pod.uid, None) is None and len(self._asked) >= _WAITING:
                oldest = max(self._asked.values(), key=lambda asked: asked.turn)
                if not oldest.turn:
                    _log.warning("too many pods to nominate for", pod=pod.key, pod_uid=pod.uid)
                    return
                del self._asked[oldest.pod.uid]
            self._asked[pod.uid] = _Asked(self._clock() + _WAIT_SECONDS[0], 0, 0, pod, request, sampled)
            self._condition.notify()

    def stop(self) -> None:
        """End after the nomination under way."""
        with self._condition:
            self._stopping = True
            self._condition.notify()
        self._thread.join(5)

    def _turn(self) -> bool:
        asked = self._next()
        if asked is None:
            return False
        # before the judging, so that what changes meanwhile is looked at again
        changes = self._ledger.changed_so_far()
        try:
            with giving_way():
                nominated = self._nominate(asked)
            if not nominated:
                self._look_again(asked, changes)
        except ClusterError as error:
            _log.warning("nomination failed", pod=asked.pod.key, pod_uid=asked.pod.uid, why=str(error))
            if not isinstance(error, (NotFound, Invalid)):  # it is gone
                self._look_again(asked, asked.changes)
        return True

    def _next(self) -> _Asked | None:
        """Wait for the next pod that is due; None when it is time to stop."""
        with self._condition:
            while not self._stopping:
                first = min(self._asked.values(), key=lambda asked: asked.due, default=None)
                left = None if first is None else first.due - self._clock()
                if first is not None and left is not None and left <= 0:
                    return self._asked.pop(first.pod.uid)
                self._condition.wait(left)
        return None

    def _look_again(self, asked: _Asked, changes: int) -> None:
        turn, last = asked.turn + 1, len(_WAIT_SECONDS) - 1
        # our watch may not have brought the pod itself yet
        if turn <= last or self._ledger.waiting(asked.pod.uid) is not None:
            due = self._clock() + _WAIT_SECONDS[min(turn, last)]
            sampled = frozenset[str]() if len(asked.sampled) >= SAMPLED_FROM else asked.sampled
            self._keep(asked._replace(due=due, turn=turn, changes=changes, sampled=sampled, among=(), postponed=0))

    def _keep(self, asked: _Asked) -> None:
        """Have the pod looked for again, unless its next attempt has failed meanwhile."""
        with self._condition:
            self._asked.setdefault(asked.pod.uid, asked)

    def _nominate(self, asked: _Asked) -> bool:
        """Nominate a node, and tell whether there was one, or whether there is no more to be done for the pod."""
        pod = asked.pod
        tried = self._tried.setdefault(pod.uid, Counter())
        nominated = pod.status.nominated_node_name
        if nominated and pod.spec.preemption_policy == "Never" and not asked.turn:
            # Ours, and in vain. From a pod that may not preempt kube-scheduler takes no nomination away
            # (defaultpreemption, PodEligibleToPreemptOthers), and keeps that node's room for it. This wakes the pod.
            self._write(pod, "")
            return True
        # Not ours: victims are ending on that node for this pod.
        preempting = bool(nominated) and nominated not in tried
        if preempting or tried.total() >= _TRIES or self._ledger.hold(pod.uid) is not None:
            return True
        fitting = self._fitting(asked, tried)
        node = self._choose(pod, fitting)
        if node is None:
            return self._postpone(asked, fitting)
        tried[node] += 1
        self._write(pod, node)
        self._nominated("freed" if asked.turn or node in asked.sampled else "outside_sample")
        _log.info("nominated", pod=pod.key, pod_uid=pod.uid, node=node)
        return True

    def _write(self, pod: Pod, node: str) -> None:
        writes.nominate(self._cluster, namespace=pod.metadata.namespace, name=pod.metadata.name, uid=pod.uid, node=node)

    def _candidates(self, asked: _Asked) -> list[str]:
        """List nodes that may fit by now: all at first, later those that have changed."""
        if asked.among:
            return list(asked.among)
        everywhere = not 0 < len(asked.sampled) < SAMPLED_FROM
        changed = self._ledger.changes(asked.changes)[1] if asked.turn else None
        # under a limit it may be enough what a pod of another node leaves
        if changed is None or (changed and self._judge.limited(asked.pod.metadata.namespace)):
            return [view.name for view in self._ledger.views()] if everywhere else sorted(asked.sampled)
        return sorted(changed if everywhere else asked.sampled.intersection(changed))

    def _fitting(self, asked: _Asked, tried: Counter[str]) -> list[str]:
        """List the nodes that fit, those least often nominated first, and then the cheapest."""
        namespace = asked.pod.metadata.namespace
        # wherever it would go: judging 5,000 nodes to learn that takes 1.8 ms
        if self._judge.excess(namespace, asked.request) is not None:
            return []
        open_to = [node for node in self._candidates(asked) if tried[node] < _TRIES_PER_NODE]
        fitting: list[tuple[int, float, str]] = []
        # in pieces, since kube-scheduler's next filter waits for the judge meanwhile
        for start in range(0, len(open_to), _PIECE):
            names = open_to[start : start + _PIECE]
            verdicts = zip(self._judge.judge(asked.request, names, namespace=namespace), names, strict=True)
            fitting += [(tried[name], cost, name) for cost, name in verdicts if not isinstance(cost, Reason)]
        return [name for _, _, name in sorted(fitting)]

    def _choose(self, pod: Pod, fitting: list[str]) -> str | None:
        """Take the first node that waits for no other nominee, and have it wait for this one.

        A namespace's limit waits for one at a time in the same way: what it leaves may be enough for one alone.
        """
        namespace = pod.metadata.namespace
        limit = [f"/{namespace}"] if self._judge.limited(namespace) else []  # no name of a node has a slash
        with self._condition:
            for node in fitting:
                waiting = [node, *limit]
                if all(self._is_open(one, pod.uid) for one in waiting):
                    self._nominees.update(dict.fromkeys(waiting, pod.uid))
                    return node
        return None

    def _is_open(self, what: str, uid: str) -> bool:
        nominee = self._nominees.get(what, uid)
        return nominee == uid or self._ledger.hold(nominee) is not None or self._ledger.waiting(nominee) is None

    def _postpone(self, asked: _Asked, fitting: list[str]) -> bool:
        """Look again soon at nodes that fit and wait for others; tell whether there is anything to look at."""
        if not fitting or asked.postponed >= _POSTPONEMENTS:
            return False
        due, among = self._clock() + _WAIT_SECONDS[0], tuple(fitting[:_PIECE])
        self._keep(asked._replace(due=due, among=among, postponed=asked.postponed + 1))
        return True
