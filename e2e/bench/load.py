"""What all parts measure with: pods, a client, and figures."""

import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median, quantiles

import click
from urllib3 import HTTPConnectionPool

from cotenant.cluster.exchange import Exchange
from cotenant.contract import grant as grants
from cotenant.contract import inventory as inventories
from cotenant.contract.environment import annotations
from cotenant.contract.grant import ContainerGrant, GPUShare, Grant, Isolation, IsolationRecord, Role
from cotenant.contract.inventory import Family, Mode
from cotenant.contract.names import Names
from cotenant.contract.units import GIB
from e2e.rest import Api, Object

NAMES = Names()
GPU_GIB = 80
CREATORS = 16
_TICKS = os.sysconf("SC_CLK_TCK")

Figures = dict[str, float]


class Client:
    """One kept connection to the extender, timed from the first byte sent to the last one read.

    It asks as the client of a bare Binding POST does (cotenant.cluster.exchange), so that what differs is not the
    client: http.client takes 0.3 ms more for an answer.
    """

    def __init__(self, address: str) -> None:
        """Ask the extender at HOST:PORT."""
        host, _, port = address.rpartition(":")
        self._exchange = Exchange(HTTPConnectionPool(host, int(port)), most_idle=1)

    def post(self, verb: str, body: bytes) -> tuple[float, bytes]:
        """Return the seconds that the verb took, and its answer."""
        started = time.perf_counter()
        answer = self._exchange.send("POST", f"/{verb}", {"Content-Type": "application/json"}, body, timeout=30)
        return time.perf_counter() - started, answer.body

    def bind(self, pod: Object, node: str) -> float:
        """Bind a pod and return the seconds that it took; raise RuntimeError where it was refused."""
        metadata = pod["metadata"]
        body = {
            "PodName": metadata["name"],
            "PodNamespace": metadata["namespace"],
            "PodUID": metadata["uid"],
            "Node": node,
        }
        seconds, answer = self.post("bind", json.dumps(body).encode())
        if json.loads(answer)["Error"]:
            raise RuntimeError(answer.decode())
        return seconds


def args(pod: Object, names: Sequence[str]) -> bytes:
    """Return the body of filter and prioritize as kube-scheduler sends it, without a space."""
    return json.dumps({"Pod": pod, "Nodes": None, "NodeNames": names}, separators=(",", ":")).encode()


def a_pod(name: str, units: int, *, bound_to: tuple[str, str] | None = None, resource: str = NAMES.gpu_mem) -> Object:
    """Return a pod that asks for so many units; bound to a node's GPU where those are given."""
    asking: Object = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {
            "containers": [{"name": "main", "image": "x", "resources": {"limits": {resource: str(units)}}}],
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


def for_scheduler(name: str, units: int, scheduler: str) -> Object:
    """Return a pod as admission would leave it: with the resource that makes the scheduler call the extender."""
    pod = a_pod(name, units)
    pod["spec"]["schedulerName"] = scheduler
    pod["spec"]["containers"][0]["resources"]["limits"][NAMES.managed] = "0"
    return pod


def create(api: Api, pods: Sequence[Object], *, label: str = "") -> None:
    """Create the pods, many at a time, behind a progress bar where there is a *label*."""
    with ThreadPoolExecutor(CREATORS) as pool:
        made = pool.map(api.create, pods)
        if not label:
            for _ in made:
                pass
            return
        with click.progressbar(made, length=len(pods), label=label) as shown:
            for _ in shown:
                pass


def remove(api: Api, names: Sequence[str]) -> None:
    """Delete the pods at once."""
    with ThreadPoolExecutor(CREATORS) as pool:
        list(pool.map(lambda name: api.delete("Pod", name, grace_s=0), names))


def fill(api: Api, pods: int, *, prefix: str = "bound") -> None:
    """Create so many bound pods of 8 units, evenly over all GPUs of all nodes."""
    gpus = [
        (node["metadata"]["name"], gpu.uuid)
        for node in api.list("Node")
        for gpu in inventories.decode(node["metadata"]["annotations"][NAMES.inventory]).gpus
    ]
    bound = [a_pod(f"{prefix}-{n}", 8, bound_to=gpus[n * 7919 % len(gpus)]) for n in range(pods)]
    create(api, bound, label=f"{pods} bound pods")


def over_committed(api: Api) -> int:
    """Count the GPUs that hold more than they have, by the API alone."""
    held: dict[str, int] = {}
    for seen in api.list("Pod"):
        text = seen["metadata"].get("annotations", {}).get(NAMES.grant)
        for uuid, amount in (grants.decode(text).charges() if text else {}).items():
            held[uuid] = held.get(uuid, 0) + amount
    return sum(amount > GPU_GIB * GIB for amount in held.values())


def memory_mib(pid: int, field: str) -> float:
    """Read a process's memory from /proc, in MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return round(int(status.split(f"{field}:")[1].split()[0]) / 1024, 1)


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process, of its threads that have ended too, in ticks of 10 ms (proc(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def timed(rounds: int, call: Callable[[int], float], pid: int | None) -> Figures:
    """Call so often; give median, 99th percentile and worst in milliseconds, and the CPU of process *pid* per call."""
    before = cpu_seconds(pid) if pid else 0.0
    found = figures([call(n) for n in range(rounds)])
    if pid:
        found["cpu_ms"] = round((cpu_seconds(pid) - before) * 1e3 / rounds, 3)
    return found


def figures(seconds: Sequence[float]) -> Figures:
    """Give median, 99th percentile and worst in milliseconds."""
    return {
        "p50_ms": round(median(seconds) * 1e3, 2),
        "p99_ms": round(quantiles(seconds, n=100)[98] * 1e3, 2),
        "max_ms": round(max(seconds) * 1e3, 2),
    }


def machine() -> str:
    """Say on what this was measured, and how busy it was."""
    return f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
