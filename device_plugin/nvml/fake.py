"""A made-up NVML library, in Python, that stands behind the real pynvml: GPUs from a YAML file, with faults on command.

pynvml looks every symbol up by name on the loaded library and calls it with ctypes arguments. An object whose methods
have the symbols' names is therefore a library; `ctypes.byref(x)._obj` is x, so the methods fill pynvml's own
structures.
"""
# ruff: noqa: N802, SLF001 - the names are NVML's, and _obj is how ctypes gives a reference back

import ctypes
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import msgspec
import pynvml
import structlog

from cotenant.contract import configuration
from cotenant.contract.boards import Board, BoardProfile, UnknownBoardError, board, board_of
from cotenant.contract.configuration import ConfigurationError
from cotenant.contract.units import parse_bytes
from device_plugin.nvml.fake_health import EVENT_DEVICE, FakeHealth, HealthSymbols
from device_plugin.nvml.fake_mig import MIG_DEVICE, MIGFunctions, StateFile, struck

log = structlog.get_logger(__name__)

# How often the file is looked at while a GPU hangs.
_LOOK_SECONDS = 0.02
# How many GPUs, and instances of each, the made-up driver numbers the capabilities of.
_CAPABILITIES = [
    f"gpu{gpu}/gi{instance}/{what}" for gpu in range(64) for instance in range(15) for what in ("access", "ci0/access")
]
_NAMESPACE = uuid.UUID("6c1f2f0e-6d0b-4a55-9d52-c07e4a6f0001")

_modes = msgspec.json.Decoder(dict[str, int])


class FakeGPU(FakeHealth, frozen=True, kw_only=True):
    """Describe *count* made-up GPUs that are alike."""

    model: str
    # as a person writes it: 80GiB, 81559MiB
    memory: str | int
    reserved: str | int = "0"
    count: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    # made from node and index where it is not given
    uuid: str = ""
    # of the first; the others count on. The GPU's index where it is not given
    minor: Annotated[int, msgspec.Meta(ge=0)] | None = None
    # the device node to hand to containers instead of /dev/nvidia<minor>
    device: str = ""
    # whose MIG profiles it has, by a name that `cotenant mig profiles` lists; that of the model where it is not given
    board: str = ""
    # its PCI device and vendor, 0x20B010DE
    pci_device_id: Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)] = 0
    # None: off, or where there are no MIG profiles, a model that knows no MIG
    mig: bool | None = None
    compute_capability: tuple[int, int] = (9, 0)
    virtualization: int = pynvml.NVML_GPU_VIRTUALIZATION_MODE_NONE
    # nvmlComputeMode_t; what is set later stands in a file beside this one, since on a real GPU it outlives programs
    compute_mode: Annotated[int, msgspec.Meta(ge=0, le=3)] = pynvml.NVML_COMPUTEMODE_DEFAULT
    # fallen off the bus: every call answers NVML_ERROR_GPU_IS_LOST
    lost: bool = False
    # symbols that fail, with the nvmlReturn_t they answer
    fail: dict[str, int] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        total, reserved = parse_bytes(self.memory), parse_bytes(self.reserved)
        if total < 1 or reserved > total:
            raise ValueError(f"memory is {self.memory} of which {self.reserved} reserved, expected more than that")
        if self.count > 1 and (self.uuid or self.device):
            raise ValueError(f"uuid and device are one GPU's, but count is {self.count}")
        if self.board:
            try:
                board(self.board)
            except UnknownBoardError as error:
                raise ValueError(f"board: {error}") from error

    def cut(self) -> Board | None:
        """Find the board whose MIG profiles it has."""
        return board(self.board) if self.board else board_of(self.model)


