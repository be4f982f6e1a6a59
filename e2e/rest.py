"""A small client of the Kubernetes REST API for test code: plain dicts, a kept connection per thread."""

import http.client
import json
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote, urlencode, urlsplit

import yaml

Object = dict[str, Any]
"""A Kubernetes object as its JSON."""

MERGE_PATCH = "application/merge-patch+json"
APPLY_PATCH = "application/apply-patch+yaml"
STATUS_OK = range(200, 300)


class ApiError(Exception):
    """The API server refused a call: `code` is the HTTP status, `message` its sentence."""

    def __init__(self, call: str, code: int, message: str) -> None:
        super().__init__(f"{call}: {code} {message}")
        self.code = code
        self.message = message


@dataclass(frozen=True, slots=True)
class Resource:
    """Where the objects of a kind live: `root` is /api/v1 or /apis/GROUP/VERSION."""

    root: str
    plural: str
    namespaced: bool

    def path(self, namespace: str | None = None, name: str | None = None, subresource: str | None = None) -> str:
        """Return the URL path of one object, or of all where `name` is None."""
        within = f"/namespaces/{namespace}" if self.namespaced and namespace else ""
        tail = "".join(f"/{quote(part)}" for part in (name, subresource) if part)
        return f"{self.root}{within}/{self.plural}{tail}"


_KNOWN = {
    ("v1", "Pod"): Resource("/api/v1", "pods", namespaced=True),
    ("v1", "Node"): Resource("/api/v1", "nodes", namespaced=False),
    ("v1", "Event"): Resource("/api/v1", "events", namespaced=True),
    ("v1", "Namespace"): Resource("/api/v1", "namespaces", namespaced=False),
}


