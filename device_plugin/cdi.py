"""CDI specs of MIG instances that the driver's own spec may not know: one file each.

Of an instance that is made for a pod, Allocate names the device before it exists; the container runtime looks it up
when it makes the container, after PreStartContainer has written its spec, which also remembers whose it is. Instances
that somebody has cut since `nvidia-ctk cdi generate` ran get one too: nobody runs it again for MIG (NVIDIA, "Support
for Container Device Interface": the refresh service does not handle "runtime topology changes (MIG, ...)"). And they
keep it, whatever the driver's spec names later: the kubelet answers from its checkpoint when a container starts again.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import structlog
import yaml

from cotenant.contract import environment
from cotenant.contract.inventory import MIGInstance
from cotenant.contract.names import Names, mig_suffix
from cotenant.contract.units import id_prefix

log = structlog.get_logger(__name__)

# the first with annotations
_VERSION = "0.6.0"
_VERSIONS = re.compile(r"\d+\.\d+\.\d+")
_PREFIX = "cotenant-mig-"
# Files of instances that are there already have the UUID after it; MIG- is how NVML begins one.
_CUT = "MIG-"
# the annotation that has the UUID of their GPU
_PARENT = "gpu"
_SUFFIXES = {".json", ".yaml", ".yml"}
_CAPABILITY = re.compile(r"/dev/nvidia-caps/nvidia-cap(\d+)")
_DEVICES = Path("/proc/devices")


class Owner(msgspec.Struct, frozen=True):
    """Say whom an instance was made for, and what UUID it had."""

    uid: str
    namespace: str
    name: str
    instance: str


class CapabilityError(Exception):
    """Say why a container could not use an instance."""


class _Spec(msgspec.Struct):
    annotations: dict[str, str] | None = None


_spec = msgspec.json.Decoder(_Spec)


class _Driver(NamedTuple):
    """Hold what the driver's own spec says: the edits of all its devices, the version that these need, and names."""

    edits: dict[str, Any]
    version: str
    names: frozenset[str]


def device_name(gpu: str, instance: MIGInstance) -> str:
    """Name an instance's CDI device by its parent, start and profile: the same for every instance that lies there."""
    return f"{id_prefix(gpu)}-{instance.start}-{mig_suffix(instance.profile)}"


