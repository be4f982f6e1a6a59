"""`python -m e2e.bench`: all parts, or those named by --only.

Each part's figures are written when it ends, beside those of parts measured before; so a run that was ended is gone on
with by naming the parts that are missing.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from e2e import nodes
from e2e.bench import allocate, growth, herd, large, load, policies, report, throughput, verbs
from e2e.cluster import ControlPlane
from e2e.node import why_not

_PARTS = ("verbs", "throughput", "large", "policies", "herd", "growth", "allocate")
_PLACEMENTS = ("advise", "decide")
_LARGE_PODS, _LARGE_NODES = 50_000, 20_000


@click.command()
@click.option("--only", multiple=True, type=click.Choice(_PARTS), help="Measure this part; may be given again.")
@click.option("--nodes", "node_count", default=5000, show_default=True, help="Nodes of 8 GPUs of 80 GiB.")
@click.option("--bound", default=20000, show_default=True, help="Pods bound before the extender starts.")
@click.option("--calls", default=300, show_default=True, help="Calls of each verb.")
@click.option("--pods", default=500, show_default=True, help="Pods that each round places; the herd has twice as many.")
@click.option("--rounds", default=5, show_default=True, help="Rounds of each way.")
@click.option("--way", multiple=True, type=click.Choice(throughput.WAYS), help="Measure throughput in this way alone.")
@click.option("--short", is_flag=True, help="Smaller sizes and one round: shows that all parts work, and little else.")
@click.option(
    "--out", default="bench-results", show_default=True, type=click.Path(path_type=Path), help="For JSON and plot."
)
def main(
    *,
    only: Sequence[str],
    node_count: int,
    bound: int,
    calls: int,
    pods: int,
    rounds: int,
    way: Sequence[str],
    short: bool,
    out: Path,
) -> None:
    """Measure the extender and the plugin at scale."""
    name = "bench"
    large_pods, large_nodes = _LARGE_PODS, _LARGE_NODES
    if short:
        node_count, bound, calls, pods, rounds, name = 500, 2000, 100, 200, 1, "short"
        large_pods, large_nodes = 4000, 1000
    parts = only or _PARTS

    def keep(part: str, found: Mapping[str, Any]) -> dict[str, Any]:
        sizes = {"nodes": node_count, "bound_pods": bound, "pods": pods, "rounds": rounds}
        return report.keep(out, name, part, {"machine": load.machine()} | sizes | {"found": found})

    with tempfile.TemporaryDirectory(prefix="cotenant-bench-") as scratch:
        directory = Path(scratch)
        filled = {"verbs", "throughput", "large"} & set(parts)
        if filled:
            with ControlPlane(directory / "control-plane") as cluster:
                nodes.register(cluster.api(), node_count, nodes.Shape(), prefix="bench")
                load.fill(cluster.api(), bound)
                if "verbs" in filled:
                    found = verbs.measure(cluster, directory / "verbs", node_count, rounds=calls)
                    report.verbs(f"{node_count} nodes, {bound} pods bound", found)
                    keep("verbs", found)
                if "throughput" in filled:
                    rounds_of = throughput.measure(
                        cluster, directory, pods=pods, rounds=rounds, ways=way or throughput.WAYS
                    )
                    report.throughput(rounds_of)
                    keep("throughput", rounds_of)
                if "large" in filled:
                    keep("large", large.measure(cluster, directory / "large", nodes_=large_nodes, pods=large_pods))
                if wrong := load.over_committed(cluster.api()):
                    raise click.ClickException(f"{wrong} GPUs hold more than they have")
        alone = {
            "policies": lambda: _policies(node_count, bound, calls=calls),
            "herd": lambda: _herd(directory, pods=2 * pods),
            "growth": lambda: _growth(directory, short=short, calls=calls),
            "allocate": lambda: _allocate(directory, pods=20 if short else 100),
        }
        for part in (part for part in alone if part in parts):
            keep(part, alone[part]())
    report.plot(out, name, json.loads((out / f"{name}.json").read_text()))


def _policies(node_count: int, bound: int, *, calls: int) -> dict[str, Any]:
    found = policies.measure(node_count, bound, rounds=calls)
    report.verbs(f"choosing, {node_count} nodes, {bound} pods bound", found)
    return found


def _growth(directory: Path, *, short: bool, calls: int) -> dict[str, Any]:
    found = growth.measure(directory / "growth", growth.SHORT_SIZES if short else growth.SIZES, rounds=calls)
    report.sections("extender alone", found)
    report.slope(found)
    return found


def _allocate(directory: Path, *, pods: int) -> dict[str, Any]:
    if reason := why_not():
        click.echo(f"Allocate is not measured: {reason}")
        return {}
    with ControlPlane(directory / "kubelet-control-plane") as cluster:
        found = allocate.measure(cluster, directory, pods=pods)
    report.verbs("Allocate, by the kubelet's histogram", found)
    return found


def _herd(directory: Path, *, pods: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with ControlPlane(directory / "herd-control-plane") as cluster:
        herd.prepare(cluster.api(), pods=pods)
        for placement in _PLACEMENTS:
            found |= herd.measure(cluster, directory / "herd", pods=pods, placement=placement)
    report.sections("herd", found)
    return found


if __name__ == "__main__":
    main()
