"""Health, events and processes through the real pynvml, with a made-up library behind it."""

import threading
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from cotenant.contract.configuration import ConfigurationError
from device_plugin.nvml import NVML, GPUEvent, GPUProcess, Recovery, Vitals
from device_plugin.nvml.events import EventsError
from device_plugin.nvml.fake import FakeLibrary

GIB = 1 << 30


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "gpus.yaml"


def write(file: Path, *gpus: str) -> None:
    listed = ", ".join(f"{{model: A, memory: 80GiB, uuid: GPU-{n}, {gpu}}}" for n, gpu in enumerate(gpus))
    new = file.with_suffix(".new")
    new.write_text(f"gpus: [{listed}]")
    new.rename(file)


def test_vitals_are_read_and_what_a_gpu_does_not_tell_is_unknown(file: Path) -> None:
    write(file, "uncorrectedEcc: 3, rowRemapPending: true, recoveryAction: drain-and-reset", "")
    told, silent = NVML.open(fake=file).gpus()
    expected = Vitals(
        used_bytes=0,
        uncorrected_ecc=3,
        remap_pending=True,
        remap_failed=False,
        recovery=Recovery.DRAIN_AND_RESET,
        licensed=None,
    )
    assert expected == told.vitals
    assert Vitals(used_bytes=0) == silent.vitals
    assert "" == silent.fault


def test_a_driver_that_fails_to_say_how_a_gpu_is_makes_it_no_worse(file: Path) -> None:
    fail = "{nvmlDeviceGetTotalEccErrors: 999, nvmlDeviceGetRemappedRows: 999, nvmlDeviceGetFieldValues: 999}"
    write(file, f"fail: {fail}", "fail: {nvmlDeviceGetRemappedRows: 15}")
    (silent,) = NVML.open(fake=file).gpus()  # the other one is lost, and not told of before it says who it is
    assert ("", Vitals(used_bytes=0)) == (silent.fault, silent.vitals)


@pytest.mark.parametrize(("virtualization", "licensed"), [(2, False), (0, None)])
def test_the_licence_is_read_of_vgpu_guests_alone(file: Path, virtualization: int, licensed: object) -> None:
    write(file, f"licensed: false, virtualization: {virtualization}")
    (gpu,) = NVML.open(fake=file).gpus()
    assert (virtualization == 2, licensed) == (gpu.guest, gpu.vitals.licensed)


def test_xids_happen_once_each_as_the_file_grows_and_name_gpu_and_instance(file: Path) -> None:
    write(file, "xids: [31]", "")
    nvml = NVML.open(fake=file)
    events = nvml.events()
    assert events is not None
    assert events.wait(0) is None  # of a GPU that nobody follows
    for gpu in nvml.gpus():
        events.follow(gpu.index, gpu.uuid)
    assert GPUEvent("GPU-0", 31) == events.wait(0)
    assert events.wait(0) is None
    write(file, "xids: [31]", "xids: [{xid: 94, gpuInstance: 5, computeInstance: 0}, 79]")
    assert [GPUEvent("GPU-1", 94, 5, 0), GPUEvent("GPU-1", 79), None] == [events.wait(0) for _ in range(3)]
    events.close()


def test_an_event_is_heard_while_somebody_waits(file: Path) -> None:
    write(file, "")
    nvml = NVML.open(fake=file)
    events = nvml.events()
    assert events is not None
    events.follow(0, "GPU-0")
    heard: list[GPUEvent | None] = []
    waiting = threading.Thread(target=lambda: heard.append(events.wait(20_000)))
    waiting.start()
    nvml.gpus()  # is not held up by it
    write(file, "xids: [48]")
    waiting.join()
    assert [GPUEvent("GPU-0", 48)] == heard


class Creating(FakeLibrary):
    """A driver that answers so where a set of events is to be made."""

    answer = 0

    def _nvmlEventSetCreate(self, event_set: object) -> int:  # noqa: N802 - NVML's name
        return super()._nvmlEventSetCreate(event_set) or self.answer


def test_a_driver_that_knows_no_events_is_told_from_one_that_fails_to_make_a_set_for_now(file: Path) -> None:
    write(file, "")
    library = Creating(file)
    nvml = NVML(library, library.device_path)

    for library.answer in (3, 4, 13):  # not supported, no permission, function not found
        assert nvml.events() is None

    for library.answer in (15, 999):  # GPU is lost, unknown
        with pytest.raises(EventsError, match=f"code {library.answer}|fallen off the bus"):
            nvml.events()

    library.answer = 0
    assert nvml.events() is not None


def test_a_gpu_whose_events_cannot_be_asked_for_is_told_of_once_for_each_reason_and_tried_again(file: Path) -> None:
    write(file, "fail: {nvmlDeviceRegisterEvents: 999}")
    events = NVML.open(fake=file).events()
    assert events is not None

    with capture_logs() as logs:
        for code in (999, 15):
            write(file, f"fail: {{nvmlDeviceRegisterEvents: {code}}}")
            for _ in range(5):
                events.follow(0, "GPU-0")

    assert 2 == [one["event"] for one in logs].count("nvml.events_not_registered")
    write(file, "xids: [79]")
    events.follow(0, "GPU-0")
    assert GPUEvent("GPU-0", 79) == events.wait(0)


def test_processes_are_listed_once_each_whatever_they_do_on_the_gpu(file: Path) -> None:
    write(
        file,
        "processes: [{pid: 7, memory: 1GiB}, {pid: 7, memory: 1GiB, kind: graphics}, {pid: 8, kind: mps},"
        " {pid: 9, memory: 2GiB, gpuInstance: 3}]",
        "",
        "lost: true",
    )
    nvml = NVML.open(fake=file)
    found = nvml.processes([0, 1, 2])
    assert (GPUProcess(7, GIB), GPUProcess(8, None), GPUProcess(9, 2 * GIB, 3)) == found[0]
    assert () == found[1]
    assert "the GPU has fallen off the bus: reset it or reboot" == found[2]


def test_a_gpu_whose_driver_hangs_keeps_its_facts_and_holds_up_no_other(file: Path) -> None:
    write(file, "", "")
    nvml = NVML.open(fake=file, patience=1.0)
    healthy = nvml.gpus()
    write(file, "hang: true", "")
    for _ in range(2):  # asked once more while the first answer is still out
        hanging, other = nvml.gpus()
        assert healthy[1] == other
        assert "NVML has not answered for 1 s: the driver hangs; reboot the node" == hanging.fault
        assert not hanging.lost
    write(file, "", "")
    assert all("" == gpu.fault for gpu in NVML.open(fake=file).gpus())


def test_the_first_look_waits_for_gpus_that_are_initialized_by_it(file: Path) -> None:
    write(file, "hang: true", "")
    nvml = NVML.open(fake=file, patience=1.0)
    awake = threading.Timer(1.5, write, (file, "", ""))
    awake.start()
    assert ["GPU-0", "GPU-1"] == [gpu.uuid for gpu in nvml.gpus()]
    awake.join()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("xids: [-1]", r"xids\[0\]: expected int >= 0"),
        ("xids: [{code: 3}]", r"xids\[0\].code: unknown key"),
        ("processes: [{memory: 1GiB}]", r"processes\[0\].pid: missing"),
        ("processes: [{pid: 1, memory: lots}]", "lots"),
        ("recoveryAction: pray", "recoveryAction: unknown value 'pray'"),
    ],
)
def test_what_cannot_be_made_up_is_refused_with_its_place(file: Path, text: str, problem: str) -> None:
    write(file, text)
    with pytest.raises(ConfigurationError, match=problem):
        NVML.open(fake=file)
