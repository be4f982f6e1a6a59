"""mig-parted's configuration format: named geometries of a node's GPUs, each a number of instances per profile.

The format is NVIDIA's (github.com/NVIDIA/mig-parted, api/spec/v1). It says how many, not where: starts are found here,
for all instances of a GPU together, so the order in which a file names them does not matter.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import msgspec

from cotenant.contract.configuration import convert
from cotenant.contract.inventory import MIGInstance
from cotenant.contract.mig import Geometry

_FILTER = re.compile(r"0x[0-9A-Fa-f]{8}")


class GeometryError(ValueError):
    """Say which part of which configuration a GPU cannot have."""


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="kebab"):
    """Refuse unknown keys."""


class GPUGeometry(_Section, frozen=True, kw_only=True):
    """Say how the GPUs that it names are to be cut; *device-filter* is a PCI device and vendor id, or a list."""

    device_filter: str | tuple[str, ...] = ()
    devices: Literal["all"] | tuple[Annotated[int, msgspec.Meta(ge=0)], ...]
    mig_enabled: bool
    mig_devices: dict[str, Annotated[int, msgspec.Meta(ge=0, le=64)]] = {}

    def __post_init__(self) -> None:
        for one in self.filters:
            if not _FILTER.fullmatch(one):
                raise ValueError(f"device-filter: expected 0x and eight hexadecimal digits, got {one[:40]!r}")
        if self.mig_devices and not self.mig_enabled:
            raise ValueError("mig-devices: expected none where mig-enabled is false")

    @property
    def filters(self) -> tuple[str, ...]:
        """List the ids that a GPU may have; none allows all."""
        return (self.device_filter,) if isinstance(self.device_filter, str) else self.device_filter

    def names(self, index: int, device_id: int | None) -> bool:
        """Tell whether a GPU of that index and PCI id is meant."""
        known = not self.filters or any(int(one, 16) == device_id for one in self.filters)
        return known and (self.devices == "all" or index in self.devices)


class Geometries(_Section, frozen=True, kw_only=True):
    """Hold the named geometries of a file."""

    version: Literal["v1"]
    mig_configs: dict[str, tuple[GPUGeometry, ...]]


class CutGPU(msgspec.Struct, frozen=True, kw_only=True):
    """Describe a GPU that may be cut; *geometry* is None where it tells none before its MIG mode is on."""

    uuid: str
    index: int
    device_id: int | None
    geometry: Geometry | None


class Cut(msgspec.Struct, frozen=True):
    """Say how a GPU is to be cut: with MIG mode off, or into *instances*."""

    enabled: bool
    instances: tuple[MIGInstance, ...] = ()


def parse(text: str) -> Geometries:
    """Read a file; raise ConfigurationError with the path of what is wrong, and a sentence."""
    return convert(text, Geometries)


def plan(geometries: Geometries, name: str, gpus: Sequence[CutGPU]) -> Mapping[str, Cut]:
    """Say how each of *gpus* that the configuration *name* means is to be cut, by UUID; its last word on a GPU counts.

    Raises GeometryError where there is no such configuration, or a GPU cannot be cut so.
    """
    if name not in geometries.mig_configs:
        known = ", ".join(geometries.mig_configs) or "none"
        raise GeometryError(f"there is no configuration {name!r}; there are: {known}")
    cuts = {}
    for gpu in gpus:
        for position, wanted in enumerate(geometries.mig_configs[name]):
            if wanted.names(gpu.index, gpu.device_id):
                cuts[gpu.uuid] = _cut(gpu, wanted, f"mig-configs.{name}[{position}].mig-devices")
    return cuts


def _cut(gpu: CutGPU, wanted: GPUGeometry, path: str) -> Cut:
    if gpu.geometry is None:
        return Cut(wanted.mig_enabled)
    profiles = [profile for profile, count in wanted.mig_devices.items() for _ in range(count)]
    known = {profile.name for profile in gpu.geometry.profiles}
    for profile in wanted.mig_devices:
        if profile not in known:
            has = ", ".join(p.name for p in gpu.geometry.profiles) or "none"
            raise GeometryError(f"{path}: GPU {gpu.index} has no profile {profile}; its profiles are: {has}")
    found = gpu.geometry.place_together(profiles)
    if found is None:
        asked = ", ".join(f"{count} x {profile}" for profile, count in wanted.mig_devices.items())
        raise GeometryError(f"{path}: GPU {gpu.index} cannot hold {asked} together, in whatever order")
    return Cut(wanted.mig_enabled, found)
