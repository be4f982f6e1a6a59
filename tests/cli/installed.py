"""A cluster as our manifests leave it, on the stand-in API server, for faults to be planted in."""

from collections.abc import Callable
from typing import Any

import yaml

from cotenant.standins.api_rules import RESOURCES, Json, Resource
from cotenant.standins.api_server import ApiServer
from e2e.kustomize import MANIFESTS, build
from tests.builders import NAMES, NodeBuilder, a_node

SERVICE = "cotenant-system/services/http:cotenant-extender:serve"
Objects = dict[tuple[str, str], Json]


def shipped(layout: str = "second-scheduler") -> Objects:
    """All objects of a layout, by kind and name."""
    return {(one["kind"], one["metadata"]["name"]): one for one in build(MANIFESTS / layout)}


def resource(kind: str) -> Resource | None:
    return next((one for one in RESOURCES if one.kind == kind), None)


def install(api: ApiServer, objects: Objects) -> None:
    """Create what of the objects the stand-in keeps."""
    for (kind, _), one in objects.items():
        if (where := resource(kind)) is not None:
            api.create(where, one, one["metadata"].get("namespace", ""))


def add_gpu_node(api: ApiServer, node: NodeBuilder, *, label: bool = True, **allocatable: str) -> None:
    """Create a node with its inventory and what its kubelet advertises."""
    amounts = {
        "cpu": "64",
        **node.allocatable,
        **{name.replace("__", "/"): amount for name, amount in allocatable.items()},
    }
    api.add_node(
        node.name,
        annotations=node.node_annotations,
        allocatable={key: str(value) for key, value in amounts.items()},
        labels={f"{NAMES.domain}/device-plugin": "true"} if label else {},
    )


def a_healthy_node(name: str = "n1") -> NodeBuilder:
    return a_node(name).with_gpus(2, "10GiB").advertising("20")


def edited(text: str, change: Callable[[dict[str, Any]], None]) -> str:
    """Change a YAML file."""
    found = yaml.safe_load(text)
    change(found)
    return yaml.safe_dump(found)


def edit_file(objects: Objects, name: str, change: Callable[[dict[str, Any]], None]) -> None:
    """Change one file in the ConfigMap that has it."""
    (holder,) = [one for one in objects.values() if one["kind"] == "ConfigMap" and name in one["data"]]
    holder["data"] = {**holder["data"], name: edited(holder["data"][name], change)}


def container(objects: Objects, kind: str, program: str) -> dict[str, Any]:
    """Find the container of a workload that runs *program*."""
    for (found, _), one in objects.items():
        if found == kind:
            spec = one["spec"]["template"]["spec"]
            for candidate in (*spec.get("initContainers", ()), *spec["containers"]):
                if candidate["command"] == [program]:
                    result: dict[str, Any] = candidate
                    return result
    raise LookupError(program)
