"""MPS control daemons: real child processes, NVIDIA's where there is one with a GPU, and the stand-in everywhere."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cotenant.contract.configuration import MPSSettings
from cotenant.contract.inventory import GPU, Family, Health, Mode
from cotenant.contract.units import GIB
from device_plugin.families.occupants import OccupiedError
from device_plugin.families.rules import Assigned
from device_plugin.inventory import Daemon, describe
from device_plugin.mps import nursery, process
from device_plugin.mps.control import Control, MPSError
from device_plugin.mps.daemon import RECORD, trim
from device_plugin.mps.keeper import MPSKeeper
from device_plugin.mps.nursery import Nursery
from device_plugin.mps.plan import Limit, Plan, max_clients, plans
from device_plugin.nvml import NVML, NVMLUnavailableError, PhysicalGPU
from tests.device_plugin.node import NAMES, NODE, SECONDS, Node, container_grant, uuid
from tests.exhaustion import no_file_beyond, no_more_files

FAKE = str(Path(sys.executable).parent / "cotenant-fake-mps-control")
REAL = "nvidia-cuda-mps-control"
DEFAULT, EXCLUSIVE = 0, 3
CUDA_ERROR_OUT_OF_MEMORY = 2
# More than a log may take.
LARGE = b"a line of a log that is long\n" * 200_000
# Allocates so many MiB by CUDA's driver API and exits with the CUresult.
CLIENT = """
import ctypes, sys
cuda = ctypes.CDLL("libcuda.so.1")
device, context, at = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_uint64()
for code in (
    cuda.cuInit(0),
    cuda.cuDeviceGet(ctypes.byref(device), 0),
    cuda.cuCtxCreate_v2(ctypes.byref(context), 0, device),
):
    if code:
        sys.exit(f"CUDA does not start: {code}")
sys.exit(cuda.cuMemAlloc_v2(ctypes.byref(at), ctypes.c_size_t(int(sys.argv[1]) << 20)))
"""


def until(condition: Callable[[], bool], what: str) -> None:
    waiting = threading.Event()
    for _ in range(int(SECONDS / 0.05)):
        if condition():
            return
        waiting.wait(0.05)
    raise TimeoutError(f"never happened: {what}")


class Ground:
    """A keeper of daemons, on made-up GPUs or on those that are there."""

    def __init__(self, program: str, folder: Path, nursery: str = "") -> None:
        self.program = program
        self.folder = folder
        if program == FAKE:
            (folder / "gpus.yaml").write_text(f"gpus: [{{model: Fake, memory: 80GiB, uuid: {uuid(0)}}}]")
            self.nvml = NVML.open(fake=folder / "gpus.yaml")
        else:
            self.nvml = NVML.open()
        self.settings = MPSSettings(control=program, root=str(folder / "mps"), shm="/dev/shm", nursery=nursery)
        # the GPUs that pods hold; None: nobody can tell
        self.used: frozenset[str] | None = frozenset()
        self.keeper = self.new_keeper()
        self.plan = Plan("one", (self.gpu.uuid,), (Limit(1024),), threads=50)

    def new_keeper(self, *, answer_seconds: float = SECONDS) -> MPSKeeper:
        return MPSKeeper(
            self.settings,
            self.nvml,
            look_seconds=0.05,
            answer_seconds=answer_seconds,
            changed=lambda: None,
            used=lambda: self.used,
        )

    @property
    def gpu(self) -> PhysicalGPU:
        return self.nvml.gpus()[0]

    def keep(self, *plans: Plan) -> None:
        self.keeper.keep(plans, {gpu.uuid: gpu for gpu in self.nvml.gpus()})

    def serving(self) -> None:
        self.keep(self.plan)
        until(lambda: not self.said(), "the daemon to serve")

    def said(self, name: str = "one", gpu: int = 0) -> str:
        """Say what is wrong with a GPU's daemon."""
        return self.keeper.problem(name, uuid(gpu) if self.program == FAKE else self.gpu.uuid)

    @property
    def control(self) -> Control:
        return Control(self.program, self.folder / "mps" / "one", self.plan.uuids)

    @property
    def record(self) -> process.Record:
        found = process.read(self.folder / "mps" / "one" / RECORD)
        assert found is not None
        return found

    @property
    def pid(self) -> int:
        found = self.record.process
        return found.pid if found is not None else 0

    @staticmethod
    def abandon(keeper: MPSKeeper) -> None:
        """Leave daemons behind as a plugin does that gets SIGKILL: nobody watches or ends them any more."""
        for daemon in keeper._daemons.values():
            daemon._stopping.set()
            daemon._loop.join()

    def problem(self, text: str) -> None:
        until(lambda: text in self.said(), f"{text!r}: {self.said()!r}")


@pytest.fixture(params=["stand-in", "real"])
def ground(request: pytest.FixtureRequest) -> Iterator[Ground]:
    program = FAKE
    if request.param == "real":
        try:
            NVML.open().close()
        except NVMLUnavailableError as error:
            pytest.skip(f"no GPU here: {error}")
        if shutil.which(REAL) is None or os.geteuid() != 0:
            pytest.skip(f"the real daemon needs {REAL} and root")
        program = REAL
    yield from grounds(program)


def grounds(program: str) -> Iterator[Ground]:
    # a socket's path has 107 characters at most
    folder = Path(tempfile.mkdtemp(prefix="mps-"))
    made = Ground(program, folder)
    yield made
    made.keeper.stop()
    made.nvml.close()
    shutil.rmtree(folder)


