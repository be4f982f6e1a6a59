"""Clustering: keep pods of one kind together."""

import numpy as np

from extender.policies.policy import Ask, Policy
from extender.policies.table import MILLI, Floats, Ints


class Clustering(Policy):
    """Prefer nodes that hold pods of this kind alone, then among others, then empty nodes, then the rest.

    Kinds are: part of a GPU, one whole GPU, two, and so on. Within each, the fuller node is better
    (pkg/simulator/plugin/gpu_clustering_score.go of the FGD paper's artifact).
    """

    name = "clustering"

    def weigh(self, rows: Ints, after: Ints, ask: Ask) -> Floats:  # noqa: ARG002
        """Give the score, 0..100, negative, (P, 1)."""
        if not ask.gpus:
            return np.zeros((len(rows), 1))
        most_gpu = self.table.most_milli
        kinds = self.table.kinds[rows]
        kind = ask.gpus if ask.share_milli >= MILLI else 0
        alike, different = kinds[:, kind] > 0, (kinds > 0).sum(axis=1)
        base = np.select([alike & (different == 1), alike, different == 0], [75, 50, 25], default=0)
        free = self.table.free_milli[rows].sum(axis=1)
        cost: Floats = -(base + 25 * (most_gpu - free) // most_gpu).astype(float)[:, None]
        return cost
