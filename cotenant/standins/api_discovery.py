"""What the stand-in API server tells kubectl of itself: the resources that it has, and that it checks fields."""

from itertools import groupby

from cotenant.standins.api_rules import NODES, PODS, RESOURCES, Json, Resource

_VERBS = ["create", "delete", "get", "list", "patch", "update", "watch"]
_SHORT = {PODS: ["po"], NODES: ["no"]}
_OPENAPI = "/openapi/v3"


def discovered(path: str) -> Json | None:
    """Answer a question for what there is (apimachinery/pkg/apis/meta/v1, APIResourceList); None for another path."""
    roots = {root: [*resources] for root, resources in groupby(sorted(RESOURCES, key=_root), key=_root)}
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        return {
            "kind": "APIGroupList",
            "apiVersion": "v1",
            "groups": [_group(root) for root in roots if "/apis/" in root],
        }
    if path == _OPENAPI:
        return {"paths": {root[1:]: {"serverRelativeURL": _OPENAPI + root} for root in roots}}
    if path.removeprefix(_OPENAPI) not in roots:
        return None
    resources = roots[path.removeprefix(_OPENAPI)]
    if path.startswith(_OPENAPI):
        return {"openapi": "3.0.0", "info": {}, "paths": {f"/{one.plural}": _checked(one) for one in resources}}
    return {
        "kind": "APIResourceList",
        "groupVersion": resources[0].api_version,
        "resources": [
            {
                "name": one.plural,
                "singularName": one.kind.lower(),
                "namespaced": one.namespaced,
                "kind": one.kind,
                "verbs": _VERBS,
                "shortNames": _SHORT.get(one, []),
            }
            for one in resources
        ],
    }


def _root(resource: Resource) -> str:
    return resource.root


def _group(root: str) -> Json:
    name, version = root.removeprefix("/apis/").split("/")
    versions = {"groupVersion": f"{name}/{version}", "version": version}
    return {"name": name, "versions": [versions], "preferredVersion": versions}


def _checked(resource: Resource) -> Json:
    """Say that the server looks for unknown fields, which kubectl does itself otherwise, by a schema of everything."""
    group, _, version = resource.api_version.rpartition("/")
    kind = {"group": group, "version": version, "kind": resource.kind}
    parameters = [{"name": name, "in": "query"} for name in ("dryRun", "fieldValidation")]
    return {"patch": {"x-kubernetes-group-version-kind": kind, "parameters": parameters, "responses": {}}}
