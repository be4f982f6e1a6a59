"""The verbs as kube-scheduler 1.36 calls them, over HTTP; every test ends with finding the extender unharmed."""

import http.client
import socket
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from cotenant import __version__
from cotenant.contract.reasons import Reason
from cotenant.standins.api_rules import NODES, PODS
from cotenant.standins.api_server import ApiServer
from extender.http.calls import Calls
from extender.verbs.wire import FilterResult
from tests.builders import NAMES, Json, NodeBuilder, PodBuilder, a_grant, a_node, a_pod, granted
from tests.extender.running import (
    PATIENCE,
    Answer,
    Running,
    add,
    bind_args,
    call,
    eventually,
    filter_args,
    nominee,
    submit,
)

BOTH = ("n1", "n2")


def test_what_was_put_off_is_done_behind_the_last_question_about_a_pod() -> None:
    """With one node left kube-scheduler calls no prioritize."""
    left: list[str] = []
    done: list[str] = []
    calls: Any = Calls(
        filter_=lambda _args: FilterResult(NodeNames=left),  # type: ignore[arg-type]
        prioritize=lambda _args: [],  # type: ignore[arg-type]
        preempt=None,  # type: ignore[arg-type]
        bind=None,  # type: ignore[arg-type]
        metrics=SimpleNamespace(answered=lambda *_: None),  # type: ignore[arg-type]
        catch_up=lambda: done.append(f"behind {asked}"),
    )
    body = msgspec.json.encode(filter_args(a_pod().as_json(), *BOTH))
    for asked, nodes in (("filter", ["n1", "n2"]), ("prioritize", []), ("filter", []), ("filter", ["n1"])):
        left[:] = nodes
        answer = calls("POST", f"/{asked}", body)
        if answer.then:
            answer.then()

    assert ["behind prioritize", "behind filter"] == done


class TestFilter:
    """filter lets a pod onto the nodes with one GPU that has room, and says of each other node why not."""

    def test_nodes_by_name_are_answered_by_name(self, api: ApiServer, extender: Running) -> None:
        add(api, a_node("small").with_gpus(8, "4GiB"))
        assert eventually(lambda: extender.ledger.view("small"))

        result = extender.filter(submit(api, a_pod().asking(8)), *BOTH, "small")

        assert ["n1", "n2"] == sorted(result["NodeNames"])
        # unresolvable: preemption cannot see single GPUs and would evict in vain
        assert {"small": Reason.TOO_LARGE.sentence} == result["FailedAndUnresolvableNodes"]
        assert ({}, "") == (result["FailedNodes"], result["Error"])

    def test_whole_nodes_are_answered_with_the_same_whole_nodes(self, api: ApiServer, extender: Running) -> None:
        nodes = [{"metadata": {"name": name}, "spec": {"podCIDR": "10.0.0.0/24"}, "what": 1.5} for name in ("n1", "n3")]
        args = {"Pod": submit(api, a_pod().asking(8)), "Nodes": {"metadata": {}, "items": nodes}, "NodeNames": None}

        result = extender.post("/filter", args).json

        assert [nodes[0]] == result["Nodes"]["items"]
        assert result["NodeNames"] is None
        assert {"n3": Reason.UNKNOWN_NODE.sentence} == result["FailedAndUnresolvableNodes"]

    def test_in_advise_every_node_that_fits_comes_back(self, api: ApiServer, extender: Running) -> None:
        assert ["n1", "n2"] == extender.fitting(submit(api, a_pod().asking(8)), *BOTH)

    def test_in_decide_the_best_node_comes_back_alone(self, api: ApiServer, start: Callable[..., Running]) -> None:
        extender = start(placement="decide")
        add(api, a_node("tight").with_gpus(1, "8GiB"))
        assert eventually(lambda: extender.ledger.view("tight"))
        pod = submit(api, a_pod().asking(8))

        assert ["tight"] == extender.fitting(pod, *BOTH, "tight")
        # of two alike the first by name, whatever the order they came in
        assert ["n1"] == extender.fitting(pod, "n2", "n1")

    def test_a_pod_that_asks_nothing_of_ours_may_go_anywhere(self, api: ApiServer, extender: Running) -> None:
        assert ["n1", "nowhere"] == extender.fitting(submit(api, a_pod()), "n1", "nowhere")

    def test_enough_in_all_is_not_enough_on_one(self, api: ApiServer, extender: Running) -> None:
        for name in ("a", "b"):
            assert "" == extender.bind(submit(api, a_pod().named(name).asking(6)), "n1")

        result = extender.filter(submit(api, a_pod().asking(5)), "n1")

        # 4 + 4 GiB are free on n1, but 5 on neither GPU
        assert {"n1": Reason.NO_GPU_FITS.sentence} == result["FailedAndUnresolvableNodes"]

    def test_a_pod_in_doubt_may_only_go_where_it_may_be(self, api: ApiServer, extender: Running) -> None:
        api.faults.refuse(500, path=r"/binding$", times=1000)
        pod = submit(api, a_pod().asking(8))
        extender.bind(pod, "n1")

        result = extender.filter(pod, *BOTH)

        assert ["n1"] == result["NodeNames"]
        assert {"n2": Reason.UNSETTLED.sentence} == result["FailedAndUnresolvableNodes"]
        api.faults.clear()
        assert api.wait_until(lambda: api.pod("p")["spec"].get("nodeName"), PATIENCE)  # type: ignore[index]

    def test_a_rejection_reads_the_same_each_time(self, api: ApiServer, extender: Running) -> None:
        pod = submit(api, a_pod().asking(11))
        first = extender.filter(pod, *BOTH)
        assert "" == extender.bind(submit(api, a_pod().named("other").asking(3)), "n1")

        # a text that changed would make kube-scheduler try again at once, for ever
        assert first == extender.filter(pod, *BOTH)


