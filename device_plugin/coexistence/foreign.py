"""What others than the extender's pods have of this node's GPUs: another plugin's pods, ungranted ones, processes.

Pure but for what it remembers: facts in, what stands in the inventory out.

- A device of another plugin's that names one of our GPUs is its pod's whole: that pod was promised the GPU by somebody
  who does not count ours, so nothing more is placed there. A Cotenant of another domain is another plugin, too, and its
  pods' grants are not read.
- Memory that processes use outside of any pod, or in pods without a grant, is counted as taken, in whole units.
- So are our own device ids where the kubelet says that a pod without a grant holds them.

What goes up is believed at once, or at the second look where a watch may only be behind; what goes down, after a few
looks: who goes away comes back often, and each change is a write to the node.
"""

import re
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import msgspec

from cotenant.contract import grant as grants
from cotenant.contract.grant import GrantError
from cotenant.contract.inventory import GPU, MAX_GPU_BYTES, Family, Foreign
from cotenant.contract.names import NVIDIA_DOMAIN, Names
from cotenant.contract.pods import Pod
from cotenant.contract.units import id_prefix
from device_plugin.admission.identity import Devices, PodName
from device_plugin.watchdog.usage import Account

# So many looks in a row have to find less before less is believed.
LOOKS = 3
# More would only make the annotation longer.
_NAMED = 2
# NVIDIA's plugin names devices by index where it is told to (deviceIDStrategy), a MIG instance as GPU:instance, and
# adds ::replica where it shares them (internal/rm, AnnotatedID).
_BY_INDEX = re.compile(r"(\d{1,3})(?::\d{1,3})?(?:::\d+)?")
# That plugin's own, gpu.shared and most other names that it is told to use among them; a number in others of NVIDIA's
# is something else: of whole GPUs for virtual machines (kubevirt-gpu-device-plugin, named by model) an IOMMU group.
_INDEXED = (f"{NVIDIA_DOMAIN}/gpu", f"{NVIDIA_DOMAIN}/mig-")
_UNITS = "/gpu-mem"


class _Seen(NamedTuple):
    """Hold what one look found of one GPU; *holders* are other plugins' pods."""

    bytes: int
    holders: tuple[str, ...]
    users: tuple[str, ...]


_NOTHING = _Seen(0, (), ())


