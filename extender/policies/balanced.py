"""Balanced: use up a node's CPU and GPUs at the same pace, so that neither is left over alone."""

import numpy as np

from extender.policies.policy import Ask, Policy
from extender.policies.table import Floats, Ints


class Balanced(Policy):
    """Take the node whose used parts of CPU and of GPU memory differ least afterwards, and its tightest GPU.

    The measure is that of kube-scheduler's NodeResourcesBalancedAllocation for two resources.
    """

    name = "balanced"

    def weigh(self, rows: Ints, after: Ints, ask: Ask) -> Floats:
        """Give the difference of the free parts, 0..1, (P, 1)."""
        cpu = self.cpu_after(rows, ask) / np.maximum(1, self.table.cpu_total[rows])
        gpu = after.sum(axis=1) / np.maximum(1, self.table.usable_milli[rows].sum(axis=1))
        difference: Floats = np.abs(cpu - gpu)[:, None]
        return difference