class TestDaemon:
    """One daemon's life. These run against NVIDIA's own daemon too where there is one."""

    def test_it_serves_its_gpu_alone_and_holds_clients_that_ask_for_nothing(self, ground: Ground) -> None:
        ground.serving()
        assert EXCLUSIVE == ground.gpu.compute_mode
        assert 50.0 == float(ground.control.command("get_default_active_thread_percentage"))
        assert "1" in ground.control.command("get_default_device_pinned_mem_limit 0")  # 1G or 1024M
        assert {} == ground.control.servers()

    def test_it_ends_with_the_plan_and_the_gpu_is_as_it_was(self, ground: Ground) -> None:
        before = ground.gpu.compute_mode
        ground.serving()
        pid = ground.pid
        ground.keep()
        assert process.identify(pid) is None
        assert before == ground.gpu.compute_mode
        assert process.read(ground.folder / "mps" / "one" / RECORD) is None
        with pytest.raises(MPSError):
            ground.control.servers()

    def test_one_that_is_killed_is_started_again(self, ground: Ground) -> None:
        ground.serving()
        pid = ground.pid
        os.kill(pid, signal.SIGKILL)
        until(lambda: ground.pid not in {0, pid} and not ground.said(), "another daemon")
        assert 50.0 == float(ground.control.command("get_default_active_thread_percentage"))

    def test_what_a_killed_plugin_left_is_taken_over(self, ground: Ground) -> None:
        ground.serving()
        pid = ground.pid
        # the keeper before is gone as by SIGKILL: nobody ended anything
        lost, ground.keeper = ground.keeper, ground.new_keeper()
        ground.abandon(lost)
        ground.serving()
        assert pid == ground.pid
        ground.keeper.stop()
        until(lambda: process.identify(pid) is None, "the end of the daemon")
        assert DEFAULT == ground.gpu.compute_mode

    def test_what_a_killed_plugin_left_for_other_gpus_is_ended(self, ground: Ground) -> None:
        ground.serving()
        lost, ground.keeper = ground.keeper, ground.new_keeper()
        ground.abandon(lost)
        ground.keep()
        assert process.read(ground.folder / "mps" / "one" / RECORD) is None
        assert DEFAULT == ground.gpu.compute_mode
        with pytest.raises(MPSError):
            ground.control.servers()

    def test_a_client_cannot_allocate_beyond_its_limit(self, ground: Ground) -> None:
        if ground.program == FAKE:
            pytest.skip("the stand-in has no GPU to allocate on")
        ground.serving()
        limited = {**ground.control.environment, "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": "0=512M"}
        # the context takes some of it too
        for mib, code in ((128, 0), (768, CUDA_ERROR_OUT_OF_MEMORY)):
            client = subprocess.run([sys.executable, "-c", CLIENT, str(mib)], env=limited, check=False)
            assert code == client.returncode
            assert len(ground.control.servers()) == 1

    def test_its_logs_are_emptied_when_they_are_large_and_it_goes_on(self, ground: Ground) -> None:
        ground.serving()
        pid, log = ground.pid, ground.control.log / "daemon.out"
        with log.open("ab") as output:
            output.write(LARGE)
        until(lambda: log.stat().st_size < len(LARGE), "an empty log")
        assert (pid, "") == (ground.pid, ground.said())


class TestLogs:
    """Log files take no more than some MiB of the node's memory, whoever has them open."""

    @pytest.mark.parametrize(
        ("mode", "before"), [("ab", b""), ("wb", bytes(len(LARGE)))], ids=["at its new end", "where he was, sparse"]
    )
    def test_who_writes_goes_on_in_an_emptied_file(self, tmp_path: Path, mode: str, before: bytes) -> None:
        path = tmp_path / "control.log"
        with path.open(mode, buffering=0) as output:
            output.write(LARGE)
            trim(tmp_path)
            assert 0 == path.stat().st_size
            output.write(b"a line")
            trim(tmp_path)  # a sparse file is long, and takes no room
            assert before + b"a line" == path.read_bytes()
        assert path.stat().st_blocks * 512 < len(LARGE)

    def test_small_files_and_what_is_no_log_stay(self, tmp_path: Path) -> None:
        logs, other = tmp_path / "log", tmp_path / "other"
        logs.mkdir()
        (logs / "small").write_bytes(b"a line")
        (logs / "folder").mkdir()
        other.write_bytes(LARGE)
        (logs / "link").symlink_to(other)
        trim(logs)
        trim(tmp_path / "missing")
        assert (b"a line", LARGE) == ((logs / "small").read_bytes(), other.read_bytes())


@pytest.fixture
def fake() -> Iterator[Ground]:
    yield from grounds(FAKE)


