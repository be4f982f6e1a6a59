"""The openb trace, its published results and the published runs' order, where they lie beside the project."""

import csv
from functools import cache
from pathlib import Path

import pytest

from cotenant.simulator.replay import Run, replay
from cotenant.simulator.report import Report, report
from cotenant.simulator.trace import read_nodes, read_order, read_pods

OPENB = Path(__file__).parents[3] / "shared" / "data" / "openb"
TRACES = ("default", "cpu100", "gpushare40", "gpuspec10", "multigpu20")
SEEDS = (42, 43, 44, 45, 46)
# our names of the policies whose published runs can be replayed: the random one cannot
PUBLISHED = {
    "dot-product": "02-DotProd",
    "clustering": "03-GpuClustering",
    "packing": "04-GpuPacking",
    "best-fit": "05-BestFit",
    "fgd": "06-FGD",
}

needs_openb = pytest.mark.skipif(
    not OPENB.is_dir(), reason="the openb trace is not here: it belongs into ../shared/data/openb, beside the project"
)


def run(trace: str, seed: int, policy: str, *, sample: bool = False) -> Run:
    nodes = read_nodes(OPENB / "csv" / "openb_node_list_gpu_node.csv")
    pods = read_pods(OPENB / "csv" / f"openb_pod_list_{trace}.csv", nodes)
    order = read_order(OPENB / "sequences" / f"{trace}_{seed}.txt", nodes=len(nodes), pods=len(pods))
    return replay(nodes, pods, order, policy, sample=sample)


def figures(trace: str, seed: int, policy: str) -> Report:
    return report(run(trace, seed, policy), policy=policy, seed=seed)


@cache
def published(measure: str) -> dict[tuple[str, str, int], dict[str, float]]:
    """Read the published curves: by trace, policy and seed, percent by arrived percent."""
    with (OPENB / "published" / f"analysis_{measure}_discrete.csv").open() as file:
        return {
            (row["workload"].removeprefix("openb_pod_list_"), row["sc_policy"], int(row["seed"])): {
                column: float(value) for column, value in row.items() if column.isdigit() and value
            }
            for row in csv.DictReader(file)
        }


def deviation(found: Report, trace: str) -> float:
    """Find the most that any column of a report is off the published one, in points."""
    off = []
    for measure, values in (
        ("allo", found.allocation),
        ("frag", found.fragmentation),
        ("frag_ratio", found.fragmentation_ratio),
    ):
        curve = published(measure)[trace, PUBLISHED[found.policy], found.seed]
        assert 131 == len(curve)  # 0 to 130
        off += [abs(values[column] - value) for column, value in curve.items()]
    return max(off)
