"""Metrics of one node's device plugin, in base units; the gauges are read from one look at the GPUs per scrape."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from cotenant import __version__
from cotenant.contract.health import Severity
from cotenant.contract.inventory import GPU, Health
from device_plugin.nvml import PhysicalGPU
from device_plugin.threads import THREADS

# No second series beside each counter, that says since when it counts.
disable_created_metrics()  # type: ignore[no-untyped-call]

# The kubelet admits no other pod while it waits for Allocate.
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


class Snapshot(NamedTuple):
    """Show the plugin at one moment: each GPU as it is published and as NVML tells it, XIDs, and the registration."""

    gpus: Sequence[tuple[GPU, PhysicalGPU]]
    xids: dict[tuple[str, int, Severity], int]
    registered: dict[str, bool]


class Metrics:
    """Count what the plugin answers, and show what *look* gives."""

    def __init__(self, node: str, look: Callable[[], Snapshot]) -> None:
        self._registry = CollectorRegistry()
        self._calls = Histogram(
            "cotenant_device_plugin_call_duration_seconds",
            "Time to answer the kubelet, by call: ok, or refused.",
            ["call", "outcome"],
            buckets=_BUCKETS,
            registry=self._registry,
        )
        self._registry.register(_Collector(node, look))

    def answered(self, call: str, outcome: str, seconds: float) -> None:
        """Count an answer to the kubelet."""
        self._calls.labels(call, outcome).observe(seconds)

    def add(self, collector: Collector) -> None:
        """Show what another part of the plugin measures."""
        self._registry.register(collector)

    def expose(self) -> bytes:
        """Write all metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class _Collector(Collector):
    def __init__(self, node: str, look: Callable[[], Snapshot]) -> None:
        self._node = node
        self._look = look

    def describe(self) -> Iterator[Metric]:
        """Say nothing before there is something to show."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Give one sample per GPU and fact; what NVML does not tell has none."""
        snapshot = self._look()
        labels = ["node", "gpu", "uuid"]

        def gauge(name: str, words: str, value: Callable[[GPU, PhysicalGPU], float | None]) -> Metric:
            family = GaugeMetricFamily(name, words, labels=labels)
            for gpu, physical in snapshot.gpus:
                found = value(gpu, physical)
                if found is not None:
                    family.add_metric([self._node, str(gpu.index), gpu.uuid], found)
            return family

        yield gauge(
            "cotenant_device_plugin_gpu_healthy",
            "1 where the plugin lets new pods be placed.",
            lambda gpu, _: gpu.health is Health.HEALTHY,
        )
        yield gauge("cotenant_gpu_memory_total_bytes", "What NVML counts.", lambda _, seen: seen.total_bytes)
        yield gauge(
            "cotenant_gpu_memory_used_bytes",
            "What is in use by whomever, without what the driver reserves.",
            lambda _, seen: seen.vitals.used_bytes,
        )
        yield gauge(
            "cotenant_gpu_uncorrected_ecc_errors",
            "Uncorrected memory errors since the driver was loaded.",
            lambda _, seen: seen.vitals.uncorrected_ecc,
        )
        yield gauge(
            "cotenant_gpu_row_remap_pending",
            "1 where a bad row of memory waits for a reset to be replaced.",
            lambda _, seen: seen.vitals.remap_pending,
        )
        yield gauge(
            "cotenant_gpu_row_remap_failure",
            "1 where a bad row of memory could not be replaced.",
            lambda _, seen: seen.vitals.remap_failed,
        )
        yield gauge("cotenant_vgpu_licensed", "1 where a vGPU has its licence.", lambda _, seen: seen.vitals.licensed)
        yield self._xids(snapshot)
        registered = GaugeMetricFamily(
            "cotenant_device_plugin_registered", "1 while a kubelet follows the devices.", labels=["node", "resource"]
        )
        for resource, serving in snapshot.registered.items():
            registered.add_metric([self._node, resource], serving)
        yield registered
        failures = CounterMetricFamily(
            "cotenant_device_plugin_thread_failures",
            "How often a thread of the plugin failed in an unforeseen way, and began anew.",
            labels=["node", "thread"],
        )
        for thread, count in sorted(THREADS.failures().items()):
            failures.add_metric([self._node, thread], count)
        yield failures
        info = GaugeMetricFamily("cotenant_build_info", "The version.", labels=["version"])
        info.add_metric([__version__], 1)
        yield info

    def _xids(self, snapshot: Snapshot) -> Metric:
        indices = {gpu.uuid: str(gpu.index) for gpu, _ in snapshot.gpus}
        xids = CounterMetricFamily(
            "cotenant_gpu_xids",
            "XIDs that the driver told since the plugin started.",
            labels=["node", "gpu", "uuid", "xid", "class"],
        )
        for (uuid, xid, severity), count in snapshot.xids.items():
            xids.add_metric([self._node, indices.get(uuid, ""), uuid, str(xid), str(severity)], count)
        return xids
