"""Why a pod fits nowhere: the reason per node and GPU, what is missing in bytes, and the least that would help.

Pure: views and holds of the ledger in, values out. Every no is the Reason that filter gives; amounts stand beside it.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from heapq import nsmallest

import msgspec

from cotenant.contract.reasons import Reason
from cotenant.contract.request import PodRequest
from cotenant.contract.units import format_bytes
from extender.inspect.alternatives import instance, split
from extender.inspect.remedies import UNTIL_A_POD_ENDS, Change, Search
from extender.ledger import GPUState, Hold, MIGState, NodeView
from extender.placement import partition
from extender.placement.fit import largest, objection, pieces
from extender.placement.wishes import is_wished

# So many of what could be wished for are named, where none of it is what a pod wishes.
_NAMED = 8


class GPUVerdict(msgspec.Struct, frozen=True, rename="camel"):
    """Say whether one GPU alone could take the largest piece of the pod, and how many bytes it lacks if not."""

    index: int
    uuid: str
    model: str
    usable_bytes: int
    free_bytes: int
    pods: int
    reason: Reason | None
    shortfall_bytes: int
    # neither held nor free: kept for pods that wait for evicted ones to go
    kept_bytes: int = 0


class NodeVerdict(msgspec.Struct, frozen=True, rename="camel"):
    """Say why a node does not fit (None: it does), and how many bytes its best GPUs lack; None where bytes are no help.

    GPUs that fit by themselves may still not hold all of a pod together.
    """

    node: str
    reason: Reason | None
    detail: str
    shortfall_bytes: int | None
    gpus: tuple[GPUVerdict, ...]


class ReasonCount(msgspec.Struct, frozen=True):
    """Say how many nodes a reason holds for.

    *best* names the one that lacks the least, where bytes would help, what there is of what was called by a name, and
    the first that is closed, with why.
    """

    reason: Reason
    sentence: str
    nodes: int
    best: str = ""


class Explanation(msgspec.Struct, frozen=True):
    """Say where a request fits, why not elsewhere, and what would help; the nodes that lack least stand first."""

    fitting: tuple[str, ...]
    reasons: tuple[ReasonCount, ...]
    changes: tuple[Change, ...]
    # in the order of their shortfall; judged GPU by GPU only when asked for, since there may be thousands
    order: tuple[tuple[NodeView, Reason | None], ...]


def explain(
    request: PodRequest,
    views: Sequence[NodeView],
    verdicts: Mapping[str, float | Reason],
    holds: Iterable[Hold],
) -> Explanation:
    """Explain *request*, given filter's verdict on every node by name; nodes without a verdict are left out.

    *holds* are what pods have and what they are promised. What would help is looked for only where nothing fits.
    """
    refused: dict[str, Reason] = {name: v for name, v in verdicts.items() if isinstance(v, Reason)}
    known = [view for view in views if view.name in verdicts]
    lacking = {view.name: _shortfall(view, request) for view in known if view.name in refused}
    order = sorted(known, key=lambda view: _nearness(view.name, refused, lacking))
    fitting = tuple(view.name for view in order if view.name not in refused)
    changes: tuple[Change, ...] = ()
    if not fitting:
        search = Search(request, order, refused, holds)
        asked = *search.smaller(), *split(request, order), *instance(request, order, refused)
        changes = (*asked, *search.ended(), *search.mended(), *search.wished())
    return Explanation(
        fitting=fitting,
        reasons=_counted(order, refused, request),
        changes=changes,
        order=tuple((view, refused.get(view.name)) for view in order),
    )


def node_verdict(view: NodeView, reason: Reason | None, request: PodRequest) -> NodeVerdict:
    """Judge each GPU of a node by itself."""
    return NodeVerdict(
        node=view.name,
        reason=reason,
        detail=view.detail,
        shortfall_bytes=0 if reason is None else _shortfall(view, request),
        gpus=tuple(
            [_mig_verdict(state, request) for state in view.mig]
            if request.profiles
            else [_gpu_verdict(state, request) for state in view.gpus]
        ),
    )


def counts(verdicts: Iterable[float | Reason]) -> str:
    """Count reasons in the words of kube-scheduler: "0/5 nodes fit: 3 no single GPU ..., 2 ..."."""
    listed = list(verdicts)
    refused = Counter(verdict for verdict in listed if isinstance(verdict, Reason))
    fitting = len(listed) - refused.total()
    said = ", ".join(f"{count} {reason.sentence}" for reason, count in refused.most_common())
    return f"{fitting}/{len(listed)} nodes fit" + (f": {said}" if said else "")


def _gpu_verdict(state: GPUState, request: PodRequest) -> GPUVerdict:
    reason, lacking = objection(state, request.wishes, *largest(request))
    return GPUVerdict(
        index=state.gpu.index,
        uuid=state.gpu.uuid,
        model=state.gpu.model,
        usable_bytes=state.gpu.usable_bytes,
        free_bytes=state.free_bytes,
        pods=state.pods,
        reason=reason,
        shortfall_bytes=lacking,
        kept_bytes=state.promised_bytes,
    )


def _mig_verdict(state: MIGState, request: PodRequest) -> GPUVerdict:
    """Judge a MIG GPU by the first profile that it has no room for; free bytes are those of its free memory slices."""
    judged = (partition.objection(state, request.wishes, profile) for profile in request.profiles)
    return GPUVerdict(
        index=state.gpu.index,
        uuid=state.gpu.uuid,
        model=state.gpu.model,
        usable_bytes=state.gpu.usable_bytes,
        free_bytes=partition.free_bytes(state),
        pods=state.pods,
        reason=next(filter(None, judged), None),
        shortfall_bytes=0,
    )


def _shortfall(view: NodeView, request: PodRequest) -> int | None:
    """Count the bytes that must be freed on the node's best GPUs; None where no freed byte helps."""
    if request.profiles:
        return None  # room is a matter of where instances lie
    needs, count, most = pieces(request), request.wishes.gpu_count, largest(request)
    judged = [(state, *objection(state, request.wishes, *most)) for state in view.gpus]
    open_to = [(state, lacking) for state, reason, lacking in judged if reason is None or reason in UNTIL_A_POD_ENDS]
    if view.problem is not None or len(open_to) < count:
        return None
    together = sum(needs) * count - sum(state.free_bytes for state, _ in open_to)
    return max(together, sum(nsmallest(count, (lacking for _, lacking in open_to))), 0)


