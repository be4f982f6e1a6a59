"""A policy that keeps cores free where GPUs are free."""

import numpy as np

from extender.policies import Policy, gpu_level


class CoresLast(Policy):
    """Take the node with the fewest cores for each free GPU afterwards, and its emptiest GPU."""

    name = "cores-last"

    def gpus(self, rows, fits, ask):
        return gpu_level.emptiest(self.table.free_milli[rows], fits)

    def weigh(self, rows, after, ask):
        return (self.cpu_after(rows, ask) / np.maximum(1, after.sum(axis=1)))[:, None]
