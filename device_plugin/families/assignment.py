"""Keeps which family and mode each GPU is in: by the rules, but never from under pods that use it."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import structlog

from cotenant.contract import grant as grants
from cotenant.contract.configuration import GPURule
from cotenant.contract.grant import GrantError
from cotenant.contract.inventory import Family, Mode
from cotenant.contract.pods import Pod
from device_plugin.admission.identity import ListedPod
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
        self.of: dict[str, Assigned] = {}

    def recall(self, before: Mapping[str, Assigned] | None) -> bool:
        """Take over how a plugin *before* this one had the GPUs, by UUID; tell whether that is known."""
        self._before = before or {}
        return before is not None

    def how(self, gpu: PhysicalGPU) -> Assigned:
        """Say how a GPU is assigned; one that is not yet, as without rules."""
        return self.of.get(gpu.uuid, Assigned())

    def update(self, gpus: Sequence[PhysicalGPU], rules: Sequence[GPURule]) -> None:
        """Assign *gpus* by *rules*; one in use stays as it is until its pods have ended."""
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
        self.of = {uuid: now[uuid] if uuid in stay else how for uuid, how in wanted.items()}

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
    pods: Iterable[Pod], grant_key: str, listed: Iterable[ListedPod], parents: Mapping[str, str]
) -> frozenset[str] | None:
    """Tell which GPUs *pods* were granted and containers *listed* hold shares of; None where that cannot be read.

    *parents* say of which GPU the MIG instances are that are handed out as GPUs.
    """
    found: set[str] = set()
    for pod in pods:
        text = pod.annotations.get(grant_key)
        if text is None or pod.ended:
            continue
        try:
            found |= {share.uuid for container in grants.decode(text).containers for share in container.gpus}
        except GrantError:
            return None
    shares = {gpu_of(device) for entry in listed for ids in entry.ids.values() for device in ids}
    if any(device.startswith("MIG-") and device not in parents for device in shares):
        return None
    return frozenset(found | {parents.get(device, device) for device in shares})
