"""The node annotation: which GPUs a node has, how they are shared, and how they are."""

from collections import Counter
from enum import StrEnum
from sys import intern
from typing import Annotated

import msgspec

from cotenant.contract import versions
from cotenant.contract.names import SHARED, mig_suffix

VERSION = 1

# 16 TiB: no GPU comes near it, and whoever must reckon with the whole of an unknown GPU takes this. Policies count
# thousandths of the cluster's largest GPU: one that claimed far more than there is would make nothing of the others.
MAX_GPU_BYTES = 1 << 44

Bytes = Annotated[int, msgspec.Meta(ge=0, le=MAX_GPU_BYTES)]
Text = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]


class Family(StrEnum):
    """Say in which resource a GPU is counted: each GPU is in exactly one, so that no silicon is advertised twice."""

    MEMORY = "memory"
    REPLICAS = "replicas"
    MIG_STATIC = "mig-static"
    MIG_DYNAMIC = "mig-dynamic"


class Mode(StrEnum):
    """Say by which mechanism containers share a GPU; EXCLUSIVE is a grant's only, never a GPU's."""

    TIME_SLICING = "time-slicing"
    MPS = "mps"
    MIG = "mig"
    EXCLUSIVE = "exclusive"


class Health(StrEnum):
    """Say whether new pods may be placed on a GPU."""

    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"


