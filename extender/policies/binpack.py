"""Bin pack: leave the least behind on the GPUs taken, so that large pieces stay large."""

from extender.policies.policy import Ask, Policy
from extender.policies.table import Floats, Ints


class Binpack(Policy):
    """Take the GPU that is left with the least free memory, and the node where that is least.

    CPU decides for pods without GPUs alone.
    """

    name = "binpack"

    def weigh(self, rows: Ints, after: Ints, ask: Ask) -> Floats:
        """Count the milli left free on the GPUs taken, (P, 1)."""
        return left_behind(self, rows, after, ask)


def left_behind(policy: Policy, rows: Ints, after: Ints, ask: Ask) -> Floats:
    """Count what is left free on the GPUs that the pod takes, or of the node's CPU where it takes none, (P, 1)."""
    if not ask.gpus:
        return policy.cpu_after(rows, ask)[:, None].astype(float)
    taken = after < policy.table.free_milli[rows]
    left: Floats = (after * taken).sum(axis=1, keepdims=True).astype(float)
    return left