class TestPrioritize:
    """prioritize scores nodes by the GPU that the pod would get there; a node that it leaves out has 0."""

    def test_the_tightest_node_has_ten_and_those_that_do_not_fit_are_left_out(
        self, api: ApiServer, extender: Running
    ) -> None:
        assert "" == extender.bind(submit(api, a_pod().named("other").asking(2)), "n2")

        # n2 is left with 10 - 2 - 8 = 0, n1 with 10 - 8 = 2
        assert {"n1": 1, "n2": 10} == extender.prioritize(submit(api, a_pod().asking(8)), *BOTH, "nowhere")

    def test_of_nodes_that_all_fit_the_worst_are_left_out(self, api: ApiServer, extender: Running) -> None:
        assert "" == extender.bind(submit(api, a_pod().named("other").asking(2)), "n2")

        # 10 and 1, of which only the difference counts
        assert {"n2": 9} == extender.prioritize(submit(api, a_pod().asking(8)), *BOTH)

    def test_what_filter_weighed_is_good_for_one_answer(self, api: ApiServer, extender: Running) -> None:
        pod = submit(api, a_pod().asking(8))
        assert ["n1", "n2"] == extender.fitting(pod, *BOTH)
        assert "" == extender.bind(submit(api, a_pod().named("other").asking(2)), "n2")

        # as it was for filter, where both were left with 10 - 8 = 2; and then as it is, with 0 on n2
        assert {} == extender.prioritize(pod, *BOTH)
        assert {"n2": 9} == extender.prioritize(pod, *BOTH)

    def test_scores_are_whole_numbers_on_the_wire(self, api: ApiServer, extender: Running) -> None:
        answer = extender.post("/prioritize", filter_args(submit(api, a_pod().asking(8)), "n1", "nowhere"))

        assert b'[{"Host":"n1","Score":10}]' == answer.body

    def test_nodes_that_are_equally_good_are_an_empty_list_on_the_wire(self, api: ApiServer, extender: Running) -> None:
        answer = extender.post("/prioritize", filter_args(submit(api, a_pod().asking(8)), *BOTH))

        assert b"[]" == answer.body

    @pytest.mark.parametrize("pod", [a_pod(), a_pod().asking("0")])
    def test_a_pod_that_is_not_ours_or_wrong_scores_nothing(
        self, api: ApiServer, extender: Running, pod: PodBuilder
    ) -> None:
        assert {} == extender.prioritize(submit(api, pod), *BOTH)


