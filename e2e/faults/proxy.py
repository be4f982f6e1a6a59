"""A proxy between one of our programs and the API server, in which everything goes wrong that can, by seed.

What happens to a request depends on the seed, on what is asked of which object, and on how often that was asked before:
not on when, so that a seed that broke something breaks it again however the threads are scheduled. What a test wants to
go wrong at one exact place it says with the stand-in's own switches (`faults`).
"""

import contextlib
import hashlib
import http.client
import random
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

import yaml

from cotenant.standins.api_faults import Faults
from e2e.cluster import ControlPlane

_STATUS = b'{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"%s","message":"a fault","code":%d}'
_REASONS = {
    409: b"Conflict",
    410: b"Expired",
    429: b"TooManyRequests",
    500: b"InternalError",
    503: b"ServiceUnavailable",
    504: b"Timeout",
}
# Sent on as it came; the rest is the connection's own.
_HEADERS = ("Authorization", "Content-Type", "Accept", "User-Agent")


@dataclass(frozen=True)
class Odds:
    """How often each thing goes wrong, of one request or of one line of a watch."""

    delay: float = 0.10
    hang: float = 0.004
    lose_request: float = 0.02
    lose_reply: float = 0.02
    twice: float = 0.02
    refuse: float = 0.04
    fail_after: float = 0.01
    # of the lines of a watch
    cut: float = 0.01
    repeat: float = 0.03
    freeze: float = 0.002
    # of the watches that begin
    too_old: float = 0.05
    delay_s: tuple[float, float] = (0.01, 0.5)
    hang_s: tuple[float, float] = (3.0, 8.0)


