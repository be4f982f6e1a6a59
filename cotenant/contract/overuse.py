"""Who uses more GPU memory than it was granted: the node annotation by which a device plugin reports it."""

from typing import Annotated

import msgspec

from cotenant.contract import versions
from cotenant.contract.inventory import Bytes, Text
from cotenant.contract.units import MIB, format_bytes, parse_bytes

VERSION = 1

# A report is rewritten this often while somebody stands in it. The extender takes an older one for no report.
BEAT_SECONDS = 15.0
# So many are reported; a node with more has other troubles.
MAX_USERS = 100


class WatchdogSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """Say how the device plugin watches who uses how much."""

    # Seconds between two looks at the processes; 0 never looks. It takes the node's PID namespace (hostPID), so whoever
    # wants it turns both on (docs/decisions/0061-watchdog-by-choice.md).
    interval: Annotated[float, msgspec.Meta(ge=0, le=3600)] = 0.0
    # What a container may use beyond its grant before it is told of. CUDA itself takes some hundred MiB per process,
    # which no program asks for.
    margin: str | int = "512MiB"

    def __post_init__(self) -> None:
        try:
            parse_bytes(self.margin)
        except ValueError as error:
            raise ValueError(f"margin: {error}") from error

    @property
    def margin_bytes(self) -> int:
        """Give the margin in bytes."""
        return parse_bytes(self.margin)


class _Wire(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Refuse unknown fields."""


class Overuser(_Wire, frozen=True, kw_only=True):
    """Name a container that uses more of a GPU than it was granted; *used* is the most that was seen."""

    uid: Text
    # "" where it is not known which of the pod's it is
    container: str = ""
    gpu: Text
    granted_bytes: Bytes = msgspec.field(name="granted")
    used_bytes: Bytes = msgspec.field(name="used")

    @property
    def sentence(self) -> str:
        """Say it in words."""
        who = f"container {self.container}" if self.container else "the pod"
        return (
            f"{who} uses {format_bytes(self.used_bytes)} of GPU {self.gpu}, "
            f"but was granted {format_bytes(self.granted_bytes)}"
        )


class OveruseReport(_Wire, frozen=True, kw_only=True):
    """Be the report of one node; *beat* grows with every writing, so that a report can be told from an old one."""

    version: int = VERSION
    beat: Annotated[int, msgspec.Meta(ge=0)]
    users: Annotated[tuple[Overuser, ...], msgspec.Meta(max_length=MAX_USERS)] = ()


def shown_bytes(used: int) -> int:
    """Round up to what a report shows, so that it is not rewritten for every page."""
    step = 64 * MIB
    return -(-used // step) * step


_decoder = msgspec.json.Decoder(OveruseReport)


def encode(report: OveruseReport) -> str:
    """Write the node annotation."""
    return versions.encode(report, VERSION)


def decode(text: str) -> OveruseReport:
    """Read the node annotation; raise ValueError with a sentence."""
    try:
        return versions.decode(text, _decoder, VERSION)
    except ValueError as error:
        raise ValueError(f"the node's report of overuse {error}") from error
