"""Reads from NVML what a GPU can be cut into."""

import ctypes
import math
from collections.abc import Callable
from typing import Any

import pynvml

from cotenant.contract.inventory import MIGProfile
from cotenant.contract.units import GIB, MIB

# NVML's call with its arguments, made where this library's pynvml is in place
Call = Callable[..., Any]

# What NVML answers for a profile that is another GPU's, or newer than the driver.
_NO_SUCH_PROFILE = frozenset({pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_INVALID_ARGUMENT})
# What drivers before 470 answer to nvmlDeviceGetGpuInstanceProfileInfoV.
_NO_NAMES = frozenset({pynvml.NVML_ERROR_FUNCTION_NOT_FOUND, pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH})

# How NVIDIA ends the names of profiles that differ from another in their media engines alone, as far as drivers that do
# not tell names know any.
_LAST_NAMELESS = pynvml.NVML_GPU_INSTANCE_PROFILE_1_SLICE_REV2
_ENDINGS = {
    pynvml.NVML_GPU_INSTANCE_PROFILE_1_SLICE_REV1: "+me",
    pynvml.NVML_GPU_INSTANCE_PROFILE_2_SLICE_REV1: "+me",
}


def profiles(call: Call, handle: Any) -> tuple[MIGProfile, ...]:
    """Read the profiles of the GPU behind *handle*; none where it knows no MIG. Raises pynvml.NVMLError."""
    found = []
    for number in range(pynvml.NVML_GPU_INSTANCE_PROFILE_COUNT):
        info, name = _info(call, handle, number)
        if info is None:
            continue
        placements = _placements(call, handle, info.id)
        if placements:
            found.append(
                MIGProfile(
                    name=name,
                    profile_id=info.id,
                    bytes=info.memorySizeMB * MIB,
                    compute_slices=info.sliceCount,
                    max_instances=info.instanceCount,
                    # one for all starts on every board there is; were it not, the largest never overlaps
                    size=max(size for _, size in placements),
                    starts=tuple(start for start, _ in placements),
                )
            )
    return tuple(found)


def _info(call: Call, handle: Any, number: int) -> tuple[Any, str]:
    try:
        info = call(pynvml.nvmlDeviceGetGpuInstanceProfileInfo, handle, number, 2)
    except pynvml.NVMLError as error:
        if error.value in _NO_NAMES:
            return _nameless(call, handle, number)
        if error.value in _NO_SUCH_PROFILE:
            return None, ""
        raise
    name = info.name.decode() if isinstance(info.name, bytes) else info.name
    return info, name.removeprefix("MIG ")


def _nameless(call: Call, handle: Any, number: int) -> tuple[Any, str]:
    """Ask a driver that tells no names, and make the name as NVIDIA's plugin does: go-nvlib, getMigMemorySizeInGB."""
    if number > _LAST_NAMELESS:
        return None, ""
    try:
        info = call(pynvml.nvmlDeviceGetGpuInstanceProfileInfo, handle, number, 1)
    except pynvml.NVMLError as error:
        if error.value in _NO_SUCH_PROFILE | _NO_NAMES:
            return None, ""
        raise
    total = call(pynvml.nvmlDeviceGetMemoryInfo, handle).total
    eighths = math.ceil(info.memorySizeMB * MIB / total * 8)
    # halves go up there, as 1g of 141 GB is 18gb and 3g is 71gb
    gigabytes = math.floor(eighths / 8 * math.ceil(total / GIB) + 0.5)
    return info, f"{info.sliceCount}g.{gigabytes}gb{_ENDINGS.get(number, '')}"


def _placements(call: Call, handle: Any, profile_id: int) -> list[tuple[int, int]]:
    """Read starts and sizes in memory slices."""
    count = ctypes.c_uint(0)
    call(pynvml.nvmlDeviceGetGpuInstancePossiblePlacements, handle, profile_id, None, ctypes.byref(count))
    places = (pynvml.c_nvmlGpuInstancePlacement_t * count.value)()
    call(pynvml.nvmlDeviceGetGpuInstancePossiblePlacements, handle, profile_id, places, ctypes.byref(count))
    return sorted((place.start, place.size) for place in places[: count.value])
