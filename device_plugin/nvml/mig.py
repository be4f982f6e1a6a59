"""Reads from NVML what a GPU can be cut into and is cut into, and cuts it."""

import ctypes
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pynvml

from cotenant.contract.inventory import MIGInstance, MIGProfile
from cotenant.contract.units import GIB, MIB

# NVML's call with its arguments, made where this library's pynvml is in place
Call = Callable[..., Any]

# What NVML answers for a profile that is another GPU's, or newer than the driver.
_NO_SUCH_PROFILE = frozenset({pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_INVALID_ARGUMENT})
# What it answers to the handle of an instance that somebody has destroyed: the handle is invalid then (nvml.h,
# nvmlDeviceCreateGpuInstance, nvmlGpuInstanceGetInfo).
_GONE = frozenset({pynvml.NVML_ERROR_INVALID_ARGUMENT, pynvml.NVML_ERROR_NOT_FOUND})
# What drivers before 470 answer to nvmlDeviceGetGpuInstanceProfileInfoV.
_NO_NAMES = frozenset({pynvml.NVML_ERROR_FUNCTION_NOT_FOUND, pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH})

# How NVIDIA ends the names of profiles that differ from another in their media engines alone, as far as drivers that do
# not tell names know any.
_LAST_NAMELESS = pynvml.NVML_GPU_INSTANCE_PROFILE_1_SLICE_REV2
_ENDINGS = {
    pynvml.NVML_GPU_INSTANCE_PROFILE_1_SLICE_REV1: "+me",
    pynvml.NVML_GPU_INSTANCE_PROFILE_2_SLICE_REV1: "+me",
}


class GPUInstance(msgspec.Struct, frozen=True, kw_only=True):
    """Describe a GPU instance that is there; *uuid* is its MIG device's, empty while that is not all of the instance.

    It is where the instance has no compute instance yet, or is *divided*: has several, or one that is smaller than it.
    *compute_id* is NVML's id of its compute instance. start and size count memory slices.
    """

    id: int
    profile: str
    start: int
    size: int
    uuid: str
    compute_id: int | None
    divided: bool

    @property
    def instance(self) -> MIGInstance:
        """Give it as the inventory has it."""
        return MIGInstance(profile=self.profile, start=self.start, size=self.size, uuid=self.uuid)


def instances(call: Call, handle: Any, known: Sequence[MIGProfile]) -> tuple[GPUInstance, ...]:
    """Read the GPU instances of the profiles *known*, by start; none where MIG mode is off. Raises pynvml.NVMLError."""
    devices = _mig_devices(call, handle)
    found = []
    for profile in known:
        for made in _handles(call, handle, profile):
            try:
                info = call(pynvml.nvmlGpuInstanceGetInfo, made)
            except pynvml.NVMLError as error:
                if error.value in _GONE:
                    continue  # destroyed meanwhile
                raise
            has = devices.get(info.id, [])
            divided = len(has) > 1 or any(not one.whole for one in has)
            device = has[0] if has and not divided else None
            place = info.placement
            found.append(
                GPUInstance(
                    id=info.id,
                    profile=profile.name,
                    start=place.start,
                    size=place.size,
                    uuid=device.uuid if device is not None else "",
                    compute_id=device.compute_id if device is not None else None,
                    divided=divided,
                )
            )
    return tuple(sorted(found, key=lambda one: one.start))


def switch(call: Call, handle: Any, *, on: bool) -> int:
    """Switch MIG mode; give NVML's code for why that has no effect now, 0 where it has. Raises pynvml.NVMLError."""
    _, pending = call(pynvml.nvmlDeviceGetMigMode, handle)
    status = int(call(pynvml.nvmlDeviceSetMigMode, handle, int(on)))
    if status and pending != int(on):
        # it waits for a reset now, by which time nobody may want it any more; if this fails, why it waits is still told
        with suppress(pynvml.NVMLError):
            call(pynvml.nvmlDeviceSetMigMode, handle, pending)
    return status


