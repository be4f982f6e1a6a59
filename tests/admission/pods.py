"""Builders of pods as users write them, and of what admission should make of them."""

from typing import Any

Object = dict[str, Any]

MEMORY = "cotenant.io/gpu-mem"
MANAGED = "cotenant.io/managed"
INSTANCE = "nvidia.com/mig-1g.5gb"
SCHEDULER = "cotenant-scheduler"

SOURCES = {
    "NVIDIA_VISIBLE_DEVICES": "visible-devices.cotenant.io",
    "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": "mps-memory.cotenant.io",
    "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "mps-threads.cotenant.io",
    "CUDA_MPS_PIPE_DIRECTORY": "mps-pipe.cotenant.io",
}


def container(
    name: str = "main",
    *,
    limits: Object | None = None,
    env: list[Object] | None = None,
    **fields: Any,
) -> Object:
    """A container, without what is not given."""
    made: Object = {"name": name, "image": "example/image:1", **fields}
    if limits is not None:
        made["resources"] = {"limits": limits}
    if env is not None:
        made["env"] = env
    return made


def asking(units: int | str = 8, name: str = "main", **fields: Any) -> Object:
    """A container that asks for GPU memory and nothing else."""
    return container(name, limits={MEMORY: units}, **fields)


def pod(
    *containers: Object, init: list[Object] | None = None, annotations: Object | None = None, **spec: Any
) -> Object:
    """A pod of these containers."""
    metadata: Object = {"generateName": "case-", "namespace": "default"}
    if annotations is not None:
        metadata["annotations"] = annotations
    if init is not None:
        spec["initContainers"] = init
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": {"containers": list(containers), **spec}}


def from_annotation(variable: str, container_name: str) -> Object:
    """The entry of `env` that admission writes."""
    path = f"metadata.annotations['{SOURCES[variable]}/{container_name}']"
    return {"name": variable, "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": path}}}


def injected(container_name: str = "main") -> list[Object]:
    """The entries of `env` that admission writes, in their order."""
    return [from_annotation(variable, container_name) for variable in SOURCES]


def as_decoded(pod: Object) -> Object:
    """The pod as kube-apiserver hands it to admission: amounts are strings, and the defaults that matter are there.

    Requests default to limits, schedulerName to default-scheduler, fieldRef.apiVersion to v1
    (pkg/apis/core/v1/defaults.go).
    """
    spec = {"schedulerName": "default-scheduler", **pod["spec"]}
    for kind in ("containers", "initContainers"):
        if kind in spec:
            spec[kind] = [_container_as_decoded(one) for one in spec[kind]]
    return {**pod, "spec": spec}


def _container_as_decoded(one: Object) -> Object:
    resources = {
        section: {name: str(amount) for name, amount in all_.items()}
        for section, all_ in one.get("resources", {}).items()
    }
    decoded = {**one, "resources": resources}
    if "limits" in decoded["resources"]:
        decoded["resources"]["requests"] = decoded["resources"]["limits"] | decoded["resources"].get("requests", {})
    if one.get("env"):
        decoded["env"] = [_variable_as_decoded(variable) for variable in one["env"]]
    return decoded


def _variable_as_decoded(variable: Object) -> Object:
    source = variable.get("valueFrom", {})
    if "fieldRef" not in source:
        return variable
    return {**variable, "valueFrom": {**source, "fieldRef": {"apiVersion": "v1", **source["fieldRef"]}}}
