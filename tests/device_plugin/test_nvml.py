"""NVML through the real pynvml, with a made-up library behind it."""

from pathlib import Path

import pytest
from structlog.testing import capture_logs

from cotenant.contract.boards import boards
from cotenant.contract.configuration import ConfigurationError
from cotenant.contract.inventory import MIGProfile
from device_plugin.nvml import NVML, NVMLUnavailableError, PhysicalGPU, Vitals

GIB = 1 << 30


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "gpus.yaml"


def read(file: Path, text: str) -> tuple[PhysicalGPU, ...]:
    file.write_text(text)
    return NVML.open(fake=file).gpus()


def test_facts_are_read_for_each_gpu(file: Path) -> None:
    (gpu,) = read(
        file,
        "gpus: [{model: NVIDIA H200, memory: 141GiB, reserved: 600MiB, uuid: GPU-1, minor: 3, mig: false,"
        " computeCapability: [9, 0], virtualization: 2}]",
    )
    expected = PhysicalGPU(
        uuid="GPU-1",
        index=0,
        model="NVIDIA H200",
        total_bytes=141 * GIB,
        reserved_bytes=600 << 20,
        minor=3,
        device_path="/dev/nvidia3",
        pci_bus_id="00000000:04:00.0",
        compute_capability=(9, 0),
        mig_enabled=False,
        virtualization=2,
        compute_mode=0,
        vitals=Vitals(used_bytes=0),
    )
    assert expected == gpu


@pytest.mark.parametrize("code", [3, 4, 13], ids=["not-supported", "no-permission", "function-not-found"])
def test_what_nvml_does_not_say_is_unknown_and_no_fault(file: Path, code: int) -> None:
    symbols = (
        "nvmlDeviceGetMinorNumber",
        "nvmlDeviceGetMigMode",
        "nvmlDeviceGetPciInfo_v3",
        "nvmlDeviceGetCudaComputeCapability",
        "nvmlDeviceGetVirtualizationMode",
        "nvmlDeviceGetMemoryInfo_v2",
    )
    fail = ", ".join(f"{symbol}: {code}" for symbol in symbols)
    (gpu,) = read(file, f"gpus: [{{model: A, memory: 8GiB, reserved: 1GiB, fail: {{{fail}}}}}]")
    assert "" == gpu.fault
    assert (None, None, None, None) == (gpu.minor, gpu.mig_enabled, gpu.pci_bus_id, gpu.virtualization)
    # a driver that knows no reserved bytes counts them as used, and total is all there is to tell
    assert (8 * GIB, 0) == (gpu.total_bytes, gpu.reserved_bytes)


def test_one_lost_gpu_hides_no_other_and_keeps_its_facts(file: Path) -> None:
    file.write_text("gpus: [{model: A, memory: 8GiB}, {model: B, memory: 8GiB}]")
    nvml = NVML.open(fake=file)
    first, second = nvml.gpus()
    file.write_text("gpus: [{model: A, memory: 8GiB, lost: true}, {model: B, memory: 8GiB}]")
    lost, kept = nvml.gpus()
    assert second == kept
    assert (first.uuid, "the GPU has fallen off the bus: reset it or reboot") == (lost.uuid, lost.fault)
    file.write_text("gpus: [{model: A, memory: 8GiB}, {model: B, memory: 8GiB}]")
    assert (first, second) == nvml.gpus()


def test_a_gpu_lost_from_the_start_is_left_out_until_it_says_who_it_is(file: Path) -> None:
    file.write_text("gpus: [{model: A, memory: 8GiB, lost: true}, {model: B, memory: 8GiB}]")
    nvml = NVML.open(fake=file)
    with capture_logs() as logs:
        for _ in range(3):
            assert ["B"] == [gpu.model for gpu in nvml.gpus()]
    assert ["nvml.gpu_unreadable"] == [line["event"] for line in logs]
    file.write_text("gpus: [{model: A, memory: 8GiB}, {model: B, memory: 8GiB}]")
    assert ["A", "B"] == [gpu.model for gpu in nvml.gpus()]


@pytest.mark.parametrize(
    ("blind", "faults"),
    [
        (True, ["fail: {nvmlDeviceGetUUID: 999}"] * 2),
        (True, ["fail: {nvmlDeviceGetUUID: 999}", "lost: true"]),
        (False, ["fail: {nvmlDeviceGetUUID: 999}", "lost: false"]),
        # of these a new NVML would know no more, and forget who they are
        (False, ["lost: true"] * 2),
    ],
    ids=["each fails", "the other is lost", "one can be read", "each is lost"],
)
def test_nvml_is_blind_where_each_gpu_fails_and_not_for_being_lost(
    file: Path, faults: list[str], *, blind: bool
) -> None:
    file.write_text("gpus: [{model: A, memory: 8GiB, count: 2}]")
    nvml = NVML.open(fake=file)
    before = [gpu.uuid for gpu in nvml.gpus()]
    assert not nvml.blind
    file.write_text(f"gpus: [{', '.join(f'{{model: A, memory: 8GiB, {fault}}}' for fault in faults)}]")
    assert before == [gpu.uuid for gpu in nvml.gpus()]
    assert blind == nvml.blind
    file.write_text("gpus: [{model: A, memory: 8GiB, count: 2}]")
    nvml.gpus()
    assert not nvml.blind


