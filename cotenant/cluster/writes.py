"""The few calls that change the cluster, and the one that settles what became of them.

Each returns nothing and raises a ClusterError; where its *outcome_unknown* is set, the write may have happened.
"""

import hashlib
import re
import secrets
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any, Literal

import msgspec

from cotenant.cluster.connection import Cluster
from cotenant.cluster.errors import Invalid
from cotenant.cluster.reading import answered

# apimachinery/pkg/util/validation: IsDNS1123Subdomain, IsQualifiedName, and ValidateAnnotationsSize
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_KEY_NAME = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")
_SUBDOMAIN_MAX = 253
_KEY_NAME_MAX = 63
_ANNOTATIONS_MAX_BYTES = 256 << 10

# k8s.io/kubernetes/pkg/apis/core/validation/events.go
_NOTE_MAX_BYTES = 1024
_ACTION_MAX = 128
_REASON_MAX = 128
_INSTANCE_MAX = 128
_EVENT_NAME_STEM = 200
_EVENT_SECONDS = 5.0


class _Status(msgspec.Struct, frozen=True):
    """Be what bind and evict are answered with; what is none, as a load balancer's page, leaves open what was done."""

    kind: Literal["Status"]


_status = msgspec.json.Decoder(_Status)


class Regarding(msgspec.Struct, frozen=True, rename="camel"):
    """Name the object that an Event is about."""

    kind: str
    name: str
    uid: str = ""
    namespace: str = ""
    api_version: str = "v1"


def bind(
    cluster: Cluster,
    *,
    namespace: str,
    name: str,
    uid: str,
    node: str,
    annotations: Mapping[str, str],
    labels: Mapping[str, str] | None = None,
    timeout: float = 10.0,
) -> None:
    """Give the pod its node and *annotations* in one transaction (pkg/registry/core/pod/storage/storage.go).

    *labels* are what admission policies select Bindings by; since 1.35 they go to the pod, too.

    The server checks neither the keys nor the size of annotations here, and a bad one makes every later update of the
    pod fail, the kubelet's too; so they are checked before anything is sent.

    Raises:
        Invalid: a name or an annotation that Kubernetes would refuse.
        Conflict: the pod has a node already, is being deleted, is gated, or is another one of the same name.
        NotFound: there is no such pod any more.

    """
    _check_annotations(annotations)
    body = {
        "apiVersion": "v1",
        "kind": "Binding",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "uid": uid,
            "annotations": annotations,
            "labels": labels or {},
        },
        "target": {"apiVersion": "v1", "kind": "Node", "name": _checked(node)},
    }
    answered(_status, cluster.post(f"{_pod(namespace, name)}/binding", msgspec.json.encode(body), timeout=timeout).body)


def get_pod(cluster: Cluster, *, namespace: str, name: str, timeout: float = 10.0) -> bytes:
    """Read the pod as it is now, not as a cache has it, as JSON.

    Raises:
        NotFound: there is no such pod.

    """
    return cluster.get(_pod(namespace, name), timeout=timeout).body


def nominate(cluster: Cluster, *, namespace: str, name: str, uid: str, node: str) -> None:
    """Suggest *node* for a pod that waits: kube-scheduler tries status.nominatedNodeName before it samples others.

    An empty *node* takes the suggestion back.

    Raises:
        Invalid: the pod is another one of the same name, or a name is none.
        NotFound: there is no such pod any more.

    """
    # metadata.uid cannot be changed, so naming it makes the patch of any other pod fail
    body = {"metadata": {"uid": uid}, "status": {"nominatedNodeName": _checked(node) if node else ""}}
    cluster.patch(f"{_pod(namespace, name)}/status", msgspec.json.encode(body))


def annotate_pod(
    cluster: Cluster,
    *,
    namespace: str,
    name: str,
    uid: str,
    annotations: Mapping[str, str | None],
    timeout: float = 10.0,
) -> None:
    """Set the pod's *annotations*, and take away those that are None; the others stay.

    Through the subresource status, which takes annotations too (pkg/registry/core/pod/strategy.go) and needs no right
    to write the rest of a pod.

    Raises:
        Invalid: the pod is another one of the same name.
        NotFound: there is no such pod any more.

    """
    _check_annotations({key: value or "" for key, value in annotations.items()})
    body = {"metadata": {"uid": uid, "annotations": annotations}}
    cluster.patch(f"{_pod(namespace, name)}/status", msgspec.json.encode(body), timeout=timeout)


def evict(cluster: Cluster, *, namespace: str, name: str, uid: str, timeout: float = 10.0) -> None:
    """Evict the pod of that UID, as far as disruption budgets allow (policy/v1 Eviction).

    Raises:
        Conflict: the pod is another one of the same name.
        NotFound: there is no such pod any more.
        TooManyRequests: a disruption budget does not allow it now.

    """
    body = {
        "apiVersion": "policy/v1",
        "kind": "Eviction",
        "metadata": {"name": _checked(name), "namespace": namespace},
        "deleteOptions": {"preconditions": {"uid": uid}},
    }
    answered(
        _status, cluster.post(f"{_pod(namespace, name)}/eviction", msgspec.json.encode(body), timeout=timeout).body
    )


