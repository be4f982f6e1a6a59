"""What every node is worth to a request where node pools have policies of their own."""

from typing import TYPE_CHECKING, Protocol

import numpy as np

from extender.placement.fit import Preference
from extender.policies.table import Bools, Floats, Ints, Table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cotenant.contract.reasons import Reason

NO_POOL = -1
# Keeps nodes of a pool apart that its policy tells apart and the other does not; below any difference of costs that
# means something.
_APART = 1e-9


class NodeRanking(Protocol):
    """Rank nodes for requests that are alike."""

    reasons: "dict[str, Reason]"

    def costs(self, rows: Ints | None = None) -> Floats:
        """Give the cost of *rows*, or of all: the lower the better, infinite where the pod does not fit."""

    def fits(self, rows: Ints | None = None) -> Bools:
        """Tell of *rows*, or of all, whether the node's GPUs could take the pod."""

    def preference(self, node: str) -> Preference:
        """Tell the fit which GPU of the node to take."""


class PooledRanking:
    """Let one policy choose between pools, and each pool's own among its nodes, and the GPU on them.

    Costs of two policies mean different things and are never compared. So the nodes of a pool keep the costs that the
    policy between pools gives them, but go into the order that their pool's policy has them in: what that holds for the
    best is worth what the best of the pool is worth outside.

    *pool* (N,): which of *own* each row of the table belongs to, NO_POOL for none; renewed by whoever made this.
    """

    def __init__(self, between: NodeRanking, own: "Sequence[NodeRanking]", pool: Ints, table: Table) -> None:
        self._between = between
        self._own = own
        self._pool = pool
        self._table = table
        self.reasons = between.reasons

    def costs(self, rows: Ints | None = None) -> Floats:
        """Give the cost of *rows*, or of all: the lower the better, infinite where the pod does not fit."""
        if rows is None:
            return self._exchanged(np.arange(len(self._pool)))
        # a node that is asked for twice is one node of its pool
        once, back = np.unique(rows, return_inverse=True)
        return self._exchanged(once)[back]

    def fits(self, rows: Ints | None = None) -> Bools:
        """Tell of *rows*, or of all, whether the node's GPUs could take the pod: no policy changes that."""
        return self._between.fits(rows)

    def preference(self, node: str) -> Preference:
        """Tell the fit which GPU to take: the pool's policy."""
        row = self._table.rows.get(node)
        pool = NO_POOL if row is None else int(self._pool[row])
        return (self._between if pool == NO_POOL else self._own[pool]).preference(node)

    def _exchanged(self, rows: Ints) -> Floats:
        costs = self._between.costs(rows).copy()
        pool = self._pool[rows]
        for n, ranking in enumerate(self._own):
            at = np.flatnonzero(pool == n)
            if len(at) > 1:
                costs[at] = exchanged(costs[at], ranking.costs(rows[at]))
        return costs


def exchanged(costs: Floats, own: Floats) -> Floats:
    """Hand *costs* (B,) out anew, the least to the node that costs the least by *own* (B,); equals stay equal."""
    order = own.argsort(kind="stable")
    ranked = own[order]
    first = np.searchsorted(ranked, ranked)
    found = np.empty_like(costs)
    found[order] = np.sort(costs)[first] + first * _APART
    return found
