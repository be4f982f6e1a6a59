"""Metrics of the extender, in base units; the gauges are read from one look at the ledger per scrape."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from cotenant import __version__
from cotenant.cluster import Counts
from cotenant.contract.reasons import Reason
from extender.ledger import Ledger, Stage, Use
from extender.metrics.samples import LedgerSamples
from extender.placement.tenants import Tenants

CONTENT_TYPE = CONTENT_TYPE_LATEST

# No second series beside each counter, that says since when it counts.
disable_created_metrics()  # type: ignore[no-untyped-call]

# kube-scheduler waits 5 s by default; a verb should take a thousandth of that.
_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Watch(Protocol):
    """Be what follows one resource of the API server."""

    last_event_at: float | None
    counts: Counts


class _ThreadCollector(Collector):
    def __init__(self, failures: Callable[[], Mapping[str, int]]) -> None:
        self._failures = failures

    def collect(self) -> Iterator[Metric]:
        """Give a sample for each thread."""
        family = CounterMetricFamily(
            "cotenant_thread_failures",
            "Failures that nobody expected and that a thread survived, by thread; the log has each.",
            labels=["thread"],
        )
        for thread, count in self._failures().items():
            family.add_metric([thread], count)
        yield family


class TenantSamples(Collector):
    """Show what the pods of namespaces that have limits hold, and the limits."""

    def __init__(self, ledger: Ledger, tenants: Tenants) -> None:
        self._ledger = ledger
        self._tenants = tenants

    def describe(self) -> Iterator[Metric]:
        """Say nothing before there is something to show."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Give a sample for each namespace and limit; a namespace without limits has none."""
        uses = self._ledger.uses()
        memory = GaugeMetricFamily(
            "cotenant_namespace_gpu_memory_bytes", "What its pods hold of all GPUs.", labels=["namespace"]
        )
        memory_limit = GaugeMetricFamily(
            "cotenant_namespace_gpu_memory_limit_bytes", "What its pods may hold of all GPUs.", labels=["namespace"]
        )
        gpus = GaugeMetricFamily(
            "cotenant_namespace_gpus", "GPUs of its pods, parts and MIG instances too.", labels=["namespace"]
        )
        gpu_limit = GaugeMetricFamily(
            "cotenant_namespace_gpus_limit", "How many GPUs its pods may have.", labels=["namespace"]
        )
        for namespace in sorted({*uses, *self._tenants.named}):
            limits, use = self._tenants.of(namespace), uses.get(namespace, Use())
            if limits is None:
                continue
            memory.add_metric([namespace], use.bytes)
            gpus.add_metric([namespace], use.gpus)
            if limits.gpu_memory_bytes is not None:
                memory_limit.add_metric([namespace], limits.gpu_memory_bytes)
            if limits.gpus is not None:
                gpu_limit.add_metric([namespace], limits.gpus)
        yield from (memory, memory_limit, gpus, gpu_limit)


