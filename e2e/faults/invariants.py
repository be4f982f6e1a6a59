"""The judge: reads what the API server has, and says every invariant of DESIGN.md that is broken, in a sentence each.

Nothing of the extender is asked here but where it is held to what the API says (leaks). The sums are made anew from
pods and nodes, with the contract's own readers and no ledger.
"""

import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from cotenant.contract import grant as grants
from cotenant.contract import inventory as inventories
from cotenant.contract.environment import annotations as environment
from cotenant.contract.inventory import Inventory
from cotenant.contract.names import Names
from cotenant.contract.pods import Pod
from cotenant.contract.reasons import Reason
from cotenant.contract.request import RequestError, parse
from cotenant.contract.units import GIB
from e2e.audit import Write
from e2e.rest import Api, Object

NAMES = Names()
ENDED = frozenset({"Succeeded", "Failed"})
STUCK_SECONDS = 30.0


@dataclass(frozen=True)
class Picture:
    """All pods and nodes, as one look at the API found them."""

    pods: list[Object]
    nodes: list[Object]

    @classmethod
    def of(cls, api: Api) -> "Picture":
        """Look; nodes first, so that no pod is on a node that is not there yet."""
        nodes = api.list("Node")
        return cls(api.list("Pod"), nodes)

    def inventories(self) -> dict[str, Inventory]:
        """Read every node's inventory, by the node's name; what cannot be read is not there."""
        found = {}
        for node in self.nodes:
            text = node["metadata"].get("annotations", {}).get(NAMES.inventory)
            if text is not None:
                found[node["metadata"]["name"]] = inventories.decode(text)
        return found

    def granted(self) -> list[tuple[Object, grants.Grant]]:
        """List the pods that hold something, with what they hold: until they have ended, terminating or not (I3)."""
        return [
            (pod, grants.decode(pod["metadata"]["annotations"][NAMES.grant]))
            for pod in self.pods
            if pod["spec"].get("nodeName")
            and NAMES.grant in pod["metadata"].get("annotations", {})
            and pod["status"].get("phase") not in ENDED
        ]

    def held(self) -> Counter[tuple[str, str]]:
        """Add up what is held, by node and GPU UUID."""
        total: Counter[tuple[str, str]] = Counter()
        for pod, grant in self.granted():
            for uuid, amount in grant.charges().items():
                total[pod["spec"]["nodeName"], uuid] += amount
        return total

    def free(self) -> dict[tuple[str, str], int]:
        """Give the bytes that are free of every GPU; negative where too much was given."""
        held = self.held()
        return {
            (node, gpu.uuid): gpu.usable_bytes - held[node, gpu.uuid]
            for node, inventory in self.inventories().items()
            for gpu in inventory.gpus
        }


def broken(picture: Picture, events: Iterable[Object] = ()) -> list[str]:
    """Say every invariant that *picture* breaks, and every Event of ours whose reason is none."""
    return [*_over_committed(picture), *_misgranted(picture), *_unnamed(events)]


def bound_twice(writes: Iterable[Write]) -> list[str]:
    """Say of which pods more than one Binding was taken; no name may be used twice while *writes* were made."""
    taken = Counter(f"{one.namespace}/{one.name}" for one in writes if one.subresource == "binding" and one.code == 201)
    return [f"I1: {count} Bindings of pod {key} were taken" for key, count in taken.items() if count > 1]


def _over_committed(picture: Picture) -> list[str]:
    found = []
    known = picture.free()
    for (node, uuid), held in picture.held().items():
        if (node, uuid) not in known:
            found.append(f"I1: {held} bytes are held of GPU {uuid}, which node {node} does not have")
        elif known[node, uuid] < 0:
            found.append(f"I1: of GPU {uuid} of node {node} {-known[node, uuid]} bytes more are held than it has")
    return found


