"""The stand-in API server asks webhooks as the real one does, and believes nothing else."""

import base64
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from cotenant.standins.api_server import ApiServer, Refused
from cotenant.standins.webhooks import Webhooks, patched

Json = dict[str, Any]
POD: Json = {"metadata": {"name": "p"}, "spec": {"containers": [{"name": "main"}]}}


class Script:
    """Answer reviews by a function each, and remember what was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Json]] = []
        self.answers: dict[str, Callable[[str], Any]] = {"mutate": allow, "validate": allow}
        self.url = ""


def allow(uid: str, *operations: Json) -> Json:
    patch = {"patchType": "JSONPatch", "patch": base64.b64encode(json.dumps(operations).encode()).decode()}
    return {"response": {"uid": uid, "allowed": True} | (patch if operations else {})}


def deny(uid: str) -> Json:
    return {"response": {"uid": uid, "allowed": False, "status": {"message": "not like this", "code": 403}}}


@pytest.fixture
def script() -> Iterator[Script]:
    script = Script()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            verb = self.path.rpartition("/")[2]
            review = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            script.asked.append((verb, review))
            answer = script.answers[verb](review["request"]["uid"])
            self.send_response(answer if isinstance(answer, int) else 200)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - http.server's signature
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    script.url = f"http://127.0.0.1:{server.server_port}/admission"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield script
    server.shutdown()
    server.server_close()


def test_a_pod_is_changed_first_and_judged_as_changed(script: Script) -> None:
    operation = {"op": "add", "path": "/spec/schedulerName", "value": "ours"}
    script.answers["mutate"] = lambda uid: allow(uid, operation)
    with ApiServer(admit=Webhooks(script.url, user="alice")) as api:
        pod = api.add_pod("p")
    assert "ours" == pod["spec"]["schedulerName"]
    assert ["mutate", "validate"] == [verb for verb, _ in script.asked]
    request = script.asked[1][1]["request"]
    assert ("CREATE", "pods", "alice", "ours") == (
        request["operation"],
        request["resource"]["resource"],
        request["userInfo"]["username"],
        request["object"]["spec"]["schedulerName"],
    )


def test_a_pod_that_is_denied_is_not_stored(script: Script) -> None:
    script.answers["validate"] = deny
    with ApiServer(admit=Webhooks(script.url, user="alice")) as api:
        with pytest.raises(Refused, match=r"webhook .* denied the request: not like this"):
            api.add_pod("p")
        assert [] == api.pods()


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(lambda _: 500, id="status"),
        pytest.param(lambda _: {"response": {}}, id="no answer"),
        pytest.param(lambda _: allow("another"), id="another question's answer"),
        pytest.param(lambda uid: allow(uid, {"op": "remove", "path": "/spec/none"}), id="a patch that does not apply"),
    ],
)
def test_a_webhook_that_fails_lets_nothing_pass(script: Script, answer: Callable[[str], Any]) -> None:
    script.answers["mutate"] = answer
    with pytest.raises(Refused) as refused:
        Webhooks(script.url, user="alice")(POD)
    assert 500 == refused.value.code


def test_a_webhook_that_is_not_there_lets_nothing_pass() -> None:
    with pytest.raises(Refused, match="failed calling webhook"):
        Webhooks("http://127.0.0.1:1", user="alice")(POD)


class TestPatch:
    """JSON patch (RFC 6902), as webhooks use it."""

    @pytest.mark.parametrize(
        ("operation", "expected"),
        [
            ({"op": "add", "path": "/c", "value": 1}, {"a": {"x/y": 1}, "b": [1, 2], "c": 1}),
            ({"op": "add", "path": "/a/x~1y", "value": 2}, {"a": {"x/y": 2}, "b": [1, 2]}),
            ({"op": "remove", "path": "/a/x~1y"}, {"a": {}, "b": [1, 2]}),
            ({"op": "add", "path": "/b/0", "value": 0}, {"a": {"x/y": 1}, "b": [0, 1, 2]}),
            ({"op": "add", "path": "/b/-", "value": 3}, {"a": {"x/y": 1}, "b": [1, 2, 3]}),
            ({"op": "replace", "path": "/b/1", "value": 9}, {"a": {"x/y": 1}, "b": [1, 9]}),
            ({"op": "remove", "path": "/b/0"}, {"a": {"x/y": 1}, "b": [2]}),
        ],
    )
    def test_operations(self, operation: Json, expected: Json) -> None:
        document = {"a": {"x/y": 1}, "b": [1, 2]}
        assert expected == patched(document, [operation])
        assert {"a": {"x/y": 1}, "b": [1, 2]} == document

    @pytest.mark.parametrize(
        "operation",
        [
            {"op": "remove", "path": "/none"},
            {"op": "replace", "path": "/none", "value": 1},
            {"op": "add", "path": "/b/3", "value": 1},
            {"op": "remove", "path": "/b/2"},
            {"op": "add", "path": "/none/deep", "value": 1},
            {"op": "add", "path": "/b/x", "value": 1},
            {"op": "move", "path": "/c", "from": "/a"},
        ],
    )
    def test_what_does_not_apply_is_refused(self, operation: Json) -> None:
        with pytest.raises(Refused, match="does not apply"):
            patched({"a": {}, "b": [1, 2]}, [operation])
