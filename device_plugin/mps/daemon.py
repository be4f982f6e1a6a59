"""Keeps one MPS control daemon running: starts it, watches it, starts it again, and ends it."""

import contextlib
import os
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol

import structlog

from device_plugin.mps import nursery, process
from device_plugin.mps.control import Control, MPSError, ServerState
from device_plugin.mps.plan import Plan
from device_plugin.mps.process import Identity, Process, Record
from device_plugin.threads import THREADS

log = structlog.get_logger(__name__)

_BACK_OFF_SECONDS = (0.5, 60.0)
# What a start may take, in times of an answer: 15 s with those of 5.
_START_ANSWERS = 3
_LOOK_SECONDS = 0.05
# So many looks without an answer, and it is taken for hung.
_SILENT_LOOKS = 3
_END_SECONDS = 1.0
# A real daemon writes some 270 bytes of log for each command, and has several at each look.
_LOG_BYTES = 4 << 20
# stat(2): whatever the file system's are
_BLOCK_BYTES = 512
_STARTING = "its MPS control daemon is being started"


class GPUs(Protocol):
    """Prepare GPUs for MPS, and give them back; every method raises MPSError."""

    def compute_modes(self, plan: Plan) -> Mapping[str, int]:
        """Give the compute modes of the plan's GPUs, by UUID."""

    def close(self, plan: Plan) -> None:
        """Let nobody use the plan's GPUs but an MPS server."""

    def restore(self, modes: Mapping[str, int]) -> None:
        """Set compute modes."""