class Metrics:
    """Count what the verbs do, and show the ledger."""

    def __init__(
        self,
        ledger: Ledger,
        synced: Callable[[], bool],
        unsettled: Callable[[], int],
        *,
        watches: Mapping[str, Watch] | None = None,
        per_gpu: bool = True,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._registry = CollectorRegistry()
        self._requests = Histogram(
            "cotenant_extender_request_duration_seconds",
            "Time to answer kube-scheduler, without the network.",
            ["verb", "outcome"],
            buckets=_BUCKETS,
            registry=self._registry,
        )
        # prometheus_client finds the sample of two labels in 4 us, and each pod is answered twice or three times
        self._answers: dict[tuple[str, str], Histogram] = {}
        self._rejections = Counter(
            "cotenant_filter_rejections",
            "Nodes that filter refused, by reason.",
            ["reason"],
            registry=self._registry,
        )
        self._binds = Counter(
            "cotenant_bind", "Binds by outcome: ok, or the reason for a no.", ["outcome"], registry=self._registry
        )
        self._nominations = Counter(
            "cotenant_nominations",
            "Nodes nominated for pods that waited: outside of the sample that they were refused in, or freed since.",
            ["why"],
            registry=self._registry,
        )
        self._evictions = Counter(
            "cotenant_evictions",
            "Evictions by the extender, by cause (overuse, preemption) and outcome.",
            ["cause", "outcome"],
            registry=self._registry,
        )
        self._scrape_seconds = Counter(
            "cotenant_extender_scrape_cpu_seconds",
            "CPU time that writing these metrics took.",
            registry=self._registry,
        )
        self._registry.register(
            _StateCollector(ledger, synced, unsettled, watches=watches or {}, clock=clock, wall=wall)
        )
        self._samples = LedgerSamples(ledger, per_gpu=per_gpu)
        self._scraping = threading.Lock()

    def show_writer(self, writing: Callable[[], bool]) -> None:
        """Show whether this extender is the one that binds."""
        writer = Gauge("cotenant_writer", "1 where this extender is the one that binds.", registry=self._registry)
        writer.set_function(writing)

    def show_threads(self, failures: Callable[[], Mapping[str, int]]) -> None:
        """Show how often each thread met what nobody expected."""
        self._registry.register(_ThreadCollector(failures))

    def also(self, collector: Collector) -> None:
        """Expose what another part tells of itself."""
        self._registry.register(collector)

    def rejected(self, reason: Reason, count: int) -> None:
        """Count nodes that filter refused."""
        self._rejections.labels(reason).inc(count)

    def bound(self, reason: Reason | None) -> None:
        """Count a bind: None is a success."""
        self._binds.labels("ok" if reason is None else reason).inc()

    def answered(self, verb: str, outcome: str, seconds: float) -> None:
        """Count an answer to kube-scheduler; *outcome* is ok, rejected or error."""
        answers = self._answers.get((verb, outcome))
        if answers is None:
            answers = self._answers[verb, outcome] = self._requests.labels(verb, outcome)
        answers.observe(seconds)

    def nominated(self, why: str) -> None:
        """Count a nomination; *why* is outside_sample or freed."""
        self._nominations.labels(why).inc()

    def evicted(self, cause: str, outcome: str) -> None:
        """Count an eviction; *outcome* is ok, blocked by a disruption budget, forbidden or error."""
        self._evictions.labels(cause, outcome).inc()

    def expose(self) -> list[bytes]:
        """Write all metrics in Prometheus' text format, in pieces; one scrape at a time."""
        with self._scraping:
            started = time.thread_time()
            pieces = [generate_latest(self._registry), *self._samples.write()]
            self._scrape_seconds.inc(time.thread_time() - started)
            return pieces


class _StateCollector(Collector):
    """Show the few numbers that are the whole extender's."""

    def __init__(
        self,
        ledger: Ledger,
        synced: Callable[[], bool],
        unsettled: Callable[[], int],
        *,
        watches: Mapping[str, Watch],
        clock: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        self._ledger = ledger
        self._synced = synced
        self._unsettled = unsettled
        self._watches = watches
        self._clock = clock
        self._wall = wall
        # when each pod that waits was first seen to, by the scrapes
        self._since: dict[str, float] = {}

    def collect(self) -> Iterator[Metric]:
        """Give one sample of each."""
        holds = self._ledger.holds()
        assumed = sum(hold.stage is Stage.ASSUMED for hold in holds)
        unreadable = sum(bool(hold.problem) for hold in holds)
        yield GaugeMetricFamily("cotenant_pods", "Pods that hold GPU memory.", value=len(holds))
        yield GaugeMetricFamily("cotenant_pods_assumed", "Pods reserved but not known to be bound.", value=assumed)
        yield GaugeMetricFamily(
            "cotenant_pods_promised",
            "Pods that GPU memory is kept for until those evicted for them are gone.",
            value=len(self._ledger.promises()),
        )
        yield from self._waiting({hold.uid for hold in holds})
        yield GaugeMetricFamily("cotenant_grants_unreadable", "Bound pods with an unreadable grant.", value=unreadable)
        yield GaugeMetricFamily(
            "cotenant_pods_ungranted", "Bound pods that went around the extender.", value=len(self._ledger.ungranted())
        )
        yield GaugeMetricFamily(
            "cotenant_bindings_unsettled", "Bindings whose outcome is in doubt.", value=self._unsettled()
        )
        yield GaugeMetricFamily("cotenant_cache_synced", "1 once the cluster has been read.", value=self._synced())
        yield from self._followed()
        info = GaugeMetricFamily("cotenant_build_info", "The version.", labels=["version"])
        info.add_metric([__version__], 1)
        yield info

    def _waiting(self, held: set[str]) -> Iterator[Metric]:
        now = self._clock()
        waiting = [pod.uid for pod in self._ledger.all_waiting() if pod.uid not in held]
        self._since = {uid: self._since.get(uid, now) for uid in waiting}
        longest = now - min(self._since.values(), default=now)
        yield GaugeMetricFamily("cotenant_pods_waiting", "Pods that ask for GPU memory and wait.", value=len(waiting))
        yield GaugeMetricFamily(
            "cotenant_pods_waiting_longest_seconds", "How long one has waited while we were scraped.", value=longest
        )

    def _followed(self) -> Iterator[Metric]:
        restarts = CounterMetricFamily("cotenant_watch_restarts", "Watches that were opened.", labels=["resource"])
        errors = CounterMetricFamily("cotenant_watch_errors", "Failures to follow a resource.", labels=["resource"])
        last = GaugeMetricFamily(
            "cotenant_watch_last_event_timestamp_seconds",
            "When the API server last said anything of a resource.",
            labels=["resource"],
        )
        for resource, watch in self._watches.items():
            restarts.add_metric([resource], watch.counts.watches)
            errors.add_metric([resource], watch.counts.errors)
            if watch.last_event_at is not None:
                last.add_metric([resource], self._wall() - (self._clock() - watch.last_event_at))
        yield from (restarts, errors, last)
