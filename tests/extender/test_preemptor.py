"""Eviction for a pod that fits nowhere only because free memory lies in pieces; n1 has two GPUs of 10 units."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from cotenant.cluster import connect
from cotenant.contract.configuration import FragmentedPreemption
from cotenant.contract.pods import Pod
from cotenant.contract.units import GIB
from cotenant.standins.api_rules import BUDGETS, NODES, PODS
from cotenant.standins.api_server import ApiServer
from extender.cluster.evictions import Evictions
from extender.cluster.preemptor import Preemptor
from extender.ledger import Ledger
from extender.placement.preemption import Neighbour, Victims, least
from tests.builders import NAMES, Json, a_node, a_pod, request_of
from tests.extender.running import Running, eventually, filter_args, nominee, submit

AT_ONCE = {"after": 0.01}


def resident(api: ApiServer, extender: Running, name: str, units: int, **spec: Any) -> Json:
    """Create and bind a pod of n1, of priority 0 unless *spec* says otherwise."""
    pod = create(api, name, units, **spec)
    assert "" == extender.bind(pod, "n1")
    assert eventually(lambda: (hold := extender.ledger.hold(uid(pod))) and hold.stage == "bound")
    return pod


def leave_pieces(api: ApiServer, extender: Running) -> None:
    """Have 4 units left of each GPU of n1."""
    for name in ("a", "b"):
        resident(api, extender, name, 6)


def create(
    api: ApiServer, name: str, units: int, *, labels: dict[str, str] | None = None, mig: str = "", **spec: Any
) -> Json:
    builder = a_pod().named(name)
    body = (builder.with_container({f"nvidia.com/mig-{mig}": "1"}) if mig else builder.asking(units)).as_json()
    body["spec"] |= spec
    body["metadata"]["labels"] = labels or {}
    stored = api.create(PODS, body, "default")
    return {key: value for key, value in stored.items() if key not in {"apiVersion", "kind"}}


def uid(pod: Json) -> str:
    return str(pod["metadata"]["uid"])


def refused(extender: Running, pod: Json, node: str = "n1") -> Json:
    """Have filter refuse the pod, as kube-scheduler's attempt would."""
    answer: Json = extender.post("/filter", filter_args(pod, node)).json
    assert not answer["NodeNames"], answer
    return answer


def evictions(api: ApiServer) -> list[tuple[str, int]]:
    return [(write.name, write.status) for write in api.writes if write.subresource == "eviction"]


def explained(extender: Running, name: str) -> str:
    return extender.get(f"/v1/explain/default/{name}?as=table").body.decode()


def told(api: ApiServer) -> set[tuple[str, str]]:
    return {(event["regarding"]["name"], event["reason"]) for event in api.events()}


def end(api: ApiServer, name: str) -> None:
    """End a terminating pod for good, which is the kubelet's part."""
    api.delete_pod(name, grace=0)


