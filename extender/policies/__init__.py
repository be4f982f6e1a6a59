"""Policies: which GPU of a node to take, and which node is best.

A policy is a small pure object; it sees views of the ledger and amounts in bytes, and changes nothing. One module each.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

from extender.ledger import GPUState
from extender.policies.best_fit import BestFit


class Policy(Protocol):
    """Choose among placements that are all feasible."""

    @property
    def name(self) -> str:
        """Give the name that flags, configuration and the pod annotation know it by."""

    def gpu_cost(self, state: GPUState, share_bytes: int) -> float:
        """Price *share_bytes* on one GPU that has them free: the cheapest GPU is taken, the lower index on a tie."""

    def node_cost(self, taken: Sequence[tuple[GPUState, int]]) -> float:
        """Price a placement, GPUs as they are before it with the bytes taken of each: the cheapest node is best."""


POLICIES: dict[str, Policy] = {policy.name: policy for policy in (BestFit(),)}

MAX_SCORE = 10


def scores(costs: Iterable[float | None]) -> list[int]:
    """Map costs to kube-scheduler's integers 0..10, so that the cheapest alone gets 10, and those equal to it.

    None is a node that does not fit: 0. The others are spread over 1..9 by their cost.
    """
    listed = list(costs)
    known = [cost for cost in listed if cost is not None]
    best, worst = (min(known), max(known)) if known else (0.0, 0.0)

    def score(cost: float | None) -> int:
        if cost is None:
            return 0
        return MAX_SCORE if cost == best else MAX_SCORE - 1 - int((MAX_SCORE - 2) * (cost - best) / (worst - best))

    return [score(cost) for cost in listed]
