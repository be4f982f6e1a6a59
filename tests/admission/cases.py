"""What admission has to do, as one table: the policies and the webhook are both held to it.

tests/admission runs it through the pure functions, e2e/test_admission.py through a real kube-apiserver with the
policies and with the webhook.
"""

from dataclasses import dataclass, field
from enum import Enum

from tests.admission.pods import (
    MANAGED,
    MEMORY,
    SCHEDULER,
    Object,
    asking,
    container,
    from_annotation,
    injected,
    pod,
)

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
    amounts = {
        section: {name: str(amount) for name, amount in all_.items()} for section, all_ in one["resources"].items()
    }
    return {"name": one["name"], "resources": amounts, "env": one.get("env", [])}


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


def plain(name: str, *, env: list[Object] | None = None) -> Object:
    """A container that admission left alone."""
    return {"name": name, "resources": {}, "env": env or []}


def alias(resource: str, amount: int | str) -> Object:
    """A container that asks under another product's name."""
    return container(limits={resource: amount})


# One of every kind of value that env knows.
EVERY_KIND_OF_VALUE: list[Object] = [
    {"name": "LITERAL", "value": "x"},
    {"name": "REFERRING", "value": "$(NVIDIA_VISIBLE_DEVICES)"},
    {"name": "POD_NAME", "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.name"}}},
    {"name": "CPU", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu", "divisor": "0"}}},
    {"name": "SETTING", "valueFrom": {"configMapKeyRef": {"name": "settings", "key": "a", "optional": True}}},
    {"name": "PASSWORD", "valueFrom": {"secretKeyRef": {"name": "secrets", "key": "b"}}},
    {"name": "LITERAL", "value": "again"},
]

READY = [
    Creation("a container that asks gets all it needs", pod(asking()), Ready([ready()])),
    Creation(
        "the user's own variables stay as they are, behind ours",
        pod(asking(env=EVERY_KIND_OF_VALUE)),
        Ready([ready(env=EVERY_KIND_OF_VALUE)]),
    ),
    Creation(
        "only containers that ask are touched",
        pod(container("web", env=[{"name": "A", "value": "b"}]), asking(), container("log")),
        Ready([plain("web", env=[{"name": "A", "value": "b"}]), ready(), plain("log")]),
    ),
    Creation(
        "an init container and a sidecar that ask get it as well",
        pod(container("web"), init=[asking(2, "warm"), asking(3, "proxy", restartPolicy="Always"), container("plain")]),
        Ready([plain("web")], init=[ready("warm", units="2"), ready("proxy", units="3"), plain("plain")]),
    ),
    Creation(
        "two containers that ask read different annotations",
        pod(asking(1, "one"), asking(2, "two")),
        Ready([ready("one", units="1"), ready("two", units="2")]),
    ),
    Creation(
        "requests written out beside limits change nothing",
        pod(container(resources={"limits": {MEMORY: "8"}, "requests": {MEMORY: "8"}})),
        Ready([ready()]),
    ),
    Creation("other resources stay", pod(container(limits={MEMORY: 8, "cpu": "2"})), Ready([ready(cpu="2")])),
    Creation(
        "a managed amount that the user wrote becomes 0",
        pod(container(limits={MEMORY: 8, MANAGED: 7})),
        Ready([ready()]),
    ),
    Creation(
        "our scheduler may be named, and so may the default one",
        pod(asking(), schedulerName="default-scheduler"),
        Ready([ready()]),
    ),
    Creation("our own scheduler may be named", pod(asking(), schedulerName=SCHEDULER), Ready([ready()])),
    Creation(
        "a pod that is ready already stays so",
        pod(container(limits={MEMORY: 8, MANAGED: 0}, env=injected()), schedulerName=SCHEDULER),
        Ready([ready()]),
    ),
    Creation(
        "what is there already of our environment is not added again",
        pod(asking(env=[{"name": "A", "value": "b"}, from_annotation("CUDA_MPS_PIPE_DIRECTORY", "main")])),
        Ready(
            [
                ready()
                | {
                    "env": [
                        *injected()[:3],
                        {"name": "A", "value": "b"},
                        from_annotation("CUDA_MPS_PIPE_DIRECTORY", "main"),
                    ]
                }
            ]
        ),
    ),
    Creation(
        "a variable from envFrom loses against env, so it may be there",
        pod(asking(envFrom=[{"configMapRef": {"name": "gpus"}}])),
        Ready([ready()]),
    ),
    Creation(
        "a neighbour that asks nothing may hide the GPUs from itself",
        pod(asking(), container("web", env=[{"name": "NVIDIA_VISIBLE_DEVICES", "value": "void"}])),
        Ready([ready(), plain("web", env=[{"name": "NVIDIA_VISIBLE_DEVICES", "value": "void"}])]),
    ),
    Creation(
        "wishes that mean something pass",
        pod(
            asking(),
            annotations={
                "cotenant.io/isolation": "strict",
                "cotenant.io/gpu-count": "2",
                "cotenant.io/compute-percent": "100",
                "cotenant.io/gpu-model": "NVIDIA H200",
            },
        ),
        Ready([ready()]),
    ),
    # Aliases count other units; amounts are rounded up to GiB.
    Creation("aliyun.com/gpu-mem counts GiB", pod(alias("aliyun.com/gpu-mem", 3)), Ready([ready(units="3")])),
    Creation(
        "volcano.sh/vgpu-memory counts MiB: 2048 are 2 GiB",
        pod(alias("volcano.sh/vgpu-memory", 2048)),
        Ready([ready(units="2")]),
    ),
    Creation(
        "nvidia.com/gpumem counts MiB: 2049 are 3 GiB, rounded up",
        pod(alias("nvidia.com/gpumem", 2049)),
        Ready([ready(units="3")]),
    ),
    Creation(
        "nvidia.com/gpu-memory counts MiB: 1 is 1 GiB, rounded up",
        pod(alias("nvidia.com/gpu-memory", 1)),
        Ready([ready(units="1")]),
    ),
    Creation(
        "an amount with a suffix is a number too: 8k MiB are 8000, which is 8 GiB, rounded up",
        pod(alias("volcano.sh/vgpu-memory", "8k")),
        Ready([ready(units="8")]),
    ),
    Creation(
        "an alias in an init container is rewritten, beside other resources",
        pod(container("web"), init=[container("warm", limits={"nvidia.com/gpumem": 1024, "cpu": "1"})]),
        Ready([plain("web")], init=[ready("warm", units="1", cpu="1")]),
    ),
]