class Api:
    """Calls one API server as one user. Threads may share it: each has a connection of its own."""

    def __init__(self, server: str, *, token: str, ca_file: Path | None) -> None:
        """Prepare; without an authority the server is called by plain HTTP, as the stand-in is."""
        self.server = server
        self.token = token
        self._address = urlsplit(server)
        self._tls = ssl.create_default_context(cafile=str(ca_file)) if ca_file is not None else None
        self._local = threading.local()
        self._resources = dict(_KNOWN)

    @classmethod
    def from_kubeconfig(cls, path: Path) -> Self:
        """Return a client for a kubeconfig's current context.

        Raises ValueError where that is not a token and a CA file, which is what the ground's own kubeconfigs have.
        """
        try:
            config = yaml.safe_load(path.read_text())
            context = next(c["context"] for c in config["contexts"] if c["name"] == config["current-context"])
            cluster = next(c["cluster"] for c in config["clusters"] if c["name"] == context["cluster"])
            user = next(u["user"] for u in config["users"] if u["name"] == context["user"])
            return cls(cluster["server"], token=user["token"], ca_file=Path(cluster["certificate-authority"]))
        except (KeyError, StopIteration, TypeError, yaml.YAMLError) as error:
            raise ValueError(
                f"{path}: its current context does not name a server with a CA file and a user with a token"
            ) from error

    def _connect(self, timeout_s: float) -> http.client.HTTPConnection:
        host, port = self._address.hostname or "", self._address.port
        if self._tls is None:
            return http.client.HTTPConnection(host, port, timeout=timeout_s)
        return http.client.HTTPSConnection(host, port, context=self._tls, timeout=timeout_s)

    def raw(self, method: str, path: str, body: bytes | None = None, *, content: str = "application/json") -> bytes:
        """Make one call and return the body of its answer; raise ApiError for any status but 2xx.

        A kept connection that the server has closed meanwhile is opened again once; that is safe for a POST
        too, since the server closes idle connections only.
        """
        headers = {
            "Authorization": f"Bearer {self.token}",
            "Content-Type": content,
            "Accept": "application/json",
            "User-Agent": "cotenant-e2e",
        }
        fresh = False
        while True:
            connection: http.client.HTTPConnection | None = getattr(self._local, "connection", None)
            if connection is None:
                connection, fresh = self._connect(60), True
                self._local.connection = connection
            try:
                connection.request(method, path, body, headers)
                response = connection.getresponse()
                answer = response.read()
            except (http.client.RemoteDisconnected, ConnectionError, ssl.SSLEOFError):
                connection.close()
                self._local.connection = None
                if fresh:
                    raise
                continue
            if response.status not in STATUS_OK:
                raise ApiError(f"{method} {path}", response.status, _message(answer))
            return answer

    def call(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        query: Mapping[str, str] | None = None,
        content: str = "application/json",
    ) -> Object:
        """Make one call with a JSON body and return the answer's JSON."""
        data = None if body is None else json.dumps(body).encode()
        answer = self.raw(method, f"{path}?{urlencode(query)}" if query else path, data, content=content)
        decoded: Object = json.loads(answer)
        return decoded

    def resource(self, kind: str, api_version: str = "v1") -> Resource:
        """Return where objects of `kind` live, asking the server's discovery the first time."""
        key = (api_version, kind)
        if key not in self._resources:
            root = f"/api/{api_version}" if "/" not in api_version else f"/apis/{api_version}"
            for found in self.call("GET", root)["resources"]:
                if "/" not in found["name"]:
                    self._resources[api_version, found["kind"]] = Resource(
                        root, found["name"], namespaced=found["namespaced"]
                    )
        if key not in self._resources:
            raise ApiError(f"discovery of {api_version}", 404, f"the API server knows no kind {kind}")
        return self._resources[key]

    def create(self, obj: Object) -> Object:
        """Create an object; a namespaced one without a namespace goes to `default`."""
        where = self.resource(obj["kind"], obj["apiVersion"])
        return self.call("POST", where.path(obj["metadata"].get("namespace", "default")), obj)

    def get(self, kind: str, name: str, *, namespace: str = "default", api_version: str = "v1") -> Object:
        """Return one object; raise ApiError with code 404 where it is not there."""
        return self.call("GET", self.resource(kind, api_version).path(namespace, name))

    def list(
        self,
        kind: str,
        *,
        namespace: str | None = None,
        labels: str = "",
        fields: str = "",
        api_version: str = "v1",
    ) -> list[Object]:
        """Return all objects of a kind, of every namespace unless one is named, that the two selectors leave."""
        answer = self.call("GET", self.resource(kind, api_version).path(namespace), query=_selectors(labels, fields))
        items: list[Object] = answer["items"] or []
        return items

    def patch(
        self,
        kind: str,
        name: str,
        patch: object,
        *,
        namespace: str = "default",
        subresource: str | None = None,
        content: str = MERGE_PATCH,
        api_version: str = "v1",
    ) -> Object:
        """Patch one object and return it as it is then."""
        path = self.resource(kind, api_version).path(namespace, name, subresource)
        return self.call("PATCH", path, patch, content=content)

    def delete(
        self,
        kind: str,
        name: str,
        *,
        namespace: str = "default",
        grace_s: int | None = None,
        api_version: str = "v1",
    ) -> None:
        """Delete one object; one that is not there is what the caller wanted."""
        body = {} if grace_s is None else {"gracePeriodSeconds": grace_s}
        try:
            self.call("DELETE", self.resource(kind, api_version).path(namespace, name), body)
        except ApiError as error:
            if error.code != http.HTTPStatus.NOT_FOUND:
                raise

    def delete_pods(self) -> None:
        """Delete what pods are left in `default`, those that no kubelet would end at once, and wait for their end."""
        left = self.list("Pod", namespace="default")
        for pod in left:
            self.delete("Pod", pod["metadata"]["name"], grace_s=None if "nodeName" in pod["spec"] else 0)
        for pod in left:
            self.gone(pod["metadata"]["name"])

    def bind(
        self,
        pod: str,
        node: str,
        *,
        namespace: str = "default",
        uid: str | None = None,
        annotations: Mapping[str, str] | None = None,
    ) -> None:
        """Bind a pod to a node as a scheduler would; the annotations are merged into the pod in the same write."""
        metadata: Object = {"name": pod, "annotations": dict(annotations or {})}
        if uid is not None:
            metadata["uid"] = uid
        binding = {
            "apiVersion": "v1",
            "kind": "Binding",
            "metadata": metadata,
            "target": {"kind": "Node", "name": node},
        }
        self.call("POST", self.resource("Pod").path(namespace, pod, "binding"), binding)

    def bound(self, pod: str, *, namespace: str = "default", timeout_s: float = 60) -> Object:
        """Wait until a pod has a node."""
        return self.wait(
            "Pod",
            pod,
            lambda seen: bool(seen and seen["spec"].get("nodeName")),
            namespace=namespace,
            timeout_s=timeout_s,
            saying="its node",
        )

    def unschedulable(self, pod: str, because: str = "", *, namespace: str = "default") -> Object:
        """Wait until kube-scheduler says that a pod fits nowhere, in a sentence that has the words *because*."""

        def says_so(seen: Object | None) -> bool:
            conditions = seen["status"].get("conditions", []) if seen else []
            return any(one.get("reason") == "Unschedulable" and because in one["message"] for one in conditions)

        saying = f"to wait because {because}" if because else "to wait"
        return self.wait("Pod", pod, says_so, namespace=namespace, timeout_s=60, saying=saying)

    def gone(self, pod: str) -> None:
        """Wait until a pod of `default` is gone."""
        self.wait("Pod", pod, lambda seen: seen is None, saying="its end")

    def apply(self, documents: str | Path, *, manager: str = "e2e") -> Sequence[Object]:
        """Apply YAML documents (server-side apply, as `kubectl apply --server-side --force-conflicts` does)."""
        text = documents.read_text() if isinstance(documents, Path) else documents
        return [self.apply_object(obj, manager=manager) for obj in yaml.safe_load_all(text) if obj]

    def apply_object(self, obj: Object, *, manager: str = "e2e") -> Object:
        """Apply one object."""
        metadata = obj["metadata"]
        path = self.resource(obj["kind"], obj["apiVersion"]).path(
            metadata.get("namespace", "default"), metadata["name"]
        )
        return self.call("PATCH", path, obj, query={"fieldManager": manager, "force": "true"}, content=APPLY_PATCH)

    @contextmanager
    def watch(
        self, path: str, *, resource_version: str, query: Mapping[str, str] | None = None, timeout_s: float
    ) -> Iterator[Iterator[Object]]:
        """Watch a path: yields watch events as they come; the iterator ends when the server closes the watch."""
        asked = {"watch": "true", "resourceVersion": resource_version, **(query or {})}
        asked["timeoutSeconds"] = str(max(1, int(timeout_s)))
        connection = self._connect(timeout_s + 10)
        try:
            connection.request("GET", f"{path}?{urlencode(asked)}", headers={"Authorization": f"Bearer {self.token}"})
            response = connection.getresponse()
            if response.status not in STATUS_OK:
                raise ApiError(f"watch {path}", response.status, _message(response.read()))
            yield (json.loads(line) for line in response)
        finally:
            connection.close()

    def wait(
        self,
        kind: str,
        name: str,
        condition: Callable[[Object | None], bool],
        *,
        namespace: str = "default",
        timeout_s: float = 120,
        saying: str = "the awaited state",
    ) -> Object:
        """Wait, by a watch, until `condition` holds for the named object; it gets None while there is none.

        Returns the object ({} for None). Raises TimeoutError with a sentence that quotes the last state seen.
        """
        path = self.resource(kind).path(namespace)
        query = {"fieldSelector": f"metadata.name={name}"}
        deadline = time.monotonic() + timeout_s
        last: Object | None = None
        while (left := deadline - time.monotonic()) > 0:
            listing = self.call("GET", path, query=query)
            last = next(iter(listing["items"] or []), None)
            if condition(last):
                return last or {}
            version = listing["metadata"]["resourceVersion"]
            with self.watch(path, resource_version=version, query=query, timeout_s=left) as events:
                for event in events:
                    if event["type"] == "ERROR":
                        break
                    last = None if event["type"] == "DELETED" else event["object"]
                    if condition(last):
                        return last or {}
        state = "gone" if last is None else json.dumps(last.get("status", {}))[:2000]
        raise TimeoutError(
            f"{kind} {namespace}/{name}: {saying} did not come in {timeout_s:.0f} s; its status: {state}"
        )


def _selectors(labels: str, fields: str) -> dict[str, str] | None:
    chosen = {"labelSelector": labels, "fieldSelector": fields}
    return {key: value for key, value in chosen.items() if value} or None


def _message(answer: bytes) -> str:
    try:
        return str(json.loads(answer)["message"])
    except (ValueError, KeyError, TypeError):
        return answer[:500].decode(errors="replace")
