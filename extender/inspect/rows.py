"""What people are shown of the ledger: nodes with their GPUs, pods, and explanations, also the JSON of /v1.

Names and amounts only, never a whole pod.
"""

from enum import StrEnum

import msgspec

from cotenant.contract.grant import Isolation
from cotenant.contract.inventory import Health, Mode
from cotenant.contract.reasons import Reason
from cotenant.contract.units import format_bytes
from extender.inspect.explain import NodeVerdict, ReasonCount
from extender.inspect.remedies import Change

# Why an instance gets no pods that the plugin neither made for one nor could destroy.
UNEXPLAINED = "no grant explains it"


class State(StrEnum):
    """Say how far a pod of ours has come."""

    WAITING = "waiting"
    BINDING = "binding"
    BOUND = "bound"
    # bound by somebody else, without a grant
    UNGRANTED = "ungranted"


class Holder(msgspec.Struct, frozen=True, rename="camel"):
    """Say what one pod holds of one GPU."""

    pod: str
    bytes: int
    state: State


class Kept(msgspec.Struct, frozen=True, rename="camel"):
    """Say what is kept of one GPU for a pod that waits for evicted ones to go, and until when, in words."""

    pod: str
    bytes: int
    until: str


class Slot(msgspec.Struct, frozen=True, rename="camel"):
    """Show one MIG instance of a GPU; start and size count memory slices, and nobody holds it where *pod* is empty.

    Of one that is handed out in *shares*, *pod* names all who hold some, with commas, and *held* counts them. *detail*
    says why it gets no new pods, and *kept* that the pod waits and does not hold it yet.
    """

    profile: str
    start: int
    size: int
    pod: str
    shares: int = 1
    held: int = 0
    detail: str = ""
    kept: bool = False


class GPURow(msgspec.Struct, frozen=True, rename="camel"):
    """Show one GPU and who holds what of it, the largest first."""

    index: int
    uuid: str
    model: str
    mode: Mode
    health: Health
    detail: str
    usable_bytes: int
    held_bytes: int
    free_bytes: int
    holders: tuple[Holder, ...]
    # what counts as taken by others than our pods, whether it is somebody else's whole, and who has it
    foreign_bytes: int = 0
    fenced: bool = False
    foreign: str = ""
    # of a MIG GPU: how many memory slices it has, and the instances that are there or held, by start
    slices: int = 0
    slots: tuple[Slot, ...] = ()
    # of a GPU under MPS: how many containers its daemon serves, and how many it may; 0 is no limit
    clients: int = 0
    max_clients: int = 0
    # in use by whomever, as its device plugin told last, to a twentieth of the GPU; None where it does not tell
    used_bytes: int | None = None
    # of what is neither held nor free: for whom it is kept
    kept: tuple[Kept, ...] = ()

    @property
    def beyond_bytes(self) -> int:
        """Count what is in use beyond all that is granted of it."""
        return max(0, (self.used_bytes or 0) - self.held_bytes)


class NodeRow(msgspec.Struct, frozen=True, rename="camel"):
    """Show one node; *problem* says why nothing can be placed on it, whatever the pod."""

    node: str
    problem: Reason | None
    detail: str
    gpus: tuple[GPURow, ...]


class Share(msgspec.Struct, frozen=True, rename="camel"):
    """Say what a pod holds of one GPU; the index is None where the node does not list the GPU any more."""

    index: int | None
    uuid: str
    bytes: int

    @property
    def sentence(self) -> str:
        """Say it in words."""
        return f"{format_bytes(self.bytes)} of GPU {self.uuid if self.index is None else self.index}"


class Promise(msgspec.Struct, frozen=True, rename="camel"):
    """Say what is kept on a node for a pod that waits for evicted ones to go, and until when, in words."""

    pod: str
    node: str
    gpus: tuple[Share, ...]
    until: str

    @property
    def sentence(self) -> str:
        """Say it in words."""
        what = ", ".join(one.sentence for one in self.gpus)
        return f"{what} on {self.node} {'is' if len(self.gpus) == 1 else 'are'} kept for {self.pod} {self.until}"


