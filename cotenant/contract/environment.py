"""The environment that carries a grant into a container, and the annotations that carry it to the kubelet."""

from cotenant.contract import grant as grants
from cotenant.contract.grant import ContainerGrant, Grant
from cotenant.contract.inventory import Family
from cotenant.contract.names import Names
from cotenant.contract.units import MIB

VISIBLE_DEVICES = "NVIDIA_VISIBLE_DEVICES"
MPS_MEMORY = "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"
MPS_THREADS = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"
MPS_PIPE = "CUDA_MPS_PIPE_DIRECTORY"

# The variables that admission reads from annotations, and that no pod of ours may set itself.
INJECTED = (VISIBLE_DEVICES, MPS_MEMORY, MPS_THREADS, MPS_PIPE)

# CUDA's own default: a client that finds no control daemon there runs without MPS (MPS documentation, 4.2.1).
NEUTRAL_PIPE = "/tmp/nvidia-mps"  # noqa: S108 - not a file of ours
# The instance of a dynamic MIG grant does not exist yet at bind, and a CDI spec injects it; so NVIDIA's runtime is to
# inject nothing (nvidia-container-toolkit, pkg/nvcdi/wrapper.go). The spec carries the UUID in a variable of ours.
NO_DEVICES = "void"
MIG_UUID = "COTENANT_MIG_UUID"


def injected(container: ContainerGrant) -> dict[str, str]:
    """Give the four variables of *container*, each with a value that is never empty.

    The kubelet lets an empty value from the pod's spec win over the device plugin's, so where a variable does not apply
    it says what CUDA would do without it.
    """
    return {
        VISIBLE_DEVICES: _visible(container),
        # Ordinals count the container's visible GPUs, not the node's. Without MPS nothing reads this.
        MPS_MEMORY: ",".join(f"{n}={share.bytes // MIB}M" for n, share in enumerate(container.gpus)),
        MPS_THREADS: str(container.threads),
        MPS_PIPE: container.mps_pipe or NEUTRAL_PIPE,
    }


def _visible(container: ContainerGrant) -> str:
    if container.family is Family.MIG_DYNAMIC:
        return NO_DEVICES
    if container.mig is not None and container.mig.uuid:
        return container.mig.uuid
    return ",".join(share.uuid for share in container.gpus)


def informative(container: ContainerGrant) -> dict[str, str]:
    """Give the COTENANT_* variables of *container*: for frameworks and people, enforced by nothing."""
    return {
        "COTENANT_CONTAINER": container.name,
        "COTENANT_GPU_UUIDS": ",".join(share.uuid for share in container.gpus),
        "COTENANT_GPU_MEM_BYTES": ",".join(str(share.bytes) for share in container.gpus),
        "COTENANT_MODE": str(container.mode),
        "COTENANT_ISOLATION": str(container.isolation.given),
        "COTENANT_ENFORCED_BY": container.isolation.enforced_by,
    }


def annotations(grant: Grant, names: Names) -> dict[str, str]:
    """Give every annotation that the Binding of a pod with *grant* carries."""
    return {names.grant: grants.encode(grant), **read_by_admission(grant, names)}


def read_by_admission(grant: Grant, names: Names) -> dict[str, str]:
    """Give those of them that fill in the variables that admission has put into the containers."""
    keyed: dict[str, str] = {}
    for container in grant.containers:
        values = injected(container)
        keyed[names.visible_devices(container.name)] = values[VISIBLE_DEVICES]
        keyed[names.mps_memory(container.name)] = values[MPS_MEMORY]
        keyed[names.mps_threads(container.name)] = values[MPS_THREADS]
        keyed[names.mps_pipe(container.name)] = values[MPS_PIPE]
    return keyed
