"""The least that would make a pod fit: a smaller request, pods that end, something mended, fewer wishes. Pure."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from heapq import nsmallest
from itertools import chain, islice
from operator import attrgetter
from typing import Literal

import msgspec

from cotenant.contract.grant import Isolation
from cotenant.contract.inventory import GPU, Health, Mode
from cotenant.contract.mps import NONE
from cotenant.contract.reasons import Reason
from cotenant.contract.request import PodRequest
from cotenant.contract.units import format_bytes
from extender.ledger import GPUState, Hold, MIGState, NodeView, Stage, all_closed_by
from extender.placement.fit import Placement, conflict, daemon, largest, objection, parts, pieces, place

# So many changes of a kind are offered: the first is the least, the others let people choose.
CHANGES = 3
# A pod of several containers or GPUs is tried out on the nodes that lack the least; each try is a search.
_NODES_TRIED = 10
# A sentence names so many pods; Change.pods has all of them.
_PODS_NAMED = 3
# Reasons that end when a pod does, when the node or a GPU is mended, and when the pod wishes for less.
UNTIL_A_POD_ENDS = frozenset(
    {Reason.NO_GPU_FITS, Reason.NO_EMPTY_GPU, Reason.NO_MIG_ROOM, Reason.TOO_MANY_CLIENTS, Reason.MODE_CONFLICT}
)
# Those of them that are not for want of memory: MPS serves other clients.
_UNTIL_CLIENTS_END = frozenset({Reason.TOO_MANY_CLIENTS, Reason.MODE_CONFLICT})
_UNTIL_MENDED = frozenset({Reason.PLUGIN_GONE, Reason.NOT_ADVERTISED})
_WISHED_AWAY = frozenset({Reason.NO_SUCH_GPU, Reason.ISOLATION_UNAVAILABLE})

_size = attrgetter("bytes")


class Change(msgspec.Struct, frozen=True, rename="camel"):
    """Name one change after which the pod would fit; *pods* are those that would have to end, namespace/name."""

    kind: Literal["smaller", "split", "instance", "ended", "mended", "wished"]
    sentence: str
    node: str
    gpus: tuple[int, ...]
    pods: tuple[str, ...] = ()


class Search:
    """Look for the least changes that make a request fit, each found by making it fit.

    Of *holds* those that are promised are kept: their pods have nothing yet that could end.
    """

    def __init__(
        self,
        request: PodRequest,
        order: Sequence[NodeView],
        refused: Mapping[str, Reason],
        holds: Iterable[Hold],
    ) -> None:
        self._request = request
        self._order = order
        self._refused = refused
        self._one_piece = len(pieces(request)) == request.wishes.gpu_count == 1 and not request.profiles
        self._holds: defaultdict[str, list[Hold]] = defaultdict(list)
        self._promised: defaultdict[str, list[Hold]] = defaultdict(list)
        for hold in holds:
            (self._promised if hold.stage is Stage.PROMISED else self._holds)[hold.node].append(hold)

    def smaller(self) -> Iterator[Change]:
        """Find the most that one container could ask for now, in whole units."""
        if len(self._request.containers) > 1:
            return  # of which container would it be taken?
        if self._request.profiles:
            yield from islice(self._smaller_instance(), 1)
            return
        (container,) = self._request.containers
        count = self._request.wishes.gpu_count
        unit = container.share_bytes * count // container.units
        most, where = 0, None
        for view in self._order:
            free = together(free_of_daemons(view, self._request), count) // unit * unit
            if free > most:
                most, where = free, view
        if where is None or most >= container.share_bytes:
            return
        less = msgspec.structs.replace(container, share_bytes=most, units=most * count // unit)
        smaller = msgspec.structs.replace(self._request, containers=(less,))
        fit = first_fit(smaller, [where])
        if fit is not None:
            yield Change("smaller", f"{smaller.describe()} fit now on {place_name(*fit)}", *fit)

    def _smaller_instance(self) -> Iterator[Change]:
        """Find the largest of the smaller MIG profiles that fits somewhere now."""
        (container,) = self._request.containers
        known = {state.suffix(p.name): p for view in self._order for state in view.mig for p in state.geometry.profiles}
        if container.profile not in known:
            return
        asked = known[container.profile]
        smaller = [
            (name, p) for name, p in known.items() if (p.size, p.compute_slices) < (asked.size, asked.compute_slices)
        ]
        for name, _ in sorted(smaller, key=lambda one: (-one[1].size, -one[1].compute_slices, one[0])):
            less = msgspec.structs.replace(container, profile=name)
            request = msgspec.structs.replace(self._request, containers=(less,))
            fit = first_fit(request, self._order)
            if fit is not None:
                yield Change("smaller", f"{request.describe()} fits now on {place_name(*fit)}", *fit)

    def ended(self) -> Iterator[Change]:
        """Find the fewest and smallest pods whose end makes room."""
        by_clients = {view.name for view in self._order if self._is_up_to_clients(view)}
        found: Iterator[tuple[tuple[Hold, ...], int, Change]]
        if self._one_piece:
            found = chain(self._ended_simply(by_clients), self._ended_by_trying(by_clients))
        else:
            found = self._ended_by_trying({view.name for view in self._order})
        least = nsmallest(CHANGES, found, key=lambda one: (len(one[0]), one[1], one[2].node, one[2].gpus))
        yield from (change for _, _, change in least)

    def _is_up_to_clients(self, view: NodeView) -> bool:
        """Tell whether it takes more than arithmetic to say who has to end there: those whom a daemon of MPS serves.

        A GPU that is to be the pod's alone may be of a daemon that serves others on another GPU.
        """
        whole = self._request.wishes.isolation.whole_gpu
        under_mps = whole and any(state.gpu.mode is Mode.MPS for state in view.gpus)
        return under_mps or self._refused[view.name] in _UNTIL_CLIENTS_END

    def mended(self) -> Iterator[Change]:
        """Find nodes and GPUs that would take the pod if nothing was wrong with them."""

        def fitting() -> Iterator[Change]:
            for view in self._order:
                reason = self._refused[view.name]
                if reason in _UNTIL_MENDED:
                    mended = _unproblematic(view, self._request)
                elif _some_unhealthy(view, self._request):
                    mended = _all_healthy(view)
                    reason = all_closed_by([state for state in _states(view, self._request) if not state.healthy])
                else:
                    continue
                fit = first_fit(self._request, [mended])
                if fit is not None:
                    what = f"it fits on {place_name(*fit)} once this is mended: {reason.sentence}"
                    yield Change("mended", what, *fit)

        yield from islice(fitting(), CHANGES)

    def wished(self) -> Iterator[Change]:
        """Find where the pod would fit if it wished for no particular GPU, or for no isolation."""
        wishes = self._request.wishes
        anything = msgspec.structs.replace(wishes, models=(), uuids=(), isolation=Isolation.NONE)
        if anything == wishes:
            return
        named = ("gpu-model", wishes.models), ("gpu-uuid", wishes.uuids), ("isolation", wishes.isolation)
        said = " and ".join(name for name, value in named if value and value is not Isolation.NONE)
        relaxed = msgspec.structs.replace(self._request, wishes=anything)
        views = (view for view in self._order if self._refused[view.name] in _WISHED_AWAY | UNTIL_A_POD_ENDS)
        fit = first_fit(relaxed, views)
        if fit is not None:
            yield Change("wished", f"it fits on {place_name(*fit)} without its {said}", *fit)

    def _ended_simply(self, but: Collection[str]) -> Iterator[tuple[tuple[Hold, ...], int, Change]]:
        """One piece on one GPU, as nearly every pod is: arithmetic tells, without a search."""
        (need,), (clients,) = pieces(self._request), parts(self._request)
        for view in self._order:
            if view.name in but or self._refused[view.name] not in UNTIL_A_POD_ENDS:
                continue
            holders: defaultdict[str, list[tuple[int, Hold]]] = defaultdict(list)
            for hold in self._holds[view.name]:
                for uuid in hold.charges if not hold.everywhere_bytes else [state.gpu.uuid for state in view.gpus]:
                    holders[uuid].append((hold.charges.get(uuid, hold.everywhere_bytes), hold))
            for state in view.gpus:
                reason, lacking = objection(state, self._request.wishes, need, clients)
                # what would be free must also be served
                if reason in UNTIL_A_POD_ENDS - _UNTIL_CLIENTS_END and conflict(state, clients) is None:
                    there = holders[state.gpu.uuid]
                    if reason is not Reason.NO_EMPTY_GPU:
                        ending = _fewest(there, lacking + _owed(state))
                    else:
                        # one that others use, or that is kept for a pod to come, is not empty then
                        ending = [] if state.gpu.foreign_bytes or state.promised_bytes else there
                    if ending:
                        pods = tuple(hold for _, hold in ending)
                        yield pods, sum(freed for freed, _ in ending), _ending(view.name, (state.gpu.index,), pods)

    def _ended_by_trying(self, names: Collection[str]) -> Iterator[tuple[tuple[Hold, ...], int, Change]]:
        near = (v for v in self._order if v.name in names and self._refused[v.name] in UNTIL_A_POD_ENDS)
        for view in islice(near, _NODES_TRIED):
            alone = self._ended_alone(view) if self._request.profiles else None
            if alone is not None:
                hold, after = alone
                yield (hold,), hold.bytes, _ending(view.name, indices(after), (hold,))
                continue
            ending: list[Hold] = []
            # where memory is not what lacks, the smallest will do
            for_memory = self._refused[view.name] not in _UNTIL_CLIENTS_END
            for hold in sorted(self._holds[view.name], key=_size, reverse=for_memory):
                ending.append(hold)
                if self._after(view, ending) is not None:
                    break
            # what turns out not to be needed, largest first, stays
            for hold in tuple(ending):
                rest = [other for other in ending if other is not hold]
                if self._after(view, rest) is not None:
                    ending = rest
            placed = self._after(view, ending)
            if placed is not None:
                yield tuple(ending), sum(map(_size, ending)), _ending(view.name, indices(placed), tuple(ending))

    def _ended_alone(self, view: NodeView) -> tuple[Hold, Placement] | None:
        """Find the smallest pod whose end alone makes room: of instances it matters where they lie, not how large."""
        for hold in sorted(self._holds[view.name], key=_size):
            placed = self._after(view, [hold])
            if placed is not None:
                return hold, placed
        return None

    def _after(self, view: NodeView, ended: Sequence[Hold]) -> Placement | None:
        there = [*self._holds[view.name], *self._promised[view.name]]
        placed = place(_without(view, ended, there), self._request)
        return placed if isinstance(placed, Placement) else None


def free_of_daemons(view: NodeView, request: PodRequest) -> list[list[int]]:
    """List what the GPUs that the pod may have are free of, the most first, apart by what one process can use."""
    if view.problem is not None:
        return []
    free: defaultdict[tuple[Mode, str], list[int]] = defaultdict(list)
    for state in view.healthy:
        reason, _ = objection(state, request.wishes, 0, largest(request)[1])
        if reason is None:
            free[daemon(state)].append(state.free_bytes)
    return [sorted(amounts, reverse=True) for amounts in free.values()]


def together(free: Iterable[Sequence[int]], count: int) -> int:
    """Count the bytes that each of *count* GPUs has free, of those that one process can use."""
    return max((amounts[count - 1] for amounts in free if len(amounts) >= count), default=0)


def _owed(state: GPUState) -> int:
    """Count what is held, kept and used by others of a GPU beyond what there is: before that is free, nothing is."""
    taken = state.held_bytes + state.promised_bytes + state.gpu.foreign_bytes
    return max(0, taken - state.gpu.usable_bytes)


def _fewest(holders: Sequence[tuple[int, Hold]], lacking: int) -> list[tuple[int, Hold]]:
    """Choose the fewest holds that free *lacking* bytes, the last of them as small as will do; none if all do not."""
    ordered = sorted(holders, key=lambda one: (one[0], one[1].key))
    chosen: list[tuple[int, Hold]] = []
    while ordered:
        enough = next((one for one in ordered if one[0] >= lacking), None)
        if enough is not None:
            return [*chosen, enough]
        chosen.append(ordered.pop())
        lacking -= chosen[-1][0]
    return []


def _unproblematic(view: NodeView, request: PodRequest) -> NodeView:
    advertised = view.advertised | {*request.profiles}
    return msgspec.structs.replace(view, problem=None, mig_problem=None, advertised=advertised)


def _states(view: NodeView, request: PodRequest) -> Sequence[GPUState | MIGState]:
    return view.mig if request.profiles else view.gpus


def _some_unhealthy(view: NodeView, request: PodRequest) -> bool:
    problem = view.mig_problem if request.profiles else view.problem
    return problem is None and not all(state.healthy for state in _states(view, request))


def _without(view: NodeView, ended: Sequence[Hold], holds: Sequence[Hold]) -> NodeView:
    """Show the node as it would be without some of its *holds*."""
    gone, uuids = {hold.uid for hold in ended}, [state.gpu.uuid for state in view.gpus]
    clients, users = _clients(view, (hold for hold in holds if hold.uid not in gone))
    freed: Counter[str] = Counter()
    fewer: Counter[str] = Counter()
    for hold in ended:
        for uuid in uuids if hold.everywhere_bytes else hold.charges:
            amount = hold.charges.get(uuid, hold.everywhere_bytes)
            freed[uuid] += amount
            fewer[uuid] += bool(amount)
    gpus = []
    for state in view.gpus:
        held = max(0, state.held_bytes - freed[state.gpu.uuid])
        pods = state.pods - fewer[state.gpu.uuid]
        free = max(0, state.gpu.usable_bytes - held - state.promised_bytes - state.gpu.foreign_bytes)
        served = clients[state.gpu.uuid]
        as_whom = frozenset(users.get(state.gpu.mps_pipe, ()))
        gpus.append(
            msgspec.structs.replace(state, held_bytes=held, pods=pods, free_bytes=free, clients=served, users=as_whom)
        )
    if any(hold.slots or hold.closes_mig for hold in ended):
        view = msgspec.structs.replace(view, mig=tuple(_without_slots(state, ended) for state in view.mig))
    return _viewed(view, gpus)


def _clients(view: NodeView, holds: Iterable[Hold]) -> tuple[Counter[str], dict[str, set[int]]]:
    """Count the clients of *holds* by GPU, and name their users by the pipe of their daemon."""
    pipes = {state.gpu.uuid: state.gpu.mps_pipe for state in view.gpus if state.gpu.mode is Mode.MPS}
    counts: Counter[str] = Counter()
    users: dict[str, set[int]] = {pipe: set() for pipe in pipes.values()}
    for hold in holds if pipes else ():
        for uuid, pipe in pipes.items():
            for clients in (hold.clients.get(uuid, NONE), hold.everywhere_clients):
                counts[uuid] += clients.count
                users[pipe] |= clients.users
    return counts, users


def _without_slots(state: MIGState, ended: Sequence[Hold]) -> MIGState:
    left = Counter(state.taken)
    left.subtract(slot.instance for hold in ended for slot in hold.slots if slot.uuid == state.gpu.uuid)
    pods = state.pods - sum(
        hold.closes_mig or any(slot.uuid == state.gpu.uuid for slot in hold.slots) for hold in ended
    )
    # what closes the GPU besides pods that end is not known here
    closed = state.closed and pods > 0
    return msgspec.structs.replace(state, taken=tuple(left.elements()), pods=pods, closed=closed)


def _all_healthy(view: NodeView) -> NodeView:
    mig = tuple(msgspec.structs.replace(state, gpu=_mended(state.gpu)) for state in view.mig)
    gpus = [msgspec.structs.replace(state, gpu=_mended(state.gpu)) for state in view.gpus]
    return _viewed(msgspec.structs.replace(view, mig=mig), gpus)


def _mended(gpu: GPU) -> GPU:
    """Show a GPU that is well, and that nobody else has; what others use of it stays used."""
    foreign = msgspec.structs.replace(gpu.foreign, fenced=False) if gpu.foreign is not None else None
    return msgspec.structs.replace(gpu, health=Health.HEALTHY, foreign=foreign)


def _viewed(view: NodeView, gpus: Sequence[GPUState]) -> NodeView:
    return msgspec.structs.replace(view, gpus=tuple(gpus), healthy=tuple(state for state in gpus if state.healthy))


def _ending(node: str, gpus: tuple[int, ...], ended: tuple[Hold, ...]) -> Change:
    keys = tuple(hold.key for hold in ended)
    named = [f"{hold.key} ({format_bytes(hold.bytes)})" for hold in ended]
    if len(named) > _PODS_NAMED:
        rest = sum(map(_size, ended[_PODS_NAMED:]))
        named[_PODS_NAMED:] = [f"{len(named) - _PODS_NAMED} more pods ({format_bytes(rest)})"]
    names = ", ".join(named[:-1]) + f" and {named[-1]}" if len(named) > 1 else named[0]
    return Change("ended", f"it fits on {place_name(node, gpus)} if {names} ended", node, gpus, keys)


def first_fit(request: PodRequest, views: Iterable[NodeView]) -> tuple[str, tuple[int, ...]] | None:
    """Find the first node that takes the pod now, and the indices of the GPUs that it would get there."""
    for view in views:
        placed = place(view, request)
        if isinstance(placed, Placement):
            return view.name, indices(placed)
    return None


def indices(placed: Placement) -> tuple[int, ...]:
    """List the indices of the GPUs that a pod would get."""
    on_gpus = {state.gpu.index for states in placed.gpus for state in states}
    return tuple(sorted(on_gpus | {slot.state.gpu.index for slot in placed.slots}))


def place_name(node: str, gpus: tuple[int, ...]) -> str:
    """Name a node and GPUs of it for people."""
    return f"{node} GPU{'s' if len(gpus) > 1 else ''} {', '.join(map(str, gpus))}"
