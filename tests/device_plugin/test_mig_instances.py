"""GPU instances through the real pynvml, on the made-up library, whose state outlives the process."""

from pathlib import Path
from typing import Any
from uuid import UUID

import pynvml
import pytest

from device_plugin.nvml import NVML, MIGError, mig
from device_plugin.nvml.fake_mig import CrashError, Fault, StateFile

A100 = "gpus: [{model: NVIDIA A100-SXM4-40GB, memory: 40GiB, uuid: GPU-0, mig: true, computeCapability: [8, 0]}]"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "gpus.yaml"
    path.write_text(A100)
    return path


def there(nvml: NVML) -> list[tuple[str, int, bool]]:
    return [(one.profile, one.start, bool(one.uuid)) for one in nvml.mig_instances(0)]


def test_an_instance_lies_where_it_was_placed_and_another_process_sees_it(file: Path) -> None:
    nvml = NVML.open(fake=file)
    nvml.create_mig_instance(0, "3g.20gb", 4)
    nvml.create_mig_instance(0, "1g.5gb", 0)
    other = NVML.open(fake=file)
    assert [("1g.5gb", 0, True), ("3g.20gb", 4, True)] == there(other)
    assert nvml.mig_instances(0) == other.mig_instances(0)
    uuids = {one.uuid for one in nvml.mig_instances(0)}
    assert 2 == len(uuids)


def test_an_instance_made_anew_in_its_place_has_the_uuid_and_the_number_that_it_had(file: Path) -> None:
    nvml = NVML.open(fake=file)
    nvml.create_mig_instance(0, "3g.20gb", 4)
    (before,) = nvml.mig_instances(0)
    nvml.destroy_mig_instance(0, before)
    nvml.create_mig_instance(0, "3g.20gb", 4)
    assert (before,) == nvml.mig_instances(0)
    assert 5 == UUID(before.uuid.removeprefix("MIG-")).version


def test_the_instance_that_is_the_whole_gpu_has_the_number_0(file: Path) -> None:
    nvml = NVML.open(fake=file)
    nvml.create_mig_instance(0, "7g.40gb", 0)
    (gpu,), (one,) = nvml.gpus(), nvml.mig_instances(0)
    assert 0 == one.id
    assert len(nvml.mig_nodes(gpu, one)) == 3  # the GPU's, its own and its compute instance's
    nvml.destroy_mig_instance(0, one)
    assert [] == there(nvml)


def test_an_instance_that_would_overlap_another_is_refused(file: Path) -> None:
    nvml = NVML.open(fake=file)
    nvml.create_mig_instance(0, "1g.5gb", 4)
    with pytest.raises(MIGError, match=r"3g\.20gb cannot be made at 4 of GPU 0"):
        nvml.create_mig_instance(0, "3g.20gb", 4)


@pytest.mark.parametrize("code", [2, 3, 6])  # INVALID_ARGUMENT, NOT_SUPPORTED, NOT_FOUND: drivers differ
def test_an_index_at_which_no_mig_device_lies_is_no_failure_of_the_gpu(file: Path, code: int) -> None:
    nvml = NVML.open(fake=file)
    nvml.create_mig_instance(0, "1g.5gb", 0)
    file.write_text(f"{A100[:-2]}, fail: {{nvmlDeviceGetMigDeviceHandleByIndex: {code}}}}}]")

    (gpu,) = nvml.gpus()

    assert "" == gpu.fault
    # it is there, and who it is cannot be told for now
    assert [("1g.5gb", 0, False)] == there(nvml)


def test_another_error_at_an_index_says_that_the_instances_cannot_be_told(file: Path) -> None:
    nvml = NVML.open(fake=file)
    file.write_text(f"{A100[:-2]}, fail: {{nvmlDeviceGetMigDeviceHandleByIndex: 999}}}}]")  # UNKNOWN
    with pytest.raises(MIGError, match="the MIG instances of GPU 0 cannot be read"):
        nvml.mig_instances(0)


