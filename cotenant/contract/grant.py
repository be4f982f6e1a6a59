"""The pod annotation written at bind: what each container was given, in which mode, and what enforces it."""

from collections import Counter
from enum import StrEnum
from typing import Annotated

import msgspec

from cotenant.contract import versions
from cotenant.contract.inventory import Family, MIGInstance, Mode, Text, _Wire
from cotenant.contract.mps import UNSET_USER, Clients
from cotenant.contract.names import SHARED, is_dns_label, mig_suffix

VERSION = 1


class Role(StrEnum):
    """Say how kube-scheduler counts a container: init containers end before the next starts, sidecars stay."""

    INIT = "init"
    SIDECAR = "sidecar"
    MAIN = "main"


class Isolation(StrEnum):
    """Say how well a container is kept from its neighbours on the GPU; a pod's wish is a minimum."""

    NONE = "none"
    LIMITED = "limited"
    STRICT = "strict"
    EXCLUSIVE = "exclusive"

    @property
    def rank(self) -> int:
        """Order isolations: more is stronger."""
        return _RANKS[self]

    @property
    def whole_gpu(self) -> bool:
        """Tell whether gpu-mem meets this only by a GPU for the pod itself, charged whole."""
        # asked eight times for a pod: a set would be made, and the members' names hashed, each time
        return self is Isolation.STRICT or self is Isolation.EXCLUSIVE


_RANKS = {isolation: rank for rank, isolation in enumerate(Isolation)}

# What a mode gives, and what holds a container to it. Time slicing holds nobody to anything: say so.
GIVEN = {
    Mode.TIME_SLICING: (Isolation.NONE, "nothing"),
    Mode.MPS: (Isolation.LIMITED, "MPS memory limit, per process"),
    Mode.MIG: (Isolation.STRICT, "MIG partition"),
    Mode.EXCLUSIVE: (Isolation.EXCLUSIVE, "no other pod on the GPU"),
}
# A share of a MIG instance: its sharers are together behind the wall.
GIVEN_A_SHARE = (Isolation.NONE, "MIG partition around the instance, nothing between its shares")


class IsolationRecord(_Wire, frozen=True, kw_only=True):
    """Record what the pod asked for, what it got, and what enforces that."""

    asked: Isolation
    given: Isolation
    enforced_by: str = msgspec.field(name="enforcedBy")


class GPUShare(_Wire, frozen=True, kw_only=True):
    """Name a GPU and the bytes of it that are held."""

    uuid: Text
    bytes: Annotated[int, msgspec.Meta(ge=1, le=1 << 60)]


class MIGPlacement(_Wire, frozen=True, kw_only=True):
    """Place a GPU instance on its parent, the container's only GPU; start and size count memory slices.

    *uuid* is the MIG device's in the static family; in the dynamic one it does not exist yet. The container holds one
    of *replicas* shares of the instance; where these are *renamed*, it asked PROFILE.shared.
    """

    profile: Text
    start: Annotated[int, msgspec.Meta(ge=0, le=64)]
    size: Annotated[int, msgspec.Meta(ge=1, le=64)]
    uuid: str = ""
    replicas: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 1
    renamed: bool = False

    @property
    def suffix(self) -> str:
        """Say under which name it was asked, after the prefix of MIG resources."""
        return mig_suffix(self.profile) + (SHARED if self.renamed else "")

    @property
    def instance(self) -> MIGInstance:
        """Give it as the inventory has it."""
        return MIGInstance(profile=self.profile, start=self.start, size=self.size, uuid=self.uuid)


class ContainerGrant(_Wire, frozen=True, kw_only=True):
    """Say what one container was given."""

    name: Text
    role: Role
    family: Family
    mode: Mode
    gpus: Annotated[tuple[GPUShare, ...], msgspec.Meta(min_length=1, max_length=64)]
    # how many device ids the kubelet will pick; an exclusive GPU is charged whole however few were asked for
    units: Annotated[int, msgspec.Meta(ge=1)]
    threads: Annotated[int, msgspec.Meta(ge=1, le=100)] = 100
    mps_pipe: str = msgspec.field(name="mpsPipe", default="")
    # as which user it is known to MPS; None where the pod names none
    user: Annotated[int, msgspec.Meta(ge=0, le=(1 << 32) - 1)] | None = None
    mig: MIGPlacement | None = None
    isolation: IsolationRecord

    def __post_init__(self) -> None:
        if not is_dns_label(self.name):
            raise ValueError(f"{self.name!r} is not a container name")
        if len({share.uuid for share in self.gpus}) != len(self.gpus):
            raise ValueError(f"container {self.name} names a GPU twice")
        if self.units % len(self.gpus):
            raise ValueError(f"{self.units} units of container {self.name} do not split over {len(self.gpus)} GPUs")
        if (self.mig is not None) != (self.mode is Mode.MIG):
            raise ValueError(f"container {self.name} of mode {self.mode} has {'a' if self.mig else 'no'} MIG placement")
        if self.mig is not None and len(self.gpus) > 1:
            raise ValueError(f"container {self.name} has a MIG placement on {len(self.gpus)} GPUs")

    @property
    def under_mps(self) -> bool:
        """Tell whether the container is a client of an MPS daemon."""
        return self.mode is Mode.MPS or bool(self.mps_pipe)


