"""Make room for a pod that fits nowhere by moving one that runs: what relocation would gain, if it cost nothing."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cotenant.contract.request import PodRequest
from cotenant.simulator import cluster
from cotenant.simulator.scheduler import Scheduler
from extender.placement.fit import pieces

if TYPE_CHECKING:
    from extender.ledger import Hold

# How many pods are tried for one that waits, the smallest first: each takes as long as placing one.
_TRIED = 4


class Running(NamedTuple):
    """Name a pod that runs, what it asked, and the nodes that are open to it, None for all."""

    uid: str
    request: PodRequest
    nodes: frozenset[str] | None = None


class Mover:
    """Move one pod so that another fits; *scheduler* is whose ledger they are on.

    Only pods of one GPU are moved. A move is as `cotenant plan moves` has it: the successor is placed by the policy
    while the pod still holds its memory. It goes on running for the rest of its time, which no real one does.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def make_room(
        self, asked: PodRequest, running: Iterable[Running], among: frozenset[str] | None = None
    ) -> tuple[str, str] | None:
        """Move the smallest pod that does, and give its UID and the node that it is on now; None where none does."""
        candidates = [
            (held, one.uid, one) for one in running if (held := self._freed(one.uid, asked, among)) is not None
        ]
        for _, uid, one in sorted(candidates, key=lambda found: found[:2])[:_TRIED]:
            node = self._try(one, asked, among)
            if node is not None:
                return uid, node
        return None

    def _freed(self, uid: str, asked: PodRequest, among: frozenset[str] | None) -> int | None:
        """Count the bytes that a pod holds where its node could take *asked* without it; None where it could not."""
        ledger, table = self._scheduler.ledger, self._scheduler.table
        hold = ledger.hold(uid)
        if hold is None or len(hold.charges) != 1 or (among is not None and hold.node not in among):
            return None
        row, takes = table.rows.get(hold.node), ledger.takes(uid)
        if row is None or table.cpu_free[row] + takes.cpu_milli < asked.compute.cpu_milli:
            return None
        if table.memory_free[row] + takes.memory_bytes < asked.compute.memory_bytes:
            return None
        ((uuid, held),) = hold.charges.items()
        if not asked.containers:
            return held
        need, view = max(pieces(asked)), ledger.view(hold.node)
        of_pod = next((state for state in view.gpus if state.gpu.uuid == uuid), None) if view is not None else None
        if of_pod is None or of_pod.free_bytes >= need or of_pod.free_bytes + held < need:
            return None
        enough = int(np.count_nonzero(table.free_bytes[row] >= need)) + 1 >= asked.wishes.gpu_count
        return held if enough else None

    def _try(self, one: Running, asked: PodRequest, among: frozenset[str] | None) -> str | None:
        scheduler, uid = self._scheduler, one.uid
        hold, takes = scheduler.ledger.hold(uid), scheduler.ledger.takes(uid)
        row = scheduler.place(f"{uid}'", one.request, one.nodes)
        if row < 0 or hold is None:
            return None
        successor = scheduler.ledger.hold(f"{uid}'")
        scheduler.remove(uid)
        fits = bool(scheduler.fitting(asked, among).any())
        scheduler.remove(f"{uid}'")
        kept: Hold = successor if fits and successor is not None else hold
        scheduler.ledger.observe_pod(cluster.bound(kept, uid, takes))
        scheduler.table.refresh()
        return kept.node if fits else None
