"""Where the instances of a MIG GPU can lie, and which start leaves the most of the GPU to those that come later.

A GPU is a row of memory slices: 8 on most boards, 4 on an A30, 12 on an RTX PRO 6000. Each profile has a size and a few
starts, as NVML lists them (nvmlDeviceGetGpuInstancePossiblePlacements_v2). An instance can be made where it overlaps no
other, while no profile has more than its maxInstances, and while the media engines suffice. Nothing is ever moved: an
instance lies where it was made until its pod is gone.
"""

from collections.abc import Sequence
from enum import Enum, auto
from functools import cache, lru_cache

from cotenant.contract.inventory import MIGInstance, MIGProfile

# Several times the states of any board; bounded all the same, since what is taken comes from annotations.
_REMEMBERED = 1 << 14
_MAX_SEARCHED = 16


class PlacementError(ValueError):
    """Say why an instance cannot lie where it is said to."""


class _Media(Enum):
    """Say which of a GPU's media engines an instance takes; NVIDIA writes it at the end of the profile's name."""

    NONE = auto()
    SHARE = auto()
    # its share of the decoders, and the GPU's one optical flow accelerator
    EXTENSIONS = auto()
    ALL = auto()

    @classmethod
    def of(cls, profile: str) -> "_Media":
        if profile.endswith("+me.all"):
            return cls.ALL
        if profile.endswith("+me"):
            return cls.EXTENSIONS
        return cls.NONE if profile.endswith("-me") else cls.SHARE

    def beside(self, other: "_Media") -> bool:
        """Tell whether two such instances can be on one GPU: the engines of both are no more than there are."""
        pair = {self, other}
        if _Media.ALL in pair:
            return _Media.NONE in pair
        return not self is other is _Media.EXTENSIONS


