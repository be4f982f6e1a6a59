"""Holds back resources that begin to be offered while the plugin runs, until no other plugin is seen to serve them.

Of two plugins that register one name the kubelet takes the later, so an edit could take pods their devices.
"""

from collections.abc import Callable, Collection, Mapping, Sequence

import msgspec

from cotenant.contract.inventory import GPU, Family, Health
from cotenant.contract.names import Names
from device_plugin.families.partitions import Offered
from device_plugin.families.rules import Assigned


class Newcomers:
    """Keep which resources wait; *taken* names those that another plugin serves, each with a sentence.

    Not safe to use from many threads.
    """

    def __init__(self, taken: Callable[[Collection[str]], Mapping[str, str]], names: Names) -> None:
        self._taken = taken
        self._names = names
        self._clear: frozenset[str] = frozenset()
        self._waiting: frozenset[str] = frozenset()
        self._said: Mapping[str, str] = {}

    @property
    def said(self) -> Mapping[str, str]:
        """Say which resources are held back for good, and why."""
        return self._said

    def sift(
        self, gpus: Sequence[GPU], assigned: Mapping[str, Assigned], partitions: Offered, known: Collection[str]
    ) -> tuple[tuple[GPU, ...], Offered]:
        """Take out what must wait: of *known* resources nothing; a GPU of which nothing is left is unhealthy."""
        of = {gpu.uuid: self._resources(gpu, assigned[gpu.uuid], partitions) for gpu in gpus}
        self._waiting = frozenset().union(*of.values()) - self._clear - {*known}
        if not self._waiting:
            return tuple(gpus), partitions
        left = Offered(
            {name: ids for name, ids in partitions.instances.items() if name not in self._waiting},
            {name: shares for name, shares in partitions.whole.items() if name not in self._waiting},
        )
        return tuple(self._marked(gpu, of[gpu.uuid] & self._waiting, of[gpu.uuid]) for gpu in gpus), left

    def withheld(self, gpu: GPU, how: Assigned) -> bool:
        """Tell whether shares of a GPU must not be offered yet."""
        return gpu.family is Family.REPLICAS and how.resource in self._waiting

    def look(self) -> bool:
        """Look for who serves those that wait; tell whether that changes anything."""
        if not self._waiting:
            changed = bool(self._said)
            self._said = {}
            return changed
        said = dict(self._taken(self._waiting))
        clear = self._clear | (self._waiting - said.keys())
        changed = (said, clear) != (self._said, self._clear)
        self._said, self._clear = said, clear
        return changed

    def _resources(self, gpu: GPU, how: Assigned, partitions: Offered) -> frozenset[str]:
        """Name what a GPU is offered as, besides memory."""
        if gpu.family is Family.REPLICAS:
            return frozenset({how.resource} - {""})
        if gpu.mig is None:
            return frozenset()
        if gpu.family is Family.MIG_DYNAMIC:
            return frozenset(self._names.mig(profile.name) for profile in gpu.mig.profiles)
        named = {self._names.mig_prefix + gpu.mig.suffix(one.profile) for one in gpu.mig.instances}
        return frozenset(partitions.whole or named)

    def _marked(self, gpu: GPU, waiting: Collection[str], every: Collection[str]) -> GPU:
        if not every or len(waiting) < len(every):
            return gpu
        first = min(waiting)
        detail = self._said.get(first, f"whether another device plugin serves {first} is being looked at")
        return msgspec.structs.replace(gpu, health=Health.UNHEALTHY, detail=gpu.detail or detail)
