"""What a GPU's troubles mean for new pods, as the device plugin's configuration says and the node records."""

from enum import StrEnum
from typing import Annotated

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

# After NVIDIA's "XID Errors" and what its device plugin ignores (13, 31, 43, 45, 68, 109); docs/health.md says why.
DEFAULT_XIDS: dict[int, Severity] = (
    dict.fromkeys((8, 13, 31, 32, 43, 45, 63, 66, 68, 69, 94, 109, 121, 154), Severity.APPLICATION)
    | dict.fromkeys((48, 61, 62, 64, 74, 95, 119, 120, 140, 143), Severity.RESET)
    | dict.fromkeys((79, 110), Severity.FATAL)
)


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
        return DEFAULT_XIDS.get(xid, self.others)


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


def encode_faults(records: FaultRecords) -> str:
    """Write the node annotation."""
    return versions.encode(records, FAULTS_VERSION)


def decode_faults(text: str) -> FaultRecords:
    """Read the node annotation; raise ValueError with a sentence."""
    try:
        return versions.decode(text, FaultRecords, FAULTS_VERSION)
    except ValueError as error:
        raise ValueError(f"the node's record of GPU faults {error}") from error
