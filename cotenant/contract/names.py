"""The names both programs put on the wire, all derived from one configurable domain."""

import re

import msgspec

DEFAULT_DOMAIN = "cotenant.io"
NVIDIA_DOMAIN = "nvidia.com"

# A DNS label or subdomain as Kubernetes validates it (apimachinery/pkg/util/validation).
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
# The longest prefix that we put before the domain is "visible-devices."; Kubernetes allows 253 for the whole.
_DOMAIN_MAX = 253 - len("visible-devices.")

# How NVIDIA's plugin ends the name of a resource that it shares and renames.
SHARED = ".shared"

ALIASES_IN_GIB = ("aliyun.com/gpu-mem",)
ALIASES_IN_MIB = ("volcano.sh/vgpu-memory", "nvidia.com/gpumem", "nvidia.com/gpu-memory")


class Names(msgspec.Struct, frozen=True):
    """Name resources and annotations under one domain; raise ValueError for a domain that Kubernetes would refuse.

    MIG instances have a domain of their own: NVIDIA's, so that pods written for NVIDIA's plugin need no change.
    """

    domain: str = DEFAULT_DOMAIN
    mig_domain: str = NVIDIA_DOMAIN

    def __post_init__(self) -> None:
        for domain in (self.domain, self.mig_domain):
            if not _SUBDOMAIN.fullmatch(domain) or len(domain) > _DOMAIN_MAX:
                raise ValueError(f"{domain!r} is not a DNS subdomain of at most {_DOMAIN_MAX} lower-case characters")

    @property
    def gpu_mem(self) -> str:
        """Name the resource that counts GPU memory units."""
        return f"{self.domain}/gpu-mem"

    def is_granted(self, resource: str) -> bool:
        """Tell whether a container gets *resource* by a grant of the extender's, so that its ids follow a choice."""
        return resource == self.gpu_mem or resource.startswith(self.mig_prefix)

    @property
    def mig_prefix(self) -> str:
        """Say what the resources of MIG instances begin with."""
        return f"{self.mig_domain}/mig-"

    def mig(self, profile: str) -> str:
        """Name the resource that counts instances of a MIG profile, as NVIDIA's plugin does."""
        return f"{self.mig_prefix}{mig_suffix(profile)}"

    def is_gpu(self, resource: str) -> bool:
        """Tell whether *resource* counts GPUs, or parts of them, in whatever way: a container may ask one such."""
        return resource in {self.gpu_mem, "nvidia.com/gpu", "nvidia.com/gpu.shared"} or resource.startswith(
            (self.mig_prefix, f"{NVIDIA_DOMAIN}/mig-", f"{self.domain}/mig-")
        )

    @property
    def managed(self) -> str:
        """Name the resource of quantity 0 that makes kube-scheduler call the extender."""
        return f"{self.domain}/managed"

    @property
    def inventory(self) -> str:
        """Name the node annotation that holds the inventory."""
        return f"{self.domain}/gpus"

    @property
    def profile(self) -> str:
        """Name the node label that selects the device plugin's rules."""
        return f"{self.domain}/device-plugin.config"

    @property
    def grant(self) -> str:
        """Name the pod annotation that holds the grant."""
        return f"{self.domain}/grant"

    @property
    def writer(self) -> str:
        """Name the annotation that says under which term of the writer's Lease a grant was written."""
        return f"{self.domain}/writer"

    @property
    def granted(self) -> str:
        """Name the label of Bindings that carry a grant, by which the API server knows whom to hold to the Lease."""
        return f"{self.domain}/granted"

    @property
    def policy(self) -> str:
        """Name the pod annotation that wishes for a policy."""
        return f"{self.domain}/policy"

    @property
    def isolation(self) -> str:
        """Name the pod annotation that wishes for a least isolation."""
        return f"{self.domain}/isolation"

    @property
    def gpu_model(self) -> str:
        """Name the pod annotation that wishes for a GPU model."""
        return f"{self.domain}/gpu-model"

    @property
    def gpu_uuid(self) -> str:
        """Name the pod annotation that wishes for GPUs by UUID."""
        return f"{self.domain}/gpu-uuid"

    @property
    def gpu_count(self) -> str:
        """Name the pod annotation that says over how many GPUs each container's memory is split."""
        return f"{self.domain}/gpu-count"

    @property
    def compute_percent(self) -> str:
        """Name the pod annotation that caps the share of a GPU's threads."""
        return f"{self.domain}/compute-percent"

    @property
    def gpu_cordon(self) -> str:
        """Name the node annotation by which an administrator keeps GPUs from new pods."""
        return f"{self.domain}/gpu-cordon"

    @property
    def gpu_faults(self) -> str:
        """Name the node annotation that keeps the troubles of GPUs that need a reset or a reboot."""
        return f"{self.domain}/gpu-faults"

    @property
    def overusers(self) -> str:
        """Name the node annotation that reports containers which use more GPU memory than they were granted."""
        return f"{self.domain}/gpu-mem-overusers"

    @property
    def used(self) -> str:
        """Name the node annotation that tells how much of each GPU is in use."""
        return f"{self.domain}/gpu-mem-used"

    @property
    def overuse(self) -> str:
        """Name the pod annotation that says by how much the pod uses more than it was granted."""
        return f"{self.domain}/gpu-mem-overuse"

    # NVIDIA's mig-manager reads and writes these two, so they are the same under every domain.

    @property
    def mig_config(self) -> str:
        """Name the node label that says which geometry its static MIG GPUs are to have."""
        return f"{NVIDIA_DOMAIN}/mig.config"

    @property
    def mig_config_state(self) -> str:
        """Name the node label that says how far that has come: pending, success or failed."""
        return f"{NVIDIA_DOMAIN}/mig.config.state"

    @property
    def vgpu_licensed(self) -> str:
        """Name the node label that says whether all vGPUs of the node have a licence."""
        return f"{self.domain}/vgpu-licensed"

    # One annotation per container: a fieldRef names one annotation and knows nothing of the container that reads it.
    # The prefixes are lower case because an upper-case one passes the Binding unvalidated and then makes every later
    # update of the pod fail with 422 (pkg/registry/core/pod/storage/storage.go, assignPod).

    def visible_devices(self, container: str) -> str:
        """Name the annotation that NVIDIA_VISIBLE_DEVICES of *container* is read from."""
        return f"visible-devices.{self.domain}/{container}"

    def mps_memory(self, container: str) -> str:
        """Name the annotation that CUDA_MPS_PINNED_DEVICE_MEM_LIMIT of *container* is read from."""
        return f"mps-memory.{self.domain}/{container}"

    def mps_threads(self, container: str) -> str:
        """Name the annotation that CUDA_MPS_ACTIVE_THREAD_PERCENTAGE of *container* is read from."""
        return f"mps-threads.{self.domain}/{container}"

    def mps_pipe(self, container: str) -> str:
        """Name the annotation that CUDA_MPS_PIPE_DIRECTORY of *container* is read from."""
        return f"mps-pipe.{self.domain}/{container}"

    def env_prefixes(self) -> tuple[str, ...]:
        """List the prefixes of all annotations that containers read their environment from."""
        return tuple(name("") for name in (self.visible_devices, self.mps_memory, self.mps_threads, self.mps_pipe))


def mig_suffix(profile: str) -> str:
    """Write a MIG profile as resource names and CDI can have it: 1g.5gb+me is 1g.5gb.me."""
    return profile.replace("+", ".")


def is_dns_label(name: str) -> bool:
    """Tell whether *name* could be a container's, so that annotation keys made from it are valid."""
    return _LABEL.fullmatch(name) is not None
