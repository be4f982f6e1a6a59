"""What the pods of a namespace may have, by the extender's configuration. Pure.

Two kinds of no: what a pod may never have, whoever else holds what, is a RequestError, which admission gives as well;
what the others of its namespace hold just now is an Excess, and the pod waits until they hold less.
"""

from collections.abc import Mapping
from heapq import nsmallest
from typing import Literal

import msgspec

from cotenant.contract.configuration import ANY_NAMESPACE, NamespaceLimits
from cotenant.contract.grant import Isolation
from cotenant.contract.names import Names
from cotenant.contract.reasons import Reason
from cotenant.contract.request import PodRequest, RequestError
from cotenant.contract.units import format_bytes
from extender.ledger import Hold, NodeView, Use
from extender.placement import partition
from extender.placement.fit import Placement, pieces, place
from extender.placement.wishes import is_wished


class Excess(msgspec.Struct, frozen=True):
    """Say that a pod asks more than its namespace's limit leaves."""

    namespace: str
    what: Literal["GPU memory", "GPUs"]
    limit: int
    used: int
    # the least that the pod would be charged, where that is a matter of the GPU
    asked: int

    @property
    def constant(self) -> str:
        """Say it without what is in use: a message that changes makes kube-scheduler try the pod again at once."""
        return (
            f"namespace {self.namespace} may hold {self._amount(self.limit)}, of which its pods leave less than the "
            f"{self._amount(self.asked)} that the pod asks"
        )

    @property
    def sentence(self) -> str:
        """Say all of it."""
        return (
            f"namespace {self.namespace} may hold {self._amount(self.limit)}, its pods hold "
            f"{self._amount(self.used)}, and the pod asks {self._amount(self.asked)}"
        )

    def _amount(self, amount: int) -> str:
        if self.what == "GPU memory":
            return f"{format_bytes(amount)} of GPU memory"
        return f"{amount} GPU" if amount == 1 else f"{amount} GPUs"


class Tenants:
    """Hold pods to the limits of their namespaces."""

    def __init__(self, limits: Mapping[str, NamespaceLimits], names: Names) -> None:
        self._limits = dict(limits)
        self._names = names

    @property
    def named(self) -> list[str]:
        """List the namespaces that have limits of their own."""
        return sorted(set(self._limits) - {ANY_NAMESPACE})

    def of(self, namespace: str) -> NamespaceLimits | None:
        """Give the limits of a namespace, those of all others where it is not named; None where there are none."""
        return self._limits.get(namespace) or self._limits.get(ANY_NAMESPACE)

    def hold(self, namespace: str, request: PodRequest) -> PodRequest:
        """Give *request* kept to the models and the isolation that the namespace may have.

        Raises RequestError for what its pods may not ask, or could not have if they held nothing else.
        """
        limits = self.of(namespace)
        if limits is None:
            return request
        asked = _isolation(request)
        if limits.isolations and asked not in limits.isolations:
            raise RequestError(
                Reason.NAMESPACE_LIMIT,
                f"namespace {namespace} may ask {self._names.isolation}: {' or '.join(limits.isolations)}, "
                f"and the pod asks {asked}",
            )
        excess = self.excess(namespace, request, Use())
        if excess is not None:
            raise RequestError(Reason.NAMESPACE_LIMIT, f"{excess.constant}, even where they hold nothing")
        wishes = request.wishes
        if limits.isolations and wishes.isolation not in limits.isolations:
            # it counts as strict for its MIG instances, of which a share isolates nothing
            wishes = msgspec.structs.replace(wishes, isolation=asked)
        if limits.models:
            wishes = msgspec.structs.replace(wishes, within=limits.models)
        return request if wishes is request.wishes else msgspec.structs.replace(request, wishes=wishes)

    def excess(
        self,
        namespace: str,
        request: PodRequest,
        use: Use,
        view: NodeView | None = None,
        aim: partition.Aim = partition.ROOM,
    ) -> Excess | None:
        """Say which limit *request* exceeds beside what is in *use*; None where none.

        Of a MIG instance or a GPU for the pod alone it is known on a node alone, *view*, what would be charged; of an
        instance by what the pod would get there by *aim*.
        """
        limits = self.of(namespace)
        if limits is None:
            return None
        asked = least_bytes(request) if view is None else least_bytes_on(view, request, aim)
        return _excess(namespace, limits, use, request.gpus, asked)

    def depends_on_node(self, namespace: str, request: PodRequest, use: Use, largest_bytes: int) -> bool:
        """Tell whether only a node tells if *request* exceeds a limit beside what is in *use*.

        Of a MIG instance it is, and of a GPU for the pod alone where one of *largest_bytes*, the largest that there
        are, would be too much: to ask each of 500 nodes takes 23 ms.
        """
        limits = self.of(namespace)
        if limits is None or limits.gpu_memory is None:
            return False
        if request.profiles:
            return True
        most = largest_bytes * request.wishes.gpu_count
        return request.wishes.isolation.whole_gpu and bool(_excess(namespace, limits, use, request.gpus, most))

    def exceeded_by(self, hold: Hold, use: Use) -> Excess | None:
        """Say which limit what a pod is about to hold exceeds beside what is in *use*; None where none."""
        limits = self.of(hold.namespace)
        return None if limits is None else _excess(hold.namespace, limits, use, hold.gpus, hold.bytes)


def _excess(namespace: str, limits: NamespaceLimits, use: Use, gpus: int, amount: int) -> Excess | None:
    """Say which of *limits* so many *gpus*, and that *amount* of bytes, exceed beside what is in *use*."""
    if limits.gpus is not None and use.gpus + gpus > limits.gpus:
        return Excess(namespace, "GPUs", limits.gpus, use.gpus, gpus)
    most = limits.gpu_memory_bytes
    if most is not None and use.bytes + amount > most:
        return Excess(namespace, "GPU memory", most, use.bytes, amount)
    return None


def least_bytes(request: PodRequest) -> int:
    """Count the least that *request* is charged wherever it goes."""
    return sum(pieces(request)) * request.wishes.gpu_count if not request.profiles else 0


def least_bytes_on(view: NodeView, request: PodRequest, aim: partition.Aim) -> int:
    """Count what *request* would be charged on one node just now; the least, were it empty, where it does not fit."""
    wishes = request.wishes
    if request.profiles:
        # an instance may be whole on one GPU and a share on another: what bind would give is what counts
        slots = partition.place(view, request, aim)
        if not isinstance(slots, Reason):
            return sum(map(partition.charged, slots))
        return sum(partition.least_bytes(view, wishes, profile) for profile in request.profiles)
    if not wishes.isolation.whole_gpu:
        return least_bytes(request)
    # so it is of a GPU for itself, too: the smallest may be MPS's, which comes last, or of a daemon that serves others
    placed = place(view, request)
    if isinstance(placed, Placement):
        return sum(state.gpu.usable_bytes for state in placed.gpus[0])
    need = max(pieces(request))
    large = (s.gpu.usable_bytes for s in view.gpus if is_wished(s, wishes) and s.gpu.usable_bytes >= need)
    return sum(nsmallest(wishes.gpu_count, large))


def _isolation(request: PodRequest) -> Isolation:
    """Say what isolation the pod asks, for which it need not say a word where it asks a MIG instance."""
    return Isolation.STRICT if request.profiles else request.wishes.isolation
