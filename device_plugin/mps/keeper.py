"""Keeps the node's MPS control daemons as they are planned, and clears away what earlier plugins left."""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import structlog

from cotenant.contract.configuration import MPSSettings
from device_plugin.mps import process
from device_plugin.mps.control import ANSWER_SECONDS, Control, MPSError
from device_plugin.mps.daemon import RECORD, Daemon, end
from device_plugin.mps.plan import Plan
from device_plugin.nvml import NVML, NVMLUnavailableError, PhysicalGPU

R = TypeVar("R")

log = structlog.get_logger(__name__)

_SHM = Path("/dev/shm")  # noqa: S108 - where MPS and its clients meet


class MPSKeeper:
    """Keep a daemon for each plan; *changed* is told from threads of ours when a problem comes or goes."""

    def __init__(
        self,
        settings: MPSSettings,
        nvml: NVML,
        *,
        look_seconds: float,
        changed: Callable[[], None],
        answer_seconds: float = ANSWER_SECONDS,
    ) -> None:
        self._answer_seconds = answer_seconds
        self._settings = settings
        self._nvml = nvml
        self._look_seconds = look_seconds
        self._changed = changed
        self._lock = threading.Lock()
        self._daemons: dict[str, Daemon] = {}
        self._gpus: Mapping[str, PhysicalGPU] = {}
        self._swept = False

    def keep(self, plans: Sequence[Plan], gpus: Mapping[str, PhysicalGPU]) -> None:
        """Have these daemons and no others; return at once, but for those that have to end first."""
        with self._lock:
            self._gpus = gpus
            wanted = {plan.name: plan for plan in plans}
            leaving = [name for name, daemon in self._daemons.items() if wanted.get(name) != daemon.plan]
            self._all(Daemon.stop, [self._daemons.pop(name) for name in leaving])
            if not self._swept:
                self._swept = True
                self._sweep(wanted)
            for name in wanted.keys() - self._daemons.keys():
                self._daemons[name] = self._new(wanted[name])
                self._daemons[name].start()

    def problem(self, name: str) -> str:
        """Say why the daemon called *name* serves nobody now; "" where it does."""
        daemon = self._daemons.get(name)
        return daemon.problem if daemon is not None else "its MPS control daemon is not there yet"

    def stop(self) -> None:
        """End all daemons; those of a nursery live on for the next plugin."""
        with self._lock:
            if self._settings.nursery:
                self._all(Daemon.leave, list(self._daemons.values()))
            else:
                self._all(Daemon.stop, list(self._daemons.values()))
            self._daemons.clear()

    def _new(self, plan: Plan) -> Daemon:
        return Daemon(
            plan,
            Path(self._settings.root) / plan.name,
            self._settings.control,
            gpus=self,
            changed=self._changed,
            look_seconds=self._look_seconds,
            answer_seconds=self._answer_seconds,
            nursery=self._settings.nursery,
        )

    @staticmethod
    def _all(do: Callable[[Daemon], None], daemons: Sequence[Daemon]) -> None:
        if daemons:
            with ThreadPoolExecutor(len(daemons)) as pool:
                list(pool.map(do, daemons))

    def _sweep(self, wanted: Mapping[str, Plan]) -> None:
        """End daemons of plugins before this one that are planned no more."""
        try:
            folders = [path.parent for path in Path(self._settings.root).glob(f"*/{RECORD}")]
        except OSError:
            return
        for folder in folders:
            record = process.read(folder / RECORD)
            if folder.name not in wanted and record is not None:
                log.info("mps.leftover_ended", daemon=folder.name)
                end(folder, Control(record.program, folder, record.uuids), None, self)

    # What daemons ask of the GPUs.

    def compute_modes(self, plan: Plan) -> Mapping[str, int]:
        """Give the compute modes of the plan's GPUs, once containers could meet their daemon; raise MPSError."""
        shm = Path(self._settings.shm_folder)
        shm.mkdir(parents=True, exist_ok=True)
        if shm != _SHM:
            shm.chmod(0o1777)
            if not shm.samefile(_SHM):
                raise MPSError(
                    f"this program has another {_SHM} than containers under MPS, which have {shm}: mount that, or set "
                    f"mps.shm to {_SHM} where this program runs in no container"
                )
        return {uuid: _asked(self._nvml.compute_mode, self._gpus[uuid].index) for uuid in plan.uuids}

    def close(self, plan: Plan) -> None:
        """Let nobody use the plan's GPUs but an MPS server; raise MPSError."""
        for uuid in plan.uuids:
            _asked(self._nvml.set_exclusive, self._gpus[uuid].index)

    def restore(self, modes: Mapping[str, int]) -> None:
        """Set compute modes, of GPUs that are still there; raise MPSError."""
        for uuid, mode in modes.items():
            if uuid in self._gpus:
                _asked(self._nvml.set_compute_mode, self._gpus[uuid].index, mode)


def _asked(function: Callable[..., R], *arguments: int) -> R:
    try:
        return function(*arguments)
    except NVMLUnavailableError as error:
        raise MPSError(str(error)) from error
