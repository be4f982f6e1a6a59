"""The server of kube-scheduler's calls: what it understands of HTTP, what it does with the rest, and how it ends."""

import contextlib
import http.client
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from io import BytesIO
from typing import Self

import pytest

from extender.http.bodies import Bodies, Limits
from extender.http.call_server import CallServer, Request
from extender.http.calls import Answer, BodyError
from tests.extender.running import PATIENCE, eventually

# More than the kernel takes for a client that does not read.
LARGE = 32 << 20


class Echo:
    """Answer with what came; a body that is `wait` is held until it is let go."""

    def __init__(self, *, connections: int = 2048, limits: Limits | None = None) -> None:
        self.reached = threading.Event()
        self.go_on = threading.Event()
        # by which threads was answered
        self.by: list[threading.Thread] = []
        self.server = CallServer("127.0.0.1:0", self, limits=limits or Limits(), connections=connections)
        self.server.start()
        host, _, port = self.server.address.rpartition(":")
        self.where = host, int(port)

    def __call__(self, request: Request) -> Answer:
        method, path, body = request.method, request.path, request.body
        if isinstance(body, BodyError):
            return Answer(body.status, str(body).encode())
        if body.strip() == b"wait":
            self.reached.set()
            assert self.go_on.wait(PATIENCE)
        self.by.append(threading.current_thread())
        if path == "/more":
            return Answer(200, b"answered", then=self.do_more)
        if path == "/large":
            return Answer(200, b"", more=(b"x" * (1 << 20),) * (LARGE >> 20))
        return Answer(200, b"%s %s %s" % (method.encode(), path.encode(), body))

    def do_more(self) -> None:
        self.reached.set()
        assert self.go_on.wait(PATIENCE)
        raise RuntimeError

    def connect(self) -> socket.socket:
        return socket.create_connection(self.where, PATIENCE)

    def say(self, *parts: bytes) -> bytes:
        """Send the parts, and nothing more, and give all that comes back."""
        with self.connect() as connection:
            for part in parts:
                connection.sendall(part)
            connection.shutdown(socket.SHUT_WR)
            with connection.makefile("rb") as answer:
                return answer.read()