class Grant(_Wire, frozen=True, kw_only=True):
    """Say what a pod was given; containers stand in the order the kubelet starts them, init containers first."""

    version: int = VERSION
    containers: Annotated[tuple[ContainerGrant, ...], msgspec.Meta(min_length=1, max_length=512)]

    def __post_init__(self) -> None:
        names = [container.name for container in self.containers]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"container {twice} is granted {names.count(twice)} times")

    def charges(self, unit_bytes: int = 0) -> dict[str, int]:
        """Count the bytes the pod holds of each GPU, by UUID, the way kube-scheduler counts containers.

        A GPU for the pod itself is held once, by however many of its containers. A device id of gpu-mem takes
        *unit_bytes* from others, also where the unit was smaller when it was granted.
        """
        if len(self.containers) == 1:
            return _held(self.containers[0], unit_bytes)
        shared = peak([(c.role, _held(c, unit_bytes)) for c in self.containers if c.mode is not Mode.EXCLUSIVE])
        whole: Counter[str] = Counter()
        for container in self.containers:
            if container.mode is Mode.EXCLUSIVE:
                whole |= Counter(_held(container, unit_bytes))
        return dict(whole + Counter(shared))

    @property
    def gpus(self) -> int:
        """Count the pod's GPUs: a part of one and a MIG instance are one each, shared by containers or not.

        What a pod has for itself, and what it hands on from an init container, is one set for all of its containers.
        """
        if any(c.role is Role.INIT or c.mode is Mode.EXCLUSIVE for c in self.containers):
            return len({share.uuid for container in self.containers for share in container.gpus})
        return sum(len(container.gpus) for container in self.containers)

    def clients(self) -> dict[str, Clients]:
        """Say what the pod is to MPS on each GPU of its that MPS shares, by UUID; a GPU of its own may be one too."""
        under = [c for c in self.containers if c.under_mps]
        if not under:
            return {}
        counts = peak([(c.role, {share.uuid: 1 for share in c.gpus}) for c in under])
        users: dict[str, set[int]] = {}
        for container in under:
            for share in container.gpus:
                users.setdefault(share.uuid, set()).add(UNSET_USER if container.user is None else container.user)
        return {uuid: Clients(count, frozenset(users[uuid])) for uuid, count in counts.items()}

    def container(self, name: str) -> ContainerGrant | None:
        """Find the grant of the container called *name*."""
        return next((container for container in self.containers if container.name == name), None)


class GrantError(ValueError):
    """Say why a pod annotation is not a grant that this version can read."""


def _held(container: ContainerGrant, unit_bytes: int) -> dict[str, int]:
    ids = unit_bytes * container.units // len(container.gpus) if container.family is Family.MEMORY else 0
    return {share.uuid: max(share.bytes, ids) for share in container.gpus}


def peak(containers: list[tuple[Role, dict[str, int]]]) -> dict[str, int]:
    """Fold what containers hold of each GPU, in start order, into the most the pod ever holds of it.

    An init container runs beside the sidecars before it; main containers run beside all sidecars
    (component-helpers/resource/helpers.go, AggregateContainerRequests).
    """
    if len(containers) == 1:  # nearly every pod
        return dict(containers[0][1])
    running: Counter[str] = Counter()
    most: Counter[str] = Counter()
    for role, held in containers:
        if role is Role.INIT:
            most |= running + Counter(held)
        else:
            running += Counter(held)
    return dict(most | running)


_decoder = msgspec.json.Decoder(Grant)


def encode(grant: Grant) -> str:
    """Write the pod annotation; the same grant always gives the same text."""
    return versions.encode(grant, VERSION)


def decode(text: str) -> Grant:
    """Read the pod annotation; raise GrantError with a sentence when it is corrupt or of another version."""
    try:
        return versions.decode(text, _decoder, VERSION)
    except ValueError as error:
        raise GrantError(f"the pod's grant {error}") from error
