"""What kube-apiserver does to objects, as far as the stand-in needs it: pure functions of JSON values.

Every rule names where kube-apiserver 1.36 has it; `K/` is k8s.io/kubernetes. Values are never changed in place: readers
hold the old ones.
"""

import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NamedTuple

Json = dict[str, Any]


class Refused(Exception):  # noqa: N818 - named for what happened
    """Be raised to answer a request with a Status of this code, reason and message."""

    def __init__(self, code: int, reason: str, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.message = message
        self.retry_after = retry_after

    def status(self) -> Json:
        """Make the Status that tells it (apimachinery/pkg/api/errors/errors.go)."""
        details = {} if self.retry_after is None else {"details": {"retryAfterSeconds": self.retry_after}}
        return {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.message,
            "reason": self.reason,
            "code": self.code,
        } | details


class Resource(NamedTuple):
    """Name one kind of object in the API."""

    api_version: str
    plural: str
    kind: str
    namespaced: bool

    @property
    def root(self) -> str:
        """Give the path before ``/namespaces`` or the plural name."""
        return ("/apis/" if "/" in self.api_version else "/api/") + self.api_version

    @property
    def qualified(self) -> str:
        """Name the resource as error messages do: ``leases.coordination.k8s.io``."""
        group, _, version = self.api_version.rpartition("/")
        return f"{self.plural}.{group}" if version and group else self.plural


PODS: Final = Resource("v1", "pods", "Pod", namespaced=True)
NODES: Final = Resource("v1", "nodes", "Node", namespaced=False)
CORE_EVENTS: Final = Resource("v1", "events", "Event", namespaced=True)
EVENTS: Final = Resource("events.k8s.io/v1", "events", "Event", namespaced=True)
LEASES: Final = Resource("coordination.k8s.io/v1", "leases", "Lease", namespaced=True)
BUDGETS: Final = Resource("policy/v1", "poddisruptionbudgets", "PodDisruptionBudget", namespaced=True)
# What `cotenant doctor` looks at besides; kept as it is given, with no rule of its own.
OTHERS: Final = (
    Resource("apps/v1", "deployments", "Deployment", namespaced=True),
    Resource("apps/v1", "daemonsets", "DaemonSet", namespaced=True),
    Resource("v1", "services", "Service", namespaced=True),
    Resource("v1", "configmaps", "ConfigMap", namespaced=True),
    Resource("networking.k8s.io/v1", "networkpolicies", "NetworkPolicy", namespaced=True),
    *(
        Resource("admissionregistration.k8s.io/v1", plural, kind, namespaced=False)
        for plural, kind in (
            ("mutatingadmissionpolicies", "MutatingAdmissionPolicy"),
            ("mutatingadmissionpolicybindings", "MutatingAdmissionPolicyBinding"),
            ("validatingadmissionpolicies", "ValidatingAdmissionPolicy"),
            ("validatingadmissionpolicybindings", "ValidatingAdmissionPolicyBinding"),
            ("mutatingwebhookconfigurations", "MutatingWebhookConfiguration"),
            ("validatingwebhookconfigurations", "ValidatingWebhookConfiguration"),
        )
    ),
)
RESOURCES: Final = (PODS, NODES, CORE_EVENTS, EVENTS, LEASES, BUDGETS, *OTHERS)

_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_KEY = re.compile(r"(?:(?P<prefix>[^/]+)/)?(?P<name>[a-z0-9]([-a-z0-9_.]*[a-z0-9])?)")
_KEY_NAME_MAX = 63
_SUBDOMAIN_MAX = 253
_ANNOTATIONS_MAX_BYTES = 256 << 10
_DEFAULT_GRACE_SECONDS = 30

# The lists that a strategic merge patch merges by key (patchMergeKey in api/core/v1/types.go); it replaces the others.
_MERGE_KEYS = {
    "addresses": "type",
    "conditions": "type",
    "containers": "name",
    "initContainers": "name",
    "env": "name",
    "taints": "key",
    "volumes": "name",
}
# What may change in the spec of a pod (K/pkg/apis/core/validation/validation.go, ValidatePodUpdate).
_MUTABLE_SPEC = ("activeDeadlineSeconds", "schedulingGates", "terminationGracePeriodSeconds", "tolerations")


def timestamp(at: datetime | None = None) -> str:
    """Write a time as the API does, to the second."""
    return (at or datetime.now(UTC)).strftime("%Y-%m-%dT%H:%M:%SZ")


def merged(old: Any, patch: Any) -> Any:
    """Apply a JSON merge patch (RFC 7396)."""
    if not isinstance(patch, dict):
        return patch
    result = dict(old) if isinstance(old, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merged(result.get(key), value)
    return result


def strategically_merged(old: Any, patch: Any, *, key: str = "") -> Any:
    """Apply a strategic merge patch, which merges lists whose items have a key, ``$patch: delete`` included."""
    if isinstance(patch, list) and key in _MERGE_KEYS:
        return _merged_by_key(old or [], patch, _MERGE_KEYS[key])
    if not isinstance(patch, dict):
        return patch
    result = dict(old) if isinstance(old, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        elif not name.startswith("$"):  # $setElementOrder and the like only order lists
            result[name] = strategically_merged(result.get(name), value, key=name)
    return result


def _merged_by_key(old: list[Json], patch: list[Json], key: str) -> list[Json]:
    items = {item.get(key): item for item in old}
    for item in patch:
        if item.get("$patch") == "delete":
            items.pop(item.get(key), None)
        else:
            items[item.get(key)] = strategically_merged(items.get(item.get(key)), item)
    return list(items.values())


def created(resource: Resource, body: Json, *, namespace: str, now: datetime, uid: str, suffix: str) -> Json:
    """Complete a new object; *suffix* ends a generated name."""
    metadata = dict(body.get("metadata") or {})
    if not metadata.get("name") and metadata.get("generateName"):
        # apimachinery/pkg/api/validation/generic.go: it must be a name itself, less its last dash
        if not _SUBDOMAIN.fullmatch(metadata["generateName"].removesuffix("-")):
            raise _invalid(resource, body, f"metadata.generateName: Invalid value: {metadata['generateName']!r}")
        metadata["name"] = metadata["generateName"] + suffix
    if resource.namespaced:
        metadata["namespace"] = namespace
    metadata |= {"uid": uid, "creationTimestamp": timestamp(now)}
    for mine in ("deletionTimestamp", "deletionGracePeriodSeconds"):
        metadata.pop(mine, None)
    result = {**body, "apiVersion": resource.api_version, "kind": resource.kind, "metadata": metadata}
    if resource == PODS:
        result["spec"] = _defaulted(body.get("spec") or {})
        result["status"] = {"phase": "Pending"}  # the strategy drops what the client sent (K/pkg/registry/core/pod)
    return result


def _defaulted(spec: Json) -> Json:
    """Fill in the defaults that other components read (K/pkg/apis/core/v1/defaults.go)."""
    containers: Json = {
        key: [_with_requests(c) for c in spec[key] or ()] for key in ("containers", "initContainers") if key in spec
    }
    defaults = {
        "restartPolicy": "Always",
        "schedulerName": "default-scheduler",
        "terminationGracePeriodSeconds": _DEFAULT_GRACE_SECONDS,
    }
    return {**defaults, **spec, **containers}


def _with_requests(container: Json) -> Json:
    resources = container.get("resources") or {}
    limits = resources.get("limits") or {}
    if not limits:
        return container
    return {**container, "resources": {**resources, "requests": {**limits, **(resources.get("requests") or {})}}}


def updated(resource: Resource, old: Json, new: Json, *, subresource: str) -> Json:
    """Decide what of *new* a write to *subresource* may change, as the strategies do; check preconditions."""
    wanted = new.get("metadata") or {}
    if wanted.get("uid") not in {None, "", old["metadata"]["uid"]}:
        raise _invalid(resource, old, f"metadata.uid: Invalid value: {wanted['uid']!r}: field is immutable")
    check_preconditions(resource, old["metadata"], {"resourceVersion": wanted.get("resourceVersion")})
    has_status = resource in {PODS, NODES}
    result = {**new, "apiVersion": resource.api_version, "kind": resource.kind}
    if subresource == "status":
        # metadata changes along: K/pkg/registry/core/pod/strategy.go does not reset annotations here
        result = {**result, "spec": old.get("spec", {})}
    elif has_status:
        result = {**result, "status": old.get("status", {})}
    kept = ("name", "namespace", "uid", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds")
    result["metadata"] = {
        **{key: value for key, value in result["metadata"].items() if key not in kept},
        **{key: old["metadata"][key] for key in kept if key in old["metadata"]},
    }
    if resource == PODS and _immutable(result.get("spec") or {}) != _immutable(old.get("spec") or {}):
        raise _invalid(resource, old, "spec: Forbidden: pod updates may not change fields other than some of the spec")
    return result


def _immutable(spec: Json) -> Json:
    return {
        key: [{k: v for k, v in c.items() if k != "image"} for c in value] if key.endswith("ontainers") else value
        for key, value in spec.items()
        if key not in _MUTABLE_SPEC
    }


def check_preconditions(resource: Resource, old: Json, new: Json) -> None:
    """Refuse with 409 where *new* names another UID or version than the *old* metadata (apiserver/pkg/storage)."""
    for key, word in (("uid", "UID"), ("resourceVersion", "ResourceVersion")):
        if (wanted := new.get(key)) and wanted != old[key]:
            raise conflict(
                resource.qualified,
                old["name"],
                f"Precondition failed: {word} in precondition: {wanted}, {word} in object meta: {old[key]}",
            )


def validate(resource: Resource, obj: Json) -> None:
    """Refuse what no object may be: a bad name, bad or too large annotations (apimachinery/pkg/api/validation)."""
    name = obj["metadata"].get("name") or ""
    if len(name) > _SUBDOMAIN_MAX or not _SUBDOMAIN.fullmatch(name):
        raise _invalid(resource, obj, f"metadata.name: Invalid value: {name!r}: a lowercase RFC 1123 subdomain")
    annotations: Mapping[str, str] = obj["metadata"].get("annotations") or {}
    for key, value in annotations.items():
        found = _KEY.fullmatch(key.lower())  # ValidateAnnotations: "case doesn't matter"
        prefix = found["prefix"] if found else None
        if not found or len(found["name"]) > _KEY_NAME_MAX or (prefix and not _SUBDOMAIN.fullmatch(prefix)):
            raise _invalid(resource, obj, f"metadata.annotations: Invalid value: {key!r}: not a qualified name")
        if not isinstance(value, str):
            raise Refused(400, "BadRequest", f"cannot unmarshal the annotation {key} into a string")
    if sum(len(k.encode()) + len(v.encode()) for k, v in annotations.items()) > _ANNOTATIONS_MAX_BYTES:
        raise _invalid(resource, obj, "metadata.annotations: Too long: may not be more than 262144 bytes")


def bound(pod: Json, binding: Json, *, now: datetime) -> Json:
    """Bind a pod as K/pkg/registry/core/pod/storage/storage.go, setPodNodeAndMetadata, does; nothing is validated."""
    metadata = pod["metadata"]
    wanted = binding.get("metadata") or {}
    node = (binding.get("target") or {}).get("name")
    name = metadata["name"]
    if wanted.get("name") not in {None, "", name}:
        raise Refused(400, "BadRequest", "name in URL does not match name in Binding object")
    if not node:
        # the storage gives a plain error here, which no one turns into a Status of its own
        raise Refused(500, "InternalError", "target.name: Required value")
    check_preconditions(PODS, metadata, wanted)
    if "deletionTimestamp" in metadata:
        raise conflict("pods/binding", name, f"pod {name} is being deleted, cannot be assigned to a host")
    if there := pod["spec"].get("nodeName"):
        raise conflict("pods/binding", name, f'pod {name} is already assigned to node "{there}"')
    if pod["spec"].get("schedulingGates"):
        raise conflict("pods/binding", name, f"pod {name} has non-empty .spec.schedulingGates")
    scheduled = {"type": "PodScheduled", "status": "True", "lastTransitionTime": timestamp(now)}
    status = strategically_merged(pod.get("status"), {"nominatedNodeName": None, "conditions": [scheduled]})
    added = {key: {**(metadata.get(key) or {}), **wanted[key]} for key in ("annotations", "labels") if wanted.get(key)}
    return {
        **pod,
        "metadata": {**metadata, **added},
        "spec": {**pod["spec"], "nodeName": node},
        "status": status,
    }


def disrupted(budgets: Iterable[Json], pod: Json) -> Json | None:
    """Give the budget that an eviction of a pod is charged to, less one, None where none covers it; refuse otherwise.

    K/pkg/registry/core/pod/storage/eviction.go, checkAndDecrement. Selectors are matchLabels here.
    """
    labels = pod["metadata"].get("labels") or {}
    covering = [
        budget
        for budget in budgets
        if budget["metadata"]["namespace"] == pod["metadata"]["namespace"]
        and all(labels.get(key) == value for key, value in budget["spec"]["selector"].get("matchLabels", {}).items())
    ]
    if not covering:
        return None
    if len(covering) > 1:
        message = "This pod has more than one PodDisruptionBudget, which the eviction subresource does not support."
        raise Refused(500, "InternalError", message)
    (budget,) = covering
    allowed = budget.get("status", {}).get("disruptionsAllowed", 0)
    if allowed < 1:
        raise Refused(
            429, "TooManyRequests", "Cannot evict pod as it would violate the pod's disruption budget.", retry_after=0
        )
    return {**budget, "status": {**budget["status"], "disruptionsAllowed": allowed - 1}}


def grace_seconds(pod: Json, asked: int | None) -> int:
    """Tell how long a deleted pod stays, 0: not at all (K/pkg/registry/core/pod/strategy.go, CheckGracefulDelete)."""
    if not pod["spec"].get("nodeName") or pod["status"].get("phase") in {"Succeeded", "Failed"}:
        return 0
    period = pod["spec"].get("terminationGracePeriodSeconds", 0) if asked is None else asked
    return 1 if period < 0 else int(period)


def terminating(pod: Json, seconds: int, *, now: datetime) -> Json:
    """Mark a pod as being deleted; it goes when the kubelet deletes it again with a grace of 0."""
    mark = {
        "deletionTimestamp": timestamp(now + timedelta(seconds=seconds)),
        "deletionGracePeriodSeconds": seconds,
    }
    return {**pod, "metadata": {**pod["metadata"], **mark}}


def selected(obj: Json, fields: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Tell whether an object matches the fields (dotted paths; absent is "") and labels, by equality."""
    own = obj["metadata"].get("labels") or {}
    return all(_field(obj, path) == value for path, value in fields.items()) and all(
        own.get(key) == value for key, value in labels.items()
    )


def _field(obj: Any, path: str) -> str:
    for step in path.split("."):
        obj = obj.get(step) if isinstance(obj, dict) else None
    return "" if obj is None else str(obj)


def conflict(what: str, name: str, why: str) -> Refused:
    """Make the 409 of a request that counted on another state of the object."""
    return Refused(409, "Conflict", f'Operation cannot be fulfilled on {what} "{name}": {why}')


def not_found(resource: Resource, name: str) -> Refused:
    """Make the 404 of an object that is not there."""
    return Refused(404, "NotFound", f'{resource.qualified} "{name}" not found')


def _invalid(resource: Resource, obj: Json, why: str) -> Refused:
    return Refused(422, "Invalid", f'{resource.kind} "{obj["metadata"].get("name", "")}" is invalid: {why}')
