"""What a GPU's troubles mean for new pods, as the device plugin's configuration says and the node records."""

from enum import StrEnum
from typing import Annotated, NamedTuple

import msgspec

from cotenant.contract import versions
from cotenant.contract.inventory import Text

FAULTS_VERSION = 1


class Severity(StrEnum):
    """Say what ends a trouble.

    APPLICATION is a program's own: the GPU stays healthy. TRANSIENT ends after clean probes. RESET ends when the GPU
    was reset and then probed clean. FATAL ends with a reboot, or when a person says so.
    """

    APPLICATION = "application"
    TRANSIENT = "transient"
    RESET = "reset"
    FATAL = "fatal"


XID = Annotated[int, msgspec.Meta(ge=0, le=65535)]


class KnownXID(NamedTuple):
    """Say what an XID is taken for, and what it is."""

    severity: Severity
    words: str


# After NVIDIA's "XID Errors" and what its device plugin ignores (13, 31, 43, 45, 68, 109).
KNOWN_XIDS: dict[int, KnownXID] = {
    8: KnownXID(Severity.APPLICATION, "a channel stopped"),
    13: KnownXID(Severity.APPLICATION, "graphics engine exception, such as an index out of bounds in a kernel"),
    31: KnownXID(Severity.APPLICATION, "memory page fault: a program's bad pointer"),
    32: KnownXID(Severity.APPLICATION, "corrupted push buffer of a program"),
    43: KnownXID(Severity.APPLICATION, "a program that had failed was stopped"),
    45: KnownXID(Severity.APPLICATION, "clean-up after a program that was ended or had failed"),
    48: KnownXID(Severity.RESET, "double-bit memory error"),
    61: KnownXID(Severity.RESET, "the GPU's microcontroller warns"),
    62: KnownXID(Severity.RESET, "the GPU's microcontroller has halted"),
    63: KnownXID(Severity.APPLICATION, "a bad page or row of memory was noted, to be replaced with the next reset"),
    64: KnownXID(Severity.RESET, "a bad page or row of memory could not be noted"),
    66: KnownXID(Severity.APPLICATION, "a program did what the driver does not allow"),
    68: KnownXID(Severity.APPLICATION, "exception of the video decoder"),
    69: KnownXID(Severity.APPLICATION, "graphics engine class error"),
    74: KnownXID(Severity.RESET, "NVLink error"),
    79: KnownXID(Severity.FATAL, "the GPU has fallen off the bus"),
    94: KnownXID(Severity.APPLICATION, "a memory error that was contained: only the program that met it ends"),
    95: KnownXID(Severity.RESET, "a memory error that was not contained: other programs may have met it"),
    109: KnownXID(Severity.APPLICATION, "a program's context did not switch in time"),
    110: KnownXID(Severity.FATAL, "security fault"),
    119: KnownXID(Severity.RESET, "the GPU's system processor does not answer"),
    120: KnownXID(Severity.RESET, "error of the GPU's system processor"),
    121: KnownXID(Severity.APPLICATION, "corrected error of the link to the CPU"),
    140: KnownXID(Severity.RESET, "a memory error that was not recovered"),
    143: KnownXID(Severity.RESET, "the GPU could not be initialized"),
    154: KnownXID(Severity.APPLICATION, "the driver's advice has changed, which the next probe reads"),
}


class XIDs(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Put XIDs into classes other than those they have by default."""

    application: tuple[XID, ...] = ()
    transient: tuple[XID, ...] = ()
    reset: tuple[XID, ...] = ()
    fatal: tuple[XID, ...] = ()
    # all that stand nowhere
    others: Severity = Severity.TRANSIENT

    def __post_init__(self) -> None:
        seen: dict[int, Severity] = {}
        for severity in Severity:
            for xid in getattr(self, severity):
                if seen.setdefault(xid, severity) is not severity:
                    raise ValueError(f"{severity}: XID {xid} stands in {seen[xid]} too")

    def severity(self, xid: int) -> Severity:
        """Give the class of an XID."""
        for severity in Severity:
            if xid in getattr(self, severity):
                return severity
        known = KNOWN_XIDS.get(xid)
        return self.others if known is None else known.severity


class HealthSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """Say what makes a GPU unhealthy and healthy again."""

    # How many probes in a row must find nothing before a GPU is used again; one is made with every look at the GPUs.
    clean_probes: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 3
    xids: XIDs = XIDs()
    # When NVML's count of uncorrected memory errors grows. The XIDs that come with it say more where there are any.
    uncorrected_ecc: Severity = Severity.TRANSIENT
    # A row of bad memory is replaced with the next reset; until then it is not used.
    row_remap_pending: Severity = Severity.APPLICATION
    # No spare row was left.
    row_remap_failure: Severity = Severity.FATAL
    # For how many seconds a vGPU may be without a licence before it is unhealthy; null: for ever.
    unlicensed_grace: Annotated[float, msgspec.Meta(ge=0, le=604_800)] | None = None


def name_xid(xid: int) -> str:
    """Say what an XID is, as far as that is known."""
    known = KNOWN_XIDS.get(xid)
    return f"XID {xid}" if known is None else f"XID {xid}, {known.words}"


class FaultRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Write down one trouble that outlasts the device plugin; *key* tells troubles of one GPU apart."""

    uuid: Text
    key: Text
    severity: Severity
    sentence: Text


class FaultRecords(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Be the node annotation that keeps them; *boot* is the boot that they happened in."""

    version: int = FAULTS_VERSION
    boot: str = ""
    faults: tuple[FaultRecord, ...] = ()


_decoder = msgspec.json.Decoder(FaultRecords)


def encode_faults(records: FaultRecords) -> str:
    """Write the node annotation."""
    return versions.encode(records, FAULTS_VERSION)


def decode_faults(text: str) -> FaultRecords:
    """Read the node annotation; raise ValueError with a sentence."""
    try:
        return versions.decode(text, _decoder, FAULTS_VERSION)
    except ValueError as error:
        raise ValueError(f"the node's record of GPU faults {error}") from error
