"""Which GPUs of a node could take a pod, which of them it would get, and why none where none can."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, combinations

import msgspec

from cotenant.contract.grant import GIVEN, ContainerGrant, GPUShare, Grant, Isolation, IsolationRecord
from cotenant.contract.inventory import Family, Mode
from cotenant.contract.mps import NONE, Clients
from cotenant.contract.reasons import Reason
from cotenant.contract.request import ContainerRequest, PodRequest, Wishes
from extender.ledger import GPUState, NodeView, all_closed_by, closed_by
from extender.placement import partition
from extender.placement.wishes import is_wished, unwished

# Packing several containers onto several GPUs is a search. Real pods need a handful of steps; beyond this many the node
# counts as full, so that no pod can stall the scheduling of the others. Four containers on 8 GPUs stay below it.
MAX_STEPS = 1_000


# Orders the GPUs of a node that could give a pod so many bytes: the least is taken.
Preference = Callable[[GPUState, int], float]


def tightest(state: GPUState, share_bytes: int) -> float:
    """Prefer the GPU that is left with the fewest free bytes."""
    return state.free_bytes - share_bytes


class Placement(msgspec.Struct, frozen=True):
    """Say which GPUs each asking container would get, in the request's order; or which MIG instance."""

    gpus: tuple[tuple[GPUState, ...], ...]
    slots: tuple[partition.Slot, ...] = ()


def place(
    view: NodeView, request: PodRequest, prefer: Preference = tightest, aim: partition.Aim = partition.ROOM
) -> Placement | Reason:
    """Choose GPUs for every container of *request* on one node, or say why that cannot be.

    Where a choice is left it is *prefer*'s; for MIG instances, *aim*'s.

    Exact: a Reason comes back only when no choice of healthy GPUs holds the whole pod (within MAX_STEPS).
    """
    if request.profiles:
        slots = partition.place(view, request, aim)
        return slots if isinstance(slots, Reason) else Placement(gpus=(), slots=slots)
    if view.problem is not None or not view.gpus:
        return view.problem or Reason.NO_SHARED_GPU
    wishes = request.wishes
    usable = _usable(view, wishes)
    if isinstance(usable, Reason):
        return usable
    if len(usable) < wishes.gpu_count:
        return _without_closed(view, wishes, 0) or Reason.TOO_FEW_GPUS
    candidates = [state for state in usable if state.empty] if wishes.isolation.whole_gpu else usable
    found = _choose(candidates, request, parts(request), prefer)
    if found is None:
        reason = _why_not(usable, candidates, request)
        closed = _without_closed(view, wishes, max(pieces(request))) if reason is Reason.TOO_LARGE else None
        return closed or reason
    return Placement(gpus=found * len(request.containers) if request.whole else found)


def _choose(
    candidates: Sequence[GPUState], request: PodRequest, clients: Sequence[Clients], prefer: Preference
) -> tuple[tuple[GPUState, ...], ...] | None:
    """Choose GPUs for each piece of *request*, which would be *clients* to MPS."""
    needs, count = pieces(request), request.wishes.gpu_count
    if len(needs) == count == 1:
        # nearly every pod: no search, and no order but the first
        fitting = [s for s in candidates if s.free_bytes >= needs[0] and conflict(s, clients[0]) is None]
        return ((min(fitting, key=_key(prefer, needs[0])),),) if fitting else None
    return _search(needs, clients, candidates, prefer, count)


def pieces(request: PodRequest) -> list[int]:
    """List what must be free of each GPU, container by container; containers on one set of GPUs are one piece."""
    return [request.whole_bytes] if request.whole else [container.share_bytes for container in request.containers]


def parts(request: PodRequest) -> list[Clients]:
    """List what each of the pieces would be to MPS."""
    return [request.whole_clients] if request.whole else [container.clients for container in request.containers]


def largest(request: PodRequest) -> tuple[int, Clients]:
    """Give the largest of the pieces, and what that would be to MPS."""
    needs = pieces(request)
    most = max(needs)
    return most, parts(request)[needs.index(most)]


def conflict(state: GPUState, clients: Clients) -> Reason | None:
    """Say why MPS would not serve *clients* on the GPU beside those it has; None where it would, or is not there."""
    if state.gpu.mode is not Mode.MPS:
        return None
    if clients.users and len(state.users | clients.users) > 1:
        return Reason.MODE_CONFLICT
    most = state.gpu.max_clients
    return Reason.TOO_MANY_CLIENTS if most and state.clients + clients.count > most else None


def _key(prefer: Preference, need: int) -> Callable[[GPUState], tuple[bool, float, int]]:
    # GPUs that time slicing shares come before those under MPS, whatever the policy.
    return lambda state: (state.gpu.mode is Mode.MPS, prefer(state, need), state.gpu.index)


