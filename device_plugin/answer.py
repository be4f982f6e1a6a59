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
_CONTROL_NODES = ("/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools", "/dev/nvidia-modeset")


def answer(
    grant: ContainerGrant,
    granted: Sequence[PhysicalGPU],
    *,
    strategy: DeviceListStrategy,
    pass_device_specs: bool,
    cdi_kind: str,
) -> pb.ContainerAllocateResponse:
    """Make the kubelet's answer for *grant*, whose GPUs are *granted*.

    The environment is the same in every strategy, and the same that admission has put into the pod, whose values win.
    """
    response = pb.ContainerAllocateResponse(envs=environment.injected(grant) | environment.informative(grant))
    if strategy is DeviceListStrategy.VOLUME_MOUNTS:
        for gpu in granted:
            response.mounts.add(host_path="/dev/null", container_path=f"{_VOLUME_MOUNTS}/{gpu.uuid}", read_only=True)
    elif strategy is DeviceListStrategy.CDI_CRI:
        for gpu in granted:
            response.cdi_devices.add(name=f"{cdi_kind}={gpu.uuid}")
    if pass_device_specs:
        for gpu in granted:
            if gpu.device_path is not None:
                response.devices.add(
                    host_path=gpu.device_path, container_path=f"/dev/nvidia{gpu.minor}", permissions="rw"
                )
        for path in filter(os.path.exists, _CONTROL_NODES):
            response.devices.add(host_path=path, container_path=path, permissions="rw")
    return response
