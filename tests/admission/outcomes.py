"""What a case of the table consists of: a pod that somebody creates, and what becomes of it."""

from dataclasses import dataclass, field

from tests.admission.pods import INSTANCE, MANAGED, MEMORY, SCHEDULER, Object, container, injected

EXTENDER = "system:serviceaccount:cotenant-system:cotenant-extender"
ALICE = "alice"
KUBELET = "system:node:n1"


@dataclass(frozen=True)
class Ready:
    """The pod is stored with these containers, and no others."""

    containers: list[Object]
    init: list[Object] = field(default_factory=list)
    scheduler: str = SCHEDULER


def seen(stored: Object) -> Ready:
    """What there is in a pod of all that admission may change."""
    spec = stored["spec"]
    return Ready(
        [_seen_container(one) for one in spec["containers"]],
        [_seen_container(one) for one in spec.get("initContainers", [])],
        spec["schedulerName"],
    )


def _seen_container(one: Object) -> Object:
    return {"name": one["name"], "resources": one["resources"], "env": one.get("env", [])}


@dataclass(frozen=True)
class Untouched:
    """The pod is stored as it is: it asks nothing of ours."""


@dataclass(frozen=True)
class Refused:
    """The pod is refused with a sentence that contains this one."""

    sentence: str


@dataclass(frozen=True)
class Creation:
    """A pod that somebody creates."""

    saying: str
    pod: Object
    outcome: Ready | Untouched | Refused
    user: str = ALICE


def ready(name: str = "main", *, units: str = "8", env: list[Object] | None = None, **others: str) -> Object:
    """What admission makes of a container that asks for *units*; *others* are its other limits."""
    limits = {MEMORY: units, MANAGED: "0", **others}
    return {"name": name, "resources": {"limits": limits, "requests": limits}, "env": [*injected(name), *(env or [])]}


def ready_instance(name: str = "main", *, resource: str = INSTANCE) -> Object:
    """What admission makes of a container that asks a MIG instance."""
    limits = {resource: "1", MANAGED: "0"}
    return {"name": name, "resources": {"limits": limits, "requests": limits}, "env": injected(name)}


def plain(name: str, *, env: list[Object] | None = None) -> Object:
    """A container that admission left alone."""
    return {"name": name, "resources": {}, "env": env or []}


def alias(resource: str, amount: int | str) -> Object:
    """A container that asks under another product's name."""
    return container(limits={resource: amount})


def by_hand(*, env: list[Object] | None = None, managed: int | None = 0) -> Object:
    """A container that was prepared by somebody else than admission."""
    limits = {MEMORY: 8} if managed is None else {MEMORY: 8, MANAGED: managed}
    return container(limits=limits, env=injected() if env is None else env)
