"""What was measured, for people (tables), programs (JSON) and READMEs (a plot)."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import comb
from pathlib import Path
from statistics import median
from typing import Any

import click

from e2e.bench.throughput import FLOORS, WAYS, Round

_NAME = 52
# what five rounds can give: 1 - 2 / 32
_SURE = 0.93


def verbs(title: str, found: Mapping[str, Any]) -> None:
    """Print figures by name: rows of milliseconds, and single numbers."""
    click.echo(f"\n{title:{_NAME}}{'p50':>9}{'p99':>9}{'max':>9}{'CPU':>9}  ms")
    for name, figure in found.items():
        if isinstance(figure, Mapping):
            values = (figure.get(key) for key in ("p50_ms", "p99_ms", "max_ms", "cpu_ms"))
            click.echo(f"{name:{_NAME}}" + "".join(f"{value:9.2f}" if value is not None else "" for value in values))
        else:
            click.echo(f"{name:{_NAME}}{figure:9.2f}")
    for floor in ("bare Binding POST", "Binding POST as long as ours", "bind by a do-nothing extender"):
        if floor in found:
            ratio = found["bind"]["p50_ms"] / found[floor]["p50_ms"]
            click.echo(f"{f'bind / {floor}, by the medians':{_NAME}}{ratio:9.2f}")


def sections(title: str, found: Mapping[str, Mapping[str, Any]]) -> None:
    """Print one block of figures for each size or placement."""
    for name, figures in found.items():
        verbs(f"{title}: {name}", figures)


def slope(found: Mapping[str, Mapping[str, Any]]) -> None:
    """Print what the same question costs in the largest cluster, in times of the smallest."""
    smallest, *_, largest = found
    ratio = found[largest]["filter 20 names"]["p50_ms"] / found[smallest]["filter 20 names"]["p50_ms"]
    click.echo(f"filter of 20 names, {largest} / {smallest}, by the medians: {ratio:.2f}")


def throughput(found: Mapping[str, Sequence[Round]]) -> None:
    """Print the medians of each way, and its ratios to its floors within the same round, with least and most."""
    head = (
        "pods/s",
        "least",
        "most",
        "of none",
        "writes",
        "others",
        "CPU ms",
        "sched CPU",
        "API CPU",
        "etcd CPU",
        "MiB",
    )
    click.echo(f"\n{'throughput, medians of rounds':30}" + "".join(f"{word:>10}" for word in head))
    of_cpu = (f"{one}_cpu_ms_per_pod" for one in ("extender", "scheduler", "api_server", "etcd"))
    fields = ("writes_per_pod", "other_writes_per_pod", *of_cpu)
    for way in found:
        rates = [one.pods_per_s for one in found[way]]
        row = [f"{median(rates):10.0f}{min(rates):10.0f}{max(rates):10.0f}"]
        row.append(f"{median(ratios(found, way, WAYS[0])):10.2f}" if WAYS[0] in found else f"{'-':>10}")
        row += [f"{median(getattr(one, field) for one in found[way]):10.2f}" for field in fields]
        row.append(f"{median(one.extender_mib for one in found[way]):10.0f}")
        click.echo(f"{way:30}{''.join(row)}")
    click.echo(f"\n{'pods/s, within the same round':44}{'median':>10}{'from':>10}{'to':>10}{'holds it with':>16}")
    for way, floor in ((way, floor) for way, floors in FLOORS.items() for floor in floors):
        if {way, floor} <= found.keys():
            of_floor = ratios(found, way, floor)
            low, high, sure = interval(of_floor)
            click.echo(f"{f'{way} / {floor}':44}{median(of_floor):10.3f}{low:10.3f}{high:10.3f}{sure:15.0%}")
    _latencies(found)


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Give the narrowest of the values' own intervals that holds the true median with 93 %, or all, and how sure.

    The true median is below all of n values, or above them, with 2 to the -n each (order statistics).
    """
    ordered, count = sorted(values), len(values)

    def sure(left_out: int) -> float:
        return 1 - 2 * sum(comb(count, n) for n in range(left_out + 1)) * 0.5**count

    left_out = max((n for n in range((count + 1) // 2) if sure(n) >= _SURE), default=0)
    return ordered[left_out], ordered[-1 - left_out], sure(left_out)


def _latencies(found: Mapping[str, Sequence[Round]]) -> None:
    """Print what a pod waits for, by the histograms of kube-scheduler and of the extender."""
    click.echo(f"\n{'by histograms, medians of rounds':44}{'p50':>10}{'p99':>10}{'mean':>10}  ms")
    for way in found:
        parts = {"kube-scheduler, until a node is chosen": [one.algorithm for one in found[way]]}
        parts["kube-scheduler, until bound"] = [one.attempt for one in found[way]]
        for verb in found[way][0].verbs:
            parts[f"extender, {verb}"] = [one.verbs.get(verb, {}) for one in found[way]]
        for part, rounds in parts.items():
            values = (median(one[key] for one in rounds if one) for key in ("p50_ms", "p99_ms", "mean_ms"))
            click.echo(f"{f'{way}: {part}'[:60]:60}" + "".join(f"{value:10.2f}" for value in values))


def ratios(found: Mapping[str, Sequence[Round]], way: str, floor: str) -> list[float]:
    """Divide within each round, so that what else the machine does falls on both."""
    return [a.pods_per_s / b.pods_per_s for a, b in zip(found[way], found[floor], strict=True)]


def keep(out: Path, name: str, part: str, figures: Any) -> dict[str, Any]:
    """Write one part's figures beside those of the other parts that lie there already, and give them all."""
    out.mkdir(parents=True, exist_ok=True)
    target = out / f"{name}.json"
    kept: dict[str, Any] = json.loads(target.read_text()) if target.exists() else {}
    kept[part] = figures
    target.write_text(json.dumps(kept, indent=2, default=asdict) + "\n")
    click.echo(f"{part} written to {target}")
    loaded: dict[str, Any] = json.loads(target.read_text())
    return loaded


def plot(out: Path, name: str, kept: Mapping[str, Any]) -> None:
    """Draw pods a second by way, and filter, memory and start by size, from what keep() has kept."""
    import matplotlib as mpl  # noqa: PLC0415 - half a second, for whoever draws

    rounds, growth = (kept.get(part, {}).get("found", {}) for part in ("throughput", "growth"))
    if not (rounds or growth):
        return
    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    # what was not measured has no place
    wide = bool(rounds) + 2 * bool(growth)
    figure, (grid,) = plt.subplots(1, wide, figsize=(5 * wide, 4.5), layout="constrained", squeeze=False)
    axes = iter(grid)
    if rounds:
        left = next(axes)
        rates = [[one["pods_per_s"] for one in of_way] for of_way in rounds.values()]
        middles = [median(one) for one in rates]
        reach = [
            [mid - min(one) for mid, one in zip(middles, rates, strict=True)],
            [max(one) - mid for mid, one in zip(middles, rates, strict=True)],
        ]
        colours = ["tab:blue" if way in FLOORS else "0.75" for way in rounds]
        left.bar([way.replace(" ", "\n") for way in rounds], middles, yerr=reach, color=colours, capsize=4)
        left.tick_params(axis="x", labelsize=7)
        left.set(ylabel="pods/s", title="Pods placed a second (median, least, most)")
    if growth:
        middle, right = axes
        labels = [name.replace(", ", "\n") for name in growth]
        for verb in ("filter 20 names", "filter 500 names", "filter 5000 names"):
            shown = [
                (label, one[verb]["p50_ms"]) for label, one in zip(labels, growth.values(), strict=True) if verb in one
            ]
            middle.plot([label for label, _ in shown], [value for _, value in shown], marker="o", label=verb)
        middle.set(ylabel="ms", title="filter, each after a bind (p50)", ylim=(0, None))
        middle.legend()
        middle.tick_params(axis="x", labelsize=7)
        right.bar(labels, [one["VmHWM"] for one in growth.values()], color="tab:blue")
        right.set(ylabel="MiB", title="Most memory of the extender, and start (s)")
        right.tick_params(axis="x", labelsize=7)
        for n, one in enumerate(growth.values()):
            right.text(n, one["VmHWM"], f"{one['ready_s']:.1f} s", ha="center", va="bottom")
    target = out / f"{name}.png"
    figure.savefig(target, dpi=110)
    click.echo(f"drawn in {target}")
