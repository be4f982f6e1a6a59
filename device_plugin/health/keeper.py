"""Keeps what is known of every GPU's health: hears events, takes looks, and says who may be given to new pods."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec
import structlog

from cotenant.contract.health import FaultRecord, FaultRecords, HealthSettings, Severity, name_xid
from cotenant.contract.inventory import MIGInstance, UnhealthyInstance
from device_plugin.health import faults
from device_plugin.health.faults import Faults, Finding, Probe
from device_plugin.nvml import GPUEvent, PhysicalGPU, Recovery

log = structlog.get_logger(__name__)

# What the driver may want done with a GPU, and how grave that is. What concerns several GPUs' links only is left out.
_RECOVERIES = {
    Recovery.GPU_RESET: (Severity.RESET, "the driver wants the GPU reset: drain it and run `nvidia-smi --gpu-reset`"),
    Recovery.DRAIN_AND_RESET: (
        Severity.RESET,
        "the driver wants the GPU drained and reset: run `nvidia-smi --gpu-reset`",
    ),
    Recovery.BUS_RESET: (Severity.RESET, "the driver wants the GPU's bus reset: reboot the node"),
    Recovery.NODE_REBOOT: (Severity.FATAL, "the driver wants the node rebooted"),
    Recovery.SYSTEM_REBOOT: (Severity.FATAL, "the driver wants the whole system rebooted"),
}
_ENDS = {
    Severity.TRANSIENT: "it is used again when it has been quiet for a while",
    Severity.RESET: "reset it with `nvidia-smi --gpu-reset`, or reboot the node",
    Severity.FATAL: "reboot the node",
}


class Subject(NamedTuple):
    """Name a GPU, or one MIG instance of it by its own UUID, which the next one in its place may have too."""

    uuid: str
    instance: str = ""


class HealthKeeper:
    """Follow the troubles of all GPUs and MIG instances of a node; safe to use from many threads."""

    def __init__(
        self, settings: HealthSettings, *, boot: str = "", clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Take what tells one *boot* of the node from another, and a *clock* in seconds."""
        self._settings = settings
        self._boot = boot
        self._clock = clock
        self._lock = threading.Lock()
        self._faults: dict[Subject, Faults] = {}
        # where the instances of these lie, or lay: a pod that fails takes its instance along, and the trouble stays
        self._places: dict[Subject, MIGInstance] = {}
        self._ecc: dict[str, int] = {}
        self._unlicensed_since: dict[str, float] = {}
        self._xids: Counter[tuple[str, int, Severity]] = Counter()

    # What it takes.

    def heard(self, event: GPUEvent, instance: MIGInstance | None = None) -> None:
        """Take an event of the driver's, which names the MIG *instance*."""
        if event.xid is None:
            severity, key = self._settings.uncorrected_ecc, "ecc"
            sentence = f"a double-bit memory error; {_ENDS.get(severity, '')}"
        else:
            severity, key = self._settings.xids.severity(event.xid), f"xid-{event.xid}"
            sentence = f"{name_xid(event.xid)}; {_ENDS.get(severity, '')}"
        log.warning("gpu.event", gpu=event.uuid, xid=event.xid, gpu_instance=event.gpu_instance, severity=str(severity))
        with self._lock:
            if event.xid is not None:
                self._xids[event.uuid, event.xid, severity] += 1
            for subject in self._meant(event, severity, instance):
                known = faults.afflict(self._faults.get(subject, {}), Finding(key, severity, sentence))
                if not known:
                    continue  # an application's own, of which nothing is to be kept
                self._faults[subject] = known
                if subject.instance and instance is not None:
                    self._places[subject] = msgspec.structs.replace(instance, uuid="")

    def looked(self, gpus: Sequence[PhysicalGPU]) -> None:
        """Take a look at all GPUs for one probe of each."""
        with self._lock:
            for gpu in gpus:
                self._faults.setdefault(Subject(gpu.uuid), {})
                probe = self._probe(gpu)
                for subject in [subject for subject in self._faults if subject.uuid == gpu.uuid]:
                    # an instance has no probe of its own: what the whole GPU suffers says nothing for it or against it
                    if not subject.instance or not probe.present:
                        self._faults[subject] = faults.probed(self._faults[subject], probe, self._settings.clean_probes)
                    if subject.instance and not self._faults[subject]:
                        # instances come and go with pods
                        del self._faults[subject]
                        self._places.pop(subject, None)

    def restore(self, records: FaultRecords) -> None:
        """Take over what an earlier plugin wrote down; after a reboot it is over."""
        if records.boot != self._boot:
            return
        with self._lock:
            for record in records.faults:
                if record.severity not in faults.LASTING:
                    continue
                subject, finding = Subject(record.uuid), Finding(record.key, record.severity, record.sentence)
                self._faults[subject] = faults.restored(self._faults.get(subject, {}), finding)

    def acknowledge(self) -> None:
        """Take a person's word that what needed a reset or a reboot is over."""
        with self._lock:
            for subject, known in self._faults.items():
                over = {finding.key for finding in faults.lasting(known)}
                self._faults[subject] = {key: fault for key, fault in known.items() if key not in over}

    # What it tells.

    def ailment(self, uuid: str, instance: str = "") -> str:
        """Say why a GPU, or an instance of it, is unfit for new pods; "" where it is fit."""
        with self._lock:
            found = faults.ailments(self._faults.get(Subject(uuid), {}))
            if not found and instance:
                found = faults.ailments(self._faults.get(Subject(uuid, instance), {}))
        return found[0].sentence if found else ""

    def places(self, uuid: str) -> list[UnhealthyInstance]:
        """List the instances of a GPU that met a trouble which is not over, with the places where they lie or lay."""
        with self._lock:
            found = [
                (subject.instance, faults.ailments(self._faults[subject]), place)
                for subject, place in self._places.items()
                if subject.uuid == uuid
            ]
        return [
            UnhealthyInstance(uuid=instance, detail=ailments[0].sentence, place=place)
            for instance, ailments, place in found
            if ailments
        ]

    def records(self) -> FaultRecords:
        """List what must outlast the plugin."""
        with self._lock:
            return FaultRecords(
                boot=self._boot,
                faults=tuple(
                    FaultRecord(uuid=subject.uuid, key=f.key, severity=f.severity, sentence=f.sentence)
                    for subject, known in sorted(self._faults.items(), key=lambda item: item[0].uuid)
                    for f in faults.lasting(known)
                ),
            )

    def xids(self) -> dict[tuple[str, int, Severity], int]:
        """Count the XIDs so far, by UUID, number and class."""
        with self._lock:
            return dict(self._xids)

    # Within.

    def _meant(self, event: GPUEvent, severity: Severity, instance: MIGInstance | None) -> list[Subject]:
        if not event.uuid:
            # of which GPU it was is not known, so it may have been any
            return [subject for subject in self._faults if not subject.instance]
        if instance is not None and severity is Severity.TRANSIENT:
            return [Subject(event.uuid, instance.uuid)]
        # a reset is the whole GPU's, whoever was hit
        return [Subject(event.uuid)]

    def _probe(self, gpu: PhysicalGPU) -> Probe:
        if gpu.fault:
            # it says nothing more for now
            return Probe(present=(Finding("unreachable", Severity.TRANSIENT, gpu.fault),), lost=gpu.lost)
        return Probe(present=tuple(self._findings(gpu)), reset_done=_reset_done(gpu))

    def _findings(self, gpu: PhysicalGPU) -> list[Finding]:
        vitals, settings, found = gpu.vitals, self._settings, []
        if vitals.recovery in _RECOVERIES:
            found.append(Finding("recovery", *_RECOVERIES[vitals.recovery]))
        if vitals.uncorrected_ecc is not None:
            before = self._ecc.get(gpu.uuid, vitals.uncorrected_ecc)
            self._ecc[gpu.uuid] = vitals.uncorrected_ecc
            if (grown := vitals.uncorrected_ecc - before) > 0:
                severity = settings.uncorrected_ecc
                sentence = f"{grown} more uncorrected memory errors; {_ENDS.get(severity, '')}"
                found.append(Finding("ecc", severity, sentence))
        if vitals.remap_failed:
            sentence = "a bad row of memory could not be replaced: have the GPU exchanged"
            found.append(Finding("row-remap-failure", settings.row_remap_failure, sentence))
        if vitals.remap_pending:
            sentence = "a bad row of memory waits to be replaced: reset the GPU with `nvidia-smi --gpu-reset`"
            found.append(Finding("row-remap-pending", settings.row_remap_pending, sentence))
        if self._unlicensed(gpu):
            sentence = "the vGPU has no licence: check the licence server and nvidia-gridd in this machine"
            found.append(Finding("unlicensed", Severity.TRANSIENT, sentence))
        return found

    def _unlicensed(self, gpu: PhysicalGPU) -> bool:
        if gpu.vitals.licensed is not False:
            self._unlicensed_since.pop(gpu.uuid, None)
            return False
        grace = self._settings.unlicensed_grace
        since = self._unlicensed_since.setdefault(gpu.uuid, self._clock())
        return grace is not None and self._clock() - since >= grace


def _reset_done(gpu: PhysicalGPU) -> bool | None:
    return None if gpu.vitals.recovery is None else gpu.vitals.recovery is Recovery.NONE