class TestOptIn:
    """4 units are left of each GPU, 8 of the node: enough for 6 by the sum, which is all that kube-scheduler sees."""

    def test_by_default_nobody_is_evicted(self, api: ApiServer, start: Callable[..., Running]) -> None:
        extender = start()
        leave_pieces(api, extender)
        vip = create(api, "vip", 6, priority=10)
        for _ in range(3):
            refused(extender, vip)
        submit(api, a_pod().named("later").asking(1))
        assert [] == evictions(api)

    def test_one_pod_goes_what_it_leaves_is_kept_and_the_pod_gets_it(
        self, api: ApiServer, start: Callable[..., Running]
    ) -> None:
        extender = start(preemptFragmented=AT_ONCE)
        leave_pieces(api, extender)
        vip = create(api, "vip", 6, priority=10)
        refused(extender, vip)

        assert eventually(lambda: nominee(api, "vip") == "n1")
        ((victim, status),) = evictions(api)
        assert 201 == status
        assert eventually(lambda: {(victim, "GPUMemoryPreempted"), ("vip", "GPUMemoryPreempting")} <= told(api))
        # until the victim is gone it holds what it has; the node must not be unresolvable, or the nomination goes
        answer = refused(extender, vip)
        assert {"n1": "no single GPU has the requested memory free"} == answer["FailedNodes"]
        assert not answer["FailedAndUnresolvableNodes"]
        assert 1 == extender.metric("cotenant_pods_promised")
        assert eventually(lambda: "once the pod that was evicted for it is gone" in explained(extender, "vip"))
        assert "6 GiB of GPU" in explained(extender, "vip")

        end(api, victim)
        assert eventually(lambda: extender.fitting(vip, "n1") == ["n1"])
        # who is refused meanwhile sees for whom it is kept, where the memory lies and in every view
        submit(api, a_pod().named("later").asking(9).wishing(gpu_uuid="GPU-n1-0"))
        assert eventually(lambda: "kept for default/vip until it is bound, or for" in explained(extender, "later"))
        (row,) = extender.get("/v1/nodes?filter=n1").json["items"]
        assert [["default/vip", 6 * GIB]] == [[one["pod"], one["bytes"]] for gpu in row["gpus"] for one in gpu["kept"]]
        assert "kept for default/vip" in extender.get("/v1/nodes?as=table").body.decode()
        # 10 units of one GPU and 4 of the other are free, 6 of them promised: another pod gets 4 at most
        other = create(api, "other", 5, priority=20, preemptionPolicy="Never")
        refused(extender, other)
        assert "no single GPU" in extender.bind(other, "n1")
        assert "" == extender.bind(vip, "n1")
        assert eventually(lambda: extender.metric("cotenant_pods_promised") == 0)
        assert 1 == extender.metric('cotenant_evictions_total{cause="preemption",outcome="ok"}')
        view = extender.ledger.view("n1")
        assert view is not None
        # one GPU has a pod of 6 as before, and the other vip's 6
        assert [4 * GIB, 4 * GIB] == [state.free_bytes for state in view.gpus]

    def test_the_least_important_goes(self, api: ApiServer, start: Callable[..., Running]) -> None:
        extender = start(preemptFragmented=AT_ONCE)
        resident(api, extender, "high", 6, priority=5)
        resident(api, extender, "low", 6, priority=1)
        refused(extender, create(api, "vip", 6, priority=10))
        assert eventually(lambda: evictions(api))
        assert [("low", 201)] == evictions(api)

    @pytest.mark.parametrize("spec", [{"priority": 0}, {"priority": 10, "preemptionPolicy": "Never"}])
    def test_a_pod_of_the_same_priority_or_that_preempts_nobody_waits(
        self, api: ApiServer, start: Callable[..., Running], spec: Json
    ) -> None:
        extender = start(preemptFragmented=AT_ONCE)
        leave_pieces(api, extender)
        refused(extender, create(api, "waits", 6, **spec))
        # one that may preempt comes later, and is seen to first
        resident(api, extender, "c", 4)
        refused(extender, create(api, "vip", 4 + 6, priority=20))
        assert eventually(lambda: nominee(api, "vip"))
        assert nominee(api, "waits") is None

    def test_who_would_fit_once_pods_that_are_ending_have_ended_evicts_nobody(
        self, api: ApiServer, start: Callable[..., Running]
    ) -> None:
        extender = start(preemptFragmented=AT_ONCE)
        leave_pieces(api, extender)
        api.delete_pod("a")
        vip = create(api, "vip", 6, priority=10)
        refused(extender, vip)
        end(api, "a")
        assert eventually(lambda: extender.fitting(vip, "n1") == ["n1"])
        assert [] == evictions(api)


