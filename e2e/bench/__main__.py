"""`python -m e2e.bench`: all parts, or those named by --only."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from e2e import nodes
from e2e.bench import allocate, growth, herd, load, policies, report, throughput, verbs
from e2e.cluster import ControlPlane
from e2e.node import why_not

_PARTS = ("verbs", "policies", "allocate", "throughput", "herd", "growth")
_PLACEMENTS = ("advise", "decide")


@click.command()
@click.option("--only", multiple=True, type=click.Choice(_PARTS), help="Measure this part; may be given again.")
@click.option("--nodes", "node_count", default=5000, show_default=True, help="Nodes of 8 GPUs of 80 GiB.")
@click.option("--bound", default=20000, show_default=True, help="Pods bound before the extender starts.")
@click.option("--calls", default=300, show_default=True, help="Calls of each verb.")
@click.option("--pods", default=1000, show_default=True, help="Pods that each round, and the herd, places.")
@click.option("--rounds", default=5, show_default=True, help="Rounds of each way.")
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
    short: bool,
    out: Path,
) -> None:
    """Measure the extender and the plugin at scale."""
    if short:
        node_count, bound, calls, pods, rounds = 500, 2000, 100, 200, 1
    parts = only or _PARTS
    found: dict[str, Any] = {
        "machine": load.machine(),
        "nodes": node_count,
        "bound_pods": bound,
        "pods": pods,
        "rounds": rounds,
    }
    with tempfile.TemporaryDirectory(prefix="cotenant-bench-") as scratch:
        directory = Path(scratch)
        if {"verbs", "throughput"} & set(parts):
            with ControlPlane(directory / "control-plane") as cluster:
                nodes.register(cluster.api(), node_count, nodes.Shape(), prefix="bench")
                load.fill(cluster.api(), bound)
                if "verbs" in parts:
                    names = [f"bench-{n}" for n in range(node_count)]
                    found["verbs"] = verbs.measure(cluster, directory / "verbs", names, rounds=calls)
                    report.verbs(f"{node_count} nodes, {bound} pods bound", found["verbs"])
                if "throughput" in parts:
                    found["throughput"] = throughput.measure(cluster, directory, pods=pods, rounds=rounds)
                    report.throughput(found["throughput"])
                if wrong := load.over_committed(cluster.api()):
                    raise click.ClickException(f"{wrong} GPUs hold more than they have")
        if "policies" in parts:
            found["policies"] = policies.measure(node_count, bound, rounds=calls)
            report.verbs(f"choosing, {node_count} nodes, {bound} pods bound", found["policies"])
        if "allocate" in parts:
            found["allocate"] = _allocate(directory, pods=20 if short else 100)
        if "herd" in parts:
            found["herd"] = _herd(directory, pods=pods)
        if "growth" in parts:
            sizes = growth.SHORT_SIZES if short else growth.SIZES
            found["growth"] = growth.measure(directory / "growth", sizes, rounds=calls)
            report.sections("extender alone", found["growth"])
    report.write(out, "short" if short else "bench", found)
    report.plot(out, found.get("throughput", {}), found.get("growth", {}))


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
