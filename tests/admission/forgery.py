"""Ways to write what only the extender may write: on creation, on a stored pod, and through a Binding."""

from dataclasses import dataclass
from enum import Enum

from tests.admission.outcomes import ALICE, EXTENDER, KUBELET, Creation, Refused, Untouched
from tests.admission.pods import asking, container, pod

# What the extender writes at bind, with a bystander.
BOUND_ANNOTATIONS = {
    "cotenant.io/grant": '{"version":1}',
    "visible-devices.cotenant.io/main": "GPU-1",
    "mps-memory.cotenant.io/main": "0=8192M",
    "mps-threads.cotenant.io/main": "100",
    "mps-pipe.cotenant.io/main": "/tmp/nvidia-mps",
    "note": "mine",
}
FORGEABLE = [key for key in BOUND_ANNOTATIONS if key != "note"]


def only_the_extender(key: str, advice: str) -> str:
    return f"annotation {key} is written only by Cotenant's extender, when it binds the pod; {advice}"


FORGED = [
    Creation(
        f"{key} forged by {user} on a pod that {asks}",
        pod(one, annotations={key: "GPU-2"}),
        Refused(only_the_extender(key, "leave it out")),
        user=user,
    )
    for key, user, asks, one in (
        *((key, ALICE, "asks", asking()) for key in FORGEABLE),
        ("visible-devices.cotenant.io/any-container", ALICE, "asks nothing", container()),
        ("cotenant.io/grant", "admin", "asks", asking()),
        ("cotenant.io/grant", KUBELET, "asks nothing", container()),
    )
]
NEARLY_FORGED = [
    Creation("an annotation that only looks like ours", pod(container(), annotations={key: "x"}), Untouched())
    for key in ("cotenant.io/grants", "xmps-pipe.cotenant.io/main", "mps-pipe.cotenant.iox/main", "cotenant.io/note")
]


class Route(Enum):
    """A way to write annotations to a stored pod: its resource, subresource and operation in an AdmissionReview."""

    UPDATE = ("pods", "", "UPDATE")
    STATUS = ("pods", "status", "UPDATE")
    EPHEMERAL_CONTAINERS = ("pods", "ephemeralcontainers", "UPDATE")
    RESIZE = ("pods", "resize", "UPDATE")
    BINDING = ("pods", "binding", "CREATE")
    LEGACY_BINDING = ("bindings", "", "CREATE")


@dataclass(frozen=True)
class Write:
    """A change of annotations, None for removal, made to a bound pod, or to an unbound one by a Binding.

    *refused* is the sentence; empty where the write may pass.
    """

    saying: str
    route: Route
    changes: dict[str, str | None]
    refused: str
    user: str = ALICE


BINDINGS = (Route.BINDING, Route.LEGACY_BINDING)
# kube-apiserver 1.36 itself keeps the stored annotations on these, before it asks admission.
DROPPING = (Route.EPHEMERAL_CONTAINERS, Route.RESIZE)
UPDATES = tuple(route for route in Route if route not in BINDINGS)

WRITES = [
    *(
        Write(f"{key} changed through {route.name}", route, {key: "x"}, only_the_extender(key, "leave it as it is"))
        for route in UPDATES
        for key in FORGEABLE
    ),
    *(
        Write(f"{key} removed through {route.name}", route, {key: None}, only_the_extender(key, "leave it as it is"))
        for route in (Route.UPDATE, Route.STATUS)
        for key in FORGEABLE
    ),
    *(
        Write(
            f"an annotation of ours added through {route.name}",
            route,
            {"mps-threads.cotenant.io/other": "100"},
            only_the_extender("mps-threads.cotenant.io/other", "leave it out"),
        )
        for route in Route
    ),
    *(
        Write(f"{key} given in {route.name}", route, {key: "x"}, only_the_extender(key, "leave it out"))
        for route in BINDINGS
        for key in FORGEABLE
    ),
    *(
        Write(
            f"{user} through {route.name}",
            route,
            {"cotenant.io/grant": "x"},
            only_the_extender("cotenant.io/grant", "leave it as it is" if route in UPDATES else "leave it out"),
            user=user,
        )
        for user in ("admin", KUBELET)
        for route in (Route.STATUS, Route.BINDING)
    ),
    *(
        Write(f"a note changed through {route.name}", route, {"note": "theirs"}, "")
        for route in (Route.UPDATE, Route.STATUS, *BINDINGS)
    ),
    *(
        Write(f"the extender through {route.name}", route, {"cotenant.io/grant": "{}"}, "", user=EXTENDER)
        for route in (Route.UPDATE, Route.STATUS, *BINDINGS)
    ),
]
