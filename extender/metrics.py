"""Metrics of the extender, in base units; the gauges are read from one look at the ledger per scrape."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from cotenant import __version__
from cotenant.contract.reasons import Reason
from extender.ledger import Ledger, Stage

CONTENT_TYPE = CONTENT_TYPE_LATEST

# kube-scheduler waits 5 s by default; a verb should take a thousandth of that.
_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Metrics:
    """Count what the verbs do, and show the ledger."""

    def __init__(self, ledger: Ledger, synced: Callable[[], bool], unsettled: Callable[[], int]) -> None:
        self._registry = CollectorRegistry()
        self._requests = Histogram(
            "cotenant_extender_request_duration_seconds",
            "Time to answer kube-scheduler, without the network.",
            ["verb", "outcome"],
            buckets=_BUCKETS,
            registry=self._registry,
        )
        self._rejections = Counter(
            "cotenant_filter_rejections",
            "Nodes that filter refused, by reason.",
            ["reason"],
            registry=self._registry,
        )
        self._binds = Counter(
            "cotenant_bind", "Binds by outcome: ok, or the reason for a no.", ["outcome"], registry=self._registry
        )
        self._evictions = Counter(
            "cotenant_evictions",
            "Evictions of pods that used more GPU memory than they were granted, by outcome.",
            ["outcome"],
            registry=self._registry,
        )
        self._registry.register(_LedgerCollector(ledger, synced, unsettled))

    def rejected(self, reason: Reason, count: int) -> None:
        """Count nodes that filter refused."""
        self._rejections.labels(reason).inc(count)

    def bound(self, reason: Reason | None) -> None:
        """Count a bind: None is a success."""
        self._binds.labels("ok" if reason is None else reason).inc()

    def answered(self, verb: str, outcome: str, seconds: float) -> None:
        """Count an answer to kube-scheduler; *outcome* is ok, rejected or error."""
        self._requests.labels(verb, outcome).observe(seconds)

    def evicted(self, outcome: str) -> None:
        """Count an eviction; *outcome* is ok, blocked by a disruption budget, forbidden or error."""
        self._evictions.labels(outcome).inc()

    def expose(self) -> bytes:
        """Write all metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class _LedgerCollector(Collector):
    def __init__(self, ledger: Ledger, synced: Callable[[], bool], unsettled: Callable[[], int]) -> None:
        self._ledger = ledger
        self._synced = synced
        self._unsettled = unsettled

    def collect(self) -> Iterator[Metric]:
        """Give one sample per GPU, and the cluster's sums."""
        labels = ["node", "gpu", "uuid", "model", "mode"]
        capacity = GaugeMetricFamily("cotenant_gpu_memory_capacity_bytes", "What pods may be given.", labels=labels)
        allocated = GaugeMetricFamily("cotenant_gpu_memory_allocated_bytes", "What pods hold.", labels=labels)
        healthy = GaugeMetricFamily("cotenant_gpu_health", "1 where new pods may be placed.", labels=labels)
        pods = GaugeMetricFamily("cotenant_gpu_pods", "Pods that hold something.", labels=labels)
        for view in self._ledger.views():
            for state in view.gpus:
                gpu = state.gpu
                values = [view.name, str(gpu.index), gpu.uuid, gpu.model, str(gpu.mode)]
                capacity.add_metric(values, gpu.usable_bytes)
                allocated.add_metric(values, state.held_bytes)
                healthy.add_metric(values, state.healthy and view.problem is None)
                pods.add_metric(values, state.pods)
        holds = self._ledger.holds()
        assumed = sum(hold.stage is Stage.ASSUMED for hold in holds)
        unreadable = sum(bool(hold.problem) for hold in holds)
        yield from (capacity, allocated, healthy, pods)
        yield GaugeMetricFamily("cotenant_pods_assumed", "Pods reserved but not known to be bound.", value=assumed)
        yield GaugeMetricFamily("cotenant_grants_unreadable", "Bound pods with an unreadable grant.", value=unreadable)
        yield GaugeMetricFamily(
            "cotenant_pods_ungranted", "Bound pods that went around the extender.", value=len(self._ledger.ungranted())
        )
        yield GaugeMetricFamily(
            "cotenant_bindings_unsettled", "Bindings whose outcome is in doubt.", value=self._unsettled()
        )
        yield GaugeMetricFamily("cotenant_cache_synced", "1 once the cluster has been read.", value=self._synced())
        info = GaugeMetricFamily("cotenant_build_info", "The version.", labels=["version"])
        info.add_metric([__version__], 1)
        yield info
