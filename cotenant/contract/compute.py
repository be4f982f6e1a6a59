"""CPU and memory: what kube-scheduler counts for a pod on a node."""

from collections.abc import Mapping

import msgspec

from cotenant.contract.grant import Role, peak
from cotenant.contract.pods import ContainerStatus, Pod, Quantity, Resources, Status
from cotenant.contract.units import parse_milli


class Compute(msgspec.Struct, frozen=True, gc=False):
    """Hold amounts of CPU, in thousandths of a core, and of memory, in bytes."""

    cpu_milli: int = 0
    memory_bytes: int = 0


NOTHING = Compute()
COUNTED = ("cpu", "memory")
# Two million cores and an exbibyte: what claims more counts as this, so that products of two are numbers of 64 bits.
_MOST = Compute(cpu_milli=1 << 31, memory_bytes=1 << 60)


def checked(amount: Quantity) -> Quantity:
    """Give back an amount of CPU or memory that a person wrote; raise ValueError with a sentence for what is none."""
    try:
        if parse_milli(amount) >= 0:
            return amount
    except ValueError:
        pass
    raise ValueError(f"expected an amount such as 4, 500m or 16Gi, not {amount!r}")


def requests(pod: Pod) -> Compute:
    """Count the CPU and memory that *pod* takes of a node, as kube-scheduler does.

    Main containers and sidecars together, or an init container beside the sidecars before it where that is more; the
    pod's own amounts instead of both where it names any; its overhead on top. While they are resized in place, what is
    asked or what is there still, whichever is more (component-helpers/resource/helpers.go, PodRequests).
    """
    spec, status = pod.spec, pod.status
    told = {one.name: one for one in (*(status.init_container_statuses or ()), *(status.container_statuses or ()))}
    asked = [
        # of init containers only sidecars are resized
        (Role(role), _resized(container.resources, None if role == "init" else told.get(container.name), pod))
        for container, role in pod.start_order
        if container.resources is not None and container.resources.requests
    ]
    if not asked and spec.resources is None and spec.overhead is None:
        return NOTHING
    whole = _resized(spec.resources, status, pod)
    overhead = _amounts(spec.overhead)
    counted = {**peak(asked), **whole}
    cpu, memory_milli = (counted.get(name, 0) + overhead.get(name, 0) for name in COUNTED)
    return _counted(cpu, -(-memory_milli // 1000))


def allocatable(amounts: Mapping[str, Quantity] | None) -> Compute:
    """Read what a node offers its pods; what is missing or unreadable counts as nothing."""
    read = _amounts(amounts)
    return _counted(read.get("cpu", 0), read.get("memory", 0) // 1000)


def _resized(asked: Resources | None, status: ContainerStatus | Status | None, pod: Pod) -> dict[str, int]:
    """Read what a container of *pod* takes, or all of it as a whole: the most of what is asked, in force and allocated.

    A resize that the kubelet has refused, as the node could never hold it, asks nothing.
    """
    requested = asked.requests if asked is not None else None
    wanted = _amounts(requested)
    if not wanted or status is None or status.resources is None:
        return wanted
    there = status.resources.requests, status.allocated_resources
    if there == (requested, requested):  # nearly every pod
        return wanted
    conditions = pod.status.conditions or ()
    refused = any(one.type == "PodResizePending" and one.reason == "Infeasible" for one in conditions)
    counted = [*map(_amounts, there), {} if refused else wanted]
    return {name: max(amounts.get(name, 0) for amounts in counted) for name in wanted}


def _counted(cpu_milli: int, memory_bytes: int) -> Compute:
    return Compute(min(cpu_milli, _MOST.cpu_milli), min(memory_bytes, _MOST.memory_bytes))


def _amounts(named: Mapping[str, Quantity] | None) -> dict[str, int]:
    """Read CPU and memory in thousandths; the API server lets nothing through that is no quantity."""
    read = {}
    for name in COUNTED:
        amount = (named or {}).get(name)
        if amount is not None:
            try:
                read[name] = max(0, parse_milli(amount))
            except ValueError:
                continue
    return read