class TestAccidents:
    """What no test can make a real daemon do."""

    def test_the_daemon_is_told_its_gpus_and_folders(self, fake: Ground) -> None:
        fake.serving()
        said = fake.control.command("fake environment").splitlines()
        assert f"CUDA_VISIBLE_DEVICES={uuid(0)}" in said
        assert f"CUDA_MPS_PIPE_DIRECTORY={fake.folder}/mps/one/pipe" in said

    def test_a_fault_is_told_until_the_servers_clients_have_ended(self, fake: Ground) -> None:
        fake.serving()
        assert "connected" == fake.control.command("fake client 1000")
        fake.control.command("fake fault")
        fake.problem("is in FAULT after an error of one of its clients")
        pid = fake.pid
        fake.control.command("fake leave")
        fake.problem("")
        until(lambda: not fake.said(), "its recovery")
        assert pid == fake.pid  # the daemon was not at fault

    def test_one_that_hangs_is_killed_and_started_again(self, fake: Ground) -> None:
        fake.keeper = fake.new_keeper(answer_seconds=1.0)
        fake.serving()
        pid = fake.pid
        os.kill(pid, signal.SIGSTOP)
        until(lambda: fake.pid not in {0, pid} and not fake.said(), "another daemon")

    def test_whatever_a_container_of_root_left_among_its_pipes_another_is_started(self, fake: Ground) -> None:
        fake.serving()
        pid = fake.pid
        pipe = fake.control.pipe
        (pipe / "away").symlink_to(fake.folder)
        folder = os.open(pipe, os.O_RDONLY)
        for _ in range(2000):
            os.mkdir("deeper", dir_fd=folder)
            deeper = os.open("deeper", os.O_RDONLY, dir_fd=folder)
            os.close(folder)
            folder = deeper
        os.close(folder)
        os.kill(pid, signal.SIGKILL)
        until(lambda: fake.pid not in {0, pid} and not fake.said(), "another daemon")
        assert not {"away", "deeper"} & {path.name for path in pipe.iterdir()}
        assert (fake.folder / "gpus.yaml").exists()

    def test_servers_that_a_dead_daemon_left_are_ended_before_another_is_started(self, fake: Ground) -> None:
        server, pid = self.a_server_that_was_seen(fake), fake.pid
        os.kill(pid, signal.SIGKILL)
        until(lambda: fake.pid not in {0, pid} and not fake.said(), "another daemon")
        assert process.identify(server) is None
        assert {} == fake.control.servers()

    def test_servers_that_a_dead_daemon_left_are_ended_where_none_is_wanted_any_more(self, fake: Ground) -> None:
        server, pid = self.a_server_that_was_seen(fake), fake.pid
        os.kill(pid, signal.SIGKILL)
        fake.keep()
        assert process.identify(server) is None

    @staticmethod
    def a_server_that_was_seen(fake: Ground) -> int:
        fake.serving()
        assert "connected" == fake.control.command("fake client 1000")
        # that it is at fault is told by whoever has seen it
        fake.control.command("fake fault")
        fake.problem("is in FAULT")
        (server,) = fake.control.servers()
        return server

    def test_a_process_that_cannot_be_looked_at_has_not_ended(self) -> None:
        with no_more_files(), pytest.raises(OSError, match="Too many open files"):
            process.identify(os.getpid())
        with pytest.raises(OSError, match="Not a directory"):
            process.read(Path(os.devnull) / RECORD)

    def test_one_that_cannot_be_written_down_is_ended_before_another_is_started(self, fake: Ground) -> None:
        room = len(msgspec.json.encode(process.Record(FAKE, (uuid(0),), {uuid(0): DEFAULT})))
        with no_file_beyond(room):
            fake.keep(fake.plan)
            fake.problem("File too large")
        until(lambda: not fake.said(), "the daemon to serve")
        # and not the commands that are sent to it, which come and go
        found = subprocess.run(["pgrep", "-P", str(os.getpid()), "-f", f"{FAKE} -f"], capture_output=True, check=False)
        assert [fake.pid] == [int(pid) for pid in found.stdout.split()]

    def test_a_daemon_is_ended_also_where_its_record_cannot_be_removed(self, fake: Ground) -> None:
        fake.serving()
        pid, record = fake.pid, fake.folder / "mps" / "one" / RECORD
        if os.geteuid() != 0 or subprocess.run(["mount", "--bind", record, record], check=False).returncode:
            pytest.skip("a file that cannot be removed needs the right to mount one")
        try:
            fake.keep()
        finally:
            subprocess.run(["umount", record], check=True)
        assert process.identify(pid) is None

    def test_a_process_that_is_another_ones_child_is_no_server(self) -> None:
        with subprocess.Popen(["sleep", "600"]) as child:
            assert process.identify(child.pid) == process.identify(child.pid, parent=os.getpid())
            assert process.identify(child.pid, parent=child.pid) is None
            child.kill()

    def test_one_that_hangs_at_its_start_is_killed_and_another_is_started(self, fake: Ground) -> None:
        hangs, program = fake.folder / "hangs", fake.folder / "hanging-mps-control"
        program.write_text(f'#!/bin/sh\n[ -e {hangs} ] && exec sleep 600\nexec {FAKE} "$@"\n')
        program.chmod(0o755)
        fake.settings = msgspec.structs.replace(fake.settings, control=str(program))
        # each look at it takes as long as an answer may
        fake.keeper = fake.new_keeper(answer_seconds=1.0)
        hangs.touch()
        fake.keep(fake.plan)
        until(lambda: (fake.folder / "mps" / "one" / RECORD).exists() and fake.pid != 0, "the start")
        pid = fake.pid
        fake.problem("does not run: it does not answer: the MPS control daemon did not answer `get_server_list` in 1 s")
        assert process.identify(pid) is None
        hangs.unlink()
        until(lambda: fake.pid not in {0, pid} and not fake.said(), "another daemon")

    def test_one_that_cannot_start_says_why(self, fake: Ground) -> None:
        fake.program = str(fake.folder / "missing")
        fake.settings = msgspec.structs.replace(fake.settings, control=fake.program)
        fake.keeper = fake.new_keeper()
        fake.keep(fake.plan)
        fake.problem("does not run: [Errno 2] No such file or directory")

    def test_a_gpu_whose_compute_mode_may_not_be_set_says_so(self, fake: Ground) -> None:
        gpu = f"{{model: Fake, memory: 80GiB, uuid: {uuid(0)}, fail: {{nvmlDeviceSetComputeMode: 4}}}}"
        (fake.folder / "gpus.yaml").write_text(f"gpus: [{gpu}]")
        fake.keep(fake.plan)
        fake.problem("the compute mode of GPU 0 may be set by a privileged program alone")

    def test_a_look_that_comes_after_the_end_starts_no_daemon(self, fake: Ground) -> None:
        fake.serving()
        fake.keeper.stop()
        fake.keep(fake.plan)
        assert "its MPS control daemon is not there yet" == fake.said()
        assert DEFAULT == fake.gpu.compute_mode

    def test_where_containers_would_meet_another_shared_memory_nothing_is_started(self, fake: Ground) -> None:
        fake.settings = msgspec.structs.replace(fake.settings, shm="")
        fake.keeper = fake.new_keeper()
        fake.keep(fake.plan)
        fake.problem(f"which have {fake.folder}/mps/shm: mount that, or set mps.shm to /dev/shm")

    def test_clients_of_a_second_user_wait(self, fake: Ground) -> None:
        """So the extender gives a GPU pods of one user alone."""
        fake.serving()
        assert "connected" == fake.control.command("fake client 1000")
        assert "queued" == fake.control.command("fake client 2000")

    @pytest.mark.parametrize(
        ("refused", "sentence"),
        [
            ({"threads": 0}, "did not take `set_default_active_thread_percentage 0`: it says 'Invalid command"),
            ({"limits": (Limit(1), Limit(1))}, "did not take `set_default_device_pinned_mem_limit 1 1M`: it says"),
        ],
    )
    def test_a_gpu_is_not_served_while_the_daemon_does_not_take_its_limits(
        self, fake: Ground, refused: dict[str, Any], sentence: str
    ) -> None:
        fake.keep(msgspec.structs.replace(fake.plan, **refused))
        fake.problem(sentence)
        fake.serving()

    def test_a_limit_is_held_that_a_driver_shows_in_whole_gibibytes(self, fake: Ground) -> None:
        fake.plan = msgspec.structs.replace(fake.plan, limits=(Limit(1044),))
        fake.serving()
        assert "1G" == fake.control.command("get_default_device_pinned_mem_limit 0")

    def test_the_control_program_alone_finds_no_daemon(self, tmp_path: Path) -> None:
        done = subprocess.run(
            [FAKE], input=b"get_server_list\n", env={"CUDA_MPS_PIPE_DIRECTORY": str(tmp_path)}, capture_output=True,
            check=False,
        )  # fmt: skip
        assert (1, b"Cannot find MPS control daemon process\n") == (done.returncode, done.stderr)


