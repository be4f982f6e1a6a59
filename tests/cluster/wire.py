"""A wire before an API server, on which peers vanish, or all stands still for a while, with connections open."""

import contextlib
import socket
import threading
from typing import Self


class Wire:
    """Pass bytes on between clients and *port* on loopback."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self._listener.getsockname()[1]
        self._vanished: set[socket.socket] = set()
        self._open: set[socket.socket] = set()
        self._flows = threading.Event()
        self._flows.set()

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        self._flows.set()
        for one in [*self._open]:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def vanish(self) -> None:
        """Have nothing come through any connection that is open now, in either direction; new ones are well."""
        self._vanished |= self._open

    def stall(self, *, stalled: bool = True) -> None:
        """Have nothing arrive until it flows again, and then all of it, as from a machine that stood still."""
        if stalled:
            self._flows.clear()
        else:
            self._flows.set()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                try:
                    server = socket.create_connection(("127.0.0.1", self._port))
                except OSError:
                    client.close()
                    continue
                self._open |= {client, server}
                for source, target in ((client, server), (server, client)):
                    threading.Thread(target=self._pump, args=(source, target), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self._flows.wait()
                if source not in self._vanished:
                    target.sendall(data)
            if source not in self._vanished:
                target.shutdown(socket.SHUT_WR)
