"""Start, memory and filter at the largest sizes, on a real API server that is filled further."""

import random
import time
from pathlib import Path
from typing import Any

from e2e import nodes
from e2e.bench import load, report
from e2e.bench.load import Client, a_pod, args, cpu_seconds, figures, memory_mib
from e2e.cluster import ControlPlane
from e2e.programs import RunningExtender
from e2e.rest import Object

_COUNTS = (20, 500, 5_000)
_ROUNDS = 200


def measure(cluster: ControlPlane, directory: Path, *, nodes_: int, pods: int) -> dict[str, Any]:
    """Fill the cluster to *pods* bound pods and measure, and then again with *nodes_* nodes."""
    api = cluster.api()
    load.fill(api, pods - len(api.list("Pod")), prefix="more")
    asking = api.create(a_pod("asking-large", 8))
    found = _size(cluster, directory / "fewer", asking)
    nodes.register(api, nodes_ - len(api.list("Node")), nodes.Shape(), prefix="more")
    found |= _size(cluster, directory / "more", asking)
    report.sections("on the real API server", found)
    return found


def _size(cluster: ControlPlane, directory: Path, asking: Object) -> dict[str, Any]:
    names = [seen["metadata"]["name"] for seen in cluster.api().list("Node")]
    draw = random.Random(len(names))
    started = time.monotonic()
    with RunningExtender(cluster, directory) as extender:
        pid = extender.program.pid
        result: dict[str, Any] = {
            "ready_s": round(time.monotonic() - started, 2),
            "ready_cpu_s": round(cpu_seconds(pid), 2),
        }
        client = Client(extender.listen)
        for count in sorted({min(count, len(names)) for count in _COUNTS}):
            asked = [args(asking, draw.sample(names, count)) for _ in range(_ROUNDS)]
            client.post("filter", asked[0])
            result[f"filter of {count} names, in another order"] = figures([client.post("filter", b)[0] for b in asked])
        result |= {field: memory_mib(pid, field) for field in ("VmRSS", "VmHWM")}
    return {f"{len(names)} nodes, {len(cluster.api().list('Pod'))} pods": result}
