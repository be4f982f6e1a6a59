"""The HTTP server: one thread per connection, which reads, answers and waits for the next request.

It hands nothing from a selector to a worker and back for every request, which with Flask's some forty objects
takes 0.6 ms of CPU a call where this takes 0.04 (docs/decisions/0020), and every pod of the cluster waits for two calls
or three. And a client that is slow, or silent, keeps nobody but its own thread waiting; where there are too many of
them, the one that has been silent for longest is hung up on (docs/decisions/0083). It knows as much of HTTP/1.1 as its
callers use, and of the rest says so and hangs up. Answers that clients are slow to take are bounded in bytes, too: the
metrics of 5,000 nodes are 19 MB each time.
"""

import contextlib
import http
import queue
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from io import BufferedReader
from typing import NamedTuple, cast

import structlog

from cotenant.listening import place
from cotenant.threads import Threads
from extender.http.bodies import BadRequestError, Bodies, Limits
from extender.http.calls import Answer, BodyError
from extender.http.certificates import Certificates

_log = structlog.get_logger(__name__)

# kube-scheduler opens a connection for every bind that runs beside others. Beyond this one that waits for its client
# gives way, and where all are being answered, the next waits in the backlog.
_MOST_CONNECTIONS = 2048
_BACKLOG = 1024
# Requests under way when SIGTERM comes get this long, which is less than the 10 s that we promise to be gone in.
_STOP_SECONDS = 6.0
# How long a caller may take to show its certificate.
_HANDSHAKE_SECONDS = 10.0
# Of each connection, which may be as many as above: of half a head without an end what has come is kept.
_MAX_HEAD = 16 << 10
_MAX_FIELDS = 100
_END = b"\r\n\r\n"
# A head that is no longer is remembered, as those of kube-scheduler are; tokens are longer.
_LONGEST_ALIKE = 400
_LENGTHS = frozenset({b"content-length", b"transfer-encoding"})
_BUFFER = 16 << 10
# An answer that no kernel may take at once for a client that does not read; others, as those of the verbs, count for
# nothing.
_LARGE = 16 << 10
# kube-scheduler keeps two idle connections (net/http, DefaultMaxIdleConnsPerHost) and so opens one for every second pod
# of a herd. Threads whose client has gone wait for another one: 0.1 of the 0.25 ms that a connection costs.
_MOST_IDLE = 8
_IDLE_THREAD_SECONDS = 10.0

_CALL = "call"

_LINGER_SECONDS = 2.0
_LOOK_SECONDS = 0.05

_OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


class Request(NamedTuple):
    """Hold what came; header *fields* by their names in lower case, and a body, or why that could not be had."""

    method: str
    path: str
    query: str
    fields: dict[bytes, bytes]
    body: bytes | BodyError


class _Head(NamedTuple):
    """Hold what is read of a request before its body."""

    method: str
    path: str
    query: str
    fields: dict[bytes, bytes]
    # None where the body comes in chunks
    length: int | None
    keep: bool
    # the client waits to be told before it sends the body
    hesitates: bool


