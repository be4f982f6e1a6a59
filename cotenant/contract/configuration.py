"""Configuration files: YAML read strictly, so that a typo stops the program instead of being ignored."""

import re
from collections.abc import Callable, Hashable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import yaml

from cotenant.contract.health import HealthSettings
from cotenant.contract.inventory import Family, Mode
from cotenant.contract.names import ALIASES_IN_GIB, ALIASES_IN_MIB, DEFAULT_DOMAIN, NVIDIA_DOMAIN, Names
from cotenant.contract.overuse import WatchdogSettings
from cotenant.contract.units import GIB, MIB, format_bytes, parse_bytes, parse_milli

T = TypeVar("T", bound=msgspec.Struct)
V = TypeVar("V")
R = TypeVar("R")

_ADDRESS = re.compile(r"(?:[A-Za-z0-9.-]+|\[[0-9A-Fa-f:]+\]):([0-9]{1,5})")
_OBJECT = re.compile(r"[a-z0-9][-a-z0-9.]*/[a-z0-9][-a-z0-9.]*")
_LAST_PORT = 65535


_MIG_FAMILIES = frozenset({Family.MIG_STATIC, Family.MIG_DYNAMIC})


class ConfigurationError(ValueError):
    """Say which key of which file is wrong, what was expected and what was found."""


def is_address(text: str) -> bool:
    """Tell whether *text* is HOST:PORT or [HOST]:PORT."""
    match = _ADDRESS.fullmatch(text)
    return match is not None and int(match[1]) <= _LAST_PORT


def _read(key: str, read: Callable[[V], R], value: V) -> R:
    """Read the value of *key*; what is wrong with it begins with the key, as msgspec's own messages do."""
    try:
        return read(value)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """Refuse unknown keys."""


class _Shared(_Section, frozen=True, kw_only=True):
    """Hold what the extender and every device plugin of a cluster must agree on."""

    # The prefix of resources and annotations.
    domain: str = DEFAULT_DOMAIN
    # The prefix of the resources that count MIG instances: NVIDIA's, or *domain* beside a plugin that serves those.
    mig_domain: str = NVIDIA_DOMAIN
    # Bytes of one gpu-mem, as "1GiB" or "256MiB". One for the whole cluster: kube-scheduler adds up numbers, not sizes.
    unit: str | int = "1GiB"

    def __post_init__(self) -> None:
        _read("domain", Names, self.domain)
        _read("migDomain", Names, self.mig_domain)
        unit = _read("unit", parse_bytes, self.unit)
        if unit < MIB or unit % MIB or unit > 1024 * GIB:
            raise ValueError(f"unit: expected whole MiB from 1MiB to 1TiB, got {format_bytes(unit)}")

    @property
    def names(self) -> Names:
        """Give the names under the configured domain."""
        return Names(self.domain, self.mig_domain)

    @property
    def unit_bytes(self) -> int:
        """Give the bytes of one unit."""
        return parse_bytes(self.unit)


class Placement(StrEnum):
    """Say who has the last word: ADVISE leaves it to all scorers, DECIDE returns the best node alone."""

    ADVISE = "advise"
    DECIDE = "decide"


class Layout(StrEnum):
    """Say which scheduler calls us: a second one of our own, or the cluster's."""

    SECOND_SCHEDULER = "second-scheduler"
    ATTACHED = "attached"


class TLS(_Section, frozen=True, kw_only=True):
    """Name the certificate that `serve` shows; the API server calls webhooks by HTTPS only."""

    cert_file: str
    key_file: str


class VerbsTLS(TLS, frozen=True, kw_only=True):
    """Name the certificate that `listen` shows, and the authority of those who may call it."""

    client_ca_file: str = msgspec.field(name="clientCAFile")


Seconds = Annotated[float, msgspec.Meta(gt=0, le=600)]


class Writer(_Section, frozen=True, kw_only=True):
    """Name the Lease whose holder is the one extender that may bind, and how it is held.

    In the layout second-scheduler kube-scheduler holds it, and the extender beside it in its pod follows; in the layout
    attached the extender holds it itself, and the last three keys say how, as those of kube-scheduler's leaderElection.
    """

    # NAMESPACE/NAME
    lease: str
    # How long API servers may go on taking the last holder's word after a take-over: until then nothing is bound.
    settle: Seconds = 1.0
    lease_duration: Seconds = 3.0
    renew_deadline: Seconds = 2.0
    retry_period: Seconds = 0.5

    def __post_init__(self) -> None:
        if not _OBJECT.fullmatch(self.lease):
            raise ValueError(f"lease: expected NAMESPACE/NAME, got {self.lease!r}")
        if not self.retry_period < self.renew_deadline < self.lease_duration:
            raise ValueError(
                "expected retryPeriod < renewDeadline < leaseDuration, got "
                f"{self.retry_period:g}, {self.renew_deadline:g} and {self.lease_duration:g}"
            )

    @property
    def namespace(self) -> str:
        """Give the Lease's namespace."""
        return self.lease.partition("/")[0]

    @property
    def name(self) -> str:
        """Give the Lease's name."""
        return self.lease.partition("/")[2]


