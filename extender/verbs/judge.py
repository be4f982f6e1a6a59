"""What every node is worth to a request, as the policy and the mix of pods have it."""

import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from cotenant.contract.configuration import TypicalPod
from cotenant.contract.names import Names
from cotenant.contract.pods import Pod
from cotenant.contract.reasons import Reason
from cotenant.contract.request import PodRequest, RequestError, parse
from extender.ledger import Ledger, NodeView
from extender.placement.choices import Choice, Choices
from extender.placement.fit import Placement, Preference, place
from extender.placement.learning import Learner, Learning, Pinned
from extender.placement.partition import ROOM, Aim
from extender.placement.partition_ranking import spreads
from extender.placement.pooled_ranking import NodeRanking
from extender.placement.ranking import SHAPES, Rankings
from extender.placement.tenants import Excess, Tenants
from extender.policies import PolicyError, named
from extender.policies.mix import Mix
from extender.policies.table import Floats, Ints
from extender.verbs.wire import Candidates

# A node may change between its ranking and the question why it does not fit; then all is ranked again.
_TRIES = 3
_DONE = object()


class _Located(NamedTuple):
    membership: int
    rows: Ints
    # (B,): their places among all nodes by name
    places: Ints
    all_known: bool


class Verdicts(NamedTuple):
    """Hold what N nodes are to a request.

    *costs* (N,), infinite for those *refused*; why these are, by number; *places* (N,), their order by name.
    """

    costs: Floats
    refused: dict[int, Reason]
    places: Ints

    def cheapest(self) -> Ints:
        """Give the numbers of the nodes that cost the least."""
        return np.flatnonzero(self.costs == self.costs.min())

    def first(self) -> int:
        """Give the number of the node that costs the least, of several the first by name."""
        # mostly hundreds cost the same, and to compare so many strings takes a fifteenth of a filter
        cheapest = self.cheapest()
        return int(cheapest[self.places[cheapest].argmin()])