def create(call: Call, handle: Any, profile: MIGProfile, start: int) -> None:
    """Make a GPU instance at *start*, and its one compute instance. Raises pynvml.NVMLError."""
    place = pynvml.c_nvmlGpuInstancePlacement_t(start, profile.size)
    made = call(pynvml.nvmlDeviceCreateGpuInstanceWithPlacement, handle, profile.profile_id, ctypes.byref(place))
    _create_compute(call, made, profile)


def complete(call: Call, handle: Any, profile: MIGProfile, instance_id: int) -> None:
    """Make the compute instance that a GPU instance lacks. Raises pynvml.NVMLError."""
    made = _handle_of(call, handle, profile, instance_id)
    if made is not None:
        _create_compute(call, made, profile)


def destroy(call: Call, handle: Any, profile: MIGProfile, instance_id: int) -> None:
    """Destroy a GPU instance and what is in it; one that is not there is none to destroy. Raises pynvml.NVMLError.

    A call before this one may have got as far as the compute instance.
    """
    made = _handle_of(call, handle, profile, instance_id)
    if made is None:
        return
    for compute in _computes(call, made):
        with _gone_is_done():
            call(pynvml.nvmlComputeInstanceDestroy, compute)
    with _gone_is_done():
        call(pynvml.nvmlGpuInstanceDestroy, made)


# What drivers answer for an index at which no MIG device lies.
_NO_INSTANCE = {
    pynvml.NVML_ERROR_NOT_FOUND,
    pynvml.NVML_ERROR_NOT_SUPPORTED,
    pynvml.NVML_ERROR_INVALID_ARGUMENT,
}
# Where the driver lists the numbers of capabilities: lines as "gpu0/gi1/ci0/access 13".
MINORS = Path("/proc/driver/nvidia-caps/mig-minors")


def capabilities(minors: Callable[[], str], gpu_minor: int | None, instance: GPUInstance) -> list[str]:
    """Name the two device nodes that let a container use an instance; raise LookupError where the driver has none.

    *minors* reads the driver's list.
    """
    try:
        lines = minors().splitlines()
    except OSError:
        lines = []
    numbers = {name: number for name, _, number in (line.partition(" ") for line in lines)}
    base = f"gpu{gpu_minor}/gi{instance.id}"
    keys = (f"{base}/access", f"{base}/ci{instance.compute_id or 0}/access")
    missing = [key for key in keys if key not in numbers]
    if missing:
        raise LookupError(f"{MINORS} lists no {' and no '.join(missing)}")
    return [f"/dev/nvidia-caps/nvidia-cap{numbers[key]}" for key in keys]


@contextmanager
def _gone_is_done() -> Iterator[None]:
    try:
        yield
    except pynvml.NVMLError as error:
        if error.value not in _GONE:
            raise


def _handles(call: Call, handle: Any, profile: MIGProfile) -> list[Any]:
    count = ctypes.c_uint(profile.max_instances)
    made = (pynvml.c_nvmlGpuInstance_t * max(1, profile.max_instances))()
    try:
        call(pynvml.nvmlDeviceGetGpuInstances, handle, profile.profile_id, made, ctypes.byref(count))
    except pynvml.NVMLError as error:
        if error.value == pynvml.NVML_ERROR_NOT_SUPPORTED:
            return []  # MIG mode is off
        raise
    return list(made[: count.value])


def _handle_of(call: Call, handle: Any, profile: MIGProfile, instance_id: int) -> Any:
    for made in _handles(call, handle, profile):
        with _gone_is_done():
            if call(pynvml.nvmlGpuInstanceGetInfo, made).id == instance_id:
                return made
    return None


def _compute_profiles(call: Call, made: Any) -> Iterator[Any]:
    for number in range(pynvml.NVML_COMPUTE_INSTANCE_PROFILE_COUNT):
        try:
            yield call(
                pynvml.nvmlGpuInstanceGetComputeInstanceProfileInfo,
                made,
                number,
                pynvml.NVML_COMPUTE_INSTANCE_ENGINE_PROFILE_SHARED,
                1,
            )
        except pynvml.NVMLError as error:
            if error.value not in _NO_SUCH_PROFILE:
                raise


