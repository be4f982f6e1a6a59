"""FGD: place a pod where fragmentation grows least (Weng, Yang et al., USENIX ATC 2023)."""

import numpy as np

from extender.policies import gpu_level
from extender.policies.fragmentation import Fragmentation
from extender.policies.mix import Mix
from extender.policies.policy import Ask, Policy
from extender.policies.table import Bools, Floats, Ints, Table


class FGD(Policy):
    """Score a placement by how it changes its node's fragmentation: trunc(100 / (1 + exp(-(F - F') / 1000))).

    Truncation makes many nodes tie, and taking the first of them in one fixed order does part of the packing: the same
    without truncation allocates a hundredth less of the paper's cluster.
    """

    name = "fgd"
    needs_mix = True

    def __init__(self, table: Table, mix: Mix) -> None:
        super().__init__(table, mix)
        self._fragmentation = Fragmentation(mix, table)
        self._before = np.zeros(table.shape[0])
        self._stale = np.ones(table.shape[0], np.bool_)

    def changed(self, rows: Ints) -> None:
        """Note that the fragmentation of these nodes is to be counted anew."""
        self._stale[rows] = True

    def gpus(self, rows: Ints, fits: Bools, ask: Ask) -> Ints:  # noqa: ARG002
        """List all GPUs, those that have the same free once."""
        return gpu_level.every_different(self.table.free_milli[rows], fits)

    def weigh(self, rows: Ints, after: Ints, ask: Ask) -> Floats:
        """Give the score, 0..100, negative, (P, 1)."""
        table = self.table
        stale = np.unique(rows[self._stale[rows]])
        # one call for both: most are of a few nodes, where a call costs more than what it counts
        counted = self._fragmentation.of(
            np.concatenate([after, table.free_milli[stale]]),
            np.concatenate([self.cpu_after(rows, ask), table.cpu_free[stale]]),
            np.concatenate([table.node_model[rows], table.node_model[stale]]),
        )
        self._before[stale], self._stale[stale] = counted[len(rows) :], False
        shrunk = self._before[rows] - counted[: len(rows)]
        cost: Floats = -np.trunc(100 / (1 + np.exp(-shrunk / 1000)))[:, None]
        return cost