class Pipe:
    """Be a connection's end that is read, and that gives what was sent and then waits."""

    def __init__(self) -> None:
        end, self._into = os.pipe()
        self.source = os.fdopen(end, "rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._into)
        self.source.close()

    def send(self, part: bytes) -> None:
        os.write(self._into, part)


@pytest.fixture
def echo() -> Iterator[Echo]:
    echo = Echo()
    yield echo
    echo.go_on.set()
    echo.server.stop()


def test_many_requests_come_over_one_connection(echo: Echo) -> None:
    connection = http.client.HTTPConnection(*echo.where, timeout=PATIENCE)
    answers = []
    for n in range(3):
        connection.request("POST", f"/filter?n={n}", str(n))
        answers.append(connection.getresponse().read())
    connection.close()

    assert [b"POST /filter 0", b"POST /filter 1", b"POST /filter 2"] == answers


def test_what_is_left_to_do_is_done_once_the_answer_is_sent_and_the_connection_goes_on(echo: Echo) -> None:
    connection = http.client.HTTPConnection(*echo.where, timeout=PATIENCE)
    connection.request("POST", "/more", "")
    assert b"answered" == connection.getresponse().read()
    assert echo.reached.wait(PATIENCE)
    echo.go_on.set()
    connection.request("POST", "/a", "1")
    assert b"POST /a 1" == connection.getresponse().read()
    connection.close()


def test_two_requests_at_once_are_answered_one_after_the_other(echo: Echo) -> None:
    one = b"POST /a HTTP/1.1\r\nContent-Length: 1\r\n\r\n1"

    assert 2 == echo.say(one + one).count(b"POST /a 1")


def test_a_request_may_come_byte_by_byte(echo: Echo) -> None:
    request = b"POST /a HTTP/1.1\r\nHost: x\r\ncontent-LENGTH:  4 \r\n\r\nbody"

    assert echo.say(*(request[n : n + 1] for n in range(len(request)))).endswith(b"\r\n\r\nPOST /a body")


def test_chunks_are_put_together(echo: Echo) -> None:
    head = b"POST /a HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"

    answer = echo.say(head + b"2;x=y\r\nbo\r\n2\r\ndy\r\n0\r\nTrailer: 1\r\n\r\n")

    assert answer.endswith(b"POST /a body")


def test_a_client_that_asks_first_is_told_to_go_on(echo: Echo) -> None:
    answer = echo.say(b"POST /a HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\nhi")

    assert answer.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n")


@pytest.mark.parametrize(
    "head", [b"POST /a HTTP/1.0\r\nContent-Length: 2", b"POST /a HTTP/1.1\r\nConnection: close\r\nContent-Length: 2"]
)
def test_a_client_that_wants_no_more_is_let_go(echo: Echo, head: bytes) -> None:
    answer = echo.say(head + b"\r\n\r\nhi" + b"POST /b HTTP/1.1\r\nContent-Length: 0\r\n\r\n")

    assert b"Connection: close" in answer
    assert answer.endswith(b"POST /a hi")


def test_a_head_may_be_as_long_as_browsers_and_proxies_make_them(echo: Echo) -> None:
    cookies = b"".join(b"Cookie-%d: %s\r\n" % (n, b"c" * 120) for n in range(100))

    assert echo.say(b"GET /a HTTP/1.1\r\n" + cookies + b"\r\n").endswith(b"GET /a ")


@pytest.mark.parametrize(
    "request_",
    [
        b"\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",  # TLS
        b"POST /a SPDY/3\r\n\r\n",
        b"POST /a HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST /a HTTP/1.1\r\nContent-Length: 1e3\r\n\r\n",
        b"POST /a HTTP/1.1\r\nContent-Length: " + b"9" * 30 + b"\r\n\r\n",
        # smuggling: two lengths that another reader may take otherwise
        b"POST /a HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST /a HTTP/1.1\r\nContent-Length: 3\r\nContent-Length: 0\r\n\r\n",
        b"POST /a HTTP/1.1\r\nTransfer-Encoding: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /a HTTP/1.1\r\nContent-Length : 3\r\n\r\n",
        b"POST /a HTTP/1.1\r\nX: x\r\n Content-Length: 3\r\n\r\n",
        b"POST /a HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0x1\r\nx\r\n0\r\n\r\n",
        b"POST /a HTTP/1.1\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
        b"POST /a HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nsize\r\n",
        b"POST /a HTTP/1.1\r\nContent-Length: 10\r\n\r\nshort",
        b"POST /a HTTP/1.1\r\nX: " + b"x" * (16 << 10),
        b"POST /a HTTP/1.1\r\n" + b"".join(b"X%d: x\r\n" % n for n in range(101)) + b"\r\n",
        b"POST /a HTTP/1.1\r\nUnfinished",
    ],
    ids=lambda request: repr(request)[2:60],
)
def test_what_is_no_request_is_told_so_and_nothing_is_called(echo: Echo, request_: bytes) -> None:
    answer = echo.say(request_)

    assert answer.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert b"\r\nConnection: close\r\n" in answer
    assert b"POST /a" not in answer
    assert echo.say(b"POST /b HTTP/1.1\r\nContent-Length: 1\r\n\r\n1").endswith(b"POST /b 1")


def test_stopping_ends_what_is_idle_and_finishes_what_is_under_way(echo: Echo) -> None:
    idle, busy = echo.connect(), echo.connect()
    busy.sendall(b"POST /a HTTP/1.1\r\nContent-Length: 4\r\n\r\nwait")
    assert echo.reached.wait(PATIENCE)

    stopping = threading.Thread(target=echo.server.stop)
    stopping.start()
    assert b"" == idle.recv(1)
    echo.go_on.set()

    assert busy.recv(1000).endswith(b"POST /a wait")
    assert b"" == busy.recv(1)
    stopping.join(PATIENCE)
    assert not stopping.is_alive()
    with pytest.raises(OSError, match="refused"):
        echo.connect()


def test_a_thread_whose_client_has_gone_serves_the_next_and_ends_with_the_server(echo: Echo) -> None:
    def twice_by_one() -> bool:
        echo.say(b"GET /a HTTP/1.1\r\n\r\n")
        return len(set(echo.by)) < len(echo.by)

    assert eventually(twice_by_one)
    echo.server.stop()
    assert not any(thread.is_alive() for thread in echo.by)


class TestTooMany:
    """Four connections at once, and no more."""

    @pytest.fixture
    def echo(self) -> Iterator[Echo]:
        echo = Echo(connections=4)
        yield echo
        echo.go_on.set()
        echo.server.stop()

    def test_the_one_that_has_been_silent_for_longest_gives_way(self, echo: Echo) -> None:
        silent = [echo.connect() for _ in range(4)]
        # the kernel connects before the server knows: only now are all four known, in this order
        assert eventually(lambda: len(echo.server._silent) == 4)
        # the first has spoken since, and waits for its next request; the second sends one that never ends
        silent[0].sendall(b"POST /a HTTP/1.1\r\nContent-Length: 1\r\n\r\n1")
        assert silent[0].recv(1000).endswith(b"POST /a 1")
        silent[1].sendall(b"POST /a HTTP/1.1\r\nX: ")

        for n in range(3):
            assert echo.say(b"POST /b HTTP/1.1\r\nContent-Length: 1\r\n\r\n%d" % n).endswith(b"POST /b %d" % n)

        assert b"" == silent[1].recv(1)
        silent[0].sendall(b"POST /c HTTP/1.1\r\nContent-Length: 1\r\n\r\n1")
        assert silent[0].recv(1000).endswith(b"POST /c 1")

    def test_behind_hundreds_that_say_nothing_nobody_waits_for_long(self, echo: Echo) -> None:
        silent = [echo.connect() for _ in range(800)]  # fewer than the backlog holds

        assert echo.say(post(b"/b", b"1")).endswith(b"POST /b 1")
        for one in silent:
            one.close()

    def test_one_that_is_being_answered_is_never_hung_up_on(self, echo: Echo) -> None:
        busy = [echo.connect() for _ in range(4)]
        for one in busy:
            one.sendall(b"POST /a HTTP/1.1\r\nContent-Length: 4\r\n\r\nwait")
        assert eventually(lambda: len(echo.server._connections) == 4 and not echo.server._silent)
        late = echo.connect()
        late.sendall(b"POST /b HTTP/1.1\r\nConnection: close\r\nContent-Length: 1\r\n\r\n1")
        echo.go_on.set()

        assert [True] * 4 == [one.recv(1000).endswith(b"POST /a wait") for one in busy]
        assert late.recv(1000).endswith(b"POST /b 1")


class TestSilence:
    """Clients that may say nothing for a fifth of a second."""

    @pytest.fixture
    def echo(self) -> Iterator[Echo]:
        echo = Echo(limits=Limits(silence=0.2))
        yield echo
        echo.server.stop()

    @pytest.mark.parametrize(
        ("sent", "told"),
        [
            (b"", b""),
            (b"GET /a HTTP/1.1\r\n", b"or ends early"),
            (b"POST /a HTTP/1.1\r\nContent-Length: 2\r\n\r\n", b"ends before its Content-Length"),
            (b"POST /a HTTP/1.1\r\nContent-Length: 2\r\n\r\n1", b"ends before its Content-Length"),
            (b"POST /a HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n", b"ends in the middle of a chunk"),
            (b"POST /a HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n1", b"ends in the middle of a chunk"),
            (b"POST /a HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n1\r\n", b"a chunk's size is no number"),
        ],
    )
    def test_one_who_says_no_more_is_hung_up_on(self, echo: Echo, sent: bytes, told: bytes) -> None:
        with echo.connect() as connection, connection.makefile("rb") as answer:
            connection.sendall(sent)

            assert told in answer.read()
        assert eventually(lambda: not echo.server._connections)

    def test_one_who_does_not_take_his_answer_is_hung_up_on(self, echo: Echo) -> None:
        with echo.connect() as connection:
            connection.sendall(b"GET /large HTTP/1.1\r\n\r\n")

            assert eventually(lambda: bool(echo.by) and not echo.server._connections)

    def test_one_who_asks_again_in_time_is_answered_for_as_long_as_he_asks(self, echo: Echo) -> None:
        with echo.connect() as connection:
            for n in range(4):  # 0.4 s in all
                connection.sendall(post(b"/a", b"%d" % n))
                assert connection.recv(1000).endswith(b"POST /a %d" % n)
                time.sleep(0.1)


class TestAnswers:
    """Large answers, of which three may wait for clients that do not read."""

    @pytest.fixture
    def echo(self) -> Iterator[Echo]:
        echo = Echo(limits=Limits(answers=1 << 20))
        yield echo
        echo.server.stop()

    def test_of_those_who_take_theirs_slowly_the_first_gives_way_to_the_next(self, echo: Echo) -> None:
        slow = []
        for _ in range(4):
            slow.append(echo.connect())
            slow[-1].sendall(b"GET /large HTTP/1.1\r\nConnection: close\r\n\r\n")
            assert eventually(lambda: len(echo.by) == len(slow))

        taken = [taken_by(one) for one in slow]

        assert taken[0] < LARGE
        assert [True] * 3 == [one > LARGE for one in taken[1:]]

    def test_one_who_has_taken_his_may_ask_again(self, echo: Echo) -> None:
        with echo.connect() as connection:
            connection.sendall(b"GET /large HTTP/1.1\r\n\r\n" * 4 + b"GET /a HTTP/1.1\r\nConnection: close\r\n\r\n")

            assert 4 * LARGE < taken_by(connection)


def taken_by(connection: socket.socket) -> int:
    """Read all that comes, and count its bytes."""
    taken = 0
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(1 << 20):
            taken += len(piece)
    return taken


def post(path: bytes, body: bytes) -> bytes:
    return b"POST %s HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (path, len(body), body)


class TestBodies:
    """Bodies of 100 bytes at most, none for /page, and 250 bytes together."""

    @pytest.fixture(params=[0.2])
    def echo(self, request: pytest.FixtureRequest) -> Iterator[Echo]:
        limits = Limits(lambda path: 0 if path == "/page" else 100, 250, patience=request.param, enough=0.05)
        echo = Echo(limits=limits)
        yield echo
        echo.go_on.set()
        echo.server.stop()

    @pytest.mark.parametrize(
        ("request_", "sentence"),
        [
            (post(b"/page", b"x"), b"/page: a request for this path has no body, or there is no such path"),
            (post(b"/a", b"x" * 101), b"/a: the request has 101 bytes, more than the 100 bytes allowed"),
            (post(b"/a", b"x" * (1 << 20)), b"/a: the request has 1048576 bytes, more than the 100 bytes allowed"),
            (
                b"POST /a HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n32\r\n" + b"x" * 50 + b"\r\n33\r\n",
                b"/a: the request has more than the 100 bytes allowed",
            ),
            (
                b"GET /page HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n",
                b"/page: a request for this path has no body, or there is no such path",
            ),
        ],
        ids=["none", "one too many", "far too many", "chunks", "a chunk for none"],
    )
    def test_a_path_takes_its_own_length_and_no_more(self, echo: Echo, request_: bytes, sentence: bytes) -> None:
        answer = echo.say(request_)

        assert answer.startswith(b"HTTP/1.1 413 Request Entity Too Large\r\n")
        assert answer.endswith(b"\r\n\r\n" + sentence)

    def test_a_body_that_was_refused_leaves_the_connection_as_it_was(self, echo: Echo) -> None:
        answers = echo.say(post(b"/a", b"x" * 101), post(b"/page", b""), post(b"/b", b"2"))

        assert b"POST /page " in answers
        assert answers.endswith(b"POST /b 2")

    def test_what_is_answered_makes_room_for_the_next(self, echo: Echo) -> None:
        answers = echo.say(*[post(b"/a", b"%100d" % n) for n in range(20)])

        assert 20 == answers.count(b"HTTP/1.1 200 OK")

    def test_where_all_are_being_answered_the_next_is_told_to_come_again(self, echo: Echo) -> None:
        busy = [echo.connect() for _ in range(2)]
        for one in busy:
            one.sendall(post(b"/a", b"%100s" % b"wait"))
        assert eventually(lambda: echo.server._bodies._room == 50)  # 250 - 2 x 100
        assert eventually(lambda: not echo.server._bodies._sending)

        refused = echo.say(post(b"/b", b"x" * 51))
        small = echo.say(post(b"/b", b"x" * 50))
        echo.go_on.set()

        assert refused.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
        assert b"now have the 250 bytes that they may have together; try again" in refused
        assert small.startswith(b"HTTP/1.1 200 OK")
        assert [True] * 2 == [one.recv(1000).startswith(b"HTTP/1.1 200 OK") for one in busy]
        assert echo.say(post(b"/b", b"x" * 51)).startswith(b"HTTP/1.1 200 OK")

    @pytest.mark.parametrize("echo", [PATIENCE], indirect=True)
    @pytest.mark.parametrize("chunked", [False, True])
    def test_those_who_send_slowly_take_nobody_s_room(self, echo: Echo, *, chunked: bool) -> None:
        slow = [echo.connect() for _ in range(6)]
        for one in slow:
            head = b"Transfer-Encoding: chunked\r\n\r\n64\r\n" if chunked else b"Content-Length: 100\r\n\r\n"
            one.sendall(b"POST /slow HTTP/1.1\r\n" + head + b"x")
        assert eventually(lambda: echo.server._bodies._room == 50)  # two of them have room, four wait for it

        for n in range(5):
            assert echo.say(post(b"/a", b"%100d" % n)).endswith(b"%d" % n)

        assert eventually(lambda: echo.server._bodies._room >= 50)

    def test_no_more_are_hung_up_on_than_have_to_be_and_what_they_still_send_is_no_use(self) -> None:
        hung_up: list[int] = []
        bodies: Bodies[int] = Bodies(Limits(lambda _: 100, 250, patience=PATIENCE, enough=0.01), hung_up.append)
        with ExitStack() as stack, ThreadPoolExecutor() as threads:
            # five that send 50 each fill it, and say no more for now
            pipes = [stack.enter_context(Pipe()) for _ in range(5)]
            slow = [threads.submit(bodies.read, n, pipe.source, "/", None) for n, pipe in enumerate(pipes)]
            for pipe in pipes:
                pipe.send(b"32\r\n" + b"x" * 50 + b"\r\n")
            assert eventually(lambda: bodies._room == 0)

            small = threads.submit(bodies.read, 5, BytesIO(b"x" * 10), "/", 10)
            assert eventually(lambda: hung_up)
            (first,) = hung_up
            pipes[first].send(b"a\r\n" + b"x" * 10 + b"\r\n0\r\n\r\n")
            refused, whole = slow[first].result(PATIENCE)
            bodies.give_back(first)

            assert (True, False) == (isinstance(refused, BodyError), whole)
            assert (b"x" * 10, True) == small.result(PATIENCE)
            assert [first] == hung_up
            for pipe in pipes:
                pipe.send(b"0\r\n\r\n")

    def test_the_smallest_body_that_waits_is_the_next(self) -> None:
        bodies: Bodies[int] = Bodies(Limits(lambda _: 100, 100, patience=PATIENCE), lambda _: None)
        with ThreadPoolExecutor() as threads:
            bodies.read(0, BytesIO(b"x" * 100), "/", 100)
            large = threads.submit(bodies.read, 1, BytesIO(b"x" * 100), "/", 100)
            assert eventually(lambda: bodies._waiting == [100])
            small = threads.submit(bodies.read, 2, BytesIO(b"x"), "/", 1)
            assert eventually(lambda: bodies._waiting == [100, 1])

            bodies.give_back(0)

            assert (b"x", True) == small.result(PATIENCE)
            assert [100] == bodies._waiting
            bodies.give_back(2)
            assert (b"x" * 100, True) == large.result(PATIENCE)

    def test_one_that_hangs_up_in_the_middle_gives_its_room_back(self, echo: Echo) -> None:
        for _ in range(5):
            with echo.connect() as one:
                one.sendall(b"POST /a HTTP/1.1\r\nContent-Length: 100\r\n\r\nx")

        assert eventually(lambda: echo.server._bodies._room == 250)
        assert not echo.server._bodies._taken