@pytest.fixture
def nursed() -> Iterator[Ground]:
    """Daemons that are started by a nursery, which is not there yet."""
    folder = Path(tempfile.mkdtemp(prefix="mps-"))
    made = Ground(FAKE, folder, nursery=str(folder / "mps" / "nursery.sock"))
    yield made
    made.keep()
    made.keeper.stop()
    made.nvml.close()
    shutil.rmtree(folder)


@contextlib.contextmanager
def nursery_of(ground: Ground) -> Iterator[None]:
    """Run a nursery until the end of the block."""
    running = Nursery(Path(ground.settings.nursery), FAKE)
    thread = threading.Thread(target=running.run)
    thread.start()
    try:
        yield
    finally:
        running.stop()
        thread.join()


@pytest.fixture
def late(fake: Ground) -> Path:
    """A control program that fails as often as a file says, and answers then; the daemons are its own."""
    silent = fake.folder / "silent"
    program = fake.folder / "late-mps-control"
    program.write_text(
        f"""#!/bin/sh
left=$(cat {silent} 2>/dev/null || echo 0)
if [ "$left" -gt 0 ]; then echo $((left - 1)) > {silent}; exit 1; fi
exec {FAKE} "$@"
"""
    )
    program.chmod(0o755)
    fake.program = str(program)
    fake.settings = msgspec.structs.replace(fake.settings, control=fake.program)
    fake.keeper = fake.new_keeper()
    return silent


class TestTakeOver:
    """What a killed plugin left is asked three times before it is ended, since with it end its clients."""

    @pytest.mark.parametrize(("silent", "kept"), [(1, True), (2, True), (3, False)])
    def test_a_daemon_that_answers_the_third_time_is_kept_and_one_that_does_not_is_replaced(
        self, fake: Ground, late: Path, silent: int, *, kept: bool
    ) -> None:
        fake.serving()
        pid = fake.pid
        assert "connected" == fake.control.command("fake client 1000")
        lost, fake.keeper = fake.keeper, fake.new_keeper()
        fake.abandon(lost)
        late.write_text(str(silent))

        fake.serving()

        assert "0" == late.read_text().strip()
        assert kept == (pid == fake.pid)
        assert kept == (process.identify(pid) is not None)
        # clients end with their daemon, and not without it
        assert int(kept) == len(fake.control.servers())

    @pytest.mark.parametrize("there", [True, False], ids=["another program", "one that is not there"])
    def test_an_edit_of_the_control_program_ends_no_daemon(self, fake: Ground, *, there: bool) -> None:
        fake.serving()
        pid = fake.pid
        lost, fake.keeper = fake.keeper, fake.new_keeper()
        fake.abandon(lost)
        program = fake.folder / "edited"
        if there:
            program.symlink_to(FAKE)
        fake.settings = msgspec.structs.replace(fake.settings, control=str(program))
        fake.keeper = fake.new_keeper()

        fake.serving()
        assert pid == fake.pid
        assert process.identify(pid) is not None


