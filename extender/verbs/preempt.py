"""preempt: hold kube-scheduler's victims to single GPUs, and find better ones where they would not help."""

import time
from collections.abc import Callable

from cotenant.contract.pods import Pod
from cotenant.contract.request import PodRequest, RequestError
from extender.verbs.judge import Judge
from extender.verbs.victims import Search
from extender.verbs.wire import MetaPod, MetaVictims, PreemptionArgs, PreemptionResult

# kube-scheduler picks one node of those that come back. Each that its own victims do not free costs a call to the API
# server while the scheduling of all pods waits.
_SEARCHED_NODES = 8
# Where these calls are slow, what was found by then is better than an answer that comes after httpTimeout, 2 s in
# manifests/attached, as none at all.
_SEARCH_SECONDS = 1.0


class Preempt:
    """Answer preempt."""

    def __init__(
        self,
        judge: Judge,
        search: Search,
        *,
        synced: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._judge = judge
        self._search = search
        self._synced = synced
        self._clock = clock

    def __call__(self, args: PreemptionArgs) -> PreemptionResult:
        """Give for each node that evicting pods can free for the pod the victims that it takes.

        kube-scheduler's own victims free a node's sums. Where they also free GPUs that hold the pod they stay as they
        are; if there is any such node, it is one of those. Else nodes are searched, a few of them, for pods of lower
        priority that do. Raises ClusterError where the API server cannot be asked.
        """
        if not self._synced():
            # a node whose pods are not known yet looks free
            return PreemptionResult({})
        proposed = args.proposed()
        try:
            request = self._judge.request(args.Pod)
        except RequestError:
            return PreemptionResult({})
        if request is None:
            return PreemptionResult(proposed)
        if self._judge.excess(args.Pod.metadata.namespace, request) is not None:
            return PreemptionResult({})
        enough = {
            node: meta
            for node, meta in proposed.items()
            if self._search.fits(node, request, frozenset(one.UID for one in meta.Pods or ()), pod=args.Pod)
        }
        if enough:
            return PreemptionResult(enough)
        return PreemptionResult(self._better(args.Pod, request, proposed))

    def _better(self, pod: Pod, request: PodRequest, proposed: dict[str, MetaVictims]) -> dict[str, MetaVictims]:
        found: dict[str, MetaVictims] = {}
        budgets = None
        until = self._clock() + _SEARCH_SECONDS
        # nodes for which kube-scheduler would evict least come first
        for node in sorted(proposed, key=lambda name: (len(proposed[name].Pods or ()), name))[:_SEARCHED_NODES]:
            if found and self._clock() >= until:
                break
            if budgets is None:
                budgets = self._search.budgets()
            uids = frozenset(one.UID for one in proposed[node].Pods or ())
            always = frozenset[str]() if self._search.explained(node, request, pod=pod) else uids
            chosen = self._search.on(node, request, budgets, pod=pod, always=always)
            if chosen is not None:
                found[node] = MetaVictims([MetaPod(one.uid) for one in chosen.pods], chosen.violations)
        return found
