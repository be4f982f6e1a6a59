"""NVIDIA's sharing configuration file, version v1, as rules of ours; pure.

The keys are those of NVIDIA's device plugin 0.20 (api/config/v1): what it takes is taken, unknown keys are refused with
their path, and what has no meaning here is said in a warning instead of being ignored.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

import msgspec

from cotenant.contract import configuration
from cotenant.contract.configuration import (
    ConfigurationError,
    GPURule,
    MIGStrategy,
    check_profile,
    check_shared_resource,
)
from cotenant.contract.inventory import Family, Mode
from cotenant.contract.names import NVIDIA_DOMAIN, SHARED
from cotenant.contract.request import MAX_GPUS
from device_plugin.families.rules import NVIDIA_GPU

# What is ignored without a word, since it has no bearing on who gets which GPU: discovery and labels are others' work.
_SILENT = frozenset({"gfd", "useNodeFeatureAPI", "deviceDiscoveryStrategy", "failOnInitError", "migStrategy"})
_INDEX = re.compile("[0-9]{1,4}")
_UUID = re.compile(r"GPU-[0-9A-Fa-f-]{1,60}")
_MIG = re.compile(r"MIG-.{1,100}|[0-9]{1,4}:[0-9]{1,4}")
_MIG_RESOURCE = f"{NVIDIA_DOMAIN}/mig-"


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """Refuse unknown keys."""


class _PluginFlags(_Section, frozen=True, kw_only=True):
    pass_device_specs: bool | None = None
    device_list_strategy: str | tuple[str, ...] | None = None
    device_id_strategy: str | None = msgspec.field(name="deviceIDStrategy", default=None)
    cdi_annotation_prefix: str | None = None
    nvidia_ctk_path: str | None = msgspec.field(name="nvidiaCTKPath", default=None)
    nvidia_cdi_hook_path: str | None = msgspec.field(name="nvidiaCDIHookPath", default=None)
    container_driver_root: str | None = None
    shared_devices_allocation_policy: Literal["distributed", "packed"] = "distributed"


class _GFDFlags(_Section, frozen=True, kw_only=True):
    oneshot: bool | None = None
    no_timestamp: bool | None = None
    sleep_interval: str | int | None = None
    output_file: str | None = None
    machine_type_file: str | None = None


class _Flags(_Section, frozen=True, kw_only=True):
    mig_strategy: Literal["none", "single", "mixed"] | None = None
    fail_on_init_error: bool | None = None
    mps_root: str | None = None
    nvidia_driver_root: str | None = None
    nvidia_dev_root: str | None = None
    gdrcopy_enabled: bool | None = None
    gds_enabled: bool | None = None
    mofed_enabled: bool | None = None
    use_node_feature_api: bool | None = msgspec.field(name="useNodeFeatureAPI", default=None)
    device_discovery_strategy: str | None = None
    plugin: _PluginFlags | None = None
    gfd: _GFDFlags | None = None


class _Pattern(_Section, frozen=True, kw_only=True):
    pattern: str
    name: str


class _Resources(_Section, frozen=True, kw_only=True):
    gpus: tuple[_Pattern, ...] = ()
    mig: tuple[_Pattern, ...] = ()


class _Shared(_Section, frozen=True, kw_only=True):
    name: str
    replicas: Annotated[int, msgspec.Meta(ge=1, le=1000)]
    rename: str = ""
    devices: Literal["all"] | int | tuple[str | int, ...] = "all"


class _Sharing(_Section, frozen=True, kw_only=True):
    """Describe one way of sharing; *replicas* is a shorthand for one resource, NVIDIA's own GPU."""

    rename_by_default: bool = False
    fail_requests_greater_than_one: bool | None = None
    resources: tuple[_Shared, ...] | None = None
    replicas: Annotated[int, msgspec.Meta(ge=1, le=1000)] | None = None


class _Both(_Section, frozen=True, kw_only=True):
    time_slicing: _Sharing | None = None
    mps: _Sharing | None = None


class _IMEX(_Section, frozen=True, kw_only=True):
    channel_ids: tuple[int, ...] = msgspec.field(name="channelIDs", default=())
    required: bool = False


class _File(_Section, frozen=True, kw_only=True):
    version: Literal["v1"]
    flags: _Flags | None = None
    resources: _Resources | None = None
    sharing: _Both | None = None
    imex: _IMEX | None = None