class TestNursery:
    """Daemons outlive the plugin that asked for them, and are ended by the one that does not want them."""

    def test_an_update_of_the_plugin_ends_no_daemon(self, nursed: Ground) -> None:
        with nursery_of(nursed):
            nursed.serving()
            pid = nursed.pid
            nursed.control.command("fake client 1000")
            nursed.keeper.stop()
            nursed.keeper = nursed.new_keeper()
            nursed.serving()
            assert pid == nursed.pid
            assert 1 == len(nursed.control.servers())
            # limits of the plan are set again, whoever it was before
            assert 50.0 == float(nursed.control.command("get_default_active_thread_percentage"))
            nursed.keep()
            until(lambda: process.identify(pid) is None, "the end of the daemon, which nobody plans any more")
            assert DEFAULT == nursed.gpu.compute_mode

    def test_one_that_ends_is_started_again_by_the_nursery(self, nursed: Ground) -> None:
        with nursery_of(nursed):
            nursed.serving()
            pid = nursed.pid
            os.kill(pid, signal.SIGKILL)
            until(lambda: nursed.pid not in {0, pid} and not nursed.said(), "another daemon")

    def test_without_the_nursery_the_gpu_says_so_until_it_is_there(self, nursed: Ground) -> None:
        nursed.keep(nursed.plan)
        nursed.problem("the nursery of MPS daemons at")
        with nursery_of(nursed):
            until(lambda: not nursed.said(), "the daemon to serve")
            pid = nursed.pid
        until(lambda: process.identify(pid) is None, "the daemon to end with its nursery")

    def test_a_daemon_that_a_killed_plugin_had_not_written_down_yet_is_replaced(self, nursed: Ground) -> None:
        with nursery_of(nursed):
            nursed.serving()
            pid = nursed.pid
            lost, nursed.keeper = nursed.keeper, nursed.new_keeper()
            nursed.abandon(lost)
            before = nursed.record
            process.write(
                nursed.folder / "mps" / "one" / RECORD,
                process.Record(before.program, before.uuids, before.compute_modes),
            )
            nursed.serving()
            assert pid != nursed.pid
            assert process.identify(pid) is None
            assert DEFAULT == nursed.record.compute_modes[uuid(0)]

    def test_a_nursery_that_cannot_accept_for_a_while_ends_no_daemon_and_starts_others_after_it(
        self, nursed: Ground
    ) -> None:
        program = [
            str(Path(FAKE).with_name("cotenant-mps-nursery")),
            "--socket",
            nursed.settings.nursery,
            "--control",
            FAKE,
        ]
        with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
            assert running.stdout is not None
            assert running.stderr is not None
            assert "ready" in running.stdout.readline()
            nursed.serving()
            pid = nursed.pid
            assert "nursery.started" in running.stderr.readline()
            with no_more_files(running.pid), socket.socket(socket.AF_UNIX) as asking:
                asking.connect(nursed.settings.nursery)
                assert "nursery.not_accepted" in running.stderr.readline()
            assert process.identify(pid) is not None
            os.kill(pid, signal.SIGKILL)
            until(lambda: nursed.pid not in {0, pid} and not nursed.said(), "another daemon")
            running.terminate()

    def test_nothing_is_started_for_folders_of_others(self, nursed: Ground, tmp_path: Path) -> None:
        with nursery_of(nursed), pytest.raises(MPSError, match="is no daemon's folder in"):
            nursery.ask(nursed.settings.nursery, tmp_path, (uuid(0),))
        with pytest.raises(ValueError, match="nursery: expected a path right in /run/cotenant/mps, got '/tmp/x'"):
            MPSSettings(nursery="/tmp/x")


@pytest.fixture
def pair() -> Iterator[Ground]:
    """Two GPUs, of which the first has a daemon that serves, of a plugin that is about to be gone."""
    folder = Path(tempfile.mkdtemp(prefix="mps-"))
    made = Ground(FAKE, folder)
    gpus = ", ".join(f"{{model: Fake, memory: 80GiB, uuid: {uuid(n)}}}" for n in (0, 1))
    (folder / "gpus.yaml").write_text(f"gpus: [{gpus}]")
    made.plan = Plan("group-one", (uuid(0),), (Limit(1024),), threads=50)
    made.keep(made.plan)
    until(lambda: not made.said("group-one"), "the daemon to serve")
    yield made
    made.keeper.stop()
    made.nvml.close()
    shutil.rmtree(folder)


