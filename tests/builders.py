"""Builders of what Kubernetes and the two programs hand each other, to be read as prose.

a_pod().named("p").asking(8).wishing(isolation="exclusive"), a_node("n").with_gpus(8, "80GiB").under_mps(). Every step
gives a new builder. as_json() is the object as the API server has it, build() what our programs decode from that.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import msgspec

from cotenant.contract import environment
from cotenant.contract import inventory as inventories
from cotenant.contract.boards import board
from cotenant.contract.grant import GIVEN, ContainerGrant, GPUShare, Grant, Isolation, IsolationRecord, Role
from cotenant.contract.inventory import (
    GPU,
    MIG,
    Family,
    Health,
    InstanceShares,
    Inventory,
    MIGInstance,
    Mode,
    UnhealthyInstance,
)
from cotenant.contract.names import Names
from cotenant.contract.pods import Pod
from cotenant.contract.request import PodRequest, parse
from cotenant.contract.units import GIB, parse_bytes
from extender.ledger import Node

NAMES = Names()

Json = dict[str, Any]


@dataclass(frozen=True)
class PodBuilder:
    name: str = "p"
    namespace: str = "default"
    uid: str | None = None
    init: tuple[Json, ...] = ()
    main: tuple[Json, ...] = ()
    annotations: tuple[tuple[str, str], ...] = ()
    spec: tuple[tuple[str, Any], ...] = ()
    status: tuple[tuple[str, Any], ...] = ()
    metadata: tuple[tuple[str, Any], ...] = ()

    def named(self, name: str) -> Self:
        return replace(self, name=name)

    def in_namespace(self, namespace: str) -> Self:
        return replace(self, namespace=namespace)

    def with_uid(self, uid: str) -> Self:
        return replace(self, uid=uid)

    def asking(self, units: Any, *, of: str = NAMES.gpu_mem) -> Self:
        """Add a main container that asks *units*, as limit and so as request."""
        return self.with_container({of: units})

    def with_container(self, limits: Json | None, requests: Json | None = None, *, name: str | None = None) -> Self:
        name = name or f"main-{len(self.main)}"
        return replace(self, main=(*self.main, _container(name, limits, requests)))

    def with_init(self, units: Any) -> Self:
        return replace(self, init=(*self.init, _container(f"init-{len(self.init)}", {NAMES.gpu_mem: units}, None)))

    def with_sidecar(self, units: Any) -> Self:
        sidecar = _container(f"sidecar-{len(self.init)}", {NAMES.gpu_mem: units}, None) | {"restartPolicy": "Always"}
        return replace(self, init=(*self.init, sidecar))

    def wishing(self, **wishes: Any) -> Self:
        """Add wishes by the last part of their annotation's name: gpu_count=2 is cotenant.io/gpu-count: "2"."""
        named = {f"{NAMES.domain}/{wish.replace('_', '-')}": str(value) for wish, value in wishes.items()}
        return self.annotated(named)

    def annotated(self, more: dict[str, str]) -> Self:
        return replace(self, annotations=(*self.annotations, *more.items()))

    def running_as(self, user: int | None) -> Self:
        """Set the pod's runAsUser; None leaves it to the image."""
        return self if user is None else replace(self, spec=(*self.spec, ("securityContext", {"runAsUser": user})))

    def in_a_user_namespace(self) -> Self:
        return replace(self, spec=(*self.spec, ("hostUsers", False)))

    def bound_to(self, node: str, grant: Grant | str | None = None) -> Self:
        """Bind it, with a grant, the text of something that is none, or nothing."""
        bound = replace(self, spec=(*self.spec, ("nodeName", node)))
        if grant is None:
            return bound
        return bound.annotated(
            environment.annotations(grant, NAMES) if isinstance(grant, Grant) else {NAMES.grant: grant}
        )

    def in_phase(self, phase: str) -> Self:
        return replace(self, status=(*self.status, ("phase", phase)))

    def of_priority(self, priority: int) -> Self:
        return replace(self, spec=(*self.spec, ("priority", priority)))

    def terminating(self) -> Self:
        return replace(self, metadata=(*self.metadata, ("deletionTimestamp", "2026-01-01T00:00:00Z")))

    def as_json(self) -> Json:
        spec: Json = {"containers": list(self.main) or [_container("main-0", None, None)], **dict(self.spec)}
        if self.init:
            spec["initContainers"] = list(self.init)
        return {
            "metadata": {
                "name": self.name,
                "namespace": self.namespace,
                "uid": self.uid or f"uid-of-{self.name}",
                "annotations": dict(self.annotations),
                **dict(self.metadata),
            },
            "spec": spec,
            "status": {"phase": "Pending", **dict(self.status)},
        }

    def build(self) -> Pod:
        return msgspec.json.decode(msgspec.json.encode(self.as_json()), type=Pod)


