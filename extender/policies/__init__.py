"""Policies: which GPU of a node to take, and which node is best.

Each is a small pure module behind the interface in `extender.policies.policy`.
"""

from collections.abc import Iterable

from extender.policies.balanced import Balanced
from extender.policies.best_fit import BestFit
from extender.policies.binpack import Binpack
from extender.policies.clustering import Clustering
from extender.policies.dot_product import DotProduct
from extender.policies.fgd import FGD
from extender.policies.packing import Packing
from extender.policies.policy import Ask, Policy
from extender.policies.priced_leftovers import PricedLeftovers
from extender.policies.spread import Spread

__all__ = ["MAX_SCORE", "POLICIES", "Ask", "Policy", "scores"]

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy
    for policy in (Balanced, BestFit, Binpack, Clustering, DotProduct, FGD, Packing, PricedLeftovers, Spread)
}

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
