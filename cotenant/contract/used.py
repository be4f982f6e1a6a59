"""How much is in use of each GPU of a node: the annotation by which a device plugin tells it, coarsely and seldom.

For people alone: nothing is placed by it, since what is in use now says nothing of what a pod will use in a minute.
"""

from typing import Annotated

import msgspec

from cotenant.contract import versions
from cotenant.contract.inventory import Bytes, Text

VERSION = 1

# More than any node has.
MAX_GPUS = 256


class UsedMemory(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Hold the bytes in use by GPU UUID, by whomever; a GPU of which NVML does not tell is left out."""

    version: int = VERSION
    used: Annotated[dict[Text, Bytes], msgspec.Meta(max_length=MAX_GPUS)] = {}


_decoder = msgspec.json.Decoder(UsedMemory)


def encode(told: UsedMemory) -> str:
    """Write the node annotation."""
    return versions.encode(told, VERSION)


def decode(text: str) -> UsedMemory:
    """Read the node annotation; raise ValueError with a sentence."""
    try:
        return versions.decode(text, _decoder, VERSION)
    except ValueError as error:
        raise ValueError(f"the node's note of used memory {error}") from error
