"""MIG of the made-up NVML library: GPU and compute instances, kept in a file that all processes share.

The rules are NVML's: an instance is made where it overlaps none, a GPU instance with a compute instance cannot be
destroyed, and neither can a compute instance in use. Faults strike at the n-th call that is about MIG: an error, or the
end of the process before or after the call has had its effect.
"""
# ruff: noqa: N802, SLF001 - the names are NVML's, and _obj is how ctypes gives a reference back

import ctypes
import fcntl
import os
import signal
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import pynvml

from cotenant.contract.boards import Board, BoardProfile
from cotenant.contract.inventory import MIGInstance
from cotenant.contract.mig import Geometry, PlacementError

if TYPE_CHECKING:
    from device_plugin.nvml.fake import FakeGPU

_NAMESPACE = uuid.UUID("6c1f2f0e-6d0b-4a55-9d52-c07e4a6f0002")
# A GPU's handle is its index + 1; what is made on it counts from these.
_GPU_INSTANCE, _COMPUTE_INSTANCE, MIG_DEVICE = 0x100000, 0x200000, 0x300000
# NVML_COMPUTE_INSTANCE_PROFILE_* by compute slices
_COMPUTE_PROFILES = {1: 0, 2: 1, 3: 2, 4: 3, 7: 4, 8: 5, 6: 6}
_NO_RESET = (9, 0)
# To a handle that has become invalid, as that of an instance which was destroyed: nvml.h lists no other answer for it
# (nvmlGpuInstanceGetInfo, nvmlGpuInstanceDestroy, nvmlComputeInstanceDestroy, nvmlDeviceGetUUID).
_GONE = int(pynvml.NVML_ERROR_INVALID_ARGUMENT)


class CrashError(BaseException):
    """End a program in a test as a kill would: nothing catches it."""


