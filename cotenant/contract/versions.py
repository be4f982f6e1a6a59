"""Versioned JSON in annotations: read the version first, then the rest strictly.

Decoders are made as modules are imported, here and wherever threads are: msgspec looks through a type when it is first
decoded into, and a second thread that does so meanwhile ends the program (msgspec 0.22: SIGSEGV in 14 of 30 tries).
"""

from typing import TypeVar

import msgspec

# Kubernetes allows 256 KiB for all annotations of an object together.
MAX_LENGTH = 256 << 10


class _Version(msgspec.Struct):
    version: int


T = TypeVar("T", bound=msgspec.Struct)

_version = msgspec.json.Decoder(_Version)
_encode = msgspec.json.Encoder().encode


def encode(value: msgspec.Struct, version: int) -> str:
    """Write *value* as compact JSON that starts with its version."""
    # omit_defaults leaves the version out, since it is every value's default
    fields = _encode(value).decode()[1:-1]
    return f'{{"version":{version}{"," if fields else ""}{fields}}}'


def decode(text: str, decoder: msgspec.json.Decoder[T], version: int) -> T:
    """Read a value written by *encode*; raise ValueError that continues a sentence about the annotation."""
    if len(text) > MAX_LENGTH:
        raise ValueError(f"is longer than the {MAX_LENGTH} characters that Kubernetes allows")
    try:
        found = _version.decode(text).version
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise ValueError(f"is not versioned JSON: {error}") from error
    if found != version:
        raise ValueError(
            f"has version {found}, but this Cotenant reads version {version}: "
            "run the extender and the device plugin of one release"
        )
    try:
        return decoder.decode(text)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise ValueError(f"is not valid: {error}") from error
