"""Applies a named geometry to the static MIG GPUs of this node: mig-parted's format, asked for by a label of the node.

A GPU is cut anew only when nobody holds any of it. First it is published as unfit, so that nothing new is placed there;
at the next look, when what was under way has shown itself, it is cut.
"""

import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import structlog

from cotenant.contract import grant as grants
from cotenant.contract import mig_parted
from cotenant.contract.configuration import ConfigurationError
from cotenant.contract.grant import GrantError
from cotenant.contract.mig import Geometry
from cotenant.contract.mig_parted import Cut, CutGPU, GeometryError
from cotenant.contract.names import Names
from cotenant.contract.pods import Pod
from device_plugin.admission.identity import asks
from device_plugin.cluster.events import PodEvents
from device_plugin.cluster.notes import NodeMetadata, NodeNotes
from device_plugin.nvml import NVML, GPUInstance, MIGError, NVMLUnavailableError, PhysicalGPU

log = structlog.get_logger(__name__)

_ACTION = "MIGGeometry"
_PODS_NAMED = 5
# A cut that NVML refuses keeps the GPU from pods for a look each time that it is tried.
_BACK_OFF_SECONDS = (20.0, 1200.0)


class _Refused(Exception):  # noqa: N818 - not an error of ours
    """Say why a geometry is not applied now."""


class _Failure(NamedTuple):
    """Say why a GPU could not be cut, and until when it is left alone, *pause* seconds after that."""

    why: str
    pause: float
    until: float