class PodRow(msgspec.Struct, frozen=True, rename="camel"):
    """Show one pod; *reason* and *sentence* say what is wrong with it or why it waits."""

    namespace: str
    name: str
    uid: str
    state: State
    node: str = ""
    gpus: tuple[Share, ...] = ()
    asks: str = ""
    enforced_by: str = ""
    reason: Reason | None = None
    sentence: str = ""
    # of one that waits: what is kept for it
    promise: Promise | None = None

    @property
    def key(self) -> str:
        """Name the pod for people: namespace/name."""
        return f"{self.namespace}/{self.name}"


class Totals(msgspec.Struct, frozen=True, rename="camel"):
    """Sum the cluster up; free bytes and the largest free block are of healthy GPUs of nodes without a problem.

    That block is of one GPU that is shared by memory; None where there is no such GPU.
    """

    nodes: int
    nodes_with_problems: int
    nodes_without_inventory: int
    gpus: int
    unhealthy_gpus: int
    # well, but somebody else's whole
    fenced_gpus: int
    usable_bytes: int
    held_bytes: int
    free_bytes: int
    largest_free_block_bytes: int | None
    pods: int
    waiting: int
    # in use by whomever, and of how many GPUs that is known
    used_bytes: int = 0
    used_gpus: int = 0


class NodePage(msgspec.Struct, frozen=True, rename={"continue_": "continue"}):
    """Hold some nodes in the order of their names, how many more there are, and what to ask for them with."""

    cluster: Totals
    items: tuple[NodeRow, ...]
    remaining: int = 0
    continue_: str = ""


class PodPage(msgspec.Struct, frozen=True, rename={"continue_": "continue"}):
    """Hold some pods in the order of namespace and name, how many more there are, and what to ask for them with."""

    items: tuple[PodRow, ...]
    remaining: int = 0
    continue_: str = ""


class NamespaceRow(msgspec.Struct, frozen=True, rename="camel"):
    """Show what the pods of a namespace hold and may hold, None for no limit; empty models and isolations are any."""

    namespace: str
    pods: int
    held_bytes: int
    limit_bytes: int | None
    gpus: int
    gpu_limit: int | None
    models: tuple[str, ...]
    isolations: tuple[Isolation, ...]


class NamespacePage(msgspec.Struct, frozen=True, rename={"continue_": "continue"}):
    """Hold some namespaces by name, how many more there are, and what to ask for them with."""

    items: tuple[NamespaceRow, ...]
    remaining: int = 0
    continue_: str = ""


class Expected(msgspec.Struct, frozen=True, rename="camel"):
    """Say how many of a hundred pods are of one kind; memory is of each GPU, *alone* says that it wants them whole."""

    percent: float
    gpus: int
    memory_bytes: int
    cpu_milli: int
    models: tuple[str, ...]
    alone: bool


class MixPage(msgspec.Struct, frozen=True):
    """Hold the pods that policies expect, the most frequent first; *pinned* says that the configuration names them."""

    pinned: bool
    items: tuple[Expected, ...]


class PodExplanation(msgspec.Struct, frozen=True, rename={"continue_": "continue"}):
    """Explain one pod; *summary* is one sentence, *nodes* stand in the order of what they lack.

    One that is *simulated* is not there.
    """

    pod: PodRow
    summary: str
    simulated: bool = False
    fitting: int = 0
    reasons: tuple[ReasonCount, ...] = ()
    changes: tuple[Change, ...] = ()
    # what is free and yet not to be had: kept for others, the most first
    kept: tuple[Promise, ...] = ()
    nodes: tuple[NodeVerdict, ...] = ()
    remaining: int = 0
    continue_: str = ""
