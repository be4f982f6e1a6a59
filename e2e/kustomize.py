"""Build our kustomizations without kubectl: resources, components, JSON patches and ConfigMaps, and nothing else."""

from collections.abc import Iterator
from pathlib import Path

import yaml

from e2e.rest import Object
from tests.admission import json_patch

MANIFESTS = Path(__file__).resolve().parent.parent / "manifests"


def build(directory: Path) -> Iterator[Object]:
    """Yield the objects that `kubectl apply -k` would apply; a generated ConfigMap keeps its name without a hash."""
    components = yaml.safe_load((directory / "kustomization.yaml").read_text()).get("components", [])
    parts = [yaml.safe_load((directory / name / "kustomization.yaml").read_text()) for name in components]
    for document in _build(directory):
        yield _patched(document, [patch for part in parts for patch in part["patches"]])


def _patched(document: Object, patches: list[Object]) -> Object:
    target = {"kind": document["kind"], "name": document["metadata"]["name"]}
    chosen = [one["patch"] for one in patches if one["target"] == target]
    made: Object = json_patch.apply(document, [operation for patch in chosen for operation in yaml.safe_load(patch)])
    return made


def _build(directory: Path) -> Iterator[Object]:
    """Yield what resources and generators of a kustomization make."""
    kustomization = yaml.safe_load((directory / "kustomization.yaml").read_text())
    generated = [
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {
                key: value
                for key, value in {
                    "name": entry["name"],
                    "namespace": entry["namespace"],
                    "labels": entry.get("options", {}).get("labels"),
                }.items()
                if value
            },
            "data": {file: (directory / file).read_text() for file in entry["files"]},
            "behavior": entry.get("behavior", "create"),
        }
        for entry in kustomization.get("configMapGenerator", [])
    ]
    for name in kustomization["resources"]:
        path = directory / name
        for document in build(path) if path.is_dir() else yaml.safe_load_all(path.read_text()):
            target = {"kind": document["kind"], "name": document["metadata"]["name"]}
            for one in generated:
                if one["behavior"] == "merge" and target == {"kind": "ConfigMap", "name": one["metadata"]["name"]}:
                    document["data"] |= one["data"]
            yield _patched(document, kustomization.get("patches", []))
    for one in generated:
        if one.pop("behavior") == "create":
            yield one
