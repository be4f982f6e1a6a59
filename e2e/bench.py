"""Measure what the extender costs at scale, against a real API server: `make bench`.

Talks to the extender as kube-scheduler does (one kept connection, pods and names as JSON), without kube-scheduler in
between, so that the figures are the extender's own. Prints a table, writes bench-results/extender.json.
"""

import http.client
import json
import re
import ssl
import tempfile
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import click

from cotenant.contract import grant as grants
from cotenant.contract import inventory as inventories
from cotenant.contract.environment import annotations
from cotenant.contract.grant import ContainerGrant, GPUShare, Grant, Isolation, IsolationRecord, Role
from cotenant.contract.inventory import Family, Mode
from cotenant.contract.names import Names
from cotenant.contract.units import GIB
from e2e import nodes
from e2e.cluster import ControlPlane
from e2e.node import RealNode, container, pod, why_not
from e2e.programs import RunningExtender, RunningPlugin
from e2e.rest import Api, Object

NAMES = Names()
CREATORS = 16
BURST = 10


class Client:
    """One kept connection to the extender, timed from the first byte sent to the last one read."""

    def __init__(self, address: str) -> None:
        """Connect to HOST:PORT."""
        host, _, port = address.rpartition(":")
        self._connection = http.client.HTTPConnection(host, int(port), timeout=30)

    def post(self, verb: str, body: bytes) -> tuple[float, bytes]:
        """Return the seconds that the verb took, and its answer."""
        started = time.perf_counter()
        self._connection.request("POST", f"/{verb}", body, {"Content-Type": "application/json"})
        answer = self._connection.getresponse().read()
        return time.perf_counter() - started, answer


def a_pod(name: str, units: int, *, bound_to: tuple[str, str] | None = None) -> Object:
    """Return a pod that asks for so many units; bound to a node's GPU where those are given."""
    asking: Object = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {
            "containers": [{"name": "main", "image": "x", "resources": {"limits": {NAMES.gpu_mem: str(units)}}}],
            "automountServiceAccountToken": False,
        },
    }
    if bound_to is not None:
        node, uuid = bound_to
        share = ContainerGrant(
            name="main",
            role=Role.MAIN,
            family=Family.MEMORY,
            mode=Mode.TIME_SLICING,
            gpus=(GPUShare(uuid=uuid, bytes=units * GIB),),
            units=units,
            isolation=IsolationRecord(asked=Isolation.NONE, given=Isolation.NONE, enforced_by="nothing"),
        )
        asking["spec"]["nodeName"] = node
        asking["metadata"]["annotations"] = annotations(Grant(containers=(share,)), NAMES)
    return asking


def fill(api: Api, pods: int) -> None:
    """Create so many bound pods, evenly over all GPUs of all nodes."""
    gpus = [
        (node["metadata"]["name"], gpu.uuid)
        for node in api.list("Node")
        for gpu in inventories.decode(node["metadata"]["annotations"][NAMES.inventory]).gpus
    ]

    def create(n: int) -> None:
        api.create(a_pod(f"bound-{n}", 8, bound_to=gpus[n * 7919 % len(gpus)]))

    with (
        ThreadPoolExecutor(CREATORS) as pool,
        click.progressbar(pool.map(create, range(pods)), length=pods, label=f"{pods} bound pods") as created,
    ):
        for _ in created:
            pass