def label_pod(
    cluster: Cluster, *, namespace: str, name: str, labels: Mapping[str, str | None], timeout: float = 10.0
) -> None:
    """Set the pod's *labels*, and take away those that are None; the others stay.

    Raises:
        NotFound: there is no such pod.

    """
    _check_annotations({key: value or "" for key, value in labels.items()})  # keys follow the same rules
    body = {"metadata": {"labels": labels}}
    cluster.patch(_pod(namespace, name), msgspec.json.encode(body), timeout=timeout)


def annotate_node(
    cluster: Cluster,
    node: str,
    annotations: Mapping[str, str | None],
    *,
    labels: Mapping[str, str | None] | None = None,
    timeout: float = 10.0,
) -> None:
    """Set the node's *annotations* and *labels*, and take away those that are None; the others stay.

    Raises:
        NotFound: there is no such node.

    """
    _check_annotations({key: value or "" for key, value in annotations.items()})
    body = {"metadata": {"annotations": annotations} | ({"labels": labels} if labels else {})}
    cluster.patch(f"/api/v1/nodes/{_checked(node)}", msgspec.json.encode(body), timeout=timeout)


def record_event(
    cluster: Cluster,
    *,
    regarding: Regarding,
    kind: Literal["Normal", "Warning"],
    reason: str,
    action: str,
    note: str,
    at: datetime,
    reporter: str,
    instance: str,
    once: bool = False,
) -> None:
    """Create an Event that people see with `kubectl describe`; a long *note* is cut.

    *action* is what was being done (``Binding``), *reason* why it is told, both in CamelCase. *at* has a time zone.
    *reporter* is the program (``cotenant.io/extender``), *instance* its pod. Events of nodes lie in ``default``.

    Raises:
        Conflict: with *once*, where an Event of the same object and reason is still there.

    """
    same = f"{reporter} {regarding.kind} {regarding.namespace}/{regarding.name} {regarding.uid} {reason}"
    suffix = hashlib.sha256(same.encode()).hexdigest()[:16] if once else secrets.token_hex(8)
    namespace = regarding.namespace or "default"
    body: dict[str, Any] = {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        # As client-go names them. Not generateName, which may not end in a dot.
        "metadata": {
            "name": f"{regarding.name[:_EVENT_NAME_STEM].rstrip('-.')}.{suffix}",
            "namespace": namespace,
        },
        "regarding": regarding,
        "type": kind,
        "reason": reason[:_REASON_MAX],
        "action": action[:_ACTION_MAX],
        "note": note.encode()[:_NOTE_MAX_BYTES].decode(errors="ignore"),
        "eventTime": at.isoformat(timespec="microseconds").replace("+00:00", "Z"),
        "reportingController": reporter,
        "reportingInstance": instance[:_INSTANCE_MAX],
    }
    path = f"/apis/events.k8s.io/v1/namespaces/{_checked(namespace)}/events"
    cluster.post(path, msgspec.json.encode(body), timeout=_EVENT_SECONDS)


def _pod(namespace: str, name: str) -> str:
    return f"/api/v1/namespaces/{_checked(namespace)}/pods/{_checked(name)}"


def _checked(name: str) -> str:
    """Return *name* if it is one, so that none can reach another path of the API."""
    if len(name) > _SUBDOMAIN_MAX or not _SUBDOMAIN.fullmatch(name):
        raise Invalid(422, "Invalid", f"{name[:_SUBDOMAIN_MAX]!r} is not the name of a Kubernetes object")
    return name


def _check_annotations(annotations: Mapping[str, str]) -> None:
    for key in annotations:
        if not _is_key(key):
            raise Invalid(422, "Invalid", f"{key!r} cannot be the key of an annotation")
    size = sum(len(key.encode()) + len(value.encode()) for key, value in annotations.items())
    if size > _ANNOTATIONS_MAX_BYTES:
        raise Invalid(422, "Invalid", f"annotations of {size} bytes are over the {_ANNOTATIONS_MAX_BYTES} allowed")


# They are the same few for nearly every pod.
@lru_cache(maxsize=256)
def _is_key(key: str) -> bool:
    prefix, _, name = key.rpartition("/")
    # the server lowers the case of an annotation's prefix before it checks it; ours are lower-case to begin with
    good_prefix = not prefix or (len(prefix) <= _SUBDOMAIN_MAX and _SUBDOMAIN.fullmatch(prefix) is not None)
    good_name = len(name) <= _KEY_NAME_MAX and _KEY_NAME.fullmatch(name) is not None
    return good_prefix and good_name and not key.startswith("/")