class NVIDIASharing(NamedTuple):
    """Hold what a file says: rules for GPUs, the last of which names all, and what is not done of it."""

    rules: tuple[GPURule, ...]
    packed: bool
    warnings: tuple[str, ...]
    # how MIG instances are named; None where the file leaves MIG GPUs alone
    mig_strategy: MIGStrategy | None


def read(text: str) -> NVIDIASharing:
    """Read NVIDIA's file; raise ConfigurationError with the path of what is wrong and a sentence."""
    found = configuration.convert(text, _File)
    warnings: list[str] = []
    rules: list[GPURule] = []
    sharing = found.sharing or _Both()
    both = [
        (name, mode, how)
        for name, mode, how in (
            ("timeSlicing", Mode.TIME_SLICING, sharing.time_slicing),
            ("mps", Mode.MPS, sharing.mps),
        )
        if how is not None and (how.resources or how.replicas is not None)
    ]
    if len(both) > 1:
        raise ConfigurationError("sharing: timeSlicing and mps exclude each other; rules of `gpus` can mix them")
    strategy = MIGStrategy((found.flags or _Flags()).mig_strategy or MIGStrategy.NONE)
    ways = [(f"sharing.{name}", mode, how, _resources(f"sharing.{name}", how, warnings)) for name, mode, how in both]
    if strategy is not MIGStrategy.NONE:
        rules.append(_instances(ways, strategy, warnings))
    for way in ways:
        rules += _rules(way, strategy, warnings)
    rules.append(GPURule(family=Family.REPLICAS, resource=NVIDIA_GPU))
    warnings += _without_meaning(found)
    plugin = (found.flags or _Flags()).plugin or _PluginFlags()
    return NVIDIASharing(
        tuple(rules),
        plugin.shared_devices_allocation_policy == "packed",
        tuple(warnings),
        None if strategy is MIGStrategy.NONE else strategy,
    )


# A way of sharing: where it stands, the mode, what it says, and its resources.
_Way: TypeAlias = tuple[str, Mode, _Sharing, tuple[_Shared, ...]]


def _resources(path: str, how: _Sharing, warnings: list[str]) -> tuple[_Shared, ...]:
    """List what is shared in one way."""
    resources = how.resources or ()
    if how.replicas is not None:
        if how.resources is not None:
            raise ConfigurationError(f"{path}.replicas: stands beside resources, which have replicas of their own")
        warnings.append(f"{path}.replicas without resources is taken for {NVIDIA_GPU}; write resources with a name")
        resources = (_Shared(name=NVIDIA_GPU, replicas=how.replicas),)
    for name, count in Counter(_full(shared.name) for shared in resources).items():
        if count > 1:
            raise ConfigurationError(f"{path}.resources: {name} stands {count} times")
    return resources


def _instances(ways: Sequence[_Way], strategy: MIGStrategy, warnings: list[str]) -> GPURule:
    """Make the rule of GPUs whose MIG mode is on: their instances are offered, whole or in shares."""
    replicas, profiles, renamed, single = 1, {}, False, False
    for path, mode, how, resources in ways:
        for n, shared in enumerate(resources):
            name, at = _full(shared.name), f"{path}.resources[{n}]"
            profile = name.removeprefix(_MIG_RESOURCE) if name.startswith(_MIG_RESOURCE) else ""
            if bool(profile) is not (strategy is MIGStrategy.MIXED) or mode is Mode.MPS:
                continue
            if shared.rename not in {"", name + SHARED}:
                warnings.append(f"{at}.rename: is not used for MIG instances; renameByDefault makes it {name}{SHARED}")
            if shared.devices != "all" and profile:
                raise ConfigurationError(
                    f"{at}.devices: expected all for MIG instances; rules of `gpus` tell GPUs apart"
                )
            renamed = renamed or how.rename_by_default or shared.rename == name + SHARED
            single = bool(how.fail_requests_greater_than_one)
            if profile:
                profiles[profile] = shared.replicas
            else:
                replicas = shared.replicas
    return GPURule(
        mig_enabled=True,
        family=Family.MIG_STATIC,
        replicas=replicas,
        profile_replicas=profiles,
        rename_shared=renamed,
        fail_requests_greater_than_one=single,
    )


