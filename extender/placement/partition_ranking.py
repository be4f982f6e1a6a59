"""What every node is worth to a pod that asks MIG instances, kept until the node changes."""

from typing import TYPE_CHECKING

import numpy as np

from cotenant.contract.request import PodRequest
from extender.ledger import Ledger
from extender.placement import partition
from extender.placement.fit import Preference, tightest
from extender.policies.spread import Spread
from extender.policies.table import Bools, Floats, Ints, Table

if TYPE_CHECKING:
    from cotenant.contract.reasons import Reason


def spreads(policy: str) -> bool:
    """Tell whether a policy keeps pods apart; of MIG instances all others keep room for large ones.

    Of NODE/GPU it is the first that counts.
    """
    return policy.split("/", maxsplit=1)[0] == Spread.name


class PartitionRanking:
    """Rank nodes for requests that are alike; a node is looked at when somebody asks for it and it has changed.

    reasons: why a node does not fit, by name.
    """

    def __init__(self, ledger: Ledger, table: Table, request: PodRequest, aim: partition.Aim) -> None:
        self._ledger = ledger
        self._table = table
        self._request = request
        self._aim = aim
        rows, _ = table.shape
        # which version of the table each row was last looked at in
        self._looked_at: Ints = np.full(rows, -1)
        self._feasible: Bools = np.zeros(rows, np.bool_)
        self.reasons: dict[str, Reason] = {}
        self._cost: Floats = np.full(rows, np.inf)

    def costs(self, rows: Ints | None = None) -> Floats:
        """Give the cost of *rows*, or of all: the lower the better, infinite where the pod does not fit."""
        self._update(rows)
        return self._cost if rows is None else self._cost[rows]

    def fits(self, rows: Ints | None = None) -> Bools:
        """Tell of *rows*, or of all, whether the node's GPUs could take the pod."""
        self._update(rows)
        return self._feasible if rows is None else self._feasible[rows]

    def preference(self, node: str) -> Preference:  # noqa: ARG002
        """Prefer nothing among GPUs that memory is counted of."""
        return tightest

    def _update(self, rows: Ints | None) -> None:
        """Look anew at those of *rows* that have changed."""
        table = self._table
        asked = np.arange(len(self._looked_at)) if rows is None else rows
        due = sorted(set(asked[self._looked_at[asked] < table.changed_at[asked]].tolist()))
        for row in due:
            name = table.names[row] if row < len(table.names) else ""
            view = self._ledger.view(name)
            self.reasons.pop(name, None)
            self._cost[row], self._feasible[row] = np.inf, False
            if view is None:
                continue
            self._cost[row], reason = partition.cost(view, self._request, self._aim)
            self._feasible[row] = reason is None
            if reason is not None:
                self.reasons[name] = reason
        self._looked_at[due] = table.version
