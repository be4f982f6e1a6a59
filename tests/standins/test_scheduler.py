"""The stand-in scheduler does to an extender what kube-scheduler 1.36 does."""

import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cotenant.cluster import Cluster
from cotenant.standins.api_rules import NODES
from cotenant.standins.api_server import ApiServer
from cotenant.standins.scheduler import Scheduler
from cotenant.standins.scheduler_extender import HTTPExtender
from cotenant.standins.scheduler_rules import Pod, PodMetadata, no_fit, requested, sample_size
from tests.standins.scripted_extender import Json, ScriptedExtender

MEMORY = "cotenant.io/gpu-mem"
MANAGED = "cotenant.io/managed"
SCHEDULER = {"schedulerName": "cotenant-scheduler"}

Start = Callable[..., Scheduler]


@pytest.fixture
def extender(api: ApiServer) -> Iterator[ScriptedExtender]:
    with ScriptedExtender(api) as scripted:
        yield scripted


@pytest.fixture
def start(cluster: Cluster, extender: ScriptedExtender) -> Iterator[Start]:
    """Start a scheduler whose back-off is short, and stop it at the end."""
    schedulers = []

    def started(*, timeout: float = 5.0, url: str = extender.url, **options: Any) -> Scheduler:
        options.setdefault("backoff", (0.01, 0.05))
        schedulers.append(
            Scheduler(cluster, HTTPExtender(url, timeout=timeout), rng=random.Random(1), **options).start()
        )
        return schedulers[-1]

    yield started
    for scheduler in schedulers:
        scheduler.stop()


def nodes(api: ApiServer, units: int, *names: str) -> None:
    for name in names:
        api.add_node(name, allocatable={MEMORY: str(units)})


def submit(api: ApiServer, name: str, units: int, **extra: Any) -> Json:
    return api.add_pod(name, limits={MEMORY: str(units), MANAGED: "0"}, spec=SCHEDULER, **extra)


def node_of(api: ApiServer, name: str) -> str | None:
    pod = api.pod(name)
    node: str | None = pod["spec"].get("nodeName") if pod else None
    return node


def condition(api: ApiServer, name: str) -> tuple[str, str]:
    """Give reason and message of PodScheduled=False; empty where it is not there."""
    pod = api.pod(name) or {}
    for found in pod.get("status", {}).get("conditions") or ():
        if (found["type"], found["status"]) == ("PodScheduled", "False"):
            return found["reason"], found["message"]
    return "", ""


def wait_bound(api: ApiServer, name: str) -> str:
    assert api.wait_until(lambda: node_of(api, name)), f"{name} was not bound: {condition(api, name)}"
    return node_of(api, name) or ""


def wait_refused(api: ApiServer, name: str) -> tuple[str, str]:
    assert api.wait_until(lambda: condition(api, name)[0]), f"{name} was not refused"
    return condition(api, name)


def test_a_pod_is_filtered_scored_and_bound_where_the_score_is_highest(
    api: ApiServer, extender: ScriptedExtender, start: Start
) -> None:
    nodes(api, 10, "a", "b", "c")
    extender.score(a=3, b=9, c=0)
    start()
    submit(api, "p", 8)
    assert "b" == wait_bound(api, "p")
    assert ["filter", "prioritize", "bind"] == [call.verb for call in extender.calls]