class TestWhatKeepsIt:
    """Budgets, rights, rates, and pods that change their mind."""

    def test_a_budget_turns_the_choice_and_where_all_are_protected_nobody_goes(
        self, api: ApiServer, start: Callable[..., Running]
    ) -> None:
        extender = start(preemptFragmented=AT_ONCE)
        resident(api, extender, "kept", 6, priority=0, labels={"app": "kept"})
        resident(api, extender, "goes", 6, priority=1, labels={"app": "goes"})
        protect(api, "kept")
        refused(extender, create(api, "vip", 6, priority=10))
        assert eventually(lambda: evictions(api))
        assert [("goes", 201)] == evictions(api)
        refused(extender, create(api, "second", 7, priority=10))
        assert eventually(lambda: ("second", "GPUMemoryPreemptionBlocked") in told(api))
        assert [("goes", 201)] == evictions(api)

    def test_a_pod_under_two_budgets_which_nobody_can_evict_is_not_chosen(
        self, api: ApiServer, start: Callable[..., Running]
    ) -> None:
        extender = start(preemptFragmented=AT_ONCE)
        resident(api, extender, "kept", 6, priority=0, labels={"app": "kept"})
        resident(api, extender, "goes", 6, priority=1, labels={"app": "goes"})
        for name in ("one", "another"):
            protect(api, "kept", name=name, allowed=1)
        refused(extender, create(api, "vip", 6, priority=10))
        assert eventually(lambda: evictions(api))
        assert [("goes", 201)] == evictions(api)
        refused(extender, create(api, "second", 7, priority=10))
        assert eventually(lambda: ("second", "GPUMemoryPreemptionBlocked") in told(api))

    @pytest.mark.parametrize(
        ("status", "reason"), [(429, "GPUMemoryPreemptionBlocked"), (403, "GPUMemoryPreemptionForbidden")]
    )
    def test_an_eviction_that_is_refused_leaves_nothing_promised_and_is_told(
        self, api: ApiServer, start: Callable[..., Running], status: int, reason: str
    ) -> None:
        extender = start(preemptFragmented=AT_ONCE)
        leave_pieces(api, extender)
        api.faults.refuse(status, "it would violate the pod's disruption budget", path="/eviction")
        refused(extender, create(api, "vip", 6, priority=10))
        assert eventually(lambda: ("vip", reason) in told(api))
        assert extender.metric("cotenant_pods_promised") == 0
        assert nominee(api, "vip") is None

    def test_no_more_go_in_a_minute_than_are_allowed(self, api: ApiServer, start: Callable[..., Running]) -> None:
        extender = start(preemptFragmented={**AT_ONCE, "perMinute": 1})
        leave_pieces(api, extender)
        for name in ("first", "second"):
            refused(extender, create(api, name, 6, priority=10))
        assert eventually(lambda: evictions(api))
        submit(api, a_pod().named("later").asking(1))
        assert 1 == len(evictions(api))

    def test_what_is_kept_is_free_again_when_the_pod_is_gone(
        self, api: ApiServer, start: Callable[..., Running]
    ) -> None:
        extender = start(preemptFragmented=AT_ONCE)
        leave_pieces(api, extender)
        refused(extender, create(api, "vip", 6, priority=10))
        assert eventually(lambda: nominee(api, "vip"))
        ((victim, _),) = evictions(api)
        end(api, victim)
        end(api, "vip")
        other = create(api, "other", 10)
        assert eventually(lambda: extender.fitting(other, "n1") == ["n1"])

    def test_what_is_kept_is_free_again_after_a_while(self, api: ApiServer, start: Callable[..., Running]) -> None:
        extender = start(preemptFragmented={**AT_ONCE, "holdFor": 0.3})
        leave_pieces(api, extender)
        refused(extender, create(api, "vip", 6, priority=10))
        assert eventually(lambda: nominee(api, "vip"))
        end(api, evictions(api)[0][0])
        other = create(api, "other", 10)
        assert eventually(lambda: extender.fitting(other, "n1") == ["n1"])

    def test_a_nomination_that_was_taken_away_is_made_again_once_the_victims_are_gone(
        self, api: ApiServer, start: Callable[..., Running]
    ) -> None:
        extender = start(preemptFragmented=AT_ONCE, nominate=False)
        leave_pieces(api, extender)
        refused(extender, create(api, "vip", 6, priority=10))
        assert eventually(lambda: nominee(api, "vip"))
        api.patch(PODS, "vip", {"status": {"nominatedNodeName": None}}, namespace="default", subresource="status")
        end(api, evictions(api)[0][0])
        assert eventually(lambda: nominee(api, "vip") == "n1")

    def test_a_binding_that_is_refused_leaves_the_promise_and_one_that_is_taken_ends_it(
        self, api: ApiServer, start: Callable[..., Running]
    ) -> None:
        extender = start(preemptFragmented=AT_ONCE)
        leave_pieces(api, extender)
        vip = create(api, "vip", 6, priority=10)
        refused(extender, vip)
        assert eventually(lambda: nominee(api, "vip"))
        end(api, evictions(api)[0][0])
        assert eventually(lambda: extender.fitting(vip, "n1") == ["n1"])
        api.faults.refuse(403, path="/binding")
        assert "403" in extender.bind(vip, "n1")
        refused(extender, create(api, "other", 5, priority=20))
        assert "" == extender.bind(vip, "n1")


