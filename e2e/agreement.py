"""What the API says of a container, what it sees itself, and what the kubelet keeps of it: these must agree (I2)."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from cotenant.contract import environment, units
from cotenant.contract import grant as grants
from cotenant.contract.grant import ContainerGrant, Role
from e2e.node import RealNode
from e2e.plugin import held
from e2e.processes import wait_until
from e2e.rest import Object

GPU_MEM = "cotenant.io/gpu-mem"
GRANT = "cotenant.io/grant"


def phase(seen: Object | None) -> str:
    return str(seen["status"].get("phase")) if seen else "gone"


def settled(seen: Object | None) -> bool:
    return phase(seen) in {"Running", "Failed"}


def printed(text: str) -> dict[str, str]:
    """Read the lines VARIABLE=value that a container wrote, the last one of each."""
    return {match[1]: match[2] for match in re.finditer(r"^([A-Z_]+)=(.*)$", text, re.MULTILINE)}


def has_started(seen: Object, name: str) -> bool:
    """Whether a container ran: a kubelet that is killed while it starts one leaves it with a StartError for good."""
    statuses = seen["status"].get("initContainerStatuses", []) + seen["status"].get("containerStatuses", [])
    state: Object = next((one["state"] for one in statuses if one["name"] == name), {})
    return "running" in state or state.get("terminated", {}).get("exitCode") == 0


def output(node: RealNode, seen: Object, name: str) -> dict[str, str]:
    """Read what a container printed; one that has started is waited for."""
    if has_started(seen, name):
        wait_until(lambda: printed(node.logs(seen, name)) != {}, timeout_s=20)
    return printed(node.logs(seen, name))


def expected(granted: ContainerGrant) -> dict[str, str]:
    """List what a container must see for its grant, by the contract."""
    return environment.injected(granted) | environment.informative(granted)


def disagreements(
    node: RealNode,
    pods: Sequence[Object],
    told: Callable[[RealNode, Object, str], Mapping[str, str]] = output,
) -> tuple[int, list[str]]:
    """Compare annotation, environment and PodResources of every container that started; count them.

    *told* gives the environment that a container saw, nothing for one that has not started.
    """
    listed = held(node.pod_resources_socket, GPU_MEM)
    compared, wrong = 0, []
    for seen in pods:
        grant = grants.decode(seen["metadata"]["annotations"][GRANT])
        for granted in grant.containers:
            where = f"{seen['metadata']['name']}/{granted.name}"
            got = told(node, seen, granted.name)
            if not got:
                continue  # it has not started
            compared += 1
            for variable, value in expected(granted).items():
                if got.get(variable) != value:
                    wrong.append(f"{where}: {variable} is {got.get(variable)!r}, granted {value!r}")
            if granted.role is Role.INIT:
                continue  # the kubelet does not list it
            ids = listed.get((seen["metadata"]["name"], granted.name), set())
            on = {device.split("-")[0] for device in ids}
            granted_on = {units.id_prefix(share.uuid) for share in granted.gpus}
            if on != granted_on or len(ids) != granted.units:
                wrong.append(f"{where}: {len(ids)} ids on {on}, granted {granted.units} on {granted_on}")
    return compared, wrong


def why_failed(seen: Object) -> str:
    """Say why a pod failed: the kubelet's message, or how its containers ended."""
    status = seen["status"]
    if "message" in status:
        return str(status["message"])[:160]
    containers = status.get("initContainerStatuses", []) + status.get("containerStatuses", [])
    return "; ".join(f"{c['name']}: {json.dumps(c['state'])[:200]}" for c in containers)


def wrong_guesses(logs: Sequence[Path], pods: Sequence[Object]) -> list[str]:
    """Hold the plugin's log of whom it answered against the truth: it may name no pod but the one that got the GPU."""
    by_uid = {one["metadata"]["uid"]: one for one in pods}
    wrong = []
    for log in logs:
        for line in log.read_text().splitlines():
            if not line.startswith("{"):
                continue
            said = json.loads(line)
            if said.get("event") != "container.starts":
                continue
            told = by_uid.get(said["pod_uid"])
            grant = grants.decode(told["metadata"]["annotations"][GRANT]) if told else None
            granted = grant.container(said["container"]) if grant else None
            if granted is None or said["gpu"] != ",".join(share.uuid for share in granted.gpus):
                wrong.append(line)
    return wrong