def test_what_only_a_privileged_program_may_do_says_what_the_plugins_container_lacks(file: Path) -> None:
    nvml = NVML.open(fake=file)
    denied = ("nvmlDeviceGetGpuInstances", "nvmlDeviceCreateGpuInstanceWithPlacement", "nvmlDeviceSetMigMode")
    fail = ", ".join(f"{symbol}: 4" for symbol in denied)  # NO_PERMISSION
    file.write_text(f"{A100[:-2]}, fail: {{{fail}}}}}]")
    lacks = "a privileged program alone do that: give the plugin's container the capability SYS_ADMIN, and"
    with pytest.raises(MIGError, match=f"the MIG instances of GPU 0 cannot be read: .*{lacks}"):
        nvml.mig_instances(0)
    with pytest.raises(MIGError, match=rf"1g\.5gb cannot be made at 0 of GPU 0: .*{lacks}"):
        nvml.create_mig_instance(0, "1g.5gb", 0)
    with pytest.raises(MIGError, match=f"MIG mode of GPU 0 cannot be switched on: .*{lacks}"):
        nvml.set_mig_mode(0, on=True)


def test_an_instance_in_use_stays(file: Path) -> None:
    nvml = NVML.open(fake=file)
    nvml.create_mig_instance(0, "2g.10gb", 2)
    with StateFile(file).change() as changed:
        changed.instances[0].in_use = True
    with pytest.raises(MIGError, match="it is in use"):
        nvml.destroy_mig_instance(0, *nvml.mig_instances(0))
    assert [("2g.10gb", 2, True)] == there(nvml)


def divide(file: Path) -> None:
    """Have the first instance compute with one slice alone, as `nvidia-smi mig -cci` makes it for 1c.3g.20gb."""
    with StateFile(file).change() as changed:
        changed.instances[0].compute_slices = 1


def test_one_that_computes_with_a_part_of_itself_is_told_from_a_whole_one_and_can_be_destroyed(file: Path) -> None:
    nvml = NVML.open(fake=file)
    nvml.create_mig_instance(0, "3g.20gb", 4)
    divide(file)
    nvml.create_mig_instance(0, "1g.5gb", 0)
    assert [(False, True), (True, False)] == [(one.divided, bool(one.uuid)) for one in nvml.mig_instances(0)]

    nvml.destroy_mig_instance(0, nvml.mig_instances(0)[1])
    assert [("1g.5gb", 0, True)] == there(nvml)


def test_so_is_one_of_several_compute_instances(file: Path) -> None:
    nvml = NVML.open(fake=file)
    nvml.create_mig_instance(0, "3g.20gb", 4)
    nvml.create_mig_instance(0, "2g.10gb", 0)
    (_, large) = nvml.mig_instances(0)

    def call(function: Any, *arguments: Any) -> Any:
        # both MIG devices lie in one GPU instance
        return large.id if function is pynvml.nvmlDeviceGetGpuInstanceId else nvml.call(function, *arguments)

    read = mig.instances(call, nvml.handle(0), nvml.mig_profiles(0))
    assert [(False, ""), (True, "")] == [(one.divided, one.uuid) for one in read]


def test_where_the_driver_does_not_tell_every_instance_is_taken_for_whole(file: Path) -> None:
    nvml = NVML.open(fake=file)
    nvml.create_mig_instance(0, "3g.20gb", 4)
    divide(file)

    def call(function: Any, *arguments: Any) -> Any:
        if function is pynvml.nvmlDeviceGetAttributes_v2:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return nvml.call(function, *arguments)

    (one,) = mig.instances(call, nvml.handle(0), nvml.mig_profiles(0))
    assert one.uuid


def between(file: Path, before: Any, nvml: NVML) -> Any:
    """Make NVML's call such that another program destroys all instances just before the first call of *before*."""
    other = NVML.open(fake=file)
    left = list(other.mig_instances(0))

    def call(function: Any, *arguments: Any) -> Any:
        if function is before:
            while left:
                other.destroy_mig_instance(0, left.pop())
        return nvml.call(function, *arguments)

    return call


