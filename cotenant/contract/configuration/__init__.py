"""Configuration files of both programs."""

from cotenant.contract.configuration.extender import (
    ANY_NAMESPACE,
    TLS,
    ExtenderConfiguration,
    FragmentedPreemption,
    Layout,
    NamespaceLimits,
    NodePool,
    Placement,
    TypicalPod,
    VerbsTLS,
    Writer,
)
from cotenant.contract.configuration.plugin import (
    DeviceListStrategy,
    DevicePluginConfiguration,
    GPURule,
    MIGStrategy,
    MPSSettings,
    check_profile,
    check_shared_resource,
)
from cotenant.contract.configuration.reading import ConfigurationError, convert, load
from cotenant.contract.configuration.shared import is_address

__all__ = [
    "ANY_NAMESPACE",
    "TLS",
    "ConfigurationError",
    "DeviceListStrategy",
    "DevicePluginConfiguration",
    "ExtenderConfiguration",
    "FragmentedPreemption",
    "GPURule",
    "Layout",
    "MIGStrategy",
    "MPSSettings",
    "NamespaceLimits",
    "NodePool",
    "Placement",
    "TypicalPod",
    "VerbsTLS",
    "Writer",
    "check_profile",
    "check_shared_resource",
    "convert",
    "is_address",
    "load",
]
