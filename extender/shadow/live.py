"""Shadow scoring on live traffic: a thread that has a shadow follow the ledger, and metrics of both.

Nothing of it is on the way of a pod: bind leaves a note of what the pod asked, which is all.
"""

import threading
from collections.abc import Callable, Iterator

from cachetools import LRUCache
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cotenant.contract.names import Names
from cotenant.contract.request import PodRequest
from cotenant.threads import Threads, giving_way
from extender.ledger import Ledger
from extender.policies.mix import Mix
from extender.policies.table import Table
from extender.shadow.placements import Agreement, Comparison, Shadow, Side, free_of

# Looking at all nodes takes some 20 ms at 5,000 of them.
_INTERVAL_SECONDS = 5.0
# What pods asked is needed until the shadow has placed them, some seconds later.
_NOTES = 20_000


class Shadowing(Collector):
    """Follow the ledger with a shadow of another policy, and tell how the two differ."""

    def __init__(
        self,
        ledger: Ledger,
        names: Names,
        unit_bytes: int,
        *,
        live: str,
        shadow: str,
        mix: Callable[[], Mix],
        interval: float = _INTERVAL_SECONDS,
        threads: Threads | None = None,
    ) -> None:
        self._ledger = ledger
        self._live = live
        self._mix = mix
        self._interval = interval
        self._shadow = Shadow(names, unit_bytes, shadow)
        self._table = Table(ledger)
        self._notes: LRUCache[str, PodRequest] = LRUCache(_NOTES)
        self._noted = threading.Lock()
        self._told: Comparison | None = None
        self._changes = -1
        self._stopping = threading.Event()
        self._thread = (threads or Threads()).of("shadow", self._turn)

    def note(self, uid: str, request: PodRequest) -> None:
        """Remember what a pod asks that is being bound."""
        with self._noted:
            self._notes[uid] = request

    def start(self) -> None:
        """Begin with what is there, and go on in a thread."""
        self._thread.start()

    def stop(self) -> None:
        """End after the round under way."""
        self._stopping.set()
        self._thread.join(5)

    def follow(self) -> None:
        """Have the shadow take over what has happened, and look at both."""
        changes = self._ledger.changed_so_far()
        if changes == self._changes:
            return
        with self._noted:
            notes = dict(self._notes)
        mix = self._mix()
        self._shadow.follow(self._ledger.views(), self._ledger.holds(), self._ledger.takes, notes, mix)
        self._table.refresh()
        self._told = Comparison(
            live=Side(self._live, free_of(self._table, mix)),
            shadow=Side(self._shadow.policy, self._shadow.free()),
            refused=self._shadow.refused,
            agreements={agreement: self._shadow.agreements[agreement] for agreement in Agreement},
        )
        self._changes = changes

    def compared(self) -> Comparison | None:
        """Give both sides as they were last looked at, some seconds ago; None before the first look."""
        return self._told

    def collect(self) -> Iterator[Metric]:
        """Give what both leave free, what is between them, and how often they agreed; nothing before the first look."""
        told = self._told
        if told is None:
            return
        for name, field, what in (
            ("free_bytes", "free_bytes", "Memory of healthy GPUs that is free"),
            ("fragmented_bytes", "fragmented_bytes", "Free memory that the next typical pod could not use"),
            ("largest_free_bytes", "largest_bytes", "The most that is free of one GPU"),
            ("empty_gpus", "empty_gpus", "GPUs that no pod holds anything of"),
        ):
            both = GaugeMetricFamily(
                f"cotenant_shadow_{name}", f"{what}, as it is and as the shadow has it.", labels=["side", "policy"]
            )
            both.add_metric(["live", told.live.policy], getattr(told.live.free, field))
            both.add_metric(["shadow", told.shadow.policy], getattr(told.shadow.free, field))
            yield both
        yield GaugeMetricFamily(
            "cotenant_shadow_fragmented_difference_bytes",
            "Fragmented memory under the shadow's policy, less that under the live one.",
            value=told.shadow.free.fragmented_bytes - told.live.free.fragmented_bytes,
        )
        yield GaugeMetricFamily(
            "cotenant_shadow_pods_refused", "Pods that run, and that the shadow had no room for.", value=told.refused
        )
        placed = CounterMetricFamily(
            "cotenant_shadow_placements",
            "Pods by where the shadow placed them, beside where they are.",
            labels=["place"],
        )
        for agreement, pods in told.agreements.items():
            placed.add_metric([agreement], pods)
        yield placed

    def _turn(self) -> bool:
        with giving_way():
            self.follow()
        return not self._stopping.wait(self._interval)
