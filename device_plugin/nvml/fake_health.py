"""What made-up GPUs can suffer: XIDs, memory errors, a driver that hangs, processes, and a vGPU's missing licence."""
# ruff: noqa: N802, SLF001 - as in device_plugin.nvml.fake

import ctypes
import time
from collections import deque
from collections.abc import Iterable
from enum import StrEnum
from typing import Annotated, Any

import msgspec
import pynvml

from cotenant.contract.units import parse_bytes

_NO_INSTANCE = 0xFFFFFFFF
# Added to a GPU's handle in events.
EVENT_DEVICE = 0x10000
_NOT_AVAILABLE = pynvml.NVML_VALUE_NOT_AVAILABLE_ulonglong.value
# How often a file is looked at while somebody waits for what it may come to say.
_LOOK_SECONDS = 0.02

Number = Annotated[int, msgspec.Meta(ge=0, le=0xFFFFFFFE)]


class FakeXID(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """Describe an XID, of one MIG instance where that is named."""

    xid: Number
    gpu_instance: Number | None = None
    compute_instance: Number | None = None


class Kind(StrEnum):
    """Say in which of NVML's lists a process stands."""

    COMPUTE = "compute"
    GRAPHICS = "graphics"
    MPS = "mps"


class FakeProcess(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """Describe a process that holds memory; without *memory* NVML does not say how much."""

    pid: Annotated[int, msgspec.Meta(ge=1, le=0xFFFFFFFF)]
    memory: str | int | None = None
    kind: Kind = Kind.COMPUTE
    gpu_instance: Number | None = None

    def __post_init__(self) -> None:
        if self.memory is not None:
            parse_bytes(self.memory)


class FakeRecovery(StrEnum):
    """Name what a driver wants done with a GPU."""

    NONE = "none"
    RESET = "reset"
    REBOOT = "reboot"
    DRAIN_AND_RESET = "drain-and-reset"


_RECOVERY = {
    FakeRecovery.NONE: pynvml.NVML_GPU_RECOVERY_ACTION_NONE,
    FakeRecovery.RESET: pynvml.NVML_GPU_RECOVERY_ACTION_GPU_RESET,
    FakeRecovery.REBOOT: pynvml.NVML_GPU_RECOVERY_ACTION_NODE_REBOOT,
    FakeRecovery.DRAIN_AND_RESET: pynvml.NVML_GPU_RECOVERY_ACTION_DRAIN_AND_RESET,
}


class FakeHealth(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """Describe how a made-up GPU is; what is None, NVML does not say."""

    # Each entry happens once: at the start, or when a changed file has it beyond those that it had.
    xids: tuple[Number | FakeXID, ...] = ()
    # every call waits until the file says otherwise
    hang: bool = False
    uncorrected_ecc: Number | None = None
    row_remap_pending: bool | None = None
    row_remap_failure: bool | None = None
    recovery_action: FakeRecovery | None = None
    processes: tuple[FakeProcess, ...] = ()
    # of a vGPU guest
    licensed: bool | None = None

    def used_bytes(self) -> int:
        """Add up what its processes hold."""
        held = {process.pid: parse_bytes(process.memory) for process in self.processes if process.memory is not None}
        return sum(held.values())

    def xid(self, position: int) -> FakeXID:
        """Give one of its XIDs."""
        entry = self.xids[position]
        return entry if isinstance(entry, FakeXID) else FakeXID(xid=entry)


class Happened:
    """Hold the XIDs that nobody has been told yet, by UUID."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[str, FakeXID]] = deque()
        self._seen: dict[str, tuple[Any, ...]] = {}

    def compare(self, gpus: Iterable[tuple[str, FakeHealth]]) -> None:
        """Take what a file says now; what it says beyond what it said has just happened."""
        for uuid, gpu in gpus:
            seen = self._seen.get(uuid, ())
            first = len(seen) if gpu.xids[: len(seen)] == seen else 0
            self._waiting.extend((uuid, gpu.xid(n)) for n in range(first, len(gpu.xids)))
            self._seen[uuid] = gpu.xids

    def next(self, uuids: Iterable[str]) -> tuple[str, FakeXID] | None:
        """Take the oldest of these GPUs."""
        wanted = set(uuids)
        for entry in self._waiting:
            if entry[0] in wanted:
                self._waiting.remove(entry)
                return entry
        return None


class HealthSymbols:
    """Answer NVML's symbols about health and processes; the library that mixes it in has the GPUs."""

    def __init__(self) -> None:
        self._happened = Happened()
        self._registered: set[str] = set()

    # Given by the library.

    def _look(self) -> None:
        raise NotImplementedError

    def _index_of(self, uuid: str) -> int | None:
        raise NotImplementedError

    def _nvmlEventSetCreate(self, event_set: Any) -> int:
        ctypes.memmove(ctypes.byref(event_set._obj), ctypes.byref(ctypes.c_void_p(1)), ctypes.sizeof(ctypes.c_void_p))
        return 0

    def _nvmlEventSetFree(self, _event_set: Any) -> None:
        self._registered.clear()

    def _nvmlDeviceGetSupportedEventTypes(self, gpu: Any, types: Any) -> None:
        del gpu
        types._obj.value = pynvml.nvmlEventTypeXidCriticalError | pynvml.nvmlEventTypeDoubleBitEccError

    def _nvmlDeviceRegisterEvents(self, gpu: Any, _types: Any, _event_set: Any) -> None:
        self._registered.add(gpu.uuid)

    def _nvmlEventSetWait_v2(self, _event_set: Any, data: Any, milliseconds: Any) -> int:
        ends = time.monotonic() + milliseconds.value / 1000
        while True:
            self._look()
            happened = self._happened.next(self._registered)
            index = None if happened is None else self._index_of(happened[0])
            if happened is not None and index is not None:
                break
            if time.monotonic() >= ends:
                return int(pynvml.NVML_ERROR_TIMEOUT)
            time.sleep(_LOOK_SECONDS)
        target, xid = data._obj, happened[1]
        # the handle is the structure's first field; nothing in nvml.h says that it is the one that was registered
        handle = ctypes.c_void_p(EVENT_DEVICE + index + 1)
        ctypes.memmove(ctypes.byref(target), ctypes.byref(handle), ctypes.sizeof(handle))
        target.eventType, target.eventData = pynvml.nvmlEventTypeXidCriticalError, xid.xid
        target.gpuInstanceId = _NO_INSTANCE if xid.gpu_instance is None else xid.gpu_instance
        target.computeInstanceId = _NO_INSTANCE if xid.compute_instance is None else xid.compute_instance
        return 0

    def _nvmlDeviceGetTotalEccErrors(self, gpu: Any, kind: Any, _counter: Any, count: Any) -> int:
        if gpu.uncorrected_ecc is None:
            return int(pynvml.NVML_ERROR_NOT_SUPPORTED)
        count._obj.value = gpu.uncorrected_ecc if kind.value == pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED else 0
        return 0

    def _nvmlDeviceGetRemappedRows(
        self, gpu: Any, _corrected: Any, _uncorrected: Any, pending: Any, failure: Any
    ) -> int:
        if gpu.row_remap_pending is None and gpu.row_remap_failure is None:
            return int(pynvml.NVML_ERROR_NOT_SUPPORTED)
        pending._obj.value, failure._obj.value = int(bool(gpu.row_remap_pending)), int(bool(gpu.row_remap_failure))
        return 0

    def _nvmlDeviceGetFieldValues(self, gpu: Any, count: Any, values: Any) -> None:
        for value in values._obj[: count.value]:
            if value.fieldId == pynvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION and gpu.recovery_action is not None:
                value.nvmlReturn, value.value.uiVal = pynvml.NVML_SUCCESS, _RECOVERY[gpu.recovery_action]
            else:
                value.nvmlReturn = pynvml.NVML_ERROR_NOT_SUPPORTED

    def _nvmlDeviceGetGridLicensableFeatures_v4(self, gpu: Any, features: Any) -> int:
        if gpu.licensed is None:
            return int(pynvml.NVML_ERROR_NOT_SUPPORTED)
        target = features._obj
        target.isGridLicenseSupported, target.licensableFeaturesCount = 1, 1
        target.gridLicensableFeatures[0].featureCode = pynvml.NVML_GRID_LICENSE_FEATURE_CODE_COMPUTE
        target.gridLicensableFeatures[0].featureState = int(gpu.licensed)
        return 0

    def _nvmlDeviceGetComputeRunningProcesses_v3(self, gpu: Any, count: Any, found: Any) -> int:
        return _list(gpu, Kind.COMPUTE, count, found)

    def _nvmlDeviceGetGraphicsRunningProcesses_v3(self, gpu: Any, count: Any, found: Any) -> int:
        return _list(gpu, Kind.GRAPHICS, count, found)

    def _nvmlDeviceGetMPSComputeRunningProcesses_v3(self, gpu: Any, count: Any, found: Any) -> int:
        return _list(gpu, Kind.MPS, count, found)


def _list(gpu: FakeHealth, kind: Kind, count: Any, found: Any) -> int:
    listed = [process for process in gpu.processes if process.kind is kind]
    room, count._obj.value = count._obj.value, len(listed)
    if listed and (found is None or room < len(listed)):
        return int(pynvml.NVML_ERROR_INSUFFICIENT_SIZE)
    for target, process in zip(found or (), listed, strict=False):
        target.pid = process.pid
        target.usedGpuMemory = _NOT_AVAILABLE if process.memory is None else parse_bytes(process.memory)
        target.gpuInstanceId = _NO_INSTANCE if process.gpu_instance is None else process.gpu_instance
        target.computeInstanceId = _NO_INSTANCE
    return 0
