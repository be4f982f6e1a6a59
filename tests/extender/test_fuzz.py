"""Whatever is sent to the extender: an answer that the caller reads, no traceback, and an extender unharmed.

COTENANT_FUZZ says how many requests each property sends; `make fuzz` sends 10,000 in all and watches the memory.
"""

import http.client
import os
import resource
import socket
from contextlib import ExitStack
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cotenant.standins.api_server import ApiServer
from tests.builders import a_pod
from tests.extender.running import PATIENCE, Running, bind_args, call, filter_args, submit

REQUESTS = int(os.environ.get("COTENANT_FUZZ", "60"))
# The fixtures stay for all examples on purpose: that the extender is unharmed by all of them is the property.
often = settings(max_examples=REQUESTS, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=20), st.just("n1")
)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
amounts = st.one_of(st.text(max_size=8), st.integers(-3, 200), st.sampled_from(["8", "1e3", "9E", "٣", "0x8", ""]))
wishes = st.dictionaries(
    st.sampled_from([f"cotenant.io/{name}" for name in ("policy", "isolation", "gpu-model", "gpu-uuid", "gpu-count")]),
    st.text(max_size=12) | st.sampled_from(["2", "exclusive", "limited", "*", "[!"]),
    max_size=3,
)


@st.composite
def bodies(draw: st.DrawFn, verb: str) -> bytes:
    """Draw a request that is nearly one, one with a part replaced, or no JSON at all."""
    if draw(st.integers(0, 4)) == 0:
        return draw(st.binary(max_size=200))
    containers = draw(
        st.lists(
            st.fixed_dictionaries(
                {"name": st.text(max_size=8), "resources": st.fixed_dictionaries({"limits": _limits()})}
            ),
            max_size=3,
        )
    )
    pod: dict[str, Any] = {
        "metadata": {
            "name": "p",
            "namespace": "default",
            "uid": draw(st.text(max_size=6)),
            "annotations": draw(wishes),
        },
        "spec": {"containers": containers, "priority": draw(st.integers(-5, 5))},
    }
    made: dict[str, Any] = {
        "filter": filter_args(pod, "n1", "n2", draw(st.text(max_size=5))),
        "prioritize": filter_args(pod, "n1", "n2"),
        "bind": {"PodName": "p", "PodNamespace": "default", "PodUID": draw(st.text(max_size=6)), "Node": "n1"},
        "preempt": {"Pod": pod, "NodeNameToMetaVictims": {"n1": {"Pods": [{"UID": draw(st.text(max_size=6))}]}}},
        "admission/mutate": {"request": {"uid": "u", "operation": "CREATE", "object": pod}},
        "admission/validate": {"request": {"uid": "u", "operation": "CREATE", "object": pod}},
    }[verb]
    if draw(st.booleans()):
        target = made
        while draw(st.booleans()) and (below := [one for one in target.values() if isinstance(one, dict) and one]):
            target = draw(st.sampled_from(below))
        if target:
            target[draw(st.sampled_from(sorted(target)))] = draw(anything)
    return _json(made)


def _limits() -> st.SearchStrategy[dict[str, Any]]:
    names = ["cotenant.io/gpu-mem", "cotenant.io/managed", "nvidia.com/gpu", "cpu", "aliyun.com/gpu-mem"]
    return st.dictionaries(st.sampled_from(names), amounts, max_size=3)


def _json(value: object) -> bytes:
    try:
        return msgspec.json.encode(value)
    except (msgspec.MsgspecError, OverflowError, ValueError, UnicodeError):
        return repr(value).encode(errors="replace")


class TestVerbs:
    """kube-scheduler's calls."""

    @often
    @given(body=bodies("filter"))
    def test_filter_answers_with_nodes_or_with_why_not(self, extender: Running, body: bytes) -> None:
        answer = extender.post("/filter", body)
        assert 200 == answer.status
        assert "failed inside" not in answer.json["Error"], (body, answer.body)
        assert answer.json["Error"] or isinstance(answer.json["NodeNames"] or [], list)

    @often
    @given(body=bodies("prioritize"))
    def test_prioritize_answers_with_scores_or_with_400(self, extender: Running, body: bytes) -> None:
        answer = extender.post("/prioritize", body)
        assert answer.status in {200, 400}, (body, answer.body)
        if answer.status == 200:
            assert all(0 <= one["Score"] <= 10 for one in answer.json)

    @often
    @given(body=bodies("bind"))
    def test_bind_answers_with_why_not(self, extender: Running, body: bytes) -> None:
        answer = extender.post("/bind", body)
        assert 200 == answer.status
        assert answer.json["Error"]  # there is no such pod
        assert "failed inside" not in answer.json["Error"], (body, answer.body)

    @often
    @given(body=bodies("preempt"))
    def test_preempt_answers_with_victims_or_with_400(self, extender: Running, body: bytes) -> None:
        answer = extender.post("/preempt", body)
        assert answer.status in {200, 400}, (body, answer.body)


