"""Evict for a pod that fits nowhere because free memory lies in pieces, which kube-scheduler never does.

Its dry run counts a node's sums: a node that has enough in all, but on no single GPU, has nobody to evict for, and our
preempt is not asked. So where that is configured the extender evicts by itself, only from nodes that passed all of
kube-scheduler's own filters a moment before, those that filter was called with.

    filter refuses all -> wait -> search -> promise -> evict -> nominate -> the victims go -> nominate -> bind
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import msgspec
import structlog
from cachetools import TTLCache

from cotenant.cluster import Cluster, ClusterError, writes
from cotenant.contract.configuration import FragmentedPreemption
from cotenant.contract.pods import Pod
from cotenant.contract.reasons import Reason
from cotenant.contract.request import PodRequest
from cotenant.threads import Threads, giving_way
from extender.cluster import pods
from extender.cluster.events import Tell
from extender.cluster.evictions import Cause, Evictions, Outcome
from extender.ledger import Ledger
from extender.placement.fit import choosing
from extender.placement.preemption import Budget, Neighbour, Victims, least
from extender.verbs.judge import Judge
from extender.verbs.victims import Search

_log = structlog.get_logger(__name__)

_REQUEST_SECONDS = 4.0
# A LIST of its pods each; those whose emptiest GPU lacks the least come first.
_SEARCHED_NODES = 16
# A pod for which nothing could be done is not looked at again for this long.
_AGAIN_SECONDS = 15.0
_WAITING = 1_000
_MINUTE = 60.0
_LOOK_SECONDS = 0.1
_THREAD = "preempt"
# Once the victims are gone kube-scheduler may try before we know, and take the nomination away; it is made again.
_NOMINATE_AFTER = (0.05, 0.5, 2.0, 5.0, 10.0, 20.0)


class _Asked(msgspec.Struct, frozen=True):
    """Hold a pod that fits nowhere, the nodes that it was tried on, and when to see to it."""

    due: float
    pod: Pod
    request: PodRequest
    sampled: frozenset[str]


class _Kept(msgspec.Struct, frozen=True):
    """Hold whom memory is kept for, until when, those who have to go for it, and when to nominate next."""

    pod: Pod
    node: str
    victims: frozenset[str]
    until: float
    due: float = 0.0
    turn: int = 0


class Preemptor:
    """Evict in the background, for one pod after the other; safe to be told of pods from many threads."""

    def __init__(
        self,
        cluster: Cluster,
        ledger: Ledger,
        judge: Judge,
        search: Search,
        *,
        evictions: Evictions,
        tell: Tell,
        configuration: FragmentedPreemption,
        may_write: Callable[[], bool] = lambda: True,
        clock: Callable[[], float] = time.monotonic,
        threads: Threads | None = None,
    ) -> None:
        self._cluster = cluster
        self._ledger = ledger
        self._judge = judge
        self._search = search
        self._evictions = evictions
        self._tell = tell
        self._configuration = configuration
        self._may_write = may_write
        self._clock = clock
        self._condition = threading.Condition()
        self._stopping = False
        # by pod UID
        self._asked: dict[str, _Asked] = {}
        # when to look again at the earliest
        self._in_vain: TTLCache[str, float] = TTLCache(10_000, _AGAIN_SECONDS, timer=clock)
        # written by the thread alone from here on
        self._kept: dict[str, _Kept] = {}
        self._evicted_at: deque[float] = deque()
        self._threads = threads or Threads()
        self._thread = self._threads.of(_THREAD, self._turn)
        self._thread.start()

    def look(self, pod: Pod, request: PodRequest, sampled: frozenset[str]) -> None:
        """Note that nothing in *sampled* fits *pod*, all of which kube-scheduler's own filters let it onto."""
        if pod.spec.preemption_policy == "Never":
            return
        with self._condition:
            before = self._asked.get(pod.uid)
            if before is None and len(self._asked) >= _WAITING:
                return
            # it counts from its first attempt in vain; only the nodes are the newest
            again, after = self._in_vain.get(pod.uid, 0.0), self._clock() + self._configuration.after
            due = before.due if before is not None else max(again, after)
            self._asked[pod.uid] = _Asked(due, pod, request, sampled)
            self._condition.notify()

    def lasts(self, uid: str) -> tuple[int, float] | None:
        """Say how many evicted pods still hold what is kept for the pod of that UID, and how many seconds it is kept.

        The seconds begin to run when the last of them is gone. None where nothing is kept.
        """
        kept = self._kept.get(uid)
        if kept is None:
            return None
        there = sum(self._ledger.hold(victim) is not None for victim in kept.victims)
        left = self._configuration.hold_for if there else max(0.0, kept.until - self._clock())
        return there, left

    def stop(self) -> None:
        """End after the eviction under way."""
        with self._condition:
            self._stopping = True
            self._condition.notify()
        self._thread.join(_REQUEST_SECONDS)

    def _turn(self) -> bool:
        with self._condition:
            if not self._stopping:
                self._condition.wait(self._pause())
            if self._stopping:
                return False
            due = [one for one in self._asked.values() if one.due <= self._clock()]
        for one in sorted(due, key=lambda one: -(one.pod.spec.priority or 0)):
            self._guarded(one.pod, partial(self._see_to, one))
        for kept in list(self._kept.values()):
            self._guarded(kept.pod, partial(self._look_after, kept))
        return True

    def _pause(self) -> float | None:
        """Say how long nothing has to be done."""
        if self._kept:
            return _LOOK_SECONDS
        first = min((one.due for one in self._asked.values()), default=None)
        return None if first is None else max(0.01, first - self._clock())

    def _guarded(self, pod: Pod, act: Callable[[], None]) -> None:
        done = False
        with self._threads.surviving(_THREAD):
            try:
                with giving_way():
                    act()
            except ClusterError as error:
                _log.warning("preemption put off", pod=pod.key, pod_uid=pod.uid, why=str(error))
                self._drop(pod.uid)
            done = True
        if not done:
            # what cannot be seen to is not tried at every turn, and nothing is kept for it without end
            self._drop(pod.uid)
            self._kept.pop(pod.uid, None)
            # it may have been promised and not be noted here yet
            self._ledger.release(pod.uid)

    def _drop(self, uid: str) -> None:
        with self._condition:
            self._asked.pop(uid, None)
            self._in_vain[uid] = self._clock() + _AGAIN_SECONDS

    # One pod's turn.

    def _see_to(self, asked: _Asked) -> None:
        pod = self._now(asked.pod)
        if pod is None or not self._waits(pod) or self._fits_by_now(asked):
            self._drop(asked.pod.uid)
            return
        found = self._choose(asked)
        if found is None:
            self._drop(pod.uid)
            return
        node, victims, budgets = found
        if victims.violations:
            self._drop(pod.uid)
            why = f"{_pods(len(victims.pods))} of node {node} would have to go, {victims.violations} of them protected"
            self._tell(
                pod.uid, pod.key, "GPUMemoryPreemptionBlocked", f"{why} by a disruption budget: nobody is evicted"
            )
        elif self._too_many(len(victims.pods)):
            with self._condition:
                # when one of them is a minute ago
                self._asked[pod.uid] = msgspec.structs.replace(asked, due=self._evicted_at[0] + _MINUTE)
        else:
            self._drop(pod.uid)
            self._preempt(asked, pod, node, victims, budgets)

    def _now(self, pod: Pod) -> Pod | None:
        """Read the pod as it is; None where it is gone, or another one of its name has come."""
        meta = pod.metadata
        return pods.read(self._cluster, namespace=meta.namespace, name=meta.name, uid=pod.uid, timeout=_REQUEST_SECONDS)

    def _waits(self, pod: Pod) -> bool:
        """Tell whether the pod waits for us alone; one that is nominated already waits for others to end."""
        return (
            self._may_write()
            and not pod.spec.node_name
            and not pod.status.nominated_node_name
            and pod.metadata.deletion_timestamp is None
            and pod.spec.preemption_policy != "Never"
            and self._ledger.hold(pod.uid) is None
            and self._ledger.promised(pod.uid) is None
        )

    def _fits_by_now(self, asked: _Asked) -> bool:
        namespace = asked.pod.metadata.namespace
        verdicts = self._judge.judge(asked.request, sorted(asked.sampled), namespace=namespace)
        return any(not isinstance(one, Reason) for one in verdicts)

    def _choose(self, asked: _Asked) -> tuple[str, Victims, Sequence[Budget]] | None:
        """Find the node where evicting does the least harm; None where there is none, or where pods are ending."""
        budgets = self._search.budgets()
        found: dict[str, Victims] = {}
        allowed = [node for node in asked.sampled if self._allowed(asked, node)]
        for node in sorted(allowed, key=self._emptiness)[:_SEARCHED_NODES]:
            victims = self._search.among_holders(node, asked.request, budgets, pod=asked.pod)
            if victims == "wait":
                return None
            if victims is not None:
                found[node] = victims
        if not found:
            return None
        node = least(found)
        return node, found[node], budgets

    def _allowed(self, asked: _Asked, node: str) -> bool:
        """Tell whether the limits of the pod's namespace let it onto the node."""
        view, namespace = self._ledger.view(node), asked.pod.metadata.namespace
        return view is not None and self._judge.excess(namespace, asked.request, view) is None

    def _emptiness(self, node: str) -> tuple[int, str]:
        view = self._ledger.view(node)
        return -max((state.free_bytes for state in view.healthy), default=0) if view else 0, node

    def _too_many(self, count: int) -> bool:
        """Tell whether so many more would be too many for this minute; a pod that needs more than that goes alone."""
        now = self._clock()
        while self._evicted_at and self._evicted_at[0] <= now - _MINUTE:
            self._evicted_at.popleft()
        return bool(self._evicted_at) and len(self._evicted_at) + count > self._configuration.per_minute

    def _preempt(self, asked: _Asked, pod: Pod, node: str, victims: Victims, budgets: Sequence[Budget]) -> None:
        uids = frozenset(one.uid for one in victims.pods)
        if not self._promise(asked, node, uids):
            return
        # Those that a budget is about first: where it does not let them go after all, nobody else has gone in vain.
        for one in sorted(victims.pods, key=lambda one: not any(budget.covers(one) for budget in budgets)):
            outcome = self._evict(one, pod, node)
            if outcome not in {Outcome.OK, Outcome.GONE}:
                self._ledger.release(pod.uid)
                self._complain(pod, node, outcome)
                return
        self._kept[pod.uid] = _Kept(pod, node, uids, until=self._clock() + self._configuration.hold_for)
        why = f"evicted {_pods(len(uids))} of lower priority from node {node}, whose free GPU memory lay in pieces"
        self._tell(pod.uid, pod.key, "GPUMemoryPreempting", f"{why}; it is kept for this pod")
        self._nominate(pod, node)

    def _promise(self, asked: _Asked, node: str, uids: frozenset[str]) -> bool:
        request = asked.request
        choose = choosing(request, self._judge.preference(request, node), self._judge.aim(request, node))
        try:
            return not isinstance(self._ledger.promise(asked.pod.uid, asked.pod.key, node, uids, choose), Reason)
        except ValueError:  # it was bound, or the node has gone
            return False

    def _evict(self, victim: Neighbour, pod: Pod, node: str) -> Outcome:
        hold = self._ledger.hold(victim.uid)
        if hold is None:
            return Outcome.GONE
        outcome = self._evictions.evict(victim.uid, hold.key, Cause.PREEMPTION)
        if outcome is Outcome.OK:
            self._evicted_at.append(self._clock())
            why = (
                f"evicted from node {node}, so that one GPU has the memory that pod {pod.key} of a higher priority asks"
            )
            self._tell(victim.uid, hold.key, "GPUMemoryPreempted", why)
        return outcome

    def _complain(self, pod: Pod, node: str, outcome: Outcome) -> None:
        if outcome is Outcome.BLOCKED:
            why = f"a disruption budget keeps a pod of node {node} from being evicted"
            self._tell(pod.uid, pod.key, "GPUMemoryPreemptionBlocked", f"{why}; it is tried again")
        elif outcome is Outcome.FORBIDDEN:
            why = "nobody is evicted for this pod, since the extender may not: apply manifests/eviction"
            self._tell(pod.uid, pod.key, "GPUMemoryPreemptionForbidden", why)

    def _nominate(self, pod: Pod, node: str) -> None:
        writes.nominate(self._cluster, namespace=pod.metadata.namespace, name=pod.metadata.name, uid=pod.uid, node=node)
        _log.info("nominated", pod=pod.key, pod_uid=pod.uid, node=node, cause=str(Cause.PREEMPTION))

    # Until the pod is bound.

    def _look_after(self, kept: _Kept) -> None:
        uid, now = kept.pod.uid, self._clock()
        if self._ledger.promised(uid) is None:  # bound, or gone
            del self._kept[uid]
        elif any(self._ledger.hold(victim) for victim in kept.victims):
            # as long as they hold it themselves, keeping it costs nobody anything
            self._kept[uid] = msgspec.structs.replace(kept, until=now + self._configuration.hold_for)
        elif now >= kept.until:
            del self._kept[uid]
            self._ledger.release(uid)
            _log.warning("nothing is kept for the pod any more", pod=kept.pod.key, pod_uid=uid, node=kept.node)
        elif now >= kept.due:
            wait = _NOMINATE_AFTER[min(kept.turn, len(_NOMINATE_AFTER) - 1)]
            self._kept[uid] = msgspec.structs.replace(kept, turn=kept.turn + 1, due=now + wait)
            # not at once: kube-scheduler has just been woken by their end, too
            if kept.turn and self._may_write():
                self._nominate_again(kept)

    def _nominate_again(self, kept: _Kept) -> None:
        pod = self._now(kept.pod)
        if pod is not None and not pod.spec.node_name and pod.status.nominated_node_name != kept.node:
            self._nominate(pod, kept.node)


def _pods(count: int) -> str:
    return "a pod" if count == 1 else f"{count} pods"
