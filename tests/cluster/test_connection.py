import json
import socket
import ssl
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, Self

import pytest

from cotenant.cluster import (
    ApiError,
    Cluster,
    Conflict,
    Forbidden,
    Gone,
    Invalid,
    NoCluster,
    NotFound,
    ServerError,
    TimedOut,
    TooManyRequests,
    Unauthorized,
    Unreachable,
    connect,
    namespace_of,
    writes,
)
from cotenant.cluster.errors import error_of
from cotenant.standins.api_server import ApiServer
from tests.cluster.wire import Wire
from tests.extender.certificates import Authority, why_not

PODS = "/api/v1/namespaces/default/pods"
A_POD = b'{"metadata":{"name":"one"},"spec":{"containers":[]}}'


def a_kubeconfig(path: Path, url: str, user: dict[str, Any], *, authority: str = "") -> str:
    config = {
        "current-context": "c",
        "clusters": [{"name": "c", "cluster": {"server": url, "certificate-authority": authority}}],
        "users": [{"name": "c", "user": user}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "c"}}],
    }
    path.write_text(json.dumps(config))
    return str(path)


class TestConnect:
    """What is missing is named."""

    def test_a_file_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(NoCluster, match=r"absent does not exist, or is no file: name one with --kubeconfig"):
            connect(str(tmp_path / "absent"))

    def test_of_several_files_the_first_current_context_counts_as_to_kubectl(self, tmp_path: Path) -> None:
        with ApiServer() as api, ApiServer() as other:
            api.add_node("first")
            other.add_node("last")
            first = a_kubeconfig(tmp_path / "first", api.url, {"token": "t"})
            last = Path(a_kubeconfig(tmp_path / "last", other.url, {"token": "t"}))
            last.write_text(last.read_text().replace('"c"', '"d"'))
            several = f"{tmp_path / 'absent'}:{first}:{last}"
            for context, node in ((None, "first"), ("d", "last")):
                with connect(several, context=context) as cluster:
                    names = [one["metadata"]["name"] for one in json.loads(cluster.get("/api/v1/nodes").body)["items"]]
                assert [node] == names

    def test_the_namespace_is_that_of_the_context_be_none_current(self, tmp_path: Path) -> None:
        for name in "ab":
            contexts = [{"name": name, "context": {"cluster": "c", "namespace": f"team-{name}"}}]
            (tmp_path / name).write_text(json.dumps({"contexts": contexts}))
        several = f"{tmp_path / 'a'}:{tmp_path / 'b'}"
        assert ["team-a", "team-b", "default"] == [namespace_of(several, context=name) for name in ("a", "b", None)]

    @pytest.mark.parametrize(
        "text", ["", "[]", "{}", "current-context: nobody", "a: [", "7", "current-context: c\ncontexts: 5"]
    )
    def test_a_file_that_is_no_kubeconfig(self, text: str, tmp_path: Path) -> None:
        (tmp_path / "kubeconfig").write_text(text)

        with pytest.raises(NoCluster, match=r"the kubeconfig file .*/kubeconfig cannot be used: [^\n]+$"):
            connect(str(tmp_path / "kubeconfig"))

    def test_no_file_and_no_pod(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)

        with pytest.raises(NoCluster, match="no kubeconfig file was given, and KUBERNETES_SERVICE_HOST is not set"):
            connect()

    def test_a_pod_without_a_service_account(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "1")

        with pytest.raises(NoCluster, match=r"the pod's service account cannot be used: Service token file"):
            connect()