def objection(state: GPUState, wishes: Wishes, need: int, clients: Clients) -> tuple[Reason | None, int]:
    """Say why *need* bytes of one GPU by itself cannot be had, None where they can, and how many are missing.

    *clients* is what who needs them would be to MPS.
    """
    lacking = max(0, need - state.free_bytes)
    if not is_wished(state, wishes):
        return unwished([state], wishes), lacking
    if wishes.isolation is Isolation.LIMITED and state.gpu.mode is not Mode.MPS:
        return Reason.ISOLATION_UNAVAILABLE, lacking
    if not state.healthy:
        return closed_by(state), lacking
    if state.gpu.usable_bytes < need:
        return Reason.TOO_LARGE, need - state.gpu.usable_bytes
    if wishes.isolation.whole_gpu and not state.empty:
        return Reason.NO_EMPTY_GPU, state.held_bytes
    return (Reason.NO_GPU_FITS, lacking) if lacking else (conflict(state, clients), 0)


def grant(request: PodRequest, placement: Placement) -> Grant:
    """Write down a placement as the grant that goes into the pod."""
    if placement.slots:
        return partition.grant(request, placement.slots)
    return Grant(
        containers=tuple(
            _container(container, states, request.wishes)
            for container, states in zip(request.containers, placement.gpus, strict=True)
        )
    )


def choosing(
    request: PodRequest, prefer: Preference = tightest, aim: partition.Aim = partition.ROOM
) -> Callable[[NodeView], Grant | Reason]:
    """Give what places *request* on a node as place() does, and writes the placement down."""

    def choose(view: NodeView) -> Grant | Reason:
        placed = place(view, request, prefer, aim)
        return grant(request, placed) if isinstance(placed, Placement) else placed

    return choose


def _container(container: ContainerRequest, states: tuple[GPUState, ...], wishes: Wishes) -> ContainerGrant:
    mode = Mode.EXCLUSIVE if wishes.isolation.whole_gpu else states[0].gpu.mode
    given, enforced_by = GIVEN[mode]
    under_mps = states[0].gpu.mode is Mode.MPS
    return ContainerGrant(
        name=container.name,
        role=container.role,
        family=Family.MEMORY,
        mode=mode,
        gpus=tuple(
            GPUShare(
                uuid=state.gpu.uuid,
                bytes=state.gpu.usable_bytes if mode is Mode.EXCLUSIVE else container.share_bytes,
            )
            for state in states
        ),
        units=container.units,
        threads=wishes.threads,
        # a GPU for the pod alone may be one of MPS's too, and lets in nobody but its daemon
        mps_pipe=states[0].gpu.mps_pipe if under_mps else "",
        user=container.user if under_mps else None,
        isolation=IsolationRecord(asked=wishes.isolation, given=given, enforced_by=enforced_by),
    )


def _usable(view: NodeView, wishes: Wishes) -> Sequence[GPUState] | Reason:
    """List the healthy GPUs that the pod's wishes leave, or say which wish leaves none."""
    if not (wishes.models or wishes.within or wishes.uuids or wishes.isolation is Isolation.LIMITED):
        return view.healthy or all_closed_by(view.gpus)
    states = [state for state in view.gpus if is_wished(state, wishes)]
    if not states:
        return unwished(view.gpus, wishes)
    if wishes.isolation is Isolation.LIMITED:
        states = [state for state in states if state.gpu.mode is Mode.MPS]
        if not states:
            return Reason.ISOLATION_UNAVAILABLE
    return [state for state in states if state.healthy] or all_closed_by(states)


def _without_closed(view: NodeView, wishes: Wishes, need: int) -> Reason | None:
    """Say why GPUs are closed, without which too few have *need* bytes in all; None where there were with them, too."""
    if len(view.healthy) == len(view.gpus):
        return None
    states = [state for state in view.gpus if is_wished(state, wishes) and state.gpu.usable_bytes >= need]
    if wishes.isolation is Isolation.LIMITED:
        states = [state for state in states if state.gpu.mode is Mode.MPS]
    return all_closed_by([s for s in states if not s.healthy]) if len(states) >= wishes.gpu_count else None


def _search(
    needs: Sequence[int],
    clients: Sequence[Clients],
    candidates: Sequence[GPUState],
    prefer: Preference,
    count: int,
) -> tuple[tuple[GPUState, ...], ...] | None:
    """Find *count* different GPUs for each need, the favourites first, largest need first."""
    ordered = {need: sorted(candidates, key=_key(prefer, need)) for need in set(needs)}
    if sum(needs) * count > sum(state.free_bytes for state in candidates):
        return None
    search = _Search(needs, clients, ordered, _Room(candidates), count)
    return tuple(search.chosen[n] for n in range(len(needs))) if search.settle(0) else None


