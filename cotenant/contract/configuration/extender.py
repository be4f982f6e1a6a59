"""The configuration of `cotenant-extender`."""

import re
from enum import StrEnum
from typing import Annotated

import msgspec

from cotenant.contract.configuration.shared import Seconds, Section, Shared, is_address, read_key
from cotenant.contract.grant import Isolation
from cotenant.contract.units import format_bytes, parse_bytes, parse_milli

_OBJECT = re.compile(r"[a-z0-9][-a-z0-9.]*/[a-z0-9][-a-z0-9.]*")


class Placement(StrEnum):
    """Say who has the last word: ADVISE leaves it to all scorers, DECIDE returns the best node alone."""

    ADVISE = "advise"
    DECIDE = "decide"


class Layout(StrEnum):
    """Say which scheduler calls us: a second one of our own, or the cluster's."""

    SECOND_SCHEDULER = "second-scheduler"
    ATTACHED = "attached"


class TLS(Section, frozen=True, kw_only=True):
    """Name the certificate that `serve` shows; the API server calls webhooks by HTTPS only."""

    cert_file: str
    key_file: str


class VerbsTLS(TLS, frozen=True, kw_only=True):
    """Name the certificate that `listen` shows, and the authority of those who may call it."""

    client_ca_file: str = msgspec.field(name="clientCAFile")


class Writer(Section, frozen=True, kw_only=True):
    """Name the Lease whose holder is the one extender that may bind, and how it is held.

    In the layout second-scheduler kube-scheduler holds it, and the extender beside it in its pod follows; in the layout
    attached the extender holds it itself, and the last three keys say how, as those of kube-scheduler's leaderElection.
    """

    # NAMESPACE/NAME
    lease: str
    # How long API servers may go on taking the last holder's word after a take-over: until then nothing is bound.
    settle: Seconds = 1.0
    lease_duration: Seconds = 3.0
    renew_deadline: Seconds = 2.0
    retry_period: Seconds = 0.5

    def __post_init__(self) -> None:
        if not _OBJECT.fullmatch(self.lease):
            raise ValueError(f"lease: expected NAMESPACE/NAME, got {self.lease!r}")
        if not self.retry_period < self.renew_deadline < self.lease_duration:
            raise ValueError(
                "expected retryPeriod < renewDeadline < leaseDuration, got "
                f"{self.retry_period:g}, {self.renew_deadline:g} and {self.lease_duration:g}"
            )

    @property
    def namespace(self) -> str:
        """Give the Lease's namespace."""
        return self.lease.partition("/")[0]

    @property
    def name(self) -> str:
        """Give the Lease's name."""
        return self.lease.partition("/")[2]


class FragmentedPreemption(Section, frozen=True, kw_only=True):
    """Say how the extender evicts for pods that fit nowhere only because free memory lies in pieces."""

    # How long a pod must have waited in vain.
    after: Seconds = 3.0
    # How long what its victims have left is kept for it.
    hold_for: Seconds = 120.0
    # How many pods may be evicted in a minute; a pod that takes more by itself waits for a minute without any.
    per_minute: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 10


class TypicalPod(Section, frozen=True, kw_only=True):
    """Describe pods that are alike, of which *weight* come where others come with theirs."""

    weight: Annotated[int, msgspec.Meta(ge=1, le=1000)]
    # Of each of its GPUs, as "8GiB"; and what it asks besides, as Kubernetes writes it.
    memory: str | int = 0
    gpus: Annotated[int, msgspec.Meta(ge=0, le=64)] = 1
    cpu: str | int = 0
    # As in the annotation gpu-model; empty for any.
    models: tuple[str, ...] = ()
    # Whether it wants its GPUs for itself.
    alone: bool = False

    def __post_init__(self) -> None:
        read_key("memory", parse_bytes, self.memory)
        if read_key("cpu", parse_milli, self.cpu) < 0:
            raise ValueError(f"cpu: {self.cpu!r} is negative")
        if self.gpus and not (self.memory_bytes or self.alone):
            raise ValueError("memory: a pod with GPUs asks some memory of each, or wants them alone")

    @property
    def memory_bytes(self) -> int:
        """Give the bytes of each GPU."""
        return parse_bytes(self.memory)

    @property
    def cpu_milli(self) -> int:
        """Give thousandths of a core."""
        return parse_milli(self.cpu)