class TestInUse:
    """The end of a daemon is the end of its clients, so one whose GPUs are in use stays, whatever is planned."""

    BOTH = Plan("group-one", (uuid(0), uuid(1)), (Limit(1024), Limit(1024)), threads=50)

    @staticmethod
    def pid(ground: Ground, name: str = "group-one") -> int:
        found = process.read(ground.folder / "mps" / name / RECORD)
        return found.process.pid if found is not None and found.process is not None else 0

    @pytest.mark.parametrize("used", [frozenset({uuid(0)}), None], ids=["held", "nobody can tell"])
    @pytest.mark.parametrize("restarted", [False, True])
    def test_a_gpu_joins_a_group_when_the_groups_pods_have_ended(
        self, pair: Ground, used: frozenset[str] | None, *, restarted: bool
    ) -> None:
        pid = self.pid(pair)
        pair.used = used
        if restarted:
            lost, pair.keeper = pair.keeper, pair.new_keeper()
            pair.abandon(lost)

        pair.keep(self.BOTH)
        until(lambda: not pair.said("group-one"), "the first GPU to be served")
        assert pid == self.pid(pair)
        assert "started anew with this GPU when they have ended" in pair.said("group-one", 1)

        pair.used = frozenset()
        pair.keep(self.BOTH)
        until(lambda: not pair.said("group-one", 1), "the second GPU to be served")
        assert pid != self.pid(pair)
        assert process.identify(pid) is None

    def test_a_daemon_of_which_nothing_could_be_read_for_a_while_is_not_ended(self, pair: Ground) -> None:
        pid, gpus = self.pid(pair), {gpu.uuid: gpu for gpu in pair.nvml.gpus()}
        pair.used = frozenset({uuid(0)})
        lost, pair.keeper = pair.keeper, pair.new_keeper()
        pair.abandon(lost)
        with no_more_files():
            pair.keeper.keep([self.BOTH], gpus)
            assert "its MPS control daemon is not there yet" == pair.said("group-one")

        pair.keep(self.BOTH)
        until(lambda: not pair.said("group-one"), "the first GPU to be served")
        assert pid == self.pid(pair)

    @pytest.mark.parametrize("restarted", [False, True])
    def test_a_gpu_leaves_a_group_when_its_pods_have_ended(self, pair: Ground, *, restarted: bool) -> None:
        pid = self.pid(pair)
        pair.used = frozenset({uuid(0)})
        if restarted:
            lost, pair.keeper = pair.keeper, pair.new_keeper()
            pair.abandon(lost)
        alone = Plan("alone", (uuid(0),), (Limit(2048),))

        pair.keep(alone)
        assert pid == self.pid(pair)
        expected = f"pods use the MPS control daemon group-one, which serves GPU {uuid(0)}"
        assert expected in pair.said("alone")
        assert {uuid(0)} == pair.keeper.unfit.keys()

        pair.used = frozenset()
        pair.keep(alone)
        until(lambda: not pair.said("alone"), "a daemon of its own")
        assert {} == pair.keeper.unfit
        assert process.identify(pid) is None

    def test_a_gpu_that_leaves_mps_is_nobodys_before_its_pods_have_ended(self, pair: Ground) -> None:
        lost, pair.keeper = pair.keeper, pair.new_keeper()
        pair.abandon(lost)
        pair.used = None
        pair.keep()
        # whoever gave it to pods in turns would give their memory twice
        (sentence,) = pair.keeper.unfit.values()
        assert sentence.startswith("pods use the MPS control daemon group-one, which serves it still")
        (found, _) = describe(
            pair.nvml.gpus(),
            dict.fromkeys(map(uuid, (0, 1)), Assigned()),
            unit_bytes=GIB,
            reserve_per_gpu=0,
            daemon=lambda *_: Daemon("", 0, ""),
            unfit=pair.keeper.unfit,
        )
        assert (Health.UNHEALTHY, sentence) == (found.health, found.detail)

        pair.used = frozenset()
        pair.keep()
        assert {} == pair.keeper.unfit
        assert DEFAULT == pair.gpu.compute_mode

    def test_a_gpu_that_left_a_group_whose_daemon_had_died_gets_its_compute_mode_back(self, pair: Ground) -> None:
        pair.keep(self.BOTH)
        until(lambda: not pair.said("group-one", 1), "both GPUs to be served")
        pid = self.pid(pair)
        lost, pair.keeper = pair.keeper, pair.new_keeper()
        pair.abandon(lost)
        os.killpg(pid, signal.SIGKILL)
        until(lambda: process.identify(pid) is None, "the end of the daemon with its plugin")

        pair.keep(pair.plan)
        until(lambda: not pair.said("group-one"), "the first GPU to be served")
        assert [EXCLUSIVE, DEFAULT] == [gpu.compute_mode for gpu in pair.nvml.gpus()]

    def test_a_gpu_gets_its_compute_mode_back_though_another_of_its_group_is_lost(self, pair: Ground) -> None:
        pair.keep(self.BOTH)
        until(lambda: not pair.said("group-one", 1), "both GPUs to be served")
        lost = f"{{model: Fake, memory: 80GiB, uuid: {uuid(0)}, lost: true}}"
        (pair.folder / "gpus.yaml").write_text(f"gpus: [{lost}, {{model: Fake, memory: 80GiB, uuid: {uuid(1)}}}]")
        pair.keep()
        assert DEFAULT == pair.nvml.gpus()[1].compute_mode

    def test_a_daemon_whose_gpu_is_gone_says_so_when_it_is_to_be_started_again(self, pair: Ground) -> None:
        pair.used = None
        lost, pair.keeper = pair.keeper, pair.new_keeper()
        pair.abandon(lost)
        pid = self.pid(pair)
        (pair.folder / "gpus.yaml").write_text(f"gpus: [{{model: Fake, memory: 80GiB, uuid: {uuid(1)}}}]")
        pair.keep()
        os.killpg(pid, signal.SIGKILL)
        until(lambda: f"GPU {uuid(0)} is gone" in pair.said("group-one"), "the sentence")

    def test_one_that_was_kept_holds_clients_to_what_its_gpus_are_to_have_now(self, pair: Ground) -> None:
        pair.used = frozenset({uuid(0)})
        lost, pair.keeper = pair.keeper, pair.new_keeper()
        pair.abandon(lost)
        pair.keep(msgspec.structs.replace(self.BOTH, limits=(Limit(4096), Limit(4096)), threads=30))
        until(lambda: not pair.said("group-one"), "the first GPU to be served")
        control = Control(FAKE, pair.folder / "mps" / "group-one", [uuid(0)])
        assert 30.0 == float(control.command("get_default_active_thread_percentage"))
        assert "4" in control.command("get_default_device_pinned_mem_limit 0")

    def test_whoever_looks_at_processes_is_told_the_daemons(self, pair: Ground) -> None:
        assert {self.pid(pair)} == pair.keeper.pids


