"""Replay a trace: pods arrive one by one, each is placed where the policy ranks best, or dropped where none fits."""

import time
from collections.abc import Callable

import msgspec
import numpy as np

from cotenant.simulator import cluster
from cotenant.simulator.scheduler import Scheduler
from cotenant.simulator.trace import Order, TraceNode, TracePod
from extender.policies.fragmentation import Fragmentation
from extender.policies.mix import Mix
from extender.policies.table import Floats, Ints, Table


class Run(msgspec.Struct, frozen=True):
    """Hold what happened, event by event (E of them), in the order pods arrived.

    row (E,): the node in the order of their names, -1 where the pod was dropped.
    fragmentation (E,): milli of the whole cluster after the event, FGD's definition for the trace's typical pods.
    free (E,): the free GPU milli of the whole cluster after the event.
    decisions (E,): the seconds that ranking took.
    left: by node in the order of their names, the free milli of each of its GPUs in the end.
    seconds: all of the replay, without reading the trace.
    """

    pods: tuple[TracePod, ...]
    capacity_milli: int
    row: Ints
    fragmentation: Floats
    free: Ints
    decisions: Floats
    left: list[list[int]]
    seconds: float


def replay(
    nodes: list[TraceNode],
    pods: list[TracePod],
    order: Order,
    policy: str,
    *,
    sample: bool = False,
    progress: Callable[[int], None] = lambda _count: None,
) -> Run:
    """Place the pods of a trace in the given order.

    *sample* shows the policy only the nodes that kube-scheduler would. *progress* is told how many pods were tried
    since it was last told.
    """
    started = time.perf_counter()
    mix = Mix.of(pod.pod_class for pod in pods)
    ranks = {node.name: rank for node, rank in zip(nodes, order.ranks, strict=True)}
    scheduler = Scheduler(cluster.new_ledger(nodes), policy, ranks=ranks, mix=mix, sample=sample)
    table = scheduler.table
    place_of = np.full(table.shape[0], -1)
    place_of[[table.rows[node.name] for node in nodes]] = np.arange(len(nodes))
    asked = {pod: cluster.request(pod) for pod in set(pods)}
    history = _History(table, len(order.arrivals))
    arrived = tuple(pods[index] for index in order.arrivals)
    for event, pod in enumerate(arrived):
        row = scheduler.place(f"{pod.name}/{event}", asked[pod])
        history.decisions[event] = scheduler.last_decision
        history.note(event, row)
        if event % 100 == 99:  # noqa: PLR2004
            progress(100)
    fragmentation, free = history.measure(Fragmentation(mix, table))
    return Run(
        pods=arrived,
        capacity_milli=int(table.usable_milli.sum()),
        row=np.where(history.row >= 0, place_of[history.row], -1),
        fragmentation=fragmentation,
        free=free,
        decisions=history.decisions,
        left=[table.free_milli[table.rows[node.name], : node.gpus].tolist() for node in nodes],
        seconds=time.perf_counter() - started,
    )


class _History:
    """Keep the node that each event changed as it was afterwards, to measure all of them at once in the end."""

    def __init__(self, table: Table, events: int) -> None:
        self._table = table
        self._first = table.free_milli.copy(), table.cpu_free.copy()
        self.row = np.full(events, -1)
        self.decisions = np.zeros(events)
        self._free = np.zeros((events, table.shape[1]), np.int64)
        self._cpu = np.zeros(events, np.int64)

    def note(self, event: int, row: int) -> None:
        self.row[event] = row
        if row >= 0:
            self._free[event] = self._table.free_milli[row]
            self._cpu[event] = self._table.cpu_free[row]

    def measure(self, fragmentation: Fragmentation) -> tuple[Floats, Ints]:
        """Sum up fragmentation and free milli of the whole cluster after each event."""
        table = self._table
        free, cpu = self._first
        fragments = fragmentation.of(free, cpu, table.node_model)
        first_fragments, first_free = fragments.sum(), free.sum()
        placed = np.flatnonzero(self.row >= 0)
        rows = self.row[placed]
        after = np.zeros(len(placed))
        for start in range(0, len(placed), 1000):  # in pieces, as all at once take a gigabyte
            piece = placed[start : start + 1000]
            after[start : start + 1000] = fragmentation.of(
                self._free[piece], self._cpu[piece], table.node_model[self.row[piece]]
            )
        left = self._free[placed].sum(axis=1)
        grown, used = np.zeros(len(self.row)), np.zeros(len(self.row), np.int64)
        latest, latest_free = fragments, free.sum(axis=1)
        for event, row, amount, free_milli in zip(placed, rows, after, left, strict=True):
            grown[event], latest[row] = amount - latest[row], amount
            used[event], latest_free[row] = free_milli - latest_free[row], free_milli
        return first_fragments + np.cumsum(grown), first_free + np.cumsum(used)