class Dice:
    """Decides what goes wrong, by a seed."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self.odds = Odds()
        self._lock = threading.Lock()
        self._asked: Counter[str] = Counter()
        self.happened: Counter[str] = Counter()

    def roll(self, what: str) -> random.Random:
        """Give the chance of one request: the n-th about *what* is the same in every run of a seed."""
        with self._lock:
            self._asked[what] += 1
            number = self._asked[what]
        digest = hashlib.sha256(f"{self._seed} {what} {number}".encode()).digest()
        return random.Random(digest)

    def note(self, kind: str) -> None:
        """Count what went wrong."""
        with self._lock:
            self.happened[kind] += 1

    def request(self, rng: random.Random) -> str:
        """Say what goes wrong with one request, "" for nothing."""
        kinds = ("delay", "hang", "lose_request", "lose_reply", "twice", "refuse", "fail_after")
        drawn = rng.random()
        for kind in kinds:
            drawn -= getattr(self.odds, kind)
            if drawn < 0:
                self.note(kind)
                return kind
        return ""

    def line(self, rng: random.Random) -> str:
        """Say what goes wrong with one line of a watch, "" for nothing."""
        drawn = rng.random()
        for kind in ("cut", "repeat", "freeze"):
            drawn -= getattr(self.odds, kind)
            if drawn < 0:
                self.note(f"watch: {kind}")
                return kind
        return ""


class FaultProxy:
    """Stands before the API server of a control plane, on loopback and without TLS."""

    def __init__(self, cluster: ControlPlane, *, dice: Dice | None) -> None:
        """Prepare a proxy; without dice nothing goes wrong but what `faults` says."""
        self.dice = dice
        self.faults = Faults()
        self._cluster = cluster
        self._upstream = urlsplit(cluster.url)
        self._tls = ssl.create_default_context(cafile=str(cluster.ca_file))
        self._server = _Server(("127.0.0.1", 0), self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def calm(self) -> None:
        """Let nothing go wrong any more."""
        self.dice = None
        self.faults.clear()

    def kubeconfig(self, original: Path) -> Path:
        """Write a kubeconfig like *original* that goes through the proxy."""
        config = yaml.safe_load(original.read_text())
        config["clusters"][0]["cluster"] = {"server": f"http://127.0.0.1:{self._server.server_port}"}
        path = original.with_suffix(".through-faults")
        path.write_text(yaml.safe_dump(config))
        path.chmod(0o600)
        return path

    def connect(self) -> http.client.HTTPSConnection:
        """Open a connection to the API server."""
        return http.client.HTTPSConnection(
            self._upstream.hostname or "", self._upstream.port, context=self._tls, timeout=700
        )


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, address: tuple[str, int], proxy: FaultProxy) -> None:
        super().__init__(address, _Handler)
        self.proxy = proxy

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: programs that are killed leave broken connections."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16
    disable_nagle_algorithm = True

    @property
    def _proxy(self) -> FaultProxy:
        server = self.server
        assert isinstance(server, _Server)
        return server.proxy

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        scripted = self._proxy.faults.take(self.command, self.path)
        if scripted is not None:
            scripted.pause()
            if scripted.refusal is not None:
                self._refuse(scripted.refusal.code)
                return
            if scripted.drop == "before":
                self.close_connection = True
                return
        watch = parse_qs(url.query).get("watch", [""])[0] in {"1", "true"}
        if watch:
            self._watch(url.path)
            return
        self._request(body, url.path, scripted_loss=scripted is not None and scripted.drop == "after")

    do_POST = do_PUT = do_PATCH = do_DELETE = do_GET  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Say nothing."""

    def _request(self, body: bytes, path: str, *, scripted_loss: bool) -> None:
        dice = self._proxy.dice
        rng = dice.roll(f"{self.command} {path}") if dice else random.Random(0)
        fault = dice.request(rng) if dice else ""
        if dice and fault in {"delay", "hang"}:
            time.sleep(rng.uniform(*(dice.odds.delay_s if fault == "delay" else dice.odds.hang_s)))
        if fault == "lose_request":
            self.close_connection = True
            return
        if fault == "refuse":
            self._refuse(rng.choice([409, 429, 500, 503, 504]))
            return
        if fault == "twice":
            self._forward(body)
        status, answer, headers = self._forward(body)
        if fault == "fail_after":
            self._refuse(rng.choice([500, 504]))
        elif fault == "lose_reply" or scripted_loss:
            self.close_connection = True
        else:
            self._reply(status, answer, headers)

    def _forward(self, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        connection = self._proxy.connect()
        try:
            connection.request(self.command, self.path, body or None, self._sent_on())
            response = connection.getresponse()
            kept = {key: value for key in ("Content-Type", "Retry-After") if (value := response.getheader(key))}
            return response.status, response.read(), kept
        finally:
            connection.close()

    def _sent_on(self) -> dict[str, str]:
        return {key: value for key in _HEADERS if (value := self.headers.get(key))}

    def _refuse(self, code: int) -> None:
        self._reply(code, _STATUS % (_REASONS.get(code, b"Unknown"), code), {"Content-Type": "application/json"})

    def _reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def _watch(self, path: str) -> None:
        """Pass a watch on line by line; the connection ends with it."""
        dice = self._proxy.dice
        rng = dice.roll(f"watch {path}") if dice else random.Random(0)
        self.close_connection = True
        if dice and rng.random() < dice.odds.too_old:
            dice.note("watch: too_old")
            self._refuse(410)
            return
        connection = self._proxy.connect()
        try:
            connection.request("GET", self.path, None, self._sent_on())
            response = connection.getresponse()
            self.send_response(response.status)
            self.send_header("Content-Type", response.getheader("Content-Type") or "application/json")
            # as kube-apiserver does: without chunks a client would wait for its buffer to be full
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.flush()
            _when_closed(self.connection, lambda: _shut(connection))
            for line in response:
                # those that were already open when all became calm stay calm, too
                fault = dice.line(rng) if dice and self._proxy.dice else ""
                if dice and fault == "freeze":
                    time.sleep(rng.uniform(*dice.odds.hang_s))
                if fault == "cut":
                    # in the middle of a line, as a connection would be
                    self.wfile.write(b"%x\r\n" % len(line) + line[: rng.randrange(len(line))])
                    return
                for _ in range(2 if fault == "repeat" else 1):
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
                self.wfile.flush()
            self.wfile.write(b"0\r\n\r\n")
        except (OSError, http.client.HTTPException):
            return
        finally:
            connection.close()


def _when_closed(client: socket.socket, then: Callable[[], None]) -> None:
    """Do something when the client goes: a watch that waits for news would never notice."""

    def wait() -> None:
        with contextlib.suppress(OSError):
            client.recv(1)
        then()

    threading.Thread(target=wait, daemon=True).start()


def _shut(connection: http.client.HTTPSConnection) -> None:
    with contextlib.suppress(OSError):
        if connection.sock is not None:
            connection.sock.shutdown(socket.SHUT_RDWR)
