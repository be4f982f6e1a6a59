"""Limits of namespaces: what their pods may never ask is refused at once, and what others hold now makes them wait."""

import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from cotenant.contract.configuration import ConfigurationError, ExtenderConfiguration, NamespaceLimits, convert
from cotenant.contract.reasons import Reason
from cotenant.contract.request import RequestError
from cotenant.contract.units import GIB, MIB
from cotenant.standins.api_server import ApiServer
from extender.admission import Settings, mutate, validating_review
from extender.admission.review import KIND
from extender.ledger import Hold, Ledger, NodeView, Stage, Use
from extender.placement.fit import Placement, choosing, grant, place
from extender.placement.tenants import Tenants
from extender.verbs.judge import Judge
from extender.verbs.wire import Candidates
from tests.admission import json_patch
from tests.admission.settings import SETTINGS
from tests.builders import NAMES, NodeBuilder, PodBuilder, a_grant, a_node, a_pod, granted, request_of
from tests.extender.running import PATIENCE, Running, add, call, eventually, nominee, submit

# nvidia-smi mig -lgip of an A100 with 40 GB: 3g.20gb has 19.50 GiB
THREE_G = 19_968 * MIB


def tenants(**limits: dict[str, Any]) -> Tenants:
    found = msgspec.convert({name.replace("_", "-"): one for name, one in limits.items()}, dict[str, NamespaceLimits])
    return Tenants(found, NAMES)


def view(node: NodeBuilder, *pods: PodBuilder) -> NodeView:
    ledger = Ledger(NAMES, GIB)
    ledger.observe_node(node.build())
    ledger.observe_pods(pod.build() for pod in pods)
    found = ledger.view(node.name)
    assert found is not None
    return found


class CountedViews(Ledger):
    """Count how often a node is looked at."""

    looks = 0

    def view(self, node: str) -> NodeView | None:
        self.looks += 1
        return super().view(node)


class TestManyNodes:
    """Of GPUs for pods alone a node tells what is charged, but most namespaces are far from their limits."""

    @pytest.mark.parametrize(("looked", "refused", "limit"), [(0, [], "80GiB"), (3, [2], "79GiB")])
    def test_nodes_are_looked_at_where_the_largest_gpu_would_be_too_much(
        self, looked: int, refused: list[int], limit: str
    ) -> None:
        ledger = CountedViews(NAMES, GIB)
        for name, size in (("a", "40GiB"), ("b", "40GiB"), ("c", "80GiB")):
            ledger.observe_node(a_node(name).with_gpus(2, size).build())
        judge = Judge(ledger, NAMES, GIB, "binpack", tenants=tenants(team={"gpuMemory": limit}))
        candidates = Candidates(["a", "b", "c"])
        request = request_of(a_pod().asking(8).wishing(isolation="exclusive"))
        verdicts = judge.weigh(request, candidates)

        before = ledger.looks
        assert refused == [*judge.within_limits("team", request, verdicts, candidates).refused]
        assert looked == ledger.looks - before


