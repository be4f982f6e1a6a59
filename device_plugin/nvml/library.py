"""Reads NVML through pynvml, so that one bad GPU hides no other and a missing answer is no wrong answer."""

import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

import msgspec
import pynvml
import structlog

from cotenant.contract.inventory import MIGProfile
from device_plugin.nvml import mig, processes, vitals
from device_plugin.nvml.advice import MIG_UNPRIVILEGED, UNPRIVILEGED, sentence
from device_plugin.nvml.events import NO_EVENTS, Events, EventsError
from device_plugin.nvml.fake import FakeLibrary
from device_plugin.nvml.patience import Patience, Unanswered
from device_plugin.nvml.processes import GPUProcess
from device_plugin.nvml.turn import Library, Turn
from device_plugin.nvml.vitals import Vitals

log = structlog.get_logger(__name__)

T = TypeVar("T")

# pynvml keeps the library and its symbols in module variables.
_turn = Turn()
# A call takes a millisecond, and a GPU that is waking up from its sleep a second or two.
_PATIENCE_SECONDS = 5.0
# The first look initializes all GPUs where nothing else does, as nvidia-persistenced: on eight A100 that took over 25 s
# (Azure/AgentBaker#2829). No GPU is to be missing for that when the plugin begins to serve.
_FIRST_TIMES = 6
_GUEST = pynvml.NVML_GPU_VIRTUALIZATION_MODE_VGPU
# What NVML answers for a GPU that has to be reset, or is being reset.
_LOST = frozenset({pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_RESET_REQUIRED})

# What an answer may lack without meaning anything: an older driver, a vGPU guest, an unprivileged container.
_UNKNOWN = frozenset(
    {
        pynvml.NVML_ERROR_NOT_SUPPORTED,
        pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
        pynvml.NVML_ERROR_NO_PERMISSION,
        pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH,
    }
)

_CLOSED = {
    pynvml.NVML_COMPUTEMODE_EXCLUSIVE_PROCESS: "EXCLUSIVE_PROCESS",
    pynvml.NVML_COMPUTEMODE_EXCLUSIVE_THREAD: "EXCLUSIVE_THREAD",
    pynvml.NVML_COMPUTEMODE_PROHIBITED: "PROHIBITED",
}


class NVMLUnavailableError(Exception):
    """Say why NVML cannot be used at all, and what to do."""


class MIGError(Exception):
    """Say what could not be done with a GPU instance, and why."""


class PhysicalGPU(msgspec.Struct, frozen=True, kw_only=True):
    """Describe one GPU as NVML does; None is what NVML does not say."""

    uuid: str
    # NVML's, ordered by PCI address; moves when another GPU is lost over a restart
    index: int
    model: str
    # 0 where it does not say, as a GPU does that shares the machine's memory
    total_bytes: int
    # kept by driver and firmware, part of total (nvmlMemory_v2_t.reserved); 0 where the driver is older than 510
    reserved_bytes: int
    # N of the container's /dev/nvidiaN, and the node's file for it, which has the same name unless it is a made-up GPU
    minor: int | None = None
    device_path: str | None = None
    pci_bus_id: str | None = None
    # device and vendor, as `lspci -nn` shows them: 0x20B010DE is an A100
    pci_device_id: int | None = None
    compute_capability: tuple[int, int] | None = None
    mig_enabled: bool | None = None
    # nvmlGpuVirtualizationMode_t: 0 none, 1 passthrough, 2 a vGPU guest, 3 and 4 hosts of vGPUs
    virtualization: int | None = None
    # nvmlComputeMode_t: how many processes may use it at once
    compute_mode: int | None = None
    vitals: Vitals = Vitals()
    # why it does not work now, for people; the facts above are then what it last said
    fault: str = ""
    # the fault is that the driver cannot reach it, as before or during a reset
    lost: bool = False

    @property
    def closed(self) -> str:
        """Say why not just any process may use it, "" where it may."""
        return _CLOSED.get(self.compute_mode, "")

    @property
    def guest(self) -> bool:
        """Tell whether it is a vGPU that a hypervisor cut for this machine, as large as its profile."""
        return bool(self.virtualization == _GUEST)