class FakeGPUs(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """Describe a made-up node: its GPUs, and the name that their UUIDs are made from."""

    gpus: tuple[FakeGPU, ...]
    node: str = ""
    # the newest CUDA that the driver can run, as NVML says it: 13000 for 13.0
    cuda_version: Annotated[int, msgspec.Meta(ge=0)] = 13_000

    def each(self) -> list[FakeGPU]:
        """List the GPUs one by one, each with its UUID and minor number."""
        # a pod's host name is another one each time that it is made anew
        node = self.node or os.environ.get("NODE_NAME") or socket.gethostname()
        single: list[FakeGPU] = []
        for group in self.gpus:
            for offset in range(group.count):
                index = len(single)
                single.append(
                    msgspec.structs.replace(
                        group,
                        count=1,
                        uuid=group.uuid or f"GPU-{uuid.uuid5(_NAMESPACE, f'{node}/{index}')}",
                        minor=index if group.minor is None else group.minor + offset,
                    )
                )
        return single


class FakeLibrary(HealthSymbols, MIGFunctions):
    """Answer NVML's symbols from the YAML file at *path*, read again whenever it changes.

    Raises ConfigurationError when the file is bad at the start; later the last good one stays.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self.state_file = StateFile(path)
        # which also keeps two threads from both taking what a changed file says for news
        self._reading = threading.RLock()
        self._stamp: tuple[int, ...] = ()
        self._gpus: list[FakeGPU] = []
        self._cuda_version = 0
        self._reload(first=True)

    def __getattr__(self, symbol: str) -> Callable[..., Any]:
        """Give the function behind *symbol*; an AttributeError is pynvml's NVML_ERROR_FUNCTION_NOT_FOUND."""
        function = getattr(type(self), f"_{symbol}", None) if symbol.startswith("nvml") else None
        if function is None:
            raise AttributeError(symbol)

        # an nvmlReturn_t, of nvmlErrorString alone a text
        def call(*arguments: Any) -> Any:
            self._reload(first=False)
            try:
                if _takes_device(function):
                    return self._on_device(symbol, function, arguments)
                return function(self, *arguments) or 0
            except Exception as error:
                answer = struck(error)
                if answer is None:
                    raise
                return answer

        return call

    def device_path(self, minor: int) -> str:
        """Name the device node of the GPU with that minor number."""
        return next((gpu.device for gpu in self._gpus if gpu.minor == minor and gpu.device), f"/dev/nvidia{minor}")

    def mig_minors(self) -> str:
        """List the numbers of capabilities as the driver does, one for each instance that there may be.

        A file beside the library's own, *path*.mig-minors, may list other ones. Raises OSError where it cannot be read.
        """
        try:
            return self._path.with_name(f"{self._path.name}.mig-minors").read_text()
        except FileNotFoundError:
            return "".join(f"{name} {number}\n" for number, name in enumerate(_CAPABILITIES, start=3))

    def capability_path(self, _path: str) -> str:
        """Name what stands for the device node of a capability: the same as for the first GPU that names one."""
        return next((gpu.device for gpu in self._gpus if gpu.device), "/dev/null")

    def _look(self) -> None:
        self._reload(first=False)

    def _index_of(self, uuid: str) -> int | None:
        return next((index for index, gpu in enumerate(self._gpus) if gpu.uuid == uuid), None)

    def _reload(self, *, first: bool) -> None:
        with self._reading:
            self._read(first=first)

    def _read(self, *, first: bool) -> None:
        try:
            status = self._path.stat()
            stamp = (status.st_mtime_ns, status.st_ino, status.st_size)
            if stamp == self._stamp:
                return
            self._stamp = stamp
            found = configuration.load(self._path, FakeGPUs)
        except (OSError, ConfigurationError) as error:
            if first:
                raise (
                    error
                    if isinstance(error, ConfigurationError)
                    else ConfigurationError(f"{self._path}: cannot be read: {error}")
                ) from error
            log.warning("nvml.fake_unreadable", file=str(self._path), error=str(error))
            return
        self._gpus, self._cuda_version = found.each(), found.cuda_version
        self._happened.compare((gpu.uuid, gpu) for gpu in self._gpus)
        # whoever wants to hear of one that comes back has to say so again
        self._registered -= {gpu.uuid for gpu in self._gpus if gpu.lost}

    def _on_device(self, symbol: str, function: Callable[..., int | None], arguments: tuple[Any, ...]) -> int:
        # A handle is index + 1: null is no device.
        index = (ctypes.cast(arguments[0], ctypes.c_void_p).value or 0) - 1
        if EVENT_DEVICE <= index < 2 * EVENT_DEVICE:
            index -= EVENT_DEVICE
        if index >= MIG_DEVICE:
            return self.on_mig_device(symbol, index + 1 - MIG_DEVICE, arguments[1:])
        if not 0 <= index < len(self._gpus):
            return int(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        while self._gpus[index].hang:
            time.sleep(_LOOK_SECONDS)
            self._look()
            if index >= len(self._gpus):
                return int(pynvml.NVML_ERROR_GPU_IS_LOST)
        gpu = self._gpus[index]
        if gpu.lost:
            return int(pynvml.NVML_ERROR_GPU_IS_LOST)
        if symbol in gpu.fail:
            return gpu.fail[symbol]
        return int(function(self, gpu, *arguments[1:]) or 0)

    # Symbols of the library. Those that take a device get the FakeGPU instead of its handle.

    def _nvmlInitWithFlags(self, _flags: int) -> None:
        pass

    def _nvmlShutdown(self) -> None:
        pass

    def _nvmlErrorString(self, code: int) -> bytes:
        return b"fake error %d" % code

    def _nvmlSystemGetCudaDriverVersion_v2(self, version: Any) -> None:
        version._obj.value = self._cuda_version

    def _nvmlDeviceGetComputeMode(self, gpu: FakeGPU, mode: Any) -> None:
        mode._obj.value = self._compute_modes().get(gpu.uuid, gpu.compute_mode)

    def _nvmlDeviceSetComputeMode(self, gpu: FakeGPU, mode: Any) -> int:
        wanted = getattr(mode, "value", mode)
        if wanted == pynvml.NVML_COMPUTEMODE_EXCLUSIVE_PROCESS and self.mig_on(gpu):
            return int(pynvml.NVML_ERROR_NOT_SUPPORTED)  # NVIDIA/DCGM#82 shows it
        with self._reading:
            modes = self._compute_modes() | {gpu.uuid: wanted}
            new = self._path.with_suffix(".compute-modes.new")
            new.write_bytes(msgspec.json.encode(modes))
            new.replace(self._path.with_suffix(".compute-modes"))
        return 0

    def _compute_modes(self) -> dict[str, int]:
        try:
            return _modes.decode(self._path.with_suffix(".compute-modes").read_bytes())
        except (OSError, msgspec.DecodeError):
            return {}

    def _nvmlDeviceGetCount_v2(self, count: Any) -> None:
        count._obj.value = len(self._gpus)

    def _nvmlDeviceGetHandleByIndex_v2(self, index: Any, handle: Any) -> int:
        if not 0 <= index.value < len(self._gpus):
            return int(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        if self._gpus[index.value].lost:
            return int(pynvml.NVML_ERROR_GPU_IS_LOST)
        target = handle._obj
        ctypes.memmove(ctypes.addressof(target), ctypes.byref(ctypes.c_void_p(index.value + 1)), ctypes.sizeof(target))
        return 0

    def _nvmlDeviceGetUUID(self, gpu: FakeGPU, text: Any, _length: Any) -> None:
        text.value = gpu.uuid.encode()

    def _nvmlDeviceGetName(self, gpu: FakeGPU, text: Any, _length: Any) -> None:
        text.value = gpu.model.encode()

    # Of a MIG device's handle alone; a GPU has none of these.

    def _nvmlDeviceGetGpuInstanceId(self, gpu: FakeGPU, _id: Any) -> int:  # noqa: ARG002
        return int(pynvml.NVML_ERROR_NOT_SUPPORTED)

    def _nvmlDeviceGetComputeInstanceId(self, gpu: FakeGPU, _id: Any) -> int:  # noqa: ARG002
        return int(pynvml.NVML_ERROR_NOT_SUPPORTED)

    def _nvmlDeviceGetMinorNumber(self, gpu: FakeGPU, minor: Any) -> None:
        minor._obj.value = gpu.minor

    def _nvmlDeviceGetMemoryInfo(self, gpu: FakeGPU, memory: Any) -> None:
        total, used = parse_bytes(gpu.memory), gpu.used_bytes()
        memory._obj.total, memory._obj.used, memory._obj.free = total, used, max(0, total - used)

    def _nvmlDeviceGetMemoryInfo_v2(self, gpu: FakeGPU, memory: Any) -> None:
        total, reserved = parse_bytes(gpu.memory), parse_bytes(gpu.reserved)
        used = gpu.used_bytes()
        memory._obj.total, memory._obj.reserved = total, reserved
        memory._obj.used, memory._obj.free = used, max(0, total - reserved - used)

    def _nvmlDeviceGetGpuInstanceProfileInfo(self, gpu: FakeGPU, profile: int, info: Any) -> int:
        if not 0 <= profile < pynvml.NVML_GPU_INSTANCE_PROFILE_COUNT:
            return int(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        found = next((known for known in _profiles(gpu) if known.nvml_profile == profile), None)
        if found is None:
            return int(pynvml.NVML_ERROR_NOT_SUPPORTED)
        target = info._obj
        target.id, target.sliceCount, target.instanceCount = found.profile_id, found.compute_slices, found.max_instances
        target.memorySizeMB = found.memory_mib or 0
        target.multiprocessorCount, target.copyEngineCount = found.multiprocessors or 0, found.copy_engines or 0
        target.decoderCount, target.encoderCount = found.decoders or 0, found.encoders or 0
        target.jpegCount, target.ofaCount = found.jpeg_engines or 0, found.optical_flow or 0
        return 0

    def _nvmlDeviceGetGpuInstanceProfileInfoV(self, gpu: FakeGPU, profile: int, info: Any) -> int:
        if info._obj.version != pynvml.nvmlGpuInstanceProfileInfo_v2:
            return int(pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH)
        answer = self._nvmlDeviceGetGpuInstanceProfileInfo(gpu, profile, info)
        if not answer:
            name = next(known.name for known in _profiles(gpu) if known.nvml_profile == profile)
            info._obj.name = f"MIG {name}".encode()
        return answer

    def _nvmlDeviceGetGpuInstancePossiblePlacements_v2(
        self, gpu: FakeGPU, profile_id: int, placements: Any, count: Any
    ) -> int:
        found = next((known for known in _profiles(gpu) if known.profile_id == profile_id), None)
        if found is None:
            return int(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        if placements is not None:
            if count._obj.value < len(found.starts):
                return int(pynvml.NVML_ERROR_INSUFFICIENT_SIZE)
            for place, start in zip(placements, found.starts, strict=False):
                place.start, place.size = start, found.size
        count._obj.value = len(found.starts)
        return 0

    def _nvmlDeviceGetCudaComputeCapability(self, gpu: FakeGPU, major: Any, minor: Any) -> None:
        major._obj.value, minor._obj.value = gpu.compute_capability

    def _nvmlDeviceGetVirtualizationMode(self, gpu: FakeGPU, mode: Any) -> None:
        mode._obj.value = gpu.virtualization

    def _nvmlDeviceGetPciInfo_v3(self, gpu: FakeGPU, info: Any) -> None:
        info._obj.bus = (gpu.minor or 0) + 1
        info._obj.pciDeviceId = gpu.pci_device_id
        info._obj.busId = b"00000000:%02X:00.0" % info._obj.bus


def _profiles(gpu: FakeGPU) -> tuple[BoardProfile, ...]:
    cut = gpu.cut()
    return () if cut is None else cut.profiles


def _takes_device(function: Callable[..., Any]) -> bool:
    return function.__code__.co_argcount > 1 and function.__code__.co_varnames[1] == "gpu"
