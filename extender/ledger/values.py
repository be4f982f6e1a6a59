"""What the ledger shows: nodes, their GPUs, and what pods hold of them."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum

import msgspec

from cotenant.contract.compute import NOTHING, Compute
from cotenant.contract.inventory import GPU, Family, Health, MIGInstance
from cotenant.contract.mig import Geometry, overlap
from cotenant.contract.mps import NONE, Clients
from cotenant.contract.names import mig_suffix
from cotenant.contract.reasons import Reason
from cotenant.contract.request import PodRequest, RequestError


class Node(msgspec.Struct, frozen=True):
    """Hold the fields of a Kubernetes Node that the ledger reads."""

    class Metadata(msgspec.Struct, frozen=True):
        """Hold a node's name and annotations."""

        name: str
        resource_version: str | None = msgspec.field(name="resourceVersion", default=None)
        annotations: dict[str, str] | None = None
        labels: dict[str, str] | None = None

    class Status(msgspec.Struct, frozen=True):
        """Hold what the kubelet advertises."""

        allocatable: dict[str, str | int] | None = None

    metadata: Metadata
    status: Status = Status()


class GPUState(msgspec.Struct, frozen=True, gc=False):
    """Show one GPU and what is held of it."""

    gpu: GPU
    held_bytes: int
    # what a new pod could be given; never negative, though a GPU may shrink under its pods, and others may use it
    free_bytes: int
    # how many pods hold something of it
    pods: int
    # how many containers MPS serves on it, and as whom those of its daemon run
    clients: int = 0
    users: frozenset[int] = frozenset()
    # what is kept, beyond what is held, for pods whose victims have yet to go
    promised_bytes: int = 0

    @property
    def healthy(self) -> bool:
        """Tell whether new pods may be placed on it."""
        return self.gpu.is_open

    @property
    def empty(self) -> bool:
        """Tell whether nobody has any of it, pods or others."""
        return not (self.pods or self.gpu.foreign_bytes)


class MIGSlot(msgspec.Struct, frozen=True):
    """Name a GPU instance that a pod holds, by its parent's UUID; it need not exist yet."""

    uuid: str
    instance: MIGInstance


class MIGState(msgspec.Struct, frozen=True):
    """Show one MIG GPU: what it can be cut into, and the instances that are held, or are there for nobody to have."""

    gpu: GPU
    geometry: Geometry
    # one of which several shares are held stands here as often
    taken: tuple[MIGInstance, ...]
    # somebody may hold any of it: a grant that cannot be read, or memory of before it was a MIG GPU
    closed: bool
    held_bytes: int
    pods: int

    @property
    def healthy(self) -> bool:
        """Tell whether new pods may be placed on it."""
        return self.gpu.is_open

    @property
    def static(self) -> bool:
        """Tell whether its instances are given, and none is made."""
        return self.gpu.family is Family.MIG_STATIC

    @property
    def instances(self) -> tuple[MIGInstance, ...]:
        """List the instances of a static GPU."""
        return self.gpu.mig.instances if self.gpu.mig is not None else ()

    def replicas(self, profile: str) -> int:
        """Count the shares that an instance of *profile* is; 1 where it is handed out whole."""
        return self.gpu.mig.replicas(profile) if self.gpu.mig is not None else 1

    def suffix(self, profile: str) -> str:
        """Say under which name pods ask an instance of *profile*."""
        return self.gpu.mig.suffix(profile) if self.gpu.mig is not None else mig_suffix(profile)

    def free_shares(self, taken: Sequence[MIGInstance] | None = None) -> dict[MIGInstance, int]:
        """Count what can be had of each instance of a static GPU; one that is whole is one share.

        None of one that is unwell, or that something else lies on. *taken* is instead of what the ledger knows.
        """
        unfit = self.gpu.mig.unfit if self.gpu.mig is not None else frozenset()
        held = Counter(self.taken if taken is None else taken)
        free = {}
        for one in self.instances:
            bare = msgspec.structs.replace(one, uuid="")
            closed = one.uuid in unfit or any(overlap(one, other) for other in held if other != bare)
            free[one] = 0 if closed else max(0, self.replicas(one.profile) - held[bare])
        return free


