"""filter: which of these nodes could take this pod."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Protocol

import msgspec

from cotenant.contract.pods import Pod
from cotenant.contract.reasons import Reason
from cotenant.contract.request import PodRequest, RequestError
from extender.ledger import Hold, Ledger, NodeView
from extender.placement.fit import Placement, place
from extender.verbs.expected import Expected
from extender.verbs.judge import Judge, Verdicts
from extender.verbs.wire import ExtenderArgs, FilterResult, NodeList

# Where more nodes than this are equally good, two pods hardly meet on one.
_LIKELY = 8
_UNSETTLED = Reason.UNSETTLED.sentence


class Onlooker(Protocol):
    """See what can be done for a pod that fits nowhere, later and elsewhere: filter does not wait."""

    def look(self, pod: Pod, request: PodRequest, sampled: frozenset[str]) -> None:
        """Note that nothing in *sampled* fits *pod*."""


class Filter:
    """Answer filter."""

    def __init__(
        self,
        ledger: Ledger,
        judge: Judge,
        *,
        synced: Callable[[], bool],
        decide: bool = False,
        expected: Expected | None = None,
        nominator: Onlooker | None = None,
        preemptor: Onlooker | None = None,
        rejected: Callable[[Reason, int], None] = lambda _reason, _count: None,
    ) -> None:
        self._ledger = ledger
        self._judge = judge
        self._synced = synced
        self._decide = decide
        self._expected = expected or Expected()
        self._nominator = nominator
        self._preemptor = preemptor
        self._rejected = rejected

    def __call__(self, args: ExtenderArgs) -> FilterResult:
        """Give the nodes that fit; in decide mode the best of them alone, the first by name where several are equal."""
        if not self._synced():
            self._rejected(Reason.CACHE_NOT_SYNCED, 1)
            return FilterResult(Error=Reason.CACHE_NOT_SYNCED.sentence)
        candidates = args.candidates
        try:
            request = self._judge.request(args.pod)
        except RequestError as error:
            self._rejected(error.reason, len(candidates.names))
            # The same text for every node: kube-scheduler shows it once, with the number of nodes.
            return self._answer(args, [], dict.fromkeys(candidates.names, str(error)))
        if request is None:
            return self._answer(args, None, {})
        hold = self._ledger.hold(args.pod.uid)
        if hold is not None:
            # An earlier bind may have succeeded without our knowing: only the same node can be right.
            fitting = [name for name in candidates.names if name == hold.node]
            return self._answer(args, fitting, dict.fromkeys(set(candidates.names) - {hold.node}, _UNSETTLED))
        return self._judged(args, request)

    def _judged(self, args: ExtenderArgs, request: PodRequest) -> FilterResult:
        names, namespace = args.candidates.names, args.pod.metadata.namespace
        excess = self._judge.excess(namespace, request)
        if excess is not None:
            # Nobody is evicted: it would be the namespace's no anywhere. But another pod of it may have ended already.
            self._rejected(Reason.NAMESPACE_LIMIT, len(names))
            self._look(args, request, self._nominator)
            return self._answer(args, [], dict.fromkeys(names, excess.constant))
        promised = self._ledger.promised(args.pod.uid)
        if promised is not None and promised.node in names and self._is_free(promised, namespace, request):
            elsewhere = dict.fromkeys(set(names) - {promised.node}, _UNSETTLED)
            return self._answer(args, [promised.node], elsewhere)
        verdicts = self._judge.weigh(request, args.candidates)
        fits = len(verdicts.refused) < len(names)
        if fits and self._expected.wait(args.pod.uid, request, self._likely(names, verdicts)):
            verdicts = self._judge.weigh(request, args.candidates)
        verdicts = self._judge.within_limits(namespace, request, verdicts, args.candidates)
        args.weighed = verdicts
        failed = {names[n]: reason.sentence for n, reason in verdicts.refused.items()}
        for reason, count in Counter(verdicts.refused.values()).items():
            self._rejected(reason, count)
        if len(verdicts.refused) == len(names):
            if promised is None:
                self._look(args, request, self._nominator, self._preemptor)
            # The victims of whom something is promised are on their way out. Were the node unresolvable, kube-scheduler
            # would take the nomination away (defaultpreemption, PodEligibleToPreemptOthers).
            return self._answer(args, [], failed, resolvable=promised.node if promised is not None else "")
        self._expected.expect(args.pod.uid, request)
        if self._decide:
            return self._answer(args, [names[verdicts.first()]], failed)
        if not failed:
            return self._answer(args, None, {})
        return self._answer(args, [name for name in names if name not in failed], failed)

    @staticmethod
    def _look(args: ExtenderArgs, request: PodRequest, *onlookers: Onlooker | None) -> None:
        # Each keeps up to a thousand pods, whose annotations may have 256 KiB.
        metadata = msgspec.structs.replace(args.pod.metadata, annotations=None)
        pod = msgspec.structs.replace(args.pod, metadata=metadata)
        for onlooker in onlookers:
            if onlooker is not None:
                onlooker.look(pod, request, frozenset(args.candidates.names))

    def _is_free(self, promised: Hold, namespace: str, request: PodRequest) -> bool:
        """Tell whether what is kept for a pod can be had by now, and within the limits of its namespace."""
        view = self._ledger.without(promised.node, [promised.uid])
        return (
            view is not None
            and isinstance(place(view, request), Placement)
            and self._judge.excess(namespace, request, view) is None
        )

    def _likely(self, names: list[str], verdicts: Verdicts) -> Iterator[NodeView | None]:
        """Show the nodes of which the pod will get one where our scores decide."""
        for n in [verdicts.first()] if self._decide else verdicts.cheapest()[:_LIKELY]:
            yield self._ledger.view(names[n])

    @staticmethod
    def _answer(
        args: ExtenderArgs, fitting: list[str] | None, failed: dict[str, str], *, resolvable: str = ""
    ) -> FilterResult:
        """Answer in the form that was asked in; *fitting* is None for all.

        All failures but that of *resolvable* are unresolvable: in-tree preemption sees no single GPUs, and would evict
        pods in vain.
        """
        resolved = {resolvable: failed.pop(resolvable)} if resolvable in failed else {}
        if args.whole is not None:
            items = [args.whole[name] for name in (args.candidates.names if fitting is None else fitting)]
            return FilterResult(Nodes=NodeList(items=items), FailedNodes=resolved, FailedAndUnresolvableNodes=failed)
        # Mostly every node fits, and goes back in the bytes that it came as: 0.5 of 1.4 ms at 5,000 names.
        names = args.candidates.raw_names if fitting is None else fitting
        return FilterResult(NodeNames=names, FailedNodes=resolved, FailedAndUnresolvableNodes=failed)