class Cutter:
    """Follow the node's label; *whole* are the resources whose pods hold GPUs or instances without a grant.

    *pods* name those that hold a GPU, and *held* names the GPUs of which any is held; None where nobody can tell.
    """

    def __init__(
        self,
        nvml: NVML,
        file: Path | None,
        names: Names,
        notes: NodeNotes,
        events: PodEvents,
        *,
        pods: Callable[[], Sequence[Pod] | None],
        whole: Callable[[], Collection[str]],
        held: Callable[[], frozenset[str] | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._nvml = nvml
        self._file = file
        self._names = names
        self._notes = notes
        self._events = events
        self._pods = pods
        self._whole = whole
        self._held = held
        self._lock = threading.Lock()
        self._wanted: str | None = None
        self._clock = clock
        # what was asked for last: the geometry's name, and the file's text
        self._asked: tuple[str, str] | None = None
        # the cuts that failed, by their GPU's UUID
        self._failed: dict[str, _Failure] = {}
        # what was said last of each state since somebody asked for something else, or got it
        self._told: dict[str, str] = {}
        # the GPUs that were published as unfit at an earlier look, by UUID
        self._announced: frozenset[str] = frozenset()

    @property
    def announced(self) -> frozenset[str]:
        """Name the GPUs that are about to be cut, by UUID: nothing new may be placed on them."""
        return self._announced

    def noticed(self, node: NodeMetadata | None) -> None:
        """Take the label that says which geometry is wanted."""
        with self._lock:
            self._wanted = (node.labels or {}).get(self._names.mig_config) if node is not None else None

    def look(self, gpus: Iterable[PhysicalGPU]) -> None:
        """Take one step towards the geometry that is wanted for *gpus*, the static ones."""
        with self._lock:
            wanted = self._wanted
        if not wanted or self._file is None:
            self._announced = frozenset()
            return
        try:
            done = self._step(wanted, list(gpus))
        except (_Refused, GeometryError, ConfigurationError, MIGError, NVMLUnavailableError) as error:
            self._announced = frozenset()
            self._say("failed", f"geometry {wanted}: {error}")
        else:
            self._say("success" if done else "pending", f"geometry {wanted} is {'applied' if done else 'under way'}")

    def _step(self, wanted: str, gpus: list[PhysicalGPU]) -> bool:
        """Announce, or cut; tell whether all is as wanted."""
        if self._file is None or not gpus:
            raise _Refused("no GPU of this node is of family mig-static")
        try:
            text = self._file.read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            raise _Refused(f"{self._file}: cannot be read: {error}") from error
        if (wanted, text) != self._asked:
            self._asked, self._failed, self._told = (wanted, text), {}, {}
        geometries = mig_parted.parse(text)
        cuttable = [
            CutGPU(
                uuid=gpu.uuid,
                index=gpu.index,
                device_id=gpu.pci_device_id,
                # with the mode off some drivers tell none; what they tell once it is on, the next look goes by
                geometry=Geometry(profiles) if profiles or gpu.mig_enabled is not False else None,
            )
            for gpu in gpus
            for profiles in (self._nvml.mig_profiles(gpu.index),)
        ]
        cuts = mig_parted.plan(geometries, wanted, cuttable)
        if not cuts:
            raise _Refused("it names no GPU of family mig-static")
        done = self._advance({gpu.uuid: gpu for gpu in gpus if gpu.uuid in cuts}, cuts)
        unknown = {gpu.uuid for gpu in cuttable if gpu.geometry is None}
        return done and not any(cut.enabled for uuid, cut in cuts.items() if uuid in unknown)

    def _advance(self, gpus: Mapping[str, PhysicalGPU], cuts: Mapping[str, Cut]) -> bool:
        """Cut the GPUs that were announced, or announce those that can be cut; tell whether all are as wanted."""
        due, refusals = {}, []
        for uuid, gpu in gpus.items():
            try:
                if not self._is_so(gpu, cuts[uuid]):
                    due[uuid] = gpu
            except MIGError as error:
                refusals.append(str(error))
        self._failed = {uuid: failure for uuid, failure in self._failed.items() if uuid in due}
        users = self._users(due) if due else {}
        now = self._clock()
        resting = {uuid for uuid, failure in self._failed.items() if now < failure.until}
        ready = due.keys() - users.keys() - resting
        if not ready <= self._announced:
            self._announced = frozenset(ready)
            return False
        self._announced = frozenset()
        for uuid in sorted(ready):
            self._try(due[uuid], cuts[uuid], now)
        if users:
            refusals.append(_used([due[uuid] for uuid in users], sorted(frozenset().union(*users.values()))))
        refusals += [failure.why for failure in self._failed.values()]
        if refusals:
            raise _Refused("; ".join(refusals))
        return True

    def _try(self, gpu: PhysicalGPU, cut: Cut, now: float) -> None:
        """Cut a GPU; where that fails, the others are cut all the same."""
        before = self._failed.pop(gpu.uuid, None)
        try:
            self._cut(gpu, cut)
        except MIGError as error:
            first, most = _BACK_OFF_SECONDS
            pause = min(2 * before.pause, most) if before is not None else first
            self._failed[gpu.uuid] = _Failure(f"{error}; it is tried again, ever more seldom", pause, now + pause)

    def _is_so(self, gpu: PhysicalGPU, cut: Cut) -> bool:
        there = self._nvml.mig_instances(gpu.index) if gpu.mig_enabled else ()
        profiles = sorted(one.profile for one in there)
        wanted = sorted(one.profile for one in cut.instances)
        return bool(gpu.mig_enabled) == cut.enabled and profiles == wanted and all(one.uuid for one in there)

    def _users(self, due: Mapping[str, PhysicalGPU]) -> dict[str, set[str]]:
        """Name the pods that use any of the GPUs *due*, by these; raise _Refused where that cannot be told."""
        pods = self._pods()
        if pods is None:
            raise _Refused("the pods of this node are not known yet")
        users: dict[str, set[str]] = {}
        for pod in (pod for pod in pods if not pod.ended):
            for uuid in self._uses(pod, due):
                users.setdefault(uuid, set()).add(pod.key)
        if users.keys() < due.keys():
            held = self._held()
            if held is None:
                raise _Refused("which pods use its GPUs cannot be told; it is tried again")
            for uuid in held & due.keys():
                users.setdefault(uuid, {"some that only the kubelet knows by now"})
        return users

    def _uses(self, pod: Pod, due: Mapping[str, PhysicalGPU]) -> Collection[str]:
        """Name those of the GPUs *due* that a pod uses, or may use."""
        whole = set(self._whole())
        if any(
            whole & ((container.resources and container.resources.limits) or {}).keys()
            for container, _ in pod.start_order
        ):
            return due.keys()
        text = pod.annotations.get(self._names.grant)
        if text is None:
            return ()
        try:
            grant = grants.decode(text)
        except GrantError:
            return due.keys() if any(asks(one, self._names) is not None for one, _ in pod.start_order) else ()
        return due.keys() & {share.uuid for container in grant.containers for share in container.gpus}

    def _cut(self, gpu: PhysicalGPU, cut: Cut) -> None:
        """Bring one GPU there, as far as it is not there yet: an earlier attempt may have ended half-way."""
        there = list(self._nvml.mig_instances(gpu.index)) if gpu.mig_enabled else []
        keep = {(one.profile, one.start) for one in cut.instances}
        for one in there:
            if (one.profile, one.start) not in keep or one.divided:
                self._nvml.destroy_mig_instance(gpu.index, one)
        if bool(gpu.mig_enabled) != cut.enabled:
            self._nvml.set_mig_mode(gpu.index, on=cut.enabled)
        have: dict[tuple[str, int], GPUInstance] = {(one.profile, one.start): one for one in there if not one.divided}
        for wanted in cut.instances:
            one_there = have.get((wanted.profile, wanted.start))
            if one_there is None:
                self._nvml.create_mig_instance(gpu.index, wanted.profile, wanted.start)
            elif not one_there.uuid:
                self._nvml.complete_mig_instance(gpu.index, one_there)
        log.info("mig.cut", gpu=gpu.uuid, instances=[f"{one.profile}@{one.start}" for one in cut.instances])

    def _say(self, state: str, sentence: str) -> None:
        """Tell people what has changed; what is tried again and fails as before is no news."""
        self._notes.label(self._names.mig_config_state, state)
        if self._told.get(state) == sentence:
            return
        self._told = {state: sentence} if state == "success" else {**self._told, state: sentence}
        failed = state == "failed"
        (log.warning if failed else log.info)("mig.geometry", state=state, why=sentence)
        reason = "MIGGeometryRefused" if failed else "MIGGeometry"
        self._events.about_node(reason, _ACTION, sentence, normal=not failed)


def _used(gpus: Iterable[PhysicalGPU], pods: Sequence[str]) -> str:
    more = f" and {len(pods) - _PODS_NAMED} more" if len(pods) > _PODS_NAMED else ""
    return (
        f"GPU {', '.join(str(gpu.index) for gpu in gpus)} would have to be cut anew, which pods use: "
        f"{', '.join(pods[:_PODS_NAMED])}{more}; it is tried again when they have ended"
    )
