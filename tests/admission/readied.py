"""Pods that are readied, and pods that are none of ours."""

from tests.admission.outcomes import Creation, Ready, Untouched, alias, plain, ready, ready_instance
from tests.admission.pods import (
    INSTANCE,
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
    Creation(
        "a container that asks a MIG instance gets all it needs, and keeps its resource",
        pod(container(limits={INSTANCE: 1}), container("web")),
        Ready([ready_instance(), plain("web")]),
    ),
    Creation(
        "a sidecar may ask an instance of its own",
        pod(
            container(limits={INSTANCE: 1}),
            init=[container("proxy", limits={"nvidia.com/mig-2g.10gb": 1}, restartPolicy="Always")],
        ),
        Ready([ready_instance()], init=[ready_instance("proxy", resource="nvidia.com/mig-2g.10gb")]),
    ),
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
        "a variable of another name may read our annotations",
        pod(asking(env=[from_annotation("NVIDIA_VISIBLE_DEVICES", "main") | {"name": "MY_GPUS"}])),
        Ready([ready(env=[from_annotation("NVIDIA_VISIBLE_DEVICES", "main") | {"name": "MY_GPUS"}])]),
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
        "the largest amount of an alias: 2**30 GiB",
        pod(alias("aliyun.com/gpu-mem", 2**30)),
        Ready([ready(units="1073741824")]),
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