class Judge:
    """Read requests and judge nodes for them; safe to use from many threads."""

    def __init__(
        self,
        ledger: Ledger,
        names: Names,
        unit_bytes: int,
        choices: Choices | str,
        *,
        mix: Sequence[TypicalPod] | None = None,
        tenants: Tenants | None = None,
    ) -> None:
        """Make a judge that goes by *mix*, or without one, by the pods that came last, and holds pods to *tenants*.

        A name is *choices* enough.
        """
        self.tenants = tenants or Tenants({}, names)
        self._ledger = ledger
        self._names = names
        self._unit_bytes = unit_bytes
        self._choices = Choices(choices) if isinstance(choices, str) else choices
        self._rankings = Rankings(ledger, shapes=SHAPES * len(self._choices.policies))
        self._learner: Learning = Pinned(mix, self._rankings) if mix else Learner(ledger, self._rankings)
        self.pinned = mix is not None
        self._lock = threading.Lock()
        self.news = threading.Event()
        """Is set when learn() has something to learn."""

    @property
    def mix(self) -> Mix:
        """Give the mix of pods that policies expect just now."""
        return self._rankings.mix

    @property
    def largest_bytes(self) -> int:
        """Give the size of the GPU that a mix counts thousandths of."""
        return self._rankings.table.largest_bytes

    def request(self, pod: Pod) -> PodRequest | None:
        """Read what *pod* asks of us, None for nothing; raise RequestError where that cannot be met anywhere."""
        known, version = self._ledger.waiting(pod.uid), pod.metadata.resource_version
        if known is not None and version is not None and known.version == version:
            # the watch has brought the very same object, which was read then: 0.03 ms
            if isinstance(known.request, RequestError):
                raise known.request.anew()
            request: PodRequest | None = known.request
        else:
            request = parse(pod, self._names, self._unit_bytes)
        if request is None:
            return None
        self.policy(request)
        return self.tenants.hold(pod.metadata.namespace, request)

    def excess(self, namespace: str, request: PodRequest, view: NodeView | None = None) -> Excess | None:
        """Say which limit of its namespace *request* exceeds beside what its pods hold now; None where none.

        On a node, *view*, by what it would be charged there.
        """
        use = self._ledger.use_of(namespace)
        if view is None:
            return self.tenants.excess(namespace, request, use)
        return self.tenants.excess(namespace, request, use, view, self._aim(request, view))

    def policy(self, request: PodRequest) -> str:
        """Name the policy that chooses the pod's node; raise RequestError where it wishes for none that exists."""
        return self._choice(request).policy

    def limited(self, namespace: str) -> bool:
        """Tell whether what a pod of a namespace may have depends on what others of it hold, wherever they are."""
        limits = self.tenants.of(namespace)
        return limits is not None and (limits.gpus is not None or limits.gpu_memory is not None)

    def judge(self, request: PodRequest, nodes: Sequence[str], *, namespace: str | None = None) -> list[float | Reason]:
        """Give for each node its cost to the request, the lower the better, or why it does not fit.

        Where a *namespace* is named, also why its limits keep its pod off.
        """
        if namespace is not None and self.excess(namespace, request) is not None:
            return [Reason.NAMESPACE_LIMIT for _ in nodes]
        candidates = Candidates(list(nodes))
        verdicts = self.weigh(request, candidates)
        if namespace is not None:
            verdicts = self.within_limits(namespace, request, verdicts, candidates)
        found: list[float | Reason] = verdicts.costs.tolist()
        for n, reason in verdicts.refused.items():
            found[n] = reason
        return found

    def weigh(self, request: PodRequest, candidates: Candidates) -> Verdicts:
        """Judge nodes for the request."""
        with self._lock:
            for _ in range(_TRIES):
                located = self._locate(candidates)
                # a node that has no row may have come by now
                ranking = self._rank(request, located.rows if located.all_known else None)
                verdicts = self._verdicts(ranking, request, candidates)
                if verdicts is not None:
                    return verdicts
        everywhere = dict.fromkeys(range(len(candidates.names)), Reason.NO_GPU_FITS)
        unknown = np.zeros(len(everywhere), np.int64)
        return Verdicts(np.full(len(everywhere), np.inf), everywhere, unknown)

    def catch_up(self) -> None:
        """Do what the next question would have to wait for, while nobody asks."""
        with self._lock:
            self._rankings.catch_up()

    def within_limits(
        self, namespace: str, request: PodRequest, verdicts: Verdicts, candidates: Candidates
    ) -> Verdicts:
        """Refuse nodes where *request* would be charged more than its namespace's limit leaves.

        Nearly every request is charged the same everywhere; then there is nothing to look at.
        """
        use = self._ledger.use_of(namespace)
        if not self.tenants.depends_on_node(namespace, request, use, self.largest_bytes):
            return verdicts
        costs, refused = verdicts.costs.copy(), dict(verdicts.refused)
        for n, name in enumerate(candidates.names):
            view = self._ledger.view(name) if n not in refused else None
            if view is not None and self.excess(namespace, request, view) is not None:
                costs[n], refused[n] = np.inf, Reason.NAMESPACE_LIMIT
        return Verdicts(costs, refused, verdicts.places)

    def preference(self, request: PodRequest, node: str) -> Preference:
        """Tell the fit which of the node's GPUs the policy would take; raise RequestError for an unknown policy."""
        with self._lock:
            row = self._rankings.table.rows.get(node)
            return self._rank(request, None if row is None else np.array([row])).preference(node)

    def aim(self, request: PodRequest, node: str) -> Aim:
        """Say which MIG instances of the node are the best for the pod; raise RequestError for an unknown policy."""
        self._choice(request)
        # a pod that asks no MIG instance needs no look at the node
        return self._aim(request, self._ledger.view(node) if request.profiles else None)

    def bound(self, uid: str, request: PodRequest) -> None:
        """Note a pod that has been given its place, from which learn() may learn what pods this cluster gets."""
        with self._lock:
            self._learner.note(uid, request)
            if self._learner.due:
                self.news.set()

    def learn(self, pause: Callable[[], None] = lambda: None) -> None:
        """Take the mix of pods anew where enough have come; *pause* is called when others should have a turn.

        It may take half a second, is done by one thread at a time, and never keeps a verdict waiting for longer than
        some milliseconds: tables are made beside the lock, and what must be made under it is made in pieces.
        """
        with self._lock:
            self.news.clear()
            if not self._learner.due:
                return
            pods, table = self._learner.pods(), self._rankings.table
            self._rankings.asked = self._learner.asked
            largest = {"most_milli": table.most_milli, "most_cpu": table.most_cpu}
        mix = Mix.of(pods)
        if mix == self._rankings.mix:
            return
        for policy in self._choices.policies:
            named(policy).foresee(mix, **largest)
        steps = self._rankings.adopt(mix, self._choices.policies)
        while True:
            with self._lock:
                if next(steps, _DONE) is _DONE:
                    return
            pause()

    def _aim(self, request: PodRequest, view: NodeView | None) -> Aim:
        if not request.profiles:
            return ROOM
        policy = self._choices.on(request, view.labels if view is not None else {})
        return Aim(spread=spreads(policy), asked=self._rankings.asked)

    def _choice(self, request: PodRequest) -> Choice:
        try:
            return self._choices.of(request)
        except PolicyError as error:
            raise RequestError(Reason.BAD_REQUEST, f"{self._names.policy}: {error}") from error

    def _rank(self, request: PodRequest, asked: Ints | None) -> NodeRanking:
        choice = self._choice(request)
        return self._rankings.of(request, choice.policy, choice.pools, asked=asked)

    def _verdicts(self, ranking: NodeRanking, request: PodRequest, candidates: Candidates) -> Verdicts | None:
        """Judge all nodes; None where one has come to fit since it was ranked."""
        _, rows, places, all_known = self._locate(candidates)
        known = rows >= 0
        # those without a row are asked for as the first, and their answer is dropped
        asked = rows if all_known else np.where(known, rows, 0)
        costs = ranking.costs(asked)
        if not all_known:
            costs = np.where(known, costs, np.inf)
        # mostly every node fits, and what does not costs infinitely much
        if np.isfinite(costs).all():
            return Verdicts(costs, {}, places)
        refused: dict[int, Reason] = {}
        for n in np.flatnonzero(~(known & ranking.fits(asked))).tolist():
            reason = self._why_not(ranking, request, candidates.names[n])
            if reason is None:
                return None
            refused[n] = reason
        return Verdicts(costs, refused, places)

    def _locate(self, candidates: Candidates) -> _Located:
        """Find the candidates' rows, -1 for a node that is unknown, and tell whether all are known.

        They are remembered until rows come or go.
        """
        table = self._rankings.table
        located = candidates.located
        if not isinstance(located, _Located) or located.membership != table.membership:
            rows = table.locate(candidates.names)
            located = _Located(table.membership, rows, table.places(rows), bool((rows >= 0).all()))
            candidates.located = located
        return located

    def _why_not(self, ranking: NodeRanking, request: PodRequest, node: str) -> Reason | None:
        view = self._ledger.view(node)
        if view is None:
            return Reason.UNKNOWN_NODE
        reason = ranking.reasons.get(node)
        if reason is None:
            placed = place(view, request)
            if isinstance(placed, Placement):
                return None
            reason = ranking.reasons[node] = placed
        return reason
