"""More pods at once than there is room for: nothing over-committed, hardly a bind in vain, and all that fit bound.

Four nodes of five are full, but not to kube-scheduler: each of their GPUs of 80 GiB holds one pod of 60, so that 20 are
left of every GPU, 160 of a node, and none can take a pod of 30. Two such pods fit on a GPU of the other nodes. So it is
the extender alone that tells full nodes from others, and it is asked about the next pod while the last one's Binding is
under way. The calm case are as many pods as fit.
"""

import re
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from cotenant.contract import inventory as inventories
from e2e import nodes
from e2e.bench import load
from e2e.bench.throughput import Bindings, scheduler_config
from e2e.cluster import ControlPlane
from e2e.programs import RunningExtender
from e2e.rest import Api

_UNITS, _FULL_UNITS = 30, 60
_PER_NODE = 8 * (load.GPU_GIB // _UNITS)
# after everything that fits is bound, nothing more may be
_QUIET_S = 5.0
_FREED = 10


@dataclass(frozen=True)
class _Run:
    """What happened to the pods of one run."""

    seconds: float
    bound: int
    refused: int
    in_vain: int
    over_committed: int
    # how often kube-scheduler tried a pod, until all that fit were bound
    attempts: int
    woken_s: list[float]


def prepare(api: Api, *, pods: int) -> None:
    """Make a cluster that has room for four fifths of *pods*, and four times as many nodes that have none."""
    free = -(-pods * 4 // 5 // _PER_NODE)
    nodes.register(api, free, nodes.Shape(), prefix="free")
    nodes.register(api, 4 * free, nodes.Shape(), prefix="full")
    full = [
        load.a_pod(
            f"tenant-{node['metadata']['name']}-{gpu.index}", _FULL_UNITS, bound_to=(node["metadata"]["name"], gpu.uuid)
        )
        for node in api.list("Node", labels=f"{nodes.LABEL}=full")
        for gpu in inventories.decode(node["metadata"]["annotations"][load.NAMES.inventory]).gpus
    ]
    load.create(api, full, label=f"{len(full)} tenants of full nodes")


def measure(cluster: ControlPlane, directory: Path, *, pods: int, placement: str) -> dict[str, Any]:
    """Let the calm case come, and then the herd, onto a cluster made by prepare()."""
    room = -(-pods * 4 // 5 // _PER_NODE) * _PER_NODE
    calm = _run(cluster, directory / f"calm-{placement}", f"calm-{placement}", placement, pods=room, room=room)
    herd = _run(cluster, directory / f"herd-{placement}", f"herd-{placement}", placement, pods=pods, room=room)
    if herd.over_committed or herd.bound != room + _FREED * (pods > room):
        raise RuntimeError(f"{herd.bound} pods were bound where {room} fit, {herd.over_committed} GPUs over-committed")
    return {
        f"herd of {pods}, {placement}": {
            "fit": room,
            "calm_s": calm.seconds,
            "herd_s": herd.seconds,
            "herd / calm": round(herd.seconds / calm.seconds, 2),
            "binds": herd.bound + herd.in_vain,
            "binds_in_vain": herd.in_vain,
            "binds_in_vain_percent": round(100 * herd.in_vain / (herd.bound + herd.in_vain), 2),
            "binds_in_vain_percent, calm": round(100 * calm.in_vain / (calm.bound + calm.in_vain), 2),
            "attempts_per_pod_bound": round(herd.attempts / herd.bound, 2),
            "bindings_refused": herd.refused,
            "over_committed": herd.over_committed,
            "freed_until_bound_s": median(herd.woken_s) if herd.woken_s else 0.0,
            "freed_until_bound_max_s": max(herd.woken_s, default=0.0),
        }
    }


def _run(cluster: ControlPlane, directory: Path, name: str, placement: str, *, pods: int, room: int) -> _Run:
    api = cluster.api()
    names = [f"{name}-{n}" for n in range(pods)]
    with RunningExtender(cluster, directory, flags=[f"--placement={placement}"]) as extender:
        scheduler = cluster.start_scheduler(scheduler_config(name, extender.listen))
        bindings = Bindings(cluster, f"{name}-")
        began = time.time()
        load.create(api, [load.for_scheduler(one, _UNITS, name) for one in names])
        bound = bindings.wait_for(min(room, pods))
        seconds = bound[-1].at.timestamp() - began
        attempts = sum(
            map(float, re.findall(r"^scheduler_schedule_attempts_total{.*?} (\S+)", scheduler.metrics(), re.MULTILINE))
        )
        woken = []
        if pods > room:
            time.sleep(_QUIET_S)
            woken = [_free_one(api, bindings, n) for n in range(_FREED)]
        refused = sum(w.subresource == "binding" and w.code >= 300 for w in bindings.writes())
        result = _Run(
            seconds=round(seconds, 2),
            bound=len(bindings.read()),
            refused=refused,
            in_vain=_in_vain(extender.serve),
            over_committed=load.over_committed(api),
            attempts=int(attempts),
            woken_s=woken,
        )
        cluster.stop_scheduler(scheduler)
    load.remove(api, names)
    return result


def _free_one(api: Api, bindings: Bindings, n: int) -> float:
    """Delete one that is bound, and return the seconds until one that waits has its place."""
    bound = bindings.read()
    freed = time.time()
    api.delete("Pod", bound[n].name, grace_s=0)
    return round(bindings.wait_for(len(bound) + 1)[-1].at.timestamp() - freed, 3)


def _in_vain(serve: str) -> int:
    """Count the binds that the extender refused or that failed, by its own metrics."""
    with urllib.request.urlopen(f"http://{serve}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    return sum(
        int(float(count))
        for outcome, count in re.findall(r'^cotenant_bind_total{outcome="(.*?)"} (\S+)', text, re.MULTILINE)
        if outcome != "ok"
    )
