"""What the extender and every device plugin of a cluster must agree on."""

import re
from collections.abc import Callable
from typing import Annotated, TypeVar

import msgspec

from cotenant.contract.names import DEFAULT_DOMAIN, NVIDIA_DOMAIN, Names
from cotenant.contract.units import GIB, MIB, format_bytes, parse_bytes

V = TypeVar("V")
R = TypeVar("R")

_ADDRESS = re.compile(r"(?:[A-Za-z0-9.-]+|\[[0-9A-Fa-f:]+\]):([0-9]{1,5})")
_LAST_PORT = 65535

Seconds = Annotated[float, msgspec.Meta(gt=0, le=600)]


def is_address(text: str) -> bool:
    """Tell whether *text* is HOST:PORT or [HOST]:PORT."""
    match = _ADDRESS.fullmatch(text)
    return match is not None and int(match[1]) <= _LAST_PORT


def read_key(key: str, read: Callable[[V], R], value: V) -> R:
    """Read the value of *key*; what is wrong with it begins with the key, as msgspec's own messages do."""
    try:
        return read(value)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """Refuse unknown keys."""


class Shared(Section, frozen=True, kw_only=True):
    """Hold what the extender and every device plugin of a cluster must agree on."""

    # The prefix of resources and annotations.
    domain: str = DEFAULT_DOMAIN
    # The prefix of the resources that count MIG instances: NVIDIA's, or *domain* beside a plugin that serves those.
    mig_domain: str = NVIDIA_DOMAIN
    # Bytes of one gpu-mem, as "1GiB" or "256MiB". One for the whole cluster: kube-scheduler adds up numbers, not sizes.
    unit: str | int = "1GiB"

    def __post_init__(self) -> None:
        read_key("domain", Names, self.domain)
        read_key("migDomain", Names, self.mig_domain)
        unit = read_key("unit", parse_bytes, self.unit)
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
