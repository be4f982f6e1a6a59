"""filter, prioritize and bind on a real API server, without kube-scheduler in between: the figures are the extender's.

bind is measured beside a bare Binding POST by the same client library, one after the other.
"""

import random
import time
from pathlib import Path
from typing import Any

from cotenant.cluster import connect, writes
from e2e.bench.load import Client, a_pod, args, create, figures, memory_mib, timed
from e2e.cluster import ControlPlane
from e2e.programs import RunningExtender

_COUNTS = (20, 500, 5000)


def measure(cluster: ControlPlane, directory: Path, names: list[str], *, rounds: int) -> dict[str, Any]:
    """Start the extender on a full cluster and measure its start, its verbs and its memory."""
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
        result |= _bound(cluster, client, names, rounds)
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


def _bound(cluster: ControlPlane, client: Client, names: list[str], rounds: int) -> dict[str, Any]:
    """Bind through the extender and without it, in turn, and filter after each bind."""
    api = cluster.api()
    pods = [a_pod(f"{kind}-{n}", 8) for n in range(rounds) for kind in ("bind", "bare")]
    create(api, pods)
    uids = {seen["metadata"]["name"]: seen["metadata"]["uid"] for seen in api.list("Pod")}
    for pod in pods:
        pod["metadata"]["uid"] = uids[pod["metadata"]["name"]]
    asking = api.get("Pod", "asking")
    whole, sample = args(asking, names), args(asking, names[:500])
    seconds: dict[str, list[float]] = {"bind": [], "bare Binding POST": [], "all": [], "sample": []}
    with connect(str(cluster.kubeconfig("extender"))) as bare:
        for n in range(rounds):
            node = names[n * 31 % len(names)]
            seconds["bind"].append(client.bind(pods[2 * n], node))
            seconds["all"].append(client.post("filter", whole)[0])
            seconds["sample"].append(client.post("filter", sample)[0])
            started = time.perf_counter()
            metadata = pods[2 * n + 1]["metadata"]
            writes.bind(
                bare,
                namespace=metadata["namespace"],
                name=metadata["name"],
                uid=metadata["uid"],
                node=node,
                annotations={},
            )
            seconds["bare Binding POST"].append(time.perf_counter() - started)
    return {
        f"filter of {len(names)} names, each after a bind": figures(seconds["all"]),
        f"filter of {min(500, len(names))} names, the next": figures(seconds["sample"]),
        "bind": figures(seconds["bind"]),
        "bare Binding POST": figures(seconds["bare Binding POST"]),
    }
