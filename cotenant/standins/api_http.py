"""The HTTP side of the stand-in API server: from a request to the store and back."""

import http.client
import re
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

import msgspec

from cotenant.standins import api_rules as rules
from cotenant.standins.api_discovery import discovered
from cotenant.standins.api_rules import BUDGETS, NODES, PODS, RESOURCES, Json, Refused, Resource
from cotenant.standins.api_store import Key, Selection, Stored, bookmark_line, event_line

if TYPE_CHECKING:
    from cotenant.standins.api_server import ApiServer

_object = msgspec.json.Decoder(dict[str, Any])
_PATH = re.compile(
    r"(?P<root>/api/v1|/apis/[^/]+/[^/]+)(?:/namespaces/(?P<namespace>[^/]+))?"
    r"/(?P<plural>[a-z]+)(?:/(?P<name>[^/]+)(?:/(?P<subresource>[a-z]+))?)?"
)
_PROXY = re.compile(r"/api/v1/namespaces/(?P<service>[^/]+/services/[^/]+)/proxy(?P<path>/.*)")
_BY_PATH = {(resource.root, resource.plural): resource for resource in RESOURCES}
_VERBS = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}
_WATCH_SECONDS = 1800.0
# How often a watch that asked for bookmarks gets one.
_BOOKMARK_SECONDS = 60.0
_UNKNOWN = Refused(404, "NotFound", "the server could not find the requested resource")


class Write(NamedTuple):
    """Record one request that wanted to change something, and how it was answered; *status* 0: not at all, nor done.

    *user* is whom kubeconfig() named, "" for others.
    """

    verb: str
    resource: str
    subresource: str
    namespace: str
    name: str
    status: int
    user: str = ""


class Target(NamedTuple):
    """Say what a path names."""

    resource: Resource
    namespace: str
    name: str
    subresource: str

    @property
    def key(self) -> Key:
        """Give the key of the one object."""
        return self.namespace, self.name