class _Search:
    """Try the GPUs in the order of favour, and go back where what is left holds no more.

    Not a function in a function: one that calls itself is garbage that only the collector finds, for every pod.
    """

    def __init__(
        self,
        needs: Sequence[int],
        clients: Sequence[Clients],
        ordered: Mapping[int, Sequence[GPUState]],
        room: "_Room",
        count: int,
    ) -> None:
        self._needs = needs
        self._clients = clients
        self._ordered = ordered
        self._room = room
        self._count = count
        self._largest_first = sorted(range(len(needs)), key=lambda n: -needs[n])
        self._steps = 0
        self.chosen: dict[int, tuple[GPUState, ...]] = {}

    def settle(self, depth: int) -> bool:
        """Choose for the need at *depth*, the largest first, and for those after it; tell whether that could be."""
        if depth == len(self._largest_first):
            return True
        n = self._largest_first[depth]
        need, clients, room = self._needs[n], self._clients[n], self._room
        tried: set[tuple[int, ...]] = set()
        open_to = [state for state in self._ordered[need] if room.has(state, need, clients)]
        for states in _combinations(open_to, self._count):
            self._steps += 1
            if self._steps > MAX_STEPS:
                return False
            likeness = room.likeness(states)
            if likeness in tried:
                continue
            tried.add(likeness)
            before = room.take(states, need, clients)
            self.chosen[n] = states
            if self.settle(depth + 1):
                return True
            room.give_back(states, need, clients, before)
        return False


class _Room:
    """Keep what a search has left of each GPU: free bytes, the clients that MPS serves, and as whom they run."""

    def __init__(self, candidates: Sequence[GPUState]) -> None:
        self._free = {state.gpu.uuid: state.free_bytes for state in candidates}
        self._served = {state.gpu.uuid: state.clients for state in candidates}
        self._users = {daemon(state): state.users for state in candidates}
        self._daemons = {one: n for n, one in enumerate(self._users)}

    def has(self, state: GPUState, need: int, clients: Clients) -> bool:
        """Tell whether the GPU could take a piece that needs so much."""
        if self._free[state.gpu.uuid] < need or state.gpu.mode is not Mode.MPS:
            return self._free[state.gpu.uuid] >= need
        served, users = self._served[state.gpu.uuid], self._users[daemon(state)]
        return conflict(msgspec.structs.replace(state, clients=served, users=users), clients) is None

    def likeness(self, states: tuple[GPUState, ...]) -> tuple[int, ...]:
        """Give what makes GPUs of one daemon alike: what failed on one fails on the other."""
        uuids = [state.gpu.uuid for state in states]
        one = self._daemons[daemon(states[0])]
        return (one, *(self._free[uuid] for uuid in uuids), *(self._served[uuid] for uuid in uuids))

    def take(self, states: tuple[GPUState, ...], need: int, clients: Clients) -> frozenset[int]:
        """Take a piece of each of *states*, and give what give_back wants to know."""
        for state in states:
            self._free[state.gpu.uuid] -= need
            self._served[state.gpu.uuid] += clients.count
        before = self._users[daemon(states[0])]
        self._users[daemon(states[0])] = before | clients.users
        return before

    def give_back(self, states: tuple[GPUState, ...], need: int, clients: Clients, before: frozenset[int]) -> None:
        """Undo take()."""
        self._users[daemon(states[0])] = before
        for state in states:
            self._free[state.gpu.uuid] += need
            self._served[state.gpu.uuid] -= clients.count


def daemon(state: GPUState) -> tuple[Mode, str]:
    """Tell which GPUs one process can use together: it has one MPS pipe, or none."""
    return state.gpu.mode, state.gpu.mps_pipe if state.gpu.mode is Mode.MPS else ""


def _combinations(ordered: list[GPUState], count: int) -> Iterator[tuple[GPUState, ...]]:
    """List the choices of *count* GPUs that one process can use, those of the favourite's daemon first."""
    if count == 1:
        return iter([(state,) for state in ordered])
    together: dict[tuple[Mode, str], list[GPUState]] = {}
    for state in ordered:
        together.setdefault(daemon(state), []).append(state)
    return chain.from_iterable(combinations(states, count) for states in together.values())


def _why_not(usable: Sequence[GPUState], candidates: Sequence[GPUState], request: PodRequest) -> Reason:
    """Tell what can never fit from what does not fit now."""
    wishes, need = request.wishes, max(pieces(request))
    large_enough = [state for state in usable if state.gpu.usable_bytes >= need]
    if len(large_enough) < wishes.gpu_count:
        return Reason.TOO_LARGE
    if max(Counter(map(daemon, large_enough)).values()) < wishes.gpu_count:
        return Reason.MODE_CONFLICT
    if any(state.gpu.mode is Mode.MPS for state in candidates):
        # would there be room if MPS served any number of clients, and if it served whoever comes?
        anyhow = [msgspec.structs.replace(s, gpu=msgspec.structs.replace(s.gpu, max_clients=0)) for s in candidates]
        if _choose(anyhow, request, parts(request), tightest) is not None:
            return Reason.TOO_MANY_CLIENTS
        if _choose(anyhow, request, [NONE] * len(pieces(request)), tightest) is not None:
            return Reason.MODE_CONFLICT
    return Reason.NO_EMPTY_GPU if wishes.isolation.whole_gpu else Reason.NO_GPU_FITS
