"""Serves metrics and health over HTTP, for Prometheus and the kubelet's probes: read-only, off unless configured."""

import time
from collections.abc import Callable, Iterable
from socketserver import TCPServer, ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client.exposition import CONTENT_TYPE_LATEST

from cotenant.listening import Place, place
from device_plugin.threads import THREADS

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

# Whoever takes longer to send a request of one line is cut off.
_REQUEST_SECONDS = 10.0
# Between tries to take a connection while the process may open no more files.
_PAUSE_SECONDS = 0.2


class HTTPServing:
    """Answer /metrics, /healthz and /readyz at HOST:PORT until stop().

    *expose* writes the metrics; *unwell* and *unready* say what is wrong, "" for nothing. Raises OSError when the
    address cannot be had.
    """

    def __init__(
        self, address: str, *, expose: Callable[[], bytes], unwell: Callable[[], str], unready: Callable[[], str]
    ) -> None:
        where = place(address)
        self._expose = expose
        self._checks = {"/healthz": unwell, "/readyz": unready}
        server = type("Server", (_Server,), {"place": where, "address_family": where.family})
        self._server: WSGIServer = make_server(
            *where.address, self._answer, server_class=server, handler_class=_Handler
        )
        self._loop = THREADS.of("http", self._server.serve_forever)

    @property
    def address(self) -> str:
        """Give the address that was taken, which tells the port where 0 was asked for."""
        host, port = self._server.server_address[:2]
        return f"[{host!s}]:{port}" if ":" in str(host) else f"{host!s}:{port}"

    def start(self) -> None:
        """Begin to answer."""
        self._loop.start()

    def stop(self) -> None:
        """End; requests under way are not waited for."""
        self._loop.retire()
        if self._loop.alive:
            self._server.shutdown()
        self._server.server_close()

    def _answer(self, environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if environ.get("REQUEST_METHOD") not in {"GET", "HEAD"}:
            status, kind, body = "405 Method Not Allowed", "text/plain", b"only GET is answered\n"
        elif path == "/metrics":
            status, kind, body = "200 OK", CONTENT_TYPE_LATEST, self._expose()
        elif path in self._checks:
            problem = self._checks[path]()
            status = "503 Service Unavailable" if problem else "200 OK"
            kind, body = "text/plain; charset=utf-8", f"{problem or 'ok'}\n".encode()
        else:
            status, kind, body = "404 Not Found", "text/plain", b"there are /metrics, /healthz and /readyz\n"
        start_response(status, [("Content-Type", kind), ("Content-Length", str(len(body)))])
        return [] if environ.get("REQUEST_METHOD") == "HEAD" else [body]


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    allow_reuse_address = True
    block_on_close = False
    place: Place

    def server_bind(self) -> None:
        """Bind as TCPServer does, and not as HTTPServer, which asks the resolver for this host's name."""
        self.place.prepare(self.socket)
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def get_request(self) -> tuple[Any, Any]:
        """Take a connection; one for which there is no file waits, and is there again at once when it is asked for."""
        try:
            return super().get_request()
        except OSError:
            time.sleep(_PAUSE_SECONDS)
            raise

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Leave out clients that went away."""


class _Handler(WSGIRequestHandler):
    timeout = _REQUEST_SECONDS

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - http.server's signature
        """Say nothing of each scrape."""