def _create_compute(call: Call, made: Any, profile: MIGProfile) -> None:
    """Make the compute instance that has all of the GPU instance's compute slices."""
    for info in _compute_profiles(call, made):
        if info.sliceCount == profile.compute_slices:
            call(pynvml.nvmlGpuInstanceCreateComputeInstance, made, info.id)
            return
    raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)


def _computes(call: Call, made: Any) -> list[Any]:
    found: list[Any] = []
    for info in _compute_profiles(call, made):
        count = ctypes.c_uint(info.instanceCount)
        computes = (pynvml.c_nvmlComputeInstance_t * max(1, info.instanceCount))()
        call(pynvml.nvmlGpuInstanceGetComputeInstances, made, info.id, computes, ctypes.byref(count))
        found += computes[: count.value]
    return found


class _Device(NamedTuple):
    """Hold a MIG device: its UUID, the id of its compute instance, and whether that is all of its GPU instance."""

    uuid: str
    compute_id: int
    whole: bool


def _mig_devices(call: Call, handle: Any) -> dict[int, list[_Device]]:
    """Read all MIG devices, by the ids of their GPU instances."""
    found: dict[int, list[_Device]] = {}
    try:
        count = call(pynvml.nvmlDeviceGetMaxMigDeviceCount, handle)
    except pynvml.NVMLError as error:
        if error.value in {pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_FUNCTION_NOT_FOUND}:
            return {}
        raise
    for index in range(count):
        try:
            device = call(pynvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, index)
            instance_id = call(pynvml.nvmlDeviceGetGpuInstanceId, device)
            compute_id = call(pynvml.nvmlDeviceGetComputeInstanceId, device)
            uuid = _text(call(pynvml.nvmlDeviceGetUUID, device))
            found.setdefault(instance_id, []).append(_Device(uuid, compute_id, _is_whole(call, device)))
        except pynvml.NVMLError as error:
            if error.value not in _NO_INSTANCE:
                raise
    return found


def _is_whole(call: Call, device: Any) -> bool:
    """Tell whether a MIG device computes with all of its GPU instance, which is how 1c.3g.20gb and 3g.20gb differ."""
    try:
        attributes = call(pynvml.nvmlDeviceGetAttributes_v2, device)
    except pynvml.NVMLError as error:
        if error.value in {pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_FUNCTION_NOT_FOUND}:
            return True
        raise
    return bool(attributes.computeInstanceSliceCount == attributes.gpuInstanceSliceCount)


def _text(text: str | bytes) -> str:
    return text.decode() if isinstance(text, bytes) else text


def profiles(call: Call, handle: Any) -> tuple[MIGProfile, ...]:
    """Read the profiles of the GPU behind *handle*; none where it knows no MIG, or tells none with MIG mode off.

    Raises pynvml.NVMLError.
    """
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
    """Read starts and sizes in memory slices; none where the driver knows none, or tells none with MIG mode off.

    nvml.h of drivers about 525 has NVML_ERROR_NOT_SUPPORTED "if device doesn't have MIG mode enabled" here; NVIDIA's
    DRA driver passes such profiles by (nvlib.go, inspectMigProfilesAndPlacements).
    """
    count = ctypes.c_uint(0)
    try:
        call(pynvml.nvmlDeviceGetGpuInstancePossiblePlacements, handle, profile_id, None, ctypes.byref(count))
        places = (pynvml.c_nvmlGpuInstancePlacement_t * count.value)()
        call(pynvml.nvmlDeviceGetGpuInstancePossiblePlacements, handle, profile_id, places, ctypes.byref(count))
    except pynvml.NVMLError as error:
        if error.value in _NO_SUCH_PROFILE:
            return []
        raise
    return sorted((place.start, place.size) for place in places[: count.value])