UNTOUCHED = [
    Creation("a pod without our resource", pod(container()), Untouched()),
    Creation("a pod on a preset node", pod(container(), nodeName="n1"), Untouched()),
    Creation("a pod of another scheduler", pod(container(), schedulerName="volcano"), Untouched()),
    Creation(
        "a pod that sets our variable",
        pod(container(env=[{"name": "NVIDIA_VISIBLE_DEVICES", "value": "all"}])),
        Untouched(),
    ),
    Creation("a pod that asks for whole GPUs", pod(container(limits={"nvidia.com/gpu": 1})), Untouched()),
    Creation(
        "a pod with wishes that mean nothing, but no request",
        pod(container(), annotations={"cotenant.io/gpu-count": "many"}),
        Untouched(),
    ),
    Creation("a pod with the managed resource only", pod(container(limits={MANAGED: 0})), Untouched()),
]


def overriding(variable: str) -> Refused:
    return Refused(f"container main sets {variable} itself, which Cotenant sets to the GPU that it chooses; remove it")


REFUSED = [
    Creation(
        "another scheduler",
        pod(asking(), schedulerName="volcano"),
        Refused(
            "spec.schedulerName is volcano, but only cotenant-scheduler knows who holds which GPU; "
            "leave schedulerName out"
        ),
    ),
    Creation(
        "a preset node",
        pod(asking(), nodeName="n1"),
        Refused(
            "spec.nodeName is n1, which goes past the scheduler that chooses the GPU; "
            "leave nodeName out and use nodeSelector or node affinity"
        ),
    ),
    Creation(
        "a preset node under an alias",
        pod(alias("aliyun.com/gpu-mem", 1), nodeName="n1"),
        Refused("spec.nodeName is n1, which goes past the scheduler"),
    ),
    Creation(
        "a preset node, asked for by an init container",
        pod(container("web"), init=[asking(1, "warm")], nodeName="n1"),
        Refused("spec.nodeName is n1, which goes past the scheduler"),
    ),
    *(
        Creation(f"{name} set by a literal", pod(asking(env=[{"name": name, "value": "all"}])), overriding(name))
        for name in ("NVIDIA_VISIBLE_DEVICES", "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT")
    ),
    *(
        Creation(f"{name} set in another way", pod(asking(env=[{"name": name, "valueFrom": source}])), overriding(name))
        for name, source in {
            "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": {"secretKeyRef": {"name": "s", "key": "k"}},
            "CUDA_MPS_PIPE_DIRECTORY": {"configMapKeyRef": {"name": "s", "key": "k"}},
            "NVIDIA_VISIBLE_DEVICES": {"fieldRef": {"fieldPath": "metadata.annotations['mine']"}},
        }.items()
    ),
    Creation(
        "a variable read from another container's annotation",
        pod(asking(env=[from_annotation("NVIDIA_VISIBLE_DEVICES", "other")]), asking(1, "other")),
        overriding("NVIDIA_VISIBLE_DEVICES"),
    ),
    Creation(
        "a variable read from the annotation of another variable",
        pod(asking(env=[from_annotation("CUDA_MPS_PIPE_DIRECTORY", "main") | {"name": "NVIDIA_VISIBLE_DEVICES"}])),
        overriding("NVIDIA_VISIBLE_DEVICES"),
    ),
    Creation(
        "an empty variable, which would win all the same",
        pod(asking(env=[{"name": "CUDA_MPS_PIPE_DIRECTORY"}])),
        overriding("CUDA_MPS_PIPE_DIRECTORY"),
    ),
    Creation(
        "a variable that stands behind our own",
        pod(asking(env=[*injected(), {"name": "NVIDIA_VISIBLE_DEVICES", "value": "all"}])),
        overriding("NVIDIA_VISIBLE_DEVICES"),
    ),
    Creation(
        "our own variable twice",
        pod(asking(env=[*injected(), injected()[0]])),
        overriding("NVIDIA_VISIBLE_DEVICES"),
    ),
    Creation(
        "a variable set in a sidecar that asks",
        pod(
            container("web"),
            init=[asking(1, env=[{"name": "NVIDIA_VISIBLE_DEVICES", "value": "all"}], restartPolicy="Always")],
        ),
        overriding("NVIDIA_VISIBLE_DEVICES"),
    ),
    Creation(
        "our resource and an alias in one container",
        pod(container(limits={MEMORY: 1, "nvidia.com/gpumem": 1024})),
        Refused(
            "container main asks for GPU memory under two names, cotenant.io/gpu-mem and nvidia.com/gpumem; "
            "keep one of them"
        ),
    ),
    Creation(
        "two aliases in one container",
        pod(container(limits={"aliyun.com/gpu-mem": 1, "volcano.sh/vgpu-memory": 1024})),
        Refused(
            "container main asks for GPU memory under two names, aliyun.com/gpu-mem and volcano.sh/vgpu-memory; "
            "keep one of them"
        ),
    ),
    Creation(
        "an alias of an amount that overflows",
        pod(alias("aliyun.com/gpu-mem", "9E")),
        Refused(
            "container main asks for aliyun.com/gpu-mem, which could not be rewritten to cotenant.io/gpu-mem; "
            "ask for a whole number of cotenant.io/gpu-mem"
        ),
    ),
    Creation(
        "an amount beyond 64 bits",
        pod(asking("1e30")),
        Refused("container main asks cotenant.io/gpu-mem: '1e30' is more than any GPU has"),
    ),
    Creation(
        "an alias of an amount beyond 64 bits",
        pod(alias("nvidia.com/gpumem", "1e30")),
        Refused("container main asks for nvidia.com/gpumem, which could not be rewritten to cotenant.io/gpu-mem"),
    ),
    Creation(
        "an amount that no GPU has",
        pod(asking("9E")),
        Refused("container main asks cotenant.io/gpu-mem: '9E' is more than any GPU has"),
    ),
    Creation("no units", pod(asking(0)), Refused("container main asks cotenant.io/gpu-mem: 0; ask for 1 unit or more")),
    Creation(
        "no units under an alias",
        pod(alias("nvidia.com/gpumem", 0)),
        Refused("container main asks cotenant.io/gpu-mem: 0; ask for 1 unit or more"),
    ),
    Creation(
        "an unknown isolation",
        pod(asking(), annotations={"cotenant.io/isolation": "total"}),
        Refused("cotenant.io/isolation: 'total' is none of none, limited, strict, exclusive"),
    ),
    *(
        Creation(
            f"gpu-count {text!r}",
            pod(asking(), annotations={"cotenant.io/gpu-count": text}),
            Refused(f"cotenant.io/gpu-count: '{text}' is not a whole number from 1 to 64"),
        )
        for text in ("0", "65", "-1", "1.5", "two", "", "12345", "٣")  # the last is Arabic for 3
    ),
    *(
        Creation(
            f"compute-percent {text!r}",
            pod(asking(), annotations={"cotenant.io/compute-percent": text}),
            Refused(f"cotenant.io/compute-percent: '{text}' is not a whole number from 1 to 100"),
        )
        for text in ("0", "101", "50%")
    ),
    Creation(
        "memory that does not split over its GPUs",
        pod(asking(8), asking(7, "other"), annotations={"cotenant.io/gpu-count": "2"}),
        Refused(
            "container other asks cotenant.io/gpu-mem: 7, which does not split equally over cotenant.io/gpu-count: 2; "
            "ask for a multiple of 2"
        ),
    ),
    Creation(
        "an ordinary init container over several GPUs",
        pod(asking(8), init=[asking(8, "warm")], annotations={"cotenant.io/gpu-count": "2"}),
        Refused(
            "init container warm asks cotenant.io/gpu-mem in a pod with cotenant.io/gpu-count: 2; the kubelet would"
        ),
    ),
    *(
        Creation(
            f"{other} in the same container",
            pod(container(limits={MEMORY: 8, other: 1})),
            Refused(f"container main asks both cotenant.io/gpu-mem and {other}; ask for one of them"),
        )
        for other in ("nvidia.com/gpu", "nvidia.com/gpu.shared", "nvidia.com/mig-1g.10gb", "cotenant.io/mig-1g.10gb")
    ),
]

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

CREATIONS = [*READY, *UNTOUCHED, *REFUSED, *FORGED, *NEARLY_FORGED]

# In the attached layout any scheduler will do; all else holds.
ATTACHED_CREATIONS = [
    Creation("the default scheduler stays", pod(asking()), Ready([ready()], scheduler="default-scheduler")),
    Creation("any scheduler may be named", pod(asking(), schedulerName="mine"), Ready([ready()], scheduler="mine")),
    *(
        case
        for case in REFUSED
        if case.saying in {"a preset node", "no units", "NVIDIA_VISIBLE_DEVICES set by a literal"}
    ),
    *FORGED,
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