class Fault(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Strike at the *calls*-th call about MIG from now, once: answer *error*, or end the process."""

    calls: int
    do: Literal["error", "kill", "crash"] = "error"
    error: int = pynvml.NVML_ERROR_UNKNOWN
    when: Literal["before", "after"] = "before"


class FakeInstance(msgspec.Struct, kw_only=True):
    """Hold a GPU instance and its compute instance, if it has one: *uuid* is that one's, empty without it.

    It takes so many *compute_slices*; 0 are all.
    """

    number: int
    gpu: str
    id: int
    profile_id: int
    profile: str
    start: int
    size: int
    uuid: str = ""
    compute_slices: int = 0
    in_use: bool = False


class State(msgspec.Struct, kw_only=True):
    """Hold all instances of a made-up node, what was done with them, and the next fault."""

    instances: list[FakeInstance] = []
    # how many instances of either kind there have been
    made: int = 0
    # MIG mode by UUID, where it was set since, and the one that waits for a reset
    modes: dict[str, bool] = {}
    pending: dict[str, bool] = {}
    fault: Fault | None = None
    # (time, what, profile@start or UUID, GPU), for tests
    journal: list[tuple[float, str, str, str]] = []

    def find(self, number: int) -> FakeInstance | None:
        """Find an instance by its number."""
        return next((one for one in self.instances if one.number == number), None)


_state = msgspec.json.Decoder(State)


class StateFile:
    """Read and write the state of a made-up node, one process at a time, in *gpus*.mig.json beside the file *gpus*."""

    def __init__(self, gpus: Path) -> None:
        self.path = gpus.with_name(f"{gpus.name}.mig.json")
        self._lock = gpus.with_name(f"{self.path.name}.lock")

    def read(self) -> State:
        """Give the state; an empty one where nothing was ever made."""
        try:
            return _state.decode(self.path.read_bytes())
        except FileNotFoundError:
            return State()

    @contextmanager
    def change(self) -> Iterator[State]:
        """Change the state while nobody else does; it is written when the block ends."""
        with self._lock.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            state = self.read()
            before = msgspec.json.encode(state)
            yield state
            after = msgspec.json.encode(state)
            if after != before:
                new = self.path.with_name(f"{self.path.name}.new")
                new.write_bytes(after)
                new.rename(self.path)

    def arm(self, fault: Fault | None) -> None:
        """Have *fault* strike next."""
        with self.change() as state:
            state.fault = fault


class MIGFunctions:
    """Be the part of the library that is about MIG; *state_file* is set by whoever inherits it."""

    state_file: StateFile
    _gpus: "list[FakeGPU]"

    @contextmanager
    def _state(self) -> Iterator[State]:
        """Count one call, and let the fault strike that is due."""
        struck: Fault | None = None
        state = self.state_file.read()
        if state.fault is not None:
            with self.state_file.change() as state:
                struck = _strike(state)
        if struck is not None and struck.when == "before":
            _end(struck)
        with self.state_file.change() as state:
            yield state
        if struck is not None and struck.when == "after":
            _end(struck)

    def mig_on(self, gpu: "FakeGPU") -> bool:
        """Tell whether MIG mode is on."""
        return self.state_file.read().modes.get(gpu.uuid, bool(gpu.mig))

    def on_mig_device(self, symbol: str, number: int, arguments: tuple[Any, ...]) -> int:
        """Answer what is asked of a MIG device's handle."""
        with self._state() as state:
            found = state.find(number)
            if found is None or not found.uuid:
                return _GONE
            if symbol == "nvmlDeviceGetUUID":
                arguments[0].value = found.uuid.encode()
            elif symbol == "nvmlDeviceGetGpuInstanceId":
                arguments[0]._obj.value = found.id
            elif symbol == "nvmlDeviceGetComputeInstanceId":
                arguments[0]._obj.value = 0
            elif symbol == "nvmlDeviceGetAttributes_v2":
                attributes = arguments[0]._obj
                attributes.gpuInstanceSliceCount = self._profile(found).compute_slices
                attributes.computeInstanceSliceCount = self._slices(found)
            else:
                return int(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return 0

    def _nvmlDeviceGetMigMode(self, gpu: "FakeGPU", current: Any, pending: Any) -> int:
        if gpu.mig is None and gpu.cut() is None:
            return int(pynvml.NVML_ERROR_NOT_SUPPORTED)
        current._obj.value = int(self.mig_on(gpu))
        pending._obj.value = int(self.state_file.read().pending.get(gpu.uuid, self.mig_on(gpu)))
        return 0

    def _nvmlDeviceSetMigMode(self, gpu: "FakeGPU", mode: Any, activation: Any) -> int:
        if gpu.cut() is None or gpu.virtualization == pynvml.NVML_GPU_VIRTUALIZATION_MODE_VGPU:
            return int(pynvml.NVML_ERROR_NOT_SUPPORTED)
        # what cannot take effect now is pending, and no error of the call (nvml.h, nvmlDeviceSetMigMode)
        with self._state() as state:
            on, is_on = bool(_value(mode)), state.modes.get(gpu.uuid, bool(gpu.mig))
            activation._obj.value = 0
            if on == is_on:
                state.pending.pop(gpu.uuid, None)
            elif any(one.gpu == gpu.uuid for one in state.instances):
                activation._obj.value, state.pending[gpu.uuid] = pynvml.NVML_ERROR_IN_USE, on
            elif gpu.compute_capability < _NO_RESET:
                activation._obj.value, state.pending[gpu.uuid] = pynvml.NVML_ERROR_RESET_REQUIRED, on
            else:
                state.modes[gpu.uuid] = on
                state.pending.pop(gpu.uuid, None)
        return 0

    def _nvmlDeviceGetAttributes_v2(self, gpu: "FakeGPU", attributes: Any) -> int:  # noqa: ARG002
        return int(pynvml.NVML_ERROR_NOT_SUPPORTED)  # a MIG device has them, and no GPU

    def _nvmlDeviceGetMaxMigDeviceCount(self, gpu: "FakeGPU", count: Any) -> None:
        cut = gpu.cut()
        count._obj.value = 0 if cut is None else max(profile.max_instances for profile in cut.profiles)

    def _nvmlDeviceGetMigDeviceHandleByIndex(self, gpu: "FakeGPU", index: Any, device: Any) -> int:
        with self._state() as state:
            with_uuid = [one for one in state.instances if one.gpu == gpu.uuid and one.uuid]
            if _value(index) >= len(with_uuid):
                return int(pynvml.NVML_ERROR_NOT_FOUND)
            _point(device._obj, MIG_DEVICE + with_uuid[_value(index)].number)
        return 0

    def _nvmlDeviceGetGpuInstances(self, gpu: "FakeGPU", profile_id: Any, instances: Any, count: Any) -> int:
        if not self.mig_on(gpu):
            return int(pynvml.NVML_ERROR_NOT_SUPPORTED)
        with self._state() as state:
            found = [one for one in state.instances if one.gpu == gpu.uuid and one.profile_id == _value(profile_id)]
            for n, one in enumerate(found):
                instances[n] = ctypes.cast(_GPU_INSTANCE + one.number, pynvml.c_nvmlGpuInstance_t)
            count._obj.value = len(found)
        return 0

    def _nvmlDeviceCreateGpuInstanceWithPlacement(
        self, gpu: "FakeGPU", profile_id: Any, placement: Any, instance: Any
    ) -> int:
        cut = gpu.cut()
        if cut is None or not self.mig_on(gpu):
            return int(pynvml.NVML_ERROR_NOT_SUPPORTED)
        known = next((one for one in cut.profiles if one.profile_id == _value(profile_id)), None)
        if known is None:
            return int(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        place = placement._obj
        wanted = MIGInstance(profile=known.name, start=place.start, size=max(1, place.size))
        with self._state() as state:
            there = [one for one in state.instances if one.gpu == gpu.uuid]
            taken = [MIGInstance(profile=one.profile, start=one.start, size=one.size) for one in there]
            try:
                Geometry([profile.profile for profile in cut.profiles]).check(wanted, taken)
            except PlacementError:
                return int(pynvml.NVML_ERROR_INSUFFICIENT_RESOURCES)
            state.made += 1
            made = FakeInstance(
                number=state.made,
                gpu=gpu.uuid,
                id=_instance_id(cut, wanted),
                profile_id=known.profile_id,
                profile=known.name,
                start=wanted.start,
                size=wanted.size,
            )
            state.instances.append(made)
            _note(state, "create", f"{made.profile}@{made.start}", gpu.uuid)
            _point(instance._obj, _GPU_INSTANCE + made.number)
        return 0

    def _nvmlGpuInstanceGetInfo(self, instance: Any, info: Any) -> int:
        with self._state() as state:
            found = state.find(_handle(instance) - _GPU_INSTANCE)
            if found is None:
                return _GONE
            target = info._obj
            target.id, target.profileId = found.id, found.profile_id
            target.placement.start, target.placement.size = found.start, found.size
        return 0

    def _nvmlGpuInstanceGetComputeInstanceProfileInfo(
        self, instance: Any, profile: Any, _engines: Any, info: Any
    ) -> int:
        with self._state() as state:
            found = state.find(_handle(instance) - _GPU_INSTANCE)
            if found is None:
                return _GONE
        slices = self._slices_of(found, profile)
        if not slices:
            return int(pynvml.NVML_ERROR_NOT_SUPPORTED)
        info._obj.id, info._obj.sliceCount, info._obj.instanceCount = _value(profile), slices, 1
        return 0

    def _nvmlGpuInstanceGetComputeInstances(self, instance: Any, profile_id: Any, instances: Any, count: Any) -> int:
        with self._state() as state:
            found = state.find(_handle(instance) - _GPU_INSTANCE)
            if found is None:
                return _GONE
            has = bool(found.uuid) and _value(profile_id) == _COMPUTE_PROFILES[self._slices(found)]
            if has:
                instances[0] = ctypes.cast(_COMPUTE_INSTANCE + found.number, pynvml.c_nvmlComputeInstance_t)
            count._obj.value = int(has)
        return 0

    def _nvmlGpuInstanceCreateComputeInstance(self, instance: Any, profile_id: Any, compute: Any) -> int:
        with self._state() as state:
            found = state.find(_handle(instance) - _GPU_INSTANCE)
            if found is None:
                return _GONE
            slices = self._slices_of(found, profile_id)
            # a second one beside one that leaves room is not made up here
            if found.uuid or not slices:
                return int(pynvml.NVML_ERROR_INSUFFICIENT_RESOURCES)
            state.made += 1
            found.compute_slices = slices
            # Real ones are of version 5, made of a name: what is made there next may have the same (NVIDIA/go-dcgm#30
            # shows MIG-a65afc88-50b5-5ccf-b0a8-f93b3247ae9e, go-nvml#57 MIG-90443af0-2fe6-57fb-86fe-54186d5a6581).
            found.uuid = f"MIG-{uuid.uuid5(_NAMESPACE, f'{found.gpu}/{found.id}/0')}"
            _note(state, "use", found.uuid, found.gpu)
            _point(compute._obj, _COMPUTE_INSTANCE + found.number)
        return 0

    def _nvmlComputeInstanceDestroy(self, compute: Any) -> int:
        with self._state() as state:
            found = state.find(_handle(compute) - _COMPUTE_INSTANCE)
            if found is None or not found.uuid:
                return _GONE
            if found.in_use:
                return int(pynvml.NVML_ERROR_IN_USE)
            _note(state, "end", found.uuid, found.gpu)
            found.uuid = ""
        return 0

    def _nvmlGpuInstanceDestroy(self, instance: Any) -> int:
        with self._state() as state:
            found = state.find(_handle(instance) - _GPU_INSTANCE)
            if found is None:
                return _GONE
            if found.uuid:
                return int(pynvml.NVML_ERROR_IN_USE)
            state.instances.remove(found)
            _note(state, "destroy", f"{found.profile}@{found.start}", found.gpu)
        return 0

    def _slices_of(self, instance: FakeInstance, profile: Any) -> int:
        """Count the slices of a profile of compute instances, 0 where the instance has no such profile."""
        slices = next((n for n, number in _COMPUTE_PROFILES.items() if number == _value(profile)), 0)
        return slices if slices <= self._profile(instance).compute_slices else 0

    def _slices(self, instance: FakeInstance) -> int:
        return instance.compute_slices or self._profile(instance).compute_slices

    def _profile(self, instance: FakeInstance) -> BoardProfile:
        gpu = next(one for one in self._gpus if one.uuid == instance.gpu)
        cut = gpu.cut()
        if cut is None:
            raise ValueError(f"GPU {instance.gpu} has an instance, and no profiles")
        return next(one for one in cut.profiles if one.profile_id == instance.profile_id)


def _instance_id(cut: Board, wanted: MIGInstance) -> int:
    """Give NVML's id of an instance, here by its place; the whole GPU's is 0.

    Listings of `nvidia-smi mig -lgi` that people have published show 1 and 2 for halves of an A100, 3 to 6 for quarters
    and 7 to 14 for eighths. Which of these a place has is not always the same: 3g.20gb at 0 is 1 in some, 2 in others.
    """
    largest = max(profile.size for profile in cut.profiles)
    return largest // wanted.size - 1 + wanted.start // wanted.size


def _strike(state: State) -> Fault | None:
    if state.fault is None:
        return None
    if state.fault.calls > 1:
        state.fault = msgspec.structs.replace(state.fault, calls=state.fault.calls - 1)
        return None
    struck, state.fault = state.fault, None
    return struck


def _end(fault: Fault) -> None:
    if fault.do == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault.do == "crash":
        raise CrashError
    raise _StruckError(fault.error)


class _StruckError(Exception):
    """Carry the answer of a call that a fault has struck."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def struck(error: Exception) -> int | None:
    """Give the answer that a fault makes, if *error* is one's."""
    return error.code if isinstance(error, _StruckError) else None


def _note(state: State, what: str, which: str, gpu: str) -> None:
    state.journal.append((time.time(), what, which, gpu))


def _value(number: Any) -> int:
    """Read an argument that pynvml hands over as a number or as a ctypes one."""
    return int(getattr(number, "value", number))


def _handle(pointer: Any) -> int:
    return ctypes.cast(pointer, ctypes.c_void_p).value or 0


def _point(target: Any, value: int) -> None:
    ctypes.memmove(ctypes.addressof(target), ctypes.byref(ctypes.c_void_p(value)), ctypes.sizeof(target))
