"""The configuration of `cotenant-device-plugin`."""

import re
from enum import StrEnum
from typing import Annotated

import msgspec

from cotenant.contract.configuration.shared import Seconds, Section, Shared, is_address, read_key
from cotenant.contract.health import HealthSettings
from cotenant.contract.inventory import Family, Mode
from cotenant.contract.names import ALIASES_IN_GIB, ALIASES_IN_MIB, SHARED
from cotenant.contract.overuse import WatchdogSettings
from cotenant.contract.units import parse_bytes

_MIG_FAMILIES = frozenset({Family.MIG_STATIC, Family.MIG_DYNAMIC})


class DeviceListStrategy(StrEnum):
    """Say how the container runtime learns which GPUs a container gets."""

    ENVVAR = "envvar"
    VOLUME_MOUNTS = "volume-mounts"
    CDI_CRI = "cdi-cri"


class MIGStrategy(StrEnum):
    """Say under which names the instances of static MIG GPUs are offered, as NVIDIA's plugin does."""

    # the GPU whole, as if there was no MIG
    NONE = "none"
    # nvidia.com/gpu, where all are of one profile
    SINGLE = "single"
    # nvidia.com/mig-<profile>
    MIXED = "mixed"


Replicas = Annotated[int, msgspec.Meta(ge=1, le=1000)]


class GPURule(Section, frozen=True, kw_only=True):
    """Put GPUs into a family; a rule names those that meet all it says, and without a word it names every GPU."""

    # Full UUIDs, NVML's indices, and models as in the annotation gpu-model: parts of the name, or patterns with a star.
    uuids: tuple[str, ...] = ()
    indices: tuple[Annotated[int, msgspec.Meta(ge=0)], ...] = ()
    models: tuple[str, ...] = ()
    # Names GPUs whose MIG mode is on, or is not, alone.
    mig_enabled: bool | None = None
    family: Family = Family.MEMORY
    # time-slicing or mps; the MIG families have no choice
    mode: Mode | None = None
    # GPUs under MPS of one group share one control daemon, so that a container may use several of them
    group: Annotated[str, msgspec.Meta(pattern="^([a-z0-9]([-a-z0-9]{0,30}[a-z0-9])?)?$")] = ""
    # Of the family replicas: the resource, how many shares a GPU is, and whether more than one of them is refused. Of
    # mig-static, the same of each instance; of some profiles another number, and whether their name ends in .shared.
    resource: str = ""
    replicas: Replicas = 1
    fail_requests_greater_than_one: bool = False
    profile_replicas: dict[str, Replicas] = msgspec.field(default_factory=dict)
    rename_shared: bool = False

    def __post_init__(self) -> None:
        self._check_shares()
        if self.resource:
            read_key("resource", check_shared_resource, self.resource)
        if self.group and self.mode is not Mode.MPS:
            raise ValueError("group: is for mode mps")
        if self.family is Family.MIG_STATIC and self.mode is Mode.MPS:
            raise ValueError("mode: MIG instances are not shared by MPS, by NVIDIA's plugin neither; leave it out")
        choices = (Mode.MIG,) if self.family in _MIG_FAMILIES else (Mode.TIME_SLICING, Mode.MPS)
        if self.mode is not None and self.mode not in choices:
            raise ValueError(f"mode: expected {' or '.join(choices)} with family {self.family}, got {self.mode}")

    def _check_shares(self) -> None:
        counted = self.replicas > 1 or self.fail_requests_greater_than_one
        if self.family not in {Family.REPLICAS, Family.MIG_STATIC} and counted:
            raise ValueError("replicas and failRequestsGreaterThanOne are for the families replicas and mig-static")
        if self.family is not Family.REPLICAS and self.resource:
            raise ValueError("resource: is for family replicas")
        for profile in self.profile_replicas:
            read_key("profileReplicas", check_profile, profile)
        if self.family is not Family.MIG_STATIC and (self.profile_replicas or self.rename_shared):
            raise ValueError("profileReplicas and renameShared are for family mig-static")

    @property
    def shared_by(self) -> Mode:
        """Say how the GPUs are shared."""
        return self.mode or (Mode.MIG if self.family in _MIG_FAMILIES else Mode.TIME_SLICING)


class MPSSettings(Section, frozen=True, kw_only=True):
    """Say where MPS control daemons live."""

    # NVIDIA's control program, by name or path.
    control: str = "nvidia-cuda-mps-control"
    # Holds a folder for each daemon. The same path on the node, where containers get it from.
    root: str = "/run/cotenant/mps"
    # The node's folder that containers under MPS have as /dev/shm, and this program too; shm in root without a word.
    shm: str = ""
    # Where `cotenant-mps-nursery` listens, in root, which starts daemons that outlive this program; none without it.
    nursery: str = ""

    def __post_init__(self) -> None:
        for key in ("root", "shm", "nursery"):
            path = getattr(self, key)
            if path and not path.startswith("/"):
                raise ValueError(f"{key}: expected an absolute path, got {path!r}")
        if self.nursery and self.nursery.rpartition("/")[0] != self.root:
            raise ValueError(f"nursery: expected a path right in {self.root}, got {self.nursery!r}")

    @property
    def shm_folder(self) -> str:
        """Give the folder for /dev/shm."""
        return self.shm or f"{self.root}/shm"


