"""What Allocate answers: how a grant becomes environment, mounts, device nodes and CDI names of a container."""

import os
from collections.abc import Sequence

from cotenant.contract import environment
from cotenant.contract.configuration import DeviceListStrategy
from cotenant.contract.grant import ContainerGrant
from device_plugin.api import deviceplugin_pb2 as pb
from device_plugin.nvml import PhysicalGPU

# The NVIDIA container runtime takes every file name in here for a device, if its configuration has
# accept-nvidia-visible-devices-as-volume-mounts = true (nvidia-container-toolkit, internal/config/image).
_VOLUME_MOUNTS = "/var/run/nvidia-container-devices"
# What CUDA opens beside the GPU's own node; which of them exist depends on driver and modules loaded.
CONTROL_NODES = ("/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools", "/dev/nvidia-modeset")


def answer(
    grant: ContainerGrant,
    granted: Sequence[PhysicalGPU],
    *,
    strategy: DeviceListStrategy,
    pass_device_specs: bool,
    cdi_kind: str,
    instance_nodes: Sequence[tuple[str, str]] = (),
) -> pb.ContainerAllocateResponse:
    """Make the kubelet's answer for *grant*, whose GPUs are *granted*.

    The environment is the same in every strategy, and the same that admission has put into the pod, whose values win.
    *instance_nodes* are the device nodes of a static MIG instance: the container's path and the host's.
    """
    response = pb.ContainerAllocateResponse(envs=environment.injected(grant) | environment.informative(grant))
    uuids = [gpu.uuid for gpu in granted] if grant.mig is None else [grant.mig.uuid]
    _name_devices(response, uuids, strategy=strategy, cdi_kind=cdi_kind)
    if pass_device_specs:
        for gpu in granted:
            if gpu.device_path is not None:
                response.devices.add(
                    host_path=gpu.device_path, container_path=f"/dev/nvidia{gpu.minor}", permissions="rw"
                )
        for path, host in [*instance_nodes, *((path, path) for path in CONTROL_NODES)]:
            if os.path.exists(host):  # noqa: PTH110 - as short as the rest
                response.devices.add(host_path=host, container_path=path, permissions="rw")
    return response


def answer_made(grant: ContainerGrant, cdi_name: str) -> pb.ContainerAllocateResponse:
    """Make the answer for a MIG instance that is made when the container starts: a name that it will then have."""
    response = pb.ContainerAllocateResponse(envs=environment.injected(grant) | environment.informative(grant))
    response.cdi_devices.add(name=cdi_name)
    return response


def answer_unguided(
    uuids: Sequence[str], *, strategy: DeviceListStrategy, cdi_kind: str
) -> pb.ContainerAllocateResponse:
    """Make the answer for GPUs or instances that the kubelet chose, as NVIDIA's plugin does."""
    response = pb.ContainerAllocateResponse(envs={environment.VISIBLE_DEVICES: ",".join(uuids)})
    _name_devices(response, uuids, strategy=strategy, cdi_kind=cdi_kind)
    return response


def _name_devices(
    response: pb.ContainerAllocateResponse, uuids: Sequence[str], *, strategy: DeviceListStrategy, cdi_kind: str
) -> None:
    for uuid in uuids:
        if strategy is DeviceListStrategy.VOLUME_MOUNTS:
            response.mounts.add(host_path="/dev/null", container_path=f"{_VOLUME_MOUNTS}/{uuid}", read_only=True)
        elif strategy is DeviceListStrategy.CDI_CRI:
            response.cdi_devices.add(name=f"{cdi_kind}={uuid}")