@pytest.mark.parametrize("before", [pynvml.nvmlGpuInstanceGetInfo, pynvml.nvmlDeviceGetUUID])
def test_an_instance_that_another_program_destroys_while_all_are_read_is_left_out(file: Path, before: Any) -> None:
    nvml = NVML.open(fake=file)
    nvml.create_mig_instance(0, "1g.5gb", 0)
    nvml.create_mig_instance(0, "3g.20gb", 4)
    call = between(file, before, nvml)
    assert () == mig.instances(call, nvml.handle(0), nvml.mig_profiles(0))


@pytest.mark.parametrize(
    "before", [pynvml.nvmlGpuInstanceGetInfo, pynvml.nvmlComputeInstanceDestroy, pynvml.nvmlGpuInstanceDestroy]
)
def test_an_instance_that_another_program_destroys_first_is_destroyed(file: Path, before: Any) -> None:
    nvml = NVML.open(fake=file)
    nvml.create_mig_instance(0, "1g.5gb", 0)
    (one,) = nvml.mig_instances(0)
    (profile,) = (known for known in nvml.mig_profiles(0) if known.name == "1g.5gb")
    mig.destroy(between(file, before, nvml), nvml.handle(0), profile, one.id)
    assert [] == there(nvml)


def test_a_crash_between_any_two_calls_leaves_what_the_next_call_completes_or_clears(file: Path) -> None:
    for calls in range(1, 60):
        for when in ("before", "after"):
            nvml = NVML.open(fake=file)
            StateFile(file).arm(Fault(calls=calls, do="crash", when=when))
            crashed = False
            try:
                nvml.create_mig_instance(0, "1g.5gb", 6)
            except CrashError:
                crashed = True
            StateFile(file).arm(None)
            for one in nvml.mig_instances(0):
                if not one.uuid:
                    nvml.complete_mig_instance(0, one)
            assert there(nvml) in ([], [("1g.5gb", 6, True)])
            for one in nvml.mig_instances(0):
                StateFile(file).arm(Fault(calls=calls, do="crash", when=when))
                try:
                    nvml.destroy_mig_instance(0, one)
                except CrashError:
                    crashed = True
                StateFile(file).arm(None)
                nvml.destroy_mig_instance(0, one)
            assert [] == there(nvml)
        if not crashed:
            break
    assert calls > 10, "the fault never struck late enough to matter"


def test_mig_mode_is_switched_without_a_reset_only_from_hopper_on(file: Path) -> None:
    file.write_text(A100.replace("mig: true", "mig: false"))
    with pytest.raises(MIGError, match="needs a reset"):
        NVML.open(fake=file).set_mig_mode(0, on=True)
    file.write_text("gpus: [{model: NVIDIA H100 80GB HBM3, memory: 80GiB, mig: false}]")
    nvml = NVML.open(fake=file)
    nvml.set_mig_mode(0, on=True)
    assert nvml.gpus()[0].mig_enabled


def test_a_mode_that_cannot_be_had_now_does_not_come_with_a_later_reset(file: Path) -> None:
    file.write_text(A100.replace("mig: true", "mig: false"))
    nvml = NVML.open(fake=file)
    with pytest.raises(MIGError, match="needs a reset for it: drain it, and `nvidia-smi -i 0 -mig 1`"):
        nvml.set_mig_mode(0, on=True)
    assert {} == StateFile(file).read().pending

    file.write_text("gpus: [{model: NVIDIA H100 80GB HBM3, memory: 80GiB, uuid: GPU-1, mig: true}]")
    nvml = NVML.open(fake=file)
    nvml.create_mig_instance(0, "1g.10gb", 0)
    with pytest.raises(MIGError, match="it is in use"):
        nvml.set_mig_mode(0, on=False)
    assert {} == StateFile(file).read().pending


def test_a_mode_that_a_person_has_set_for_the_next_reset_stays(file: Path) -> None:
    file.write_text(A100.replace("mig: true", "mig: false"))
    with StateFile(file).change() as changed:
        changed.pending = {"GPU-0": True}  # by `nvidia-smi -mig 1`
    with pytest.raises(MIGError, match="needs a reset"):
        NVML.open(fake=file).set_mig_mode(0, on=True)
    assert {"GPU-0": True} == StateFile(file).read().pending
