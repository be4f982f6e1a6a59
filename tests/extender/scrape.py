"""Reads what an extender tells Prometheus."""

from collections.abc import Callable

from prometheus_client.parser import text_string_to_metric_families

from cotenant.cluster import Counts
from cotenant.contract.configuration import NamespaceLimits
from cotenant.contract.inventory import Mode
from cotenant.contract.reasons import Reason
from cotenant.contract.units import GIB
from extender.ledger import Ledger
from extender.metrics.registry import Metrics, TenantSamples
from extender.placement.tenants import Tenants
from tests.builders import NAMES, a_grant, a_node, a_pod, granted

Families = dict[str, tuple[str, str, set[str]]]


class Followed:
    """A watch that has heard something."""

    counts = Counts(watches=2, errors=1)
    last_event_at: float | None = 90.0


def a_ledger() -> Ledger:
    """A ledger in which every metric has something to say: two nodes, pods bound, assumed and waiting."""
    ledger = Ledger(NAMES, GIB)
    ledger.observe_node(a_node("n1").with_gpus(2, "10GiB").build())
    ledger.observe_node(a_node("n2").with_gpus(1, "10GiB").not_serving().build())
    ledger.observe_pod(a_pod().named("bound").asking(6).bound_to("n1", a_grant(granted({"GPU-n1-0": 6 * GIB}))).build())
    ledger.observe_pod(a_pod().named("waits").asking(8).build())
    # full, so that nothing of it lies in pieces
    ledger.observe_node(a_node("mps").with_gpus(1, "6GiB").under_mps(max_clients=48).build())
    served = a_pod().named("served").asking(6)
    ledger.observe_pod(served.bound_to("mps", a_grant(granted({"GPU-mps-0": 6 * GIB}, mode=Mode.MPS))).build())
    ledger.observe_node(a_node("cut").with_mig(static=["3g.20gb@0", "1g.5gb@4"]).build())
    return ledger


def a_metrics(ledger: Ledger, *, clock: Callable[[], float] = lambda: 100.0, per_gpu: bool = True) -> Metrics:
    """Metrics of *ledger* that have counted each thing once."""
    watches = {"nodes": Followed(), "pods": Followed()}
    metrics = Metrics(
        ledger, lambda: True, lambda: 0, watches=watches, per_gpu=per_gpu, clock=clock, wall=lambda: 1_000_100.0
    )
    metrics.answered("filter", "ok", 0.001)
    metrics.rejected(Reason.NO_GPU_FITS, 1)
    metrics.bound(None)
    metrics.evicted("overuse", "ok")
    metrics.nominated("freed")
    metrics.show_writer(lambda: True)
    metrics.show_threads(lambda: {"events": 0})
    limits = {"default": NamespaceLimits(gpu_memory="20GiB", gpus=4)}
    metrics.also(TenantSamples(ledger, Tenants(limits, NAMES)))
    return metrics


def text(metrics: Metrics) -> str:
    return b"".join(metrics.expose()).decode()


def families(exposed: str) -> Families:
    """Read the exposition with the client's own parser: type, help and labels of each metric."""
    found: Families = {}
    for family in text_string_to_metric_families(exposed):
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        name = f"{family.name}_total" if family.type == "counter" else family.name
        found[name] = (family.type, family.documentation, labels)
    return found


def values(exposed: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Give every sample's value by its name and sorted labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(exposed)
        for sample in family.samples
    }
