"""Another request that would be met now: the same memory over several GPUs, or a MIG instance of it. Pure."""

from collections.abc import Iterator, Mapping, Sequence

import msgspec

from cotenant.contract.grant import Isolation, Role
from cotenant.contract.reasons import Reason
from cotenant.contract.request import PodRequest
from extender.inspect.remedies import Change, first_fit, free_of_daemons, place_name, together
from extender.ledger import NodeView


def split(request: PodRequest, order: Sequence[NodeView]) -> Iterator[Change]:
    """Find the fewest more GPUs over which the one container's memory fits now."""
    if not _plain(request):
        return
    (container,) = request.containers
    wishes = request.wishes
    total = container.share_bytes * wishes.gpu_count
    free = [(view, free_of_daemons(view, request)) for view in order if len(view.healthy) > wishes.gpu_count]
    for count in range(wishes.gpu_count + 1, max((len(view.healthy) for view, _ in free), default=0) + 1):
        if container.units % count:
            continue
        over = msgspec.structs.replace(
            request,
            containers=(msgspec.structs.replace(container, share_bytes=total // count),),
            wishes=msgspec.structs.replace(wishes, gpu_count=count),
        )
        fit = first_fit(over, (view for view, amounts in free if together(amounts, count) >= total // count))
        if fit is not None:
            yield Change("split", f"{over.describe()} fit now on {place_name(*fit)}, with gpu-count: {count}", *fit)
            return


def instance(request: PodRequest, order: Sequence[NodeView], refused: Mapping[str, Reason]) -> Iterator[Change]:
    """Find the smallest MIG instance of so much memory that can be had now, where no GPU is shared by memory."""
    wishes = request.wishes
    if not _plain(request) or wishes.gpu_count > 1 or wishes.isolation not in {Isolation.NONE, Isolation.STRICT}:
        return
    (container,) = request.containers
    views = [view for view in order if refused.get(view.name) is Reason.NO_SHARED_GPU]
    known = {
        (p.bytes, len(p.name), state.suffix(p.name))
        for view in views
        for state in view.mig
        for p in state.geometry.profiles
        if p.bytes >= container.share_bytes
    }
    for _, _, profile in sorted(known):
        asked = msgspec.structs.replace(container, units=1, share_bytes=0, profile=profile)
        instead = msgspec.structs.replace(request, containers=(asked,))
        fit = first_fit(instead, views)
        if fit is not None:
            yield Change("instance", f"{instead.describe()} instead of memory fits now on {place_name(*fit)}", *fit)
            return


def _plain(request: PodRequest) -> bool:
    """Tell whether one container asks memory, of which the kubelet would hand nothing on to another."""
    return len(request.containers) == 1 and not request.profiles and request.containers[0].role is not Role.INIT
