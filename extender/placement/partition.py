"""Which MIG GPUs of a node could take a pod's instances, where on them, and why none could. Pure.

A static GPU gives an instance that is there and free, or a share of one; a dynamic one has it made where the geometry
says. A free one is taken before one is made: that costs no room.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache

import msgspec

from cotenant.contract.grant import (
    GIVEN,
    GIVEN_A_SHARE,
    ContainerGrant,
    GPUShare,
    Grant,
    Isolation,
    IsolationRecord,
    MIGPlacement,
)
from cotenant.contract.inventory import MIGInstance, Mode
from cotenant.contract.mig import Geometry, PlacementError
from cotenant.contract.names import mig_suffix
from cotenant.contract.reasons import Reason
from cotenant.contract.request import ContainerRequest, PodRequest, Wishes
from extender.ledger import MIGState, NodeView, all_closed_by, closed_by
from extender.placement.wishes import is_wished, unwished

# Several containers on several GPUs are a search; beyond this many steps the node counts as full.
MAX_STEPS = 1_000
# A dynamic GPU comes after every static one.
_MADE = 1e6


class Aim(msgspec.Struct, frozen=True):
    """Say which GPUs are the best: with *spread* the emptiest, else those that lose the least room for large instances.

    Room is counted for the profiles that are *asked*, as resources name them, and for what is being placed; None asks
    all that a GPU has. What nobody asks needs no room, and costs those who ask (docs/decisions/0066-mig-leftovers.md).
    """

    spread: bool = False
    asked: frozenset[str] | None = None


ROOM = Aim()


class Slot(msgspec.Struct, frozen=True):
    """Name an instance for one container, and the GPU that it is on; its UUID is empty where it is yet to be made."""

    state: MIGState
    instance: MIGInstance


def place(view: NodeView, request: PodRequest, aim: Aim) -> tuple[Slot, ...] | Reason:
    """Choose an instance for each container of *request*, in its order, or say why that cannot be."""
    if view.mig_problem is not None:
        return view.mig_problem
    usable = _usable(view, request)
    if isinstance(usable, Reason):
        return usable
    if len(request.profiles) == 1:
        found = _best(usable, request.profiles[0], aim)
        return Reason.NO_MIG_ROOM if found is None else (found[1],)
    return _search(usable, request.profiles, aim) or Reason.NO_MIG_ROOM


def cost(view: NodeView, request: PodRequest, aim: Aim) -> tuple[float, Reason | None]:
    """Say what *request* would cost the node, the lower the better, or infinity and why it does not fit."""
    placed = place(view, request, aim)
    if isinstance(placed, Reason):
        return float("inf"), placed
    return sum(_price(slot.state, slot.instance, aim) for slot in placed), None


def objection(state: MIGState, wishes: Wishes, profile: str) -> Reason | None:
    """Say why one GPU by itself has no room for an instance of *profile*; None where it has."""
    if not is_wished(state, wishes):
        return unwished([state], wishes)
    if not offers(state, profile):
        return Reason.NO_MIG_PROFILE
    state = _isolating(state, wishes)
    if not offers(state, profile):
        return Reason.ISOLATION_UNAVAILABLE
    if not state.healthy:
        return closed_by(state)
    return None if _choice(state, profile, ROOM) is not None else Reason.NO_MIG_ROOM


def offers(state: MIGState, profile: str) -> bool:
    """Tell whether the GPU, were it empty, had an instance of *profile*."""
    if state.static:
        return any(state.suffix(one.profile) == profile for one in state.instances)
    return _name(state.geometry, profile) is not None


def offered(state: MIGState) -> list[str]:
    """Name what offers() is true of, as pods ask for it."""
    if state.static:
        return [state.suffix(one.profile) for one in state.instances]
    return [state.suffix(profile.name) for profile in state.geometry.profiles]


def free_slices(state: MIGState) -> float:
    """Count the memory slices that nothing lies on, or for a static GPU those of its free instances and shares."""
    if state.closed:
        return 0
    if state.static:
        return sum(one.size * free / state.replicas(one.profile) for one, free in state.free_shares().items())
    mask = 0
    for one in state.taken:
        mask |= ((1 << one.size) - 1) << one.start
    return max(0, state.geometry.slices - mask.bit_count())


def free_bytes(state: MIGState) -> int:
    """Count the bytes of the free memory slices, as a part of what the GPU has."""
    slices = state.geometry.slices or sum(one.size for one in state.instances)
    return int(state.gpu.usable_bytes * free_slices(state) / slices) if slices else 0


def grant(request: PodRequest, slots: Sequence[Slot]) -> Grant:
    """Write down a placement as the grant that goes into the pod."""
    return Grant(
        containers=tuple(
            _container(container, slot, request.wishes.isolation)
            for container, slot in zip(request.containers, slots, strict=True)
        )
    )


def least_bytes(view: NodeView, wishes: Wishes, profile: str) -> int:
    """Count the least that an instance of *profile* is charged on a node; 0 where none of its GPUs has it."""
    found = []
    for state in view.mig:
        if is_wished(state, wishes) and offers(state, profile):
            there = (one for one in state.instances if state.suffix(one.profile) == profile)
            name = _name(state.geometry, profile)
            made = (
                MIGInstance(profile=p.name, start=0, size=p.size) for p in state.geometry.profiles if p.name == name
            )
            found += [charged(Slot(state, one)) for one in (*there, *made)]
    return min(found, default=0)


def _container(container: ContainerRequest, slot: Slot, asked: Isolation) -> ContainerGrant:
    state, instance = slot.state, slot.instance
    replicas = state.replicas(instance.profile)
    given, enforced_by = GIVEN[Mode.MIG] if replicas == 1 else GIVEN_A_SHARE
    return ContainerGrant(
        name=container.name,
        role=container.role,
        family=state.gpu.family,
        mode=Mode.MIG,
        gpus=(GPUShare(uuid=state.gpu.uuid, bytes=charged(slot)),),
        units=1,
        mig=MIGPlacement(
            profile=instance.profile,
            start=instance.start,
            size=instance.size,
            uuid=instance.uuid,
            replicas=replicas,
            renamed=state.suffix(instance.profile) != mig_suffix(instance.profile),
        ),
        isolation=IsolationRecord(asked=asked, given=given, enforced_by=enforced_by),
    )


def charged(slot: Slot) -> int:
    """Count what a container is charged: of a share its part, so that all shares are no more than the instance."""
    return max(1, _bytes(slot) // slot.state.replicas(slot.instance.profile))


def _bytes(slot: Slot) -> int:
    """Count the instance's bytes; a part of the GPU's by slices where the inventory does not say."""
    gpu = slot.state.gpu
    known = next((p.bytes for p in slot.state.geometry.profiles if p.name == slot.instance.profile), 0)
    slices = max(slot.state.geometry.slices, slot.instance.size)
    return known or max(1, gpu.total_bytes * slot.instance.size // slices)


def _usable(view: NodeView, request: PodRequest) -> list[MIGState] | Reason:
    wished = [state for state in view.mig if is_wished(state, request.wishes)]
    if view.mig and not wished:
        return unwished(view.mig, request.wishes)
    isolating = [_isolating(state, request.wishes) for state in wished]
    for profile in request.profiles:
        if not any(offers(state, profile) for state in wished):
            return Reason.NO_MIG_PROFILE
        offering = [state for state in isolating if offers(state, profile)]
        if not offering:
            return Reason.ISOLATION_UNAVAILABLE
        if profile not in view.advertised:
            return Reason.NOT_ADVERTISED
        if not any(state.healthy for state in offering):
            return all_closed_by(offering)
    return [state for state in isolating if state.healthy]


def _isolating(state: MIGState, wishes: Wishes) -> MIGState:
    """Show the GPU as a pod may use it: a share of an instance isolates nothing, so for many only whole ones count."""
    mig = state.gpu.mig
    if wishes.isolation is Isolation.NONE or mig is None or not mig.shares:
        return state
    whole = tuple(one for one in mig.instances if mig.replicas(one.profile) == 1)
    gpu = msgspec.structs.replace(state.gpu, mig=msgspec.structs.replace(mig, instances=whole))
    return msgspec.structs.replace(state, gpu=gpu)


@lru_cache(maxsize=4096)
def _name(geometry: Geometry, profile: str) -> str | None:
    """Find the profile whose resource is called so; 1g.5gb.me is that of 1g.5gb+me."""
    return next((one.name for one in geometry.profiles if mig_suffix(one.name) == profile), None)


@lru_cache(maxsize=4096)
def _asked(geometry: Geometry, asked: frozenset[str] | None, *more: str) -> Geometry:
    """Give the geometry as if it had no other profiles than those *asked* and *more*."""
    if asked is None:
        return geometry
    return Geometry([one for one in geometry.profiles if mig_suffix(one.name) in asked or mig_suffix(one.name) in more])


def _choice(state: MIGState, profile: str, aim: Aim) -> MIGInstance | None:
    """Choose the instance that one more container would get of the GPU."""
    if state.closed:
        return None
    if state.static:
        return _freest(state, profile, state.free_shares())
    name = _name(state.geometry, profile)
    return None if name is None else _asked(state.geometry, aim.asked, profile).place(name, state.taken)


def _freest(state: MIGState, profile: str, free: Mapping[MIGInstance, int]) -> MIGInstance | None:
    """Choose the static instance whose sharers are the fewest; of those that are alike the first on the GPU."""
    found = [one for one, left in free.items() if left and state.suffix(one.profile) == profile]
    return min(found, key=lambda one: (-free[one] / state.replicas(one.profile), one.start), default=None)


def _best(usable: Iterable[MIGState], profile: str, aim: Aim) -> tuple[float, Slot] | None:
    found: tuple[float, Slot] | None = None
    # of GPUs that are alike and taken alike the first is as good as any
    seen: set[object] = set()
    for state in usable:
        likeness = state.geometry, state.taken, state.gpu.mig if state.static else None, state.closed
        if likeness in seen:
            continue
        seen.add(likeness)
        instance = _choice(state, profile, aim)
        if instance is not None:
            price = _price(state, instance, aim)
            if found is None or price < found[0]:
                found = price, Slot(state, instance)
    return found


def _price(state: MIGState, instance: MIGInstance, aim: Aim) -> float:
    """Price an instance: in spread by what is taken, else by the room that is lost, and then by what is left free."""
    left = free_slices(state) - instance.size / state.replicas(instance.profile)
    if aim.spread:
        return -left
    if state.static:
        return left
    geometry = _asked(state.geometry, aim.asked, mig_suffix(instance.profile))
    return _MADE + _lost(geometry, state.taken, instance) + left / 1000


@lru_cache(maxsize=1 << 16)
def _lost(geometry: Geometry, taken: tuple[MIGInstance, ...], instance: MIGInstance) -> int:
    """Count the instances of each profile that could no longer be made, in memory slices, the largest first of all.

    An empty GPU loses its largest profile to whatever is put on it, so GPUs in use come first.
    """
    before, after = geometry.room(taken), geometry.room((*taken, instance))
    return sum((before[p.name] - after[p.name]) * p.size for p in geometry.profiles)


def _search(usable: Sequence[MIGState], profiles: Sequence[str], aim: Aim) -> tuple[Slot, ...] | None:
    """Find instances for all containers together, the largest first, each on the GPU that is best for it."""
    search = _Search(usable, profiles, aim)
    if not search.settle(0):
        return None
    slots: dict[int, Slot] = {}
    for uuid, containers in search.chosen.items():
        for n, instance in zip(containers, search.together(uuid) or (), strict=True):
            slots[n] = Slot(search.by_uuid[uuid], instance)
    return tuple(slots[n] for n in range(len(profiles)))


class _Search:
    """Try the GPUs in the order of favour, and go back where what is left holds no more."""

    def __init__(self, usable: Sequence[MIGState], profiles: Sequence[str], aim: Aim) -> None:
        self._profiles = profiles
        self._aim = aim
        sizes = {profile: _size(usable, profile, aim) for profile in profiles}
        self._order = sorted(range(len(profiles)), key=lambda n: -sizes[profiles[n]])
        self._steps = 0
        self.by_uuid = {state.gpu.uuid: state for state in usable}
        # which containers each GPU is chosen for
        self.chosen: dict[str, list[int]] = {uuid: [] for uuid in self.by_uuid}

    def together(self, uuid: str) -> tuple[MIGInstance, ...] | None:
        """Place the instances that a GPU is chosen for; None where it has no room for them together."""
        return _together(self.by_uuid[uuid], tuple(self._profiles[n] for n in self.chosen[uuid]), self._aim)

    def settle(self, depth: int) -> bool:
        """Choose for the container at *depth*, the largest first, and those after it; tell whether that could be."""
        if depth == len(self._order):
            return True
        container = self._order[depth]
        tried: set[object] = set()
        for uuid in _favourites(self.by_uuid, self._profiles[container], self._aim):
            state, chosen = self.by_uuid[uuid], self.chosen[uuid]
            # GPUs that are alike and have been given alike: what failed on one fails on the other
            given = tuple(self._profiles[n] for n in chosen)
            likeness = (state.geometry, state.taken, state.gpu.mig if state.static else None, given)
            if likeness in tried:
                continue
            tried.add(likeness)
            self._steps += 1
            if self._steps > MAX_STEPS:
                return False
            chosen.append(container)
            if self.together(uuid) is not None and self.settle(depth + 1):
                return True
            chosen.remove(container)
        return False


def _favourites(by_uuid: dict[str, MIGState], profile: str, aim: Aim) -> Iterator[str]:
    priced = []
    for uuid, state in by_uuid.items():
        instance = _choice(state, profile, aim)
        if instance is not None:
            priced.append((_price(state, instance, aim), state.gpu.index, uuid))
    return iter([uuid for _, _, uuid in sorted(priced)])


def _size(usable: Iterable[MIGState], profile: str, aim: Aim) -> int:
    return max((one.size for state in usable if (one := _choice(state, profile, aim)) is not None), default=0)


def _together(state: MIGState, profiles: tuple[str, ...], aim: Aim) -> tuple[MIGInstance, ...] | None:
    """Find an instance of the GPU for each of *profiles*, in their order."""
    if state.static:
        free = {} if state.closed else state.free_shares()
        found = []
        for profile in profiles:
            one = _freest(state, profile, free)
            if one is None:
                return None
            free[one] -= 1
            found.append(one)
        return tuple(found)
    names = [_name(state.geometry, profile) for profile in profiles]
    known = [name for name in names if name is not None]
    geometry = _asked(state.geometry, aim.asked, *sorted(set(profiles)))
    try:
        return geometry.place_together(known, state.taken) if len(known) == len(names) else None
    except PlacementError:
        return None  # it claims more slices than any GPU has
