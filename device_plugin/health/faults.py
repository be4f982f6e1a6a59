"""The troubles of one GPU or MIG instance, from their first sign until they are over; pure, and without a clock.

Time is counted in probes::

      afflict          n clean probes                        10 n clean probes
    o -------> UNWELL ----------------> well, but remembered ------------------> forgotten
                 ^                              |
                 +------------------------------+
                   afflict: needs twice as many clean probes as before, 16 times at most

What counts as a clean probe depends on what the trouble needs (cotenant.contract.health.Severity): one that needs a
reset counts them only once there was one, as far as the driver tells, and a fatal one not at all.
"""

from collections.abc import Mapping

import msgspec

from cotenant.contract.health import Severity

LASTING = frozenset({Severity.RESET, Severity.FATAL})

_RELAPSES_MAX = 4
_REMEMBERED = 10


class Finding(msgspec.Struct, frozen=True):
    """Name a trouble; *key* tells it from others of the same GPU, *sentence* is for people."""

    key: str
    severity: Severity
    sentence: str


class Fault(msgspec.Struct, frozen=True):
    """Follow one trouble; *clean* counts the clean probes since its last sign."""

    finding: Finding
    clean: int = 0
    relapses: int = 0
    # of one that needs a reset: the GPU was away since
    reset_seen: bool = False
    # it is over, and remembered
    well: bool = False

    def needs(self, clean_probes: int) -> int:
        """Count the clean probes that it takes."""
        return clean_probes << self.relapses


Faults = Mapping[str, Fault]


class Probe(msgspec.Struct, frozen=True, kw_only=True):
    """Hold what one look at a GPU found.

    *present* are troubles that last as long as they are found; one of them where the GPU is *lost*, which the driver
    cannot reach. *reset_done* says that the driver wants nothing done with it, None that it does not say.
    """

    present: tuple[Finding, ...] = ()
    lost: bool = False
    reset_done: bool | None = None


def afflict(faults: Faults, finding: Finding) -> Faults:
    """Take a sign of trouble; one of an application's own is none of the GPU's."""
    if finding.severity is Severity.APPLICATION:
        return faults
    before = faults.get(finding.key)
    relapses = 0
    if before is not None:
        relapses = min(before.relapses + before.well, _RELAPSES_MAX)
        if not before.well and _RANK[before.finding.severity] > _RANK[finding.severity]:
            finding = before.finding
    return {**faults, finding.key: Fault(finding, relapses=relapses)}


def probed(faults: Faults, probe: Probe, clean_probes: int) -> Faults:
    """Take a probe."""
    found = [finding for finding in probe.present if finding.severity is not Severity.APPLICATION]
    keys = {finding.key for finding in found}
    after: dict[str, Fault] = {}
    for key, fault in faults.items():
        if key in keys:
            continue
        clean = 0 if found else fault.clean + _counts(fault, probe)
        followed = msgspec.structs.replace(fault, clean=clean, reset_seen=fault.reset_seen or probe.lost)
        needed = followed.needs(clean_probes)
        if followed.well and followed.clean >= _REMEMBERED * needed:
            continue
        after[key] = msgspec.structs.replace(followed, well=followed.well or followed.clean >= needed)
    for finding in found:
        known = faults.get(finding.key)
        if known is not None and not known.well and finding.severity is known.finding.severity:
            # found again at every probe: that is the same one, not one more
            after[finding.key] = msgspec.structs.replace(known, finding=finding, clean=0)
        else:
            after |= {finding.key: afflict(faults, finding)[finding.key]}
    return after


def restored(faults: Faults, finding: Finding) -> Faults:
    """Take over a trouble that an earlier plugin had written down, unless more is known of it already."""
    return {finding.key: Fault(finding), **faults}


def ailments(faults: Faults) -> list[Finding]:
    """List what makes it unfit for new pods now, the gravest first."""
    unwell = [fault.finding for fault in faults.values() if not fault.well]
    return sorted(unwell, key=lambda finding: (-_RANK[finding.severity], finding.key))


def lasting(faults: Faults) -> list[Finding]:
    """List what must outlast the plugin: all that clean probes alone do not end."""
    return [finding for finding in ailments(faults) if finding.severity in LASTING]


_RANK = {severity: rank for rank, severity in enumerate(Severity)}


def _counts(fault: Fault, probe: Probe) -> bool:
    """Tell whether a clean probe brings a trouble nearer to its end."""
    severity = fault.finding.severity
    if fault.well or severity is Severity.TRANSIENT:
        return True
    # the driver's word is better than what we saw, where it gives one
    reset = fault.reset_seen if probe.reset_done is None else probe.reset_done
    return severity is Severity.RESET and reset
