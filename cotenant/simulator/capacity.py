"""What a cluster could take: whether a deployment fits, the largest request that does, how many nodes a trace needs."""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence

import msgspec

from cotenant.contract.reasons import Reason
from cotenant.contract.request import PodRequest
from cotenant.simulator.scheduler import Scheduler
from cotenant.simulator.timeline import Job, Timeline
from extender.ledger import GPUState, Ledger
from extender.placement.fit import daemon, pieces, place
from extender.policies.mix import Mix

_NOT_COMPUTE = "the node has not enough CPU or memory left"
_CLOSED = "the node is closed to the pod: cordon, taint or node selector"


class Spot(msgspec.Struct, frozen=True):
    """Name the node and the GPUs, by index, that a pod would get."""

    pod: str
    node: str
    gpus: tuple[int, ...]


class Fit(msgspec.Struct, frozen=True):
    """Hold where the replicas of a deployment would lie, and for the first that fits nowhere why not, by node."""

    wanted: int
    spots: tuple[Spot, ...]
    reasons: dict[str, int]


def fit(scheduler: Scheduler, asked: PodRequest, *, name: str, replicas: int, among: frozenset[str] | None) -> Fit:
    """Place *replicas* of one request one after the other, as the policy would, until one fits nowhere."""
    spots: list[Spot] = []
    for n in range(replicas):
        uid = f"{name}-{n}"
        row = scheduler.place(uid, asked, among)
        if row < 0:
            return Fit(replicas, tuple(spots), why_not(scheduler, asked, among))
        node = scheduler.table.names[row]
        spots.append(Spot(uid, node, gpus_of(scheduler.ledger, uid)))
    return Fit(replicas, tuple(spots), {})


def gpus_of(ledger: Ledger, uid: str) -> tuple[int, ...]:
    """List the indices of the GPUs that a pod holds."""
    hold = ledger.hold(uid)
    view = ledger.view(hold.node) if hold is not None else None
    if hold is None or view is None:
        return ()
    return tuple(state.gpu.index for state in view.gpus if state.gpu.uuid in hold.charges)


def why_not(scheduler: Scheduler, asked: PodRequest, among: frozenset[str] | None) -> dict[str, int]:
    """Count the nodes by why they cannot take a request, the most frequent first."""
    counted: Counter[str] = Counter()
    for view in scheduler.ledger.views():
        if among is not None and view.name not in among:
            counted[_CLOSED] += 1
            continue
        placed = place(view, asked) if asked.containers else None
        if isinstance(placed, Reason):
            counted[placed.sentence] += 1
        else:
            counted[_NOT_COMPUTE] += 1
    return dict(counted.most_common())


class Largest(msgspec.Struct, frozen=True):
    """Hold the largest request that fits: so many bytes of each of *gpus* GPUs of a model, on *node*; 0 for none."""

    model: str
    gpus: int
    each_bytes: int
    node: str


def largest(ledger: Ledger, *, unit_bytes: int, closed: Collection[str] = ()) -> list[Largest]:
    """Find for each model, and for 1, 2, 4, ... GPUs of one node, the largest request that fits now.

    CPU and memory are not looked at. *closed* names nodes that take nothing new.
    """
    found: defaultdict[str, dict[int, Largest]] = defaultdict(dict)
    for view in sorted(ledger.views(), key=lambda view: view.name):
        if view.problem is not None or view.name in closed:
            continue
        # one process can use the GPUs of one MPS daemon together, or those without
        together: defaultdict[tuple[str, object], list[GPUState]] = defaultdict(list)
        for state in view.healthy:
            together[state.gpu.model, daemon(state)].append(state)
        for (model, _), states in together.items():
            free = sorted((state.free_bytes // unit_bytes * unit_bytes for state in states), reverse=True)
            count = 1
            while count <= len(free):
                best = found[model].get(count)
                if best is None or free[count - 1] > best.each_bytes:
                    found[model][count] = Largest(model, count, free[count - 1], view.name if free[count - 1] else "")
                count *= 2
    return [found[model][count] for model in sorted(found) for count in sorted(found[model])]


class Needed(msgspec.Struct, frozen=True):
    """Hold how many nodes of a kind a trace needs, and how many it needed at least by sums alone; -1: no number does.

    *impossible* names pods that fit no such node, empty as it may be. *allocation* is what the fullest moment allocates
    of them, in percent of their GPU memory.
    """

    nodes: int
    by_sums: int
    by_what: str
    allocation: float
    tried: dict[int, bool]
    impossible: tuple[str, ...] = ()


def needed(
    jobs: Sequence[Job],
    make: Callable[[int], Scheduler],
    mix: Mix,
    *,
    patience: float,
    most: int,
    progress: Callable[[str], None],
) -> Needed:
    """Find by halving the fewest nodes on which no job waits longer than *patience* seconds, nor in vain.

    *make* makes a scheduler on so many empty nodes. More nodes are not always better to a policy, so the answer is a
    number that does, beside one that does not, and not the proof that no smaller one does.
    """
    until = max((job.arrival for job in jobs), default=0.0) + patience + 1
    one = make(1)
    peak, what = _by_sums(jobs, one)
    fits = {asked: bool(one.fitting(asked).any()) for asked in {job.request for job in jobs}}
    impossible = tuple(job.uid for job in jobs if not fits[job.request])
    if impossible:
        return Needed(-1, peak, what, 0.0, {}, impossible)
    tried: dict[int, bool] = {}
    held: dict[int, float] = {}

    def does(count: int) -> bool:
        if count not in tried:
            progress(f"{count} nodes")
            played = Timeline(make(count), mix).play(jobs, until=until, patience=patience)
            tried[count] = bool((played.waited <= patience).all())
            held[count] = played.most_allocated
        return tried[count]

    enough = min(most, max(1, peak))
    while not does(enough):
        if enough >= most:
            return Needed(-1, peak, what, 0.0, tried)
        enough = min(most, enough + max(1, enough // 4))
    short = max((count for count, done in tried.items() if not done), default=0)
    while enough - short > 1:
        middle = (enough + short) // 2
        if does(middle):
            enough = middle
        else:
            short = middle
    return Needed(enough, peak, what, round(held[enough], 2), dict(sorted(tried.items())))


def _by_sums(jobs: Iterable[Job], one: Scheduler) -> tuple[int, str]:
    """Count the nodes that the fullest moment needs by sums alone, and say of what."""
    table = one.table
    offered = {
        "GPU memory": int(table.usable_bytes.sum()),
        "CPU": int(table.cpu_total.sum()),
        "memory": int(table.memory_total.sum()),
    }
    changes = []
    for job in jobs:
        request = job.request
        asked = (
            sum(pieces(request)) * request.wishes.gpu_count if request.containers else 0,
            request.compute.cpu_milli,
            request.compute.memory_bytes,
        )
        changes.append((job.arrival, 1, asked))
        if job.life < float("inf"):
            changes.append((job.arrival + job.life, 0, asked))
    now = dict.fromkeys(offered, 0)
    most: dict[str, int] = dict(now)
    for _, comes, asked in sorted(changes, key=lambda change: change[:2]):
        for name, amount in zip(now, asked, strict=True):
            now[name] += amount if comes else -amount
            most[name] = max(most[name], now[name])
    counts = {name: -(-most[name] // max(1, offered[name])) for name in offered}
    what = max(counts, key=lambda name: counts[name])
    return counts[what], what