class TestMIG:
    """An A100 that is cut on demand: 3g and 4g take half of it each."""

    def test_a_mig_pod_has_one_evicted_whose_place_it_needs(
        self, api: ApiServer, start: Callable[..., Running]
    ) -> None:
        api.create(NODES, a_node("m").with_mig().as_json())
        extender = start(preemptFragmented=AT_ONCE)
        # 1g, each in one slice, so that no 4g fits though the kubelet has four of one
        for n in range(4):
            pod = create(api, f"one-{n}", 0, mig="1g.5gb", priority=n)
            assert "" == extender.bind(pod, "m")
        vip = create(api, "vip", 0, mig="7g.40gb", priority=2)
        refused(extender, vip, "m")
        # one of them is of its own priority, and one of a higher one
        other = create(api, "other", 0, mig="7g.40gb", priority=10)
        refused(extender, other, "m")
        assert eventually(lambda: nominee(api, "other") == "m")
        assert nominee(api, "vip") is None
        assert {f"one-{n}" for n in range(4)} == {name for name, _ in evictions(api)}
        for n in range(4):
            end(api, f"one-{n}")
        assert eventually(lambda: extender.fitting(other, "m") == ["m"])
        refused(extender, create(api, "small", 0, mig="1g.5gb"), "m")
        assert "" == extender.bind(other, "m")


def protect(api: ApiServer, app: str, *, name: str = "", allowed: int = 0) -> None:
    name = name or app
    body = {
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"selector": {"matchLabels": {"app": app}}},
        "status": {"disruptionsAllowed": allowed},
    }
    if all(stored["metadata"]["name"] != name for stored in api._all(BUDGETS)):
        api.create(BUDGETS, body, "default")


def one(name: str, priority: int, started: str = "") -> Neighbour:
    return Neighbour(name, "default", priority, started, {})


def test_an_attempt_soon_after_one_that_came_to_nothing_is_seen_to_later(api: ApiServer, tmp_path: Path) -> None:
    now, asked = 0.0, 0

    def may_write() -> bool:
        nonlocal asked
        asked += 1
        return False

    with connect(api.kubeconfig(tmp_path / "kubeconfig")) as cluster:
        preemptor = Preemptor(
            cluster,
            Ledger(NAMES, GIB),
            # it never comes to these where it may not write
            cast("Any", None),
            cast("Any", None),
            evictions=Evictions(cluster, lambda *_: None),
            tell=lambda *_: None,
            configuration=FragmentedPreemption(after=0.01),
            may_write=may_write,
            clock=lambda: now,
        )

        def look(name: str) -> None:
            pod = msgspec.convert(api.pod(name) or submit(api, a_pod().named(name).asking(1)), Pod)
            preemptor.look(pod, request_of(pod), frozenset({"n1"}))

        look("waits")
        now = 1.0
        look("wakes")
        assert eventually(lambda: asked == 1)

        now = 8.0
        look("waits")
        assert eventually(lambda: asked == 2)  # the other one, of 1.01
        # 15 s after the first
        now = 16.0
        look("wakes")
        assert eventually(lambda: asked == 3)
        preemptor.stop()


@pytest.mark.parametrize(
    ("worse", "better"),
    [
        (Victims((one("a", 0),), 1), Victims((one("b", 5), one("c", 5)), 0)),
        (Victims((one("a", 5),), 0), Victims((one("b", 4), one("c", 4)), 0)),
        (Victims((one("a", 5), one("b", 4)), 0), Victims((one("c", 5), one("d", 3)), 0)),
        (Victims((one("a", -5), one("b", -5)), 0), Victims((one("c", -5),), 0)),
        (Victims((one("a", 5, "2026-01-01T00:00:00Z"),), 0), Victims((one("b", 5, "2026-01-02T00:00:00Z"),), 0)),
    ],
    ids=["budgets", "highest", "sum", "count", "started"],
)
def test_the_node_is_chosen_as_kube_scheduler_chooses_it(worse: Victims, better: Victims) -> None:
    assert "n2" == least({"n1": worse, "n2": better})
    assert "n1" == least({"n1": better, "n2": worse})
