"""Which nodes kube-scheduler would show an extender: a sample of those that pass its own filters."""

import numpy as np

from extender.policies.table import Bools, Ints, Table

# pkg/scheduler/schedule_one.go: minFeasibleNodesToFind, minFeasibleNodesPercentageToFind, and the adaptive percentage
_FEWEST = 100
_FEWEST_PERCENT = 5
_MOST_PERCENT = 50
_NODES_PER_PERCENT = 125


class Sampler:
    """Go round the nodes as kube-scheduler does: on from where the last pod's sample ended, until there are enough."""

    def __init__(self, table: Table, rows: Ints) -> None:
        self._table = table
        self._rows = rows
        self._start = 0

    def shown(self, able: Bools, feasible: Bools, gpu_bytes: int) -> Bools:
        """Give the rows that the extender is asked about for a pod of so much GPU memory, (N,).

        Where none of them fits and another node does, all are shown: the extender nominates such a node.
        """
        # in-tree, gpu-mem is one number per node
        passing = able & (self._table.free_bytes.sum(axis=1) >= gpu_bytes)
        rows = np.roll(self._rows, -self._start)
        passed = np.flatnonzero(passing[rows])[: self._enough()]
        processed = passed[-1] + 1 if len(passed) == self._enough() else len(rows)
        self._start = (self._start + int(processed)) % len(rows)
        sampled = np.zeros_like(able)
        sampled[rows[passed]] = True
        return sampled if (sampled & feasible).any() else able

    def _enough(self) -> int:
        nodes = len(self._rows)
        if nodes < _FEWEST:
            return nodes
        percent = max(_FEWEST_PERCENT, _MOST_PERCENT - nodes // _NODES_PER_PERCENT)
        return max(_FEWEST, nodes * percent // 100)