class TestBodies:
    """The three bodies have Go's field names, and exactly the fields that 1.36 sends."""

    def test_filter_gets_the_pod_without_its_type_and_nodes_by_name(
        self, api: ApiServer, extender: ScriptedExtender, start: Start
    ) -> None:
        nodes(api, 10, "a", "b")
        start()
        pod = submit(api, "p", 8, annotations={"cotenant.io/policy": "best-fit"}, labels={"app": "x"})
        wait_bound(api, "p")
        body = extender.of("filter")[0].body
        assert {"Pod", "Nodes", "NodeNames"} == body.keys()
        assert (None, ["a", "b"]) == (body["Nodes"], body["NodeNames"])
        assert {"metadata", "spec", "status"} == body["Pod"].keys()
        assert pod["spec"] == body["Pod"]["spec"]
        assert pod["metadata"]["annotations"] == body["Pod"]["metadata"]["annotations"]
        assert pod["metadata"]["labels"] == body["Pod"]["metadata"]["labels"]
        assert body == extender.of("prioritize")[0].body

    def test_bind_gets_names_and_uid(self, api: ApiServer, extender: ScriptedExtender, start: Start) -> None:
        nodes(api, 10, "a")
        start()
        uid = submit(api, "p", 8)["metadata"]["uid"]
        wait_bound(api, "p")
        expected = {"PodName": "p", "PodNamespace": "default", "PodUID": uid, "Node": "a"}
        assert expected == extender.of("bind")[0].body

    def test_calls_that_follow_each_other_share_a_connection(
        self, api: ApiServer, extender: ScriptedExtender, start: Start
    ) -> None:
        nodes(api, 10, "a", "b")
        start()
        submit(api, "p", 1)
        wait_bound(api, "p")
        assert 1 == len({call.connection for call in extender.calls})