class TypicalPod(_Section, frozen=True, kw_only=True):
    """Describe pods that are alike, of which *weight* come where others come with theirs."""

    weight: Annotated[int, msgspec.Meta(ge=1, le=1000)]
    # Of each of its GPUs, as "8GiB"; and what it asks besides, as Kubernetes writes it.
    memory: str | int = 0
    gpus: Annotated[int, msgspec.Meta(ge=0, le=64)] = 1
    cpu: str | int = 0
    # As in the annotation gpu-model; empty for any.
    models: tuple[str, ...] = ()
    # Whether it wants its GPUs for itself.
    alone: bool = False

    def __post_init__(self) -> None:
        _read("memory", parse_bytes, self.memory)
        if _read("cpu", parse_milli, self.cpu) < 0:
            raise ValueError(f"cpu: {self.cpu!r} is negative")
        if self.gpus and not (self.memory_bytes or self.alone):
            raise ValueError("memory: a pod with GPUs asks some memory of each, or wants them alone")

    @property
    def memory_bytes(self) -> int:
        """Give the bytes of each GPU."""
        return parse_bytes(self.memory)

    @property
    def cpu_milli(self) -> int:
        """Give thousandths of a core."""
        return parse_milli(self.cpu)


class ExtenderConfiguration(_Shared, frozen=True, kw_only=True):
    """Configure `cotenant-extender`; a flag of the same name wins over a key."""

    # Where filter, prioritize and bind are answered. Loopback: whoever reaches it can bind pods.
    listen: str = "127.0.0.1:9480"
    # Where everything else is answered: health, version, metrics, admission.
    serve: str = "127.0.0.1:9481"
    tls: TLS | None = None
    # By which kube-scheduler has to call `listen`, with a certificate of its own; read again when the files change.
    verbs_tls: VerbsTLS | None = msgspec.field(name="verbsTLS", default=None)
    placement: Placement = Placement.ADVISE
    # The policy that chooses GPUs and scores nodes, where the pod names none.
    policy: str = "priced-leftovers"
    # Another policy whose placements are worked out beside, for metrics alone.
    shadow: str | None = None
    # The pods that policies expect; null: learned from those that came last.
    mix: Annotated[tuple[TypicalPod, ...], msgspec.Meta(min_length=1, max_length=200)] | None = None
    layout: Layout = Layout.SECOND_SCHEDULER
    # The scheduler that admission gives our pods to, in the layout second-scheduler.
    scheduler_name: str = "cotenant-scheduler"
    # Who may write grants, as the API server names them; the admission webhook refuses everybody else.
    extender_user: str = "system:serviceaccount:cotenant-system:cotenant-extender"
    # Where several extenders stand by, the Lease that says which of them binds; without it there must be one only.
    writer: Writer | None = None
    # How long one bind may take before kube-scheduler is told that its outcome is unknown. Below its httpTimeout.
    bind_timeout: Seconds = 10.0
    # Point kube-scheduler at a node that fits when none of its sample does (status.nominatedNodeName).
    nominate: bool = True
    # Evict pods that use more GPU memory than they were granted for so many seconds; null: never.
    evict_overusers_after: Seconds | None = None
    # Show every GPU and pod in /metrics, not nodes and sums alone: four samples a GPU and one a pod.
    gpu_metrics: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("listen", "serve"):
            if not is_address(getattr(self, key)):
                raise ValueError(f"{key}: expected HOST:PORT, such as 127.0.0.1:9480, got {getattr(self, key)!r}")
        if self.verbs_tls is not None and self.listen == self.serve and not self.listen.endswith(":0"):
            raise ValueError("verbsTLS: needs an address of its own; give listen and serve different ones")


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


class GPURule(_Section, frozen=True, kw_only=True):
    """Put GPUs into a family; a rule names those that meet all it says, and without a word it names every GPU."""

    # Full UUIDs, NVML's indices, and models as in the annotation gpu-model: parts of the name, or patterns with a star.
    uuids: tuple[str, ...] = ()
    indices: tuple[Annotated[int, msgspec.Meta(ge=0)], ...] = ()
    models: tuple[str, ...] = ()
    family: Family = Family.MEMORY
    # time-slicing or mps; the MIG families have no choice
    mode: Mode | None = None
    # GPUs under MPS of one group share one control daemon, so that a container may use several of them
    group: Annotated[str, msgspec.Meta(pattern="^([a-z0-9]([-a-z0-9]{0,30}[a-z0-9])?)?$")] = ""
    # Of the family replicas: the resource, how many shares a GPU is, and whether more than one of them is refused.
    resource: str = ""
    replicas: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 1
    fail_requests_greater_than_one: bool = False

    def __post_init__(self) -> None:
        if self.family is not Family.REPLICAS and (
            self.resource or self.replicas > 1 or self.fail_requests_greater_than_one
        ):
            raise ValueError("resource, replicas and failRequestsGreaterThanOne are for family replicas")
        if self.resource:
            _read("resource", check_shared_resource, self.resource)
        if self.group and self.mode is not Mode.MPS:
            raise ValueError("group: is for mode mps")
        choices = (Mode.MIG,) if self.family in _MIG_FAMILIES else (Mode.TIME_SLICING, Mode.MPS)
        if self.mode is not None and self.mode not in choices:
            raise ValueError(f"mode: expected {' or '.join(choices)} with family {self.family}, got {self.mode}")

    @property
    def shared_by(self) -> Mode:
        """Say how the GPUs are shared."""
        return self.mode or (Mode.MIG if self.family in _MIG_FAMILIES else Mode.TIME_SLICING)


