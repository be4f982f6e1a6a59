"""Pods that are refused when they are created, each for one reason."""

from tests.admission.outcomes import Creation, Ready, Refused, alias, by_hand, ready
from tests.admission.pods import (
    INSTANCE,
    MANAGED,
    MEMORY,
    SCHEDULER,
    SOURCES,
    asking,
    container,
    from_annotation,
    injected,
    pod,
)
from tests.admission.readied import UNTOUCHED


def overriding(variable: str) -> Refused:
    return Refused(f"container main sets {variable} itself, which Cotenant sets to the GPU that it chooses; remove it")


REFUSED = [
    Creation(
        "a MIG instance on a preset node",
        pod(container(limits={INSTANCE: 1}), nodeName="n1"),
        Refused("spec.nodeName is n1, which goes past the scheduler that chooses the GPU"),
    ),
    Creation(
        "a MIG instance and a variable of ours",
        pod(container(limits={INSTANCE: 1}, env=[{"name": "NVIDIA_VISIBLE_DEVICES", "value": "all"}])),
        overriding("NVIDIA_VISIBLE_DEVICES"),
    ),
    Creation(
        "two MIG instances for one process",
        pod(container(limits={INSTANCE: 2})),
        Refused(f"container main asks {INSTANCE}: 2; ask for 1, since a process can use one MIG instance"),
    ),
    Creation(
        "no MIG instance",
        pod(container(limits={INSTANCE: 0})),
        Refused(f"container main asks {INSTANCE}: 0; ask for 1 unit or more"),
    ),
    *(
        Creation(
            f"a MIG instance and {other}",
            pod(container(limits={INSTANCE: 1, other: 1})),
            Refused(f"container main asks both {INSTANCE} and {other}; ask for one of them"),
        )
        for other in ("nvidia.com/gpu", "nvidia.com/mig-2g.10gb")
    ),
    Creation(
        "memory and a MIG instance in two containers",
        pod(asking(name="a"), container("b", limits={INSTANCE: 1})),
        Refused(f"container a asks {MEMORY} and container b asks {INSTANCE}; ask for one of them in a pod"),
    ),
    Creation(
        "a MIG instance for an init container",
        pod(container("web"), init=[container("warm", limits={INSTANCE: 1})]),
        Refused(f"init container warm asks {INSTANCE}; the kubelet would hand its instance on to the next container"),
    ),
    Creation(
        "a MIG instance over two GPUs",
        pod(container(limits={INSTANCE: 1}), annotations={"cotenant.io/gpu-count": "2"}),
        Refused("cotenant.io/gpu-count: 2 in a pod that asks MIG instances; leave it out"),
    ),
    Creation(
        "a MIG instance of a GPU for the pod itself",
        pod(container(limits={INSTANCE: 1}), annotations={"cotenant.io/isolation": "exclusive"}),
        Refused("cotenant.io/isolation: exclusive in a pod that asks MIG instances, whose GPU has others; ask strict"),
    ),
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
        "an alias of one GiB more than is read",
        pod(alias("aliyun.com/gpu-mem", 2**30 + 1)),
        Refused("container main asks for aliyun.com/gpu-mem, which could not be rewritten"),
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
        for text in ("0", "65", "-1", "1.5", "two", "", "12345", "01", "٣")  # the last is Arabic for 3
    ),
    *(
        Creation(
            f"compute-percent {text!r}",
            pod(asking(), annotations={"cotenant.io/compute-percent": text}),
            Refused(f"cotenant.io/compute-percent: '{text}' is not a whole number from 1 to 100"),
        )
        for text in ("0", "101", "50%", "050")
    ),
    *(
        Creation(
            f"{wish} with an end of line, as of a YAML block",
            pod(asking(), annotations={f"cotenant.io/{wish}": text + "\n"}),
            Refused(f"cotenant.io/{wish}: '{text}\\n' is "),
        )
        for wish, text in (("isolation", "strict"), ("gpu-count", "2"), ("compute-percent", "50"))
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

LACKING = Refused(
    "container main lacks what Cotenant's mutating admission adds to a container that asks for GPU memory"
)

# Where the mutation did not happen, or another webhook undid it: all that it adds has to be there all the same.
UNMUTATED_CREATIONS = [
    Creation("all added by hand", pod(by_hand(), schedulerName=SCHEDULER), Ready([ready()])),
    Creation("nothing added", pod(asking(), schedulerName=SCHEDULER), LACKING),
    Creation("no managed resource", pod(by_hand(managed=None), schedulerName=SCHEDULER), LACKING),
    Creation("a managed resource of another amount", pod(by_hand(managed=1), schedulerName=SCHEDULER), LACKING),
    Creation(
        "no scheduler", pod(by_hand()), Refused("spec.schedulerName is default-scheduler, but only cotenant-scheduler")
    ),
    Creation(
        "an alias",
        pod(container(limits={"aliyun.com/gpu-mem": 8, MANAGED: 0}, env=injected()), schedulerName=SCHEDULER),
        Refused("container main asks for aliyun.com/gpu-mem, which could not be rewritten"),
    ),
    *(
        Creation(
            f"{name} missing",
            pod(by_hand(env=[one for one in injected() if one["name"] != name]), schedulerName=SCHEDULER),
            LACKING,
        )
        for name in SOURCES
    ),
    *(
        Creation(
            f"{name} {how}",
            pod(by_hand(env=[other if one["name"] == name else one for one in injected()]), schedulerName=SCHEDULER),
            overriding(name),
        )
        for name in SOURCES
        for how, other in (
            ("a literal instead", {"name": name, "value": "all"}),
            ("of another container instead", from_annotation(name, "other")),
        )
    ),
    *UNTOUCHED,
]
