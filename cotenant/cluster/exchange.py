"""A request and its answer on a connection that is kept: sent in one write, and read no further than is needed.

urllib3 sends head and body apart, looks through the environment for proxies each time, and has the email package read
the head of the answer: 0.65 ms of CPU for a Binding where this takes 0.13, while kube-scheduler's next filter waits for
the interpreter (docs/decisions/0075). urllib3 still dials, since it knows about certificates and host names.
"""

import re
import sys
import threading
from collections import deque
from collections.abc import Mapping
from typing import Any, BinaryIO, NamedTuple

from urllib3 import HTTPConnectionPool
from urllib3.connection import HTTPConnection
from urllib3.exceptions import HTTPError

_BUFFER = 64 << 10
_MAX_LINE = 64 << 10
_CONNECT_TIMEOUT_SECONDS = 5.0
_INFORMATIONAL = range(100, 200)
# RFC 9112, 6.3: these have no body, whatever their head says
_BODILESS = (204, 304)
# more bytes than there is memory for
ANY = sys.maxsize
_HEX = re.compile(rb"[0-9A-Fa-f]{1,16}")


class NotSentError(Exception):
    """Say why nothing of a request has been sent."""


class BrokenError(OSError):
    """Say that what came is no answer, or half of one."""


class TooLongError(Exception):
    """Say that an answer's body is longer than was to be read."""


class Answer(NamedTuple):
    """Hold an answer: its status, its header fields by their names in lower case, and its body."""

    status: int
    fields: Mapping[bytes, bytes]
    body: bytes


class _Line(NamedTuple):
    connection: HTTPConnection
    sock: Any
    source: BinaryIO


class Exchange:
    """Ask one server, from any number of threads, on connections of which at most *most_idle* are kept."""

    def __init__(self, pool: HTTPConnectionPool, *, most_idle: int) -> None:
        """Dial as *pool* would; it must not be one of a proxy."""
        self._pool = pool
        self._most_idle = most_idle
        self._host = f"[{pool.host}]:{pool.port}" if ":" in pool.host else f"{pool.host}:{pool.port}"
        self._guard = threading.Lock()
        self._idle: deque[_Line] = deque()
        self._closed = False

    def send(  # noqa: PLR0917 - a request has so many parts
        self,
        method: str,
        target: str,
        fields: Mapping[str, str],
        body: bytes | None,
        timeout: float,
        most: int = ANY,
    ) -> Answer:
        """Send one request, once, and read its answer; *timeout* seconds bound each silence, *most* bytes its body.

        Raises:
            NotSentError: nothing was sent.
            TooLongError: the body has more bytes than *most*.
            TimeoutError: the server was silent for too long.
            OSError: the connection was lost.

        """
        request = _request(method, target, {"Host": self._host, **fields}, body)
        line = self._line(min(timeout, _CONNECT_TIMEOUT_SECONDS))
        try:
            if line.sock.gettimeout() != timeout:
                line.sock.settimeout(timeout)
            # in one write, so that the server wakes up once
            line.sock.sendall(request)
            answer, keep = _read(line.source, most)
        except BaseException as error:
            _hang_up(line)
            if isinstance(error, TimeoutError):
                # A peer that vanished without a word, as behind an address that moves, vanished from the idle ones too:
                # each would cost a request, and its whole timeout.
                self._hang_up_idle()
            raise
        self._give_back(line, keep=keep)
        return answer

    def close(self) -> None:
        """Hang up idle connections, and those under way after their answer."""
        with self._guard:
            self._closed = True
        self._hang_up_idle()

    def _hang_up_idle(self) -> None:
        with self._guard:
            idle, self._idle = self._idle, deque()
        for line in idle:
            _hang_up(line)

    def _line(self, timeout: float) -> _Line:
        """Take the connection that was used last, or dial; one that the server has closed meanwhile is dropped."""
        while True:
            with self._guard:
                line = self._idle.pop() if self._idle else None
            if line is None:
                return self._dial(timeout)
            if line.connection.is_connected:
                return line
            _hang_up(line)

    def _dial(self, timeout: float) -> _Line:
        connection: Any = self._pool._new_conn()  # noqa: SLF001 - all else that dials would send, too
        connection.timeout = timeout
        try:
            connection.connect()
        except (HTTPError, OSError) as error:
            connection.close()
            raise NotSentError(str(error)) from error
        return _Line(connection, connection.sock, connection.sock.makefile("rb", _BUFFER))

    def _give_back(self, line: _Line, *, keep: bool) -> None:
        with self._guard:
            if keep and not self._closed and len(self._idle) < self._most_idle:
                self._idle.append(line)
                return
        _hang_up(line)