class TestAnswers:
    """Every answer but 2xx is a typed error, and says whether a write may have been done all the same."""

    @pytest.mark.parametrize(
        ("status", "kind"),
        [
            (302, ApiError),  # of a proxy that wants somebody to log in
            (400, ApiError),
            (401, Unauthorized),
            (403, Forbidden),
            (404, NotFound),
            (409, Conflict),
            (410, Gone),
            (422, Invalid),
            (429, TooManyRequests),
        ],
    )
    def test_a_refused_write_was_not_done(
        self, status: int, kind: type[ApiError], api: ApiServer, cluster: Cluster
    ) -> None:
        api.faults.refuse(status, "not like this", times=2)  # a 401 is tried twice

        with pytest.raises(kind, match="not like this") as refused:
            cluster.post(PODS, A_POD)

        assert kind is type(refused.value)
        assert (status, "not like this", False) == (
            refused.value.status,
            refused.value.message,
            refused.value.outcome_unknown,
        )

    @pytest.mark.parametrize("status", [500, 503, 504])
    def test_a_write_that_the_server_failed_at_may_have_been_done(
        self, status: int, api: ApiServer, cluster: Cluster
    ) -> None:
        api.faults.refuse(status)

        with pytest.raises(ServerError) as failed:
            cluster.post(PODS, A_POD)

        assert failed.value.outcome_unknown

    def test_a_read_is_never_in_doubt(self, api: ApiServer, cluster: Cluster) -> None:
        api.faults.refuse(504)

        with pytest.raises(ServerError) as failed:
            cluster.get(PODS)

        assert not failed.value.outcome_unknown

    def test_the_wait_that_the_server_asks_for_is_kept(self, api: ApiServer, cluster: Cluster) -> None:
        api.faults.refuse(429, retry_after=3)

        with pytest.raises(TooManyRequests) as refused:
            cluster.get(PODS)

        assert 3.0 == refused.value.retry_after

    def test_the_header_speaks_where_the_status_is_silent(self) -> None:
        assert 5.0 == error_of(b"slow down", status=429, retry_after="5").retry_after
        # a balancer's own, and one that no wait takes, which ended the thread that was to wait
        assert 60.0 == error_of(b"closed", status=503, retry_after="3600").retry_after
        assert 60.0 == error_of(b"closed", status=503, retry_after="9" * 400).retry_after
        assert error_of(b"slow down", status=429, retry_after="Wed, 21 Oct 2026 07:28:00 GMT").retry_after is None

    @pytest.mark.parametrize(
        "body", [b"<html>token=s3cret</html>", b'{"kind":"Secret","message":"s3cret"}', b"", b"\xff"]
    )
    def test_only_a_status_is_ever_shown(self, body: bytes) -> None:
        error = error_of(body, status=502)

        assert "s3cret" not in str(error) + repr(error)
        assert "the server answered 502 without saying why (502 Unknown)" == str(error)

    def test_the_whole_error_reads_as_a_sentence(self, cluster: Cluster) -> None:
        with pytest.raises(NotFound) as refused:
            cluster.get(f"{PODS}/absent")

        assert 'pods "absent" not found (404 NotFound)' == str(refused.value)


