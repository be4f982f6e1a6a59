"""From what NVML says to what the node publishes; pure."""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import msgspec

from cotenant.contract.inventory import GPU, MIG, Family, Health, Inventory, Mode
from cotenant.contract.units import usable_bytes
from device_plugin.families.rules import Assigned
from device_plugin.nvml import PhysicalGPU


class Daemon(NamedTuple):
    """Say where the MPS control daemon of a GPU listens, how many clients it serves, and what is wrong with it."""

    pipe: str
    max_clients: int
    problem: str


def describe(
    gpus: Iterable[PhysicalGPU],
    assigned: Mapping[str, Assigned],
    *,
    unit_bytes: int,
    reserve_per_gpu: int,
    daemon: Callable[[PhysicalGPU, Assigned], Daemon],
    mig: Mapping[str, MIG] | None = None,
    unfit: Mapping[str, str] | None = None,
) -> tuple[GPU, ...]:
    """Describe this node's GPUs for the contract, as they are *assigned*, *reserve_per_gpu* bytes of each kept back.

    *daemon* tells of GPUs under MPS. *mig* is what was read of the MIG GPUs, by UUID; *unfit* says why GPUs may
    get no new pods now, however they are themselves.
    """
    return tuple(
        _described(
            gpu,
            how,
            usable_bytes(
                total=gpu.total_bytes,
                reserved=gpu.reserved_bytes,
                reserve_per_gpu=reserve_per_gpu,
                unit_bytes=unit_bytes,
            ),
            daemon=daemon(gpu, how) if how.mode is Mode.MPS else None,
            mig=(mig or {}).get(gpu.uuid),
            unfit=(unfit or {}).get(gpu.uuid, ""),
        )
        for gpu in gpus
        for how in (assigned[gpu.uuid],)
    )


def _described(
    gpu: PhysicalGPU,
    how: Assigned,
    usable: int,
    *,
    daemon: Daemon | None,
    mig: MIG | None,
    unfit: str,
) -> GPU:
    detail = gpu.fault or unfit or _ailment(gpu, how) or (_unserved(daemon, how) if daemon else "")
    return GPU(
        uuid=gpu.uuid,
        index=gpu.index,
        model=gpu.model,
        total_bytes=gpu.total_bytes,
        usable_bytes=usable,
        family=how.family,
        mode=how.mode,
        health=Health.UNHEALTHY if detail else Health.HEALTHY,
        detail=detail,
        max_clients=daemon.max_clients if daemon else 0,
        mps_pipe=daemon.pipe if daemon else "",
        mig=mig,
    )


def next_inventory(published: Inventory | None, gpus: tuple[GPU, ...], *, unit_bytes: int, serving: bool) -> Inventory:
    """Give what is to be published: *published* itself when nothing else changed, so that its generation stays."""
    generation = 1 if published is None else published.generation
    fresh = Inventory(generation=generation, unit_bytes=unit_bytes, serving=serving, gpus=gpus)
    if published is None or fresh == published:
        return fresh
    return msgspec.structs.replace(fresh, generation=generation + 1)


def _ailment(gpu: PhysicalGPU, assigned: Assigned) -> str:
    if gpu.guest:
        if assigned.mode is Mode.MIG:
            return (
                "a vGPU is cut by the hypervisor, not in the virtual machine: take it out of the rules of family "
                f"{assigned.family}, or have the hypervisor give another profile"
            )
        # on a vGPU with MIG behind it, the mode is on and its one instance there
        return ""
    if not gpu.total_bytes and (assigned.family is Family.MEMORY or assigned.mode is Mode.MPS):
        return (
            "NVML tells no memory of it, as of a GPU that shares the machine's: it can be shared by family replicas in "
            "mode time-slicing alone"
        )
    if gpu.mig_enabled and assigned.mode is not Mode.MIG:
        # CUDA finds no device on such a GPU before instances are made on it
        return f"MIG mode is on, and gpu-mem needs it off: `nvidia-smi -i {gpu.index} -mig 0`"
    if assigned.mode is Mode.MIG and not gpu.mig_enabled:
        known = gpu.mig_enabled is not None
        return f"MIG mode is off: `nvidia-smi -i {gpu.index} -mig 1`" if known else "the GPU knows no MIG"
    return _closed(gpu, assigned)


def _unserved(daemon: Daemon, assigned: Assigned) -> str:
    if assigned.family is Family.REPLICAS and assigned.replicas > daemon.max_clients:
        # a container beyond these would start, and fail inside CUDA
        return (
            f"it is {assigned.replicas} shares, and MPS serves {daemon.max_clients} clients on it: have "
            f"{daemon.max_clients} replicas at most"
        )
    return daemon.problem


def _closed(gpu: PhysicalGPU, assigned: Assigned) -> str:
    """Say why containers cannot share it by its compute mode."""
    if gpu.closed and not (assigned.mode is Mode.MPS and gpu.closed == "EXCLUSIVE_PROCESS"):
        # as MPS leaves it when it is not ended in good order
        return (
            f"its compute mode is {gpu.closed}, so containers cannot share it: `nvidia-smi -i {gpu.index} -c DEFAULT`"
        )
    return ""
