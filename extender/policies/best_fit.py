"""Best fit: take the node that has the least left, of CPU and GPUs together."""

import numpy as np

from extender.policies.policy import Ask, Policy
from extender.policies.table import Floats, Ints


class BestFit(Policy):
    """Score a node by what is left of it, in parts of the largest node: 100 for nothing, 0 for all of that.

    Whole scores, so that many nodes tie. The formula is BestFit's of the FGD paper's artifact
    (pkg/simulator/plugin/best_fit_score.go); its order of operations is kept, as scores hang on the last bit.
    """

    name = "best-fit"

    def weigh(self, rows: Ints, after: Ints, ask: Ask) -> Floats:
        """Give the score, negative, (P, 1)."""
        most_cpu, most_gpu = self.table.most_cpu, self.table.most_milli
        left = self.cpu_after(rows, ask) / most_cpu * 0.5 + after.sum(axis=1) / most_gpu * 0.5
        cost: Floats = -np.trunc((1.0 - left) * 100)[:, None]
        return cost
