"""From what NVML says to what the node publishes; pure."""

from collections.abc import Collection, Iterable, Mapping, Sequence

import msgspec

from cotenant.contract.configuration import GPURule
from cotenant.contract.inventory import GPU, MIG, Health, Inventory, Mode
from cotenant.contract.units import usable_bytes
from device_plugin.families.rules import Assigned, assign
from device_plugin.nvml import PhysicalGPU


def describe(
    gpus: Iterable[PhysicalGPU],
    rules: Sequence[GPURule],
    *,
    unit_bytes: int,
    reserve_per_gpu: int,
    mig: Mapping[str, MIG] | None = None,
    cutting: Collection[str] = (),
) -> tuple[GPU, ...]:
    """Describe this node's GPUs for the contract, in families by *rules*, *reserve_per_gpu* bytes of each kept back.

    *mig* is what was read of the MIG GPUs, by UUID; those in *cutting* are about to be cut anew.
    """
    return tuple(
        GPU(
            uuid=gpu.uuid,
            index=gpu.index,
            model=gpu.model,
            total_bytes=gpu.total_bytes,
            usable_bytes=usable_bytes(
                total=gpu.total_bytes,
                reserved=gpu.reserved_bytes,
                reserve_per_gpu=reserve_per_gpu,
                unit_bytes=unit_bytes,
            ),
            family=assigned.family,
            mode=assigned.mode,
            health=Health.UNHEALTHY if (detail := _ailment(gpu, assigned, cutting)) else Health.HEALTHY,
            detail=detail,
            mig=(mig or {}).get(gpu.uuid),
        )
        for gpu in gpus
        for assigned in (assign(gpu, rules),)
    )


def next_inventory(published: Inventory | None, gpus: tuple[GPU, ...], *, unit_bytes: int, serving: bool) -> Inventory:
    """Give what is to be published: *published* itself when nothing else changed, so that its generation stays."""
    generation = 1 if published is None else published.generation
    fresh = Inventory(generation=generation, unit_bytes=unit_bytes, serving=serving, gpus=gpus)
    if published is None or fresh == published:
        return fresh
    return msgspec.structs.replace(fresh, generation=generation + 1)


def _ailment(gpu: PhysicalGPU, assigned: Assigned, cutting: Collection[str]) -> str:
    if gpu.fault or gpu.uuid in cutting:
        return gpu.fault or "its MIG geometry is about to be changed"
    if gpu.guest:
        if assigned.mode is Mode.MIG:
            return (
                "a vGPU is cut by the hypervisor, not in the virtual machine: take it out of the rules of family "
                f"{assigned.family}, or have the hypervisor give another profile"
            )
        # on a vGPU with MIG behind it, the mode is on and its one instance there
        return ""
    if gpu.mig_enabled and assigned.mode is not Mode.MIG:
        # CUDA finds no device on such a GPU before instances are made on it
        return f"MIG mode is on, and gpu-mem needs it off: `nvidia-smi -i {gpu.index} -mig 0`"
    if assigned.mode is Mode.MIG and not gpu.mig_enabled:
        known = gpu.mig_enabled is not None
        return f"MIG mode is off: `nvidia-smi -i {gpu.index} -mig 1`" if known else "the GPU knows no MIG"
    return ""