class SpecFolder:
    """Keep the specs in *folder*; *kind* is the CDI kind that the driver's own spec has, "nvidia.com/gpu".

    *also* are further folders that the driver's spec may lie in. *devices* is where the kernel lists the numbers of
    drivers (proc(5), /proc/devices).
    """

    def __init__(
        self, folder: Path, names: Names, kind: str, *, also: Sequence[Path] = (), devices: Path = _DEVICES
    ) -> None:
        self._folder = folder
        # a spec in the folder for generated ones wins over one in /etc/cdi (CDI, pkg/cdi, DefaultSpecDirs)
        self._searched = (folder, *also)
        self._names = names
        self._kind = kind
        self._devices = devices
        self._warned = False
        self._read: dict[Path, tuple[tuple[int, int, int], _Driver | None]] = {}
        # the UUIDs of the static instances that are handed out by a spec of ours
        self._cut: frozenset[str] = frozenset()
        # why a spec could not be written or removed: said once
        self._failures: dict[Path, str] = {}

    def full_name(self, gpu: str, instance: MIGInstance) -> str:
        """Give the name that Allocate answers with for an instance that is made when the container starts."""
        return f"{self._names.domain}/mig={device_name(gpu, instance)}"

    def name_of(self, uuid: str) -> str:
        """Give the name of a GPU, or of an instance that is there."""
        return f"{self._names.domain}/mig={uuid}" if uuid in self._cut else f"{self._kind}={uuid}"

    def write(self, gpu: str, instance: MIGInstance, owner: Owner, *, nodes: Sequence[tuple[str, str]]) -> None:
        """Write the spec of an instance; *nodes* are pairs of a container's path and the host's.

        Raises CapabilityError where a container could not use the instance, and OSError.
        """
        annotations = {self._key(field): value for field, value in msgspec.structs.asdict(owner).items()}
        driver = self._driver()
        if driver is None and not self._warned:
            self._warned = True
            folders = ", ".join(map(str, self._searched))
            log.warning(
                "cdi.no_driver_spec",
                why=f"no spec of kind {self._kind} lies in {folders}, so containers get no driver libraries; "
                "run nvidia-ctk cdi generate",
            )
        path = self._path(gpu, instance)
        self._put(path, device_name(gpu, instance), owner.instance, nodes=nodes, driver=driver, annotations=annotations)

    def follow(self, instances: Mapping[str, Mapping[str, Sequence[tuple[str, str]]]]) -> None:
        """Have specs of the static *instances*: pairs of nodes by UUID, by that of each GPU that could be read.

        Those of other GPUs stay: nobody knows whether they are gone. What the driver's own spec names is handed out by
        that name from now on, and keeps ours for the containers that were given it before. Where no spec of the
        driver's is seen, the node's folders are not here or it is being written: nothing is done.
        """
        try:
            self._follow_all(instances)
        except OSError as error:
            self._warn("cdi.not_followed", self._folder, error)
        else:
            self._failures.pop(self._folder, None)

    def _follow_all(self, instances: Mapping[str, Mapping[str, Sequence[tuple[str, str]]]]) -> None:
        driver = self._driver()
        if driver is None:
            return
        for gpu, there in instances.items():
            for uuid, nodes in there.items():
                self._follow(gpu, uuid, nodes, driver)
        present = {uuid for there in instances.values() for uuid in there}
        kept = set()
        for path in self._folder.glob(f"{_PREFIX}{_CUT}*.json"):
            uuid = path.stem.removeprefix(_PREFIX)
            if uuid in present or self._annotations(path).get(self._key(_PARENT)) not in instances:
                kept.add(uuid)
            else:
                self._forget(path)
        cut = frozenset(kept - driver.names)
        if cut - self._cut:
            log.info("cdi.written", instances=sorted(cut - self._cut), why="the driver's own spec does not name them")
        self._cut = cut

    def _follow(self, gpu: str, uuid: str, nodes: Sequence[tuple[str, str]], driver: _Driver) -> None:
        path = self._folder / f"{_PREFIX}{uuid}.json"
        try:
            self._put(path, uuid, uuid, nodes=nodes, driver=driver, annotations={self._key(_PARENT): gpu})
        except (CapabilityError, OSError) as error:
            self._warn("cdi.not_written", path, error)
        else:
            self._failures.pop(path, None)

    def _forget(self, path: Path) -> None:
        """Remove a spec; where that fails it is tried again with the next look, and nobody is given it meanwhile."""
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            self._warn("cdi.not_removed", path, error)
        else:
            self._failures.pop(path, None)

    def _warn(self, event: str, path: Path, error: Exception) -> None:
        if self._failures.get(path) != str(error):
            self._failures[path] = str(error)
            log.warning(event, spec=path.name, error=str(error))

    def owner(self, gpu: str, instance: MIGInstance) -> Owner | None:
        """Say whom the instance was made for; None where that was not written down. Raises OSError."""
        found = self._annotations(self._path(gpu, instance))
        values = [found.get(self._key(field)) for field in Owner.__struct_fields__]
        return Owner(*[value for value in values if value is not None]) if None not in values else None

    def remove(self, gpu: str, instance: MIGInstance) -> None:
        """Forget an instance that is no more."""
        self._forget(self._path(gpu, instance))

    def remove_others(self, gpu: str, there: Sequence[MIGInstance]) -> None:
        """Forget the instances of a GPU that are no more: all but those *there*."""
        kept = {self._path(gpu, instance).name for instance in there}
        for path in self._folder.glob(f"{_PREFIX}{id_prefix(gpu)}-*.json"):
            if path.name not in kept:
                self._forget(path)

    def _annotations(self, path: Path) -> dict[str, str]:
        try:
            return _spec.decode(path.read_bytes()).annotations or {}
        except (FileNotFoundError, msgspec.MsgspecError):
            return {}

    def _put(
        self,
        path: Path,
        name: str,
        uuid: str,
        *,
        nodes: Sequence[tuple[str, str]],
        driver: _Driver | None,
        annotations: dict[str, str],
    ) -> None:
        # As NVIDIA's own specs and its DRA driver have it: with any other value a container under the runtime handler
        # nvidia would be given devices a second time (nvidia-container-toolkit, pkg/nvcdi/wrapper.go, GetCommonEdits).
        env = [f"{environment.VISIBLE_DEVICES}={environment.NO_DEVICES}", f"{environment.MIG_UUID}={uuid}"]
        edits: dict[str, Any] = {"env": env}
        if device_nodes := self._device_nodes(nodes):
            edits["deviceNodes"] = device_nodes
        spec: dict[str, Any] = {
            "cdiVersion": _VERSION,
            "kind": f"{self._names.domain}/mig",
            "devices": [{"name": name, "containerEdits": edits}],
            "annotations": annotations,
        }
        if driver is not None and driver.edits:
            spec["containerEdits"] = driver.edits
            # they may have fields that CDI refuses under an older one (specs-go, MinimumRequiredVersion)
            spec["cdiVersion"] = max(_VERSION, driver.version, key=_numbers)
        # the driver's spec may have what is no JSON: a date without quotes is one to YAML
        text = json.dumps(spec, default=str)
        if _text(path) == text:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        # a name that CDI does not read; and whole or not at all, for the runtime may look at any moment
        new = path.with_name(f"{path.name}.new")
        new.write_text(text)
        new.rename(path)

    def _device_nodes(self, nodes: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
        """Describe device nodes by the host's, or capabilities by their numbers.

        NVML makes no node of a new instance's capabilities from within a container, so there may be none on the host
        either; the runtime makes one in the container, as NVIDIA's DRA driver has it do (GetDevNodesForMigDevice).
        """
        found: list[dict[str, Any]] = []
        numbered: list[tuple[str, int]] = []
        for path, host in nodes:
            if Path(host).exists():
                found.append({"path": path, "hostPath": host})
            elif capability := _CAPABILITY.fullmatch(path):
                numbered.append((path, int(capability[1])))
        if not numbered:
            return found
        major = self._capabilities_major()
        if major is None:
            raise CapabilityError(
                f"{self._devices} names no nvidia-caps, so a container would get its MIG instance without "
                f"{numbered[0][0]}, and CUDA would find no device there; load the driver's module nvidia with "
                "nv_cap_enable_devfs=1"
            )
        return found + [{"path": path, "type": "c", "major": major, "minor": minor} for path, minor in numbered]

    def _capabilities_major(self) -> int | None:
        numbers = (line.split() for line in (_text(self._devices) or "").splitlines())
        return next((int(words[0]) for words in numbers if words[1:] == ["nvidia-caps"] and words[0].isdigit()), None)

    def _path(self, gpu: str, instance: MIGInstance) -> Path:
        return self._folder / f"{_PREFIX}{device_name(gpu, instance)}.json"

    def _key(self, field: str) -> str:
        return f"{self._names.domain}/{field}"

    def _driver(self) -> _Driver | None:
        """Read the driver's own spec: its libraries and hooks, which every container gets; None where there is none.

        Raises OSError where one is there that cannot be read now: an instance keeps the spec that it is made with.
        `nvidia-ctk cdi generate` writes that spec and knows the driver; it is not done again here.
        """
        found = list(self._drivers())
        return found[0]._replace(names=frozenset().union(*(one.names for one in found))) if found else None

    def _drivers(self) -> Iterator[_Driver]:
        for path in (path for folder in self._searched for path in sorted(folder.glob("*"))):
            if path.suffix not in _SUFFIXES or path.name.startswith(_PREFIX):
                continue
            try:
                if not path.is_file():
                    continue
                status = path.stat()
                stamp = (status.st_mtime_ns, status.st_ino, status.st_size)
                if path not in self._read or self._read[path][0] != stamp:
                    self._read[path] = stamp, _parsed(path, self._kind)
            except (FileNotFoundError, PermissionError):
                continue
            if (driver := self._read[path][1]) is not None:
                yield driver


def _parsed(path: Path, kind: str) -> _Driver | None:
    """Read a spec; None where it is of another kind, or cannot be parsed. Raises OSError."""
    try:
        spec = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        why = f"it is no YAML, and passed by until it changes: {' '.join(str(error).split())}"
        log.warning("cdi.spec_unreadable", file=str(path), why=why)
        return None
    if not isinstance(spec, dict) or spec.get("kind") != kind:
        return None
    edits, devices = spec.get("containerEdits"), spec.get("devices")
    listed = devices if isinstance(devices, list) else []
    names = frozenset(str(one["name"]) for one in listed if isinstance(one, dict) and "name" in one)
    version = str(spec.get("cdiVersion"))
    return _Driver(
        edits if isinstance(edits, dict) else {}, version if _VERSIONS.fullmatch(version) else _VERSION, names
    )


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


def _text(path: Path) -> str | None:
    try:
        return path.read_text()
    except (OSError, UnicodeError):
        return None
