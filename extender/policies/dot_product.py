"""Dot product: place pods across the grain of what a node has left."""

import numpy as np

from extender.policies.policy import Ask, Policy
from extender.policies.table import Floats, Ints


class DotProduct(Policy):
    """Score a node by the dot product of what it has free and what the pod asks: the smallest is best.

    CPU and GPU count in parts of the largest node. That is the reverse of Tetris. Whole scores, as in the FGD paper's
    artifact (pkg/simulator/plugin/dot_product_score.go).
    """

    name = "dot-product"

    def weigh(self, rows: Ints, after: Ints, ask: Ask) -> Floats:  # noqa: ARG002
        """Give the score, negative, (P, 1)."""
        most_cpu, most_gpu = self.table.most_cpu, self.table.most_milli
        cpu = self.table.cpu_free[rows] / most_cpu * (ask.cpu_milli / most_cpu)
        gpu = self.table.free_milli[rows].sum(axis=1) / most_gpu * (ask.milli / most_gpu)
        cost: Floats = -np.trunc(100 * (1 - (cpu + gpu) / 2))[:, None]
        return cost
