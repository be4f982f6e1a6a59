"""Spread: keep pods apart, so that each has neighbours as few as can be."""

from extender.policies import gpu_level
from extender.policies.binpack import left_behind
from extender.policies.policy import Ask, Policy
from extender.policies.table import MILLI, Bools, Floats, Ints


class Spread(Policy):
    """Take the GPU that is left with the most free memory, and the node where that is most."""

    name = "spread"

    def gpus(self, rows: Ints, fits: Bools, ask: Ask) -> Ints:
        """Choose the emptiest GPU; for a pod that takes all of one, and has no neighbours anywhere, the smallest."""
        choose = gpu_level.emptiest if ask.share_milli < MILLI else gpu_level.tightest
        return choose(self.table.free_milli[rows], fits)

    def weigh(self, rows: Ints, after: Ints, ask: Ask) -> Floats:
        """Count the milli left free on the GPUs taken, negative, (P, 1)."""
        return -left_behind(self, rows, after, ask)