class TestBind:
    """bind writes the node and the grant in one call."""

    def test_a_bound_pod_carries_its_node_its_grant_and_its_environment(
        self, api: ApiServer, extender: Running
    ) -> None:
        assert "" == extender.bind(submit(api, a_pod().asking(8)), "n1")

        pod = api.pod("p")
        assert pod is not None
        annotations = pod["metadata"]["annotations"]
        assert "n1" == pod["spec"]["nodeName"]
        assert "GPU-n1-0" == annotations["visible-devices.cotenant.io/main-0"]
        assert "0=8192M" == annotations["mps-memory.cotenant.io/main-0"]
        assert [("create", "pods", "binding", "p", 201)] == [
            (write.verb, write.resource, write.subresource, write.name, write.status) for write in api.writes
        ]

    def test_a_pod_that_is_not_ours_is_bound_as_it_is(self, api: ApiServer, extender: Running) -> None:
        assert "" == extender.bind(submit(api, a_pod()), "n1")

        pod = api.pod("p")
        assert pod is not None
        assert ("n1", {}) == (pod["spec"]["nodeName"], pod["metadata"]["annotations"])

    def test_pods_fill_a_node_and_not_one_more(self, api: ApiServer, extender: Running) -> None:
        pods = [submit(api, a_pod().named(f"p{n}").asking(5)) for n in range(5)]

        errors = [extender.bind(pod, "n1") for pod in pods]

        # 2 GPUs x 10 GiB / 5 GiB = 4
        refusal = f"pod default/p4 was not bound to node n1: {Reason.NO_GPU_FITS.sentence}"
        assert ["", "", "", "", refusal] == errors

    def test_memory_comes_free_when_its_pod_has_ended_and_not_while_it_is_ending(
        self, api: ApiServer, extender: Running
    ) -> None:
        first, second = (submit(api, a_pod().named(name).asking(10)) for name in ("a", "b"))
        third = submit(api, a_pod().named("c").asking(10))
        assert ["", ""] == [extender.bind(first, "n1"), extender.bind(second, "n1")]

        api.delete_pod("a")
        api.set_phase("b", "Running")
        # the watch tells in order: once b has ended, a's deletion was heard, too
        assert [] == extender.fitting(third, "n1")
        api.set_phase("b", "Succeeded")
        assert eventually(lambda: extender.stage(second) is None)
        assert extender.stage(first) is not None
        assert "" == extender.bind(third, "n1")
        api.delete_pod("a", grace=0)
        assert eventually(lambda: extender.stage(first) is None)


def garbled(change: Callable[[Json], Any]) -> Callable[[Json], Json]:
    """Give what makes a pod as kube-scheduler would never send it."""

    def apply(pod: Json) -> Json:
        change(pod)
        return pod

    return apply


