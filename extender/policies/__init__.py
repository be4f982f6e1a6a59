"""Policies: which GPU of a node to take, and which node is best.

Each is a small pure module behind the interface in `extender.policies.policy`. Other packages add theirs by an entry
point of the group `cotenant.policies`.
"""

import warnings
from collections.abc import Iterable
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points

import numpy as np

from extender.policies.balanced import Balanced
from extender.policies.best_fit import BestFit
from extender.policies.binpack import Binpack
from extender.policies.clustering import Clustering
from extender.policies.dot_product import DotProduct
from extender.policies.fgd import FGD
from extender.policies.packing import Packing
from extender.policies.policy import Ask, Policy
from extender.policies.priced_leftovers import PricedLeftovers
from extender.policies.split import Split
from extender.policies.spread import Spread
from extender.policies.table import Floats

__all__ = ["MAX_SCORE", "POLICIES", "Ask", "Policy", "PolicyError", "named", "scores", "with_others"]

_OWN: dict[str, type[Policy]] = {
    policy.name: policy
    for policy in (Balanced, BestFit, Binpack, Clustering, DotProduct, FGD, Packing, PricedLeftovers, Spread)
}


def with_others(points: Iterable[EntryPoint]) -> dict[str, type[Policy]]:
    """Give our policies and those of other packages, by name; warn of what is no policy, and leave it out."""
    found = dict(_OWN)
    for point in points:
        try:
            policy = point.load()
        except Exception as error:  # noqa: BLE001 - another's code may fail in any way, and ours goes on
            problem = f"cannot be loaded: {error!r}"
        else:
            if not (isinstance(policy, type) and issubclass(policy, Policy)):
                problem = "is no subclass of extender.policies.Policy"
            elif getattr(policy, "name", None) != point.name:
                problem = f"calls itself {getattr(policy, 'name', None)!r}"
            elif point.name in found:
                problem = "has a name that is taken"
            else:
                found[point.name] = policy
                continue
        warnings.warn(f"policy {point.name} ({point.value}) {problem}; it is left out", stacklevel=2)
    return found


POLICIES = with_others(entry_points(group="cotenant.policies"))


class PolicyError(ValueError):
    """Say which policy does not exist, and which do."""


@lru_cache(maxsize=256)
def named(name: str) -> type[Policy]:
    """Find a policy by its name, or by two, NODE/GPU, of which one chooses nodes and the other GPUs on them.

    Raises PolicyError with a sentence for a name that is none.
    """
    node, slash, gpu = name.partition("/")
    for part in (node, gpu) if slash else (node,):
        if part not in POLICIES:
            raise PolicyError(f"{part[:64]!r} is none of {', '.join(sorted(POLICIES))}")
    return Split.of(POLICIES[node], POLICIES[gpu]) if slash and gpu != node else POLICIES[node]


MAX_SCORE = 10
# what is divided by where all cost the same
_LEAST = np.finfo(float).tiny


def scores(costs: Floats) -> list[int]:
    """Map costs to kube-scheduler's integers 0..10, so that the cheapest alone gets 10, and those equal to it.

    An infinite cost is a node that does not fit: 0. The others are spread over 1..9 by their cost.
    """
    known = np.isfinite(costs)
    if not known.any():
        return [0] * len(costs)
    best, worst = costs[known].min(), costs[known].max()
    steps = np.floor((MAX_SCORE - 2) * (np.where(known, costs, best) - best) / max(worst - best, _LEAST))
    found: list[int] = (
        np.where(known, np.where(costs == best, MAX_SCORE, MAX_SCORE - 1 - steps), 0).astype(int).tolist()
    )
    return found
