"""Adds up what each container uses of each GPU, and holds it against its grant; pure."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import msgspec

from cotenant.contract import grant as grants
from cotenant.contract.grant import GrantError
from cotenant.contract.inventory import Mode
from cotenant.contract.names import Names
from cotenant.contract.pods import STATIC_UID, Pod
from device_plugin.nvml import GPUProcess
from device_plugin.watchdog.cgroups import Origin

# Modes whose limit the hardware does not hold. Under MPS it is each process that is limited, not the container.
_WATCHED = frozenset({Mode.TIME_SLICING, Mode.MPS})


class Usage(msgspec.Struct, frozen=True):
    """Show what one container uses of one GPU.

    *container* is "" where only the pod is known. *granted_bytes* None is a grant that sets no limit to watch: it
    cannot be read, or its GPU is held to it by other means.
    """

    pod: Pod
    container: str
    gpu: str
    used_bytes: int
    granted_bytes: int | None
    # it has no grant at all
    ungranted: bool = False


class Stranger(msgspec.Struct, frozen=True):
    """Show a process that belongs to no pod of this node."""

    gpu: str
    pid: int
    used_bytes: int


class Account(msgspec.Struct, frozen=True):
    """Show who uses what."""

    usages: tuple[Usage, ...] = ()
    strangers: tuple[Stranger, ...] = ()


def account(
    processes: Mapping[str, Iterable[GPUProcess]],
    origin: Callable[[int], Origin | None],
    pods: Collection[Pod],
    names: Names,
) -> Account:
    """Attribute *processes*, by UUID of their GPU, to the containers of *pods*.

    *origin* tells the pod of a process; it raises LookupError for one that has ended, or that is our own.
    """
    # UIDs win: anybody may write that annotation on a pod, and is neither to hide it so nor to take another's place
    known = {pod.annotations.get(STATIC_UID, ""): pod for pod in pods} | {pod.uid: pod for pod in pods}
    sums: Counter[tuple[str, str, str]] = Counter()
    strangers: list[Stranger] = []
    for gpu, listed in processes.items():
        for process in listed:
            try:
                found = origin(process.pid)
            except LookupError:
                continue
            if found is None or found.pod_uid not in known:
                strangers.append(Stranger(gpu, process.pid, process.used_bytes or 0))
                continue
            container = _container(known[found.pod_uid], found.container_id)
            # a MIG instance is a wall of its own; what is used within it is shown, and not judged
            sums[found.pod_uid, container, gpu] += process.used_bytes or 0
    usages = [_usage(known[uid], container, gpu, used, names) for (uid, container, gpu), used in sums.items()]
    return Account(tuple(usages), tuple(strangers))


def overuse(usages: Sequence[Usage], margin_bytes: int) -> list[Usage]:
    """List those that use more than was granted and the margin besides."""
    return [
        usage
        for usage in usages
        if usage.granted_bytes is not None and usage.used_bytes > usage.granted_bytes + margin_bytes
    ]


def _container(pod: Pod, container_id: str) -> str:
    if not container_id:
        return ""
    for status in (*(pod.status.container_statuses or ()), *(pod.status.init_container_statuses or ())):
        # containerd://<id>
        if (status.container_id or "").rpartition("//")[2] == container_id:
            return status.name
    return ""


def _usage(pod: Pod, container: str, gpu: str, used: int, names: Names) -> Usage:
    text = pod.annotations.get(names.grant)
    if text is None:
        return Usage(pod, container, gpu, used, granted_bytes=None, ungranted=True)
    try:
        grant = grants.decode(text)
    except GrantError:
        return Usage(pod, container, gpu, used, granted_bytes=None)
    given = [one for one in grant.containers if one.name == container or not container]
    if not given:
        # a container that asked for nothing, in a pod of ours
        return Usage(pod, container, gpu, used, granted_bytes=0)
    if any(one.mode not in _WATCHED for one in given):
        return Usage(pod, container, gpu, used, granted_bytes=None)
    granted = sum(share.bytes for one in given for share in one.gpus if share.uuid == gpu)
    return Usage(pod, container, gpu, used, granted_bytes=granted)