class TestBadInput:
    """Whatever comes, the answer is a sentence in a 200, with its length, and nothing else changes."""

    def check(self, answer: Answer, *said: str) -> None:
        assert 200 == answer.status
        assert str(len(answer.body)) == answer.headers["content-length"]
        assert answer.json["Error"]
        assert [] == [part for part in said if part not in answer.json["Error"]]

    @pytest.mark.parametrize("verb", ["filter", "bind"])
    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"not json",
            b"{}",
            b"[]",
            b"null",
            b'{"Pod":',
            b"\xff\xfe",
            b"\x00" * 1000,
            b'{"Pod":{},"NodeNames":["n1"]}',
            b'{"Pod":{"metadata":{"name":"p","uid":5}},"NodeNames":["n1"]}',
            b'{"Pod":{"metadata":{"name":"p","uid":"u"}},"NodeNames":"n1"}',
            b'{"PodName":"p","PodNamespace":"default","PodUID":null,"Node":"n1"}',
            b'{"PodName":["p"],"PodNamespace":"default","PodUID":"u","Node":"n1"}',
        ],
        ids=lambda body: repr(body)[2:40],
    )
    def test_what_is_no_call_of_kube_scheduler_is_answered_with_why(
        self, extender: Running, verb: str, body: bytes
    ) -> None:
        self.check(extender.post(f"/{verb}", body), f"{verb}: the request is not what kube-scheduler sends: ")

    @pytest.mark.parametrize("opening", [b"[", b'{"a":'])
    def test_deep_nesting_is_refused_where_it_stands(self, extender: Running, opening: bytes) -> None:
        deep = b'{"Pod":{"metadata":{"name":"p","uid":"u"}},"Extra":' + opening * 200_000

        self.check(extender.post("/filter", deep), "filter: the request is not what kube-scheduler sends: ")

    def test_whole_nodes_without_names_are_refused(self, api: ApiServer, extender: Running) -> None:
        args = {"Pod": submit(api, a_pod().asking(1)), "Nodes": {"items": [{"spec": {}}]}}

        self.check(extender.post("/filter", args), "filter")

    def test_unknown_fields_are_nothing_to_complain_of(self, api: ApiServer, extender: Running) -> None:
        args = filter_args(submit(api, a_pod().asking(1)), "n1") | {"Colour": ["blue"]}
        args["Pod"]["spec"]["hologram"] = {"deep": [1, 2]}

        assert ["n1"] == extender.post("/filter", args).json["NodeNames"]

    def test_a_body_of_20_mb_is_refused_with_the_way_out(self, extender: Running) -> None:
        self.check(extender.post("/filter", b" " * (20 << 20)), "20971520 bytes", "nodeCacheCapable: true")

    def test_a_body_without_a_length_is_bounded_too(self, extender: Running) -> None:
        host, _, port = extender.address.rpartition(":")
        with socket.create_connection((host, int(port)), PATIENCE) as connection:
            connection.sendall(b"POST /filter HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
            chunk = b"100000\r\n" + b" " * (1 << 20) + b"\r\n"
            for _ in range(17):
                connection.sendall(chunk)
            reply = http.client.HTTPResponse(connection)
            reply.begin()
            answer = Answer(reply.status, {key.lower(): value for key, value in reply.getheaders()}, reply.read())
        # it does not wait for an end that may never come
        self.check(answer, "more than the 16777216 bytes allowed")

    def test_prioritize_has_no_place_for_a_reason_so_it_answers_400(self, extender: Running) -> None:
        answer = extender.post("/prioritize", b"not json")

        assert 400 == answer.status
        assert answer.body.startswith(b"prioritize: the request is not what kube-scheduler sends")

    @pytest.mark.parametrize(("method", "path", "status"), [("GET", "/filter", 405), ("POST", "/nothing", 404)])
    def test_other_paths_and_methods_are_answered_in_plain_words(
        self, extender: Running, method: str, path: str, status: int
    ) -> None:
        answer = call(extender.address, method, path)

        assert status == answer.status
        assert answer.body.startswith(f"{method} {path}: ".encode())

    @pytest.mark.parametrize("amount", ["0", "-1", "0.5", "1e999", "9" * 100, "lots", ""])
    def test_an_amount_that_cannot_be_is_refused_by_every_verb(
        self, api: ApiServer, extender: Running, amount: str
    ) -> None:
        pod = submit(api, a_pod().asking(amount))

        failed = extender.filter(pod, *BOTH)["FailedAndUnresolvableNodes"]

        assert ["n1", "n2"] == sorted(failed)
        assert f"container main-0 asks {NAMES.gpu_mem}: " in failed["n1"]
        error = extender.bind(pod, "n1")
        assert error.startswith("pod default/p was not bound to node n1: container main-0 asks")

    def test_an_amount_of_thousands_of_digits_is_refused(self, api: ApiServer, extender: Running) -> None:
        pod = submit(api, a_pod().asking(1))
        pod["spec"]["containers"][0]["resources"]["limits"][NAMES.gpu_mem] = 10**4000
        # it is not what the API server has under that version
        del pod["metadata"]["resourceVersion"]

        result = extender.filter(pod, "n1")

        assert result["Error"] or result["FailedAndUnresolvableNodes"]
        assert not result["NodeNames"]

    def test_two_families_in_one_container_are_refused(self, api: ApiServer, extender: Running) -> None:
        pod = submit(api, a_pod().with_container({NAMES.gpu_mem: "1", "nvidia.com/gpu": "1"}))

        assert "asks both cotenant.io/gpu-mem and nvidia.com/gpu" in extender.bind(pod, "n1")
        assert [] == extender.fitting(pod, *BOTH)

    def test_a_request_larger_than_any_gpu_is_refused(self, api: ApiServer, extender: Running) -> None:
        pod = submit(api, a_pod().asking(11))

        assert {"n1": Reason.TOO_LARGE.sentence} == extender.filter(pod, "n1")["FailedAndUnresolvableNodes"]
        assert f"pod default/p was not bound to node n1: {Reason.TOO_LARGE.sentence}" == extender.bind(pod, "n1")

    def test_an_unknown_policy_is_refused_by_its_key(self, api: ApiServer, extender: Running) -> None:
        pod = submit(api, a_pod().asking(1).wishing(policy="worst"))

        assert "cotenant.io/policy: 'worst' is none of balanced, best-fit, binpack," in extender.bind(pod, "n1")
        assert "'worst'" in extender.filter(pod, "n1")["FailedAndUnresolvableNodes"]["n1"]

    @pytest.mark.parametrize(
        ("reason", "node"),
        [
            (Reason.NO_INVENTORY, a_node("x").without_inventory()),
            (Reason.BAD_INVENTORY, a_node("x").annotated_as("not json")),
            (Reason.BAD_INVENTORY, a_node("x").annotated_as('{"version":2,"gpus":[]}')),
            (Reason.UNIT_MISMATCH, a_node("x").with_gpus(1).counting_in(1 << 20)),
            (Reason.PLUGIN_GONE, a_node("x").with_gpus(1).not_serving()),
            (Reason.NOT_ADVERTISED, a_node("x").with_gpus(1).advertising(None)),
        ],
    )
    def test_a_node_that_cannot_be_used_is_refused_and_the_others_are_not(
        self, api: ApiServer, extender: Running, reason: Reason, node: NodeBuilder
    ) -> None:
        add(api, node)
        assert eventually(lambda: extender.ledger.view("x"))
        pod = submit(api, a_pod().asking(1))

        result = extender.filter(pod, "n1", "x", "nowhere")

        assert ["n1"] == result["NodeNames"]
        assert {
            "x": reason.sentence,
            "nowhere": Reason.UNKNOWN_NODE.sentence,
        } == result["FailedAndUnresolvableNodes"]
        assert f"pod default/p was not bound to node x: {reason.sentence}" == extender.bind(pod, "x")
        assert Reason.UNKNOWN_NODE.sentence in extender.bind(pod, "nowhere")

    @pytest.mark.parametrize("text", ["not json", '{"version":2}', ""])
    def test_a_grant_that_cannot_be_read_is_told_of_and_reckoned_with(
        self, api: ApiServer, extender: Running, text: str
    ) -> None:
        api.create(PODS, a_pod().named("odd").asking(6).bound_to("n1", text).as_json(), "default")
        assert eventually(lambda: any(hold.problem for hold in extender.ledger.holds()))

        # 10 - 6 = 4 on either GPU, for nobody knows which
        assert ["n1", "n2"] == extender.fitting(submit(api, a_pod().named("four").asking(4)), *BOTH)
        assert ["n2"] == extender.fitting(submit(api, a_pod().named("five").asking(5)), *BOTH)
        assert api.wait_until(lambda: [e for e in api.events() if e["reason"] == "BadGrant"], PATIENCE)
        assert "odd" == api.events()[0]["regarding"]["name"]
        assert 1.0 == extender.metric("cotenant_grants_unreadable")

    def test_a_pod_bound_around_the_extender_is_told_of(self, api: ApiServer, extender: Running) -> None:
        api.create(PODS, a_pod().named("sly").asking(6).bound_to("n1").as_json(), "default")

        assert api.wait_until(lambda: [e for e in api.events() if e["reason"] == "NoGrant"], PATIENCE)
        assert 1.0 == extender.metric("cotenant_pods_ungranted")

    def test_a_pod_that_does_not_exist_is_not_bound(self, extender: Running) -> None:
        pod = a_pod().named("ghost").asking(1).as_json()

        assert f"pod default/ghost was not bound to node n1: {Reason.POD_GONE.sentence}" == extender.bind(pod, "n1")

    @pytest.mark.parametrize("name", ["../../nodes/n1", "p/status", "", "P", "a" * 300, "p%2Fbinding", "p\n"])
    def test_a_name_cannot_reach_another_path_of_the_api(self, api: ApiServer, extender: Running, name: str) -> None:
        args = bind_args(submit(api, a_pod().asking(1)), "n1")

        for odd in (args | {"PodName": name}, args | {"PodNamespace": name}, args | {"Node": name}):
            assert extender.post("/bind", odd).json["Error"]
        assert [] == api.writes
        assert [] == extender.ledger.holds()

    def test_a_uid_of_another_pod_of_the_name_is_not_bound(self, api: ApiServer, extender: Running) -> None:
        submit(api, a_pod().asking(1))
        args = bind_args(a_pod().with_uid("an-older-one").as_json(), "n1")

        assert Reason.POD_GONE.sentence in extender.post("/bind", args).json["Error"]
        assert [] == api.writes


class TestEverythingElse:
    """Health, version and metrics, for machines and people."""

    def test_it_is_not_ready_before_it_has_read_the_cluster(
        self, api: ApiServer, start: Callable[..., Running]
    ) -> None:
        pod = submit(api, a_pod().asking(1))
        hold = api.faults.hold(method="GET", path=r"/api/v1/pods\?")
        extender = start(wait=False)
        assert hold.reached.wait(PATIENCE)

        assert (200, 503) == (extender.get("/healthz").status, extender.get("/readyz").status)
        assert Reason.CACHE_NOT_SYNCED.sentence == extender.filter(pod, "n1")["Error"]
        assert Reason.CACHE_NOT_SYNCED.sentence in extender.bind(pod, "n1")
        assert {"n1": 0} == extender.prioritize(pod, "n1") or extender.ledger.view("n1")
        hold.release()
        assert eventually(lambda: extender.get("/readyz").status == 200)
        assert ["n1"] == extender.fitting(pod, "n1")

    def test_the_sentence_it_prints_says_where_and_how_much(self, start: Callable[..., Running]) -> None:
        extender = start()

        assert (
            f"cotenant-extender ready: verbs on {extender.address}, everything else on {extender.other_address}; "
            "2 nodes, 0 pods"
        ) == extender.sentence

    def test_one_address_for_both_answers_everything(self, api: ApiServer, start: Callable[..., Running]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        extender = start(listen=address, serve=address)
        pod = submit(api, a_pod().asking(8))

        assert f"cotenant-extender ready: everything on {address}; 2 nodes, 0 pods" == extender.sentence
        assert BOTH == tuple(extender.fitting(pod, *BOTH))
        assert "" == extender.bind(pod, "n1")
        assert 400 == extender.post("/prioritize", b"not json").status
        assert 405 == extender.get("/filter").status
        assert 200 == extender.get("/readyz").status
        assert "20971520 bytes" in extender.post("/filter", b" " * (20 << 20)).json["Error"]

    @pytest.mark.parametrize(
        ("path", "size", "status", "words"),
        [
            ("/healthz", 1, 413, "/healthz: a request for this path has no body, or there is no such path"),
            ("/metrics", 20 << 20, 413, "/metrics: a request for this path has no body, or there is no such path"),
            ("/admission/validate", (6 << 20) + 1, 413, "the request has 6291457 bytes, more than the 6291456 bytes"),
            ("/admission/validate", 6 << 20, 200, "the body is no AdmissionReview"),
            ("/v1/simulate", (3 << 20) + 1, 413, "the request has 3145729 bytes, more than the 3145728 bytes"),
            ("/v1/simulate", 3 << 20, 400, "what was posted is no Pod"),
        ],
    )
    def test_what_is_not_a_verb_takes_a_review_or_a_pod_and_no_other_body(
        self, extender: Running, path: str, size: int, status: int, words: str
    ) -> None:
        answer = call(extender.other_address, "POST", path, b" " * size)

        assert (status, True) == (answer.status, words in answer.body.decode())

    def test_version(self, extender: Running) -> None:
        assert {"name": "cotenant-extender", "version": __version__} == extender.get("/version").json

    def test_metrics_show_gpus_and_count_verbs(self, api: ApiServer, start: Callable[..., Running]) -> None:
        extender = start()
        pod = submit(api, a_pod().asking(8))
        extender.filter(pod, *BOTH)
        extender.filter(submit(api, a_pod().named("large").asking(11)), *BOTH)
        extender.filter(submit(api, a_pod().named("wrong").asking("lots")), *BOTH)
        extender.bind(pod, "n1")

        gpu = 'node="n1",gpu="0",uuid="GPU-n1-0"'
        model = 'model="NVIDIA H100 80GB HBM3",mode="time-slicing"'
        assert 10 * 2.0**30 == extender.metric(f"cotenant_gpu_memory_capacity_bytes{{{gpu},{model}}}")
        assert 8 * 2.0**30 == extender.metric(f"cotenant_gpu_memory_allocated_bytes{{{gpu}}}")
        assert 8 * 2.0**30 == extender.metric(f"cotenant_cluster_memory_allocated_bytes{{{model}}}")
        assert 2.0 == extender.metric('cotenant_filter_rejections_total{reason="TooLarge"}')
        assert 2.0 == extender.metric('cotenant_filter_rejections_total{reason="BadRequest"}')
        assert 1.0 == extender.metric('cotenant_bind_total{outcome="ok"}')
        assert 1.0 == extender.metric("cotenant_cache_synced")
        counted = 'cotenant_extender_request_duration_seconds_count{outcome="%s",verb="filter"}'
        assert (1.0, 2.0) == (extender.metric(counted % "ok"), extender.metric(counted % "rejected"))

    def test_a_node_that_changes_is_judged_anew(self, api: ApiServer, extender: Running) -> None:
        pod = submit(api, a_pod().asking(11))
        assert [] == extender.fitting(pod, "n1")

        larger = a_node("n1").with_gpus(2, "12GiB").node_annotations
        api.patch(NODES, "n1", {"metadata": {"annotations": larger}})

        assert eventually(lambda: extender.fitting(pod, "n1") == ["n1"])


class TestNomination:
    """Where no node of a sample fits but another does, kube-scheduler is pointed at it."""

    @pytest.fixture
    def crowd(self, api: ApiServer) -> list[str]:
        """100 names that kube-scheduler sampled, all too small; n1 and n2 are not among them."""
        names = [f"small-{n}" for n in range(100)]
        add(api, *(a_node(name).with_gpus(1, "2GiB") for name in names))
        return names

    def test_a_pod_that_fits_outside_of_the_sample_is_nominated_there(
        self, api: ApiServer, crowd: list[str], start: Callable[..., Running]
    ) -> None:
        extender = start()

        assert [] == extender.fitting(submit(api, a_pod().asking(8)), *crowd)

        assert api.wait_until(lambda: nominee(api, "p") == "n1", PATIENCE)
        assert eventually(lambda: extender.metric('cotenant_nominations_total{why="outside_sample"}') == 1.0)

    def test_a_node_has_one_nominee_at_a_time(
        self, api: ApiServer, crowd: list[str], start: Callable[..., Running]
    ) -> None:
        # kube-scheduler counts nominees as if they were there, so many of one node keep each other out
        extender = start()
        pods = [submit(api, a_pod().named(f"p{n}").asking(4)) for n in range(3)]
        for pod in pods:
            assert [] == extender.fitting(pod, *crowd)

        assert api.wait_until(lambda: nominee(api, "p1"), PATIENCE)
        assert {"n1", "n2"} == {nominee(api, "p0"), nominee(api, "p1")}

        first = nominee(api, "p0")
        assert first is not None
        assert "" == extender.bind(pods[0], first)
        assert api.wait_until(lambda: nominee(api, "p2") is not None, PATIENCE)

    def test_a_pod_refused_for_old_news_is_nominated_once_the_news_is_here(
        self, api: ApiServer, start: Callable[..., Running]
    ) -> None:
        # kube-scheduler hears that a pod has ended, and asks again, before the extender hears it
        extender = start()
        ends = submit(api, a_pod().named("ends").asking(8))
        assert "" == extender.bind(ends, "n1")
        waits = submit(api, a_pod().named("waits").asking(20).wishing(gpu_count=2))  # 10 on each of two of 10
        assert [] == extender.fitting(waits, "n1")
        assert nominee(api, "waits") is None

        api.set_phase("ends", "Succeeded")

        assert api.wait_until(lambda: nominee(api, "waits") == "n1", PATIENCE)
        assert eventually(lambda: extender.metric('cotenant_nominations_total{why="freed"}') == 1.0)

    def test_preemptions_own_nomination_is_left_alone(
        self, api: ApiServer, crowd: list[str], start: Callable[..., Running]
    ) -> None:
        extender = start()
        theirs = submit(api, a_pod().named("theirs").asking(8))
        api.set_phase("theirs", "Pending", nominatedNodeName="small-3")
        theirs["status"]["nominatedNodeName"] = "small-3"

        extender.filter(theirs, *crowd)
        extender.filter(submit(api, a_pod().named("ours").asking(8)), *crowd)

        # one after the other: when ours is nominated, theirs was looked at
        assert api.wait_until(lambda: nominee(api, "ours") == "n1", PATIENCE)
        assert "small-3" == nominee(api, "theirs")

    def test_a_whole_small_cluster_is_no_sample(
        self, api: ApiServer, crowd: list[str], start: Callable[..., Running]
    ) -> None:
        extender = start()

        extender.filter(submit(api, a_pod().named("few").asking(8)), *crowd[:99])
        extender.filter(submit(api, a_pod().named("many").asking(8)), *crowd)

        assert api.wait_until(lambda: nominee(api, "many") == "n1", PATIENCE)
        assert nominee(api, "few") is None

    def test_a_pod_that_fits_nowhere_is_nominated_nowhere(
        self, api: ApiServer, crowd: list[str], start: Callable[..., Running]
    ) -> None:
        extender = start()

        extender.filter(submit(api, a_pod().named("huge").asking(80)), *crowd)
        extender.filter(submit(api, a_pod().named("fine").asking(8)), *crowd)

        assert api.wait_until(lambda: nominee(api, "fine") == "n1", PATIENCE)
        assert nominee(api, "huge") is None


def test_two_extenders_agree_from_the_api_alone(api: ApiServer, start: Callable[..., Running]) -> None:
    one = start()
    api.create(
        PODS,
        a_pod().named("old").asking(4).bound_to("n1", a_grant(granted({"GPU-n1-1": 4 << 30}))).as_json(),
        "default",
    )
    assert "" == one.bind(submit(api, a_pod().named("new").asking(3)), "n1")

    two = start()

    assert eventually(lambda: one.ledger.view("n1") == two.ledger.view("n1"))