class _Wire(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Refuse unknown fields: within one version there are none, and a newer version says so by its number."""


class MIGProfile(_Wire, frozen=True, kw_only=True, rename={"profile_id": "id"}):
    """Describe a MIG profile as NVML reports it for this GPU and driver; starts and size count memory slices."""

    name: Text
    profile_id: Annotated[int, msgspec.Meta(ge=0)]
    bytes: Bytes
    compute_slices: Annotated[int, msgspec.Meta(ge=0)] = msgspec.field(name="computeSlices")
    max_instances: Annotated[int, msgspec.Meta(ge=0)] = msgspec.field(name="maxInstances")
    size: Annotated[int, msgspec.Meta(ge=1, le=64)]
    starts: tuple[Annotated[int, msgspec.Meta(ge=0, le=64)], ...]


class MIGInstance(_Wire, frozen=True, kw_only=True):
    """Describe a GPU instance that exists; start and size count memory slices."""

    profile: Text
    start: Annotated[int, msgspec.Meta(ge=0, le=64)]
    size: Annotated[int, msgspec.Meta(ge=1, le=64)]
    uuid: str = ""


class UnhealthyInstance(_Wire, frozen=True, kw_only=True):
    """Name an instance that gets no new pods, though its GPU does, and say why.

    In the dynamic family it may be gone by now: nothing new lies at its *place*.
    """

    uuid: Text
    detail: str = ""
    place: MIGInstance | None = None


class InstanceShares(_Wire, frozen=True, kw_only=True):
    """Say that an instance of a profile in the static family is so many shares, which take turns at it.

    Where they are *renamed*, pods ask PROFILE.shared instead of PROFILE.
    """

    profile: Text
    replicas: Annotated[int, msgspec.Meta(ge=2, le=1000)]
    renamed: bool = False


class MIG(_Wire, frozen=True, kw_only=True):
    """Describe the partitioning of one GPU.

    *instances* are those that the static family advertises; *unexplained* are those of the dynamic family that no live
    grant explains, whose slices the ledger counts as taken.
    """

    profiles: tuple[MIGProfile, ...] = ()
    instances: tuple[MIGInstance, ...] = ()
    unexplained: tuple[MIGInstance, ...] = ()
    unhealthy: tuple[UnhealthyInstance, ...] = ()
    # profiles of the static family that are not handed out whole, each once
    shares: tuple[InstanceShares, ...] = ()

    def replicas(self, profile: str) -> int:
        """Count the shares that an instance of *profile* is; 1 where it is handed out whole."""
        return next((one.replicas for one in self.shares if one.profile == profile), 1)

    def suffix(self, profile: str) -> str:
        """Say under which name an instance of *profile* is asked, after the prefix of MIG resources."""
        renamed = any(one.renamed for one in self.shares if one.profile == profile)
        return mig_suffix(profile) + (SHARED if renamed else "")

    @property
    def unfit(self) -> frozenset[str]:
        """Name the instances that get no new pods, by UUID."""
        return frozenset(one.uuid for one in self.unhealthy)


class Foreign(_Wire, frozen=True, kw_only=True):
    """Say what others than the extender's pods have of a GPU.

    *bytes* of it count as taken; a *fenced* one is somebody else's whole, so that nothing is placed there.
    """

    bytes: Bytes = 0
    fenced: bool = False
    # who has it, for people
    detail: str = ""


class GPU(_Wire, frozen=True, kw_only=True):
    """Describe one physical GPU; *usable* bytes are what pods may be given of it, whole units for the memory family."""

    uuid: Text
    index: Annotated[int, msgspec.Meta(ge=0)]
    model: Text
    total_bytes: Bytes = msgspec.field(name="total")
    usable_bytes: Bytes = msgspec.field(name="usable")
    family: Family = Family.MEMORY
    mode: Mode = Mode.TIME_SLICING
    health: Health = Health.HEALTHY
    # why it is unhealthy, for people
    detail: str = ""
    # how many containers MPS can serve at once: 48, 60 since CUDA 13.1; 0 is no limit
    max_clients: Annotated[int, msgspec.Meta(ge=0)] = msgspec.field(name="maxClients", default=0)
    # where the control daemon of an MPS GPU listens
    mps_pipe: str = msgspec.field(name="mpsPipe", default="")
    mig: MIG | None = None
    foreign: Foreign | None = None

    def __post_init__(self) -> None:
        # one text for all GPUs of a model: 11 MiB at 20,000 nodes
        msgspec.structs.force_setattr(self, "model", intern(self.model))
        if self.usable_bytes > self.total_bytes:
            raise ValueError(f"GPU {self.uuid} has {self.usable_bytes} usable of {self.total_bytes} bytes")
        if self.mode is Mode.EXCLUSIVE:
            raise ValueError(f"GPU {self.uuid} has mode exclusive, which only a grant can have")
        if (self.mode is Mode.MIG) != (self.family in {Family.MIG_STATIC, Family.MIG_DYNAMIC}):
            raise ValueError(f"GPU {self.uuid} of family {self.family} cannot have mode {self.mode}")

    @property
    def fenced(self) -> bool:
        """Tell whether somebody else has it whole."""
        return self.foreign is not None and self.foreign.fenced

    @property
    def foreign_bytes(self) -> int:
        """Give the bytes that count as taken by others."""
        return self.foreign.bytes if self.foreign is not None else 0

    @property
    def is_open(self) -> bool:
        """Tell whether new pods may be placed on it."""
        return self.health is Health.HEALTHY and not self.fenced


class Inventory(_Wire, frozen=True, kw_only=True):
    """Describe a node; the generation grows by one whenever anything else in it changes."""

    version: int = VERSION
    generation: Annotated[int, msgspec.Meta(ge=0)]
    unit_bytes: Annotated[int, msgspec.Meta(ge=1 << 20, le=1 << 40)] = msgspec.field(name="unit")
    # false while the plugin is not registered with the kubelet, which would start pods without asking it
    serving: bool = True
    gpus: tuple[GPU, ...] = ()

    def __post_init__(self) -> None:
        for uuid, count in Counter(gpu.uuid for gpu in self.gpus).items():
            if count > 1:
                raise ValueError(f"GPU {uuid} is listed {count} times")
        for gpu in self.gpus:
            if gpu.family is Family.MEMORY and gpu.usable_bytes % self.unit_bytes:
                raise ValueError(f"GPU {gpu.uuid} has {gpu.usable_bytes} usable bytes, not whole units")

    def gives_instances(self, *, named: bool) -> bool:
        """Tell whether any GPU has MIG instances to give that its kubelet is to advertise; *named*: it names profiles.

        Those of a static GPU may be offered as GPUs instead (migStrategy), so they are missed only where it names some.
        """
        open_to = [(gpu.family, gpu.mig) for gpu in self.gpus if gpu.mig is not None and gpu.is_open]
        return any(
            bool(mig.profiles)
            if family is Family.MIG_DYNAMIC
            else named and any(one.uuid not in mig.unfit for one in mig.instances)
            for family, mig in open_to
        )


class InventoryError(ValueError):
    """Say why a node annotation is not an inventory that this version can read."""


_decoder = msgspec.json.Decoder(Inventory)


def encode(inventory: Inventory) -> str:
    """Write the node annotation; the same inventory always gives the same text."""
    return versions.encode(inventory, VERSION)


def decode(text: str) -> Inventory:
    """Read the node annotation; raise InventoryError with a sentence when it is corrupt or of another version."""
    try:
        return versions.decode(text, _decoder, VERSION)
    except ValueError as error:
        raise InventoryError(f"the node's inventory {error}") from error
