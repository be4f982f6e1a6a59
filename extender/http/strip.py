"""What a strip is made of, wherever one is drawn."""

import msgspec

from cotenant.contract.units import format_bytes

# A part narrower than this, in percent of the strip, has no room for a name.
_NAMED_FROM = 9


class Part(msgspec.Struct, frozen=True):
    """Hold a piece of a strip; x and width are percent."""

    x: str
    width: str
    colour: str
    title: str
    text: str


def part(start: float, size: float, whole: float, *, colour: str, title: str, text: str) -> Part:
    """Draw *size* of *whole* from *start* on, with *text* where it has room."""
    width = 100 * size / whole
    return Part(f"{100 * start / whole:.2f}", f"{width:.2f}", colour, title, text if width >= _NAMED_FROM else "")


class Use(msgspec.Struct, frozen=True):
    """Hold a piece of the line below a strip in percent; *kind* is track, or within or beyond what is granted."""

    x: str
    width: str
    kind: str


def amount(of_bytes: int) -> str:
    """Write an amount of memory, nothing as 0."""
    return format_bytes(of_bytes) if of_bytes else "0"