class TestOutcomes:
    """A write is sent once, and whether it may have been done is known."""

    def test_a_lost_reply_leaves_a_write_that_was_done_in_doubt(self, api: ApiServer, cluster: Cluster) -> None:
        api.faults.lose_reply(method="POST")

        with pytest.raises(Unreachable, match="connection to the API server was lost") as lost:
            cluster.post(PODS, A_POD)

        assert lost.value.outcome_unknown
        assert api.pod("one") is not None
        assert [201] == [write.status for write in api.writes]  # once

    def test_a_lost_request_leaves_a_write_that_was_not_done_in_doubt(self, api: ApiServer, cluster: Cluster) -> None:
        api.faults.lose_request(method="POST")

        with pytest.raises(Unreachable) as lost:
            cluster.post(PODS, A_POD)

        assert lost.value.outcome_unknown
        assert api.pod("one") is None
        assert [0] == [write.status for write in api.writes]

    def test_a_lost_read_is_not_in_doubt(self, api: ApiServer, cluster: Cluster) -> None:
        api.faults.lose_reply()

        with pytest.raises(Unreachable) as lost:
            cluster.get(PODS)

        assert not lost.value.outcome_unknown

    def test_a_write_that_takes_too_long_is_in_doubt(self, api: ApiServer, cluster: Cluster) -> None:
        held = api.faults.hold(method="POST")

        with pytest.raises(TimedOut, match="did not answer in time") as lost:
            cluster.post(PODS, A_POD, timeout=0.2)

        assert lost.value.outcome_unknown
        held.release()
        assert api.wait_until(lambda: api.pod("one"))  # and indeed

    def test_a_write_that_found_nobody_was_not_done(self, tmp_path: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        cluster = connect(a_kubeconfig(tmp_path / "kubeconfig", f"http://127.0.0.1:{port}", {"token": "t"}))

        with pytest.raises(Unreachable, match="cannot be reached") as lost:
            cluster.post(PODS, A_POD)

        assert not lost.value.outcome_unknown

    def test_a_connection_that_was_closed_while_idle_costs_no_write(self, api: ApiServer, cluster: Cluster) -> None:
        cluster.get(PODS)
        api.stop()
        api.start()

        assert 201 == cluster.post(PODS, A_POD).status


class TestConnections:
    """Connections are kept, and any number of threads may ask."""

    def test_requests_one_after_another_share_a_connection(self, api: ApiServer, cluster: Cluster) -> None:
        for _ in range(20):
            cluster.get(PODS)
        with pytest.raises(NotFound):
            cluster.get(f"{PODS}/absent")
        cluster.get(PODS)

        assert 1 == api.connections

    def test_many_threads_get_each_their_own_answer(self, api: ApiServer, cluster: Cluster) -> None:
        names = [f"pod-{number}" for number in range(200)]
        for name in names:
            api.add_pod(name)

        with ThreadPoolExecutor(24) as pool:
            answers = list(pool.map(lambda name: json.loads(cluster.get(f"{PODS}/{name}").body), names))

        assert names == [answer["metadata"]["name"] for answer in answers]

    def test_an_api_server_that_vanishes_without_a_word_costs_one_request(self, api: ApiServer, tmp_path: Path) -> None:
        """As behind an address that moves to another one: what was idle leads nowhere, and TCP does not tell."""
        with Wire(int(api.url.rpartition(":")[2])) as wire:
            cluster = connect(a_kubeconfig(tmp_path / "kubeconfig", f"http://127.0.0.1:{wire.port}", {"token": "t"}))
            held = [api.faults.hold(path=PODS) for _ in range(4)]
            with ThreadPoolExecutor(4) as pool:
                answers = [pool.submit(cluster.get, PODS) for _ in held]
                assert all(one.reached.wait(20) for one in held)
                for one in held:
                    one.release()
            assert [200] * 4 == [answer.result().status for answer in answers]

            wire.vanish()

            with pytest.raises(TimedOut):
                cluster.get(PODS, timeout=0.5)
            assert 201 == cluster.post(PODS, A_POD, timeout=5).status

    def test_a_stream_that_is_closed_by_another_thread_ends(self, api: ApiServer, cluster: Cluster) -> None:
        stream = cluster.stream(PODS, query={"watch": "1"}, silence=1000.0)
        lines: list[bytes] = []
        reader = threading.Thread(target=lambda: lines.extend(stream.lines()))
        reader.start()
        assert api.wait_until(lambda: api.watching == 1)

        stream.close()
        stream.close()
        reader.join(20)

        assert not reader.is_alive()
        assert [] == lines

    def test_lines_are_put_together_from_whatever_pieces_arrive(self, api: ApiServer, cluster: Cluster) -> None:
        stream = cluster.stream(PODS, query={"watch": "1"}, silence=20)
        assert api.wait_until(lambda: api.watching == 1)
        long = b"x" * 200_000  # more than is read at once
        for line in (b"one\n\ntwo", long, b"last"):
            api.say_to_watches(line)
        lines = stream.lines()

        assert [b"one", b"two", long, b"last"] == [next(lines) for _ in range(4)]
        api.cut_watches()
        assert [] == list(lines)


class TestCredentials:
    """Credentials that are renewed on disk are used without a restart."""

    def test_a_refused_token_is_read_again(self, api: ApiServer, tmp_path: Path) -> None:
        token = tmp_path / "token"
        token.write_text("old")
        api.token = "old"
        cluster = connect(a_kubeconfig(tmp_path / "kubeconfig", api.url, {"tokenFile": str(token)}))
        cluster.get(PODS)

        api.token = "new"
        token.write_text("new")

        assert 201 == cluster.post(PODS, A_POD).status

    def test_a_token_that_stays_wrong_is_tried_twice_and_then_reported(self, api: ApiServer, tmp_path: Path) -> None:
        cluster = connect(a_kubeconfig(tmp_path / "kubeconfig", api.url, {"token": "wrong"}))
        api.token = "right"

        with pytest.raises(Unauthorized):
            cluster.post(PODS, A_POD)

        assert [401, 401] == [write.status for write in api.writes]

    def test_an_exec_plugin_is_asked_and_asked_again(self, api: ApiServer, tmp_path: Path) -> None:
        token = tmp_path / "token"
        token.write_text("first")
        print_credential = (
            "import json, sys; print(json.dumps({'apiVersion': 'client.authentication.k8s.io/v1',"
            " 'kind': 'ExecCredential', 'status': {'token': open(sys.argv[1]).read()}}))"
        )
        plugin = {
            "apiVersion": "client.authentication.k8s.io/v1",
            "command": sys.executable,
            "args": ["-c", print_credential, str(token)],
        }
        cluster = connect(a_kubeconfig(tmp_path / "kubeconfig", api.url, {"exec": plugin}))
        api.token = "first"
        assert 200 == cluster.get(PODS).status

        api.token = "second"
        token.write_text("second")

        assert 200 == cluster.get(PODS).status

    def test_a_kubeconfig_that_breaks_later_is_a_sentence_too(self, api: ApiServer, tmp_path: Path) -> None:
        path = tmp_path / "kubeconfig"
        cluster = connect(a_kubeconfig(path, api.url, {"token": "t"}))
        api.token = "another"
        path.write_text("{}")

        with pytest.raises(NoCluster, match="kubeconfig cannot be used"):
            cluster.get(PODS)


class Secured(HTTPServer):
    """Answer every GET by TLS, each on a connection of its own, with a certificate that may be replaced."""

    def __init__(self, authority: Authority) -> None:
        super().__init__(("127.0.0.1", 0), Empty)
        self.certify(authority)

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def certify(self, authority: Authority) -> None:
        """Show a certificate of *authority* from the next handshake on."""
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(*authority.sign("server"))

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        return self._context.wrap_socket(connection, server_side=True), address


class Empty(BaseHTTPRequestHandler):
    """Have nothing."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{}\n")

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.skipif(bool(why_not()), reason=why_not())
class TestAuthority:
    """An authority that is replaced on disk, as a cluster's is before it expires, is trusted without a restart."""

    @pytest.fixture
    def trusted(self, tmp_path: Path) -> Path:
        return tmp_path / "trusted.crt"

    @pytest.fixture
    def server(self, tmp_path: Path, trusted: Path) -> Iterator[Secured]:
        first = Authority(tmp_path / "first")
        trusted.write_bytes(first.certificate.read_bytes())
        with Secured(first) as server:
            yield server

    @pytest.fixture
    def cluster(self, tmp_path: Path, trusted: Path, server: Secured) -> Cluster:
        url = f"https://127.0.0.1:{server.server_port}"
        return connect(a_kubeconfig(tmp_path / "kubeconfig", url, {"token": "t"}, authority=str(trusted)))

    def test_requests_and_watches_go_on(self, tmp_path: Path, trusted: Path, server: Secured, cluster: Cluster) -> None:
        asks: list[Callable[[], bytes]] = [
            lambda: cluster.get(PODS).body,
            lambda: next(cluster.stream(PODS, silence=20).lines()),
        ]
        for number, ask in enumerate(asks):
            assert b"{}" == ask().strip()
            next_one = Authority(tmp_path / f"next-{number}")
            server.certify(next_one)
            trusted.write_bytes(next_one.certificate.read_bytes())

            assert b"{}" == ask().strip()

    def test_one_that_nobody_trusts_is_a_sentence_still(
        self, tmp_path: Path, server: Secured, cluster: Cluster
    ) -> None:
        server.certify(Authority(tmp_path / "stranger"))

        with pytest.raises(Unreachable, match="certificate verify failed") as raised:
            cluster.post(PODS, A_POD)
        assert not raised.value.outcome_unknown


class Scripted:
    """Answer each connection's first request with bytes, whatever was asked, and hang up."""

    def __init__(self, *answers: bytes) -> None:
        self._answers = answers
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.asked: list[bytes] = []
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        self._thread.join(20)

    def _run(self) -> None:
        for answer in self._answers:
            connection, _ = self._listener.accept()
            with connection:
                self.asked.append(connection.recv(1 << 16))
                connection.sendall(answer)


def asking(server: Scripted, directory: Path) -> Cluster:
    return connect(a_kubeconfig(directory / "kubeconfig", server.url, {"token": "t"}))


class TestAnswersOnTheWire:
    """HTTP/1.1 is read as servers and what stands before them may write it."""

    @pytest.mark.parametrize(
        "answer",
        [
            b"HTTP/1.1 201 Created\r\nContent-Length: 5\r\n\r\nhello",
            b"HTTP/1.1 201 Created\r\ncontent-length:5\r\nX: \r\n\r\nhello and what is not asked for",
            b"HTTP/1.1 201 Created\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3;x=y\r\nllo\r\n0\r\nA: b\r\n\r\n",
            b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 201 Created\r\nContent-Length: 5\r\n\r\nhello",
            b"HTTP/1.1 201 Created\r\n\r\nhello",  # as long as the connection lasts
            b"HTTP/1.0 201\r\n\r\nhello",
        ],
    )
    def test_a_body_ends_where_its_head_says(self, answer: bytes, tmp_path: Path) -> None:
        with Scripted(answer) as server:
            assert (201, b"hello") == asking(server, tmp_path).post(PODS, A_POD)

    def test_some_answers_have_no_body(self, tmp_path: Path) -> None:
        with Scripted(b"HTTP/1.1 204 No Content\r\n\r\n") as server:
            assert (204, b"") == asking(server, tmp_path).post(PODS, A_POD)

    @pytest.mark.parametrize(
        "answer",
        [
            b"",
            b"HTTP/1.1 2",
            b"SSH-2.0-OpenSSH_9.6\r\n",
            b"HTTP/1.1 201 Created\r\nContent-Le",
            b"HTTP/1.1 201 Created\r\nContent-Length: five\r\n\r\nhello",
            b"HTTP/1.1 201 Created\r\nContent-Length: 5\r\n\r\nhell",
            b"HTTP/1.1 201 Created\r\nTransfer-Encoding: chunked\r\n\r\nhello",
            b"HTTP/1.1 201 Created\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhell",
            b"HTTP/1.1 201 Created\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nhello",
        ],
    )
    def test_half_an_answer_leaves_a_write_in_doubt(self, answer: bytes, tmp_path: Path) -> None:
        with Scripted(answer) as server, pytest.raises(Unreachable, match="was lost") as lost:
            asking(server, tmp_path).post(PODS, A_POD)

        assert lost.value.outcome_unknown

    def test_a_page_in_place_of_the_api_servers_word_leaves_a_binding_in_doubt(self, tmp_path: Path) -> None:
        page = b"HTTP/1.1 200 OK\r\nContent-Length: 28\r\n\r\n<html>Back in a moment</html>"
        with Scripted(page) as server, pytest.raises(Unreachable, match="is no Status") as told:
            writes.bind(asking(server, tmp_path), namespace="default", name="one", uid="u", node="n1", annotations={})

        assert told.value.outcome_unknown

    def test_a_connection_that_the_server_ends_is_not_used_again(self, tmp_path: Path) -> None:
        answer = b"HTTP/1.1 201 Created\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok"
        with Scripted(answer, answer) as server:
            cluster = asking(server, tmp_path)

            assert [b"ok", b"ok"] == [cluster.post(PODS, A_POD).body for _ in range(2)]

    def test_a_token_with_a_line_break_reaches_nobody(self, tmp_path: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            cluster = connect(a_kubeconfig(tmp_path / "kubeconfig", url, {"token": "t\r\nHost: elsewhere"}))

            with pytest.raises(Unreachable, match="line break") as refused:
                cluster.post(PODS, A_POD)

        assert not refused.value.outcome_unknown

    def test_a_request_is_one_that_any_server_reads(self, tmp_path: Path) -> None:
        with Scripted(b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n") as server:
            asking(server, tmp_path).post(PODS, A_POD)

        head, _, body = server.asked[0].partition(b"\r\n\r\n")
        line, *fields = head.decode().split("\r\n")
        assert (f"POST {PODS} HTTP/1.1", A_POD) == (line, body)
        assert {
            "host": server.url.removeprefix("http://"),
            "content-type": "application/json",
            "content-length": str(len(A_POD)),
            "authorization": "Bearer t",
        }.items() <= {name.lower(): value for name, value in (field.split(": ", 1) for field in fields)}.items()