def gpu(index: int, **fields: Any) -> GPU:
    defaults = {"model": "A", "total_bytes": 80 * GIB, "usable_bytes": 80 * GIB, "mode": Mode.MPS}
    return GPU(uuid=uuid(index), index=index, **{**defaults, **fields})


class TestPlans:
    """A daemon for each GPU, or for each group of them."""

    def test_each_gpu_has_a_daemon_of_its_own_and_its_whole_memory_for_limit(self) -> None:
        found = plans([gpu(0), gpu(1), gpu(2, mode=Mode.TIME_SLICING)], dict.fromkeys(map(uuid, range(3)), Assigned()))
        # 80 GiB are 81,920 MiB: what holds a pod to less is its grant
        assert [Plan(uuid(n), (uuid(n),), (Limit(81_920),)) for n in (0, 1)] == list(found)

    def test_a_group_has_one_daemon(self) -> None:
        how = Assigned(mode=Mode.MPS, group="pair")
        (found,) = plans([gpu(0), gpu(1)], {uuid(0): how, uuid(1): how})
        assert Plan("group-pair", (uuid(0), uuid(1)), (Limit(81_920), Limit(81_920))) == found

    def test_shares_without_grants_get_equal_parts(self) -> None:
        how = Assigned(Family.REPLICAS, Mode.MPS, resource="nvidia.com/gpu", replicas=3)
        (found,) = plans([gpu(0, family=Family.REPLICAS)], {uuid(0): how})
        # 81,920 / 3 = 27,306.67 MiB, and 100 / 3 = 33.3 %
        assert ((Limit(27_306),), 33) == (found.limits, found.threads)

    @pytest.mark.parametrize(
        ("expected", "capability", "cuda"),
        [(48, (9, 0), 13_000), (60, (9, 0), 13_010), (48, (7, 0), None), (16, (6, 1), 13_010)],
    )
    def test_how_many_clients_a_gpu_serves_goes_by_its_age_and_the_drivers(
        self, expected: int, capability: tuple[int, int], cuda: int | None
    ) -> None:
        of = PhysicalGPU(uuid="u", index=0, model="A", total_bytes=1, reserved_bytes=0, compute_capability=capability)
        assert expected == max_clients(of, cuda)


