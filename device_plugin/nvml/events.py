"""Waits for what the driver tells of its own accord: XIDs and double-bit ECC errors."""

import ctypes
from collections.abc import Callable
from typing import Any, Protocol

import msgspec
import pynvml
import structlog

log = structlog.get_logger(__name__)

_WANTED = pynvml.nvmlEventTypeXidCriticalError | pynvml.nvmlEventTypeDoubleBitEccError
# What stands in an event that is of no MIG instance.
_NO_INSTANCE = 0xFFFFFFFF
# What NVML answers where a GPU, its virtualization or the driver knows no events.
NO_EVENTS = frozenset(
    {pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_FUNCTION_NOT_FOUND, pynvml.NVML_ERROR_NO_PERMISSION}
)


class EventsError(Exception):
    """Say why no more events can be heard."""


class GPUEvent(msgspec.Struct, frozen=True):
    """Hold what was told of one GPU; *xid* None is a double-bit ECC error, *uuid* "" a GPU that could not be named."""

    uuid: str
    xid: int | None
    gpu_instance: int | None = None
    compute_instance: int | None = None


class Caller(Protocol):
    """Be the open NVML, as events need it."""

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call one function of pynvml."""

    def handle(self, index: int) -> Any:
        """Give the handle of a GPU."""

    def function(self, name: str) -> Callable[..., int]:
        """Find a function of the library itself, to be called beside all others."""


class Events:
    """Hold one nvmlEventSet; raise pynvml.NVMLError where the driver has none."""

    def __init__(self, nvml: Caller) -> None:
        self._nvml = nvml
        self._set = nvml.call(pynvml.nvmlEventSetCreate)
        # not through pynvml: a call that waits for seconds would keep another library of this process from its turn
        self._wait = nvml.function("nvmlEventSetWait_v2")
        # by what the handle points to, which an event carries too
        self._uuids: dict[int, str] = {}
        self._settled: set[str] = set()
        # why a GPU's events could not be asked for, by UUID: said once
        self._failures: dict[str, str] = {}

    def follow(self, index: int, uuid: str) -> None:
        """Ask for the events of one more GPU; one that knows none is remembered, one that fails is tried again."""
        if uuid in self._settled:
            return
        try:
            handle = self._nvml.handle(index)
            supported = self._nvml.call(pynvml.nvmlDeviceGetSupportedEventTypes, handle)
            if supported & _WANTED:
                self._nvml.call(pynvml.nvmlDeviceRegisterEvents, handle, supported & _WANTED, self._set)
                self._uuids[_address(handle)] = uuid
            else:
                log.info("nvml.no_events", gpu=uuid)
        except pynvml.NVMLError as error:
            if error.value not in NO_EVENTS:
                if self._failures.get(uuid) != str(error):
                    self._failures[uuid] = str(error)
                    log.warning("nvml.events_not_registered", gpu=uuid, error=str(error))
                return
            log.info("nvml.no_events", gpu=uuid, error=str(error))
        self._settled.add(uuid)

    def lose(self, uuid: str) -> None:
        """Ask anew for the events of a GPU that is lost, once it is followed again: it comes back by another handle."""
        self._settled.discard(uuid)

    def wait(self, milliseconds: int) -> GPUEvent | None:
        """Give the next event, None when none comes within *milliseconds*; raise EventsError."""
        data = pynvml.c_nvmlEventData_t()
        code = self._wait(self._set, ctypes.byref(data), ctypes.c_uint(milliseconds))
        if code == pynvml.NVML_ERROR_TIMEOUT:
            return None
        if code != pynvml.NVML_SUCCESS:
            raise EventsError(f"NVML says: {pynvml.NVMLError(code)} (code {code})")
        instance, compute = data.gpuInstanceId, data.computeInstanceId
        return GPUEvent(
            uuid=self._uuid_of(data.device),
            xid=int(data.eventData) if data.eventType == pynvml.nvmlEventTypeXidCriticalError else None,
            gpu_instance=None if instance == _NO_INSTANCE else instance,
            compute_instance=None if compute == _NO_INSTANCE else compute,
        )

    def _uuid_of(self, device: Any) -> str:
        """Say which GPU an event is of, "" where that cannot be told.

        nvml.h does not promise the handle that was registered (nvmlEventData_t.device), so one that is not known is
        asked who it is, as NVIDIA's device plugin does (internal/rm/health.go). A GPU that is lost would not say.
        """
        known = self._uuids.get(_address(device))
        if known is not None:
            return known
        try:
            uuid = str(self._nvml.call(pynvml.nvmlDeviceGetUUID, device))
        except pynvml.NVMLError as error:
            log.warning("nvml.event_of_unknown", error=str(error))
            return ""
        return uuid if uuid in self._uuids.values() else ""

    def close(self) -> None:
        """Free the set."""
        try:
            self._nvml.call(pynvml.nvmlEventSetFree, self._set)
        except pynvml.NVMLError as error:
            log.warning("nvml.events_not_freed", error=str(error))


def _address(handle: Any) -> int:
    return ctypes.cast(handle, ctypes.c_void_p).value or 0