# Stands for every namespace that has no limits of its own.
ANY_NAMESPACE = "*"
_NAMESPACE = re.compile(r"\*|[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


class NamespaceLimits(Section, frozen=True, kw_only=True):
    """Limit what the pods of one namespace may have together, and which GPUs and isolation each of them."""

    # Of all GPUs together, as "160GiB"; null: no limit.
    gpu_memory: str | int | None = None
    # A pod's part of a GPU counts as one, and so does a MIG instance; null: no limit.
    gpus: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] | None = None
    # As in the annotation gpu-model; empty for any.
    models: Annotated[tuple[str, ...], msgspec.Meta(max_length=64)] = ()
    # What pods may ask as isolation, where none is what a pod asks that says nothing; empty for any.
    isolations: tuple[Isolation, ...] = ()

    def __post_init__(self) -> None:
        if self.gpu_memory is not None and read_key("gpuMemory", parse_bytes, self.gpu_memory) < 0:
            raise ValueError(f"gpuMemory: {format_bytes(self.gpu_memory_bytes or 0)} is negative")
        if any(not model.strip() for model in self.models):
            raise ValueError("models: an empty pattern allows no model; leave the key out to allow all")

    @property
    def gpu_memory_bytes(self) -> int | None:
        """Give the bytes of all GPUs together, None for no limit."""
        return None if self.gpu_memory is None else parse_bytes(self.gpu_memory)


class NodePool(Section, frozen=True, kw_only=True):
    """Name nodes by labels, all of which they have, and the policy that holds among them."""

    labels: Annotated[dict[str, str], msgspec.Meta(min_length=1, max_length=16)]
    policy: str


class ExtenderConfiguration(Shared, frozen=True, kw_only=True):
    """Configure `cotenant-extender`; a flag of the same name wins over a key."""

    # Where filter, prioritize, preempt and bind are answered. Loopback: whoever reaches it can bind pods.
    listen: str = "127.0.0.1:9480"
    # Where everything else is answered: health, version, metrics, admission.
    serve: str = "127.0.0.1:9481"
    tls: TLS | None = None
    # By which kube-scheduler has to call `listen`, with a certificate of its own; read again when the files change.
    verbs_tls: VerbsTLS | None = msgspec.field(name="verbsTLS", default=None)
    placement: Placement = Placement.ADVISE
    # The policy that chooses GPUs and scores nodes, where the pod names none.
    policy: str = "priced-leftovers"
    # Policies by scheduler profile: for the pods whose spec.schedulerName is that.
    profile_policies: Annotated[dict[str, str], msgspec.Meta(max_length=64)] | None = None
    # Policies by node pool: they choose among its nodes, and the GPU there; the first pool that a node is in counts.
    node_pools: Annotated[tuple[NodePool, ...], msgspec.Meta(max_length=64)] | None = None
    # Another policy whose placements are worked out beside, for metrics alone.
    shadow: str | None = None
    # The pods that policies expect; null: learned from those that came last.
    mix: Annotated[tuple[TypicalPod, ...], msgspec.Meta(min_length=1, max_length=200)] | None = None
    layout: Layout = Layout.SECOND_SCHEDULER
    # The scheduler that admission gives our pods to, in the layout second-scheduler.
    scheduler_name: str = "cotenant-scheduler"
    # Who may write grants, as the API server names them; the admission webhook refuses everybody else.
    extender_user: str = "system:serviceaccount:cotenant-system:cotenant-extender"
    # What the pods of a namespace may have, by its name; * is for every namespace that is not named.
    namespaces: dict[str, NamespaceLimits] = msgspec.field(default_factory=dict)
    # Where several extenders stand by, the Lease that says which of them binds; without it there must be one only.
    writer: Writer | None = None
    # How long one bind may take before kube-scheduler is told that its outcome is unknown. Below its httpTimeout.
    bind_timeout: Seconds = 10.0
    # Point kube-scheduler at a node that fits when none of its sample does (status.nominatedNodeName).
    nominate: bool = True
    # Evict pods that use more GPU memory than they were granted for so many seconds; null: never.
    evict_overusers_after: Seconds | None = None
    # Evict pods of lower priority for one that fits nowhere because free memory lies in pieces; null: never.
    preempt_fragmented: FragmentedPreemption | None = None
    # Show every GPU and pod in /metrics, not nodes and sums alone: four samples a GPU and one a pod.
    gpu_metrics: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("listen", "serve"):
            if not is_address(getattr(self, key)):
                raise ValueError(f"{key}: expected HOST:PORT, such as 127.0.0.1:9480, got {getattr(self, key)!r}")
        if self.layout is Layout.SECOND_SCHEDULER and self.scheduler_name == "default-scheduler":
            raise ValueError(
                "schedulerName: default-scheduler is the cluster's own, and both would place every pod; give ours "
                "another name, or set layout: attached where the cluster's own is to call the extender"
            )
        for name in self.namespaces:
            if not _NAMESPACE.fullmatch(name):
                raise ValueError(f"namespaces: expected names of namespaces, or * for all others, got {name[:80]!r}")
        if self.verbs_tls is not None and self.listen == self.serve and not self.listen.endswith(":0"):
            raise ValueError("verbsTLS: needs an address of its own; give listen and serve different ones")
