"""Cares for the GPUs of one node: brings health, cordons and record together, and tells people of changes."""

import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec
import structlog

from cotenant.contract.health import HealthSettings, decode_faults, encode_faults
from cotenant.contract.inventory import GPU, MIG, Family, Health, MIGInstance, UnhealthyInstance
from cotenant.contract.names import Names
from device_plugin.cluster.events import PodEvents
from device_plugin.cluster.notes import NodeMetadata, NodeNotes
from device_plugin.health import cordon
from device_plugin.health.cordon import Cordon
from device_plugin.health.keeper import HealthKeeper
from device_plugin.health.listener import Listener
from device_plugin.nvml import NVML, GPUEvent, PhysicalGPU

log = structlog.get_logger(__name__)

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_ACTION = "HealthCheck"
_CORDONED = "cordoned by the node's annotation"


class Care:
    """Judge which GPUs may be given to new pods.

    *changed* is called when that may have changed between two looks; it must be safe to call from any thread.
    """

    def __init__(
        self,
        settings: HealthSettings,
        names: Names,
        nvml: NVML,
        notes: NodeNotes,
        events: PodEvents,
        *,
        locate: Callable[[str, int], MIGInstance | None],
        changed: Callable[[], None],
    ) -> None:
        """Take what finds a MIG instance by its GPU's UUID and NVML's number of it."""
        self._locate = locate
        self.keeper = HealthKeeper(settings, boot=_boot())
        self._names = names
        self._notes = notes
        self._events = events
        self._changed = changed
        self._listener = Listener(nvml, self._heard)
        self._lock = threading.Lock()
        self._gpus: tuple[PhysicalGPU, ...] = ()
        self._cordon_text: str | None = None
        self._problems: tuple[str, ...] = ()
        # what is wrong with whom, as people were told
        self._shown: dict[str, str] = {}
        self._read = False

    def start(self) -> None:
        """Begin to listen to the driver."""
        self._listener.start()

    def retire(self) -> None:
        """Begin to end; return at once."""
        self._listener.retire()

    def stop(self) -> None:
        """End."""
        self._listener.stop()

    def looked(self, gpus: Sequence[PhysicalGPU]) -> None:
        """Take a look at all GPUs, each a probe."""
        self._gpus = tuple(gpus)
        self.keeper.looked(gpus)
        self._listener.follow(gpus)
        if all(gpu.vitals.licensed is None for gpu in gpus):
            self._notes.label(self._names.vgpu_licensed, None)
        else:
            unlicensed = any(gpu.vitals.licensed is False for gpu in gpus)
            self._notes.label(self._names.vgpu_licensed, str(not unlicensed).lower())

    def noticed(self, node: NodeMetadata | None) -> None:
        """Take what stands on the node: the cordon, and at first what an earlier plugin wrote down."""
        if node is None:
            return
        annotations = node.annotations or {}
        before = self._cordon_text
        self._cordon_text = annotations.get(self._names.gpu_cordon)
        first, self._read = not self._read, True
        if first and (text := annotations.get(self._names.gpu_faults)) is not None:
            self._restore(text)
        self._write_down()
        if first or before != self._cordon_text:
            self._changed()

    def erased(self, key: str) -> None:
        """Take it for a person's word that the record was taken from the node."""
        if key == self._names.gpu_faults:
            log.info("gpu.faults_acknowledged")
            self.keeper.acknowledge()
            self._changed()

    def judged(self, gpus: Sequence[GPU]) -> tuple[GPU, ...]:
        """Mark the GPUs that are unfit or cordoned, tell people of changes, and write down what must last.

        MIG instances are marked each by itself; in the dynamic family by the place where one met a trouble.
        """
        with self._lock:
            cordoned = self._cordoned(one.uuid for gpu in gpus if gpu.mig is not None for one in gpu.mig.instances)
            judged = tuple(self._judged(gpu, cordoned) for gpu in gpus)
            self._tell(judged)
            if self._read:
                self._write_down()
            return judged

    def _judged(self, gpu: GPU, cordoned: Cordon) -> GPU:
        detail = self.keeper.ailment(gpu.uuid) or gpu.detail
        if not detail and gpu.uuid in cordoned.uuids:
            detail = f"{_CORDONED} {self._names.gpu_cordon}"
        if not detail:
            return gpu if gpu.mig is None else self._with_instances(gpu, gpu.mig, cordoned)
        return msgspec.structs.replace(gpu, health=Health.UNHEALTHY, detail=detail)

    def _with_instances(self, gpu: GPU, mig: MIG, cordoned: Cordon) -> GPU:
        unfit = []
        for one in mig.instances:
            detail = self.keeper.ailment(gpu.uuid, one.uuid)
            if not detail and one.uuid in cordoned.uuids:
                detail = f"{_CORDONED} {self._names.gpu_cordon}"
            if detail:
                unfit.append(UnhealthyInstance(uuid=one.uuid, detail=detail))
        if gpu.family is Family.MIG_DYNAMIC:
            unfit += self.keeper.places(gpu.uuid)
        if not unfit:
            return gpu
        return msgspec.structs.replace(gpu, mig=msgspec.structs.replace(mig, unhealthy=tuple(unfit)))

    def _cordoned(self, instances: Iterable[str]) -> Cordon:
        found = cordon.read(self._cordon_text, {*(gpu.uuid for gpu in self._gpus), *instances})
        for problem in found.problems:
            if problem not in self._problems:
                note = f"annotation {self._names.gpu_cordon}: {problem}; the other parts of it are followed"
                log.warning("cordon.unreadable", why=problem)
                self._events.about_node("BadGPUCordon", _ACTION, note)
        self._problems = found.problems
        return found

    def _tell(self, judged: Sequence[GPU]) -> None:
        shown: dict[str, str] = {}
        for gpu in judged:
            shown[f"GPU {gpu.index} ({gpu.uuid})"] = gpu.detail
            for one in gpu.mig.unhealthy if gpu.mig is not None else ():
                where = f", {one.place.profile} at {one.place.start}" if one.place is not None else ""
                shown[f"MIG instance {one.uuid}{where} of GPU {gpu.index}"] = one.detail
        for name in dict.fromkeys((*self._shown, *shown)):
            detail = shown.get(name, "")
            if self._shown.get(name, "") == detail:
                continue
            if detail.startswith(_CORDONED):
                log.info("gpu.cordoned", which=name)
                self._events.about_node("GPUCordoned", _ACTION, f"{name} gets no new pods: {detail}", normal=True)
            elif detail:
                log.warning("gpu.unhealthy", which=name, why=detail)
                self._events.about_node("GPUUnhealthy", _ACTION, f"{name} gets no new pods: {detail}")
            else:
                log.info("gpu.healthy", which=name)
                self._events.about_node("GPUHealthy", _ACTION, f"{name} gets new pods again", normal=True)
        self._shown = shown

    def _restore(self, text: str) -> None:
        try:
            self.keeper.restore(decode_faults(text))
        except ValueError as error:
            log.warning("gpu.faults_unreadable", error=str(error))
            self._events.about_node("BadGPUFaults", _ACTION, f"{error}; it is written anew")

    def _write_down(self) -> None:
        records = self.keeper.records()
        self._notes.annotate(self._names.gpu_faults, encode_faults(records) if records.faults else None)

    def _heard(self, event: GPUEvent) -> None:
        found = None
        if event.uuid and event.gpu_instance is not None:
            found = self._locate(event.uuid, event.gpu_instance)
        # of an instance that nobody knows any more it may be any part of the GPU
        self.keeper.heard(event, found)
        self._changed()


def _boot() -> str:
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return ""
