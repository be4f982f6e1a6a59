"""Which pods to move so that what is free lies together: a plan, never more than the budgets and priorities allow.

A pod is moved by an eviction: its controller makes another, which the policy places while the first still holds what it
holds, as in a live cluster. So the plan knows where it will lie, and never leaves it without a place, if nothing else
happens meanwhile.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from heapq import heapify, heappop, heappush

import msgspec
import numpy as np

from cotenant.contract.request import PodRequest, RequestError
from cotenant.simulator.capacity import gpus_of
from cotenant.simulator.document import Document, PodEntry, kube_pod, request
from cotenant.simulator.scene import Doors, Scene
from cotenant.simulator.scheduler import Scheduler
from extender.ledger import GPUState, NodeView
from extender.placement.fit import pieces
from extender.placement.wishes import is_wished
from extender.policies.fragmentation import Fragmentation
from extender.policies.table import MILLI, Floats, Ints
from extender.shadow.placements import Free, free_of

# What moving a pod must bring at least, in parts of what it holds: it costs its users a restart.
WORTH = 0.1


class Move(msgspec.Struct, frozen=True):
    """Say that a pod goes from where it is to where the policy will place its successor."""

    namespace: str
    name: str
    uid: str
    owner: str
    priority: int
    held_bytes: int
    node: str
    gpus: tuple[int, ...]
    to_node: str
    to_gpus: tuple[int, ...]
    gain_bytes: int


class MovePlan(msgspec.Struct, frozen=True):
    """Hold moves in the order to make them, what they change, and why pods were left where they are, with how many."""

    moves: tuple[Move, ...]
    before: Free
    after: Free
    left: dict[str, int]
    # whether the request that room was to be made for fits afterwards, None where there was none
    fits: bool | None = None


class Planner:
    """Plan moves on a scene, whose ledger ends as it will be after them.

    *priority* is the highest that may be moved. *mix* of the scene is whose fragmentation counts.
    """

    def __init__(self, scene: Scene, scheduler: Scheduler, *, priority: int) -> None:
        self._scheduler = scheduler
        self._document: Document = scene.document
        self._mix = scene.mix
        self._fragmentation = Fragmentation(scene.mix, scheduler.table)
        # of each row, as it is but for what is being tried
        self._fragments = self._fragmented(np.arange(len(scheduler.table.known)))
        self._doors = Doors(scene.document)
        self._left: dict[str, int] = {}
        self._allowed = {n: budget.allowed for n, budget in enumerate(scene.document.budgets)}
        self._budget_of = {uid: n for n, budget in enumerate(scene.document.budgets) for uid in budget.pods}
        self._movable: dict[str, tuple[PodEntry, PodRequest]] = {}
        for pod in scene.document.pods:
            if pod.node and (pod.gpu_mem is not None or pod.containers):
                self._admit(pod, priority)

    def _admit(self, pod: PodEntry, priority: int) -> None:
        hold = self._scheduler.ledger.hold(pod.identity)
        if hold is None or not hold.charges:
            why = "they hold nothing that is known"
        elif pod.stays:
            why = pod.stays
        elif pod.priority > priority:
            why = f"their priority is above {priority}"
        elif pod.uuids:
            why = "they insist on one GPU"
        elif self._allowed.get(self._budget_of.get(pod.identity, -1), 1) < 1:
            why = "their PodDisruptionBudget allows none"
        else:
            try:
                self._movable[pod.identity] = pod, request(pod, self._document)
            except (RequestError, ValueError) as error:
                why = str(error)
            else:
                return
        self._left[why] = self._left.get(why, 0) + 1

    def defragment(self, *, most: int, progress: Callable[[int], None] = lambda _count: None) -> MovePlan:
        """Choose up to *most* moves, always the one that frees the most fragmented memory for what it costs."""
        before = self.free()
        moves: list[Move] = []
        # What a move brings changes little with others: the best of those known is looked at again, as long as it stays
        # the best.
        known = [(-self._gain(uid), n, uid) for n, uid in enumerate(self._movable)]
        heapify(known)
        while known and len(moves) < most:
            _, n, uid = heappop(known)
            gain = self._gain(uid)
            if gain <= 0:
                continue
            if known and gain < -known[0][0]:
                heappush(known, (-gain, n, uid))
            else:
                moves.append(self._move(uid))
                progress(1)
        return MovePlan(tuple(moves), before, self.free(), self._left)

    def make_room(self, asked: PodRequest, among: frozenset[str] | None, *, most: int) -> MovePlan:
        """Choose moves, up to *most*, after which a request fits: of the ways tried the one of the fewest and smallest.

        Tried is to empty the likeliest GPUs of each node; what takes moves on several nodes is not found.
        """
        before = self.free()
        if self._fits(asked, among):
            return MovePlan((), before, before, self._left, fits=True)
        best: list[str] | None = None
        residents: defaultdict[str, list[str]] = defaultdict(list)
        for uid, (entry, _) in self._movable.items():
            residents[entry.node].append(uid)
        for view in self._scheduler.ledger.views():
            if among is not None and view.name not in among:
                continue
            for group in self._groups(view, asked, residents[view.name]):
                if len(group) > most or (best is not None and self._cost(group) >= self._cost(best)):
                    continue
                if self._try(group, asked, among):
                    best = group
        if best is None:
            return MovePlan((), before, before, self._left, fits=False)
        moves = [self._move(uid) for uid in best]
        return MovePlan(tuple(moves), before, self.free(), self._left, fits=True)

    def free(self) -> Free:
        """Sum up what is free just now."""
        return free_of(self._scheduler.table, self._mix)

    # --- within ---

    def _may(self, uid: str) -> bool:
        return self._allowed.get(self._budget_of.get(uid, -1), 1) > 0

    def _held(self, uid: str) -> int:
        hold = self._scheduler.ledger.hold(uid)
        return hold.bytes if hold is not None else 0

    def _cost(self, group: Sequence[str]) -> tuple[int, int]:
        return len(group), sum(map(self._held, group))

    def _fits(self, asked: PodRequest, among: frozenset[str] | None) -> bool:
        return bool(self._scheduler.fitting(asked, among).any())

    def _fragmented(self, rows: Ints) -> Floats:
        """Count the fragmented bytes of each of these rows."""
        table = self._scheduler.table
        found = self._fragmentation.of(table.free_milli[rows], table.cpu_free[rows], table.node_model[rows])
        return found * table.largest_bytes / MILLI

    def _gain(self, uid: str) -> float:
        """Say how many fragmented bytes a move frees for each byte moved, less what it must be worth; undo it."""
        if not self._may(uid):
            return 0.0
        entry, held = self._movable[uid][0], self._held(uid)
        done = self._relocate(uid)
        if done is None:
            return 0.0
        self._undo(uid, entry)
        return done[1] / max(1, held) - WORTH

    def _relocate(self, uid: str) -> tuple[str, float] | None:
        """Place a pod's successor, end the pod; return its node and the fragmented bytes freed, None for no place."""
        entry, asked = self._movable[uid]
        scheduler = self._scheduler
        row = scheduler.place(f"{uid}'", asked, self._doors.open_to(entry))
        if row < 0:
            return None
        scheduler.remove(uid)
        rows = np.unique([row, scheduler.table.rows[entry.node]])
        return scheduler.table.names[row], float(self._fragments[rows].sum() - self._fragmented(rows).sum())

    def _undo(self, uid: str, entry: PodEntry) -> None:
        self._scheduler.remove(f"{uid}'")
        self._scheduler.ledger.observe_pod(kube_pod(entry, self._document, bound=True))
        self._scheduler.table.refresh()

    def _move(self, uid: str) -> Move:
        entry, _ = self._movable[uid]
        held, gpus = self._held(uid), gpus_of(self._scheduler.ledger, uid)
        done = self._relocate(uid)
        if done is None:
            raise AssertionError(f"{entry.key} has lost the place that it was planned to have")
        node, gain = done
        del self._movable[uid]
        rows = np.array([self._scheduler.table.rows[name] for name in {node, entry.node}])
        self._fragments[rows] = self._fragmented(rows)
        budget = self._budget_of.get(uid)
        if budget is not None:
            self._allowed[budget] -= 1
        return Move(
            namespace=entry.namespace,
            name=entry.name,
            uid=entry.uid,
            owner=entry.owner,
            priority=entry.priority,
            held_bytes=held,
            node=entry.node,
            gpus=gpus,
            to_node=node,
            to_gpus=gpus_of(self._scheduler.ledger, f"{uid}'"),
            gain_bytes=round(gain),
        )

    def _groups(self, view: NodeView, asked: PodRequest, residents: Sequence[str]) -> Iterable[list[str]]:
        """List those of a node's *residents* without which its GPUs could take a request, for the likeliest GPUs."""
        ledger, count, need = self._scheduler.ledger, asked.wishes.gpu_count, max(pieces(asked), default=0)
        states = [state for state in view.healthy if is_wished(state, asked.wishes)]
        # what each pod holds of each GPU: one of several GPUs frees a part of each
        on: dict[str, dict[str, int]] = {state.gpu.uuid: {} for state in states}
        for uid in residents:
            hold = ledger.hold(uid)
            for uuid, held in hold.charges.items() if hold is not None else ():
                if uuid in on:
                    on[uuid][uid] = held

        def missing(state: GPUState) -> int:
            return state.held_bytes if asked.wishes.isolation.whole_gpu else max(0, need - state.free_bytes)

        possible = (state for state in states if sum(on[state.gpu.uuid].values()) >= missing(state))
        cheapest = sorted(possible, key=missing)
        for first in range(len(cheapest) - count + 1):
            group: list[str] = []
            for state in cheapest[first : first + count]:
                holders = on[state.gpu.uuid]
                lacking = missing(state) - sum(holders.get(uid, 0) for uid in group)
                group += _smallest({uid: amount for uid, amount in holders.items() if uid not in group}, lacking)
            if group:
                yield group

    def _try(self, group: Sequence[str], asked: PodRequest, among: frozenset[str] | None) -> bool:
        """Tell whether a request fits when these pods have been moved; undo that."""
        entries = {uid: self._movable[uid][0] for uid in group}
        budgets = [self._budget_of[uid] for uid in group if uid in self._budget_of]
        if any(budgets.count(n) > self._allowed[n] for n in budgets):
            return False
        moved = []
        for uid in group:
            if self._relocate(uid) is None:
                break
            moved.append(uid)
        fits = len(moved) == len(group) and self._fits(asked, among)
        for uid in reversed(moved):
            self._undo(uid, entries[uid])
        return fits


def _smallest(held: Mapping[str, int], missing: int) -> list[str]:
    """Choose pods that hold so many bytes of a GPU together: the smallest one that does, else the largest first."""
    by_size = sorted(held, key=lambda uid: held[uid])
    for uid in by_size:
        if held[uid] >= missing:
            return [uid] if missing > 0 else []
    chosen: list[str] = []
    for uid in reversed(by_size):
        if missing > 0:
            chosen.append(uid)
            missing -= held[uid]
    return chosen