def _hang_up(line: _Line) -> None:
    line.source.close()
    line.connection.close()


def _request(method: str, target: str, fields: Mapping[str, str], body: bytes | None) -> bytes:
    if body is not None:
        fields = {**fields, "Content-Length": str(len(body))}
    head = f"{method} {target} HTTP/1.1\r\n" + "".join(f"{name}: {value.strip()}\r\n" for name, value in fields.items())
    if head.count("\n") != len(fields) + 1 or head.count("\r") != len(fields) + 1:
        raise NotSentError("a header field, which may be the token, has a line break in it")
    return f"{head}\r\n".encode("latin-1") + (body or b"")


def _read(source: BinaryIO, most: int) -> tuple[Answer, bool]:
    """Read an answer, and tell whether another may follow on the connection."""
    while True:
        status, version = _status(source)
        fields = _fields(source)
        if status not in _INFORMATIONAL:
            break
    keep = version != b"HTTP/1.0" and fields.get(b"connection", b"").lower() != b"close"
    if status in _BODILESS:
        return Answer(status, fields, b""), keep
    if fields.get(b"transfer-encoding", b"").lower() == b"chunked":
        return Answer(status, fields, _chunks(source, most)), keep
    length = fields.get(b"content-length")
    if length is None:
        return Answer(status, fields, to_the_end(source, most)), False
    if not length.isdigit():
        raise BrokenError("the Content-Length is no number")
    return Answer(status, fields, _exactly(source, int(length), most)), keep


def _status(source: BinaryIO) -> tuple[int, bytes]:
    words = source.readline(_MAX_LINE).split(None, 2)
    if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():  # noqa: PLR2004
        raise BrokenError("the connection was closed, or what came is not HTTP/1.1")
    return int(words[1]), words[0]


def _fields(source: BinaryIO) -> dict[bytes, bytes]:
    found: dict[bytes, bytes] = {}
    while (line := source.readline(_MAX_LINE)) not in {b"\r\n", b"\n"}:
        if not line.endswith(b"\n"):
            raise BrokenError("the head of the answer is not whole")
        name, _, value = line.partition(b":")
        found[name.lower()] = value.strip()
    return found


def _chunks(source: BinaryIO, most: int) -> bytes:
    parts: list[bytes] = []
    while True:
        length = chunk_size(source)
        if length is None:
            raise BrokenError("a chunk's size is no number")
        if length == 0:
            _fields(source)  # trailers
            return b"".join(parts)
        parts.append(_exactly(source, length, most))
        most -= length
        source.readline(_MAX_LINE)


def chunk_size(source: BinaryIO) -> int | None:
    """Read how long the next chunk of a body is; None where that is no number, as 0x1 and -1 are to a proxy."""
    size = source.readline(_MAX_LINE).partition(b";")[0].strip()
    return int(size, 16) if _HEX.fullmatch(size) else None


def _exactly(source: BinaryIO, length: int, most: int) -> bytes:
    if length > most:
        raise TooLongError
    body = source.read(length)
    if len(body) < length:
        raise BrokenError("the body of the answer is not whole")
    return body


def to_the_end(source: Any, most: int) -> bytes:
    """Read all that comes; raise TooLongError where it is more than *most* bytes."""
    parts: list[bytes] = []
    while part := source.read(min(_BUFFER, most + 1)):
        if len(part) > most:
            raise TooLongError
        parts.append(part)
        most -= len(part)
    return b"".join(parts)
