"""What every node is worth to a request: feasibility and a policy's cost, both kept until the node changes."""

from collections.abc import Iterable, Iterator
from functools import reduce
from typing import Any

import numpy as np
from cachetools import LRUCache

from cotenant.contract.grant import Isolation
from cotenant.contract.mps import NONE
from cotenant.contract.reasons import Reason
from cotenant.contract.request import PodRequest
from extender.ledger import GPUState, Ledger
from extender.placement.choices import Pool, pool_of
from extender.placement.fit import Placement, Preference, parts, pieces, place
from extender.placement.partition import Aim
from extender.placement.partition_ranking import PartitionRanking, spreads
from extender.placement.pooled_ranking import NO_POOL, NodeRanking, PooledRanking
from extender.policies import Ask, Policy, named
from extender.policies.mix import Mix
from extender.policies.table import MILLI, NO_USER, Bools, Floats, Ints, Table

# Requests that are alike share one ranking, so this is the number of different sizes in flight, not of pods, for each
# policy that they go by.
SHAPES = 32
# Fewer pods than this tell nothing of what is to come; until then policies that go by the mix are stood in for.
FEWEST_PODS = 20
_STAND_IN = "binpack"
# How many rows a policy that is made for a new mix takes over at once.
_STEP_ROWS = 500

# So many changes are taken over when nobody waits for it, and fewer left, which would cost as much: a bind is one or
# two, and after ten pods kube-scheduler asks about the first of their nodes again (docs/decisions/0109).
_MUCH = 10

_NO_GPU = -1
_NEVER = np.iinfo(np.int64).max


class Rankings:
    """Keep a table of the ledger and rankings of its nodes; not safe to use from many threads."""

    def __init__(self, ledger: Ledger, mix: Mix | None = None, *, shapes: int = SHAPES) -> None:
        self._ledger = ledger
        self._mix = mix or Mix()
        self.asked: frozenset[str] | None = None
        """Holds the MIG profiles that pods ask, None for all there are."""
        self.table = Table(ledger)
        self._epoch = self.table.epoch
        # each policy, and the version of the table that it has been told of
        self._policies: dict[str, tuple[Policy, int]] = {}
        # of each row the pool that it is in, and the version of the table that this was said of
        self._pools: dict[tuple[Pool, ...], tuple[Ints, int]] = {}
        self._rankings: LRUCache[tuple[Any, ...], Ranking | PartitionRanking] = LRUCache(shapes)
        # the last question, of which version of the table it was, and the answer: bind asks what filter has just asked,
        # and mostly so does the next filter
        self._latest: tuple[tuple[PodRequest, str, int], Ranking] | None = None

    @property
    def mix(self) -> Mix:
        """Give the mix of pods that policies expect."""
        return self._mix

    @mix.setter
    def mix(self, mix: Mix) -> None:
        if mix != self._mix:
            self._mix = mix
            self._forget(only_by_mix=True)

    def adopt(self, mix: Mix, policies: Iterable[str]) -> Iterator[None]:
        """Go over to *mix* in steps of some milliseconds, between which of() may be asked and goes by the old one.

        *policies* are made for it beforehand, beside those that are in use now; so the first question after the last
        step takes no longer than any of a new shape. What goes by no mix stays as it is.
        """
        table, epoch = self.table, self.table.epoch
        made: dict[str, tuple[Policy, int]] = {}
        for name in sorted({*policies, *self._policies}):
            if named(name).needs_mix and sum(mix.counts) >= FEWEST_PODS:
                policy, seen = named(name)(table, mix), table.version
                yield
                rows, _ = table.shape
                for start in range(0, rows, _STEP_ROWS):
                    if table.epoch != epoch:
                        break
                    policy.changed(np.arange(start, min(rows, start + _STEP_ROWS)))
                    yield
                made[name] = policy, seen
        self.mix = mix
        # where nodes have come or gone meanwhile, what was made counts for nothing
        if table.epoch == epoch:
            self._policies.update(made)

    def of(
        self, request: PodRequest, policy: str, pools: tuple[Pool, ...] = (), *, asked: Ints | None = None
    ) -> NodeRanking:
        """Rank nodes for *request* as they are now, by *policy* and by those of node pools.

        Only the rows *asked* for, where some are named, need be as they are now.
        """
        self._refresh(asked)
        between = self._of(request, policy)
        if all(pool.policy == policy for pool in pools):
            return between
        own = [self._of(request, pool.policy) for pool in pools]
        return PooledRanking(between, own, self._pool(pools), self.table)

    def catch_up(self) -> None:
        """Take over what has been put off, where that is much, and weigh it for requests like the last one."""
        if self._latest is None or self.table.put_off < _MUCH:
            return
        request, policy, _ = self._latest[0]
        self._refresh(None)
        self._of(request, policy).fits(self.table.latest)

    def _pool(self, pools: tuple[Pool, ...]) -> Ints:
        """Say which pool each row is in, (N,)."""
        table = self.table
        found, seen = self._pools.get(pools) or (np.full(table.shape[0], NO_POOL), -1)
        if seen != table.version:
            for row in table.changed_since(seen):
                view = self._ledger.view(table.names[row]) if row < len(table.names) else None
                pool = pool_of(pools, view.labels) if view is not None else None
                found[row] = NO_POOL if pool is None else pool
            self._pools[pools] = found, table.version
        return found

    def _refresh(self, asked: Ints | None) -> None:
        """Take over what has changed, once for all policies of an answer, which go by one version of the table."""
        self.table.refresh(asked)
        if self.table.epoch != self._epoch:
            self._epoch = self.table.epoch
            self._forget()

    def _of(self, request: PodRequest, policy: str) -> "Ranking | PartitionRanking":
        if request.profiles:
            return self._partitioned(request, policy)
        question = request, policy, self.table.version
        if self._latest is None or self._latest[0] != question:
            self._latest = question, self._ranking(request, policy)
        return self._latest[1]

    def _ranking(self, request: PodRequest, policy: str) -> "Ranking":
        table = self.table
        if named(policy).needs_mix and sum(self._mix.counts) < FEWEST_PODS:
            policy = "/".join(_STAND_IN if named(level).needs_mix else level for level in policy.split("/"))
        made, seen = self._policies.get(policy) or (named(policy)(table, self._mix), -1)
        if seen != table.version:
            made.changed(table.changed_since(seen))
            self._policies[policy] = made, table.version
        asked = ask(request, table)
        # no policy weighs memory beside the GPUs'
        roles, users, wishes, _ = request.shape
        key = policy, roles, wishes, asked.cpu_milli, users if table.mps.any() else ()
        ranking = self._rankings.get(key)
        if not isinstance(ranking, Ranking):
            ranking = self._rankings[key] = Ranking(self._ledger, table, made, request, asked)
        return ranking

    def _partitioned(self, request: PodRequest, policy: str) -> PartitionRanking:
        roles, _, wishes, _ = request.shape
        aim = Aim(spread=spreads(policy), asked=self.asked)
        key = policy, roles, wishes, aim
        ranking = self._rankings.get(key)
        if not isinstance(ranking, PartitionRanking):
            ranking = self._rankings[key] = PartitionRanking(self._ledger, self.table, request, aim)
        return ranking

    def _forget(self, *, only_by_mix: bool = False) -> None:
        self._latest = None
        if not only_by_mix:
            self._pools.clear()
        for name in [name for name in self._policies if named(name).needs_mix or not only_by_mix]:
            del self._policies[name]
        for key in [key for key in self._rankings if named(key[0]).needs_mix or not only_by_mix]:
            del self._rankings[key]


