"""Keeps the node's MPS control daemons as they are planned, and clears away what earlier plugins left."""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import structlog

from cotenant.contract.configuration import MPSSettings
from cotenant.contract.units import MIB
from device_plugin.mps import process
from device_plugin.mps.control import ANSWER_SECONDS, Control, MPSError
from device_plugin.mps.daemon import RECORD, Daemon, end
from device_plugin.mps.plan import Limit, Plan
from device_plugin.nvml import NVML, NVMLUnavailableError, PhysicalGPU

R = TypeVar("R")

log = structlog.get_logger(__name__)

_SHM = Path("/dev/shm")  # noqa: S108 - where MPS and its clients meet


class MPSKeeper:
    """Keep a daemon for each plan; *changed* is told from threads of ours when a problem comes or goes.

    A daemon is never ended or changed while one of its GPUs is in use, for its end is that of its clients; *used* names
    the GPUs that pods hold, None where nobody can tell, so that any may be.
    """

    def __init__(
        self,
        settings: MPSSettings,
        nvml: NVML,
        *,
        look_seconds: float,
        changed: Callable[[], None],
        used: Callable[[], frozenset[str] | None],
        answer_seconds: float = ANSWER_SECONDS,
    ) -> None:
        self._answer_seconds = answer_seconds
        self._settings = settings
        self._nvml = nvml
        self._look_seconds = look_seconds
        self._changed = changed
        self._used = used
        self._lock = threading.Lock()
        self._daemons: dict[str, Daemon] = {}
        self._gpus: Mapping[str, PhysicalGPU] = {}
        self._first = True
        self._stopped = False
        # why a daemon that is wanted is not there, by its name
        self._waiting: Mapping[str, str] = {}
        # why GPUs may get no new pods: a daemon serves them that was planned otherwise
        self.unfit: dict[str, str] = {}

    def keep(self, plans: Sequence[Plan], gpus: Mapping[str, PhysicalGPU]) -> None:
        """Have these daemons and no others; return at once, but for those that have to end first."""
        with self._lock:
            if self._stopped:
                return  # a look that a GPU held up comes after the end, and nobody would end what it starts
            self._gpus = gpus
            wanted = {plan.name: plan for plan in plans}
            if self._first:
                if not self._took_in(wanted):
                    return  # a daemon that is started now might end one that pods use
                self._first = False
            unwanted = {name: one.plan for name, one in self._daemons.items() if wanted.get(name) != one.plan}
            stay = {name: unwanted[name] for name in self._in_use(unwanted)}
            self._all(Daemon.stop, [self._daemons.pop(name) for name in unwanted.keys() - stay.keys()])
            before = self._waiting, self.unfit
            self._waiting, self.unfit = self._waits(wanted, stay), self._left(wanted, stay)
            for name in wanted.keys() - self._daemons.keys() - self._waiting.keys():
                self._start(wanted[name])
        if before != (self._waiting, self.unfit):
            self._changed()

    def problem(self, name: str, uuid: str) -> str:
        """Say why the daemon called *name* does not serve a GPU now; "" where it does."""
        daemon = self._daemons.get(name)
        if daemon is None:
            return self._waiting.get(name, "its MPS control daemon is not there yet")
        if uuid not in daemon.plan.uuids:
            return "pods use its group's MPS control daemon, which is started anew with this GPU when they have ended"
        return daemon.problem

    @property
    def pids(self) -> frozenset[int]:
        """Name the processes of the daemons; their servers are their children."""
        return frozenset(daemon.pid for daemon in list(self._daemons.values()) if daemon.pid)

    @property
    def mortal(self) -> bool:
        """Tell whether there are daemons that end, with their clients, when this program does."""
        return bool(self.pids) and not self._settings.nursery

    def stop(self) -> None:
        """End all daemons, and start no more; those of a nursery live on for the next plugin."""
        with self._lock:
            self._stopped = True
            if self._settings.nursery:
                self._all(Daemon.leave, list(self._daemons.values()))
            else:
                self._all(Daemon.stop, list(self._daemons.values()))
            self._daemons.clear()

    def _start(self, plan: Plan) -> None:
        self._daemons[plan.name] = Daemon(
            plan,
            Path(self._settings.root) / plan.name,
            self._settings.control,
            gpus=self,
            changed=self._changed,
            look_seconds=self._look_seconds,
            answer_seconds=self._answer_seconds,
            nursery=self._settings.nursery,
        )
        self._daemons[plan.name].start()

    def _in_use(self, plans: Mapping[str, Plan]) -> set[str]:
        """Name the daemons whose GPUs pods hold, or may hold."""
        if not plans:
            return set()  # whoever is asked has the kubelet list all its pods
        used = self._used()
        return {name for name, plan in plans.items() if used is None or not used.isdisjoint(plan.uuids)}

    @staticmethod
    def _waits(wanted: Mapping[str, Plan], stay: Mapping[str, Plan]) -> dict[str, str]:
        """Say which daemons cannot be started, since one that has to stay serves their GPUs."""
        serving = {uuid: name for name, plan in stay.items() for uuid in plan.uuids}
        return {
            name: f"pods use the MPS control daemon {serving[uuid]}, which serves GPU {uuid}; when they have ended "
            "another one is started"
            for name, plan in wanted.items()
            for uuid in plan.uuids
            if serving.get(uuid, name) != name
        }

    @staticmethod
    def _left(wanted: Mapping[str, Plan], stay: Mapping[str, Plan]) -> dict[str, str]:
        """Name the GPUs of daemons that have to stay and that these are not planned for any more, with the reason."""
        return {
            uuid: f"pods use the MPS control daemon {name}, which serves it still; it changes when they have ended"
            for name, plan in stay.items()
            for uuid in plan.uuids
            if name not in wanted or uuid not in wanted[name].uuids
        }

    @staticmethod
    def _all(do: Callable[[Daemon], None], daemons: Sequence[Daemon]) -> None:
        if daemons:
            with ThreadPoolExecutor(len(daemons)) as pool:
                list(pool.map(do, daemons))

    def _took_in(self, wanted: Mapping[str, Plan]) -> bool:
        """Take in the daemons of plugins before this one; end those that are planned no more and that nobody uses.

        Tell whether that was possible: with no free file descriptor, say, nobody knows which there are.
        """
        try:
            folders = [path.parent for path in Path(self._settings.root).glob(f"*/{RECORD}")]
            records = {folder: record for folder in folders if (record := process.read(folder / RECORD)) is not None}
            alive = {folder.name for folder, record in records.items() if process.runs(record)}
        except OSError as error:
            log.warning("mps.leftovers_unknown", error=str(error))
            return False
        other = {
            folder.name: self._as_it_was(folder.name, record.uuids, wanted)
            for folder, record in records.items()
            if folder.name not in wanted or wanted[folder.name].uuids != record.uuids
        }
        kept = self._in_use({name: plan for name, plan in other.items() if name in alive})
        for folder, record in records.items():
            if folder.name in kept:
                log.info("mps.leftover_kept", daemon=folder.name, why="pods use it, or may; it is not as planned")
                self._start(other[folder.name])
            elif folder.name in other:
                # also of a group that is still planned: GPUs may have left it, which get their compute modes back
                log.info("mps.leftover_ended", daemon=folder.name)
                end(folder, Control(record.program, folder, record.uuids), None, self)
        return True

    def _as_it_was(self, name: str, uuids: tuple[str, ...], wanted: Mapping[str, Plan]) -> Plan:
        """Plan a daemon for the GPUs that it has, with the limits that these are to have now."""
        limits = {uuid: limit for plan in wanted.values() for uuid, limit in zip(plan.uuids, plan.limits, strict=True)}
        whole = {uuid: Limit(max(1, gpu.total_bytes // MIB)) for uuid, gpu in self._gpus.items()}
        return Plan(
            name=name,
            uuids=uuids,
            limits=tuple(limits.get(uuid) or whole.get(uuid) or Limit(1) for uuid in uuids),
            threads=wanted[name].threads if name in wanted else 100,
        )

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
        return {uuid: _asked(self._nvml.compute_mode, self._index(uuid)) for uuid in plan.uuids}

    def close(self, plan: Plan) -> None:
        """Let nobody use the plan's GPUs but an MPS server; raise MPSError."""
        for uuid in plan.uuids:
            _asked(self._nvml.set_exclusive, self._index(uuid))

    def restore(self, modes: Mapping[str, int]) -> None:
        """Set compute modes, of GPUs that are still there; raise MPSError where one could not be, after all others."""
        problems = []
        for uuid, mode in modes.items():
            if uuid in self._gpus:
                try:
                    _asked(self._nvml.set_compute_mode, self._gpus[uuid].index, mode)
                except MPSError as error:
                    problems.append(str(error))
        if problems:
            raise MPSError("; ".join(problems))

    def _index(self, uuid: str) -> int:
        gpu = self._gpus.get(uuid)
        if gpu is None:
            raise MPSError(f"GPU {uuid} is gone, without which it cannot be started; it ends when its pods have ended")
        return gpu.index


def _asked(function: Callable[..., R], *arguments: int) -> R:
    try:
        return function(*arguments)
    except NVMLUnavailableError as error:
        raise MPSError(str(error)) from error
