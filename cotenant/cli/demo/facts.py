"""What became of pods: read from the API server and the kubelets, and compared with each other.

For every container the grant in the pod's annotation, the environment that the kubelet composed and the device ids that
it handed out must tell the same (what each of them says is in the contract).
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import msgspec

from cotenant.cli.demo.stage import EXTENDER, PLUGIN, Stage
from cotenant.cli.demo.strips import GPUPicture, NodePicture, Part
from cotenant.contract import grant as grants
from cotenant.contract.environment import INJECTED, annotations, informative, injected
from cotenant.contract.grant import ContainerGrant, Grant, GrantError
from cotenant.contract.inventory import GPU
from cotenant.contract.names import mig_suffix
from cotenant.contract.units import id_prefix

Json = Mapping[str, Any]


class Given(msgspec.Struct, frozen=True):
    """Hold what one container was given, and how its sources disagree, in sentences: none where they agree."""

    container: str
    grant: ContainerGrant
    # in the order of the grant's shares
    gpus: tuple[GPU, ...]
    environment: Mapping[str, str]
    ids: tuple[str, ...]
    disagreements: tuple[str, ...]


def phase(pod: Json) -> str:
    """Say how far a pod has come."""
    return str(pod.get("status", {}).get("phase", ""))


def why_waiting(pod: Json) -> str:
    """Give the scheduler's own words, empty when it has not refused the pod."""
    conditions = pod.get("status", {}).get("conditions") or ()
    refused = (c for c in conditions if c["type"] == "PodScheduled" and c["status"] == "False")
    return next((c["message"] for c in refused if c["reason"] == "Unschedulable"), "")


def grant_of(stage: Stage, pod: Json) -> Grant | None:
    """Read a pod's grant; None where there is none that can be read."""
    try:
        return grants.decode(pod["metadata"]["annotations"][stage.names.grant])
    except (KeyError, GrantError):
        return None


def given(stage: Stage, pod: Json) -> list[Given]:
    """Compare what each container of a running pod was given; none at all for a pod without a readable grant."""
    grant, node = grant_of(stage, pod), pod["spec"].get("nodeName", "")
    inventory = stage.inventory(node)
    if grant is None or inventory is None:
        return []
    gpus = {gpu.uuid: gpu for gpu in inventory.gpus}
    compared = []
    for container in grant.containers:
        started = stage.kubelets[node].started(pod["metadata"]["uid"], container.name)
        environment = started.env if started else {}
        resource = stage.names.gpu_mem if container.mig is None else stage.names.mig(container.mig.profile)
        ids = sorted(started.ids.get(resource, ())) if started else []
        compared.append(
            Given(
                container=container.name,
                grant=container,
                gpus=tuple(gpus[share.uuid] for share in container.gpus if share.uuid in gpus),
                environment=environment,
                ids=tuple(ids),
                disagreements=(
                    *_unlike_environment(environment, container),
                    *_unlike_annotations(stage, pod, grant, container),
                    *_unlike_ids(ids, container),
                    *(f"GPU {s.uuid} is not one of node {node}" for s in container.gpus if s.uuid not in gpus),
                ),
            )
        )
    return compared


def pictures(stage: Stage) -> list[NodePicture]:
    """Picture every node's GPUs with what the pods' grants hold of them."""
    held: dict[str, list[Part]] = {}
    # whoever was bound first stands first, so that a strip does not change when others come
    bound = {write.name: turn for turn, write in enumerate(stage.api.writes) if write.subresource == "binding"}
    for pod in sorted(stage.api.pods(), key=lambda pod: bound.get(pod["metadata"]["name"], -1)):
        grant = grant_of(stage, pod)
        if grant is not None and phase(pod) not in {"Succeeded", "Failed"}:
            for uuid, amount in grant.charges().items():
                held.setdefault(uuid, []).append(Part(pod["metadata"]["name"], amount))
    shown = []
    for node in stage.kubelets:
        inventory = stage.inventory(node)
        gpus = inventory.gpus if inventory else ()
        shown.append(
            NodePicture(
                name=node,
                model=gpus[0].model if gpus else "no GPUs",
                gpus=tuple(GPUPicture(gpu.index, gpu.usable_bytes, tuple(held.get(gpu.uuid, ()))) for gpu in gpus),
            )
        )
    return shown


def wrong_writes(stage: Stage, pods: set[str]) -> list[str]:
    """Name the pods that our programs did not write to exactly once, by their Binding, and what else they wrote.

    A nomination, by which a pod that waits may be pointed at memory that was freed, is no part of placing it.
    """
    counted: dict[str, Counter[str]] = {pod: Counter() for pod in pods}
    nomination = ("patch", "status", EXTENDER)
    for write in stage.api.writes:
        if (write.verb, write.subresource, write.user) == nomination:
            continue
        if write.resource == "pods" and write.user.startswith((EXTENDER, PLUGIN)):
            what = f"{write.verb} pods/{write.subresource} by {write.user} -> {write.status}"
            counted.setdefault(write.name, Counter())[what] += 1
    expected = Counter({f"create pods/binding by {EXTENDER} -> 201": 1})
    return [f"pod {pod}: {dict(found) or 'no write'}" for pod, found in counted.items() if found != expected]


def _unlike_environment(environment: Mapping[str, str], container: ContainerGrant) -> list[str]:
    expected = injected(container) | informative(container)
    return [
        f"container {container.name} has {key}={environment.get(key)}, but was granted {value}"
        for key, value in expected.items()
        if environment.get(key) != value
    ]


def _unlike_annotations(stage: Stage, pod: Json, grant: Grant, container: ContainerGrant) -> list[str]:
    there = pod["metadata"]["annotations"]
    expected = annotations(grant, stage.names)
    keys = [key for key in expected if key.endswith(f"/{container.name}")]
    wrong = [
        f"annotation {key} is {there.get(key)}, not {expected[key]}" for key in keys if there.get(key) != expected[key]
    ]
    return wrong if len(keys) == len(INJECTED) else [*wrong, f"container {container.name} lacks annotations"]


def _unlike_ids(ids: list[str], container: ContainerGrant) -> list[str]:
    """Compare how many ids there are of each GPU; an exclusive GPU is charged whole, but only what was asked is ids."""
    each = container.units // len(container.gpus)
    instance = "" if container.mig is None else f"-{mig_suffix(container.mig.profile)}"
    expected = {f"{id_prefix(share.uuid)}{instance}": each for share in container.gpus}
    found = dict(Counter(unit.rpartition("-")[0] for unit in ids))
    return [] if found == expected else [f"container {container.name} holds ids of {found}, but was granted {expected}"]
