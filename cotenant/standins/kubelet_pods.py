"""Pods as the stand-in kubelet sees them: their containers in order, what they ask for and start with."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import msgspec

from cotenant.contract.pods import Metadata
from cotenant.contract.units import parse_quantity
from device_plugin.api import deviceplugin_pb2 as pb

Role = Literal["init", "sidecar", "main"]

_FIELD = re.compile(r"metadata\.(?P<map>annotations|labels)\['(?P<key>[^']*)'\]")


class KubeletPod(msgspec.Struct, frozen=True):
    """Hold a pod as the API server has it."""

    metadata: Metadata
    spec: dict[str, Any]
    status: dict[str, Any] = {}

    @property
    def containers(self) -> list[tuple[dict[str, Any], Role]]:
        """List the containers in the order the kubelet admits and starts them."""
        first: list[tuple[dict[str, Any], Role]] = [
            (c, "sidecar" if c.get("restartPolicy") == "Always" else "init")
            for c in self.spec.get("initContainers") or ()
        ]
        return [*first, *((c, "main") for c in self.spec.get("containers") or ())]


# convert() has looked through the type by this, too, before there are threads (contract/versions.py)
_decoder = msgspec.json.Decoder(KubeletPod)


class Started(msgspec.Struct, frozen=True):
    """Hold what a container was started with the last time, and how many times that was."""

    env: dict[str, str]
    ids: dict[str, frozenset[str]]
    mounts: dict[str, str]
    devices: dict[str, str]
    cdi_devices: tuple[str, ...]
    times: int


def limits(container: Mapping[str, Any]) -> dict[str, int]:
    """Read the extended resources that a container asks for."""
    amounts = (container.get("resources") or {}).get("limits") or {}
    return {resource: parse_quantity(amount) for resource, amount in amounts.items() if "/" in resource}


def most_at_once(pod: KubeletPod, resource: str) -> int:
    """Add up what a pod needs of a resource at most at one time (component-helpers/resource/helpers.go)."""
    running = most = 0
    for container, role in pod.containers:
        amount = limits(container).get(resource, 0)
        if role == "init":
            most = max(most, running + amount)
        else:
            running += amount
    return max(most, running)


def started(
    pod: KubeletPod,
    container: Mapping[str, Any],
    *,
    node: str,
    responses: Iterable[pb.ContainerAllocateResponse],
    ids: dict[str, frozenset[str]],
    times: int,
) -> Started:
    """Merge what plugins answered with the spec's env, which wins even when empty (makeEnvironmentVariables)."""
    env: dict[str, str] = {}
    mounts: dict[str, str] = {}
    devices: dict[str, str] = {}
    cdi: list[str] = []
    for response in responses:
        env |= response.envs
        mounts |= {mount.container_path: mount.host_path for mount in response.mounts}
        devices |= {device.container_path: device.host_path for device in response.devices}
        cdi += [device.name for device in response.cdi_devices]
    for variable in container.get("env") or ():
        path = ((variable.get("valueFrom") or {}).get("fieldRef") or {}).get("fieldPath")
        env[variable["name"]] = _field(pod, path, node) if path else variable.get("value", "")
    return Started(env=env, ids=ids, mounts=mounts, devices=devices, cdi_devices=tuple(cdi), times=times)


def _field(pod: KubeletPod, path: str, node: str) -> str:
    """Read a field of the downward API; an annotation that is missing is an empty text, not an error."""
    metadata = msgspec.to_builtins(pod.metadata)
    if match := _FIELD.fullmatch(path):
        return str((metadata.get(match["map"]) or {}).get(match["key"], ""))
    return node if path == "spec.nodeName" else str(metadata.get(path.removeprefix("metadata."), ""))