class ForeignUse:
    """Follow what others have of the GPUs; not safe to use from many threads."""

    def __init__(self, names: Names, unit_bytes: int) -> None:
        self._names = names
        self._unit_bytes = unit_bytes
        self._doubtful: frozenset[object] = frozenset()
        self._looks: defaultdict[str, deque[_Seen]] = defaultdict(lambda: deque(maxlen=LOOKS))

    def look(
        self, gpus: Sequence[GPU], devices: Iterable[Devices], ours: frozenset[str], pods: Iterable[Pod], used: Account
    ) -> dict[str, Foreign]:
        """Give what others have of each GPU of which they have anything, by UUID.

        *devices* is what the kubelet lists, *ours* names the resources that this plugin serves, *pods* are this node's
        as the API server has them, and *used* is what processes use.
        """
        known = {PodName.of(pod): pod for pod in pods}
        doubtful: set[object] = set()
        found: dict[str, _Seen] = {}
        listed = list(devices)
        others = [one for one in listed if one.resource not in ours]
        for gpu in gpus:
            holders = sorted({f"{one.pod} as {one.resource}" for one in others if _names(one, gpu)})
            # by who it is, so that what one pod holds and uses is not counted twice
            sums: Counter[str] = Counter()
            if gpu.family is Family.MEMORY:
                for who, amount in self._ungranted(gpu, listed, known):
                    sums[who] += amount
                for who, amount in self._processes(gpu, used):
                    sums[who] = max(sums[who], amount)
            certain = {who: amount for who, amount in sums.items() if (gpu.uuid, who) in self._doubtful}
            doubtful |= {(gpu.uuid, who) for who in sums}
            units = sum(-(-amount // self._unit_bytes) for amount in certain.values())
            found[gpu.uuid] = _Seen(
                min(units * self._unit_bytes, MAX_GPU_BYTES), tuple(holders), tuple(sorted(certain))
            )
        self._doubtful = frozenset(doubtful)
        for gone in self._looks.keys() - found.keys():
            del self._looks[gone]
        for uuid, seen in found.items():
            self._looks[uuid].append(seen)
        judged = {uuid: _judged(looks) for uuid, looks in self._looks.items()}
        return {uuid: foreign for uuid, foreign in judged.items() if foreign is not None}

    def _ungranted(
        self, gpu: GPU, devices: Iterable[Devices], known: Mapping[PodName, Pod]
    ) -> Iterable[tuple[str, int]]:
        """List the pods that hold units of a GPU though no grant of theirs names it, and how many bytes these are."""
        prefix = id_prefix(gpu.uuid)
        for one in devices:
            if one.resource != self._names.gpu_mem:
                continue
            count = sum(device.partition("-")[0] == prefix for device in one.ids)
            if count and not self._is_granted(known.get(one.pod), gpu.uuid):
                yield f"pod {one.pod}", count * self._unit_bytes

    def _is_granted(self, pod: Pod | None, uuid: str) -> bool:
        text = pod.annotations.get(self._names.grant) if pod is not None else None
        if text is None:
            return False
        try:
            return uuid in grants.decode(text).charges()
        except GrantError:
            return True  # the extender counts such a pod on every GPU

    def _processes(self, gpu: GPU, used: Account) -> Iterable[tuple[str, int]]:
        """List who uses a GPU without a grant; a process of which NVML does not say how much, with the least it can."""
        of_pods: Counter[str] = Counter()
        for usage in used.usages:
            if usage.ungranted and usage.gpu == gpu.uuid:
                of_pods[f"pod {usage.pod.key}"] += max(usage.used_bytes, 1)
        strangers = [max(one.used_bytes, 1) for one in used.strangers if one.gpu == gpu.uuid]
        return [*of_pods.items(), *([("processes of no pod", sum(strangers))] if strangers else [])]


def applied(gpus: Iterable[GPU], foreign: Mapping[str, Foreign]) -> tuple[GPU, ...]:
    """Give *gpus* with what others have of them."""
    return tuple(msgspec.structs.replace(gpu, foreign=foreign.get(gpu.uuid)) for gpu in gpus)


def _judged(looks: Iterable[_Seen]) -> Foreign | None:
    seen = list(looks)
    # of those in whose favour the doubt is, the newest
    fenced = next((one for one in reversed(seen) if one.holders), None)
    most = max(reversed(seen), key=lambda one: one.bytes)
    if fenced is None and not most.bytes:
        return None
    who = fenced.holders if fenced is not None else ()
    said = [f"held by pod {_listed(who)}"] if who else []
    if most.bytes:
        said.append(f"used without a grant by {_listed(most.users)}")
    return Foreign(bytes=most.bytes, fenced=fenced is not None, detail="; ".join(said))


def _listed(who: Sequence[str]) -> str:
    more = f" and {len(who) - _NAMED} more" if len(who) > _NAMED else ""
    return ", ".join(who[:_NAMED]) + more


def _names(devices: Devices, gpu: GPU) -> bool:
    """Tell whether one of another plugin's device ids names a GPU, or a MIG instance of it."""
    instances = [one.uuid for one in (*gpu.mig.instances, *gpu.mig.unexplained)] if gpu.mig is not None else []
    of_a_cotenant = devices.resource.endswith(_UNITS)
    for device in devices.ids:
        if of_a_cotenant and device.partition("-")[0] == id_prefix(gpu.uuid):
            return True
        if any(uuid and _begins(device, uuid) for uuid in (gpu.uuid, *instances)):
            return True
        by_index = _BY_INDEX.fullmatch(device) if devices.resource.startswith(_INDEXED) else None
        if by_index is not None and int(by_index[1]) == gpu.index:
            return True
    return False


def _begins(device: str, uuid: str) -> bool:
    """Tell whether a device id is *uuid*, or that with something behind: ::0, -_-0 and -0 are peers' ways."""
    return device.startswith(uuid) and not device[len(uuid) : len(uuid) + 1].isalnum()