class TestNodes:
    """What the extender is asked about, and when it is not asked."""

    def test_scores_are_not_asked_for_when_one_node_is_left(
        self, api: ApiServer, extender: ScriptedExtender, start: Start
    ) -> None:
        nodes(api, 10, "a", "b")
        extender.reject("no", "a")
        start()
        submit(api, "p", 8)
        assert "b" == wait_bound(api, "p")
        assert [] == extender.of("prioritize")

    def test_a_node_without_enough_in_sum_is_not_shown_to_the_extender(
        self, api: ApiServer, extender: ScriptedExtender, start: Start
    ) -> None:
        nodes(api, 10, "a", "b")
        nodes(api, 7, "small")
        extender.reject("no single GPU", unresolvable=True)
        start()
        submit(api, "p", 8)
        message = "0/3 nodes are available: 1 Insufficient cotenant.io/gpu-mem, 2 no single GPU."
        assert ("Unschedulable", message) == wait_refused(api, "p")
        assert ["a", "b"] == extender.of("filter")[0].body["NodeNames"]

    def test_an_extender_that_no_node_is_left_for_is_not_called(
        self, api: ApiServer, extender: ScriptedExtender, start: Start
    ) -> None:
        nodes(api, 7, "a", "b")
        start()
        submit(api, "p", 8)
        expected = ("Unschedulable", "0/2 nodes are available: 2 Insufficient cotenant.io/gpu-mem.")
        assert expected == wait_refused(api, "p")
        assert [] == extender.calls

    def test_a_pod_whose_bind_is_under_way_already_counts(
        self, api: ApiServer, extender: ScriptedExtender, start: Start
    ) -> None:
        nodes(api, 10, "a")
        release = threading.Event()

        def slow(body: Json) -> Json:
            release.wait(10)
            return extender.bind(body)

        extender.answers["bind"] = slow
        start()
        submit(api, "first", 6)
        assert extender.wait_for("bind", 1)
        submit(api, "second", 6)  # 10 - 6 = 4 < 6
        assert "Insufficient" in wait_refused(api, "second")[1]
        release.set()
        assert "a" == wait_bound(api, "first")

    def test_a_pod_that_has_ended_no_longer_counts(self, api: ApiServer, start: Start) -> None:
        nodes(api, 10, "a")
        start()
        submit(api, "first", 6)
        wait_bound(api, "first")
        submit(api, "second", 6)
        wait_refused(api, "second")
        api.set_phase("first", "Succeeded")
        assert "a" == wait_bound(api, "second")

    def test_a_nominated_node_is_tried_alone_before_the_others(
        self, api: ApiServer, extender: ScriptedExtender, start: Start
    ) -> None:
        nodes(api, 10, "a", "b", "c")
        start()
        submit(api, "p", 8, status={"nominatedNodeName": "c"})
        assert "c" == wait_bound(api, "p")
        assert [["c"]] == [call.body["NodeNames"] for call in extender.of("filter")]

    def test_a_nominated_node_that_does_not_fit_costs_one_more_call(
        self, api: ApiServer, extender: ScriptedExtender, start: Start
    ) -> None:
        nodes(api, 10, "a", "b", "c")
        extender.reject("no", "c")
        start()
        submit(api, "p", 8, status={"nominatedNodeName": "c"})
        wait_bound(api, "p")
        assert [["c"], ["a", "b", "c"]] == [call.body["NodeNames"] for call in extender.of("filter")]

    def test_a_large_cluster_is_sampled_and_the_next_attempt_sees_others(
        self, api: ApiServer, extender: ScriptedExtender, start: Start
    ) -> None:
        nodes(api, 10, *(f"n{i:03}" for i in range(150)))
        extender.reject("no")
        start()
        submit(api, "p", 8)
        assert extender.wait_for("filter", 2)  # its own condition wakes it once
        first, second = (call.body["NodeNames"] for call in extender.of("filter")[:2])
        assert 100 == len(first) == len(second)  # 49 % of 150 are 73, but at least 100
        assert ("n000", "n100") == (first[0], second[0])

    @pytest.mark.parametrize(
        ("count", "percentage", "expected"),
        [
            pytest.param(99, 0, 99, id="all below 100"),
            pytest.param(100, 0, 100, id="at least 100"),
            pytest.param(1000, 0, 420, id="50 - 1000/125 = 42 %"),
            pytest.param(5000, 0, 500, id="50 - 5000/125 = 10 %"),
            pytest.param(10_000, 0, 500, id="never below 5 %"),
            pytest.param(5000, 100, 5000, id="as configured"),
        ],
    )
    def test_the_sample_shrinks_as_the_cluster_grows(self, count: int, percentage: int, expected: int) -> None:
        assert expected == sample_size(count, percentage)

    def test_pods_of_other_schedulers_are_left_alone(
        self, api: ApiServer, extender: ScriptedExtender, start: Start
    ) -> None:
        nodes(api, 10, "a")
        start()
        api.add_pod("theirs", limits={MEMORY: "1", MANAGED: "0"})
        submit(api, "ours", 1)
        wait_bound(api, "ours")
        assert ["ours"] == [call.body["Pod"]["metadata"]["name"] for call in extender.of("filter")]

    def test_a_pod_without_any_node_says_so(self, api: ApiServer, start: Start) -> None:
        start()
        submit(api, "p", 1)
        assert ("Unschedulable", "no nodes available to schedule pods") == wait_refused(api, "p")


