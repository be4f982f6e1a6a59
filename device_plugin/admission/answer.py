"""What Allocate answers: how GPUs become environment, mounts, device nodes and CDI names of a container."""

import os
from collections.abc import Callable, Mapping, Sequence

import msgspec

from cotenant.contract import environment
from cotenant.contract.configuration import DeviceListStrategy, DevicePluginConfiguration
from cotenant.contract.grant import GIVEN, ContainerGrant
from cotenant.contract.inventory import GPU, Mode
from device_plugin.api import deviceplugin_pb2 as pb
from device_plugin.nvml import PhysicalGPU

# The NVIDIA container runtime takes every file name in here for a device, if its configuration has
# accept-nvidia-visible-devices-as-volume-mounts = true (nvidia-container-toolkit, internal/config/image).
_VOLUME_MOUNTS = "/var/run/nvidia-container-devices"
# What CUDA opens beside the GPU's own node; which of them exist depends on driver and modules loaded.
CONTROL_NODES = ("/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools", "/dev/nvidia-modeset")


class Answers(msgspec.Struct, frozen=True):
    """Make the kubelet's answers, as the node's configuration has it; *known* gives a GPU as NVML last said.

    The environment is the same in every strategy, and for grants the same that admission has put into the pod, whose
    values win.
    """

    strategy: DeviceListStrategy
    pass_device_specs: bool
    # names the CDI device of a GPU or an instance
    cdi_name: Callable[[str], str]
    # the folder that is the containers' /dev/shm under MPS
    shm: str
    known: Callable[[str], PhysicalGPU]

    @classmethod
    def of(
        cls,
        configuration: DevicePluginConfiguration,
        known: Callable[[str], PhysicalGPU],
        cdi_name: Callable[[str], str],
    ) -> "Answers":
        """Answer as *configuration* says."""
        return cls(
            strategy=configuration.device_list_strategy,
            pass_device_specs=configuration.pass_device_specs,
            cdi_name=cdi_name,
            shm=configuration.mps.shm_folder,
            known=known,
        )

    def granted(
        self, grant: ContainerGrant, instance_nodes: Sequence[tuple[str, str]] = ()
    ) -> pb.ContainerAllocateResponse:
        """Answer for a container with *grant*.

        *instance_nodes* are the device nodes of a static MIG instance: the container's path and the host's.
        """
        environ = environment.injected(grant) | environment.informative(grant)
        gpus = [share.uuid for share in grant.gpus]
        named = gpus if grant.mig is None else [grant.mig.uuid]
        return self._answer(named, gpus, environ, pipe=grant.mps_pipe, nodes=instance_nodes)

    def made(self, grant: ContainerGrant, cdi_name: str) -> pb.ContainerAllocateResponse:
        """Answer for a MIG instance that is made when the container starts: a name that it will then have."""
        response = pb.ContainerAllocateResponse(envs=environment.injected(grant) | environment.informative(grant))
        response.cdi_devices.add(name=cdi_name)
        return response

    def shares(self, gpus: Sequence[GPU]) -> pb.ContainerAllocateResponse:
        """Answer for a container that holds shares of *gpus*, all of one MPS daemon or of none."""
        mode = gpus[0].mode
        given, enforced_by = GIVEN[mode]
        uuids = [gpu.uuid for gpu in gpus]
        environ = {
            environment.VISIBLE_DEVICES: ",".join(uuids),
            "COTENANT_GPU_UUIDS": ",".join(uuids),
            "COTENANT_MODE": str(mode),
            "COTENANT_ISOLATION": str(given),
            "COTENANT_ENFORCED_BY": enforced_by,
        }
        pipe = gpus[0].mps_pipe if mode is Mode.MPS else ""
        return self._answer(uuids, uuids, environ | ({environment.MPS_PIPE: pipe} if pipe else {}), pipe=pipe)

    def unguided(self, uuids: Sequence[str]) -> pb.ContainerAllocateResponse:
        """Answer for GPUs or instances that the kubelet chose, as NVIDIA's plugin does."""
        response = pb.ContainerAllocateResponse(envs={environment.VISIBLE_DEVICES: ",".join(uuids)})
        self._name(response, uuids)
        return response

    def _answer(
        self,
        named: Sequence[str],
        gpus: Sequence[str],
        environ: Mapping[str, str],
        *,
        pipe: str,
        nodes: Sequence[tuple[str, str]] = (),
    ) -> pb.ContainerAllocateResponse:
        response = pb.ContainerAllocateResponse(envs=dict(environ))
        if pipe:
            # A client finds its daemon by the pipes, and they hand each other memory through /dev/shm.
            response.mounts.add(host_path=pipe, container_path=pipe)
            response.mounts.add(host_path=self.shm, container_path="/dev/shm")  # noqa: S108 - the container's
        self._name(response, named)
        if self.pass_device_specs:
            for gpu in map(self.known, gpus):
                if gpu.device_path is not None:
                    response.devices.add(
                        host_path=gpu.device_path, container_path=f"/dev/nvidia{gpu.minor}", permissions="rw"
                    )
            for path, host in [*nodes, *((path, path) for path in CONTROL_NODES)]:
                if os.path.exists(host):  # noqa: PTH110 - as short as the rest
                    response.devices.add(host_path=host, container_path=path, permissions="rw")
        return response

    def _name(self, response: pb.ContainerAllocateResponse, uuids: Sequence[str]) -> None:
        for uuid in uuids:
            if self.strategy is DeviceListStrategy.VOLUME_MOUNTS:
                response.mounts.add(host_path="/dev/null", container_path=f"{_VOLUME_MOUNTS}/{uuid}", read_only=True)
            elif self.strategy is DeviceListStrategy.CDI_CRI:
                response.cdi_devices.add(name=self.cdi_name(uuid))