@pytest.mark.parametrize("name", ["mutate", "validate"])
@often
@given(data=st.data())
def test_the_webhook_answers_with_a_review(extender: Running, name: str, data: st.DataObject) -> None:
    body = data.draw(bodies(f"admission/{name}"))
    answer = call(extender.other_address, "POST", f"/admission/{name}", body)
    assert 200 == answer.status, (body, answer.body)
    assert answer.json["response"]["allowed"] in {True, False}


def test_ten_thousand_requests_leave_the_memory_as_it_was(extender: Running) -> None:
    """Only where so many are asked for: the properties above have then warmed everything up."""
    if REQUESTS < 1000:
        pytest.skip("COTENANT_FUZZ asks for fewer than 1,000 requests: nothing of its memory could be told")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for n in range(2000):
        extender.post(("/filter", "/bind", "/preempt")[n % 3], b'{"Pod":{"metadata":{"name":"p","uid":"%d"}}}' % n)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"\n{grown} KiB more after 2,000 requests")
    assert grown < 20_000


class TestSlowClients:
    """Who opens connections and says little or nothing keeps nobody else waiting."""

    def test_a_filter_is_answered_beside_1000_idle_connections(self, api: ApiServer, extender: Running) -> None:
        pod = submit(api, a_pod().asking(8))
        host, _, port = extender.address.rpartition(":")
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        # both ends of each are in this process
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4096)), hard))
        with ExitStack() as stack:
            for _ in range(1000):
                stack.enter_context(socket.create_connection((host, int(port)), PATIENCE))
            assert ["n1", "n2"] == extender.fitting(pod, "n1", "n2")
            assert "" == extender.bind(pod, "n1")

    def test_a_filter_is_answered_beside_requests_that_never_end(self, api: ApiServer, extender: Running) -> None:
        pod = submit(api, a_pod().asking(8))
        host, _, port = extender.address.rpartition(":")
        begun = [
            b"POST /filter HT",
            b"POST /filter HTTP/1.1\r\nHost: x\r\nX-Slow: ",
            b"POST /filter HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{",
            b"POST /bind HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
        ]
        with ExitStack() as stack:
            for n in range(40):
                connection = stack.enter_context(socket.create_connection((host, int(port)), PATIENCE))
                connection.sendall(begun[n % len(begun)])
            assert ["n1", "n2"] == extender.fitting(pod, "n1", "n2")

    def test_probes_metrics_and_webhook_are_answered_beside_all_of_that(self, extender: Running) -> None:
        host, _, port = extender.other_address.rpartition(":")
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4096)), hard))
        begun = [
            b"",
            b"GET /metrics HT",
            b"GET /readyz HTTP/1.1\r\nHost: x\r\nX-Slow: ",
            b"POST /admission/validate HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{",
            # asks, and never reads
            b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n",
        ]
        with ExitStack() as stack:
            for n in range(1000):
                connection = stack.enter_context(socket.create_connection((host, int(port)), PATIENCE))
                connection.sendall(begun[n % len(begun) if n < 100 else 0])
            for path in ("/healthz", "/readyz", "/metrics"):
                assert 200 == extender.get(path).status
            answer = call(extender.other_address, "POST", "/admission/validate", b"{}")
            assert 200 == answer.status


class TestNoHTTP:
    """What is none ends with its connection."""

    @pytest.mark.parametrize(
        "line",
        [
            b"POST /bind HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
            b"POST /bind HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999\r\n\r\n",
            b"POST /bind HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
            b"POST /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
            b"POST /bind HTTP/1.1\r\n" + b"X: y\r\n" * 100_000 + b"\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        ],
        ids=["negative", "huge", "two lengths", "long path", "many headers", "TLS"],
    )
    def test_what_is_no_http_is_turned_away(self, extender: Running, line: bytes) -> None:
        host, _, port = extender.address.rpartition(":")
        with socket.create_connection((host, int(port)), PATIENCE) as connection:
            try:
                connection.sendall(line)
                connection.shutdown(socket.SHUT_WR)
                answer = connection.recv(1 << 16)
            except (ConnectionError, BrokenPipeError):
                answer = b""
        assert b"" == answer or answer.startswith((b"HTTP/1.1 4", b"HTTP/1.0 4", b"HTTP/1.1 200"))
        assert 200 == extender.get("/healthz").status


def test_only_posts_are_verbs(extender: Running) -> None:
    for verb in ("filter", "prioritize", "preempt", "bind"):
        connection = http.client.HTTPConnection(*_pair(extender.address), timeout=PATIENCE)
        connection.request("GET", f"/{verb}")
        assert connection.getresponse().status in {404, 405}
        connection.close()


def test_a_bind_by_a_stranger_can_bind_nothing_but_what_waits(api: ApiServer, extender: Running) -> None:
    pod = submit(api, a_pod().asking(8))
    assert "" != extender.bind({**pod, "metadata": {**pod["metadata"], "uid": "guessed"}}, "n1")
    assert "" != extender.post("/bind", bind_args(pod, "no-such-node")).json["Error"]
    assert extender.stage(pod) is None


def _pair(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, int(port)