class TestErrors:
    """What goes wrong at the extender stands in the pod's condition, and the pod is tried again."""

    @pytest.mark.parametrize(
        ("answer", "message"),
        [
            pytest.param({"NodeNames": ["a"], "Error": "the cache is cold"}, "the cache is cold", id="error"),
            pytest.param(500, "failed filter with extender at URL {url}/filter, code 500", id="status"),
            pytest.param(
                {"NodeNames": ["elsewhere"]},
                'extender "{url}" claims a filtered node "elsewhere" which is not found in the input node list',
                id="unknown node",
            ),
            pytest.param({"NodeNames": None, "Nodes": None}, "0/1 nodes are available:", id="no list at all"),
        ],
    )
    def test_an_answer_that_helps_nobody(
        self, api: ApiServer, extender: ScriptedExtender, start: Start, answer: Any, message: str
    ) -> None:
        nodes(api, 10, "a")
        extender.answers["filter"] = lambda _: answer
        start()
        submit(api, "p", 1)
        assert message.format(url=extender.url) == wait_refused(api, "p")[1]
        extender.answers["filter"] = lambda body: {"NodeNames": body["NodeNames"]}
        api.patch(NODES, "a", {"metadata": {"annotations": {"changed": "1"}}})
        assert "a" == wait_bound(api, "p")

    def test_no_json_is_an_error(self, api: ApiServer, extender: ScriptedExtender, start: Start) -> None:
        nodes(api, 10, "a")
        extender.answers["filter"] = lambda _: b"<html>"
        start()
        submit(api, "p", 1)
        assert "SchedulerError" == wait_refused(api, "p")[0]

    def test_an_extender_that_is_silent_is_given_up(
        self, api: ApiServer, extender: ScriptedExtender, start: Start
    ) -> None:
        nodes(api, 10, "a")
        release = threading.Event()
        extender.answers["filter"] = lambda body: release.wait(10) and {"NodeNames": body["NodeNames"]}
        start(timeout=0.1)
        submit(api, "p", 1)
        message = (
            f'Post "{extender.url}/filter": context deadline exceeded (Client.Timeout exceeded while awaiting headers)'
        )
        assert ("SchedulerError", message) == wait_refused(api, "p")
        release.set()
        assert "a" == wait_bound(api, "p")

    def test_an_extender_that_is_not_there_keeps_the_pod_waiting(self, api: ApiServer, start: Start) -> None:
        nodes(api, 10, "a")
        start(url="http://127.0.0.1:1")
        submit(api, "p", 1)
        reason, message = wait_refused(api, "p")
        assert "SchedulerError" == reason
        assert message.startswith('Post "http://127.0.0.1:1/filter": ')

    @pytest.mark.parametrize(
        "answer",
        [
            pytest.param(500, id="status"),
            pytest.param([{"Host": "a", "Score": 9.5}, {"Host": "b", "Score": 1}], id="a float drops the whole list"),
            pytest.param([{"Host": "nowhere", "Score": 10}], id="unknown node"),
        ],
    )
    def test_scores_that_cannot_be_used_are_ignored(
        self, api: ApiServer, extender: ScriptedExtender, start: Start, answer: Any
    ) -> None:
        nodes(api, 10, "a", "b")
        extender.answers["prioritize"] = lambda _: answer
        start()
        submit(api, "p", 1)
        assert wait_bound(api, "p") in {"a", "b"}

    def test_a_bind_that_fails_is_tried_again(self, api: ApiServer, extender: ScriptedExtender, start: Start) -> None:
        nodes(api, 10, "a")
        extender.answers["bind"] = lambda body: (
            {"Error": "the GPU is gone"} if len(extender.of("bind")) == 1 else extender.bind(body)
        )
        start()
        submit(api, "p", 6)
        assert "a" == wait_bound(api, "p")
        assert 2 == len(extender.of("bind"))
        assert 2 == len(extender.of("filter"))

    def test_a_bind_that_fails_wakes_those_it_kept_out(
        self, api: ApiServer, extender: ScriptedExtender, start: Start
    ) -> None:
        nodes(api, 10, "a")
        release = threading.Event()

        def refused(body: Json) -> Json:
            if body["PodName"] == "first":
                release.wait(10)
                return {"Error": "the GPU is gone"}
            return extender.bind(body)

        extender.answers["bind"] = refused
        start(backoff=(60.0, 60.0))  # an error is waited for, so the first does not come back
        submit(api, "first", 6)
        assert extender.wait_for("bind", 1)
        submit(api, "second", 6)
        assert "Insufficient" in wait_refused(api, "second")[1]
        release.set()
        assert "a" == wait_bound(api, "second")
        assert ("SchedulerError", "the GPU is gone") == wait_refused(api, "first")

    def test_a_bind_that_happened_although_it_was_called_failed_is_let_be(
        self, api: ApiServer, extender: ScriptedExtender, start: Start
    ) -> None:
        nodes(api, 10, "a")

        def done_but_denied(body: Json) -> Json:
            extender.bind(body)
            return {"Error": "no answer from the API server"}

        extender.answers["bind"] = done_but_denied
        start()
        submit(api, "p", 6)
        assert "a" == wait_bound(api, "p")
        submit(api, "next", 6)  # 10 - 6 = 4 < 6
        assert "Insufficient" in wait_refused(api, "next")[1]
        assert 1 == len(extender.of("bind", "p"))


