"""Which MPS control daemons a node is to have, and for which GPUs; pure."""

from collections.abc import Mapping, Sequence

import msgspec

from cotenant.contract.configuration import MPSSettings
from cotenant.contract.inventory import GPU, Family, Mode
from cotenant.contract.units import MIB
from device_plugin.families.rules import Assigned
from device_plugin.nvml import PhysicalGPU

# How many CUDA contexts an MPS server has for one GPU (MPS documentation, "Volta MPS"): more since CUDA 13.1.
_CLIENTS = 48
_CLIENTS_SINCE_13_1 = 60
_CUDA_13_1 = 13_010
_CLIENTS_BEFORE_VOLTA = 16
_VOLTA = 7
_GROUP = "group-"


class Limit(msgspec.Struct, frozen=True):
    """Say what a client of one GPU gets that asks for nothing itself; it cannot ask for more."""

    memory_mib: int


class Plan(msgspec.Struct, frozen=True):
    """Describe one daemon: its folder's name, and its GPUs in the order in which it counts them."""

    name: str
    uuids: tuple[str, ...]
    limits: tuple[Limit, ...]
    threads: int = 100


def pipe_of(settings: MPSSettings, name: str) -> str:
    """Say where the daemon called *name* listens."""
    return f"{settings.root}/{name}/pipe"


def name_of(uuid: str, assigned: Assigned) -> str:
    """Name the daemon that a GPU belongs to: its group's, or its own."""
    return f"{_GROUP}{assigned.group}" if assigned.group else uuid


def group_of(name: str) -> str:
    """Give the group whose daemon has that name; "" where it is a GPU's own."""
    return name.removeprefix(_GROUP) if name.startswith(_GROUP) else ""


def max_clients(gpu: PhysicalGPU, cuda_version: int | None) -> int:
    """Count the clients that MPS serves on a GPU; *cuda_version* is NVML's, 13010 for 13.1."""
    if gpu.compute_capability is not None and gpu.compute_capability[0] < _VOLTA:
        return _CLIENTS_BEFORE_VOLTA
    return _CLIENTS_SINCE_13_1 if (cuda_version or 0) >= _CUDA_13_1 else _CLIENTS


def plans(gpus: Sequence[GPU], assigned: Mapping[str, Assigned]) -> tuple[Plan, ...]:
    """Plan a daemon for each GPU under MPS, or for each group of them.

    A pod's grant limits its own clients; what the daemon's defaults hold those to that take their limits off is the
    GPU. Shares of the family replicas have no grant, so there it is each share's part.
    """
    groups: dict[str, list[GPU]] = {}
    for gpu in gpus:
        if gpu.mode is Mode.MPS:
            groups.setdefault(name_of(gpu.uuid, assigned[gpu.uuid]), []).append(gpu)
    return tuple(
        Plan(
            name=name,
            uuids=tuple(gpu.uuid for gpu in members),
            limits=tuple(Limit(_memory(gpu, assigned[gpu.uuid])) for gpu in members),
            threads=min(_threads(gpu, assigned[gpu.uuid]) for gpu in members),
        )
        for name, members in groups.items()
    )


def _memory(gpu: GPU, how: Assigned) -> int:
    return max(1, gpu.usable_bytes // _parts(gpu, how) // MIB)


def _threads(gpu: GPU, how: Assigned) -> int:
    # whole percents: 48 shares get 2 each, and 4 of 100 are left over
    return max(1, 100 // _parts(gpu, how))


def _parts(gpu: GPU, how: Assigned) -> int:
    """Count the equal parts of a GPU, each a client's; one where how many shares there were is not known."""
    return max(1, how.replicas) if gpu.family is Family.REPLICAS else 1
