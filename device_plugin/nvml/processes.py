"""Reads from NVML which processes hold memory of a GPU."""

from collections.abc import Callable
from typing import Any

import msgspec
import pynvml

# What NVML puts where there is no MIG instance.
_NO_INSTANCE = 0xFFFFFFFF


class GPUProcess(msgspec.Struct, frozen=True):
    """Name a process by its number in NVML's PID namespace, and what it holds; None where NVML does not say."""

    pid: int
    used_bytes: int | None
    gpu_instance: int | None = None


def read(ask: Callable[..., Any], handle: Any) -> tuple[GPUProcess, ...]:
    """List the processes of the GPU behind *handle*, each once; raise pynvml.NVMLError.

    A process stands in several of NVML's lists when it computes and draws; each of them counts all its memory. Clients
    of MPS have a list of their own on drivers from 510 on.
    """
    found: dict[tuple[int, int], int | None] = {}
    for function in (
        pynvml.nvmlDeviceGetComputeRunningProcesses_v3,
        pynvml.nvmlDeviceGetGraphicsRunningProcesses_v3,
        pynvml.nvmlDeviceGetMPSComputeRunningProcesses_v3,
    ):
        for one in ask(function, handle) or ():
            key = (one.pid, _NO_INSTANCE if one.gpuInstanceId is None else one.gpuInstanceId)
            used = one.usedGpuMemory
            found[key] = used if found.get(key) is None else max(found[key] or 0, used or 0)
    return tuple(
        GPUProcess(pid=pid, used_bytes=used, gpu_instance=None if instance == _NO_INSTANCE else instance)
        for (pid, instance), used in sorted(found.items())
    )
