"""A stand-in for kube-apiserver: pods, nodes, events and leases over HTTP on loopback, for the demo and the tests.

It answers as kube-apiserver 1.36 does where our programs look: resource versions, pages, selectors, watches with
bookmarks and 410, merge patches, graceful deletion, and the binding of pods. There is no authorization, and no
defaulting beyond what our programs read.
"""

import secrets
import socket
import threading
from collections.abc import Callable, Mapping
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import msgspec

from cotenant.standins.api_faults import Faults
from cotenant.standins.api_http import Handler, Write
from cotenant.standins.api_rules import EVENTS, NODES, PODS, Json, Refused, Resource, merged
from cotenant.standins.api_store import Selection, Store

__all__ = ["ApiServer", "Refused", "Write"]


class ApiServer:
    """Serve until stop(); usable as a context manager, which starts it.

    Args:
        admit: sees every pod that is created and returns it as it shall be stored, or raises Refused. It may change
            the dict that it gets.
        token: the bearer token that every request must carry, "" for none.

    """

    def __init__(self, *, admit: Callable[[Json], Json] | None = None, token: str = "") -> None:
        self.store = Store(admit)
        self.faults = Faults()
        self.token = token
        self.too_old_as_status = False
        """Has a watch from a forgotten version told by the answer's status, not by an ERROR event."""
        self.users: dict[str, str] = {}
        """Names the user of each token that kubeconfig() gave out."""
        self.version = "v1.36.3"
        self.services: dict[str, str] = {}
        """Where its proxy hands requests on to: HOST:PORT by NAMESPACE/services/SCHEME:NAME:PORT."""
        self.writes: list[Write] = []
        self.connections = 0  # how many were ever opened
        self._http: _Listener | None = None
        self._port = 0

    # Its life

    def start(self) -> Self:
        """Begin to serve, after a stop() on the same port as before, with all objects still there."""
        self._http = _Listener(("127.0.0.1", self._port), self)
        self._port = self._http.server_port
        threading.Thread(target=self._http.serve_forever, args=(0.05,), name="api server", daemon=True).start()
        return self

    def stop(self) -> None:
        """Close the port and every connection; the objects stay."""
        if self._http is not None:
            self.store.cut()
            self._http.shutdown()
            self._http.server_close()
            self._http.close_connections()
            self._http = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """Give the address, once it was started."""
        return f"http://127.0.0.1:{self._port}"

    def kubeconfig(self, path: Path, *, user: str = "") -> str:
        """Write a kubeconfig file for this server and return its path; the writes of a *user* are told from others'."""
        token = self.token or "none-needed"
        if user:
            token = secrets.token_hex(16)
            self.users[token] = user
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "standin",
            "clusters": [{"name": "standin", "cluster": {"server": self.url}}],
            "users": [{"name": "standin", "user": {"token": token}}],
            "contexts": [{"name": "standin", "context": {"cluster": "standin", "user": "standin"}}],
        }
        path.write_bytes(msgspec.json.encode(config))  # JSON is YAML
        return str(path)

    # What is there

    def pods(self, namespace: str = "") -> list[Json]:
        """List the pods of one namespace, or all."""
        return self._all(PODS, namespace)

    def pod(self, name: str, namespace: str = "default") -> Json | None:
        """Give the pod, None if there is none."""
        return self._find(PODS, namespace, name)

    def nodes(self) -> list[Json]:
        """List the nodes."""
        return self._all(NODES)

    def node(self, name: str) -> Json | None:
        """Give the node, None if there is none."""
        return self._find(NODES, "", name)

    def events(self, namespace: str = "") -> list[Json]:
        """List the Events (events.k8s.io/v1) of one namespace, or all."""
        return self._all(EVENTS, namespace)

    @property
    def watching(self) -> int:
        """Tell how many watches are open; only those hear what is said to watches."""
        return self.store.watching

    def wait_until(self, predicate: Callable[[], object], timeout: float = 10.0) -> bool:
        """Wait until *predicate* holds, asked again after every change; tell whether it came to hold in *timeout*."""
        with self.store.changed:
            return bool(self.store.changed.wait_for(lambda: bool(predicate()), timeout))

    # Making it be there

    def add_node(
        self,
        name: str,
        *,
        allocatable: Mapping[str, str] | None = None,
        annotations: Mapping[str, str] | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> Json:
        """Create a node that is ready and has *allocatable*."""
        resources = {"cpu": "64", "memory": "512Gi", "pods": "110", **(allocatable or {})}
        status = {
            "capacity": resources,
            "allocatable": resources,
            "conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady"}],
        }
        return self.create(NODES, {"metadata": _metadata(name, annotations, labels), "status": status})

    def add_pod(
        self,
        name: str,
        *,
        namespace: str = "default",
        limits: Mapping[str, str] | None = None,
        annotations: Mapping[str, str] | None = None,
        labels: Mapping[str, str] | None = None,
        spec: Mapping[str, Any] | None = None,
        status: Mapping[str, Any] | None = None,
    ) -> Json:
        """Create a pod of one container with *limits*; *spec* adds to its spec or replaces parts, *status* stays."""
        container = {"name": "main", "image": "none", "resources": {"limits": dict(limits or {})}}
        body: Json = {
            "metadata": _metadata(name, annotations, labels),
            "spec": {"containers": [container], **(spec or {})},
        }
        if status is not None:
            body["status"] = dict(status)
        return self.store.create(PODS, body, namespace=namespace, keep_status=True).body

    def create(self, resource: Resource, body: Json, namespace: str = "") -> Json:
        """Create an object as a POST does."""
        return self.store.create(resource, body, namespace=namespace).body

    def patch(self, resource: Resource, name: str, patch: Json, *, namespace: str = "", subresource: str = "") -> Json:
        """Merge *patch* into an object as a PATCH does."""
        change = lambda old: merged(old, patch)  # noqa: E731
        return self.store.update(resource, (namespace, name), change, subresource=subresource).body

    def set_phase(self, name: str, phase: str, **status: object) -> Json:
        """Report a pod's phase, and more of its status, as the kubelet does."""
        patch = {"status": {"phase": phase, **status}}
        return self.patch(PODS, name, patch, namespace="default", subresource="status")

    def delete_pod(self, name: str, *, namespace: str = "default", grace: int | None = None) -> None:
        """Delete a pod; 0 is what the kubelet says when its containers have ended."""
        self.store.delete(PODS, (namespace, name), grace=grace)

    # What goes wrong; see also faults

    def cut_watches(self) -> None:
        """End all watches, cleanly."""
        self.store.cut()

    def drop_connections(self) -> None:
        """Close every open connection in the middle of whatever it does."""
        if self._http is not None:
            self._http.close_connections()

    def compact(self) -> None:
        """Forget the history: a watch or a list that is resumed gets a 410. Watches under way go on."""
        self.store.compact()

    def back_up(self) -> Callable[[], None]:
        """Give what has the API server come back with the objects of now, whatever happens until then."""
        return self.store.back_up()

    def freeze_watches(self, *, frozen: bool = True) -> None:
        """Have all watches say nothing more, with their connections open, until they are thawed."""
        self.store.freeze(frozen)

    def send_bookmarks(self) -> None:
        """Have all watches send a bookmark now."""
        self.store.bookmark()

    def say_to_watches(self, line: bytes) -> None:
        """Have all watches send *line*: no JSON, an unknown type, a broken object."""
        self.store.say(line)

    def _all(self, resource: Resource, namespace: str = "") -> list[Json]:
        return [stored.body for stored in self.store.all(Selection(resource, namespace))]

    def _find(self, resource: Resource, namespace: str, name: str) -> Json | None:
        try:
            return self.store.get(resource, (namespace, name)).body
        except Refused:
            return None


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # many programs connect at once

    def __init__(self, address: tuple[str, int], api: ApiServer) -> None:
        self.api = api
        self._open: set[socket.socket] = set()
        self._guard = threading.Lock()
        super().__init__(address, Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._guard:
            self._open.add(request)
            self.api.connections += 1
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._guard:
            self._open.discard(request)
        super().shutdown_request(request)

    def close_connections(self) -> None:
        """Shut every connection in both directions; their threads then end."""
        with self._guard:
            for connection in self._open:
                try:
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue  # the client was faster

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that leave in the middle."""


def _metadata(name: str, annotations: Mapping[str, str] | None, labels: Mapping[str, str] | None) -> Json:
    return {"name": name, "annotations": dict(annotations or {}), "labels": dict(labels or {})}
