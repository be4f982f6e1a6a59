"""Allocate as a real kubelet sees it: its own histogram, while it admits pods in bursts."""

import re
import ssl
import urllib.request
from pathlib import Path
from typing import Any

from cotenant.contract import inventory as inventories
from e2e.bench.load import NAMES, a_pod
from e2e.cluster import ControlPlane
from e2e.node import RealNode, container, pod
from e2e.programs import RunningPlugin
from e2e.rest import Object

_BURST = 10
_GPUS = "gpus: [{model: NVIDIA H200, memory: 141GiB, count: 8}]"


def measure(cluster: ControlPlane, directory: Path, *, pods: int) -> dict[str, Any]:
    """Let a real kubelet admit pods, burst after burst, and read what Allocate took it."""
    api = cluster.api()
    with RealNode(cluster, directory / "node") as node:
        plugin = RunningPlugin(node, directory / "plugin", gpus=_GPUS)
        with plugin:
            gpus = inventories.decode(api.get("Node", node.name)["metadata"]["annotations"][NAMES.inventory]).gpus
            for first in range(0, pods, _BURST):
                burst = range(first, min(pods, first + _BURST))
                for n in burst:
                    bound = a_pod(f"allocate-{n}", 8, bound_to=(node.name, gpus[n % len(gpus)].uuid))
                    api.create(pod(f"allocate-{n}", container("main", limits={NAMES.gpu_mem: 8})))
                    api.bind(f"allocate-{n}", node.name, annotations=bound["metadata"]["annotations"])
                # so that the plugin is measured, and not the start of a hundred containers on a few cores
                for n in burst:
                    api.wait("Pod", f"allocate-{n}", _is_running)
            within = _histogram(node)
            for n in range(pods):
                api.delete("Pod", f"allocate-{n}")
    calls = within.pop(float("inf"))
    return {"Allocate, calls": calls} | {
        f"Allocate, within {bound * 1e3:g} ms": count for bound, count in within.items() if bound <= 0.1
    }


def _is_running(seen: Object | None) -> bool:
    return seen is not None and seen["status"].get("phase") == "Running"


def _histogram(node: RealNode) -> dict[float, int]:
    """Read how many Allocate calls for our resource took at most so many seconds, by the kubelet's metrics."""
    unverified = ssl._create_unverified_context()
    with urllib.request.urlopen(f"https://127.0.0.1:{node.port}/metrics", timeout=10, context=unverified) as answer:
        text = answer.read().decode()
    pattern = (
        rf'^kubelet_device_plugin_alloc_duration_seconds_bucket{{resource_name="{NAMES.gpu_mem}",le="(.*?)"}} (\d+)'
    )
    return {float(bound): int(count) for bound, count in re.findall(pattern, text, re.MULTILINE)}