class Geometry:
    """Know how one GPU can be cut; the answers depend on the arguments alone.

    *profiles* are those of the GPU, in any order; of several with one name the first counts. Instances given as *taken*
    may be of profiles that it does not know, and may overlap: their slices are taken. It remembers its answers, so GPUs
    that are alike should share one.
    """

    def __init__(self, profiles: Sequence[MIGProfile]) -> None:
        by_name = {profile.name: profile for profile in reversed(profiles)}
        largest_first = sorted(
            by_name.values(), key=lambda profile: (-profile.size, -profile.compute_slices, -profile.bytes, profile.name)
        )
        self._profiles = {profile.name: profile for profile in largest_first}
        self._media = {name: _Media.of(name) for name in by_name}
        # each start with its slices as bits, ascending
        self._places = {
            name: [(start, ((1 << profile.size) - 1) << start) for start in sorted(set(profile.starts))]
            for name, profile in self._profiles.items()
        }
        self._slices = max((bits.bit_length() for places in self._places.values() for _, bits in places), default=0)
        self._room = lru_cache(_REMEMBERED)(self._count_room)
        self._best = lru_cache(_REMEMBERED)(self._choose)

    @property
    def profiles(self) -> tuple[MIGProfile, ...]:
        """List the profiles: the largest first, by memory slices, then by compute slices, then by bytes."""
        return tuple(self._profiles.values())

    @property
    def slices(self) -> int:
        """Count the memory slices that any placement reaches."""
        return self._slices

    def starts(self, profile: str, taken: Sequence[MIGInstance]) -> tuple[int, ...]:
        """List where an instance of *profile* could be made now, ascending; none for a profile the GPU has not."""
        return tuple(start for start, _ in self._free(profile, *_state(taken)))

    def room(self, taken: Sequence[MIGInstance]) -> dict[str, int]:
        """Count how many more of each profile alone could be made, the largest profile first."""
        return dict(zip(self._profiles, self._room(*_state(taken)), strict=True))

    def place(self, profile: str, taken: Sequence[MIGInstance]) -> MIGInstance | None:
        """Choose where to make one more instance, or None where it can be made nowhere.

        The start is chosen after which the most instances of the largest profile could still be made; among equals
        those of the next largest, and so on to the smallest; among equals the highest. Largest first because room for a
        large instance is what cannot be had back: many starts do for a small one, and nothing is moved. So 3g goes to
        4, where no 4g can lie; 1g to 6, where no 2g can lie; and pairs that a 2g needs stay whole. What other
        objectives do, in figures: docs/decisions/0012-mig-objective.md.
        """
        start = self._best(profile, *_state(taken))
        return None if start is None else self._instance(profile, start)

    def place_together(
        self, profiles: Sequence[str], taken: Sequence[MIGInstance] = ()
    ) -> tuple[MIGInstance, ...] | None:
        """Choose starts for instances that are all known beforehand, or None where they do not fit in any way.

        The result is in the order of *profiles*, which does not matter to whether they fit. Of all ways that one is
        taken after which the most could still be made, as in `place`. All ways are tried, which takes time exponential
        in the slices: raises PlacementError above 16, where no board is.
        """
        if self.slices > _MAX_SEARCHED:
            raise PlacementError(f"the GPU has {_slices(self.slices)}, and a full search ends at {_MAX_SEARCHED}")
        mask, names = _state(taken)
        for profile in profiles:
            if not self._may(profile, names):
                return None
            names = (*names, profile)
        names = tuple(sorted(names))
        largest_first = [name for name in self._profiles for _ in range(profiles.count(name))]

        @cache
        def best(at: int, mask: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
            """Give the room that is left after all, and the starts of those from *at* on."""
            if at == len(largest_first):
                return self._room(mask, names), ()
            ways = []
            for start, bits in self._places[largest_first[at]]:
                rest = None if mask & bits else best(at + 1, mask | bits)
                if rest is not None:
                    ways.append((rest[0], (start, *rest[1])))
            return max(ways, default=None)

        found = best(0, mask)
        if found is None:
            return None
        starts: dict[str, list[int]] = {name: [] for name in profiles}
        for name, start in zip(largest_first, found[1], strict=True):
            starts[name].append(start)
        return tuple(self._instance(name, starts[name].pop()) for name in profiles)

    def check(self, instance: MIGInstance, taken: Sequence[MIGInstance]) -> None:
        """Raise PlacementError with a sentence where *instance* cannot be beside those that are *taken*."""
        profile = self._known(instance.profile)
        if instance.start not in profile.starts or instance.size != profile.size:
            raise PlacementError(f"{profile.name} cannot lie at {instance.start}: {_reach(profile)}")
        for other in taken:
            if overlap(instance, other):
                raise PlacementError(
                    f"{profile.name} at {instance.start} overlaps {other.profile} at {other.start}, "
                    f"which takes {_slices(other.size)} from there"
                )
        self._check_number(profile, taken)

    def explain(self, profile: str, taken: Sequence[MIGInstance]) -> str:
        """Say why no instance of *profile* can be made beside those that are *taken*; empty where one can."""
        if self.starts(profile, taken):
            return ""
        try:
            known = self._known(profile)
            self._check_number(known, taken)
        except PlacementError as error:
            return str(error)
        return f"no place for {profile} is free: {_reach(known)}"

    def _known(self, profile: str) -> MIGProfile:
        try:
            return self._profiles[profile]
        except KeyError:
            names = ", ".join(self._profiles) or "none"
            raise PlacementError(f"the GPU has no profile {profile}; its profiles are: {names}") from None

    def _check_number(self, profile: MIGProfile, taken: Sequence[MIGInstance]) -> None:
        have = sum(other.profile == profile.name for other in taken)
        if have >= profile.max_instances:
            raise PlacementError(f"a GPU has at most {profile.max_instances} of {profile.name}, and {have} are there")
        for other in taken:
            if not self._media[profile.name].beside(_Media.of(other.profile)):
                raise PlacementError(
                    f"{profile.name} cannot be beside {other.profile}: they need the same media engines"
                )

    def _may(self, profile: str, names: tuple[str, ...]) -> bool:
        """Tell whether number and media engines allow one more beside *names*, wherever it lies."""
        known = self._profiles.get(profile)
        if known is None or names.count(profile) >= known.max_instances:
            return False
        media = self._media[profile]
        return all(media.beside(_Media.of(name)) for name in names)

    def _free(self, profile: str, mask: int, names: tuple[str, ...]) -> list[tuple[int, int]]:
        if not self._may(profile, names):
            return []
        return [(start, bits) for start, bits in self._places[profile] if not mask & bits]

    def _choose(self, profile: str, mask: int, names: tuple[str, ...]) -> int | None:
        after = tuple(sorted((*names, profile)))
        free = self._free(profile, mask, names)
        return max(((self._room(mask | bits, after), start) for start, bits in free), default=(None, None))[1]

    def _count_room(self, mask: int, names: tuple[str, ...]) -> tuple[int, ...]:
        return tuple(self._count(name, mask, names) for name in self._profiles)

    def _count(self, profile: str, mask: int, names: tuple[str, ...]) -> int:
        """Count how many fit side by side: of equal sizes, taking the first free start each time gives the most."""
        count = 0
        for _, bits in self._free(profile, mask, names):
            if not mask & bits:
                mask |= bits
                count += 1
        alone = 1 if not self._media[profile].beside(self._media[profile]) else count
        return min(count, alone, self._profiles[profile].max_instances - names.count(profile))

    def _instance(self, profile: str, start: int) -> MIGInstance:
        return MIGInstance(profile=profile, start=start, size=self._profiles[profile].size)


def overlap(one: MIGInstance, other: MIGInstance) -> bool:
    """Tell whether two instances share a memory slice."""
    return one.start < other.start + other.size and other.start < one.start + one.size


def _state(taken: Sequence[MIGInstance]) -> tuple[int, tuple[str, ...]]:
    """Give what placing depends on: the slices that are taken, as bits, and the profiles that are there, sorted."""
    mask = 0
    for instance in taken:
        mask |= ((1 << instance.size) - 1) << instance.start
    return mask, tuple(sorted(instance.profile for instance in taken))


def _reach(profile: MIGProfile) -> str:
    starts = ", ".join(map(str, sorted(profile.starts))) or "nowhere"
    return f"it takes {_slices(profile.size)} from {starts}"


def _slices(size: int) -> str:
    return f"{size} memory slice{'' if size == 1 else 's'}"