def _container(name: str, limits: Json | None, requests: Json | None) -> Json:
    resources = {key: amounts for key, amounts in (("limits", limits), ("requests", requests)) if amounts is not None}
    if limits is not None and requests is None:
        resources["requests"] = limits  # as kube-apiserver fills it in
    return {"name": name, "image": "example/image:1", "resources": resources}


def a_pod() -> PodBuilder:
    return PodBuilder()


def request_of(pod: PodBuilder | Pod) -> PodRequest:
    """Read what a pod asks, in units of a GiB."""
    request = parse(pod if isinstance(pod, Pod) else pod.build(), NAMES, GIB)
    assert request is not None
    return request


@dataclass(frozen=True)
class NodeBuilder:
    name: str
    gpus: tuple[GPU, ...] = ()
    unit_bytes: int = GIB
    serving: bool = True
    advertised: str | None = "1000"
    text: str | None = None
    bare: bool = False
    instances: str | None = "7"
    cpu: str = "64"

    def with_gpus(self, count: int, size: str = "80GiB", **fields: Any) -> Self:
        """Add *count* GPUs of *size* usable memory; their UUIDs are GPU-<node>-<index>."""
        amount = parse_bytes(size)
        first = len(self.gpus)
        added = tuple(
            GPU(
                **{
                    "uuid": f"GPU-{self.name}-{index}",
                    "index": index,
                    "model": "NVIDIA H100 80GB HBM3",
                    "total_bytes": amount,
                    "usable_bytes": amount,
                    **fields,
                }
            )
            for index in range(first, first + count)
        )
        return replace(self, gpus=(*self.gpus, *added))

    def with_mig(
        self, board_name: str = "A100-SXM4-40GB", *, static: Sequence[str] | None = None, **fields: Any
    ) -> Self:
        """Add a GPU that is cut on demand; or one with instances, *static* as "3g.20gb@4"."""
        known = board(board_name)
        instances = tuple(an_instance(text) for text in static or ())
        return self.with_gpus(
            1,
            f"{known.memory_mib}MiB",
            **{
                "model": known.model,
                "family": Family.MIG_DYNAMIC if static is None else Family.MIG_STATIC,
                "mode": Mode.MIG,
                "mig": MIG(profiles=tuple(p.profile for p in known.profiles), instances=instances),
                **fields,
            },
        )

    def with_ill_instances(self, *texts: str) -> Self:
        """Say that some of the last GPU's instances get no new pods."""
        *others, last = self.gpus
        ill = tuple(UnhealthyInstance(uuid=an_instance(text).uuid, detail="XID 1000") for text in texts)
        mig = msgspec.structs.replace(last.mig or MIG(), unhealthy=ill)
        return replace(self, gpus=(*others, msgspec.structs.replace(last, mig=mig)))

    def with_ill_places(self, *texts: str) -> Self:
        """Say that instances of the last GPU, a dynamic one, met a trouble of the hardware where they lay."""
        *others, last = self.gpus
        places = [msgspec.structs.replace(an_instance(text), uuid="") for text in texts]
        ill = tuple(UnhealthyInstance(uuid=f"MIG-{one.start}", detail="XID 1000", place=one) for one in places)
        mig = msgspec.structs.replace(last.mig or MIG(), unhealthy=ill)
        return replace(self, gpus=(*others, msgspec.structs.replace(last, mig=mig)))

    def with_shares(self, profile: str, replicas: int, *, renamed: bool = False) -> Self:
        """Say that instances of a profile on the last GPU are handed out in shares."""
        *others, last = self.gpus
        mig = last.mig or MIG()
        shared = InstanceShares(profile=profile, replicas=replicas, renamed=renamed)
        mig = msgspec.structs.replace(mig, shares=(*mig.shares, shared))
        return replace(self, gpus=(*others, msgspec.structs.replace(last, mig=mig)))

    def with_unexplained(self, *texts: str) -> Self:
        """Say that the last GPU has instances that no grant explains."""
        *others, last = self.gpus
        mig = msgspec.structs.replace(last.mig or MIG(), unexplained=tuple(map(an_instance, texts)))
        return replace(self, gpus=(*others, msgspec.structs.replace(last, mig=mig)))

    def with_gpu(self, size: str = "80GiB", **fields: Any) -> Self:
        return self.with_gpus(1, size, **fields)

    def under_mps(self, *, max_clients: int = 0) -> Self:
        """Put all GPUs so far under MPS, one control daemon for all of them."""
        pipe = f"/run/mps/{self.name}"
        fields = {"mode": Mode.MPS, "mps_pipe": pipe, "max_clients": max_clients}
        gpus = tuple(msgspec.structs.replace(gpu, **fields) for gpu in self.gpus)
        return replace(self, gpus=gpus)

    def under_mps_each(self) -> Self:
        """Put all GPUs so far under MPS, each with a control daemon of its own."""
        gpus = tuple(
            msgspec.structs.replace(gpu, mode=Mode.MPS, mps_pipe=f"/run/mps/{gpu.uuid}", max_clients=48)
            for gpu in self.gpus
        )
        return replace(self, gpus=gpus)

    def unhealthy(self, *indices: int) -> Self:
        gpus = tuple(
            msgspec.structs.replace(gpu, health=Health.UNHEALTHY) if gpu.index in indices else gpu for gpu in self.gpus
        )
        return replace(self, gpus=gpus)

    def counting_in(self, unit_bytes: int) -> Self:
        return replace(self, unit_bytes=unit_bytes)

    def not_serving(self) -> Self:
        return replace(self, serving=False)

    def advertising(self, units: str | None) -> Self:
        """Say what stands in allocatable."""
        return replace(self, advertised=units)

    def with_cpu(self, amount: str) -> Self:
        return replace(self, cpu=amount)

    def advertising_no_instances(self, amount: str | None = None) -> Self:
        """Say that the kubelet has none of any profile: names them with "0", or not at all."""
        return replace(self, instances=amount)

    def annotated_as(self, text: str) -> Self:
        """Have *text* stand where the inventory belongs."""
        return replace(self, text=text)

    def without_inventory(self) -> Self:
        return replace(self, bare=True)

    @property
    def inventory(self) -> Inventory:
        return Inventory(generation=1, unit_bytes=self.unit_bytes, serving=self.serving, gpus=self.gpus)

    @property
    def node_annotations(self) -> dict[str, str]:
        if self.bare:
            return {}
        return {NAMES.inventory: self.text if self.text is not None else inventories.encode(self.inventory)}

    @property
    def allocatable(self) -> dict[str, str]:
        memory = {} if self.advertised is None else {NAMES.gpu_mem: self.advertised}
        if self.instances is None:
            return memory
        known = {gpu.mig.suffix(p.name) for gpu in self.gpus if gpu.mig for p in gpu.mig.profiles}
        return memory | {f"{NAMES.mig_prefix}{suffix}": self.instances for suffix in known}

    def as_json(self) -> Json:
        return {
            "metadata": {"name": self.name, "annotations": self.node_annotations},
            "status": {"allocatable": {"cpu": self.cpu, **self.allocatable}},
        }

    def build(self) -> Node:
        return msgspec.json.decode(msgspec.json.encode(self.as_json()), type=Node)


def an_instance(text: str) -> MIGInstance:
    """Read 3g.20gb@4 as an instance of the A100 with 40 GB; its UUID tells where it is."""
    profile, _, start = text.partition("@")
    size = next(p.size for p in board("A100-SXM4-40GB").profiles if p.name == profile)
    return MIGInstance(profile=profile, start=int(start), size=size, uuid=f"MIG-{text}")


def a_node(name: str = "n") -> NodeBuilder:
    return NodeBuilder(name)


def a_grant(*containers: ContainerGrant) -> Grant:
    return Grant(containers=containers)


def granted(
    amounts: dict[str, int], *, name: str = "main-0", role: str = "main", mode: str = "time-slicing", **more: Any
) -> ContainerGrant:
    """A container's grant of so many bytes of each GPU."""
    given, by = GIVEN[Mode(mode)]
    return ContainerGrant(
        **{
            "name": name,
            "role": Role(role),
            "family": Family.MEMORY,
            "mode": Mode(mode),
            "gpus": tuple(GPUShare(uuid=uuid, bytes=amount) for uuid, amount in amounts.items()),
            "units": len(amounts),
            "isolation": IsolationRecord(asked=Isolation.NONE, given=given, enforced_by=by),
            **more,
        }
    )
