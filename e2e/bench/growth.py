"""How start, memory and verbs grow with the cluster, on an API server that stands still."""

import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from e2e.bench.load import NAMES, Client, args, cpu_seconds, figures, memory_mib
from e2e.bench.still import waiting_pod
from e2e.processes import Program, free_ports

# nodes of 8 GPUs of 80 GiB, and pods of 8 GiB bound to them; 100 nodes have room for 8,000
SIZES = ((100, 0), (1_000, 10_000), (5_000, 0), (5_000, 10_000), (5_000, 50_000), (20_000, 0), (20_000, 50_000))
SHORT_SIZES = ((100, 0), (5_000, 10_000))
_COUNTS = (20, 500, 5_000)
_SHAPES = 40


def measure(directory: Path, sizes: Sequence[tuple[int, int]], *, rounds: int) -> dict[str, Any]:
    """Start an extender for each size, and measure it."""
    return {f"{nodes} nodes, {pods} pods": _size(directory, nodes, pods, rounds) for nodes, pods in sizes}


def _size(directory: Path, nodes: int, pods: int, rounds: int) -> dict[str, Any]:
    here = directory / f"{nodes}-{pods}"
    here.mkdir(parents=True)
    port, listen, serve = free_ports(3)
    command = [sys.executable, "-m", "e2e.bench.still", str(nodes), str(pods), str(port)]
    still = Program(command, log=here / "still.log")
    try:
        still.wait_ready(lambda: "still ready" in still.log.read_text(), timeout_s=300)
        started = time.monotonic()
        extender = Program(
            [
                Path(sys.executable).with_name("cotenant-extender"),
                f"--kubeconfig={_kubeconfig(here, port)}",
                f"--listen=127.0.0.1:{listen}",
                f"--serve=127.0.0.1:{serve}",
            ],
            log=here / "extender.log",
        )
        try:
            extender.wait_ready(lambda: "cotenant-extender ready" in extender.log.read_text())
            ready = {
                "ready_s": round(time.monotonic() - started, 2),
                "ready_cpu_s": round(cpu_seconds(extender.pid), 2),
            }
            verbs = _verbs(Client(f"127.0.0.1:{listen}"), nodes, rounds)
            return ready | verbs | {field: memory_mib(extender.pid, field) for field in ("VmRSS", "VmHWM")}
        finally:
            extender.stop()
    finally:
        still.kill()


def _kubeconfig(directory: Path, port: int) -> Path:
    config = {
        "clusters": [{"name": "still", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
        "users": [{"name": "bench", "user": {"token": "any"}}],
        "contexts": [{"name": "still", "context": {"cluster": "still", "user": "bench"}}],
        "current-context": "still",
    }
    path = directory / "kubeconfig"
    path.write_text(yaml.safe_dump(config))
    return path


def _verbs(client: Client, nodes: int, rounds: int) -> dict[str, Any]:
    """Filter candidates that differ from call to call, each after a pod was bound, as kube-scheduler does."""
    draw = random.Random(nodes)
    names = [f"bench-{n}" for n in range(nodes)]
    result: dict[str, Any] = {}
    serial = 0

    def bind_one() -> None:
        nonlocal serial
        serial += 1
        client.bind(waiting_pod(f"placed-{serial}"), draw.choice(names))

    for count in sorted({min(count, nodes) for count in _COUNTS}):
        for label, shapes in (("filter", 1), ("filter of new shapes,", _SHAPES)):
            calls = rounds if shapes == 1 else min(rounds, _SHAPES)
            seconds = []
            for n in range(calls):
                bind_one()
                asking = waiting_pod("asking")
                asking["spec"]["containers"][0]["resources"]["limits"][NAMES.gpu_mem] = str(1 + n % shapes)
                body = args(asking, draw.sample(names, count))
                seconds.append(client.post("filter", body)[0])
            result[f"{label} {count} names"] = figures(seconds)
    return result
