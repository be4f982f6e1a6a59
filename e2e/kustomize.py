"""Build our kustomizations without kubectl: resources, JSON patches and generated ConfigMaps, which is all they use."""

from collections.abc import Iterator
from pathlib import Path

import yaml

from e2e.rest import Object
from tests.admission import json_patch

MANIFESTS = Path(__file__).resolve().parent.parent / "manifests"


def build(directory: Path) -> Iterator[Object]:
    """Yield the objects that `kubectl apply -k` would apply; a generated ConfigMap keeps its name without a hash."""
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
            patches = [one["patch"] for one in kustomization.get("patches", []) if one["target"] == target]
            for one in generated:
                if one["behavior"] == "merge" and target == {"kind": "ConfigMap", "name": one["metadata"]["name"]}:
                    document["data"] |= one["data"]
            yield json_patch.apply(document, [operation for patch in patches for operation in yaml.safe_load(patch)])
    for one in generated:
        if one.pop("behavior") == "create":
            yield one