class TestWaiting:
    """A refused pod waits until something changes, its own condition included."""

    def test_a_constant_message_is_patched_once_and_costs_two_calls(
        self, api: ApiServer, extender: ScriptedExtender, start: Start
    ) -> None:
        nodes(api, 10, "a")
        extender.reject("no single GPU")
        start()
        submit(api, "p", 8)
        assert extender.wait_for("filter", 2)
        submit(api, "too-much", 11)
        wait_refused(api, "too-much")  # the loop has come by again
        assert 2 == len(extender.of("filter"))
        assert 1 == len([w for w in api.writes if (w.verb, w.subresource, w.name) == ("patch", "status", "p")])

    def test_a_message_that_changes_never_comes_to_rest(
        self, api: ApiServer, extender: ScriptedExtender, start: Start
    ) -> None:
        nodes(api, 10, "a")
        extender.reject(lambda: f"{len(extender.calls)} MiB free")
        start(backoff=(1.0, 10.0))  # which an idle scheduler does not wait for
        submit(api, "p", 8)
        assert extender.wait_for("filter", 20)

    @pytest.mark.parametrize("change", ["a bound pod goes", "a node's annotation changes", "a node comes"])
    def test_a_change_of_the_cluster_wakes_it(
        self, api: ApiServer, extender: ScriptedExtender, start: Start, change: str
    ) -> None:
        nodes(api, 10, "a")
        start()
        submit(api, "there", 1)
        wait_bound(api, "there")
        extender.reject("no single GPU", "a")
        submit(api, "p", 8)
        assert extender.wait_for("filter", 2, "p")
        extender.answers["filter"] = lambda body: {"NodeNames": body["NodeNames"]}
        match change:
            case "a bound pod goes":
                api.delete_pod("there", grace=0)
            case "a node's annotation changes":
                api.patch(NODES, "a", {"metadata": {"annotations": {"cotenant.io/gpus": "{}"}}})
            case _:
                nodes(api, 10, "b")
        wait_bound(api, "p")

    def test_a_deleted_pod_is_forgotten(self, api: ApiServer, extender: ScriptedExtender, start: Start) -> None:
        nodes(api, 10, "a")
        extender.reject("no single GPU")
        start()
        submit(api, "p", 8)
        assert extender.wait_for("filter", 2)
        api.delete_pod("p")
        extender.answers["filter"] = lambda body: {"NodeNames": body["NodeNames"]}
        submit(api, "next", 8)
        wait_bound(api, "next")
        assert [] == extender.of("bind", "p")


class TestRequests:
    """What a pod asks for in sum, and the sentence that says why there is no place."""

    def test_init_containers_end_before_the_others_start_and_sidecars_stay(self) -> None:
        def container(units: int, **more: str) -> Json:
            return {"resources": {"requests": {MEMORY: str(units), "cpu": "1500m"}}, **more}

        spec = {
            "initContainers": [container(9), container(2, restartPolicy="Always"), container(8)],
            "containers": [container(3), container(4)],
        }
        # the second init container runs beside the sidecar: 2 + 8; later 2 + 3 + 4 = 9
        assert {MEMORY: 10} == requested(Pod(PodMetadata(name="p", uid="u"), spec))

    def test_reasons_are_counted_and_sorted_as_text(self) -> None:
        reasons = {f"n{i}": ["no single GPU"] for i in range(10)} | {"x": ["Insufficient a", "Insufficient b"]}
        expected = "0/12 nodes are available: 1 Insufficient a, 1 Insufficient b, 10 no single GPU."
        assert expected == no_fit(12, reasons)