def _rules(way: _Way, strategy: MIGStrategy, warnings: list[str]) -> Iterator[GPURule]:
    """Make rules of whole GPUs of one way of sharing."""
    path, mode, how, resources = way
    # as NVIDIA's plugin has it: under MPS a container can have one share alone
    single = how.fail_requests_greater_than_one
    single = mode is Mode.MPS if single is None else single
    for n, shared in enumerate(resources):
        at = f"{path}.resources[{n}]"
        if _full(shared.name).startswith(_MIG_RESOURCE):
            _check_instance(at, _full(shared.name), mode, strategy, warnings)
            continue
        resource = _resource(at, shared, rename_by_default=how.rename_by_default)
        for uuids, indices in _devices(f"{at}.devices", shared.devices):
            yield GPURule(
                uuids=uuids,
                indices=indices,
                family=Family.REPLICAS,
                mode=mode,
                resource=resource,
                replicas=shared.replicas,
                fail_requests_greater_than_one=single,
            )


def _check_instance(path: str, name: str, mode: Mode, strategy: MIGStrategy, warnings: list[str]) -> None:
    """Say what is wrong with an entry about MIG instances."""
    try:
        check_profile(name.removeprefix(_MIG_RESOURCE))
    except ValueError as error:
        raise ConfigurationError(f"{path}.name: {error}") from error
    if mode is Mode.MPS:
        raise ConfigurationError(
            f"{path}: MIG instances are not shared by MPS, by NVIDIA's plugin neither; share them under "
            "sharing.timeSlicing, or take the entry out"
        )
    if strategy is not MIGStrategy.MIXED:
        warnings.append(f"{path}: {name} is offered with flags.migStrategy mixed alone, and it is {strategy}")


def _resource(path: str, shared: _Shared, *, rename_by_default: bool) -> str:
    """Say under which name the shares of an entry are advertised."""
    name = _full(shared.name)
    if name != NVIDIA_GPU:
        raise ConfigurationError(f"{path}.name: expected {NVIDIA_GPU} or nvidia.com/mig-PROFILE, got {name[:80]!r}")
    try:
        return check_shared_resource(_full(shared.rename or (name + SHARED if rename_by_default else name)))
    except ValueError as error:
        raise ConfigurationError(f"{path}.rename: {error}") from error


def _full(name: str) -> str:
    """Complete a resource's name as NVIDIA's plugin does."""
    return name if name.startswith(f"{NVIDIA_DOMAIN}/") else f"{NVIDIA_DOMAIN}/{name}"


def _devices(
    path: str, devices: str | int | tuple[str | int, ...]
) -> Iterator[tuple[tuple[str, ...], tuple[int, ...]]]:
    """Say which GPUs an entry names, as UUIDs and indices, of which one is empty; both for all."""
    if isinstance(devices, str):
        yield (), ()  # all
    elif isinstance(devices, int):
        if not 1 <= devices <= MAX_GPUS:
            raise ConfigurationError(f"{path}: expected all, a number from 1 to {MAX_GPUS} or a list, got {devices}")
        yield (), tuple(range(devices))
    else:
        named = [_device(f"{path}[{n}]", str(device)) for n, device in enumerate(devices)]
        indices = tuple(one for one in named if isinstance(one, int))
        uuids = tuple(one for one in named if isinstance(one, str))
        if not named:
            raise ConfigurationError(f"{path}: the list is empty; leave the entry out to share no GPU")
        if indices:
            yield (), indices
        if uuids:
            yield uuids, ()


def _device(path: str, text: str) -> str | int:
    """Read an index or a UUID."""
    if _INDEX.fullmatch(text):
        return int(text)
    if _UUID.fullmatch(text):
        return text
    if _MIG.fullmatch(text):
        raise ConfigurationError(f"{path}: {text[:80]} is a MIG instance, which is not shared")
    raise ConfigurationError(f"{path}: expected an index or the UUID of a GPU, got {text[:80]!r}")


def _without_meaning(found: _File) -> Iterator[str]:
    """Say which keys with a value have no meaning here."""
    if found.resources is not None:
        yield "resources: is ignored, as NVIDIA's plugin does; name resources in rules of `gpus`"
    if found.imex is not None and (found.imex.channel_ids or found.imex.required):
        yield "imex: is not served"
    flags: dict[str, Any] = msgspec.to_builtins(found.flags) if found.flags is not None else {}
    plugin = flags.pop("plugin", None) or {}
    for key, value in flags.items():
        if key not in _SILENT and value:
            yield f"flags.{key}: is not used; docs/modes.md says what stands for it"
    for key, value in plugin.items():
        if key != "sharedDevicesAllocationPolicy" and value:
            yield f"flags.plugin.{key}: is not used; docs/modes.md says what stands for it"
