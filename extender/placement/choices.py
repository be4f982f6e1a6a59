"""Which policy places a pod: its own wish, that of the node pool, that of its scheduler's profile, or the default."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Self

import msgspec

from cotenant.contract.configuration import ExtenderConfiguration
from cotenant.contract.request import PodRequest
from extender.policies import PolicyError, named


class Pool(msgspec.Struct, frozen=True):
    """Name nodes by labels, all of which they have, and the policy that holds among them."""

    labels: tuple[tuple[str, str], ...]
    policy: str


class Choice(msgspec.Struct, frozen=True):
    """Hold the policies for one pod: *policy* between nodes, and each pool's own between and on those of it.

    A node belongs to the first of *pools* that it is in.
    """

    policy: str
    pools: tuple[Pool, ...] = ()


class Choices(msgspec.Struct, frozen=True):
    """Know the policies that are configured: the default, by scheduler profile, and by node pool."""

    default: str
    profiles: Mapping[str, str] = {}
    pools: tuple[Pool, ...] = ()

    @classmethod
    def configured(cls, configuration: ExtenderConfiguration) -> Self:
        """Take them from the extender's configuration; raise PolicyError with the key of one that does not exist."""
        pools = tuple(Pool(tuple(sorted(pool.labels.items())), pool.policy) for pool in configuration.node_pools or ())
        found = cls(configuration.policy, configuration.profile_policies or {}, pools)
        for key, name in (
            ("policy", found.default),
            *((f"profilePolicies.{profile}", name) for profile, name in found.profiles.items()),
            *((f"nodePools[{n}].policy", pool.policy) for n, pool in enumerate(pools)),
        ):
            try:
                named(name)
            except PolicyError as error:
                raise PolicyError(f"{key}: {error}") from error
        return found

    @property
    def policies(self) -> tuple[str, ...]:
        """Name every policy that is configured, the default first."""
        return tuple(dict.fromkeys((self.default, *self.profiles.values(), *(pool.policy for pool in self.pools))))

    @property
    def labels(self) -> frozenset[str]:
        """Name the labels of nodes that pools go by."""
        return frozenset(key for pool in self.pools for key, _ in pool.labels)

    def of(self, request: PodRequest) -> Choice:
        """Choose for a pod; raise PolicyError where it wishes for a policy that does not exist."""
        if request.wishes.policy:
            named(request.wishes.policy)
            # what its author wants holds wherever it goes
            return Choice(request.wishes.policy)
        return Choice(self.profiles.get(request.scheduler, self.default), self.pools)

    def on(self, request: PodRequest, labels: Mapping[str, str]) -> str:
        """Name the policy that chooses the pod's GPU on a node with these labels; raise PolicyError as `of`."""
        choice = self.of(request)
        pool = pool_of(choice.pools, labels)
        return choice.policy if pool is None else choice.pools[pool].policy


def pool_of(pools: Sequence[Pool], labels: Mapping[str, str]) -> int | None:
    """Say which pool a node with these labels is in, the first that it has all labels of; None for none."""
    return next((n for n, pool in enumerate(pools) if _has(labels, pool.labels)), None)


def _has(labels: Mapping[str, str], wanted: Iterable[tuple[str, str]]) -> bool:
    return all(labels.get(key) == value for key, value in wanted)