class Handler(BaseHTTPRequestHandler):
    """Answer the requests of one connection."""

    protocol_version = "HTTP/1.1"
    # Head and body leave in one write: two of them meet Nagle and delayed acknowledgement, 40 ms each time.
    wbufsize = 1 << 16
    disable_nagle_algorithm = True

    @property
    def _api(self) -> "ApiServer":
        api: ApiServer = self.server.api  # type: ignore[attr-defined]
        return api

    def do_GET(self) -> None:
        """Read or watch."""
        self._answer()

    do_POST = do_PUT = do_PATCH = do_DELETE = do_GET  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - http.server's signature
        """Say nothing; the writes are recorded."""

    def _answer(self) -> None:
        body = self._body()
        url = urlsplit(self.path)
        query = {key: values[-1] for key, values in parse_qs(url.query, keep_blank_values=True).items()}
        fault = self._api.faults.take(self.command, self.path)
        if fault is not None:
            fault.pause()
            if fault.drop == "before":
                self._record(url.path, 0)
                self.close_connection = True
                return
        try:
            if fault is not None and fault.refusal is not None:
                raise fault.refusal
            self._authenticate()
            if query.get("watch") in {"1", "true"}:
                self._watch(self._target(url.path), query)
                return
            code, answer = self._act(url.path, query, body)
        except Refused as refused:
            code, answer = refused.code, msgspec.json.encode(refused.status())
            retry_after = refused.retry_after
        else:
            retry_after = None
        self._record(url.path, code)
        if fault is not None and fault.drop == "after":
            self.close_connection = True
            return
        self._reply(code, answer, retry_after)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") != "chunked":  # as `kubectl create --raw` sends its file
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _authenticate(self) -> None:
        if self._api.token and not self._user and self.headers.get("Authorization") != f"Bearer {self._api.token}":
            raise Refused(401, "Unauthorized", "Unauthorized")

    @property
    def _user(self) -> str:
        return self._api.users.get(self.headers.get("Authorization", "").removeprefix("Bearer "), "")

    def _record(self, path: str, code: int) -> None:
        if self.command not in _VERBS or not (found := _PATH.fullmatch(path)):
            return
        parts = {key: unquote(found[key] or "") for key in ("plural", "subresource", "namespace", "name")}
        with self._api.store.changed:
            self._api.writes.append(
                Write(
                    _VERBS[self.command],
                    parts["plural"],
                    parts["subresource"],
                    parts["namespace"],
                    parts["name"],
                    code,
                    self._user,
                )
            )
            self._api.store.changed.notify_all()

    def _reply(self, code: int, answer: bytes, retry_after: int | None) -> None:
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        if retry_after is not None:
            self.send_header("Retry-After", str(retry_after))
        self.end_headers()
        self.wfile.write(answer)

    def _target(self, path: str) -> Target:
        found = _PATH.fullmatch(path)
        resource = _BY_PATH.get((found["root"], found["plural"])) if found else None
        if found is None or resource is None:
            raise _UNKNOWN
        return Target(resource, *(unquote(found[group] or "") for group in ("namespace", "name", "subresource")))

    def _act(self, path: str, query: dict[str, str], body: bytes) -> tuple[int, bytes]:
        if path in {"/livez", "/readyz", "/healthz"}:
            return 200, b"ok"
        if path == "/version":
            return 200, msgspec.json.encode({"gitVersion": self._api.version})
        if (found := discovered(path)) is not None:
            return 200, msgspec.json.encode(found)
        if (service := _PROXY.fullmatch(path)) and self.command in {"GET", "POST"}:
            return self._handed_on(service["service"], service["path"], query, body)
        target = self._target(path)
        return getattr(self, f"_{self.command.lower()}")(target, query, body)  # type: ignore[no-any-return]

    def _handed_on(self, service: str, path: str, query: dict[str, str], body: bytes) -> tuple[int, bytes]:
        """Ask a Service, as the API server's proxy does (K/pkg/registry/core/service/proxy)."""
        address = self._api.services.get(unquote(service))
        if address is None:
            raise Refused(503, "ServiceUnavailable", "no endpoints available for service")
        host, _, port = address.rpartition(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=30)
        try:
            connection.request(self.command, f"{path}?{urlencode(query)}", body)
            answer = connection.getresponse()
            return answer.status, answer.read()
        except OSError as error:
            raise Refused(502, "BadGateway", f"error trying to reach service: {error}") from error
        finally:
            connection.close()

    def _get(self, target: Target, query: dict[str, str], _: bytes) -> tuple[int, bytes]:
        if target.name:
            return 200, self._api.store.get(target.resource, target.key).raw
        return 200, self._list(target, query)

    def _delete(self, target: Target, query: dict[str, str], body: bytes) -> tuple[int, bytes]:
        options = _decoded(body) if body else {}
        grace = options.get("gracePeriodSeconds", query.get("gracePeriodSeconds"))
        uid = (options.get("preconditions") or {}).get("uid")
        grace = None if grace is None else int(grace)
        return 200, self._api.store.delete(target.resource, target.key, grace=grace, uid=uid).raw

    def _post(self, target: Target, query: dict[str, str], body: bytes) -> tuple[int, bytes]:
        if target.resource == PODS and target.subresource == "binding":
            self._api.store.bind(target.key, _decoded(body))
            return 201, b'{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Success","code":201}'
        if target.resource == PODS and target.subresource == "eviction":
            self._evict(target, _decoded(body))
            return 201, b'{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Success","code":201}'
        if target.name:
            raise Refused(405, "MethodNotAllowed", "the server does not allow this method on the requested resource")
        dry_run = query.get("dryRun") == "All"
        create = self._api.store.create
        return 201, create(target.resource, _decoded(body), namespace=target.namespace, dry_run=dry_run).raw

    def _evict(self, target: Target, eviction: Json) -> None:
        store = self._api.store
        options = eviction.get("deleteOptions") or {}
        with store.changed:
            pod = store.get(PODS, target.key).body
            rules.check_preconditions(PODS, pod["metadata"], options.get("preconditions") or {})
            budgets = (stored.body for stored in store.all(Selection(BUDGETS, target.namespace)))
            charged = rules.disrupted(budgets, pod)
            if charged is not None:
                key = target.namespace, charged["metadata"]["name"]
                store.update(BUDGETS, key, lambda _: charged)
            store.delete(PODS, target.key, grace=options.get("gracePeriodSeconds"))

    def _put(self, target: Target, _: dict[str, str], body: bytes) -> tuple[int, bytes]:
        if target.subresource not in {"", "status"} or (target.subresource and target.resource not in {PODS, NODES}):
            raise _UNKNOWN
        change = self._change(_decoded(body))
        return 200, self._api.store.update(target.resource, target.key, change, subresource=target.subresource).raw

    _patch = _put

    def _change(self, wanted: Json) -> Callable[[Json], Json]:
        if self.command == "PUT":
            return lambda _: wanted
        kind = self.headers.get("Content-Type", "").partition(";")[0]
        if kind == "application/merge-patch+json":
            return lambda old: rules.merged(old, wanted)
        if kind == "application/strategic-merge-patch+json":
            return lambda old: rules.strategically_merged(old, wanted)
        raise Refused(415, "UnsupportedMediaType", f"the stand-in does not know patches of type {kind!r}")

    def _list(self, target: Target, query: dict[str, str]) -> bytes:
        selection = _selection(target, query)
        items, version, token, remaining = self._api.store.page(
            selection, int(query.get("limit") or 0), query.get("continue", "")
        )
        metadata: Json = {"resourceVersion": str(version)}
        if token:
            metadata |= {"continue": token, "remainingItemCount": remaining}
        return b'{"kind":"%sList","apiVersion":"%s","metadata":%s,"items":[%s]}' % (
            target.resource.kind.encode(),
            target.resource.api_version.encode(),
            msgspec.json.encode(metadata),
            b",".join(item.raw for item in items),
        )

    def _watch(self, target: Target, query: dict[str, str]) -> None:
        if query.get("sendInitialEvents") == "true":
            # as where the feature gate WatchList is off: client-go then lists, and watches from there
            raise Refused(422, "Invalid", "sendInitialEvents is forbidden for watch: the stand-in has no WatchList")
        store = self._api.store
        selection = _selection(target, query)
        asked = query.get("resourceVersion", "")
        with store.changed:
            first: list[Stored] = []
            error: Refused | None = None
            position = 0
            if asked in {"", "0"}:
                first, position = store.all(selection), store.position(store.version)
            else:
                try:
                    position = store.position(int(asked))
                except Refused as refused:
                    if self._api.too_old_as_status:
                        raise
                    error = refused
            cuts = store.cuts
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.flush()
        if error is not None:
            self._send_line(b'{"type":"ERROR","object":%s}' % msgspec.json.encode(error.status()))
        else:
            for stored in first:
                self._send_line(b'{"type":"ADDED","object":%s}' % stored.raw)
            with store.watched():
                self._follow(selection, position, cuts, query)
        self.wfile.write(b"0\r\n\r\n")

    def _follow(self, selection: Selection, position: int, cuts: int, query: dict[str, str]) -> None:
        """Send what happens until the watch is cut or its time is up."""
        store = self._api.store
        bookmarks = query.get("allowWatchBookmarks") == "true"
        ends = time.monotonic() + float(query.get("timeoutSeconds") or _WATCH_SECONDS)
        next_bookmark = time.monotonic() + _BOOKMARK_SECONDS
        while (now := time.monotonic()) < ends:
            wakes = min(ends, next_bookmark) if bookmarks else ends
            changes = store.news(position, cuts, max(0.0, wakes - now))
            if changes is None:
                return
            position += len(changes)
            lines = [event_line(change, selection) for change in changes if bookmarks or change.type != "BOOKMARK"]
            if bookmarks and time.monotonic() >= next_bookmark:
                next_bookmark = time.monotonic() + _BOOKMARK_SECONDS
                lines.append(bookmark_line(store.version, selection.resource))
            for line in lines:
                if line is not None:
                    self._send_line(line)

    def _send_line(self, line: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\n\r\n" % (len(line) + 1, line))
        self.wfile.flush()


def _selection(target: Target, query: dict[str, str]) -> Selection:
    fields = _equalities(query.get("fieldSelector", ""))
    if target.name:
        fields["metadata.name"] = target.name
    return Selection(target.resource, target.namespace, fields, _equalities(query.get("labelSelector", "")))


def _equalities(selector: str) -> dict[str, str]:
    pairs = (part.partition("=") for part in selector.split(",") if part)
    return {key.strip(): value.removeprefix("=").strip() for key, _, value in pairs}


def _decoded(body: bytes) -> Json:
    try:
        return _object.decode(body)
    except msgspec.MsgspecError as error:
        raise Refused(400, "BadRequest", f"the body is not a JSON object: {error}") from error