class NVML:
    """Hold one NVML library open."""

    def __init__(
        self,
        library: "ctypes.CDLL | FakeLibrary | None",
        device_path: Callable[[int], str],
        patience: float = _PATIENCE_SECONDS,
    ) -> None:
        """Take *library*, None for the one pynvml finds; *device_path* names a GPU's node by its minor number.

        *patience* are the seconds that one GPU may take to answer; at the first look six times as many.
        """
        self._library = Library(library)
        self._device_path = device_path
        self._mig_minors: Callable[[], str] = mig.MINORS.read_text
        self._capability_path: Callable[[str], str] = str
        self._patience = Patience(patience)
        # under load the walk through a GPU's instances takes up to 10 s (NVIDIA's DRA driver, nvlib.go)
        self._long_patience = Patience(4 * patience)
        self._handles: dict[int, Any] = {}
        self._profiles: dict[int, tuple[MIGProfile, ...]] = {}
        self._known: dict[int, PhysicalGPU] = {}
        self._count = 0
        self._looked = False
        # why a GPU that never said who it is cannot be read, by index: said once
        self._unreadable: dict[int, str] = {}
        # the last look could read none of the GPUs, where it is not that they are lost, or that the driver hangs
        self.blind = False

    @classmethod
    def open(
        cls, *, library_path: Path | None = None, fake: Path | None = None, patience: float = _PATIENCE_SECONDS
    ) -> Self:
        """Load and initialize NVML: the system's, the one at *library_path*, or a made-up one from the file *fake*.

        Raises NVMLUnavailableError, and cotenant.contract.configuration.ConfigurationError for a bad *fake*.
        """
        if fake is not None:
            library = FakeLibrary(fake)
            nvml = cls(library, library.device_path, patience)
            nvml._mig_minors, nvml._capability_path = library.mig_minors, library.capability_path
        elif library_path is not None:
            try:
                nvml = cls(ctypes.CDLL(str(library_path)), _system_path, patience)
            except OSError as error:
                raise NVMLUnavailableError(f"--nvml-library {library_path} cannot be loaded: {error}") from error
        else:
            nvml = cls(None, _system_path, patience)
        try:
            nvml.call(pynvml.nvmlInit)
        except pynvml.NVMLError as error:
            raise NVMLUnavailableError(sentence(error)) from error
        return nvml

    def close(self) -> None:
        """Shut NVML down; do nothing when it cannot."""
        try:
            self._patience.one("shutdown", partial(self.call, pynvml.nvmlShutdown))
        except (pynvml.NVMLError, Unanswered) as error:
            log.warning("nvml.shutdown_failed", error=sentence(error))

    def gpus(self) -> tuple[PhysicalGPU, ...]:
        """Read all GPUs anew, by index, at the same time.

        A GPU that fails or does not answer has its last facts and a `fault`; one that failed from the start has no UUID
        and so cannot be told of, only logged. Raises NVMLUnavailableError when not even their number can be read, or
        when none of them could ever be and NVML is *blind*.
        """
        try:
            count: int = self._patience.one("count", partial(self.call, pynvml.nvmlDeviceGetCount))
        except (pynvml.NVMLError, Unanswered) as error:
            raise NVMLUnavailableError(sentence(error)) from error
        if count != self._count:
            # a GPU that is removed or comes back moves those behind it, and what is kept by index would be another's
            self._count = count
            self._handles.clear()
            self._profiles.clear()
        questions = {index: partial(self._read, index) for index in range(count)}
        answers = self._patience.ask(questions, times=1 if self._looked else _FIRST_TIMES)
        self._looked = True
        errors = [answer for answer in answers.values() if isinstance(answer, pynvml.NVMLError)]
        reasons = [error for error in errors if error.value not in _LOST]
        self.blind = bool(reasons) and len(errors) == count
        if self.blind and not self._known:
            raise NVMLUnavailableError(f"none of the {count} GPUs can be read: {sentence(reasons[0])}")
        for index, answer in answers.items():
            if isinstance(answer, PhysicalGPU):
                self._unreadable.pop(index, None)
                read, before = self._with_memory(answer), self._known.get(index)
                if before is not None and before.mig_enabled is not read.mig_enabled:
                    self._profiles.pop(index, None)
                self._known = {at: gpu for at, gpu in self._known.items() if gpu.uuid != read.uuid} | {index: read}
            elif index in self._known:
                lost = isinstance(answer, pynvml.NVMLError) and answer.value in _LOST
                if lost:
                    # what comes back after a reset may have another, or be another one
                    self._handles.pop(index, None)
                    self._profiles.pop(index, None)
                self._known[index] = msgspec.structs.replace(self._known[index], fault=sentence(answer), lost=lost)
            else:
                self._tell_unreadable(index, sentence(answer))
        missing = "NVML no longer lists the GPU: it has fallen off the bus, or was removed"
        for index in self._known.keys() - set(range(count)):
            self._known[index] = msgspec.structs.replace(self._known[index], fault=missing, lost=True)
        return tuple(gpu for _, gpu in sorted(self._known.items()))

    def events(self) -> Events | None:
        """Open a way to hear of XIDs; None where the driver knows none. Raises EventsError when that fails for now."""
        try:
            return Events(self)
        except pynvml.NVMLError as error:
            if error.value not in NO_EVENTS:
                raise EventsError(sentence(error)) from error
            log.warning("nvml.no_events", error=sentence(error))
            return None

    def processes(self, indices: Sequence[int]) -> dict[int, tuple[GPUProcess, ...] | str]:
        """List the processes of each GPU, or say why that cannot be; what NVML does not tell is an empty list."""
        answers = self._patience.ask({("processes", index): partial(self._processes, index) for index in indices})
        return {
            index: sentence(answer) if isinstance(answer, Exception) else answer
            for (_, index), answer in answers.items()
        }

    def cuda_version(self) -> int | None:
        """Read the newest CUDA that the driver can run, such as 13010 for 13.1."""
        try:
            return self._optional(pynvml.nvmlSystemGetCudaDriverVersion_v2)
        except pynvml.NVMLError:
            return None

    def compute_mode(self, index: int) -> int:
        """Read the compute mode of the GPU of that index; raise NVMLUnavailableError with a sentence."""
        try:
            return int(self.call(pynvml.nvmlDeviceGetComputeMode, self.handle(index)))
        except pynvml.NVMLError as error:
            raise NVMLUnavailableError(f"the compute mode of GPU {index} cannot be read: {sentence(error)}") from error

    def set_exclusive(self, index: int) -> None:
        """Let in one process of the GPU of that index, an MPS server; raise NVMLUnavailableError with a sentence."""
        self.set_compute_mode(index, pynvml.NVML_COMPUTEMODE_EXCLUSIVE_PROCESS)

    def set_compute_mode(self, index: int, mode: int) -> None:
        """Set the compute mode of the GPU of that index; raise NVMLUnavailableError with a sentence."""
        try:
            self.call(pynvml.nvmlDeviceSetComputeMode, self.handle(index), mode)
        except pynvml.NVMLError as error:
            if error.value == pynvml.NVML_ERROR_NO_PERMISSION:
                raise NVMLUnavailableError(
                    f"the compute mode of GPU {index} may be set by a privileged program alone; see docs/modes.md"
                ) from error
            raise NVMLUnavailableError(f"the compute mode of GPU {index} cannot be set: {sentence(error)}") from error

    def mig_profiles(self, index: int) -> tuple[MIGProfile, ...]:
        """Read which MIG profiles the GPU of that index offers, be MIG mode on or off; none where it knows no MIG.

        Raises NVMLUnavailableError with a sentence when it does not say, as to users that are not root.
        """
        try:
            return self._mig_profiles(index)
        except pynvml.NVMLError as error:
            if error.value == pynvml.NVML_ERROR_NO_PERMISSION:
                raise NVMLUnavailableError(f"NVML tells the MIG placements of GPU {index} to root only") from error
            raise NVMLUnavailableError(f"the MIG profiles of GPU {index} cannot be read: {sentence(error)}") from error

    def handle(self, index: int) -> Any:
        """Give the handle of a GPU; raise pynvml.NVMLError."""
        # A handle stays valid until shutdown, and asking for it again wakes GPUs from their sleep.
        if index not in self._handles:
            self._handles[index] = self.call(pynvml.nvmlDeviceGetHandleByIndex, index)
        return self._handles[index]

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call one function of pynvml; raise pynvml.NVMLError."""
        with _turn.of(self._library):
            return function(*arguments)

    def function(self, name: str) -> Callable[..., int]:
        """Find a function of the library itself; raise pynvml.NVMLError where it has none of that name."""
        with _turn.of(self._library):
            found: Callable[..., int] = pynvml._nvmlGetFunctionPointer(name)  # noqa: SLF001 - what pynvml calls itself
            return found

    def mig_instances(self, index: int) -> tuple[mig.GPUInstance, ...]:
        """Read which GPU instances there are on the GPU of that index; raise MIGError.

        Asked with patience, as all GPUs are looked at one after the other. What makes or destroys one is waited for, as
        nobody knows what it would still do.
        """
        key = ("instances", index, threading.get_ident())
        with _about_mig(f"the MIG instances of GPU {index} cannot be read"):
            found: tuple[mig.GPUInstance, ...] = self._long_patience.one(key, partial(self._mig_instances, index))
            return found

    def create_mig_instance(self, index: int, profile: str, start: int) -> None:
        """Make a GPU instance with its compute instance; raise MIGError."""
        with _about_mig(f"{profile} cannot be made at {start} of GPU {index}"):
            mig.create(self.call, self.handle(index), self._mig_profile(index, profile), start)

    def complete_mig_instance(self, index: int, instance: mig.GPUInstance) -> None:
        """Make the compute instance that a GPU instance lacks; raise MIGError."""
        with _about_mig(f"{instance.profile} at {instance.start} of GPU {index} cannot be completed"):
            mig.complete(self.call, self.handle(index), self._mig_profile(index, instance.profile), instance.id)

    def destroy_mig_instance(self, index: int, instance: mig.GPUInstance) -> None:
        """Destroy a GPU instance and what is in it, as far as it is there; raise MIGError."""
        with _about_mig(f"{instance.profile} at {instance.start} of GPU {index} cannot be destroyed"):
            mig.destroy(self.call, self.handle(index), self._mig_profile(index, instance.profile), instance.id)

    def mig_nodes(self, gpu: PhysicalGPU, instance: mig.GPUInstance) -> list[tuple[str, str]]:
        """Name the device nodes of an instance: the container's path and the host's.

        The instance's own are capabilities, by numbers that the driver lists in mig-minors. Raises MIGError where it
        lists none, since CUDA would find no device.
        """
        nodes = [] if gpu.device_path is None else [(f"/dev/nvidia{gpu.minor}", gpu.device_path)]
        try:
            capabilities = mig.capabilities(self._mig_minors, gpu.minor, instance)
        except LookupError as error:
            raise MIGError(
                f"no container could use {instance.profile} at {instance.start} of GPU {gpu.index}: {error.args[0]}; "
                "load the driver's module nvidia with nv_cap_enable_devfs=1"
            ) from error
        return [*nodes, *((path, self._capability_path(path)) for path in capabilities)]

    def set_mig_mode(self, index: int, *, on: bool) -> None:
        """Switch MIG mode; raise MIGError where that cannot be done now, as where the GPU would need a reset.

        Then nothing has changed: a later reset brings the mode that it would have brought before.
        """
        what = f"MIG mode of GPU {index} cannot be switched {'on' if on else 'off'}"
        with _about_mig(what):
            status = mig.switch(self.call, self.handle(index), on=on)
            self._profiles.pop(index, None)
            if status == pynvml.NVML_ERROR_RESET_REQUIRED:
                # a reset alone would not bring it
                way = f"drain it, and `nvidia-smi -i {index} -mig {int(on)}`"
                raise MIGError(f"{what}: this model needs a reset for it: {way}")
            if status:
                raise pynvml.NVMLError(status)

    def _mig_instances(self, index: int) -> tuple[mig.GPUInstance, ...]:
        return mig.instances(self.call, self.handle(index), self._mig_profiles(index))

    def _mig_profiles(self, index: int) -> tuple[MIGProfile, ...]:
        # nvml.h promises that they stay as they are as long as the MIG mode does (nvmlDeviceGetGpuInstanceProfileInfo)
        if index not in self._profiles:
            self._profiles[index] = mig.profiles(self.call, self.handle(index))
        return self._profiles[index]

    def _mig_profile(self, index: int, name: str) -> MIGProfile:
        for profile in self._mig_profiles(index):
            if profile.name == name:
                return profile
        raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)

    def _read(self, index: int) -> PhysicalGPU:
        handle = self.handle(index)
        mig = self._optional(pynvml.nvmlDeviceGetMigMode, handle)
        mig_enabled = None if mig is None else mig[0] == pynvml.NVML_DEVICE_MIG_ENABLE
        used: int | None
        try:
            total, reserved, used = self._memory(handle)
            fault = ""
        except pynvml.NVMLError as error:
            if not mig_enabled or error.value != pynvml.NVML_ERROR_NO_PERMISSION:
                raise
            total, reserved, used, fault = 0, 0, None, UNPRIVILEGED
        minor = self._optional(pynvml.nvmlDeviceGetMinorNumber, handle)
        pci = self._optional(pynvml.nvmlDeviceGetPciInfo, handle)
        virtualization = self._optional(pynvml.nvmlDeviceGetVirtualizationMode, handle)
        return PhysicalGPU(
            uuid=self.call(pynvml.nvmlDeviceGetUUID, handle),
            index=index,
            model=self.call(pynvml.nvmlDeviceGetName, handle),
            total_bytes=total,
            reserved_bytes=reserved,
            minor=minor,
            device_path=None if minor is None else self._device_path(minor),
            pci_bus_id=None if pci is None else str(pci.busId),
            pci_device_id=None if pci is None else int(pci.pciDeviceId) or None,
            compute_capability=self._optional(pynvml.nvmlDeviceGetCudaComputeCapability, handle),
            mig_enabled=mig_enabled,
            virtualization=virtualization,
            compute_mode=self._hint(pynvml.nvmlDeviceGetComputeMode, handle),
            vitals=vitals.read(self._hint, handle, used_bytes=used, guest=virtualization == _GUEST),
            fault=fault,
        )

    def _tell_unreadable(self, index: int, fault: str) -> None:
        if self._unreadable.get(index) != fault:
            self._unreadable[index] = fault
            log.warning("nvml.gpu_unreadable", index=index, fault=fault)

    def _with_memory(self, gpu: PhysicalGPU) -> PhysicalGPU:
        """Give a GPU that does not tell its memory what it last said, as where MIG mode was switched on meanwhile."""
        before = next((known for known in self._known.values() if known.uuid == gpu.uuid), None)
        if gpu.total_bytes or before is None:
            return gpu
        return msgspec.structs.replace(gpu, total_bytes=before.total_bytes, reserved_bytes=before.reserved_bytes)

    def _processes(self, index: int) -> tuple[GPUProcess, ...]:
        return processes.read(self._optional, self.handle(index))

    def _memory(self, handle: Any) -> tuple[int, int, int | None]:
        """Read total, reserved and used bytes; drivers before 510 know no reserved bytes and count them as used.

        A GPU that has no memory but the machine's tells none, and is no worse for it: NVML_ERROR_NOT_SUPPORTED, as on a
        GB10 (k8s-device-plugin#1482, dra-driver-nvidia-gpu#1073).
        """
        memory = self._optional(pynvml.nvmlDeviceGetMemoryInfo, handle, pynvml.nvmlMemory_v2)
        if memory is not None:
            return memory.total, memory.reserved, memory.used
        try:
            memory = self.call(pynvml.nvmlDeviceGetMemoryInfo, handle)
        except pynvml.NVMLError as error:
            if error.value != pynvml.NVML_ERROR_NOT_SUPPORTED:
                raise
            return 0, 0, None
        return memory.total, 0, memory.used

    def _optional(self, function: Callable[..., T], *arguments: Any) -> T | None:
        try:
            return self.call(function, *arguments)
        except pynvml.NVMLError as error:
            if error.value in _UNKNOWN:
                return None
            raise

    def _hint(self, function: Callable[..., T], *arguments: Any) -> T | None:
        """Call what says how a GPU is: a driver that fails to tell it is no worse than one that does not know it."""
        try:
            return self.call(function, *arguments)
        except pynvml.NVMLError as error:
            if error.value in _LOST:
                raise
            return None


@contextmanager
def _about_mig(what: str) -> Iterator[None]:
    try:
        yield
    except pynvml.NVMLError as error:
        known = {pynvml.NVML_ERROR_IN_USE: "it is in use", pynvml.NVML_ERROR_NO_PERMISSION: MIG_UNPRIVILEGED}
        raise MIGError(f"{what}: {known.get(error.value) or sentence(error)}") from error
    except Unanswered as error:
        raise MIGError(f"{what}: {sentence(error)}") from error


def _system_path(minor: int) -> str:
    return f"/dev/nvidia{minor}"
