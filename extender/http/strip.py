"""What a strip is made of, wherever one is drawn."""

import msgspec

from cotenant.contract.units import format_bytes


class Part(msgspec.Struct, frozen=True):
    """Hold a piece of a strip; x and width are percent."""

    x: str
    width: str
    colour: str
    title: str
    text: str


class Use(msgspec.Struct, frozen=True):
    """Hold a piece of the line below a strip in percent; *kind* is track, or within or beyond what is granted."""

    x: str
    width: str
    kind: str


def amount(of_bytes: int) -> str:
    """Write an amount of memory, nothing as 0."""
    return format_bytes(of_bytes) if of_bytes else "0"