def _nearness(node: str, refused: Mapping[str, Reason], lacking: Mapping[str, int | None]) -> tuple[int, int, str]:
    if node not in refused:
        return 0, 0, node
    missing = lacking[node]
    return (2, 0, node) if missing is None else (1, missing, node)


def _counted(order: Sequence[NodeView], refused: Mapping[str, Reason], request: PodRequest) -> tuple[ReasonCount, ...]:
    refusing: dict[Reason, list[NodeView]] = {}
    for view in order:
        if view.name in refused:
            refusing.setdefault(refused[view.name], []).append(view)
    return tuple(
        ReasonCount(reason=reason, sentence=reason.sentence, nodes=len(views), best=_best(views, reason, request))
        for reason, views in sorted(refusing.items(), key=lambda item: -len(item[1]))
    )


def _best(views: Sequence[NodeView], reason: Reason, request: PodRequest) -> str:
    """Name what comes closest, of nodes that stand in the order of what they lack, or what there is by its names."""
    if reason is Reason.NO_GPU_FITS:
        return _freest(views[0], request)
    if reason is Reason.TOO_LARGE:
        return _largest(views, request)
    if reason is Reason.NO_SUCH_GPU and request.wishes.models:
        gpus = [state.gpu for view in views for state in view.gpus]
        return _there_are(gpu.model for gpu in gpus + [state.gpu for view in views for state in view.mig])
    if reason is Reason.NO_MIG_PROFILE:
        return _there_are(name for view in views for state in view.mig for name in partition.offered(state))
    return _said(views, reason, request)


def _freest(view: NodeView, request: PodRequest) -> str:
    open_to = [state for state in view.healthy if is_wished(state, request.wishes)]
    if not open_to:
        return ""
    if len(pieces(request)) * request.wishes.gpu_count > 1:
        return f"{view.name} lacks {format_bytes(_shortfall(view, request) or 0)}"
    freest = max(open_to, key=lambda state: state.free_bytes)
    return f"{view.name} GPU {freest.gpu.index} has {format_bytes(freest.free_bytes)} free"


def _largest(views: Sequence[NodeView], request: PodRequest) -> str:
    """Look at all nodes: no freed byte helps them, so that their order says nothing."""
    sizes = {
        (view.name, state.gpu.index): state.gpu.usable_bytes
        for view in views
        for state in view.healthy
        if is_wished(state, request.wishes)
    }
    node, gpu = max(sizes, key=lambda where: sizes[where], default=("", 0))
    return f"{node} GPU {gpu} has {format_bytes(sizes[node, gpu])} in all" if node else ""


def _said(views: Sequence[NodeView], reason: Reason, request: PodRequest) -> str:
    """Repeat what its plugin says of the first GPU that is closed for *reason*, or what is wrong with an inventory."""
    if reason in {Reason.BAD_INVENTORY, Reason.UNIT_MISMATCH}:
        return f"{views[0].name}: {views[0].detail}"
    if reason not in {Reason.UNHEALTHY_GPU, Reason.FENCED_GPU}:
        return ""
    for view in views:
        closed = {judged.index for judged in node_verdict(view, reason, request).gpus if judged.reason is reason}
        for gpu in (state.gpu for state in view.states if state.gpu.index in closed):
            said = gpu.foreign.detail if gpu.foreign is not None and reason is Reason.FENCED_GPU else gpu.detail
            return f"{view.name} GPU {gpu.index}" + (f": {said}" if said else "")
    return ""


def _there_are(names: Iterable[str]) -> str:
    """List names, and only a few of many."""
    known = sorted(set(names))
    return f"there are {', '.join(known[:_NAMED])}" + (", ..." if len(known) > _NAMED else "") if known else ""