class Daemon:
    """Keep the daemon of *plan* running in *folder* until stop().

    *gpus* are prepared for it, and given back. *changed* is told, from a thread of ours, when *problem* has changed.
    """

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        program: str,
        *,
        gpus: GPUs,
        changed: Callable[[], None],
        look_seconds: float,
        answer_seconds: float,
        nursery: str,
    ) -> None:
        """Take where a *nursery* listens that is to start it, "" for a child of this process."""
        self.plan = plan
        self._nursery = nursery
        self._folder = folder
        self._answer_seconds = answer_seconds
        self._configured = Control(program, folder, plan.uuids, answer_seconds)
        # of the daemon that runs, which another program may have started
        self._control = self._configured
        self._gpus = gpus
        self._changed = changed
        self._look_seconds = look_seconds
        self._process: Process | None = None
        # of that daemon, which it does not take along when it dies
        self._servers: frozenset[Identity] = frozenset()
        self._problem = _STARTING
        self._stopping = threading.Event()
        self._loop = THREADS.of(
            f"mps {plan.name}",
            self._run,
            # what it does next, or has done by now, is not known
            failed=lambda error: self._say(f"its MPS control daemon is not watched: {error!r}; it is tried again"),
        )

    @property
    def problem(self) -> str:
        """Say why the daemon serves nobody now; "" where it does."""
        return self._problem

    @property
    def pid(self) -> int:
        """Name its process; 0 where there is none yet."""
        return 0 if self._process is None else self._process.identity.pid

    def start(self) -> None:
        """Begin to keep it running; return at once."""
        self._loop.start()

    def stop(self) -> None:
        """End the daemon, its servers and their clients, and give the GPUs back their compute modes."""
        self._stopping.set()
        self._loop.join()
        end(self._folder, self._control, self._process, self._gpus)
        try:
            self._end_servers()
        except (MPSError, OSError) as error:
            log.warning("mps.server_left", daemon=self.plan.name, error=str(error))

    def leave(self) -> None:
        """Watch no more, and let it run on for whoever comes next."""
        self._stopping.set()
        self._loop.join()

    def _run(self) -> None:
        pause = _BACK_OFF_SECONDS[0]
        while not self._stopping.is_set():
            try:
                self._begin()
                self._say("")
                served = self._watch()
                # one that served for a while has earned a quick start
                pause = _BACK_OFF_SECONDS[0] if served else pause
            except (MPSError, OSError) as error:
                self._say(f"its MPS control daemon does not run: {error}")
            if self._stopping.wait(pause):
                return
            pause = min(2 * pause, _BACK_OFF_SECONDS[1])

    def _begin(self) -> None:
        """Have a daemon that answers: the one that is there, or a new one."""
        record = process.read(self._folder / RECORD)
        if self._take_over(record):
            log.info("mps.taken_over", daemon=self.plan.name, pid=self._process and self._process.identity.pid)
        else:
            self._launch(record)
        self._limit()

    def _take_over(self, record: Record | None) -> bool:
        if record is None or record.process is None:
            return False
        found = Process(record.process)
        if not found.alive:
            return False
        if record.uuids == self.plan.uuids:
            # where mps.control was edited, both programs may command it, or one of them may be no more
            for program in dict.fromkeys((self._configured.program, record.program)):
                control = Control(program, self._folder, record.uuids, self._answer_seconds)
                # on a busy node one answer may be late, and to end it ends its clients
                for _ in range(_SILENT_LOOKS):
                    try:
                        control.servers()
                    except MPSError as error:
                        log.warning("mps.leftover_silent", daemon=self.plan.name, error=str(error))
                    else:
                        self._process, self._control = found, control
                        return True
        _quit(Control(record.program, self._folder, record.uuids), found)
        return False

    def _launch(self, record: Record | None) -> None:
        if self._process is not None:
            self._process.kill()  # one that could not be written down
        self._end_servers()
        self._control = self._configured
        for folder in (self._control.pipe, self._control.log):
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o755)
        trim(self._control.log)  # also of one that never comes to be watched
        _empty(self._control.pipe)
        modes = dict(self._gpus.compute_modes(self.plan))
        if record is not None:
            # what they were before any of ours
            modes |= {uuid: mode for uuid, mode in record.compute_modes.items() if uuid in modes}
        kept = Record(program=self._control.program, uuids=self.plan.uuids, compute_modes=modes)
        # before anything is changed, so that whoever comes next can undo it
        process.write(self._folder / RECORD, kept)
        self._gpus.close(self.plan)
        if self._nursery:
            child, pid = None, nursery.ask(self._nursery, self._folder, self.plan.uuids)
        else:
            child = nursery.start(self._control)
            pid = child.pid
        self._process = Process(Identity(pid, 0), child)
        identity = process.identify(pid)
        if identity is None:
            code = f", with code {child.wait()}" if child is not None else ""
            raise MPSError(f"{self._control.program} ended at once{code}")
        self._process = Process(identity, child)
        process.write(self._folder / RECORD, Record(kept.program, kept.uuids, kept.compute_modes, identity))
        self._await_answer()
        log.info("mps.started", daemon=self.plan.name, pid=pid, gpus=",".join(self.plan.uuids))

    def _know_servers(self, pids: Iterable[int]) -> None:
        """Keep who the servers are, and who they were as long as they live, such as one that is about to end."""
        parent = self.pid
        # a pid that means another process here, as in another namespace, is no child of the daemon's
        found = {identity for pid in pids if (identity := process.identify(pid, parent=parent)) is not None}
        self._servers = frozenset(found | {one for one in self._servers if Process(one).alive})

    def _end_servers(self) -> None:
        """End the servers of a daemon that is gone: they hold its GPUs, and no other daemon's server gets in."""
        for identity in self._servers:
            server = Process(identity)
            if server.alive:
                log.warning("mps.server_ended", daemon=self.plan.name, pid=identity.pid)
                server.kill_alone()
            if server.alive:
                raise MPSError(
                    f"MPS server {identity.pid} of a daemon that is gone holds its GPUs, and does not end; if it "
                    "stays, reboot the node"
                )
        self._servers = frozenset()

    def _await_answer(self) -> None:
        until = time.monotonic() + _START_ANSWERS * self._answer_seconds
        while self._process is not None and self._process.alive and not self._stopping.is_set():
            try:
                self._control.servers()
            except MPSError as error:
                if time.monotonic() > until:
                    self._process.kill()
                    raise MPSError(f"it does not answer: {error}") from error
                self._stopping.wait(_LOOK_SECONDS)
            else:
                return
        raise MPSError(f"{self._control.program} ended at its start; {self._control.log} may say why")

    def _limit(self) -> None:
        """Set what holds clients that name no limits; it counts for servers that start from now on."""
        for n, limit in enumerate(self.plan.limits):
            self._control.limit_memory(n, limit.memory_mib)
        self._control.limit_threads(self.plan.threads)

    def _watch(self) -> int:
        """Look at the daemon until it has ended or hangs; say how often it was seen to serve."""
        served = silent = 0
        while self._process is not None and not self._stopping.wait(self._look_seconds):
            if not self._process.alive:
                self._say("its MPS control daemon has ended, and is being started again")
                return served
            try:
                servers = self._control.servers()
            except MPSError as error:
                silent += 1
                if silent >= _SILENT_LOOKS:
                    self._say(f"its MPS control daemon hangs, and is being started again: {error}")
                    self._process.kill()
                    return served
                continue
            silent = 0
            self._know_servers(servers)
            trim(self._control.log)
            faulty = [str(pid) for pid, state in servers.items() if state is ServerState.FAULT]
            served += not faulty
            self._say(
                f"MPS server {', '.join(faulty)} is in FAULT after an error of one of its clients; it takes new ones "
                "when all it has have ended"
                if faulty
                else ""
            )
        return served

    def _say(self, problem: str) -> None:
        if problem != self._problem:
            self._problem = problem
            if problem:
                log.warning("mps.problem", daemon=self.plan.name, why=problem)
            self._changed()


