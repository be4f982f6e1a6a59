"""The bodies of requests: each within what its path takes, and all that are under way within a budget of bytes.

A body counts from before its first byte is read until its answer is made. Where there is no room for one more, the
client that has been sending for longest is hung up on, if it has had time enough, and the smallest body that waits is
the next; so clients that send slowly, or promise large bodies and never send them, keep no small one waiting for long.
Where all are being answered the next waits a moment, and is then told to come again.
"""

import threading
import time
from collections.abc import Callable
from typing import BinaryIO, Generic, NamedTuple, TypeVar

from cotenant.cluster.exchange import chunk_size
from extender.http.calls import BUSY, MAX_BODY, TOO_LARGE, BodyError

# A body that is refused is still read up to here, since a client that is cut off while it sends never sees the answer.
_MAX_DRAINED = 64 << 20
_CHUNK = 64 << 10
_MAX_LINE = 64 << 10

C = TypeVar("C")


class BadRequestError(Exception):
    """Say why what came is no request that can be answered; the connection ends."""


class Limits(NamedTuple):
    """Say how many bytes of body a path takes at most, and how many all bodies of one server may have together.

    A body may wait for room for *patience* seconds: kube-scheduler and API server wait 5 s for an answer. Whoever has
    been sending for *enough* seconds may be hung up on for the sake of others. *answers* is how many bytes all answers
    may have that clients have yet to take. A client may say nothing for *silence* seconds: Go's http.Transport keeps
    idle connections for 90 s and does not send a POST again that met a closing one, so the server must wait longer.
    """

    most: Callable[[str], int] = lambda _path: MAX_BODY
    together: int = 2 * MAX_BODY
    patience: float = 2.0
    enough: float = 1.0
    answers: int = 64 << 20
    silence: float = 120.0


class Bodies(Generic[C]):
    """Read bodies within *limits*; a connection *C* has one body at a time, which *hang_up* ends."""

    def __init__(self, limits: Limits, hang_up: Callable[[C], None]) -> None:
        self._limits = limits
        self._room = limits.together
        self._hang_up = hang_up
        self._changed = threading.Condition()
        self._taken: dict[C, int] = {}
        # who sends, since when, the longest first
        self._sending: dict[C, float] = {}
        # what those that were hung up on are about to give back
        self._ended: dict[C, int] = {}
        # how large the bodies are that wait for room
        self._waiting: list[int] = []

    def read(self, connection: C, source: BinaryIO, path: str, length: int | None) -> tuple[bytes | BodyError, bool]:
        """Read a body of *length*, None where it comes in chunks; tell whether all of it was read.

        What was read takes room until give_back(). Raises BadRequestError for one that ends too early.
        """
        if length == 0:
            return b"", True
        most = self._limits.most(path)
        if length is None:
            return self._chunks(connection, source, path, most)
        if length > most:
            return _too_long(path, length, most), _drained(source, length)
        if not self._take(connection, length):
            return self._no_room(), _drained(source, length)
        body = self._piece(source, length, "before its Content-Length")
        self._sent(connection)
        return body, True

    def give_back(self, connection: C) -> None:
        """Count what was read of the connection's body no more."""
        if connection not in self._taken:  # nobody else asks for this connection
            return
        with self._changed:
            self._room += self._taken.pop(connection)
            self._sending.pop(connection, None)
            self._ended.pop(connection, None)
            self._changed.notify_all()

    def _chunks(self, connection: C, source: BinaryIO, path: str, most: int) -> tuple[bytes | BodyError, bool]:
        """Read a body that comes in chunks, which Go does not send of one that it has whole."""
        body = bytearray()
        while True:
            length = chunk_size(source)
            if length is None:
                raise BadRequestError("a chunk's size is no number")
            # it is not waited for an end that may never come
            if len(body) + length > most:
                return _too_long(path, None, most), False
            if length == 0:
                while source.readline(_MAX_LINE).strip():
                    pass  # trailers
                self._sent(connection)
                return bytes(body), True
            if not self._take(connection, length):
                return self._no_room(), False
            body += self._piece(source, length, "in the middle of a chunk")
            source.readline(_MAX_LINE)

    @staticmethod
    def _piece(source: BinaryIO, length: int, where: str) -> bytes:
        # None where the client was silent for too long
        piece = source.read(length) or b""
        if len(piece) < length:
            raise BadRequestError(f"the body ends {where}")
        return piece

    def _take(self, connection: C, size: int) -> bool:
        """Take room for *size* bytes that are to be sent; tell whether there was any."""
        now = time.monotonic()
        deadline = now + self._limits.patience
        with self._changed:
            self._waiting.append(size)
            try:
                while self._room < size or min(self._waiting) < size:
                    slowest = next((one for one in self._sending if one is not connection), None)
                    # one is enough where what it gives back is
                    if slowest is None or self._room + sum(self._ended.values()) >= size:
                        due = deadline
                    else:
                        due = min(deadline, self._sending[slowest] + self._limits.enough)
                    if slowest is not None and due < deadline and due <= now:
                        # its own thread gives back what it has taken, as soon as it notices
                        del self._sending[slowest]
                        self._ended[slowest] = self._taken[slowest]
                        self._hang_up(slowest)
                    elif now >= deadline or connection in self._ended:
                        return False
                    else:
                        self._changed.wait(due - now)
                    now = time.monotonic()
                if connection in self._ended:  # what came of it before it was hung up on is no use
                    return False
                self._room -= size
                self._taken[connection] = self._taken.get(connection, 0) + size
                self._sending.setdefault(connection, now)
                return True
            finally:
                self._waiting.remove(size)
                if self._waiting:
                    self._changed.notify_all()

    def _sent(self, connection: C) -> None:
        with self._changed:
            self._sending.pop(connection, None)

    def _no_room(self) -> BodyError:
        return BodyError(
            f"the bodies of the requests that are answered now have the {self._limits.together} bytes that they may "
            "have together; try again",
            BUSY,
        )


def _too_long(path: str, length: int | None, most: int) -> BodyError:
    if most == 0:
        return BodyError(f"{path}: a request for this path has no body, or there is no such path", TOO_LARGE)
    many = "more" if length is None else f"{length} bytes, more"
    return BodyError(f"{path}: the request has {many} than the {most} bytes allowed", TOO_LARGE)


def _drained(source: BinaryIO, length: int) -> bool:
    """Read a body away; tell whether that was all of it."""
    left = min(length, _MAX_DRAINED)
    while left > 0 and (piece := source.read(min(left, _CHUNK))):
        left -= len(piece)
    return left == 0 and length <= _MAX_DRAINED