def _misgranted(picture: Picture) -> list[str]:
    """Hold every bound pod that asks for GPU memory to its own request, and its annotations to its grant."""
    found = []
    for pod in picture.pods:
        key = f"{pod['metadata']['namespace']}/{pod['metadata']['name']}"
        if not pod["spec"].get("nodeName"):
            continue
        text = pod["metadata"].get("annotations", {}).get(NAMES.grant)
        try:
            request = parse(msgspec.convert(pod, Pod), NAMES, GIB)
        except RequestError:
            found.append(f"I5: pod {key} is bound, though its request cannot be read")
            continue
        if request is None:
            continue
        if text is None:
            found.append(f"I5: pod {key} is bound without a grant")
            continue
        grant = grants.decode(text)
        asked = {container.name: container.units for container in request.containers}
        given = {container.name: container.units for container in grant.containers}
        if asked != given:
            found.append(f"I2: pod {key} asks {asked} units and was granted {given}")
        for name, value in environment(grant, NAMES).items():
            seen = pod["metadata"]["annotations"].get(name)
            if seen != value:
                found.append(f"I2: annotation {name} of pod {key} is {seen!r}, and its grant says {value!r}")
    return found


def _unnamed(events: Iterable[Object]) -> list[str]:
    reasons = {str(reason) for reason in Reason}
    return [
        f"I7: an Event says {event['reason']!r}, which is no reason"
        for event in events
        if event.get("reportingController", "").startswith("cotenant.io/") and event["reason"] not in reasons
    ]


_SAMPLE = re.compile(r"^cotenant_gpu_memory_allocated_bytes\{(.*)\} (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


def leaks(picture: Picture, metrics: str) -> list[str]:
    """Say where the extender's metrics and the API differ; both must be of one quiet moment."""
    seen = {}
    for labels, value in _SAMPLE.findall(metrics):
        names = dict(_LABEL.findall(labels))
        seen[names["node"], names["uuid"]] = int(float(value))
    held = picture.held()
    return [
        f"I4: of GPU {uuid} of node {node} the extender counts {seen[node, uuid]} bytes as held, and the API "
        f"{held[node, uuid]}"
        for node, uuid in sorted(seen)
        if seen[node, uuid] != held[node, uuid]
    ]


@dataclass
class Patience:
    """Add up for how long each pod waits although there is room; to be shown pictures again and again.

    The time in which no extender binds does not count as waiting for one that does, and is in `longest_in_all` alone.
    """

    limit_s: float = STUCK_SECONDS
    clock: Callable[[], float] = time.monotonic
    waited: dict[str, float] = field(default_factory=dict)
    since: dict[str, float] = field(default_factory=dict)
    longest: float = 0.0
    longest_in_all: float = 0.0
    stuck: dict[str, float] = field(default_factory=dict)
    _last: float | None = None

    def look(self, picture: Picture, *, binding: bool) -> None:
        """Take over one picture, and whether an extender binds now."""
        now = self.clock()
        passed = now - self._last if self._last is not None and binding else 0.0
        self._last = now
        largest = max(picture.free().values(), default=0)
        waiting = {
            pod["metadata"]["uid"]: pod
            for pod in picture.pods
            if not pod["spec"].get("nodeName") and "deletionTimestamp" not in pod["metadata"] and _asks(pod)
        }
        fitting = [uid for uid, pod in waiting.items() if 0 < _bytes(pod) <= largest]
        # a pod that is seen for the first time has waited for nothing yet
        self.waited = {uid: self.waited[uid] + passed if uid in self.waited else 0.0 for uid in fitting}
        self.since = {uid: self.since.get(uid, now) for uid in fitting}
        for uid, seconds in self.waited.items():
            self.longest = max(self.longest, seconds)
            self.longest_in_all = max(self.longest_in_all, now - self.since[uid])
            if seconds > self.limit_s:
                self.stuck[waiting[uid]["metadata"]["name"]] = seconds

    def broken(self) -> list[str]:
        """Say which pods have waited too long."""
        return [f"pod {name} waited {seconds:.0f} s although there was room" for name, seconds in self.stuck.items()]


def _asks(pod: Mapping[str, Any]) -> bool:
    return NAMES.gpu_mem in pod["spec"]["containers"][0].get("resources", {}).get("limits", {})


def _bytes(pod: Mapping[str, Any]) -> int:
    """Give what the only container of *pod* asks."""
    (container,) = pod["spec"]["containers"]
    return int(container["resources"]["limits"].get(NAMES.gpu_mem, 0)) * GIB
