"""Build our kustomizations without kubectl.

Resources, components, JSON patches, patches that delete, and generated ConfigMaps are all that they use.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml

from e2e.rest import Object
from tests.admission import json_patch

MANIFESTS = Path(__file__).resolve().parent.parent / "manifests"


def aims_at(target: Mapping[str, str], document: Object) -> bool:
    """Tell whether a patch's target is an object: both of its parts are regular expressions."""
    return bool(
        re.fullmatch(target["kind"], document["kind"]) and re.fullmatch(target["name"], document["metadata"]["name"])
    )


def build(directory: Path) -> Iterator[Object]:
    """Yield the objects that `kubectl apply -k` would apply; a generated ConfigMap keeps its name without a hash."""
    components = yaml.safe_load((directory / "kustomization.yaml").read_text()).get("components", [])
    parts = [yaml.safe_load((directory / name / "kustomization.yaml").read_text()) for name in components]
    for document in _build(directory):
        yield from _patched(document, [patch for part in parts for patch in part["patches"]])


def _patched(document: Object, patches: list[Object]) -> Iterator[Object]:
    """Yield the patched object, nothing where a patch deletes it."""
    chosen = [yaml.safe_load(one["patch"]) for one in patches if aims_at(one["target"], document)]
    if not any(isinstance(patch, dict) for patch in chosen):  # $patch: delete
        yield json_patch.apply(document, [operation for patch in chosen for operation in patch])


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
            for one in generated:
                if one["behavior"] == "merge" and aims_at({"kind": "ConfigMap", **one["metadata"]}, document):
                    document["data"] |= one["data"]
            yield from _patched(document, kustomization.get("patches", []))
    for one in generated:
        if one.pop("behavior") == "create":
            yield one