class MPSSettings(_Section, frozen=True, kw_only=True):
    """Say where MPS control daemons live."""

    # NVIDIA's control program, by name or path.
    control: str = "nvidia-cuda-mps-control"
    # Holds a folder for each daemon. The same path on the node, where containers get it from.
    root: str = "/run/cotenant/mps"
    # The node's folder that containers under MPS have as /dev/shm, and this program too; shm in root without a word.
    shm: str = ""

    def __post_init__(self) -> None:
        for key in ("root", "shm"):
            path = getattr(self, key)
            if path and not path.startswith("/"):
                raise ValueError(f"{key}: expected an absolute path, got {path!r}")

    @property
    def shm_folder(self) -> str:
        """Give the folder for /dev/shm."""
        return self.shm or f"{self.root}/shm"


class DevicePluginConfiguration(_Shared, frozen=True, kw_only=True):
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
    # Rules instead of those of gpus, by the value of the node's label DOMAIN/device-plugin.config.
    profiles: dict[str, tuple[GPURule, ...]] = msgspec.field(default_factory=dict)
    # NVIDIA's sharing configuration, a file or a folder of them, for the GPUs that no rule of gpus names.
    nvidia_config: str = ""
    mps: MPSSettings = MPSSettings()
    # How often NVML is asked whether the GPUs are still what they were.
    inventory_interval: Seconds = 10.0
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
        _read("reservePerGpu", parse_bytes, self.reserve_per_gpu)
        dynamic = any(rule.family is Family.MIG_DYNAMIC for rule in self.gpus)
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


def check_shared_resource(name: str) -> str:
    """Give *name* if shares of GPUs can be advertised under it; raise ValueError with a sentence otherwise."""
    domain, _, rest = name.partition("/")
    if not _RESOURCE.fullmatch(name) or domain.endswith("kubernetes.io"):
        raise ValueError(f"expected the name of an extended resource, such as nvidia.com/gpu.shared, got {name[:80]!r}")
    if name in {*ALIASES_IN_GIB, *ALIASES_IN_MIB} or rest in {"gpu-mem", "managed"} or rest.startswith("mig-"):
        raise ValueError(f"{name} means something else than shares of GPUs")
    return name


def load(path: str | Path | None, kind: type[T]) -> T:
    """Read a configuration file; without one, give the defaults.

    Raises ConfigurationError when it cannot be read, is no YAML, repeats a key, or has an unknown key or a wrong type.
    """
    if path is None:
        return kind()
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise ConfigurationError(f"{path}: cannot be read: {error}") from error
    try:
        return convert(text, kind)
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error}") from error


def convert(text: str, kind: type[T]) -> T:
    """Read a configuration from YAML text; raise ConfigurationError as *load* does."""
    try:
        found = yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - a SafeLoader that also refuses repeated keys
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"is not valid YAML: {' '.join(str(error).split())}") from error
    try:
        return msgspec.convert({} if found is None else found, kind)
    except msgspec.ValidationError as error:
        raise ConfigurationError(_sentence(str(error))) from error


class _StrictLoader(yaml.SafeLoader):
    """Load plain YAML, but refuse a key that stands twice: PyYAML would let the last one win."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:  # noqa: FBT001, FBT002 - PyYAML's
        """Make the value of *node*; PyYAML trips over `!!int ""`, `!!bool maybe` and `!!timestamp soon`."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError) as error:
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(None, None, f"the value is no {kind}", node.start_mark) from error


def _mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Hashable, Any]:
    seen: set[str] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is no text", key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)

_UNKNOWN = re.compile(r"Object contains unknown field `(?P<key>.*?)`(?: - at `\$\.?(?P<path>.*)`)?")
_MISSING = re.compile(r"Object missing required field `(?P<key>.*?)`(?: - at `\$\.?(?P<path>.*)`)?")
_AT = re.compile(r"(?P<what>.*?)(?: - at `(?P<key>key in )?\$\.?(?P<path>.*)`)?", re.DOTALL)


def _sentence(problem: str) -> str:
    """Turn msgspec's message into "path.to.key: what was expected"."""
    if match := _UNKNOWN.fullmatch(problem):
        return f"{_join(match)}: unknown key"
    if match := _MISSING.fullmatch(problem):
        return f"{_join(match)}: missing, but required"
    match = _AT.fullmatch(problem)
    what, path = (match["what"], match["path"]) if match else (problem, None)
    what = what.replace("`", "").replace("Expected", "expected", 1).replace("Invalid enum value", "unknown value", 1)
    return f"{path}: {what}" if path else what


def _join(match: re.Match[str]) -> str:
    return f"{match['path']}.{match['key']}" if match["path"] else match["key"]
