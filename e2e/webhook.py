"""The extender's admission behind HTTPS, as a kube-apiserver calls it, and its configuration turned to that server."""

import base64
import ssl
import subprocess
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Self

from e2e.processes import find_program
from e2e.rest import Object
from extender.admission import Settings, mutating_review, validating_review

_REVIEWS: dict[str, Callable[[bytes, Settings], bytes]] = {
    "/admission/mutate": mutating_review,
    "/admission/validate": validating_review,
}


class WebhookServer:
    """An HTTPS server on loopback; `calls` lists the paths it was asked, in order."""

    def __init__(self, directory: Path, settings: Settings) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        certificate, key = _make_certificate(directory)
        self.ca_bundle = base64.b64encode(certificate.read_bytes()).decode()
        self.calls: list[str] = []
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(certificate, key)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(settings, self.calls))
        self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def turned_here(self, configuration: Object) -> Object:
        """Return a webhook configuration that calls this server where it called the extender's Service."""
        port = self._server.server_address[1]
        webhooks = [
            one
            | {
                "clientConfig": {
                    "url": f"https://127.0.0.1:{port}{one['clientConfig']['service']['path']}",
                    "caBundle": self.ca_bundle,
                }
            }
            for one in configuration["webhooks"]
        ]
        return configuration | {"webhooks": webhooks}


def _handler(settings: Settings, calls: list[str]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # Header and body in one write: two cost 40 ms, by Nagle's algorithm and delayed acknowledgement.
        wbufsize = -1

        def do_POST(self) -> None:
            # the API server adds ?timeout=5s
            path = self.path.partition("?")[0]
            calls.append(path)
            answer = _REVIEWS[path](self.rfile.read(int(self.headers["Content-Length"])), settings)
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class's name)
            """Say nothing: the test says what went wrong."""

    return Handler


def _make_certificate(directory: Path) -> tuple[Path, Path]:
    certificate, key = directory / "webhook.crt", directory / "webhook.key"
    subprocess.run(
        [
            *(find_program("openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", key, "-out", certificate),
        ],
        check=True,
        capture_output=True,
    )
    return certificate, key