class CallServer:
    """Serve *answer* on one address, to at most so many connections at once, with bodies within *limits*.

    With *certificates* by TLS, and where these name an authority, only to those who show a certificate of it.
    """

    def __init__(
        self,
        address: str,
        answer: Callable[[Request], Answer],
        *,
        limits: Limits = Limits(),  # noqa: B008 - it does not change
        certificates: Certificates | None = None,
        connections: int = _MOST_CONNECTIONS,
        threads: Threads | None = None,
    ) -> None:
        self._certificates = certificates
        self._place = place(address)
        self._answer = answer
        self._listener = socket.socket(self._place.family)
        self._room = threading.Semaphore(connections)
        self._guard = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._workers: set[threading.Thread] = set()
        # how many of them have no connection, and the next one, None at the end
        self._idle = 0
        self._next: queue.SimpleQueue[socket.socket | None] = queue.SimpleQueue()
        # those that wait for their client, the longest first, and how much of an answer it has yet to take, at most
        self._silent: dict[socket.socket, int] = {}
        self._limits = limits
        self._bodies: Bodies[socket.socket] = Bodies(limits, _hang_up)
        self._stopping = threading.Event()
        self._threads = threads or Threads()
        self._thread = self._threads.of(f"calls {address}", self._accept)

    @property
    def address(self) -> str:
        """Name where it listens; the port is the one that port 0 became."""
        host, port = self._listener.getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def start(self) -> None:
        """Listen and begin to serve; raise OSError when the address cannot be had."""
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._place.prepare(self._listener)
        self._listener.bind(self._place.address)
        self._listener.listen(_BACKLOG)
        self._threads.register(_CALL)
        self._thread.start()

    def stop(self) -> None:
        """Take no more connections, finish requests under way, and end."""
        self._stopping.set()
        self._room.release()
        with contextlib.suppress(OSError):  # it never listened
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()
        with self._guard:
            left, workers = list(self._connections), list(self._workers)
            for _ in range(self._idle):
                self._next.put(None)
        for connection in left:
            # whoever waits for a request reads the end; whoever answers one can still send
            with contextlib.suppress(OSError):
                _shut(connection, socket.SHUT_RD)
        deadline = time.monotonic() + _STOP_SECONDS
        for worker in workers:
            worker.join(max(0.0, deadline - time.monotonic()))

    def _accept(self) -> bool:
        if self._stopping.is_set():
            return False
        try:
            connection, _ = self._listener.accept()
        except OSError as error:
            if not self._stopping.wait(0.1):  # out of file descriptors, or the client has gone again
                _log.warning("a connection was not accepted", error=str(error))
            return True
        if not self._room.acquire(blocking=False):
            self._hang_up_on_one()
            # one that is being answered now may be silent in a moment
            while not self._room.acquire(timeout=_LOOK_SECONDS):
                self._hang_up_on_one()
        if self._stopping.is_set():
            connection.close()
            return False
        with self._guard:
            self._connections.add(connection)
            self._silent[connection] = 0
            if self._idle:
                self._idle -= 1
                self._next.put(connection)
                return True
            worker = threading.Thread(target=self._work, args=(connection,), name=_CALL, daemon=True)
            self._workers.add(worker)
        try:
            worker.start()
        except RuntimeError as error:  # no more threads are allowed
            _log.warning("a connection was not accepted", error=str(error))
            self._workers.discard(worker)
            self._part_with(connection)
        return True

    def _part_with(self, connection: socket.socket) -> None:
        with self._guard:
            self._connections.remove(connection)
            self._silent.pop(connection, None)
        connection.close()
        self._room.release()

    def _hang_up_on_one(self) -> None:
        """End the connection whose client has been silent for longest; none where all are being answered."""
        with self._guard:
            silent = next(iter(self._silent), None)
            if silent is not None:
                del self._silent[silent]
                _hang_up(silent)

    def _work(self, connection: socket.socket | None) -> None:
        try:
            while connection is not None:
                with self._threads.surviving(_CALL):
                    self._converse(connection)
                connection = self._another()
        finally:
            with self._guard:
                self._workers.discard(threading.current_thread())

    def _another(self) -> socket.socket | None:
        """Wait for a client that this thread can go on with."""
        with self._guard:
            if self._idle >= _MOST_IDLE or self._stopping.is_set():
                return None
            self._idle += 1
        with contextlib.suppress(queue.Empty):
            return self._next.get(timeout=_IDLE_THREAD_SECONDS)
        with self._guard:
            with contextlib.suppress(queue.Empty):  # one has come just now
                return self._next.get_nowait()
            self._idle -= 1
            return None

    def _converse(self, connection: socket.socket) -> None:
        try:
            connection = self._secured(connection)
            _wait_at_most(connection, self._limits.silence)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with cast("BufferedReader", connection.makefile("rb", _BUFFER)) as source:
                while not self._stopping.is_set() and self._one(connection, source):
                    pass
        except BadRequestError as error:
            with contextlib.suppress(OSError):
                connection.sendall(_response(Answer(400, f"{error}\n".encode(), "text/plain"), keep=False))
                _linger(connection)
        except OSError:
            pass  # the client has gone, or was silent for too long
        finally:
            self._part_with(connection)

    def _secured(self, connection: socket.socket) -> socket.socket:
        """Shake hands where there are certificates; in the connection's own thread, so that nobody else waits."""
        if self._certificates is None:
            return connection
        connection.settimeout(_HANDSHAKE_SECONDS)
        secured = self._certificates.context().wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        self._be_known_as(secured, connection)
        try:
            secured.do_handshake()
        except OSError as error:
            _log.info("a caller of the verbs was turned away", why=str(error))
            self._be_known_as(connection, secured)
            secured.close()
            raise
        return secured

    def _be_known_as(self, now: socket.socket, before: socket.socket) -> None:
        with self._guard:
            self._connections.remove(before)
            self._connections.add(now)
            if before in self._silent:
                self._silent[now] = self._silent.pop(before)

    def _one(self, connection: socket.socket, source: BufferedReader) -> bool:
        """Answer one request; tell whether the connection goes on."""
        head = _read_head(source)
        if head is None:
            return False
        if head.hesitates:
            connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        try:
            answer, whole = self._answered(connection, source, head)
        finally:
            # before the answer is sent, which a client may be slow to take
            self._bodies.give_back(connection)
        keep = head.keep and whole and not answer.last and not self._stopping.is_set()
        self._give(connection, answer, keep=keep)
        if answer.then is not None:
            with self._threads.surviving(_CALL):
                answer.then()
        if not whole:
            _linger(connection)
        return keep

    def _give(self, connection: socket.socket, answer: Answer, *, keep: bool) -> None:
        """Send an answer; then the connection waits for its client again."""
        # In one write: a second one would wait for the client's acknowledgement of the first, up to 40 ms.
        first = _response(answer, keep=keep)
        size = len(first) + sum(map(len, answer.more))
        if size > _LARGE:
            self._make_room(connection, size)
        connection.sendall(first)
        for piece in answer.more:
            connection.sendall(piece)
        with self._guard:
            self._silent[connection] = 0

    def _make_room(self, connection: socket.socket, size: int) -> None:
        """Count an answer that its client has yet to take; where all of them are too much, the slowest gives way."""
        with self._guard:
            self._silent[connection] = size
            # three as large as this one have room, however large: two Prometheus and somebody who looks
            while sum(self._silent.values()) > max(self._limits.answers, 3 * size):
                slowest = next(one for one, left in self._silent.items() if left)
                del self._silent[slowest]
                _hang_up(slowest)

    def _answered(self, connection: socket.socket, source: BufferedReader, head: _Head) -> tuple[Answer, bool]:
        """Read the body and make the answer; tell whether all of the body was read."""
        body, whole = self._bodies.read(connection, source, head.path, head.length)
        with self._guard:
            self._silent.pop(connection, None)
        return self._answer(Request(head.method, head.path, head.query, head.fields, body)), whole


