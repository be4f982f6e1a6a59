"""A manifest's workload as a pod of a document: the API server has not seen it, so it is defaulted and checked here."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from cotenant.contract.compute import COUNTED, checked
from cotenant.contract.names import ALIASES_IN_GIB, ALIASES_IN_MIB
from cotenant.contract.pods import Container, Pod, Quantity, Resources
from cotenant.simulator.document import Document, PodEntry
from cotenant.simulator.snapshot import read_pod

# Where the pod template of a workload stands, and how many pods are made of it.
_TEMPLATES = {
    "Pod": ((), ()),
    "Deployment": (("spec", "template"), ("spec", "replicas")),
    "ReplicaSet": (("spec", "template"), ("spec", "replicas")),
    "StatefulSet": (("spec", "template"), ("spec", "replicas")),
    "Job": (("spec", "template"), ("spec", "parallelism")),
    "CronJob": (("spec", "jobTemplate", "spec", "template"), ("spec", "jobTemplate", "spec", "parallelism")),
}


def read_template(objects: Sequence[Any], document: Document) -> tuple[PodEntry, int]:
    """Find the one workload of a manifest that asks GPU memory, and how many pods it makes.

    Raises ValueError with a sentence where there is none or several, or its pod cannot be asked for.
    """
    found = []
    for one in objects:
        if not isinstance(one, dict) or one.get("kind") not in _TEMPLATES:
            continue
        where, many = _TEMPLATES[one["kind"]]
        template = _at(one, where)
        if not isinstance(template, dict):
            raise ValueError(f"the {one['kind']} has no {'.'.join(where)}")  # noqa: TRY004 - the file's fault
        count = _at(one, many) if many else 1
        name = str(_at(one, ("metadata", "name")) or "pod")
        whole = {**template, "metadata": {"uid": name, **(template.get("metadata") or {}), "name": name}}
        raw = msgspec.json.encode(_floats_as_text(whole))
        read = read_pod(raw, names=document.names, unit_bytes=document.unit_bytes, ready=_created)
        if read is not None:
            found.append((read, count if isinstance(count, int) and count >= 0 else 1))
    if len(found) != 1:
        raise ValueError(f"expected one Pod or workload that asks {document.names.gpu_mem}, found {len(found)}")
    return found[0]


def _at(value: Any, path: Sequence[str]) -> Any:
    for step in path:
        value = value.get(step) if isinstance(value, dict) else None
    return value


def _floats_as_text(value: Any) -> Any:
    """Write numbers with a fraction as text, as the API server gives amounts back: cpu: 0.5 is one."""
    if isinstance(value, dict):
        return {key: _floats_as_text(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_floats_as_text(inner) for inner in value]
    return str(value) if isinstance(value, float) else value


def _created(pod: Pod) -> Pod:
    """Make of a pod what the API server makes of it; raise ValueError for an amount that it would refuse."""
    spec = pod.spec
    for container, _ in pod.start_order:
        _check_names(container)
        _check(f"container {container.name}", container.resources)
    _check("the pod", spec.resources)
    _check("the pod's overhead", Resources(requests=spec.overhead))
    containers = tuple(map(_requesting, spec.containers or ()))
    init_containers = tuple(map(_requesting, spec.init_containers or ()))
    return msgspec.structs.replace(
        pod,
        spec=msgspec.structs.replace(
            spec,
            containers=containers,
            init_containers=init_containers,
            resources=_whole(spec.resources, (*init_containers, *containers)),
        ),
    )


def _check_names(container: Container) -> None:
    """Refuse another system's name, which admission alone rewrites; the ledger's sentence blames the installation."""
    resources = container.resources or Resources()
    for name in (*ALIASES_IN_GIB, *ALIASES_IN_MIB):
        if name in {*(resources.limits or ()), *(resources.requests or ())}:
            said = "which is another system's: cotenant migrate FILE says it in our words"
            raise ValueError(f"container {container.name} asks {name}, {said}")


def _check(who: str, resources: Resources | None) -> None:
    for amounts in (resources.requests, resources.limits) if resources is not None else ():
        for name in COUNTED:
            if name in (amounts or {}):
                try:
                    checked((amounts or {})[name])
                except ValueError as error:
                    raise ValueError(f"{who}, {name}: {error}") from error


def _requesting(container: Container) -> Container:
    """Have a container ask what it is limited to, where it does not say (pkg/apis/core/v1/defaults.go)."""
    resources = container.resources
    if resources is None or not resources.limits:
        return container
    asked = {**resources.limits, **(resources.requests or {})}
    return msgspec.structs.replace(container, resources=msgspec.structs.replace(resources, requests=asked))


def _whole(resources: Resources | None, containers: Sequence[Container]) -> Resources | None:
    """Have the pod as a whole ask what it is limited to, where neither it nor a container says (there, too)."""
    if resources is None or not resources.limits:
        return resources
    said = {name for one in containers if one.resources is not None for name in one.resources.requests or {}}
    unsaid: Mapping[str, Quantity] = {name: amount for name, amount in resources.limits.items() if name not in said}
    return msgspec.structs.replace(resources, requests={**unsaid, **(resources.requests or {})})
