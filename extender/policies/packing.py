"""Packing: used GPUs first, then empty GPUs of used nodes, then empty nodes."""

import numpy as np

from extender.policies.policy import Ask, Policy
from extender.policies.table import Floats, Ints


class Packing(Policy):
    """Score 50..100 for GPUs in use, the fuller the better; 33..50 for empty GPUs of a node in use; below for others.

    The formula is GpuPacking's of the FGD paper's artifact (pkg/simulator/plugin/gpu_packing_score.go).
    """

    name = "packing"

    def weigh(self, rows: Ints, after: Ints, ask: Ask) -> Floats:
        """Give the score, 0..100, negative, (P, 1)."""
        if not ask.gpus:
            return np.zeros((len(rows), 1))
        free, usable = self.table.free_milli[rows], self.table.usable_milli[rows]
        idle = (free == usable) & (usable > 0)
        taken = after < free
        gpus, idle_gpus = (usable > 0).sum(axis=1), idle.sum(axis=1)
        idle_taken = (idle & taken).sum(axis=1)
        percent = (free * 100 // np.maximum(1, usable) * taken).sum(axis=1)
        score = np.select(
            [idle_gpus == gpus, idle_taken > 0],
            [np.maximum(33 - gpus, gpus), np.maximum(50 - idle_taken, 33)],
            default=np.maximum(100 - percent // 10, 50),
        )
        cost: Floats = -score.astype(float)[:, None]
        return cost