def ask(request: PodRequest, table: Table) -> Ask:
    """Say a request in the terms of policies; of several containers, the largest counts."""
    if not request.containers:
        return Ask(gpus=0, share_milli=0, cpu_milli=request.compute.cpu_milli)
    return Ask(
        gpus=request.wishes.gpu_count,
        share_milli=MILLI if request.wishes.isolation.whole_gpu else min(MILLI, table.milli(max(pieces(request)))),
        cpu_milli=request.compute.cpu_milli,
    )


class Ranking:
    """Rank nodes for requests that are alike; a node is weighed when somebody asks for it and it has changed.

    So the cost of a question grows with the nodes asked for, not with the cluster: the first one of a new shape takes
    1 ms for 500 of 5,000 nodes, and 5 to 10 ms for all of them.

    reasons: why a node does not fit, by name, filled by who asks.
    """

    def __init__(self, ledger: Ledger, table: Table, policy: Policy, request: PodRequest, asked: Ask) -> None:
        self._ledger = ledger
        self._table = table
        self._policy = policy
        self._request = request
        self._ask = asked
        rows, _ = table.shape
        # which version of the table each row was last weighed in
        self._weighed_at: Ints = np.full(rows, -1)
        self._feasible: Bools = np.zeros(rows, np.bool_)
        self.reasons: dict[str, Reason] = {}
        # Each node's best GPU and its cost; or, where prices change, K candidates and the T terms of their costs. The
        # price of the first term is always one, so where there is no other, costs are kept.
        terms = len(policy.prices())
        self._priced = policy.priced and terms > 1
        candidates = policy.candidates if self._priced else 1
        self._gpu: Ints = np.full((rows, candidates), _NO_GPU)
        self._terms: Floats = np.zeros((rows, candidates, terms) if self._priced else 0)
        self._cost: Floats = np.full(rows, np.inf)
        needs = pieces(request) if request.containers else []
        # One piece is weighed for all nodes at once; several, and GPUs by name, are searched for node by node.
        self._at_once = len(needs) <= 1 and not request.wishes.uuids
        self._need_bytes = min(needs, default=0)
        # as which user one piece would be MPS's, None where as several, which no GPU under MPS takes
        self._clients = parts(request)[0] if len(needs) == 1 else NONE
        self._user = next(iter(self._clients.users)) if len(self._clients.users) == 1 else None
        self._allowed = table.allowed(request.wishes.models) & table.allowed(request.wishes.within)

    def costs(self, rows: Ints | None = None) -> Floats:
        """Give the cost just now of *rows*, or of all: the lower the better, infinite where the pod does not fit."""
        self._update(rows)
        if not self._priced:
            return self._cost if rows is None else self._cost[rows]
        of_rows = self._terms if rows is None else self._terms.take(rows, axis=0)
        asked, candidates, terms = of_rows.shape
        # as one flat product, which is several times quicker than one of many small ones; as is the least of columns
        priced = (of_rows.reshape(-1, terms) @ self._policy.prices()).reshape(asked, candidates)
        least = reduce(np.minimum, priced.T)
        return self._rounded(np.where(self._feasible if rows is None else self._feasible[rows], least, np.inf))

    def fits(self, rows: Ints | None = None) -> Bools:
        """Tell of *rows*, or of all, whether the node's GPUs could take the pod."""
        self._update(rows)
        return self._feasible if rows is None else self._feasible[rows]

    def preference(self, node: str) -> Preference:
        """Tell the fit which GPU to take: the policy's, then the tightest, should that one be gone meanwhile."""
        row = self._table.rows.get(node)
        view = self._ledger.view(node)
        column = self._column(row) if row is not None else _NO_GPU
        uuid = view.gpus[column].gpu.uuid if view is not None and 0 <= column < len(view.gpus) else None

        def prefer(state: GPUState, share_bytes: int) -> float:
            return -1.0 if state.gpu.uuid == uuid else state.free_bytes - share_bytes

        return prefer

    def _column(self, row: int) -> int:
        if self._weighed_at[row] < self._table.changed_at[row]:
            self._update(np.array([row]))
        if not self._feasible[row]:
            return _NO_GPU
        best = (self._terms[row] @ self._policy.prices()).argmin() if self._priced else 0
        return int(self._gpu[row, best])

    def _update(self, asked: Ints | None) -> None:
        """Weigh anew those of the rows *asked* for, or of all, that have changed."""
        changed_at = self._table.changed_at
        if asked is None:
            rows = np.flatnonzero(self._weighed_at < changed_at)
        else:
            rows = self._stale(asked)
            if len(rows):
                # those that changed with them in passing; each once, as one may be named twice: np.unique would import
                # numpy.ma in the first filter, 0.1 s
                rows = np.array(sorted({*rows.tolist(), *self._stale(self._table.latest).tolist()}), np.int64)
        if len(rows):
            self._weigh_anew(rows)
            # not before: should a policy of somebody's fail, nothing is taken for weighed
            self._weighed_at[rows] = self._table.version

    def _stale(self, rows: Ints) -> Ints:
        return rows[self._weighed_at[rows] < self._table.changed_at[rows]]

    def _weigh_anew(self, rows: Ints) -> None:
        table = self._table
        if self.reasons:
            for row in rows:
                self.reasons.pop(table.names[row], None)
        self._cost[rows] = np.inf
        if not self._ask.gpus:
            self._feasible[rows] = table.known[rows]
            rows = rows[table.known[rows]]
            if len(rows):
                self._weigh_whole(rows, table.free_milli[rows])
            return
        fits = self._fits(rows)
        enough = fits.sum(axis=1) >= self._ask.gpus
        if not self._at_once:
            searched = fits.any(axis=1)
        elif self._ask.gpus > 1:
            # one process cannot use GPUs of two MPS daemons, which the search knows
            searched = enough & (table.mps[rows] & fits).any(axis=1)
        else:
            searched = np.zeros(len(rows), np.bool_)
        weighed = enough & ~searched
        self._feasible[rows] = weighed
        if weighed.any():
            self._weigh_fitting(rows[weighed], fits[weighed])
        for row in rows[searched]:
            self._search(int(row))

    def _fits(self, rows: Ints) -> Bools:
        """Tell which GPUs could take the pod's piece, or its smallest, (B, G)."""
        table, wishes = self._table, self._request.wishes
        # a GPU that is not there has nothing free, and no piece is nothing
        fits = table.free_bytes[rows] >= self._need_bytes
        if wishes.isolation.whole_gpu:
            fits &= table.empty[rows]
        if wishes.models or wishes.within:
            fits &= self._allowed[table.model[rows]]
        mps = table.mps[rows]
        if self._at_once and mps.any():
            fits &= ~mps | self._served(rows)
        if wishes.isolation is Isolation.LIMITED:
            fits &= mps
        elif self._ask.gpus == 1 and mps.any():
            plain = fits & ~mps
            fits = np.where(plain.any(axis=1, keepdims=True), plain, fits)
        return fits

    def _served(self, rows: Ints) -> Bools:
        """Tell which GPUs under MPS would serve the pod's one piece beside the clients they have, (B, G)."""
        users = self._table.mps_user[rows]
        alike = (users == NO_USER) | (users == self._user) if self._user is not None else np.zeros_like(users, np.bool_)
        return alike & (self._table.mps_left[rows] >= self._clients.count)

    def _weigh_fitting(self, rows: Ints, fits: Bools) -> None:
        """Weigh nodes that fit, on each GPU that the policy names, or on the tightest where a pod takes several."""
        free = self._table.free_bytes[rows]
        if self._ask.gpus > 1:
            columns = np.where(fits, free, _NEVER).argsort(axis=1, kind="stable")[:, : self._ask.gpus]
            after = self._table.free_milli[rows]
            across = np.arange(len(rows))[:, None]
            after[across, columns] = self._left(free[across, columns])
            self._weigh_whole(rows, after)
            return
        gpus = self._policy.gpus(rows, fits, self._ask)
        row, k = np.nonzero(gpus != _NO_GPU)
        column = gpus[row, k]
        after = self._table.free_milli[rows[row]]
        after[np.arange(len(row)), column] = self._left(free[row, column])
        self._weigh(rows, gpus, row, k, after)

    def _left(self, free_bytes: Ints) -> Ints:
        """Count the milli that the pod leaves of GPUs that have so many bytes free.

        One that wants the GPU for itself is weighed by what it asks as well: what it does not use of its GPU is lost to
        the others, so the smallest GPU that holds it is the best.
        """
        return (free_bytes - self._need_bytes) * MILLI // self._table.largest_bytes

    def _weigh_whole(self, rows: Ints, after: Ints) -> None:
        """Weigh one placement for each row, of which the fit chooses the GPUs."""
        first = np.zeros(len(rows), np.int64)
        self._weigh(rows, np.full((len(rows), 1), _NO_GPU), np.arange(len(rows)), first, after)

    def _weigh(self, rows: Ints, gpus: Ints, row: Ints, k: Ints, after: Ints) -> None:
        """Price P placements and remember what they cost.

        *gpus* (B, K); *row* and *k* (P,) say whose node and GPU among them each is; *after* (P, G).
        """
        found = self._policy.weigh(rows[row], after, self._ask)
        if not self._priced:
            costs = np.full(gpus.shape, np.inf)
            costs[row, k] = found[:, 0]
            best, across = costs.argmin(axis=1), np.arange(len(rows))
            self._cost[rows], self._gpu[rows, 0] = self._rounded(costs[across, best]), gpus[across, best]
            return
        # A candidate that is none costs infinitely much by its first term, whose price is one.
        terms = np.zeros((len(rows), *self._terms.shape[1:]))
        terms[:, :, 0] = np.inf
        terms[row, k] = found
        self._terms[rows] = terms
        self._gpu[rows] = _NO_GPU
        self._gpu[rows, : gpus.shape[1]] = gpus

    def _rounded(self, costs: Floats) -> Floats:
        step = self._policy.step
        return np.floor(costs / step + 0.5) if step else costs

    def _search(self, row: int) -> None:
        """Ask the fit about a node, and weigh what it would do."""
        view = self._ledger.view(self._table.names[row])
        placed = place(view, self._request) if view is not None else Reason.UNKNOWN_NODE
        if view is None or not isinstance(placed, Placement):
            return
        left: dict[str, int] = {}
        for need, states in zip(pieces(self._request), placed.gpus, strict=False):
            for state in states:
                before = left.get(state.gpu.uuid, state.free_bytes)
                left[state.gpu.uuid] = before - need
        after = self._table.free_milli[row : row + 1].copy()
        # weighed in passing, it may have more GPUs by now than the table has columns; asked for, it is weighed anew
        for column, state in enumerate(view.gpus[: after.shape[1]]):
            if state.gpu.uuid in left:
                after[0, column] = left[state.gpu.uuid] * MILLI // self._table.largest_bytes
        self._feasible[row] = True
        self._weigh_whole(np.array([row]), after)
