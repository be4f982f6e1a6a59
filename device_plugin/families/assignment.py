"""Keeps which family and mode each GPU is in: by the rules, but never from under pods that use it."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import structlog

from cotenant.contract import grant as grants
from cotenant.contract.configuration import GPURule
from cotenant.contract.grant import GrantError
from cotenant.contract.inventory import Family, Mode
from cotenant.contract.names import Names
from cotenant.contract.pods import Pod
from cotenant.contract.units import id_prefix
from device_plugin.admission.identity import Devices
from device_plugin.admission.ids import gpu_of
from device_plugin.families.rules import Assigned, assign
from device_plugin.nvml import PhysicalGPU

log = structlog.get_logger(__name__)


class Assignment:
    """Assign GPUs anew as rules change.

    *in_use* tells which GPUs pods hold or may hold, by UUID, None where nobody can tell; *tell* hears of GPUs that stay
    as they are, as a sentence. Not safe to use from many threads.
    """

    def __init__(self, in_use: Callable[[], frozenset[str] | None], tell: Callable[[str], None]) -> None:
        self._in_use = in_use
        self._tell = tell
        self._said: dict[str, Assigned] = {}
        self._before: Mapping[str, Assigned] = {}
        # those that were to change at the look before this one, and that nobody held
        self._announced: frozenset[str] = frozenset()
        self.of: dict[str, Assigned] = {}
        # why GPUs may get no new pods: they are about to change
        self.unfit: dict[str, str] = {}

    def recall(self, before: Mapping[str, Assigned] | None) -> bool:
        """Take over how a plugin *before* this one had the GPUs, by UUID; tell whether that is known."""
        self._before = before or {}
        return before is not None

    def how(self, gpu: PhysicalGPU) -> Assigned:
        """Say how a GPU is assigned; one that is not yet, as without rules."""
        return self.of.get(gpu.uuid, Assigned())

    def update(self, gpus: Sequence[PhysicalGPU], rules: Sequence[GPURule]) -> None:
        """Assign *gpus* by *rules*; one in use stays as it is until its pods have ended.

        One that nobody holds gets no new pods for one look, and changes at the next, when what was under way has shown
        itself: between the question who holds it and the word to the kubelet a pod could be given it as it was.
        """
        wanted = {gpu.uuid: assign(gpu, rules) for gpu in gpus}
        now = {uuid: self._now(uuid, how) for uuid, how in wanted.items()}
        changed = {uuid for uuid, how in wanted.items() if now[uuid] != how}
        used = self._in_use() if changed else frozenset()
        stay = changed if used is None else changed & (used | _beside(used, now, wanted))
        for uuid in sorted(stay):
            if self._said.get(uuid) != wanted[uuid]:
                whose = "its pods" if uuid in (used or stay) else "the pods of its group"
                stays = f"GPU {uuid} stays in {_named(now[uuid])}, until {whose} have ended"
                self._tell(f"{stays}; then it goes to {_named(wanted[uuid])}")
        self._said = {uuid: wanted[uuid] for uuid in stay}
        # at a start nothing is under way: without a plugin no container is given anything
        due = {uuid for uuid in changed - stay if uuid in self.of and _kind(now[uuid]) != _kind(wanted[uuid])}
        self.unfit = dict.fromkeys(due - self._announced, "it is about to be shared in another way, by an edit")
        self._announced = frozenset(due)
        as_they_were = stay | self.unfit.keys()
        # beside those that are gone for now, which pods may hold still
        self.of = self.of | {uuid: now[uuid] if uuid in as_they_were else how for uuid, how in wanted.items()}

    def _now(self, uuid: str, wanted: Assigned) -> Assigned:
        """Say how a GPU is, or was before this plugin: then what is not known of it is as *wanted*."""
        now = self.of.get(uuid)
        if now is not None and now.replicas:
            return now
        before = self._before.get(uuid, wanted)
        return wanted if _kind(before) == _kind(wanted) else before


def _kind(how: Assigned) -> tuple[Family, Mode, str]:
    return how.family, how.mode, how.group


def _beside(used: frozenset[str], now: Mapping[str, Assigned], wanted: Mapping[str, Assigned]) -> set[str]:
    """Name the GPUs of every group that one in use is in, and those that would join it.

    A group has one MPS daemon, which would have to end for any change of them, and all of its clients with it.
    """
    before, after = _groups(now), _groups(wanted)
    groups = [members | after.get(group, set()) for group, members in before.items() if members & used]
    return {uuid for group in groups for uuid in group}


def _named(how: Assigned) -> str:
    return f"family {how.family}, mode {how.mode}{f', group {how.group}' if how.group else ''}"


def _groups(assigned: Mapping[str, Assigned]) -> dict[str, set[str]]:
    """Name the GPUs of each group under MPS."""
    found: dict[str, set[str]] = {}
    for uuid, how in assigned.items():
        if how.mode is Mode.MPS and how.group:
            found.setdefault(how.group, set()).add(uuid)
    return found


def held(
    pods: Sequence[Pod],
    names: Names,
    listed: Iterable[Devices],
    gpus: Iterable[str],
    parents: Mapping[str, str],
    *,
    dynamic: bool = True,
) -> frozenset[str] | None:
    """Tell which of *gpus* *pods* were granted and containers *listed* hold ids of; None where that cannot be read.

    *parents* say of which GPU the MIG instances are that are there. Grants alone do not tell: of a pod that runs
    already, the watch may be behind. Without *dynamic*, those whose instances are made for them count as no holders.
    """
    try:
        granted = [
            container
            for pod in pods
            if names.grant in pod.annotations and not pod.ended
            for container in grants.decode(pod.annotations[names.grant]).containers
        ]
    except GrantError:
        return None
    found = {share.uuid for one in granted for share in one.gpus if dynamic or one.family is not Family.MIG_DYNAMIC}
    parents = {**parents, **{one.mig.uuid: one.gpus[0].uuid for one in granted if one.mig is not None}}
    counted = {id_prefix(uuid): uuid for uuid in gpus}
    ungranted = {pod.key for pod in pods if names.grant not in pod.annotations}
    for entry in listed:
        # instances are had by a grant, or from another plugin and then of a GPU that is not ours
        if "/mig-" in entry.resource and (not names.is_granted(entry.resource) or str(entry.pod) in ungranted):
            continue
        for device in map(gpu_of, entry.ids):
            prefix = device.partition("-")[0]
            if device.startswith("MIG-") and device not in parents:
                return None
            if prefix not in counted:
                found.add(parents.get(device, device))
            elif dynamic or entry.resource == names.gpu_mem:
                found.add(counted[prefix])
    return frozenset(found)