def memory_mib(pid: int, field: str) -> float:
    """Read a process's memory from /proc, in MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) / 1024


def timed(rounds: int, call: Callable[[int], float]) -> dict[str, float]:
    """Call so often, and give median, 99th percentile and worst in milliseconds."""
    seconds = [call(n) for n in range(rounds)]
    return {
        "p50_ms": round(median(seconds) * 1e3, 2),
        "p99_ms": round(quantiles(seconds, n=100)[98] * 1e3, 2),
        "max_ms": round(max(seconds) * 1e3, 2),
    }


def measure(cluster: ControlPlane, directory: Path, names: list[str], *, rounds: int) -> dict[str, Any]:
    """Start the extender on a full cluster and measure its start, its verbs and its memory."""
    api = cluster.api()
    started = time.monotonic()
    with RunningExtender(cluster, directory) as extender:
        result: dict[str, Any] = {"ready_s": round(time.monotonic() - started, 2)}
        result["rss_mib_at_start"] = round(memory_mib(extender.program.pid, "VmRSS"), 1)
        client = Client(extender.listen)
        asking = api.create(a_pod("asking", 8))

        def ask(verb: str, count: int) -> Callable[[int], float]:
            body = json.dumps({"Pod": asking, "Nodes": None, "NodeNames": names[:count]}).encode()
            client.post(verb, body)  # the first judges every node
            return lambda _: client.post(verb, body)[0]

        for verb in ("filter", "prioritize"):
            for count in (20, 500, 5000):
                if count <= len(names):
                    result[f"{verb} of {count} names"] = timed(rounds, ask(verb, count))

        body = json.dumps({"Pod": asking, "Nodes": None, "NodeNames": names}).encode()
        created = [api.create(a_pod(f"bind-{n}", 8)) for n in range(rounds)]
        bind_seconds = []

        def after_a_bind(n: int) -> float:
            target = {"PodName": f"bind-{n}", "PodNamespace": "default", "PodUID": created[n]["metadata"]["uid"]}
            seconds, answer = client.post("bind", json.dumps(target | {"Node": names[n * 31 % len(names)]}).encode())
            if json.loads(answer)["Error"]:
                raise RuntimeError(answer.decode())
            bind_seconds.append(seconds)
            return client.post("filter", body)[0]

        result[f"filter of {len(names)} names, each after a bind"] = timed(rounds, after_a_bind)
        result["bind"] = timed(rounds, lambda n: bind_seconds[n])
        result["rss_mib"] = round(memory_mib(extender.program.pid, "VmRSS"), 1)
        result["rss_mib_peak"] = round(memory_mib(extender.program.pid, "VmHWM"), 1)
        return result


def measure_allocate(cluster: ControlPlane, directory: Path, *, pods: int) -> dict[str, Any]:
    """Let a real kubelet admit pods, and read its own histogram of our Allocate."""
    api = cluster.api()
    with RealNode(cluster, directory / "node") as node:
        plugin = RunningPlugin(
            cluster,
            directory / "plugin",
            node=node.name,
            pod_resources=node.pod_resources_socket,
            gpus="gpus: [{model: NVIDIA H200, memory: 141GiB, count: 8}]",
        )
        with plugin:
            gpus = inventories.decode(api.get("Node", node.name)["metadata"]["annotations"][NAMES.inventory]).gpus
            for first in range(0, pods, BURST):
                burst = range(first, min(pods, first + BURST))
                for n in burst:
                    asking = a_pod(f"allocate-{n}", 8, bound_to=(node.name, gpus[n % len(gpus)].uuid))
                    runnable = pod(asking["metadata"]["name"], container("main", limits={NAMES.gpu_mem: 8}))
                    api.create(runnable)
                    api.bind(asking["metadata"]["name"], node.name, annotations=asking["metadata"]["annotations"])
                # so that the plugin is measured, and not the start of a hundred containers on a few cores
                for n in burst:
                    api.wait("Pod", f"allocate-{n}", is_running)
            seconds = allocate_seconds(node)
            for n in range(pods):
                api.delete("Pod", f"allocate-{n}")
    return {"calls of Allocate": seconds[float("inf")], "of them within 50 ms": seconds[0.05]}


def is_running(seen: Object | None) -> bool:
    return seen is not None and seen["status"].get("phase") == "Running"


def allocate_seconds(node: RealNode) -> dict[float, int]:
    """Read how many Allocate calls for our resource took at most so many seconds, by the kubelet's metrics."""
    unverified = ssl._create_unverified_context()
    with urllib.request.urlopen(f"https://127.0.0.1:{node.port}/metrics", timeout=10, context=unverified) as answer:
        text = answer.read().decode()
    pattern = (
        rf'^kubelet_device_plugin_alloc_duration_seconds_bucket{{resource_name="{NAMES.gpu_mem}",le="(.*?)"}} (\d+)'
    )
    return {float(bound): int(count) for bound, count in re.findall(pattern, text, re.MULTILINE)}


def check(api: Api) -> None:
    """Be sure that what was measured is right: no GPU holds more than it has."""
    held: dict[str, int] = {}
    for seen in api.list("Pod"):
        text = seen["metadata"].get("annotations", {}).get(NAMES.grant)
        for uuid, amount in (grants.decode(text).charges() if text else {}).items():
            held[uuid] = held.get(uuid, 0) + amount
    most = max(held.values(), default=0)
    if most > 80 * GIB:
        raise RuntimeError(f"a GPU of 80 GiB holds {most / GIB:.0f} GiB")


@click.command()
@click.option("--nodes", "node_count", default=5000, show_default=True, help="Nodes of 8 GPUs of 80 GiB.")
@click.option("--pods", default=20000, show_default=True, help="Pods bound before the extender starts.")
@click.option("--rounds", default=300, show_default=True, help="Calls of each kind.")
@click.option(
    "--out", default="bench-results", show_default=True, type=click.Path(path_type=Path), help="For the JSON."
)
def main(*, node_count: int, pods: int, rounds: int, out: Path) -> None:
    """Measure the extender at scale."""
    with tempfile.TemporaryDirectory(prefix="cotenant-bench-") as scratch:
        directory = Path(scratch)
        with ControlPlane(directory / "control-plane") as cluster:
            api = cluster.api()
            nodes.register(api, node_count, nodes.Shape(), prefix="bench")
            fill(api, pods)
            result = measure(cluster, directory / "extender", [f"bench-{n}" for n in range(node_count)], rounds=rounds)
            check(api)
        if reason := why_not():
            click.echo(f"Allocate is not measured: {reason}")
        else:
            with ControlPlane(directory / "second-control-plane") as cluster:
                result |= measure_allocate(cluster, directory, pods=100)
    report: dict[str, Any] = {
        "nodes": node_count,
        "gpus": node_count * 8,
        "bound_pods": pods,
        "rounds": rounds,
    } | result
    click.echo(f"\n{'at ' + str(node_count) + ' nodes, ' + str(pods) + ' bound pods':52}{'p50':>8}{'p99':>8}{'max':>8}")
    for name, figure in result.items():
        if isinstance(figure, dict):
            click.echo(f"{name:52}{figure['p50_ms']:8.2f}{figure['p99_ms']:8.2f}{figure['max_ms']:8.2f}  ms")
        else:
            click.echo(f"{name:52}{figure:8.1f}")
    out.mkdir(parents=True, exist_ok=True)
    target = out / "extender.json"
    target.write_text(json.dumps(report, indent=2) + "\n")
    click.echo(f"\nwritten to {target}")


if __name__ == "__main__":
    main()
