"""A stand-in for the part of the API server that hands requests on to a Service."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self

import msgspec
import yaml

from tests.extender.running import call

ROOT = "/api/v1/namespaces/cotenant-system/services/http:cotenant-extender:serve/proxy"


class ServiceProxy:
    """Hand GETs below ROOT on to *address*; all else is not found, said as the API server does."""

    def __init__(self, address: str) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = self.path.removeprefix(ROOT)
                if path == self.path:
                    body, status, kind = _not_found(), 404, "application/json"
                else:
                    answer = call(address, "GET", path)
                    body, status, kind = answer.body, answer.status, answer.headers["content-type"]
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def kubeconfig(self, path: Path) -> str:
        """Write one with two contexts: `here` leads to this server, the current one to nobody."""
        here, nowhere = f"http://127.0.0.1:{self._server.server_port}", "http://127.0.0.1:1"
        contexts = {"here": here, "nowhere": nowhere}
        file = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "nowhere",
            "clusters": [{"name": name, "cluster": {"server": server}} for name, server in contexts.items()],
            "users": [{"name": "u", "user": {"token": "t"}}],
            "contexts": [{"name": name, "context": {"cluster": name, "user": "u"}} for name in contexts],
        }
        path.write_text(yaml.safe_dump(file))
        return str(path)


def _not_found() -> bytes:
    message = 'services "cotenant-extender" not found'
    return msgspec.json.encode({"kind": "Status", "status": "Failure", "message": message, "code": 404})
