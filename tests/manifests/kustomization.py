"""What `kubectl apply -k` makes of our kustomizations: resources, JSON patches on them, ConfigMaps from files."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.admission import json_patch

Object = dict[str, Any]

MANIFESTS = Path(__file__).resolve().parents[2] / "manifests"
FILE = "kustomization.yaml"


def objects(folder: Path) -> list[Object]:
    """List the objects of a kustomization, in the order of its files.

    ConfigMaps keep their plain names, where kubectl adds a hash to them and to all that refers to them. Raises
    ValueError for what this reader does not know: kubectl might read it otherwise.
    """
    kustomization = yaml.safe_load((folder / FILE).read_text())
    if unknown := kustomization.keys() - {"apiVersion", "kind", "resources", "patches", "configMapGenerator"}:
        raise ValueError(f"{folder / FILE}: this reader does not know {', '.join(sorted(unknown))}")
    found: list[Object] = []
    for name in kustomization["resources"]:
        path = folder / name
        found += objects(path) if path.is_dir() else documents(path)
    for entry in kustomization.get("patches", []):
        matching = [one for one in found if entry["target"] == _target(one)]
        if not matching:
            raise ValueError(f"{folder / FILE}: nothing is {entry['target']}")
        for one in matching:
            found[found.index(one)] = json_patch.apply(one, yaml.safe_load(entry["patch"]))
    return found + [_config_map(folder, entry) for entry in kustomization.get("configMapGenerator", [])]


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


def _target(one: Object) -> Object:
    return {"kind": one["kind"], "name": one["metadata"]["name"]}


def _config_map(folder: Path, entry: Object) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": entry["name"], "namespace": entry["namespace"]},
        "data": {name: (folder / name).read_text() for name in entry["files"]},
    }
