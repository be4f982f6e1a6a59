"""Quantiles of Prometheus histograms, as Prometheus' own histogram_quantile estimates them."""

from collections import Counter
from collections.abc import Mapping

from prometheus_client.parser import text_string_to_metric_families


def quantiles_ms(text: str, name: str, labels: Mapping[str, str]) -> dict[str, float]:
    """Estimate median, 99th percentile and mean, in milliseconds, of the series of *name* that have *labels*.

    *text* is a whole exposition. Within a bucket, values are taken to lie evenly; empty where nothing was observed.
    """
    upto: Counter[float] = Counter()
    total = 0.0
    for family in text_string_to_metric_families(text):
        if family.name != name:
            continue
        for sample in family.samples:
            if labels.items() <= sample.labels.items():
                if sample.name.endswith("_bucket"):
                    upto[float(sample.labels["le"])] += sample.value  # type: ignore[assignment]
                elif sample.name.endswith("_sum"):
                    total += sample.value
    count = upto.get(float("inf"), 0)
    if not count:
        return {}
    found = {key: round(_quantile(upto, count * share) * 1e3, 3) for key, share in (("p50_ms", 0.5), ("p99_ms", 0.99))}
    return found | {"mean_ms": round(total / count * 1e3, 3)}


def _quantile(upto: Mapping[float, float], rank: float) -> float:
    below, before = 0.0, 0.0
    for bound in sorted(upto):
        if upto[bound] >= rank:
            # beyond the last bound nothing is known
            return (
                below if bound == float("inf") else below + (bound - below) * (rank - before) / (upto[bound] - before)
            )
        below, before = bound, upto[bound]
    return below