def closed_by(state: GPUState | MIGState) -> Reason:
    """Say why nothing is placed on a GPU that is not open."""
    return Reason.FENCED_GPU if state.gpu.health is Health.HEALTHY else Reason.UNHEALTHY_GPU


def all_closed_by(states: Iterable[GPUState | MIGState]) -> Reason:
    """Say why nothing is placed on any of several: that others hold one is what somebody can do something about."""
    return Reason.FENCED_GPU if any(closed_by(one) is Reason.FENCED_GPU for one in states) else Reason.UNHEALTHY_GPU


class NodeView(msgspec.Struct, frozen=True, gc=False):
    """Show one node at one moment."""

    name: str
    # the GPUs that gpu-mem counts, and those of them that new pods may be placed on
    gpus: tuple[GPUState, ...]
    healthy: tuple[GPUState, ...]
    # why nothing can be placed on the node, whatever the pod
    problem: Reason | None
    # what is wrong with the inventory, for people
    detail: str = ""
    # what pods may ask of the node besides, and what those on it leave; never negative
    compute: Compute = NOTHING
    free_compute: Compute = NOTHING
    # how many of its pods hold so many GPUs, so many bytes of the one they hold most of
    sizes: tuple[tuple[tuple[int, int], int], ...] = ()
    # the GPUs that MIG partitions, why no instance can be had of the node, and the profiles its kubelet advertises
    mig: tuple[MIGState, ...] = ()
    mig_problem: Reason | None = None
    advertised: frozenset[str] = frozenset()
    # those of its labels that the ledger was told to keep
    labels: Mapping[str, str] = {}

    @property
    def states(self) -> list[GPUState | MIGState]:
        """List the GPUs of every family, by index."""
        return sorted([*self.gpus, *self.mig], key=lambda state: state.gpu.index)

    def problem_of(self, state: GPUState | MIGState) -> Reason | None:
        """Say why nothing can be placed on this GPU of the node, be it well."""
        return self.mig_problem if isinstance(state, MIGState) else self.problem


class Stage(StrEnum):
    """Say how sure a hold is."""

    ASSUMED = "assumed"
    BOUND = "bound"
    # kept for a pod that waits for its victims to go; never among holds()
    PROMISED = "promised"


class Hold(msgspec.Struct, frozen=True, gc=False):
    """Show what one pod holds on one node.

    *charges* are bytes by GPU UUID, and *slots* the MIG instances that they lie in, if in any. A grant that cannot be
    read (*problem* says why) is of a GPU that cannot be named, so *everywhere_bytes* count on every GPU of the
    node, or every MIG GPU is closed: never too little on the right one.
    """

    uid: str
    key: str
    node: str
    stage: Stage
    grant: str
    charges: Mapping[str, int]
    # the GPUs that are the pod's alone, whatever it was charged: one that grows under it stays closed
    alone: frozenset[str] = frozenset()
    everywhere_bytes: int = 0
    # what it is to MPS: by GPU UUID, or like everywhere_bytes, on every GPU
    clients: Mapping[str, Clients] = {}
    everywhere_clients: Clients = NONE
    slots: tuple[MIGSlot, ...] = ()
    closes_mig: bool = False
    problem: str = ""
    # how many GPUs it has, as Grant.gpus counts; the most it can have where the grant cannot be read
    gpus: int = 0
    # what mark() said when it was assumed
    since: int = 0

    @property
    def namespace(self) -> str:
        """Name the pod's namespace."""
        return self.key.partition("/")[0]

    @property
    def bytes(self) -> int:
        """Count what it holds of all GPUs, at least as much as it can hold of one where that cannot be read."""
        return sum(self.charges.values()) + self.everywhere_bytes


class Use(msgspec.Struct, frozen=True, gc=False):
    """Show what the pods of one namespace hold together."""

    bytes: int = 0
    gpus: int = 0
    pods: int = 0


class Waiting(msgspec.Struct, frozen=True):
    """Show a pod of ours that is not bound yet, and what it asks for, as of which version of it."""

    uid: str
    key: str
    request: PodRequest | RequestError
    version: str | None = None
