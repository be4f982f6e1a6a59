"""CDI specs of MIG instances that are made while pods come and go: one file each, which also remembers whose it is.

Allocate names a device before it exists; the container runtime looks it up when it makes the container, after
PreStartContainer has written its spec (CNCF Container Device Interface, cdiVersion 0.6.0).
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import structlog
import yaml

from cotenant.contract.inventory import MIGInstance
from cotenant.contract.names import Names, mig_suffix
from cotenant.contract.units import id_prefix

log = structlog.get_logger(__name__)

_VERSION = "0.6.0"
_PREFIX = "cotenant-mig-"
_SUFFIXES = {".json", ".yaml", ".yml"}
_CAPABILITY = re.compile(r"/dev/nvidia-caps/nvidia-cap(\d+)")
_DEVICES = Path("/proc/devices")


class Owner(msgspec.Struct, frozen=True):
    """Say whom an instance was made for, and what UUID it had."""

    uid: str
    namespace: str
    name: str
    instance: str


class _Spec(msgspec.Struct):
    annotations: dict[str, str] | None = None


def device_name(gpu: str, instance: MIGInstance) -> str:
    """Name an instance's CDI device by its parent, start and profile: the same for every instance that lies there."""
    return f"{id_prefix(gpu)}-{instance.start}-{mig_suffix(instance.profile)}"


class SpecFolder:
    """Keep the specs in *folder*; *kind* is the CDI kind that the driver's own spec has, "nvidia.com/gpu".

    *devices* is where the kernel lists the numbers of drivers (proc(5), /proc/devices).
    """

    def __init__(self, folder: Path, names: Names, kind: str, *, devices: Path = _DEVICES) -> None:
        self._folder = folder
        self._names = names
        self._kind = kind
        self._devices = devices
        self._warned = False

    def full_name(self, gpu: str, instance: MIGInstance) -> str:
        """Give the name that Allocate answers with."""
        return f"{self._names.domain}/mig={device_name(gpu, instance)}"

    def write(
        self,
        gpu: str,
        instance: MIGInstance,
        owner: Owner,
        *,
        nodes: Sequence[tuple[str, str]],
        environment: Mapping[str, str],
    ) -> None:
        """Write the spec of an instance; *nodes* are pairs of a container's path and the host's. Raises OSError."""
        common = self._common_edits()
        device_nodes = [node for path, host in nodes if (node := self._device_node(path, host)) is not None]
        edits: dict[str, Any] = {"env": [f"{name}={value}" for name, value in environment.items()]}
        if device_nodes:
            edits["deviceNodes"] = device_nodes
        spec = {
            "cdiVersion": _VERSION,
            "kind": f"{self._names.domain}/mig",
            "annotations": {self._key(field): value for field, value in msgspec.structs.asdict(owner).items()},
            "devices": [{"name": device_name(gpu, instance), "containerEdits": edits}],
        }
        if common:
            spec["containerEdits"] = common
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._path(gpu, instance)
        # a name that CDI does not read; and whole or not at all, for the runtime may look at any moment
        new = path.with_suffix(".new")
        new.write_text(json.dumps(spec))
        new.rename(path)

    def owner(self, gpu: str, instance: MIGInstance) -> Owner | None:
        """Say whom the instance was made for; None where that was not written down, or cannot be read."""
        try:
            spec = msgspec.json.decode(self._path(gpu, instance).read_bytes(), type=_Spec)
        except (OSError, msgspec.MsgspecError):
            return None
        found = spec.annotations or {}
        values = [found.get(self._key(field)) for field in Owner.__struct_fields__]
        return Owner(*[value for value in values if value is not None]) if None not in values else None

    def remove(self, gpu: str, instance: MIGInstance) -> None:
        """Forget an instance that is no more."""
        self._path(gpu, instance).unlink(missing_ok=True)

    def remove_others(self, gpu: str, there: Sequence[MIGInstance]) -> None:
        """Forget the instances of a GPU that are no more: all but those *there*."""
        kept = {self._path(gpu, instance).name for instance in there}
        for path in self._folder.glob(f"{_PREFIX}{id_prefix(gpu)}-*.json"):
            if path.name not in kept:
                path.unlink(missing_ok=True)

    def _device_node(self, path: str, host: str) -> dict[str, Any] | None:
        """Describe a device node by the host's, or a capability's by its numbers.

        NVML makes no node of a new instance's capabilities from within a container, so there may be none on the host
        either; the runtime makes one in the container, as NVIDIA's DRA driver has it do (GetDevNodesForMigDevice).
        """
        if Path(host).exists():
            return {"path": path, "hostPath": host}
        capability = _CAPABILITY.fullmatch(path)
        if capability is None:
            return None
        major = self._capabilities_major()
        if major is None:
            log.warning(
                "cdi.no_capabilities",
                why=f"{self._devices} names no nvidia-caps, so a container gets its MIG instance without {path}, and "
                "CUDA finds no device there; load the driver's capabilities (nvidia-modprobe -f)",
            )
            return None
        return {"path": path, "type": "c", "major": major, "minor": int(capability[1])}

    def _capabilities_major(self) -> int | None:
        try:
            lines = self._devices.read_text().splitlines()
        except OSError:
            return None
        numbers = (line.split() for line in lines)
        return next((int(words[0]) for words in numbers if words[1:] == ["nvidia-caps"] and words[0].isdigit()), None)

    def _path(self, gpu: str, instance: MIGInstance) -> Path:
        return self._folder / f"{_PREFIX}{device_name(gpu, instance)}.json"

    def _key(self, field: str) -> str:
        return f"{self._names.domain}/{field}"

    def _common_edits(self) -> dict[str, Any]:
        """Take what every container of the driver's own spec gets: its libraries and hooks.

        `nvidia-ctk cdi generate` writes that spec and knows the driver; it is not done again here.
        """
        for path in sorted(self._folder.glob("*")):
            if path.suffix not in _SUFFIXES or path.name.startswith(_PREFIX):
                continue
            try:
                spec = yaml.safe_load(path.read_text())
            except (OSError, yaml.YAMLError, UnicodeError):
                continue
            if isinstance(spec, dict) and spec.get("kind") == self._kind:
                edits = spec.get("containerEdits")
                return edits if isinstance(edits, dict) else {}
        if not self._warned:
            self._warned = True
            log.warning(
                "cdi.no_driver_spec",
                why=f"no spec of kind {self._kind} lies in {self._folder}, so containers get no driver libraries; "
                "run nvidia-ctk cdi generate",
            )
        return {}
