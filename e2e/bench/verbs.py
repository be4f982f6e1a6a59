"""filter, prioritize and bind on a real API server, without kube-scheduler in between: the figures are the extender's.

bind is measured beside a bare Binding POST by the same client, beside a POST of a Binding as long as ours, and beside
the bind of an extender that does nothing else on the same server, one after the other.
"""

import random
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cotenant.cluster import Cluster, connect, writes
from e2e.bench.load import NAMES, Client, a_pod, args, create, figures, memory_mib, remove, timed
from e2e.bench.throughput import extender_of
from e2e.cluster import ControlPlane
from e2e.programs import RunningExtender
from e2e.rest import Object

if TYPE_CHECKING:
    from collections.abc import Callable

_COUNTS = (20, 500, 5000)
# as long as ours
_DOMAIN = "example.com"
_ELSE = f"{_DOMAIN}/gpu-mem"


def measure(cluster: ControlPlane, directory: Path, node_count: int, *, rounds: int) -> dict[str, Any]:
    """Start the extender on a full cluster and measure its start, its verbs and its memory."""
    names = [f"bench-{n}" for n in range(node_count)]
    api = cluster.api()
    started = time.monotonic()
    with RunningExtender(cluster, directory) as extender:
        pid = extender.program.pid
        result: dict[str, Any] = {"ready_s": round(time.monotonic() - started, 2)}
        result["rss_mib_at_start"] = memory_mib(pid, "VmRSS")
        client = Client(extender.listen)
        asking = api.create(a_pod("asking", 8))
        for count in sorted({min(count, len(names)) for count in _COUNTS}):
            result |= _asked(client, asking, names[:count], pid, rounds)
        with extender_of(cluster, directory / "idle", "lean idle advise") as idle:
            result |= _bound(cluster, client, Client(idle.listen or ""), names, rounds)
        result["rss_mib"] = memory_mib(pid, "VmRSS")
        result["rss_mib_peak"] = memory_mib(pid, "VmHWM")
        return result


def _asked(client: Client, pod: Any, names: list[str], pid: int, rounds: int) -> dict[str, Any]:
    """Ask about the same names in the same order, and in another order each time, which no scheduler repeats."""
    same = args(pod, names)
    draw = random.Random(1)
    shuffled = [args(pod, draw.sample(names, len(names))) for _ in range(min(rounds, 100))]
    result = {}
    for verb in ("filter", "prioritize"):
        client.post(verb, same)  # the first judges every node
        label = f"{verb} of {len(names)} names"
        result[label] = timed(rounds, lambda _, verb=verb: client.post(verb, same)[0], pid)  # type: ignore[misc]
        result[f"{label}, in another order"] = timed(
            len(shuffled),
            lambda n, verb=verb: client.post(verb, shuffled[n])[0],  # type: ignore[misc]
            pid,
        )
    return result


def _bound(cluster: ControlPlane, client: Client, idle: Client, names: list[str], rounds: int) -> dict[str, Any]:
    """Bind through the extender and without it, in turn, and filter before each bind of the extender's."""
    api = cluster.api()
    kinds = ("bind", "idle", "bare", "alike")
    pods = [a_pod("first", 8)]
    for n in range(rounds):
        # What is bound around the extender asks for as much of another resource: of a pod of ours without a grant the
        # extender writes an Event, which would take its time from the next bind.
        pods += [a_pod(f"{kind}-{n}", 8, resource=NAMES.gpu_mem if kind == "bind" else _ELSE) for kind in kinds]
    create(api, pods)
    uids = {seen["metadata"]["name"]: seen["metadata"]["uid"] for seen in api.list("Pod")}
    for pod in pods:
        pod["metadata"]["uid"] = uids[pod["metadata"]["name"]]
    asking = api.get("Pod", "asking")
    whole, sample = args(asking, names), args(asking, names[:500])
    seconds: dict[str, list[float]] = {kind: [] for kind in (*kinds, "all", "sample")}
    client.bind(pods[0], names[0])
    # what a grant adds to a Binding, under names that nobody reads
    grant = {
        key.replace(NAMES.domain, _DOMAIN): value
        for key, value in api.get("Pod", "first")["metadata"]["annotations"].items()
    }
    with connect(str(cluster.kubeconfig("extender"))) as bare:
        ways: dict[str, Callable[[Object, str], float]] = {
            "bind": client.bind,
            "idle": idle.bind,
            "bare": partial(_bare, bare, {}),
            "alike": partial(_bare, bare, grant),
        }
        for n in range(rounds):
            node = names[n * 31 % len(names)]
            of_round = dict(zip(kinds, pods[1 + n * len(kinds) :], strict=False))
            # each round begins with another
            for kind in kinds[n % len(kinds) :] + kinds[: n % len(kinds)]:
                # as kube-scheduler does, which binds to no node that it has not just asked about
                asked = client.post("filter", whole)[0], client.post("filter", sample)[0]
                if kind == "bind":
                    seconds["all"].append(asked[0])
                    seconds["sample"].append(asked[1])
                seconds[kind].append(ways[kind](of_round[kind], node))
    remove(api, [pod["metadata"]["name"] for pod in pods])
    return {
        f"filter of {len(names)} names, after others' binds": figures(seconds["all"]),
        f"filter of {min(500, len(names))} names, the next": figures(seconds["sample"]),
        "bind": figures(seconds["bind"]),
        "bare Binding POST": figures(seconds["bare"]),
        "Binding POST as long as ours": figures(seconds["alike"]),
        "bind by a do-nothing extender": figures(seconds["idle"]),
    }


def _bare(cluster: Cluster, annotations: dict[str, str], pod: Object, node: str) -> float:
    metadata = pod["metadata"]
    started = time.perf_counter()
    writes.bind(
        cluster,
        namespace=metadata["namespace"],
        name=metadata["name"],
        uid=metadata["uid"],
        node=node,
        annotations=annotations,
    )
    return time.perf_counter() - started
