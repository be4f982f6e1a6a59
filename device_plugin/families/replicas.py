"""GPUs counted by shares, or whole: an id is one share, as NVIDIA's plugin has it, and needs no grant."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple

import structlog

from cotenant.contract.inventory import GPU, Family, Health
from cotenant.contract.reasons import Reason
from device_plugin.admission.ids import gpu_of, share_ids
from device_plugin.admission.refusal import RefusedError
from device_plugin.api import deviceplugin_pb2 as pb
from device_plugin.families.rules import Assigned

log = structlog.get_logger(__name__)


class Shares(NamedTuple):
    """Hold one resource: its ids, each with whether its GPU is healthy, and how its requests are met."""

    devices: Mapping[str, bool]
    # whether a container may have no more than one
    single: bool
    # whether shares of used GPUs come first
    packed: bool = False


def offered(gpus: Iterable[GPU], assigned: Mapping[str, Assigned], *, packed: bool) -> dict[str, Shares]:
    """List the resources of the family replicas with their ids."""
    devices: dict[str, dict[str, bool]] = {}
    single: dict[str, bool] = {}
    for gpu in gpus:
        how = assigned[gpu.uuid]
        if gpu.family is not Family.REPLICAS or not how.resource:
            continue
        ids = devices.setdefault(how.resource, {})
        ids |= dict.fromkeys(share_ids(gpu.uuid, how.replicas), gpu.health is Health.HEALTHY)
        single[how.resource] = single.get(how.resource, False) or how.single
    return {name: Shares(ids, single[name], packed) for name, ids in devices.items()}


class Replicas:
    """Answer for *resource*, shares of GPUs; *answer* makes the response for the UUIDs of GPUs.

    Every method may be called from any thread and raises RefusedError.
    """

    def __init__(self, resource: str, answer: Callable[[list[str]], pb.ContainerAllocateResponse]) -> None:
        self._resource = resource
        self._answer = answer
        self._shares = Shares({}, single=False)

    def take(self, shares: Shares) -> None:
        """Replace what is served."""
        self._shares = shares

    def prefer(self, available: Collection[str], must: Collection[str], count: int) -> list[str]:
        """Choose shares of different GPUs as far as there are any, those of the least used first, or of the most."""
        shares = self._shares
        total = Counter(map(gpu_of, shares.devices))
        free: dict[str, list[str]] = {}
        for device in sorted({*available} - {*must}):
            free.setdefault(gpu_of(device), []).append(device)
        used = {uuid: total[uuid] - len(devices) for uuid, devices in free.items()}
        chosen = sorted(must)
        mine = Counter(map(gpu_of, chosen))
        while len(chosen) < count and free:
            best = min(free, key=lambda uuid: (mine[uuid], -used[uuid] if shares.packed else used[uuid], uuid))
            chosen.append(free[best].pop(0))
            mine[best] += 1
            if not free[best]:
                del free[best]
        return chosen

    def allocate(self, ids: Collection[str]) -> pb.ContainerAllocateResponse:
        """Give a container the GPUs that *ids* are shares of."""
        shares = self._shares
        unknown = sorted({*ids} - {*shares.devices})
        if unknown:
            raise RefusedError(
                Reason.WRONG_DEVICES,
                f"{self._resource} has no device ids {', '.join(unknown)}: the sharing of GPUs has just changed; "
                "delete the pod so that it is placed again",
            )
        if shares.single and len(ids) > 1:
            raise RefusedError(
                Reason.BAD_REQUEST,
                f"a container asks {len(ids)} of {self._resource}, which are shares of GPUs: two are no more compute "
                "or memory than one, so failRequestsGreaterThanOne refuses them; ask for 1",
            )
        uuids = sorted(set(map(gpu_of, ids)))
        log.info("allocate.answered", resource=self._resource, gpu=",".join(uuids), shares=len(ids))
        return self._answer(uuids)

    def start(self, ids: Collection[str]) -> None:
        """Let every container start: its ids say all there is to check."""
