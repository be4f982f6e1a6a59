"""`cotenant grow`: a pod that has the autoscaler add a node for one that waits because memory lies in pieces.

The autoscaler simulates kube-scheduler's own filters, by which such a pod fits: in sum there is enough. Its twin asks
the same, and may run on none of the nodes that the extender refuses: by these filters it fits on a new node alone.
"""

from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote

import click
import msgspec

from cotenant.cli import inspection, manifests
from cotenant.cluster import ClusterError, connect
from cotenant.contract.names import Names
from cotenant.contract.reasons import Reason
from extender.inspect.explain import NodeVerdict
from extender.inspect.rows import PodExplanation

Json = dict[str, Any]

_HOSTNAME = "kubernetes.io/hostname"
_TIMEOUT_SECONDS = 30.0
# Reasons that an empty node of the same kind has as well, where its GPUs are well.
_EMPTY_TOO = frozenset(
    {
        *(Reason.TOO_LARGE, Reason.TOO_FEW_GPUS, Reason.NO_SHARED_GPU, Reason.NO_SUCH_GPU, Reason.NO_MIG_PROFILE),
        *(Reason.ISOLATION_UNAVAILABLE, Reason.NAMESPACE_LIMIT, Reason.NO_INVENTORY),
    }
)
_ILL = frozenset({Reason.UNHEALTHY_GPU, Reason.FENCED_GPU})
# Where a pod may run: the twin is to fit on just such new nodes.
_PLACING = ("nodeSelector", "tolerations", "runtimeClassName", "schedulerName")
# It gives way to every other pod, and waits without evicting any. The cluster autoscaler adds no node for a pod below
# -10 by default (its --expendable-pods-priority-cutoff).
PRIORITY_CLASS = "cotenant-grow"
_CLASS = {
    "apiVersion": "scheduling.k8s.io/v1",
    "kind": "PriorityClass",
    "metadata": {"name": PRIORITY_CLASS},
    "value": -10,
    "preemptionPolicy": "Never",
    "globalDefault": False,
    "description": "Pods of cotenant grow, which give way to all others.",
}


def run(
    name: str,
    *,
    names: Names,
    namespace: str,
    server: str | None,
    kubeconfig: str | None,
    context: str | None,
    service: str,
    image: str,
    minutes: int,
) -> None:
    """Print what makes a node come for a pod; raise click.ClickException where no node would help."""
    try:
        ask = inspection.by_url(server) if server else inspection.by_proxy(kubeconfig, context, service)
        told = msgspec.json.decode(inspection.explanation(ask, "json", namespace, name), type=PodExplanation)
        with connect(kubeconfig, context=context, pool_size=1) as cluster:
            path = f"/api/v1/namespaces/{quote(namespace, safe='')}/pods/{quote(name, safe='')}"
            pod = msgspec.json.decode(cluster.get(path, timeout=_TIMEOUT_SECONDS).body)
    except ClusterError as error:
        raise click.ClickException(error.sentence) from error
    refused = [node.node for node in told.nodes if isinstance(node.reason, Reason)]
    futile = objection(told.fitting, told.nodes, names)
    if futile:
        raise click.ClickException(f"{namespace}/{name}: {told.summary}; {futile}")
    click.echo(manifests.written([_CLASS, twin(pod, refused, names, image=image, minutes=minutes)]), nl=False)


def objection(fitting: int, nodes: Iterable[NodeVerdict], names: Names) -> str:
    """Say why another node like those that are there would not take the pod; "" where one would."""
    refused = [node for node in nodes if isinstance(node.reason, Reason)]
    if fitting or not refused:
        return "another node is not what it waits for"
    if any(node.reason not in _EMPTY_TOO or any(gpu.reason in _ILL for gpu in node.gpus) for node in refused):
        return ""
    unlike = "another node like these would not hold it"
    if any(node.reason is Reason.TOO_LARGE for node in refused):
        return f"{unlike}: split it over several GPUs with {names.gpu_count}, or add GPUs that are larger"
    return f"{unlike}, be it empty: ask for what they have, or add nodes of another kind"


def twin(pod: Json, refused: list[str], names: Names, *, image: str, minutes: int) -> Json:
    """Make the pod's twin: its GPU request, wishes and placing, on none of the nodes *refused*, for some *minutes*."""
    spec, metadata = pod["spec"], pod["metadata"]
    wishes = {
        key: value
        for key, value in (metadata.get("annotations") or {}).items()
        if key in {names.isolation, names.gpu_model, names.gpu_count, names.policy}
    }
    containers = {
        kind: [_idle(one, names, image) for one in spec[kind]]
        for kind in ("initContainers", "containers")
        if spec.get(kind)
    }
    elsewhere = {"key": _HOSTNAME, "operator": "NotIn", "values": sorted(refused)}
    affinity = msgspec.json.decode(msgspec.json.encode(spec.get("affinity") or {}))
    required = affinity.setdefault("nodeAffinity", {}).setdefault("requiredDuringSchedulingIgnoredDuringExecution", {})
    # its terms are alternatives, so each of them needs it
    terms = required.setdefault("nodeSelectorTerms", []) or [{}]
    required["nodeSelectorTerms"] = [
        {**term, "matchExpressions": [*term.get("matchExpressions", []), elsewhere]} for term in terms
    ]
    placing = {key: spec[key] for key in _PLACING if spec.get(key)}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": f"grow-{metadata['name']}"[:253],
            "namespace": metadata["namespace"],
            "annotations": wishes,
        },
        "spec": {
            **placing,
            "affinity": affinity,
            "priorityClassName": PRIORITY_CLASS,
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 0,
            "activeDeadlineSeconds": 60 * minutes,
            "automountServiceAccountToken": False,
            **containers,
        },
    }


def _idle(container: Json, names: Names, image: str) -> Json:
    """Make a container that asks the same and idles; a sidecar stays one."""
    always = {"restartPolicy": container["restartPolicy"]} if container.get("restartPolicy") else {}
    asked = _asked(container.get("resources") or {}, names)
    return {"name": container["name"], "image": image, "resources": asked, **always}


def _asked(resources: Mapping[str, Any], names: Names) -> Json:
    """Give what a container asks, whether as limits or as requests alone; what admission has added is added anew."""
    return {
        kind: {name: amount for name, amount in (resources.get(kind) or {}).items() if name != names.managed}
        for kind in ("limits", "requests")
        if resources.get(kind)
    }