class TestWhatCounts:
    """A pod counts by what its grant holds, however it is shared out; what it asks is counted the same before."""

    @pytest.mark.parametrize(
        ("pod", "gpus", "gib"),
        [
            (a_pod().asking(8), 1, 8),
            # 3 + 4 GiB, on one GPU or on two
            (a_pod().asking(3).asking(4), 2, 7),
            (a_pod().asking(8).wishing(gpu_count=4), 4, 8),
            # on one GPU, of which it holds the larger of 6 and 2 + 3
            (a_pod().with_init(6).asking(2).asking(3), 1, 6),
            (a_pod().with_sidecar(2).asking(3), 2, 5),
        ],
    )
    def test_what_a_pod_asks_is_what_it_is_charged(self, pod: PodBuilder, gpus: int, gib: int) -> None:
        limits = tenants(team={"gpus": gpus, "gpuMemory": f"{gib}GiB"})
        assert limits.excess("team", request_of(pod), Use()) is None
        ledger = Ledger(NAMES, GIB)
        ledger.observe_node(a_node("n").with_gpus(8).build())
        placed = place(view(a_node("n").with_gpus(8)), request_of(pod))
        assert isinstance(placed, Placement)
        bound = pod.in_namespace("team").bound_to("n", grant(request_of(pod), placed))
        ledger.observe_pod(bound.build())
        assert Use(bytes=gib * GIB, gpus=gpus, pods=1) == ledger.use_of("team")
        ledger.pod_gone(bound.build().uid)
        assert {} == ledger.uses()

    def test_a_gpu_for_the_pod_alone_counts_whole_as_large_as_it_is_on_the_node(self) -> None:
        alone = request_of(a_pod().asking(8).wishing(isolation="exclusive"))
        limits = tenants(team={"gpuMemory": "80GiB"})
        assert limits.excess("team", alone, Use(), view(a_node("n").with_gpus(2, "80GiB"))) is None
        excess = limits.excess("team", alone, Use(), view(a_node("n").with_gpus(2, "141GiB")))
        assert excess is not None
        assert 141 * GIB == excess.asked

    def test_a_gpu_for_the_pod_alone_is_one_that_is_empty_where_there_is_one(self) -> None:
        alone = request_of(a_pod().asking(8).wishing(isolation="exclusive"))
        limits = tenants(team={"gpuMemory": "40GiB"})
        node = a_node("n").with_gpu("24GiB").with_gpu("80GiB")
        assert limits.excess("team", alone, Use(), view(node)) is None
        # bind would be given the other one, and refuse it, again and again
        in_use = view(node, a_pod().asking(1).bound_to("n", a_grant(granted({"GPU-n-0": GIB}))))
        excess = limits.excess("team", alone, Use(), in_use)
        assert excess is not None
        assert 80 * GIB == excess.asked

    def test_a_mig_instance_counts_by_what_it_has_on_the_node(self) -> None:
        small = request_of(a_pod().with_container({"nvidia.com/mig-3g.20gb": "1"}))
        limits = tenants(team={"gpuMemory": "10GiB", "gpus": 1})
        # 3g.20gb of an A100 40GB has 19.6 GiB
        excess = limits.excess("team", small, Use(), view(a_node("n").with_mig()))
        assert excess is not None
        assert "namespace team may hold 10 GiB of GPU memory" in excess.sentence

    @pytest.mark.parametrize("isolation", ["none", "strict"])
    def test_a_mig_instance_counts_as_what_the_pod_would_get_where_it_may_be_a_share_or_whole(
        self, isolation: str
    ) -> None:
        # a quarter of one on one GPU, whole on the other: by the least of both bind would refuse it, again and again
        node = a_node("n").with_mig(static=["3g.20gb@0", "3g.20gb@4"]).with_shares("3g.20gb", 4)
        node = node.with_mig(static=["3g.20gb@0"])
        asking = request_of(a_pod().asking(1, of=NAMES.mig("3g.20gb")).wishing(isolation=isolation))
        placed = place(view(node), asking)
        assert isinstance(placed, Placement)

        excess = tenants(team={"gpuMemory": "1GiB"}).excess("team", asking, Use(), view(node))
        assert excess is not None
        assert sum(grant(asking, placed).charges().values()) == excess.asked

    @pytest.mark.parametrize(
        ("expected", "profile", "node"),
        [
            (THREE_G, "3g.20gb", a_node("n").with_mig()),
            (THREE_G // 4, "3g.20gb", a_node("n").with_mig().with_mig(static=["3g.20gb@0"]).with_shares("3g.20gb", 4)),
            (
                THREE_G // 4,
                "3g.20gb.shared",
                a_node("n").with_mig(static=["3g.20gb@0"]).with_shares("3g.20gb", 4, renamed=True),
            ),
            (0, "3g.20gb", a_node("n").with_mig(static=["1g.5gb@0"])),
            (0, "3g.20gb", a_node("n").with_gpus(1)),
        ],
    )
    def test_a_mig_instance_that_has_no_room_counts_as_the_least_that_it_would_be_charged(
        self, expected: int, profile: str, node: NodeBuilder
    ) -> None:
        # preemption asks before its victims have gone
        asking = request_of(a_pod().asking(1, of=f"{NAMES.mig_prefix}{profile}"))
        excess = tenants(team={"gpuMemory": 0}).excess("team", asking, Use(), view(node.unhealthy(0, 1)))
        assert expected == (excess.asked if excess is not None else 0)

    @pytest.mark.parametrize(
        ("sentence", "limits"),
        [
            ("namespace team may hold 3 GPUs, its pods hold 2 GPUs, and the pod asks 2 GPUs", {"gpus": 3}),
            (
                (
                    "namespace team may hold 9 GiB of GPU memory, its pods hold 6 GiB of GPU memory, and the pod asks "
                    "4 GiB of GPU memory"
                ),
                {"gpuMemory": "9GiB"},
            ),
            ("", {"gpus": 4, "gpuMemory": "10GiB"}),
        ],
    )
    def test_bind_refuses_what_is_more_than_the_limits_leave(self, sentence: str, limits: dict[str, Any]) -> None:
        ledger = Ledger(NAMES, GIB)
        given = a_grant(granted({"GPU-n-0": 2 * GIB, "GPU-n-1": 2 * GIB}))
        ledger.observe_pod(a_pod().in_namespace("team").asking(4).bound_to("n", given).build())
        (hold,) = ledger.holds()
        excess = tenants(team=limits).exceeded_by(hold, Use(bytes=6 * GIB, gpus=2, pods=2))
        assert sentence == (excess.sentence if excess is not None else "")

    @pytest.mark.parametrize("isolation", ["none", "limited", "strict"])
    def test_two_mig_instances_are_two_gpus_before_they_are_granted_and_after(self, isolation: str) -> None:
        pod = a_pod().asking(1, of=NAMES.mig("1g.5gb")).asking(1, of=NAMES.mig("1g.5gb")).wishing(isolation=isolation)
        placed = place(view(a_node("n").with_mig()), request_of(pod))
        assert isinstance(placed, Placement)
        assert 2 == grant(request_of(pod), placed).gpus
        # else filter lets through what bind refuses, again and again
        with pytest.raises(RequestError):
            tenants(team={"gpus": 1}).hold("team", request_of(pod))

    def test_a_pod_with_a_grant_that_cannot_be_read_counts_as_the_most_that_it_can_hold(self) -> None:
        ledger = Ledger(NAMES, GIB)
        ledger.observe_pod(a_pod().in_namespace("team").asking(3).asking(4).bound_to("n", "no grant").build())
        assert Use(bytes=7 * GIB, gpus=2, pods=1) == ledger.use_of("team")


class TestWhatIsNeverAllowed:
    """What no end of another pod would help is said at once, with namespace, limit and what was asked."""

    @pytest.mark.parametrize(
        ("limits", "pod", "sentence"),
        [
            (
                {"isolations": ["none", "limited"]},
                a_pod().asking(8).wishing(isolation="exclusive"),
                "namespace team may ask cotenant.io/isolation: none or limited, and the pod asks exclusive",
            ),
            (
                {"isolations": ["limited"]},
                a_pod().asking(8),
                "namespace team may ask cotenant.io/isolation: limited, and the pod asks none",
            ),
            ({"gpuMemory": "16GiB"}, a_pod().asking(17), "16 GiB of GPU memory, of which its pods leave less than"),
            ({"gpus": 1}, a_pod().asking(8).wishing(gpu_count=2), "namespace team may hold 1 GPU, of which"),
            ({"gpus": 0}, a_pod().asking(1), "namespace team may hold 0 GPUs"),
        ],
    )
    def test_it_is_refused_with_a_sentence(self, limits: dict[str, Any], pod: PodBuilder, sentence: str) -> None:
        with pytest.raises(RequestError) as refused:
            tenants(team=limits).hold("team", request_of(pod))
        assert Reason.NAMESPACE_LIMIT is refused.value.reason
        assert sentence in str(refused.value)

    def test_a_mig_instance_is_strict_without_a_word(self) -> None:
        instance = request_of(a_pod().with_container({"nvidia.com/mig-3g.20gb": "1"}))
        assert "strict" == tenants(team={"isolations": ["strict"]}).hold("team", instance).wishes.isolation

    def test_who_has_to_be_strict_gets_no_share_of_a_mig_instance(self) -> None:
        asking = request_of(a_pod().asking(1, of=NAMES.mig("3g.20gb")))
        shared = view(a_node("n").with_mig(static=["3g.20gb@0"]).with_shares("3g.20gb", 4))
        strict, free = ({"isolations": found} for found in (["strict"], ["none", "strict"]))
        assert Reason.ISOLATION_UNAVAILABLE is place(shared, tenants(team=strict).hold("team", asking))
        assert isinstance(place(shared, tenants(team=free).hold("team", asking)), Placement)

    def test_the_star_is_for_namespaces_that_are_not_named(self) -> None:
        limits = Tenants(msgspec.convert({"*": {"gpus": 0}, "team": {}}, dict[str, NamespaceLimits]), NAMES)
        assert request_of(a_pod().asking(8)) == limits.hold("team", request_of(a_pod().asking(8)))
        with pytest.raises(RequestError, match="namespace other may hold 0 GPUs"):
            limits.hold("other", request_of(a_pod().asking(8)))

    def test_the_webhook_says_it_when_the_pod_is_created(self) -> None:
        settings: Settings = msgspec.structs.replace(SETTINGS, tenants=tenants(team={"gpuMemory": "16GiB"}))

        def sentence(namespace: str) -> str:
            sent = a_pod().asking(17).as_json()
            sent["metadata"].pop("uid")
            stored = json_patch.apply(sent, mutate(sent, settings))
            review = {
                "apiVersion": "admission.k8s.io/v1",
                "kind": KIND,
                "request": {
                    "uid": "u",
                    "operation": "CREATE",
                    "namespace": namespace,
                    "resource": {"resource": "pods"},
                    "object": stored,
                },
            }
            answer = msgspec.json.decode(validating_review(msgspec.json.encode(review), settings))["response"]
            return str(answer.get("status", {}).get("message", ""))

        assert "namespace team may hold 16 GiB of GPU memory" in sentence("team")
        assert "" == sentence("other")


class TestTheWayOfAPod:
    """filter, bind, explain, /v1 and metrics agree on what a namespace may have."""

    @pytest.fixture
    def limited(self, start: Callable[..., Running]) -> Running:
        return start(namespaces={"team": {"gpuMemory": "10GiB"}, "small": {"gpus": 1, "models": ["L4"]}})

    def test_what_the_namespace_holds_is_what_is_left_of_its_limit(self, api: ApiServer, limited: Running) -> None:
        first = submit(api, a_pod().named("a").in_namespace("team").asking(6))
        second = submit(api, a_pod().named("b").in_namespace("team").asking(5))
        other = submit(api, a_pod().named("c").asking(5))
        assert ["n1", "n2"] == limited.fitting(second, "n1", "n2")
        assert "" == limited.bind(first, "n1")

        result = limited.filter(second, "n1", "n2")

        # 6 of 10 GiB are held, and 5 do not fit into the 4 left; the text does not change with what is held
        constant = (
            "namespace team may hold 10 GiB of GPU memory, of which its pods leave less than the 5 GiB of GPU memory "
            "that the pod asks"
        )
        assert {"n1": constant, "n2": constant} == result["FailedAndUnresolvableNodes"]
        told = "namespace team may hold 10 GiB of GPU memory, its pods hold 6 GiB of GPU memory, and the pod asks 5 GiB"
        assert told in limited.bind(second, "n2")
        assert told in limited.get("/v1/explain/team/b?as=table").body.decode()
        assert ["n1", "n2"] == limited.fitting(other, "n1", "n2")
        assert 6.0 * GIB == limited.metric('cotenant_namespace_gpu_memory_bytes{namespace="team"}')
        assert 10.0 * GIB == limited.metric('cotenant_namespace_gpu_memory_limit_bytes{namespace="team"}')
        assert 1.0 == limited.metric('cotenant_namespace_gpus_limit{namespace="small"}')
        assert 2.0 == limited.metric('cotenant_filter_rejections_total{reason="NamespaceLimit"}')
        rows = {one["namespace"]: one for one in limited.get("/v1/namespaces").json["items"]}
        assert (6 * GIB, 10 * GIB, 1, None) == tuple(
            rows["team"][key] for key in ("heldBytes", "limitBytes", "gpus", "gpuLimit")
        )
        assert "team        1      6Gi/10Gi   1" in limited.get("/v1/namespaces?as=table").body.decode()

        api.delete_pod("a", namespace="team", grace=0)
        assert eventually(lambda: [] == limited.ledger.holds())
        assert "" == limited.bind(second, "n2")

    def test_a_pod_refused_for_old_news_of_its_namespace_is_nominated_wherever_there_is_room(
        self, api: ApiServer, limited: Running
    ) -> None:
        # of 2 GPUs of 10 GiB on n1, "a" leaves 4 on one when it is there and 10 when it is gone, of which "c" takes 4
        for pod in (a_pod().named("a").in_namespace("team").asking(6), *(a_pod().named(n).asking(4) for n in "cd")):
            assert "" == limited.bind(submit(api, pod), "n1")
        assert "" == limited.bind(submit(api, a_pod().named("e").asking(6)), "n1")
        waits = submit(api, a_pod().named("waits").in_namespace("team").asking(10))
        api.freeze_watches()
        api.delete_pod("a", namespace="team", grace=0)

        # kube-scheduler has heard of that end, and asks again
        assert [] == limited.fitting(waits, "n1", "n2")
        time.sleep(0.2)  # for the first look, of what has not changed
        api.freeze_watches(frozen=False)

        assert api.wait_until(lambda: nominee(api, "waits", "team") == "n2", PATIENCE)

    def test_a_pod_is_not_nominated_where_it_would_be_charged_more_than_its_limit_leaves(
        self, api: ApiServer, limited: Running
    ) -> None:
        # a GPU for itself is 20 GiB there, and its namespace may have 10
        crowd = [f"small-{n}" for n in range(100)]
        add(api, *(a_node(name).with_gpus(1, "2GiB") for name in crowd))
        add(api, a_node("n3").with_gpus(1, "20GiB"))
        assert eventually(lambda: limited.ledger.view("n3"))
        # no GPU of 10 GiB has two of these, and none is empty then
        for n in range(4):
            assert "" == limited.bind(submit(api, a_pod().named(f"p{n}").asking(6)), f"n{1 + n % 2}")
        alone = a_pod().named("alone").asking(8).wishing(isolation="exclusive")
        team = submit(api, alone.in_namespace("team"))

        assert [] == limited.fitting(team, *crowd)
        assert [] == limited.fitting(submit(api, alone), *crowd)

        # one after the other: when the second is nominated, the first was looked at
        assert api.wait_until(lambda: nominee(api, "alone") == "n3", PATIENCE)
        assert nominee(api, "alone", "team") is None

    def test_many_binds_at_once_do_not_pass_it(self, api: ApiServer, limited: Running) -> None:
        pods = [submit(api, a_pod().named(f"p{n}").in_namespace("team").asking(1)) for n in range(24)]
        # filter has said yes to all of them before any is bound
        assert all(["n1", "n2"] == limited.fitting(pod, "n1", "n2") for pod in pods)
        errors: list[str] = []
        threads = [
            threading.Thread(target=lambda p=pod, n=n: errors.append(limited.bind(p, f"n{1 + n % 2}")))
            for n, pod in enumerate(pods)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)

        # 10 of 1 GiB, though the GPUs have room for 40
        assert 10 == errors.count("")
        assert 10 * GIB == limited.ledger.use_of("team").bytes

    def test_gpus_of_models_that_it_may_not_have_are_left_out(self, api: ApiServer, limited: Running) -> None:
        add(api, a_node("l4").with_gpus(1, "22GiB", model="NVIDIA L4"))
        assert eventually(lambda: limited.ledger.view("l4"))
        pod = submit(api, a_pod().in_namespace("small").asking(2))

        result = limited.filter(pod, "n1", "l4")

        assert ["l4"] == result["NodeNames"]
        assert {"n1": Reason.NAMESPACE_LIMIT.sentence} == result["FailedAndUnresolvableNodes"]
        assert Reason.NAMESPACE_LIMIT.sentence in limited.bind(pod, "n1")
        assert "" == limited.bind(pod, "l4")

    def test_explain_gives_each_node_the_reason_that_filter_does(self, api: ApiServer, limited: Running) -> None:
        # the whole GPU would be more than the limit, if it was well
        add(api, a_node("n3").with_gpus(1, "20GiB").unhealthy(0))
        assert eventually(lambda: limited.ledger.view("n3"))
        pod = submit(api, a_pod().named("alone").in_namespace("team").asking(8).wishing(isolation="exclusive"))
        assert eventually(lambda: limited.ledger.waiting(pod["metadata"]["uid"]))

        assert {"n3": Reason.UNHEALTHY_GPU.sentence} == limited.filter(pod, "n3")["FailedAndUnresolvableNodes"]
        told = {one["node"]: one["reason"] for one in limited.get("/v1/explain/team/alone").json["nodes"]}
        assert {"n1": None, "n2": None, "n3": Reason.UNHEALTHY_GPU} == told

    def test_a_simulated_pod_goes_where_its_namespace_lets_it(self, api: ApiServer, limited: Running) -> None:
        add(api, a_node("a").with_gpus(1, "20GiB"))
        assert eventually(lambda: limited.ledger.view("a"))
        pod = a_pod().in_namespace("team").asking(8).wishing(isolation="exclusive")

        told = call(limited.other_address, "POST", "/v1/simulate", pod.as_json()).json

        # a GPU for itself is 20 GiB on the node a, and 10 on the others
        assert 2 == told["fitting"]
        assert told["summary"].startswith("it fits on 2 of 3 nodes that are well, and would go to n")

    def test_pods_that_a_limit_keeps_waiting_are_listed_with_that_as_their_reason(
        self, api: ApiServer, limited: Running
    ) -> None:
        assert "" == limited.bind(submit(api, a_pod().named("a").in_namespace("team").asking(6)), "n1")
        for pod in (
            a_pod().named("b").in_namespace("team").asking(5),
            a_pod().named("c").in_namespace("small").asking(5),
            a_pod().named("d").asking(5),
        ):
            waits = submit(api, pod)
            assert eventually(lambda uid=waits["metadata"]["uid"]: limited.ledger.waiting(uid))  # type: ignore[misc]

        rows = limited.get("/v1/pods?state=waiting").json["items"]

        # team has 4 GiB left, and small may have no H100
        reasons = {row["name"]: row["reason"] for row in rows}
        assert {"b": Reason.NAMESPACE_LIMIT, "c": Reason.NAMESPACE_LIMIT, "d": None} == reasons

    def test_a_gpu_for_itself_is_charged_as_the_one_that_bind_takes_and_not_the_smallest(
        self, api: ApiServer, limited: Running
    ) -> None:
        # GPUs under MPS come last, whatever their size
        add(api, a_node("m").with_gpu("10GiB").under_mps().with_gpu("20GiB"))
        assert eventually(lambda: limited.ledger.view("m"))
        pod = submit(api, a_pod().in_namespace("team").asking(8).wishing(isolation="exclusive"))

        assert Reason.NAMESPACE_LIMIT.sentence == limited.filter(pod, "m")["FailedAndUnresolvableNodes"]["m"]
        assert "the pod asks 20 GiB of GPU memory" in limited.bind(pod, "m")

    def test_no_pod_is_evicted_from_a_gpu_that_would_be_charged_more_than_the_limit_leaves(
        self, api: ApiServer, start: Callable[..., Running]
    ) -> None:
        limited = start(namespaces={"team": {"gpuMemory": "10GiB"}}, preemptFragmented={"after": 0.01})
        add(api, a_node("m").with_gpu("10GiB").with_gpu("20GiB"), a_node("other").with_gpus(2, "10GiB"))
        assert eventually(lambda: limited.ledger.view("other"))
        high = submit(api, a_pod().named("high").asking(10).wishing(gpu_uuid="GPU-m-0").of_priority(100))
        low = submit(api, a_pod().named("low").asking(20).wishing(gpu_uuid="GPU-m-1").of_priority(0))
        assert ["", ""] == [limited.bind(pod, "m") for pod in (high, low)]
        for name in ("a", "b"):
            assert "" == limited.bind(submit(api, a_pod().named(name).asking(6).of_priority(0)), "other")
        assert eventually(lambda: all(hold.stage is Stage.BOUND for hold in limited.ledger.holds()))
        # of the two GPUs that hold it, only the one of 10 GiB is within the limit, and its pod may not be evicted
        pod = submit(api, a_pod().in_namespace("team").asking(8).wishing(isolation="exclusive").of_priority(10))

        meta = {"m": {"Pods": [{"UID": low["metadata"]["uid"]}], "NumPDBViolations": 0}}
        answer = limited.post("/preempt", {"Pod": pod, "NodeNameToMetaVictims": meta}).json
        assert [] == limited.fitting(pod, "m")
        # whose turn comes after that pod's
        assert [] == limited.fitting(submit(api, a_pod().named("next").asking(6).of_priority(5)), "other")

        assert {} == answer["NodeNameToMetaVictims"]
        assert eventually(lambda: nominee(api, "next") == "other")
        assert "low" not in {write.name for write in api.writes if write.subresource == "eviction"}

    def test_what_is_kept_for_a_pod_is_offered_only_within_the_limit(self, api: ApiServer, limited: Running) -> None:
        pod = submit(api, a_pod().in_namespace("team").asking(1).wishing(isolation="exclusive"))
        alone = request_of(a_pod().asking(1).wishing(isolation="exclusive"))
        assert isinstance(limited.ledger.promise(pod["metadata"]["uid"], "team/p", "n1", (), choosing(alone)), Hold)
        assert ["n1"] == limited.fitting(pod, "n1", "n2")
        # since then another one of its namespace has come: 4 + 10 GiB are more than 10
        assert "" == limited.bind(submit(api, a_pod().named("b").in_namespace("team").asking(4)), "n2")

        assert Reason.NAMESPACE_LIMIT.sentence == limited.filter(pod, "n1")["FailedNodes"]["n1"]
        assert "namespace team may hold" in limited.bind(pod, "n1")

    def test_no_pod_is_evicted_for_one_that_its_namespace_keeps_out(self, api: ApiServer, limited: Running) -> None:
        assert "" == limited.bind(submit(api, a_pod().named("a").in_namespace("team").asking(10)), "n1")
        pod = submit(api, a_pod().named("b").in_namespace("team").asking(1))
        victims = {"n1": {"Pods": [{"UID": "uid-of-a"}], "NumPDBViolations": 0}}

        answer = limited.post("/preempt", {"Pod": pod, "NodeNameToMetaVictims": victims}).json

        assert {} == answer["NodeNameToMetaVictims"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("namespaces: {Team_A: {}}", "expected names of namespaces, or * for all others, got 'Team_A'"),
        ("namespaces: {team: {gpuMemory: lots}}", "gpuMemory"),
        ("namespaces: {team: {gpus: -1}}", "gpus"),
        ("namespaces: {team: {isolations: [walls]}}", "isolations"),
        ("namespaces: {team: {models: ['']}}", "an empty pattern allows no model"),
        ("namespaces: {team: {memory: 1GiB}}", "unknown key"),
    ],
)
def test_a_limit_that_means_nothing_stops_the_extender(text: str, sentence: str) -> None:
    with pytest.raises(ConfigurationError, match=r"namespaces") as refused:
        convert(text, ExtenderConfiguration)
    assert sentence in str(refused.value)


def test_the_grant_of_a_pod_alone_on_its_gpus_counts_them_once() -> None:
    # two containers, each of which sees both GPUs
    both = {"GPU-a": 8 * GIB, "GPU-b": 8 * GIB}
    alone = a_grant(granted(both, name="x", mode="exclusive"), granted(both, name="y", mode="exclusive"))
    assert 2 == alone.gpus