def test_nvml_that_could_never_read_any_gpu_cannot_be_used(file: Path) -> None:
    with pytest.raises(NVMLUnavailableError, match=r"none of the 2 GPUs can be read: NVML says: .* \(code 999\)"):
        read(file, "gpus: [{model: A, memory: 8GiB, count: 2, fail: {nvmlDeviceGetUUID: 999}}]")


def test_a_gpu_that_is_no_longer_listed_is_a_fault(file: Path) -> None:
    file.write_text("gpus: [{model: A, memory: 8GiB, count: 2}]")
    nvml = NVML.open(fake=file)
    nvml.gpus()
    file.write_text("gpus: [{model: A, memory: 8GiB, count: 1}]")
    assert ["", "NVML no longer lists the GPU: it has fallen off the bus, or was removed"] == [
        gpu.fault for gpu in nvml.gpus()
    ]


def test_gpus_behind_one_that_is_removed_move_up_and_back_again(file: Path) -> None:
    one, two, three = (f"{{model: {model}, memory: 8GiB, uuid: GPU-{model}}}" for model in ("A30", "H100", "B200"))
    file.write_text(f"gpus: [{one}, {two}, {three}]")
    nvml = NVML.open(fake=file)
    nvml.gpus()
    file.write_text(f"gpus: [{two}, {three}]")
    assert [("GPU-H100", 0, ""), ("GPU-B200", 1, "")] == [(gpu.uuid, gpu.index, gpu.fault) for gpu in nvml.gpus()]
    file.write_text(f"gpus: [{one}, {two}, {three}]")
    assert ["GPU-A30", "GPU-H100", "GPU-B200"] == [gpu.uuid for gpu in nvml.gpus()]
    assert ["", "", ""] == [gpu.fault for gpu in nvml.gpus()]


def test_a_broken_file_leaves_a_running_library_as_it_was(file: Path) -> None:
    file.write_text("gpus: [{model: A, memory: 8GiB}]")
    nvml = NVML.open(fake=file)
    before = nvml.gpus()
    file.write_text("gpus: [{model: A, memory: ")
    assert before == nvml.gpus()


def test_made_up_uuids_depend_on_node_and_index_alone(file: Path) -> None:
    text = "node: n1\ngpus: [{model: A, memory: 8GiB, count: 2}]"
    first = [gpu.uuid for gpu in read(file, text)]
    assert 2 == len(set(first))
    assert first == [gpu.uuid for gpu in read(file, text)]
    assert set(first).isdisjoint(gpu.uuid for gpu in read(file, text.replace("n1", "n2")))


def test_a_node_that_is_only_read_leaves_nothing_beside_its_file(file: Path) -> None:
    read(file, "gpus: [{model: NVIDIA A100-SXM4-40GB, memory: 40GiB, mig: false}]")
    assert [file] == list(file.parent.iterdir())


