"""Device ids against grants: which ids a grant needs, which of the free ones to take, how many a node may have.

An id says which GPU it is counted on and nothing else; amounts are bytes in the grant.
"""

from collections import Counter
from collections.abc import Collection, Iterable
from hashlib import blake2b

from cotenant.contract.grant import ContainerGrant, GPUShare
from cotenant.contract.inventory import GPU, Family, Health, MIGProfile
from cotenant.contract.names import mig_suffix
from cotenant.contract.reasons import Reason
from cotenant.contract.units import device_ids, format_bytes, id_prefix
from device_plugin.admission.refusal import RefusedError

# Measured on kubelet 1.36.3: with 4,480 ids a restarted kubelet runs a new pod after 2.5 s, with 8,960 after 7.8 s and
# with 20,480 after 29 s (docs/decisions/0001-device-ids.md).
MAX_IDS = 5000


class TooManyIdsError(Exception):
    """Say that this node's units would be more than a kubelet can handle."""


def advertised(gpus: Iterable[GPU], unit_bytes: int) -> dict[str, bool]:
    """List the ids of all GPUs counted by memory, each with whether its GPU is healthy.

    Raises TooManyIdsError above MAX_IDS, and where two GPUs' ids could not be told apart.
    """
    gpus = tuple(gpu for gpu in gpus if gpu.family is Family.MEMORY)
    units = sum(gpu.usable_bytes // unit_bytes for gpu in gpus)
    if units > MAX_IDS:
        raise TooManyIdsError(
            f"{len(gpus)} GPUs in units of {format_bytes(unit_bytes)} are {units} device ids, but a kubelet handles "
            f"{MAX_IDS} well: set a larger unit, the same in the whole cluster"
        )
    if len({id_prefix(gpu.uuid) for gpu in gpus}) < len(gpus):
        raise TooManyIdsError("two GPUs of this node have UUIDs whose device ids are the same; please report them")
    return {
        device: gpu.health is Health.HEALTHY
        for gpu in gpus
        for device in device_ids(gpu.uuid, gpu.usable_bytes // unit_bytes)
    }


def instance_ids(uuid: str, profile: MIGProfile) -> list[str]:
    """Make the ids that stand for instances of a profile of one GPU: always as many as an empty GPU could hold.

    So a node's allocatable never says no where the extender says yes, and no id goes while a pod holds it.
    """
    return [f"{_instances_of(uuid, profile.name)}-{n}" for n in range(profile.max_instances)]


def _instances_of(uuid: str, profile: str) -> str:
    return f"{id_prefix(uuid)}-{mig_suffix(profile)}"


def layout(ids: Iterable[str]) -> dict[str, int]:
    """Count ids by the GPU they are counted on, or its instances of one profile, named by prefix."""
    return dict(Counter(device.rpartition("-")[0] for device in ids))


def digest(ids: Collection[str]) -> bytes:
    """Name a set of ids in 16 bytes that are those of no other set."""
    return blake2b("\n".join(sorted(ids)).encode(), digest_size=16).digest()


def wanted(grant: ContainerGrant) -> dict[str, int]:
    """Say how many ids of which GPU, by prefix, the kubelet must hold for *grant*."""
    return {_prefix(grant, share): grant.units // len(grant.gpus) for share in grant.gpus}


def _is_of(device: str, grant: ContainerGrant) -> bool:
    """Tell whether an id is the static instance that was granted, or a share of it."""
    if grant.mig is None:
        return False
    return device in share_ids(grant.mig.uuid, grant.mig.replicas)


def _prefix(grant: ContainerGrant, share: GPUShare) -> str:
    return id_prefix(share.uuid) if grant.mig is None else _instances_of(share.uuid, grant.mig.profile)


def pick(
    grant: ContainerGrant, available: Collection[str], must: Collection[str], held: Collection[str] = ()
) -> list[str]:
    """Choose the ids of *grant* among those *available*, with all that the kubelet says it *must* take.

    Those *held* by containers come last: a List that finds a pod ended makes the kubelet forget the ids of an Allocate
    that is under way, so it offers them again (devicemanager/manager.go, UpdateAllocatedDevices). Two containers with
    one id are no harm, since amounts are the grants', but what an id says of its owner would be less.

    Raises RefusedError where that cannot be: the kubelet would take other GPUs' ids instead.
    """
    if grant.family is Family.MIG_STATIC:
        return _pick_instance(grant, available, must, held)
    chosen: list[str] = []
    for share in grant.gpus:
        prefix, count = _prefix(grant, share), grant.units // len(grant.gpus)
        own = sorted(device for device in {*available, *must} if device.rpartition("-")[0] == prefix)
        first = sorted(own, key=lambda device: (device not in must, device in held))
        if len(own) < count:
            raise RefusedError(
                Reason.WRONG_DEVICES,
                f"the kubelet has {len(own)} of the {count} units free that container {grant.name} was granted on "
                f"GPU {share.uuid}: something else holds device ids of it, or the GPU has failed",
            )
        chosen += first[:count]
    if not set(must) <= set(chosen):
        raise RefusedError(
            Reason.WRONG_DEVICES,
            f"the kubelet wants container {grant.name} to take over device ids {', '.join(sorted(must))}, which are "
            f"not those of its grant on {_gpus(grant)}",
        )
    return chosen


def _pick_instance(
    grant: ContainerGrant, available: Collection[str], must: Collection[str], held: Collection[str]
) -> list[str]:
    """Choose the instance that was granted, whose UUID is its id, or a share of it."""
    found = sorted(
        (device for device in {*available, *must} if _is_of(device, grant)),
        key=lambda device: (device not in must, device in held, device),
    )
    if not found or not set(must) <= {found[0]}:
        raise RefusedError(
            Reason.WRONG_DEVICES,
            f"container {grant.name} was granted the MIG instance {grant.mig.uuid if grant.mig else ''}, which the "
            "kubelet has not free: something else holds it, or it is gone",
        )
    return found[:1]


def check(grant: ContainerGrant, ids: Collection[str]) -> None:
    """Raise RefusedError unless *ids* lie on the granted GPUs in the right numbers."""
    if grant.family is Family.MIG_STATIC:
        right = len(ids) == 1 and all(_is_of(device, grant) for device in ids)
    else:
        right = layout(ids) == wanted(grant)
    if not right:
        raise RefusedError(
            Reason.WRONG_DEVICES,
            f"the kubelet gave container {grant.name} the device ids {', '.join(sorted(ids))}, but its grant is "
            f"{grant.units // len(grant.gpus)} units of each of {_gpus(grant)}",
        )


# NVIDIA's own separator (internal/rm, AnnotatedID): exporters that attribute use to pods take ids apart at it.
_SEPARATOR = "::"


def share_ids(uuid: str, replicas: int) -> list[str]:
    """Name the shares of a GPU or MIG instance; one that is not shared has its UUID for id."""
    return [uuid] if replicas == 1 else [f"{uuid}{_SEPARATOR}{n}" for n in range(replicas)]


def gpu_of(device: str) -> str:
    """Say of which GPU, or MIG instance, an id is."""
    return device.partition(_SEPARATOR)[0]


def _gpus(grant: ContainerGrant) -> str:
    return ", ".join(share.uuid for share in grant.gpus)
