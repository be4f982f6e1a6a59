"""Finds things among the objects of our manifests, and the files that they were made from."""

from collections.abc import Iterator
from pathlib import Path

import yaml

from e2e.rest import Object

FILE = "kustomization.yaml"


def documents(path: Path) -> Iterator[Object]:
    """Read all objects of one file."""
    return (document for document in yaml.safe_load_all(path.read_text()) if document)


def files(folder: Path) -> set[Path]:
    """Name all files that a kustomization consists of, its own included."""
    kustomization = yaml.safe_load((folder / FILE).read_text())
    found = {folder / FILE}
    for name in kustomization["resources"]:
        path = (folder / name).resolve()
        found |= files(path) if path.is_dir() else {path}
    found |= {(folder / name / FILE).resolve() for name in kustomization.get("components", [])}
    for entry in kustomization.get("configMapGenerator", []):
        found |= {folder / name for name in entry["files"]}
    return found


def pod_specs(found: list[Object]) -> dict[str, Object]:
    """Give the pod specs of all workloads among *found*, by the workload's name."""
    return {
        one["metadata"]["name"]: one["spec"]["template"]["spec"]
        for one in found
        if one["kind"] in {"Deployment", "DaemonSet"}
    }


def containers(spec: Object) -> list[Object]:
    """List the containers of a pod spec in the order they start."""
    return [*spec.get("initContainers", []), *spec["containers"]]


def container(found: list[Object], workload: str, name: str) -> Object:
    """Find one container of one workload."""
    return next(one for one in containers(pod_specs(found)[workload]) if one["name"] == name)


def mounted(found: list[Object], workload: str, name: str) -> dict[str, str]:
    """Give the text of all files that a container sees of ConfigMaps, by their paths in it."""
    volumes = {one["name"]: one for one in pod_specs(found)[workload]["volumes"]}
    maps = {one["metadata"]["name"]: one["data"] for one in found if one["kind"] == "ConfigMap"}
    return {
        f"{mount['mountPath']}/{key}": text
        for mount in container(found, workload, name)["volumeMounts"]
        if "configMap" in volumes[mount["name"]]
        for key, text in maps[volumes[mount["name"]]["configMap"]["name"]].items()
    }