def test_two_libraries_in_one_process_keep_apart(tmp_path: Path) -> None:
    nvmls = []
    for name in ("A", "B"):
        file = tmp_path / name
        file.write_text(f"gpus: [{{model: {name}, memory: 8GiB}}]")
        nvmls.append(NVML.open(fake=file))
    assert ["A", "B", "A"] == [nvmls[n].gpus()[0].model for n in (0, 1, 0)]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("gpus: [{model: A}]", "gpus[0].memory: missing, but required"),
        ("gpus: [{model: A, memory: 8GiB, color: red}]", "gpus[0].color: unknown key"),
        ("gpus: [{model: A, memory: 8GiB, count: 0}]", "gpus[0].count: expected int >= 1"),
        ("gpus: [{model: A, memory: 8GiB, count: 2, uuid: GPU-1}]", "uuid and device are one GPU's, but count is 2"),
        ("gpus: [{model: A, memory: 1GiB, reserved: 2GiB}]", "memory is 1GiB of which 2GiB reserved"),
        ("- 1", "expected object, got array"),
    ],
)
def test_a_bad_file_is_refused_with_the_place_and_what_was_expected(file: Path, text: str, sentence: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        read(file, text)
    assert sentence in str(refused.value)
    assert str(file) in str(refused.value)


def test_a_library_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    with pytest.raises(NVMLUnavailableError, match=r"--nvml-library .*nothing\.so cannot be loaded"):
        NVML.open(library_path=tmp_path / "nothing.so")


def test_a_missing_driver_says_what_to_do() -> None:
    if Path("/proc/driver/nvidia/version").exists():
        pytest.skip("this machine has an NVIDIA driver")
    with pytest.raises(NVMLUnavailableError, match="NVIDIA driver"):
        NVML.open()


def test_an_error_without_advice_is_said_in_nvmls_words(file: Path) -> None:
    file.write_text("gpus: [{model: A, memory: 8GiB}]")
    nvml = NVML.open(fake=file)
    nvml.gpus()
    file.write_text("gpus: [{model: A, memory: 8GiB, fail: {nvmlDeviceGetName: 19}}]")
    assert ["NVML says: fake error 19 (code 19)"] == [gpu.fault for gpu in nvml.gpus()]


def test_a_gpu_in_mig_mode_that_tells_an_unprivileged_program_nothing_is_listed_with_what_it_takes(file: Path) -> None:
    secret = "fail: {nvmlDeviceGetMemoryInfo: 4, nvmlDeviceGetMemoryInfo_v2: 4}"  # NVML_ERROR_NO_PERMISSION
    a100 = "model: NVIDIA A100-SXM4-40GB, memory: 40GiB"
    file.write_text(f"gpus: [{{{a100}, mig: true, {secret}}}, {{model: B, memory: 8GiB}}]")
    first, second = NVML.open(fake=file).gpus()
    assert (0, None, True) == (first.total_bytes, first.vitals.used_bytes, first.mig_enabled)
    assert "the capability SYS_ADMIN, and NVIDIA_MIG_CONFIG_DEVICES=all in its environment" in first.fault
    assert ("", 8 * GIB) == (second.fault, second.total_bytes)

    # what it said before MIG mode was switched on is not forgotten
    file.write_text(f"gpus: [{{{a100}, mig: false}}]")
    nvml = NVML.open(fake=file)
    nvml.gpus()
    file.write_text(f"gpus: [{{{a100}, mig: true, {secret}}}]")
    (gpu,) = nvml.gpus()
    assert ("MIG mode is on", 40 * GIB) == (gpu.fault.partition(",")[0], gpu.total_bytes)


class TestMIGProfiles:
    """What a GPU can be cut into, by NVML's own calls."""

    @staticmethod
    def profiles(file: Path, board: str, *, fail: str = "") -> tuple[MIGProfile, ...]:
        known = boards()[board]
        file.write_text(f"gpus: [{{model: A, memory: {known.memory_mib}MiB, board: {board}, fail: {{{fail}}}}}]")
        return NVML.open(fake=file).mig_profiles(0)

    @pytest.mark.parametrize("board", boards())
    def test_every_profile_of_a_board_is_read_as_it_is(self, file: Path, board: str) -> None:
        got = self.profiles(file, board)
        assert len(boards()[board].profiles) == len(got)
        assert {profile.profile for profile in boards()[board].profiles} == set(got)

    @pytest.mark.parametrize("code", [13, 25], ids=["function-not-found", "version-mismatch"])
    @pytest.mark.parametrize(
        "board", ["A30-24GB", "A100-SXM4-40GB", "A100-SXM4-80GB", "H100-SXM5-80GB", "H100-NVL-94GB", "H200-SXM5-141GB"]
    )
    def test_a_driver_that_tells_no_names_gives_the_same(self, file: Path, board: str, code: int) -> None:
        got = self.profiles(file, board, fail=f"nvmlDeviceGetGpuInstanceProfileInfoV: {code}")
        assert {profile.profile for profile in boards()[board].profiles} == set(got)

    @pytest.mark.parametrize("by_us", [True, False])
    def test_they_are_read_anew_when_mig_mode_changes(self, file: Path, *, by_us: bool) -> None:
        gpu = "model: A, memory: 80GiB, board"
        file.write_text(f"gpus: [{{{gpu}: A30-24GB}}]")
        nvml = NVML.open(fake=file)
        nvml.gpus()
        before = nvml.mig_profiles(0)
        file.write_text(f"gpus: [{{{gpu}: A100-SXM4-40GB, mig: {not by_us}}}]")
        if by_us:
            nvml.set_mig_mode(0, on=True)
        else:
            nvml.gpus()
        assert before != nvml.mig_profiles(0)

    def test_a_gpu_without_mig_has_none(self, file: Path) -> None:
        file.write_text("gpus: [{model: Tesla T4, memory: 16GiB}]")
        nvml = NVML.open(fake=file)
        assert () == nvml.mig_profiles(0)
        assert nvml.gpus()[0].mig_enabled is None

    def test_a_known_model_has_its_boards_and_is_not_partitioned(self, file: Path) -> None:
        file.write_text("gpus: [{model: NVIDIA A30, memory: 24GiB}]")
        nvml = NVML.open(fake=file)
        assert {profile.profile for profile in boards()["A30-24GB"].profiles} == set(nvml.mig_profiles(0))
        assert nvml.gpus()[0].mig_enabled is False

    def test_placements_that_only_root_is_told_are_said_to_be(self, file: Path) -> None:
        with pytest.raises(NVMLUnavailableError, match="NVML tells the MIG placements of GPU 0 to root only"):
            self.profiles(file, "A30-24GB", fail="nvmlDeviceGetGpuInstancePossiblePlacements_v2: 4")

    def test_a_lost_gpu_says_so(self, file: Path) -> None:
        file.write_text("gpus: [{model: NVIDIA A30, memory: 24GiB, lost: true}]")
        with pytest.raises(
            NVMLUnavailableError, match="the MIG profiles of GPU 0 cannot be read: the GPU has fallen off"
        ):
            NVML.open(fake=file).mig_profiles(0)
