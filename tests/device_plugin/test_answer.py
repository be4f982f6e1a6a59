"""What Allocate answers in each strategy."""

from pathlib import Path

import msgspec
import pytest

from cotenant.contract import environment
from cotenant.contract.configuration import DeviceListStrategy
from cotenant.contract.grant import ContainerGrant
from cotenant.contract.inventory import Mode
from device_plugin.admission.answer import Answers
from device_plugin.api import deviceplugin_pb2 as pb
from device_plugin.nvml import PhysicalGPU
from tests.device_plugin.node import container_grant, uuid

GRANT = container_grant(gpus=[0, 1], units=16)


def gpu(index: int, device_path: str | None = None) -> PhysicalGPU:
    return PhysicalGPU(
        uuid=uuid(index),
        index=index,
        model="A",
        total_bytes=1,
        reserved_bytes=0,
        minor=index + 4,
        device_path=device_path,
    )


def answered(
    strategy: DeviceListStrategy, *, specs: bool = False, path: str | None = None, grant: ContainerGrant = GRANT
) -> pb.ContainerAllocateResponse:
    gpus = {uuid(0): gpu(0, path), uuid(1): gpu(1)}
    answers = Answers(
        strategy=strategy,
        pass_device_specs=specs,
        cdi_name="nvidia.com/gpu={}".format,
        shm="/run/shm",
        known=gpus.__getitem__,
    )
    return answers.granted(grant)


@pytest.mark.parametrize("strategy", list(DeviceListStrategy))
def test_every_strategy_gives_the_environment_that_admission_injects(strategy: DeviceListStrategy) -> None:
    envs = answered(strategy).envs
    assert environment.injected(GRANT).items() <= dict(envs).items()
    assert f"{uuid(0)},{uuid(1)}" == envs["NVIDIA_VISIBLE_DEVICES"]
    assert str(8 << 30) + "," + str(8 << 30) == envs["COTENANT_GPU_MEM_BYTES"]  # 16 units over 2 GPUs


def test_envvar_gives_nothing_else() -> None:
    found = answered(DeviceListStrategy.ENVVAR)
    assert (0, 0, 0) == (len(found.mounts), len(found.devices), len(found.cdi_devices))


def test_volume_mounts_names_each_gpu_by_a_mount() -> None:
    found = answered(DeviceListStrategy.VOLUME_MOUNTS)
    expected = [("/dev/null", f"/var/run/nvidia-container-devices/{uuid(n)}") for n in (0, 1)]
    assert expected == [(mount.host_path, mount.container_path) for mount in found.mounts]


def test_cdi_names_each_gpu_by_its_uuid() -> None:
    expected = [f"nvidia.com/gpu={uuid(n)}" for n in (0, 1)]
    assert expected == [device.name for device in answered(DeviceListStrategy.CDI_CRI).cdi_devices]


def test_device_specs_name_the_gpus_nodes_as_the_container_knows_them(tmp_path: Path) -> None:
    node = tmp_path / "made-up"
    found = answered(DeviceListStrategy.ENVVAR, specs=True, path=str(node))
    # the second GPU has no node that NVML knows of
    own = [d for d in found.devices if d.host_path == str(node)]
    assert [("/dev/nvidia4", "rw")] == [(device.container_path, device.permissions) for device in own]


@pytest.mark.parametrize("strategy", list(DeviceListStrategy))
def test_under_mps_a_container_gets_its_daemons_pipes_and_the_shared_memory_where_they_meet(
    strategy: DeviceListStrategy,
) -> None:
    grant = msgspec.structs.replace(GRANT, mode=Mode.MPS, mps_pipe="/run/mps/a/pipe", threads=25)
    found = answered(strategy, grant=grant)
    mounts = [(mount.host_path, mount.container_path) for mount in found.mounts]
    assert [("/run/mps/a/pipe", "/run/mps/a/pipe"), ("/run/shm", "/dev/shm")] == mounts[:2]
    assert "/run/mps/a/pipe" == found.envs["CUDA_MPS_PIPE_DIRECTORY"]
    assert ("0=8192M,1=8192M", "25") == (
        found.envs["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"],
        found.envs["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"],
    )
