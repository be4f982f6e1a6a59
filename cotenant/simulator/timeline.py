"""Play a trace with times: pods come and go, wait while they fit nowhere, and nodes and GPUs are lost and come back.

A pod that fits nowhere waits. Whenever something frees room, those that wait are tried again in the order they came,
as kube-scheduler does: a large one does not hold up smaller ones behind it. Pods on what is lost come again at once, to
run for all of their time anew, as their controllers would have it.
"""

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from enum import IntEnum
from heapq import heappop, heappush
from itertools import count
from math import inf

import msgspec
import numpy as np

from cotenant.contract.request import PodRequest
from cotenant.simulator.relocation import Mover, Running
from cotenant.simulator.scheduler import Scheduler
from extender.ledger import Node
from extender.policies.fragmentation import Fragmentation
from extender.policies.mix import Mix
from extender.policies.table import MILLI, Floats

# At how many moments the whole cluster is looked at.
MOMENTS = 400


class Job(msgspec.Struct, frozen=True):
    """Hold a pod that comes *arrival* seconds after the beginning and runs for *life* seconds, infinite for ever.

    *nodes* are those that are open to it, None for all.
    """

    uid: str
    kind: str
    request: PodRequest
    arrival: float
    life: float = inf
    nodes: frozenset[str] | None = None

    @property
    def wants(self) -> "_Wants":
        """Give what decides where it fits."""
        return self.request, self.nodes


_Wants = tuple[PodRequest, frozenset[str] | None]


class Loss(msgspec.Struct, frozen=True):
    """Say that a node, or its GPU of this index, is lost or back."""

    at: float
    node: str
    gpu: int | None
    back: bool


class Played(msgspec.Struct, frozen=True):
    """Hold what happened.

    jobs (J): in the order they came. started (J,): when each got its place at last, infinite for those that still wait.
    waited (J,): seconds spent waiting, all times together, until the end for those that still wait. restarts: how often
    a pod had to come again because what it ran on was lost. decisions: seconds of each ranking, those that found no
    place too. at (M,), allocated, fragmented, waiting (M,): moments, and percent of all GPU memory held then, percent
    fragmented (FGD's definition), and how many pods waited. allocated_seconds (M,): percent held times the seconds that
    it was, up to each moment; what comes and goes between two of them counts. most_allocated: the most percent that was
    ever held. moves: how many pods were moved for others.
    """

    jobs: tuple[Job, ...]
    started: Floats
    waited: Floats
    restarts: int
    decisions: Floats
    at: Floats
    allocated: Floats
    fragmented: Floats
    waiting: Floats
    allocated_seconds: Floats
    most_allocated: float
    seconds: float
    moves: int


class _What(IntEnum):
    """Order what happens at one moment: room is made before it is asked for."""

    END = 0
    LOSS = 1
    ARRIVAL = 2
    LOOK = 3
    GIVE_UP = 4