class TestOnANode:
    """From the daemon to the container."""

    def config(self, root: Path, more: str = "") -> str:
        rule = f"{{indices: [0], mode: mps{more}}}"
        return f"gpus: [{rule}]\nmps: {{control: {FAKE}, root: {root}, shm: /dev/shm}}"

    @pytest.fixture
    def root(self) -> Iterator[Path]:
        folder = Path(tempfile.mkdtemp(prefix="mps-"))
        yield folder
        shutil.rmtree(folder)

    def healthy(self, node: Node) -> None:
        node.wait_published("served", lambda i: [g.health for g in i.gpus] == [Health.HEALTHY] * 2)
        node.kubelet.wait(lambda: node.kubelet.allocatable(NAMES.gpu_mem) == 32, "the units of both")

    def modes(self, node: Node) -> list[int | None]:
        """Give the GPUs' compute modes."""
        return [gpu.compute_mode for gpu in NVML.open(fake=node.gpu_file).gpus()]

    def test_a_gpu_is_offered_when_its_daemon_serves_and_the_container_finds_it(self, root: Path) -> None:
        with Node(["16GiB"] * 2, config=self.config(root)) as node:
            self.healthy(node)
            found = node.published()
            assert found is not None
            pipe = f"{root}/{uuid(0)}/pipe"
            assert ("mps", 48, pipe) == (str(found.gpus[0].mode), found.gpus[0].max_clients, found.gpus[0].mps_pipe)
            grant = msgspec.structs.replace(
                container_grant(gpus=[0], units=4), mode=Mode.MPS, mps_pipe=pipe, threads=30
            )
            pod = node.add_pod("p", grant)
            node.running(pod)
            started = node.kubelet.started(pod, "main")
            assert started is not None
            assert pipe == started.env["CUDA_MPS_PIPE_DIRECTORY"]
            assert "0=4096M" == started.env["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"]
            assert "30" == started.env["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"]
            (answer,) = node.kubelet.devices.responses(pod, "main")
            mounts = [(mount.host_path, mount.container_path) for mount in answer.mounts]
            assert [(pipe, pipe), ("/dev/shm", "/dev/shm")] == mounts

    def test_a_gpu_that_is_more_shares_than_mps_has_clients_is_none_until_there_are_fewer(self, root: Path) -> None:
        too_many = self.config(root, ", family: replicas, replicas: 49")
        with Node(["16GiB"] * 2, config=too_many) as node:
            expected = "it is 49 shares, and MPS serves 48 clients on it: have 48 replicas at most"
            found = node.wait_published("told of", lambda i: i.gpus[0].detail == expected)
            assert Health.UNHEALTHY is found.gpus[0].health
            node.kubelet.wait(lambda: node.kubelet.devices.capacity()[0].get("nvidia.com/gpu") == 49, "the shares")
            assert 0 == node.kubelet.allocatable("nvidia.com/gpu")

            node.edit(f"inventoryInterval: 0.05\n{too_many.replace('49', '48')}")
            node.kubelet.wait(lambda: node.kubelet.allocatable("nvidia.com/gpu") == 48, "one share for each client")

    def test_a_plugin_that_refuses_to_start_has_closed_no_gpu_to_the_pods_of_another(self, root: Path) -> None:
        config = self.config(root).replace("mps}]", "mps}, {indices: [1], family: replicas}]")
        with Node(["16GiB"] * 2, config=config, plugin=False) as node:
            path = node.folder / "kubelet" / "device-plugins" / "nvidia-gpu.sock"
            with socket.socket(socket.AF_UNIX) as theirs:
                theirs.bind(str(path))
                theirs.listen()
                with pytest.raises(OccupiedError, match=r"another device plugin serves nvidia\.com/gpu"):
                    node.start_plugin()
            node.plugin = None  # it has not begun
            assert not list(root.iterdir()), "no daemon was begun"
            assert [DEFAULT] * 2 == self.modes(node)

    def test_a_new_start_under_mps_leaves_a_gpu_open_that_pods_hold_in_turns(self, root: Path) -> None:
        with Node(["16GiB"] * 2) as node:
            pod = node.add_pod("p", container_grant(gpus=[0], units=8))
            node.running(pod)
            node.stop_plugin()
            node.configure(self.config(root).replace("[0]", "[0, 1]"))
            node.start_plugin()

            self.healthy(node)
            found = node.published()
            assert found is not None
            assert ["time-slicing", "mps"] == [str(gpu.mode) for gpu in found.gpus]
            assert [DEFAULT, EXCLUSIVE] == self.modes(node)
            told = f"GPU {uuid(0)} stays in family memory, mode time-slicing, until its pods have ended"
            assert node.api.wait_until(lambda: any(told in event["note"] for event in node.api.events()))

            node.kubelet.finish(pod)
            node.wait_published("under MPS", lambda i: [str(gpu.mode) for gpu in i.gpus] == ["mps", "mps"])
            self.healthy(node)
            assert [EXCLUSIVE] * 2 == self.modes(node)

    def test_a_fault_takes_the_gpu_out_of_use_until_it_is_over_and_no_other(self, root: Path) -> None:
        with Node(["16GiB"] * 2, config=self.config(root)) as node:
            self.healthy(node)
            control = Control(FAKE, root / uuid(0), [uuid(0)])
            control.command("fake client 0")
            control.command("fake fault")
            node.wait_published("at fault", lambda i: [g.health for g in i.gpus] == [Health.UNHEALTHY, Health.HEALTHY])
            node.kubelet.wait(lambda: node.kubelet.allocatable(NAMES.gpu_mem) == 16, "one GPU's units")
            control.command("fake leave")
            self.healthy(node)

    def test_a_grant_for_time_slicing_is_refused_on_a_gpu_under_mps(self, root: Path) -> None:
        with Node(["16GiB"] * 2, config=self.config(root)) as node:
            self.healthy(node)
            pod = node.add_pod("p", container_grant(gpus=[0], units=4))
            node.settled(pod)
            assert "Failed" == node.kubelet.phase(pod)
            assert "is shared in another way than it was granted for" in node.kubelet.message(pod)

    def test_stopping_the_plugin_ends_the_daemon_and_gives_the_gpu_back(self, root: Path) -> None:
        with Node(["16GiB"] * 2, config=self.config(root)) as node:
            self.healthy(node)
            record = process.read(root / uuid(0) / RECORD)
            assert record is not None and record.process is not None  # noqa: PT018
            node.stop_plugin()
            assert process.identify(record.process.pid) is None
            assert DEFAULT == NVML.open(fake=node.gpu_file).gpus()[0].compute_mode

    def test_shares_that_another_rule_gave_away_keep_gpu_and_daemon_of_a_nursery(self, root: Path) -> None:
        listens = root / "nursery.sock"
        running = Nursery(listens, FAKE)
        thread = threading.Thread(target=running.run)
        thread.start()
        mps = f"mps: {{control: {FAKE}, root: {root}, shm: /dev/shm, nursery: {listens}}}"
        shares = "{indices: [0], family: replicas, mode: mps, resource: nvidia.com/gpu, replicas: 2}"
        try:
            with Node(["16GiB"] * 2, config=f"gpus: [{shares}]\n{mps}") as node:
                node.kubelet.wait(lambda: node.kubelet.allocatable("nvidia.com/gpu") == 2, "the shares")
                limits = {"resources": {"limits": {"nvidia.com/gpu": "1"}}}
                spec = {"nodeName": NODE, "containers": [{"name": "main", **limits}]}
                pod = node.add_pod("p", annotations={}, spec=spec)
                node.running(pod)
                record = process.read(root / uuid(0) / RECORD)
                assert record is not None and record.process is not None  # noqa: PT018

                node.stop_plugin()
                node.configure(mps)
                node.start_plugin()
                # edits are taken one after the other, each once it is known who holds what, and daemons kept after each
                for family in ("replicas", "memory"):
                    node.edit(f"inventoryInterval: 0.05\n{mps}\ngpus: [{{indices: [1], family: {family}}}]")
                    node.wait_published(family, lambda i, family=family: str(i.gpus[1].family) == family)
                assert process.runs(record)
                found = node.published()
                assert found is not None
                assert ("replicas", "mps") == (str(found.gpus[0].family), str(found.gpus[0].mode))
                # how many there were is not known, so there are no more
                node.kubelet.wait(lambda: node.kubelet.allocatable("nvidia.com/gpu") == 0, "no shares")
                node.kubelet.finish(pod)
                node.wait_published("by memory", lambda i: str(i.gpus[0].family) == "memory")
                until(lambda: not process.runs(record), "its daemon to end")
        finally:
            running.stop()
            thread.join()

    def test_a_gpu_that_mps_left_closed_is_not_shared_in_turns(self) -> None:
        with Node(["16GiB"] * 2) as node:
            node.write_gpus([{"computeMode": EXCLUSIVE}, {}])
            found = node.wait_published("closed", lambda i: i.gpus[0].health is Health.UNHEALTHY)
            assert "its compute mode is EXCLUSIVE_PROCESS" in found.gpus[0].detail
