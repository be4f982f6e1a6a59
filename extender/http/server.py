"""The HTTP server: cheroot, kept behind one class because it is the part most easily replaced."""

import threading
from pathlib import Path
from typing import Any

from cheroot.ssl.builtin import BuiltinSSLAdapter
from cheroot.wsgi import Server as CherootServer

# Go's http.Transport keeps idle connections for 90 s and does not send a POST again that met a closing one, so the
# server must be the one that waits longer.
_IDLE_SECONDS = 120
_THREADS = 8
# Requests under way when SIGTERM comes get this long, which is less than the 10 s that we promise to be gone in.
_STOP_SECONDS = 6


class Server:
    """Serve one WSGI application on one address, in threads of its own."""

    def __init__(self, address: str, app: Any, *, certificate: tuple[Path, Path] | None = None) -> None:
        host, _, port = address.rpartition(":")
        self._server = CherootServer(
            (host.strip("[]"), int(port)),
            app,
            numthreads=_THREADS,
            timeout=_IDLE_SECONDS,
            shutdown_timeout=_STOP_SECONDS,
            server_name="cotenant",
        )
        # kube-scheduler opens connections in bursts when binds run in parallel
        self._server.request_queue_size = 1024
        if certificate is not None:
            self._server.ssl_adapter = BuiltinSSLAdapter(*map(str, certificate))
        self._thread = threading.Thread(target=self._server.serve, name=f"http {address}", daemon=True)

    @property
    def address(self) -> str:
        """Name where it listens; the port is the one that port 0 became."""
        host, port = self._server.bind_addr[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def start(self) -> None:
        """Listen and begin to serve; raise OSError when the address cannot be had."""
        self._server.prepare()
        self._thread.start()

    def stop(self) -> None:
        """Take no more connections, finish requests under way, and end."""
        self._server.stop()
        self._thread.join(timeout=_STOP_SECONDS)