class Timeline:
    """Play jobs and losses on a scheduler.

    *node* makes the Node of that name with the GPUs of these indices lost; *mix* is whose fragmentation is measured.
    With a *mover*, a pod that fits nowhere when it comes may have one moved for it.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        mix: Mix,
        node: Callable[[str, Collection[int]], Node] | None = None,
        mover: Mover | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._mix = mix
        self._node = node
        self._mover = mover
        self._moves = 0
        self._order = count()
        self._happenings: list[tuple[float, _What, int, int]] = []
        self._losses: list[Loss] = []
        self._lost: dict[str, set[int]] = {}
        self._running: dict[str, tuple[int, str]] = {}
        # what waits, by what it wants: what is true of the first is true of those behind it
        self._queues: dict[_Wants, deque[tuple[int, int]]] = {}
        self._decisions: list[float] = []
        self._restarts = 0

    def play(
        self,
        jobs: Sequence[Job],
        losses: Iterable[Loss] = (),
        *,
        residents: Iterable[tuple[Job, str]] = (),
        until: float,
        patience: float = inf,
        progress: Callable[[int], None] = lambda _count: None,
    ) -> Played:
        """Play everything up to *until* seconds, or until a pod has waited for longer than *patience* seconds.

        *residents* are on the ledger already, each on the node named. What is told of pods is told of those of them
        that are lost, which then come like any other.
        *progress* is told how many jobs came since it was last told.
        """
        began = time.perf_counter()
        self._patience = patience
        self._capacity = int(self._scheduler.table.usable_bytes.sum())
        self._begin(jobs, tuple(residents))
        self._losses = list(losses)
        for n, loss in enumerate(self._losses):
            self._plan(loss.at, _What.LOSS, n)
        moments = np.linspace(0, until, MOMENTS)
        for n, moment in enumerate(moments):
            self._plan(float(moment), _What.LOOK, n)
        seen, before = np.zeros((4, MOMENTS)), 0.0
        held = most = self._allocated()
        held_seconds = 0.0
        while self._happenings and self._happenings[0][0] <= until:
            now, what, _, n = heappop(self._happenings)
            held_seconds, before = held_seconds + held * (now - before), now
            if what is _What.LOOK:
                seen[:, n] = *self._look(), held_seconds
            elif what is _What.GIVE_UP:
                if self._started[n] == inf and now - self._since[n] >= patience:
                    break
            else:
                self._act(what, n, now, progress)
                held = self._allocated()
                most = max(most, held)
        for queue in self._queues.values():
            for _, n in queue:
                self._waited[n] += until - self._since[n]
        return Played(
            jobs=tuple(job for job, came in zip(self._jobs, self._came, strict=True) if came),
            started=self._started[self._came],
            waited=self._waited[self._came],
            restarts=self._restarts,
            decisions=np.array(self._decisions),
            at=moments,
            allocated=seen[0],
            fragmented=seen[1],
            waiting=seen[2],
            allocated_seconds=seen[3],
            most_allocated=most,
            seconds=time.perf_counter() - began,
            moves=self._moves,
        )

    def _begin(self, jobs: Sequence[Job], residents: Sequence[tuple[Job, str]]) -> None:
        """Plan when jobs come, and when those that are there end."""
        self._jobs = [*sorted(jobs, key=lambda job: job.arrival), *(job for job, _ in residents)]
        self._came = np.arange(len(self._jobs)) < len(jobs)
        self._since = np.zeros(len(self._jobs))
        self._started = np.full(len(self._jobs), inf)
        self._waited = np.zeros(len(self._jobs))
        for n, job in enumerate(self._jobs[: len(jobs)]):
            self._plan(job.arrival, _What.ARRIVAL, n)
        for n, (job, node) in enumerate(residents, start=len(jobs)):
            self._running[job.uid] = n, node
            self._started[n] = job.arrival
            if job.life < inf:
                self._plan(job.arrival + job.life, _What.END, n)

    def _act(self, what: _What, n: int, now: float, progress: Callable[[int], None]) -> None:
        if what is _What.ARRIVAL:
            self._arrive(n, now)
            progress(1)
        elif what is _What.END:
            self._end(n, now)
        else:
            self._lose(self._losses[n], now)

    def _plan(self, at: float, what: _What, n: int) -> None:
        heappush(self._happenings, (at, what, next(self._order), n))

    def _arrive(self, n: int, now: float) -> None:
        self._since[n] = now
        self._scheduler.came(self._jobs[n].uid, self._jobs[n].request)
        wants = self._jobs[n].wants
        # what its equals could not have, it cannot have either
        if wants in self._queues or not self._try(n, now):
            self._queues.setdefault(wants, deque()).append((next(self._order), n))
            if self._patience < inf:
                self._plan(now + self._patience, _What.GIVE_UP, n)

    def _try(self, n: int, now: float) -> bool:
        job, scheduler = self._jobs[n], self._scheduler
        row = scheduler.place(job.uid, job.request, job.nodes)
        self._decisions.append(scheduler.last_decision)
        if row < 0 and self._since[n] == now and self._moved_for(job):
            row = scheduler.place(job.uid, job.request, job.nodes)
        if row < 0:
            return False
        self._running[job.uid] = n, scheduler.table.names[row]
        self._started[n] = now
        self._waited[n] += now - self._since[n]
        if job.life < inf:
            self._plan(now + job.life, _What.END, n)
        return True

    def _moved_for(self, job: Job) -> bool:
        """Move one pod so that *job* fits, and tell whether that was done."""
        if self._mover is None:
            return False
        jobs = ((uid, self._jobs[n]) for uid, (n, _) in self._running.items())
        running = (Running(uid, one.request, one.nodes) for uid, one in jobs)
        moved = self._mover.make_room(job.request, running, job.nodes)
        if moved is None:
            return False
        uid, node = moved
        self._running[uid] = self._running[uid][0], node
        self._moves += 1
        return True

    def _end(self, n: int, now: float) -> None:
        job = self._jobs[n]
        running = self._running.get(job.uid)
        # one that was lost meanwhile runs again since later, and its end is yet to come
        if running is None or self._started[n] + job.life > now:
            return
        del self._running[job.uid]
        self._scheduler.remove(job.uid)
        self._retry(running[1], now)

    def _retry(self, node: str, now: float) -> None:
        """Try what waits, the first to come first, where the node that has room now could hold it."""
        table = self._scheduler.table
        row = table.rows.get(node)
        if row is None:
            return
        could = {wants: queue for wants, queue in self._queues.items() if self._could(wants[0], row)}
        while could:
            wants = min(could, key=lambda one: could[one][0][0])
            queue = could[wants]
            if not self._try(queue[0][1], now):
                del could[wants]
                continue
            queue.popleft()
            if not queue:
                del could[wants], self._queues[wants]

    def _could(self, request: PodRequest, row: int) -> bool:
        """Tell quickly, and generously, whether a node has room for a request."""
        table, needs = self._scheduler.table, request.compute
        if table.cpu_free[row] < needs.cpu_milli or table.memory_free[row] < needs.memory_bytes:
            return False
        if not request.containers:
            return True
        least = min(container.share_bytes for container in request.containers)
        return int((table.free_bytes[row] >= least).sum()) >= request.wishes.gpu_count

    def _lose(self, loss: Loss, now: float) -> None:
        if self._node is None:
            raise ValueError("losses need a way to make nodes anew")
        scheduler, lost = self._scheduler, self._lost.setdefault(loss.node, set())
        if loss.gpu is not None and loss.node not in scheduler.table.rows:
            # the node itself is lost, and comes back with all of its GPUs
            return
        if loss.back:
            lost -= {loss.gpu} if loss.gpu is not None else set(lost)
            scheduler.observe(self._node(loss.node, lost))
            self._retry(loss.node, now)
            return
        ended = [uid for uid, (_, node) in self._running.items() if node == loss.node]
        if loss.gpu is None:
            scheduler.lose(loss.node)
        else:
            lost.add(loss.gpu)
            made = self._node(loss.node, lost)
            scheduler.observe(made)
            view = scheduler.ledger.view(loss.node)
            uuids = {state.gpu.uuid for state in view.gpus if state.gpu.index == loss.gpu} if view else set()
            holds = ((uid, scheduler.ledger.hold(uid)) for uid in ended)
            ended = [uid for uid, hold in holds if hold is not None and uuids & hold.charges.keys()]
        for uid in ended:
            n, _ = self._running.pop(uid)
            scheduler.remove(uid)
            self._restarts += 1
            self._started[n] = inf
            if not self._came[n]:
                self._came[n], self._jobs[n] = True, msgspec.structs.replace(self._jobs[n], arrival=now)
            self._plan(now, _What.ARRIVAL, n)

    def _allocated(self) -> float:
        """Count the percent of all GPU memory that is held just now."""
        table = self._scheduler.table
        return 100 * int((table.usable_bytes - table.free_bytes).sum()) / max(1, self._capacity)

    def _look(self) -> tuple[float, float, int]:
        table = self._scheduler.table
        fragments = Fragmentation(self._mix, table).of(table.free_milli, table.cpu_free, table.node_model).sum()
        waiting = sum(map(len, self._queues.values()))
        fragmented = 100 * float(fragments) * table.largest_bytes / MILLI / max(1, self._capacity)
        return self._allocated(), fragmented, waiting