class DevicePluginConfiguration(Shared, frozen=True, kw_only=True):
    """Configure `cotenant-device-plugin`; a flag of the same name wins over a key."""

    # Bytes of every GPU that are kept from pods, beyond what the driver reserves.
    reserve_per_gpu: str | int = "0"
    device_list_strategy: DeviceListStrategy = DeviceListStrategy.ENVVAR
    # Hand device nodes to the kubelet as well, so that the cgroup still lets the container in after a systemd reload.
    pass_device_specs: bool = False
    # The CDI kind that `cdi-cri` names devices of; their name is the GPU's UUID.
    cdi_kind: str = "nvidia.com/gpu"
    # How each GPU is counted and shared: the first rule that names it decides. Without one, by memory and in turns.
    gpus: tuple[GPURule, ...] = ()
    # How instances of GPUs in the family mig-static are called.
    mig_strategy: MIGStrategy = MIGStrategy.MIXED
    # Named geometries of static MIG GPUs, in mig-parted's format; the node label nvidia.com/mig.config chooses one.
    mig_configs: str | None = None
    # Where the container runtime looks for CDI specs; those of instances that are made for pods are written there.
    cdi_directory: str = "/var/run/cdi"
    # Where the driver's own CDI spec may lie besides, which says what every container gets of the driver.
    cdi_static_directories: tuple[str, ...] = ("/etc/cdi",)
    # Rules instead of those of gpus, by the value of the node's label DOMAIN/device-plugin.config.
    profiles: dict[str, tuple[GPURule, ...]] = msgspec.field(default_factory=dict)
    # NVIDIA's sharing configuration, a file or a folder of them, for the GPUs that no rule of gpus names.
    nvidia_config: str = ""
    mps: MPSSettings = MPSSettings()
    # How often NVML is asked whether the GPUs are still what they were.
    inventory_interval: Seconds = 10.0
    # Seconds at least between two notes on the node of how much is in use of its GPUs; 0 writes none.
    used_memory_interval: Annotated[float, msgspec.Meta(ge=0, le=3600)] = 60.0
    # What makes a GPU unhealthy, and healthy again.
    health: HealthSettings = HealthSettings()
    # Watches who uses how much memory of the GPUs.
    watchdog: WatchdogSettings = WatchdogSettings()
    # Where metrics and health are answered; nowhere without it.
    serve: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.serve is not None and not is_address(self.serve):
            raise ValueError(f"serve: expected HOST:PORT, such as 127.0.0.1:9482, got {self.serve!r}")
        read_key("reservePerGpu", parse_bytes, self.reserve_per_gpu)
        for folder in self.cdi_static_directories:
            if not folder.startswith("/"):
                raise ValueError(f"cdiStaticDirectories: expected absolute paths, got {folder!r}")
        named = (rule for rules in self.profiles.values() for rule in rules)
        dynamic = any(rule.family is Family.MIG_DYNAMIC for rule in (*self.gpus, *named))
        if dynamic and self.device_list_strategy is not DeviceListStrategy.CDI_CRI:
            raise ValueError(
                "deviceListStrategy: expected cdi-cri with a rule of family mig-dynamic, whose instances are made "
                f"after the kubelet has been answered; got {self.device_list_strategy}"
            )

    @property
    def reserve_per_gpu_bytes(self) -> int:
        """Give the bytes of every GPU that are kept from pods."""
        return parse_bytes(self.reserve_per_gpu)


# A qualified name, whose domain is not kubernetes.io (pkg/apis/core/v1/helper, IsExtendedResourceName).
_RESOURCE = re.compile(r"[a-z0-9]([-a-z0-9.]{0,200}[a-z0-9])?/[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")


# NVIDIA's names (nvmlGpuInstanceProfileInfo_v2_t), and as its plugin writes them in resources.
_PROFILE = re.compile(r"[1-9][0-9]?g\.[1-9][0-9]{0,3}gb([-+.][a-z]{1,8}){0,3}")


def check_profile(name: str) -> str:
    """Give *name* if it can be a MIG profile's; raise ValueError with a sentence otherwise."""
    if not _PROFILE.fullmatch(name) or name.endswith(SHARED):
        raise ValueError(f"expected a MIG profile, such as 1g.5gb, got {name[:80]!r}")
    return name


def check_shared_resource(name: str) -> str:
    """Give *name* if shares of GPUs can be advertised under it; raise ValueError with a sentence otherwise."""
    domain, _, rest = name.partition("/")
    if not _RESOURCE.fullmatch(name) or domain.endswith("kubernetes.io"):
        raise ValueError(f"expected the name of an extended resource, such as nvidia.com/gpu.shared, got {name[:80]!r}")
    if name in {*ALIASES_IN_GIB, *ALIASES_IN_MIB} or rest in {"gpu-mem", "managed"} or rest.startswith("mig-"):
        raise ValueError(f"{name} means something else than shares of GPUs")
    return name