RECORD = "daemon.json"


def end(folder: Path, control: Control, running: Process | None, gpus: GPUs) -> None:
    """End what runs in *folder*, and put the GPUs' compute modes back; never raise."""
    try:
        record = process.read(folder / RECORD)
        if running is None and record is not None and record.process is not None:
            running = Process(record.process)
        if running is not None and running.alive:
            _quit(control, running)
        if record is not None:
            gpus.restore(record.compute_modes)
            (folder / RECORD).unlink(missing_ok=True)
    except (MPSError, OSError) as error:
        # the record stays, by which the next plugin does it
        log.warning("mps.not_ended", folder=str(folder), error=str(error))


def _empty(folder: Path) -> None:
    """Remove what is in a folder that containers may have mounted, so not the folder itself; raise MPSError.

    Where a container of root nested a thousand folders in it, shutil.rmtree before Python 3.13 ends at its recursion.
    """
    done = subprocess.run(["find", folder, "-mindepth", "1", "-delete"], capture_output=True, text=True, check=False)  # noqa: S603, S607
    if done.returncode:
        raise MPSError(f"{folder} cannot be emptied: {done.stderr.strip()[:200]}")


def trim(folder: Path) -> None:
    """Empty the log files in *folder* that have grown large, which is memory where it lies in /run; never raise."""
    with contextlib.suppress(OSError):  # the next look tries again
        for path in folder.iterdir():
            found = path.lstat()
            # Whoever has it open with O_APPEND goes on at its new end. Who has not goes on where he was: the file is as
            # long as before then, but sparse, so it goes by what it takes.
            if stat.S_ISREG(found.st_mode) and found.st_blocks * _BLOCK_BYTES > _LOG_BYTES:
                os.truncate(path, 0)


def _quit(control: Control, running: Process) -> None:
    try:
        control.quit()
    except MPSError as error:
        log.warning("mps.quit_failed", pid=running.identity.pid, error=str(error))
    if not running.ended(_END_SECONDS):
        running.kill()