def _wait_at_most(connection: socket.socket, seconds: float) -> None:
    """Bound each silence of the client.

    The kernel does, where it can: for a timeout of Python's own each read is two calls, behind each of which the thread
    has to get the interpreter again (docs/decisions/0108). OpenSSL would read again for ever.
    """
    if isinstance(connection, ssl.SSLSocket):
        connection.settimeout(seconds)
        return
    connection.settimeout(None)
    timeval = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
    for limit in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        connection.setsockopt(socket.SOL_SOCKET, limit, timeval)


def _shut(connection: socket.socket, how: int) -> None:
    # not an SSLSocket's own shutdown, after which it would send what is left in the clear
    socket.socket.shutdown(connection, how)


def _hang_up(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        _shut(connection, socket.SHUT_RDWR)


def _linger(connection: socket.socket) -> None:
    """Wait until the client has read its answer: a close on top of what it still sends would take that away again."""
    _shut(connection, socket.SHUT_WR)
    until = time.monotonic() + _LINGER_SECONDS
    while (left := until - time.monotonic()) > 0:
        connection.settimeout(left)
        if not connection.recv(_BUFFER):
            return


def _response(answer: Answer, *, keep: bool) -> bytes:
    # Always with its length: without one Go opens a new connection per call.
    if keep and answer.status == http.HTTPStatus.OK and answer.mimetype == "application/json" and not answer.headers:
        return _OK % len(answer.body) + answer.body
    status = http.HTTPStatus(answer.status)
    length = len(answer.body) + sum(map(len, answer.more))
    lines = [
        f"HTTP/1.1 {status.value} {status.phrase}",
        f"Content-Type: {answer.mimetype}",
        f"Content-Length: {length}",
    ]
    lines += [f"{name}: {value}" for name, value in answer.headers]
    lines += [] if keep else ["Connection: close"]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + answer.body


def _read_head(source: BufferedReader) -> _Head | None:
    """Read a request up to its body; None where the client has hung up."""
    begun = source.peek()
    end = begun.find(_END)
    # mostly a head comes in one piece, and is the same as one before
    if 0 <= end <= _LONGEST_ALIKE:
        return _known_head(source.read(end + len(_END)))
    if not begun:
        return None
    text, line = bytearray(), b""
    while line not in {b"\r\n", b"\n"}:
        line = source.readline(_MAX_HEAD - len(text))
        text += line
        if not line.endswith(b"\n"):
            raise BadRequestError(f"the head of the request is longer than {_MAX_HEAD} bytes, or ends early")
    return _head(bytes(text))


def _head(text: bytes) -> _Head:
    """Read a head, down to the empty line at its end; raise BadRequestError where it is none."""
    line, *lines = text.split(b"\n")
    words = line.decode("latin-1").split()
    if len(words) != 3 or not words[2].startswith("HTTP/1."):  # noqa: PLR2004 - method, target and version
        raise BadRequestError("this is not HTTP/1.1")
    method, target, version = words
    fields: dict[bytes, bytes] = {}
    for line in lines[:-2]:
        if len(fields) == _MAX_FIELDS:
            raise BadRequestError(f"the head of the request has more than {_MAX_FIELDS} fields")
        name, _, value = line.partition(b":")
        name = name.lower()
        # a proxy may take another one of the two, or take these for other fields than we do
        if name.strip() != name or (name in fields and name in _LENGTHS):
            raise BadRequestError("the length of the body is told twice, or a header field has blanks about its name")
        fields[name] = value.strip()
    path, _, query = target.partition("?")
    return _Head(
        method=method,
        path=path,
        query=query,
        fields=fields,
        length=_length(fields),
        keep=version != "HTTP/1.0" and method != "HEAD" and fields.get(b"connection", b"").lower() != b"close",
        hesitates=fields.get(b"expect", b"").lower() == b"100-continue",
    )


# kube-scheduler's heads differ in the length of the body alone: 1.6 us for one that is known, 10 for another (0111).
_known_head = lru_cache(maxsize=512)(_head)


def _length(fields: dict[bytes, bytes]) -> int | None:
    coding, length = fields.get(b"transfer-encoding"), fields.get(b"content-length", b"0")
    if coding is not None:
        if coding.lower() != b"chunked" or b"content-length" in fields:
            raise BadRequestError("of the ways to send a body, only chunks or a Content-Length are read here")
        return None
    if not length.isdigit() or len(length) > 18:  # noqa: PLR2004 - digits of what fits into 64 bits
        raise BadRequestError("the Content-Length is no number")
    return int(length)
