"""Whom to evict for a pod of higher priority: as few as free single GPUs for it, and the least important."""

from collections.abc import Callable, Collection
from itertools import combinations
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotenant.contract.inventory import Mode
from cotenant.contract.request import PodRequest, parse
from cotenant.contract.units import GIB
from cotenant.standins.api_rules import NODES, PODS
from cotenant.standins.api_server import ApiServer
from extender.ledger import Hold, Ledger
from extender.ledger.trial import Trial
from extender.placement.fit import choosing
from extender.placement.preemption import Budget, Neighbour, Requirement, Selector, Victims, victims
from extender.verbs.judge import Judge
from extender.verbs.preempt import Preempt
from extender.verbs.victims import Search
from extender.verbs.wire import MetaVictims, PreemptionArgs
from tests.builders import NAMES, Json, a_grant, a_node, a_pod, granted, request_of
from tests.extender.running import PATIENCE, Running, eventually, submit

APP = Selector(match_labels={"app": "x"})
VIP = a_pod().with_uid("vip").of_priority(1).build()


def one(uid: str, *, priority: int = 0, amount: int = 0, app: str = "", started: str = "") -> Neighbour:
    return Neighbour(uid, "default", priority, started, {"app": app} if app else {}, amount)


def needs(free: int, *neighbours: Neighbour) -> Callable[[frozenset[str]], bool]:
    """Fit where those that are gone held so many bytes together, on one GPU."""
    return lambda gone: sum(each.bytes for each in neighbours if each.uid in gone) >= free


class TestVictims:
    """The choice itself."""

    def test_the_least_important_go_first(self) -> None:
        low, high = one("low", priority=1, amount=8), one("high", priority=5, amount=8)
        chosen = victims([low, high], [], needs(8, low, high))
        assert chosen
        assert ["low"] == [each.uid for each in chosen.pods]

    def test_one_large_goes_rather_than_many_small(self) -> None:
        pods = [one("large", amount=16), *(one(f"small-{n}", amount=4) for n in range(4))]
        chosen = victims(pods, [], needs(16, *pods))
        assert chosen
        assert ["large"] == [each.uid for each in chosen.pods]

    def test_of_equal_ones_the_youngest_goes(self) -> None:
        # not by their UIDs, which decide where nothing else does
        old = one("b-old", amount=8, started="2026-01-01T00:00:00Z")
        young = one("a-young", amount=8, started="2026-01-02T00:00:00Z")
        chosen = victims([young, old], [], needs(8, old, young))
        assert chosen
        assert ["a-young"] == [each.uid for each in chosen.pods]
        # one that has not started is the youngest of all
        new = one("a-new", amount=8)
        chosen = victims([new, old], [], needs(8, old, new))
        assert chosen
        assert ["a-new"] == [each.uid for each in chosen.pods]

    def test_who_a_budget_protects_stays_even_before_higher_priority(self) -> None:
        kept, goes = one("kept", priority=1, amount=8, app="x"), one("goes", priority=2, amount=8)
        chosen = victims([kept, goes], [Budget("default", APP, allowed=0)], needs(8, kept, goes))
        assert chosen
        assert (["goes"], 0) == ([each.uid for each in chosen.pods], chosen.violations)

    def test_a_budget_is_broken_and_counted_where_nothing_else_helps(self) -> None:
        pods = [one("a", amount=8, app="x"), one("b", amount=8, app="x")]
        # one of the two may go
        chosen = victims(pods, [Budget("default", APP, allowed=1)], needs(16, *pods))
        assert chosen
        assert (2, 1) == (len(chosen.pods), chosen.violations)

    def test_who_is_under_two_budgets_stays_whatever_they_allow(self) -> None:
        kept, goes = one("kept", priority=1, amount=8, app="x"), one("goes", priority=2, amount=8)
        budgets = [Budget("default", APP, allowed=5), Budget("default", APP, allowed=5)]
        chosen = victims([kept, goes], budgets, needs(8, kept, goes))
        assert chosen
        assert (["goes"], 0) == ([each.uid for each in chosen.pods], chosen.violations)

    def test_what_a_budget_allows_goes_to_the_most_important_as_for_kube_scheduler(self) -> None:
        low, high = one("low", priority=1, amount=8, app="x"), one("high", priority=5, amount=8, app="x")
        chosen = victims([low, high], [Budget("default", APP, allowed=1)], needs(8, low, high))
        assert chosen
        assert (["high"], 0) == ([each.uid for each in chosen.pods], chosen.violations)

    def test_a_budget_without_a_selector_protects_nobody(self) -> None:
        pods = [one("a", amount=8, app="x")]
        chosen = victims(pods, [Budget("default", None, allowed=0)], needs(8, *pods))
        assert chosen
        assert 0 == chosen.violations

    def test_where_all_of_them_do_not_help_nobody_goes(self) -> None:
        pods = [one("a", amount=8)]
        assert victims(pods, [], needs(9, *pods)) is None

    def test_those_that_must_go_go(self) -> None:
        must, holds = one("must"), one("holds", amount=8)
        chosen = victims([must, holds], [], needs(8, must, holds), frozenset({"must"}))
        assert chosen
        assert {"must", "holds"} == {each.uid for each in chosen.pods}

    @given(
        st.lists(st.tuples(st.integers(0, 3), st.integers(0, 20), st.booleans()), max_size=7),
        st.integers(1, 60),
        st.integers(0, 2),
    )
    def test_none_of_them_could_stay_and_none_are_chosen_only_where_none_help(
        self, drawn: list[tuple[int, int, bool]], free: int, allowed: int
    ) -> None:
        pods = [
            one(f"u{n}", priority=priority, amount=amount, app="x" if labelled else "")
            for n, (priority, amount, labelled) in enumerate(drawn)
        ]
        fits = needs(free, *pods)
        everyone = frozenset(each.uid for each in pods)
        chosen = victims(pods, [Budget("default", APP, allowed)], fits)

        assert (chosen is None) == (not fits(everyone))
        if chosen is None:
            return
        gone = frozenset(each.uid for each in chosen.pods)
        assert fits(gone)
        assert not [uid for uid in gone if fits(gone - {uid})]
        # the highest priority that goes is the least of all choices that break as few budgets or fewer
        highest = max((each.priority for each in chosen.pods), default=0)
        unprotected = [each for each in pods if not each.labels]
        others = [
            max(each.priority for each in some)
            for count in range(1, len(unprotected) + 1)
            for some in combinations(unprotected, count)
            if fits(frozenset(each.uid for each in some))
        ]
        if others and not chosen.violations and not any(each.labels for each in pods):
            assert highest == min(others)


@pytest.mark.parametrize(
    ("operator", "values", "matched"),
    [
        ("In", ("x", "y"), [True, False, False]),
        ("NotIn", ("x",), [False, True, True]),
        # a label that is not there is not one that is empty
        ("In", ("", "z"), [False, True, False]),
        ("NotIn", ("", "z"), [True, False, True]),
        ("Exists", None, [True, True, False]),
        ("DoesNotExist", None, [False, False, True]),
    ],
)
def test_a_budgets_selector_matches_as_kubernetes_has_it(
    operator: str, values: tuple[str, ...] | None, matched: list[bool]
) -> None:
    requirement = Requirement("app", operator, values)  # type: ignore[arg-type]
    labels: list[dict[str, str]] = [{"app": "x"}, {"app": "z"}, {}]
    assert matched == [Selector(match_expressions=(requirement,)).matches(one) for one in labels]


class TestSearch:
    """Victims on one node, of its pods and of what each of them holds; n has a GPU of 10 GiB and 4 CPUs."""

    class Residents:
        """Be what the API server tells of a node."""

        def __init__(self, *uids: str) -> None:
            self._pods = [one(uid) for uid in uids]

        def on(self, node: str) -> list[Neighbour]:  # noqa: ARG002
            return self._pods

        def budgets(self) -> list[Budget]:
            return []

    @pytest.fixture
    def ledger(self) -> Ledger:
        """A pod that holds 8 GiB, and one that asks nothing of ours and takes 3 CPUs."""
        ledger = Ledger(NAMES, GIB)
        ledger.observe_node(a_node("n").with_gpus(1, "10GiB").with_cpu("4").build())
        given = a_grant(granted({"GPU-n-0": 8 * GIB}))
        ledger.observe_pod(a_pod().with_uid("holder").asking(8).bound_to("n", given).build())
        plain = a_pod().with_uid("plain").with_container(None, {"cpu": "3"})
        ledger.observe_pod(plain.bound_to("n").build())
        return ledger

    def search(self, ledger: Ledger, *residents: str) -> Search:
        return Search(ledger, Judge(ledger, NAMES, GIB, "binpack"), self.Residents(*residents))

    @staticmethod
    def asking(units: int, cpu: str = "0") -> PodRequest:
        return request_of(a_pod().with_container({NAMES.gpu_mem: str(units)}, {NAMES.gpu_mem: str(units), "cpu": cpu}))

    @staticmethod
    def uids(found: Victims | Literal["wait"] | None) -> list[str] | str | None:
        return [each.uid for each in found.pods] if isinstance(found, Victims) else found

    def test_who_holds_no_gpu_goes_for_cpu_in_the_verb_and_is_left_alone_otherwise(self, ledger: Ledger) -> None:
        search = self.search(ledger, "plain", "holder")

        assert ["holder"] == self.uids(search.on("n", self.asking(6), [], pod=VIP))
        assert ["holder", "plain"] == self.uids(search.on("n", self.asking(6, "2"), [], pod=VIP))
        assert ["holder"] == self.uids(search.among_holders("n", self.asking(6), [], pod=VIP))
        assert self.uids(search.among_holders("n", self.asking(6, "2"), [], pod=VIP)) is None

    def test_for_a_pod_that_fits_already_nobody_goes(self, ledger: Ledger) -> None:
        search = self.search(ledger, "plain", "holder")
        assert search.on("n", self.asking(2), [], pod=VIP) is None
        assert search.among_holders("n", self.asking(2), [], pod=VIP) is None

    def test_where_pods_that_end_anyway_make_room_it_is_waited_for(self, ledger: Ledger) -> None:
        # the API server names none that is terminating
        search = self.search(ledger, "plain")
        assert "wait" == search.among_holders("n", self.asking(6), [], pod=VIP)
        assert search.among_holders("n", self.asking(11), [], pod=VIP) is None

    @pytest.mark.parametrize(
        ("explained", "node", "units", "cpu"),
        [(False, "n", 2, "1"), (True, "n", 3, "1"), (True, "n", 2, "2"), (False, "m", 2, "1")],
    )
    def test_what_is_not_free_in_all_is_why_kube_scheduler_did_not_place_it(
        self, ledger: Ledger, node: str, units: int, cpu: str, *, explained: bool
    ) -> None:
        # 10 - 8 GiB and 4 - 3 CPUs are free; with that free, its victims are in the way for another reason
        assert explained is self.search(ledger).explained(node, self.asking(units, cpu), pod=VIP)

    @pytest.mark.parametrize(("explained", "count"), [(False, 2), (True, 3)])
    @pytest.mark.parametrize("static", [None, ["3g.20gb@0", "3g.20gb@4"]], ids=["dynamic", "static"])
    def test_instances_that_are_not_free_in_all_are_why(
        self, ledger: Ledger, count: int, static: list[str] | None, *, explained: bool
    ) -> None:
        ledger.observe_node(a_node("n").with_mig(static=static).build())
        pod = a_pod()
        for _ in range(count):
            pod = pod.asking(1, of=NAMES.mig("3g.20gb"))
        assert explained is self.search(ledger).explained("n", request_of(pod), pod=VIP)


class TestSlowAnswers:
    """kube-scheduler waits for preempt, for two seconds as shipped, and so do all pods."""

    class Residents:
        """Be what an API server tells that takes 0.6 s for each node."""

        now = 0.0

        def on(self, node: str) -> list[Neighbour]:
            self.now += 0.6
            return [one(f"large-{node}")]

        def budgets(self) -> list[Budget]:
            return []

    def test_what_was_found_within_a_second_is_told(self) -> None:
        residents, ledger = self.Residents(), Ledger(NAMES, GIB)
        meta = {}
        for node in ("a", "b", "c", "d"):
            ledger.observe_node(a_node(node).with_gpus(2, "10GiB").build())
            for name, uuid, units in (("large", f"GPU-{node}-0", 6), ("small", f"GPU-{node}-1", 5)):
                given = a_grant(granted({uuid: units * GIB}))
                pod = a_pod().with_uid(f"{name}-{node}").asking(units)
                ledger.observe_pod(pod.of_priority(0).bound_to(node, given).build())
            meta[node] = MetaVictims([])
        judge = Judge(ledger, NAMES, GIB, "binpack")
        preempt = Preempt(judge, Search(ledger, judge, residents), synced=lambda: True, clock=lambda: residents.now)
        vip = a_pod().with_uid("vip").asking(8).of_priority(1).build()

        # after a and b it is 1.2 s
        found = preempt(PreemptionArgs(vip, NodeNameToMetaVictims=meta)).NodeNameToMetaVictims

        assert ["a", "b"] == sorted(found)
        assert 1.2 == pytest.approx(residents.now)


class CountedTrials(Ledger):
    """Count how often a node is copied."""

    trials = 0

    def trial(self, node: str, uids: Collection[str]) -> Trial | None:
        self.trials += 1
        return super().trial(node, uids)


class TestManyPods:
    """n has two GPUs of 30 GiB, MPS shares the second, and pods hold 1 GiB each; one holds what nobody can read."""

    UIDS = tuple(f"{gpu}-{number}" for gpu in (0, 1) for number in range(20))

    def ledger(self) -> CountedTrials:
        ledger = CountedTrials(NAMES, GIB)
        node = a_node("n").with_gpus(1, "30GiB").with_gpus(1, "30GiB", mode=Mode.MPS, mps_pipe="/run/mps/n")
        ledger.observe_node(node.with_cpu("64").build())
        for number, uid in enumerate(self.UIDS):
            mode = Mode.MPS if uid.startswith("1") else Mode.TIME_SLICING
            grant = a_grant(granted({f"GPU-n-{uid[0]}": GIB}, mode=mode)) if number else "torn"
            pod = a_pod().named(uid).with_uid(uid).with_container({NAMES.gpu_mem: "1"}, {"cpu": "1"})
            ledger.observe_pod(pod.bound_to("n", grant).build())
        return ledger

    def test_a_node_is_copied_once_however_many_pods_it_has(self) -> None:
        ledger = self.ledger()
        search = Search(ledger, Judge(ledger, NAMES, GIB, "binpack"), TestSearch.Residents(*self.UIDS))
        assert search.on("n", request_of(a_pod().asking(15)), [], pod=VIP)
        assert 1 == ledger.trials

    @given(st.lists(st.frozensets(st.sampled_from(UIDS))))
    def test_pods_that_are_put_back_are_there_as_if_they_had_never_been_away(
        self, choices: list[frozenset[str]]
    ) -> None:
        ledger = self.ledger()
        trial = ledger.trial("n", self.UIDS)
        assert trial
        for gone in choices:
            assert ledger.without("n", gone) == trial.without(gone)
        assert ledger.view("n") == trial.without(())


class TestVerb:
    """What kube-scheduler is told; n1 has two GPUs of 10 units."""

    @pytest.fixture
    def residents(self, api: ApiServer, extender: Running) -> dict[str, Json]:
        """Two pods of priority 0 on each GPU, of 6 and 4 units."""
        pods = {}
        for gpu in ("a", "b"):
            for units in (6, 4):
                name = f"{gpu}{units}"
                pods[name] = submit(api, a_pod().named(name).asking(units))
                assert "" == extender.bind(pods[name], "n1")
        assert eventually(lambda: len(extender.ledger.holds()) == 4)
        return pods

    def ask(
        self, extender: Running, units: int, victims: list[Json], priority: int = 10, *, node: str = "n1"
    ) -> dict[str, list[str]]:
        """Ask with kube-scheduler's victims on a node; give those that come back, by node."""
        pod = a_pod().named("vip").asking(units).as_json()
        pod["metadata"]["uid"] = "vip"
        pod["spec"]["priority"] = priority
        meta = {"Pods": [{"UID": one["metadata"]["uid"]} for one in victims], "NumPDBViolations": 0}
        answer = extender.post("/preempt", {"Pod": pod, "NodeNameToMetaVictims": {node: meta}})
        assert 200 == answer.status, answer.body
        return {
            name: [one["UID"] for one in found["Pods"]] for name, found in answer.json["NodeNameToMetaVictims"].items()
        }

    def test_victims_that_free_one_gpu_stay_as_they_are(self, extender: Running, residents: dict[str, Json]) -> None:
        uid = residents["a6"]["metadata"]["uid"]
        assert {"n1": [uid]} == self.ask(extender, 6, [residents["a6"]])

    def test_victims_that_free_only_the_sum_are_replaced_by_one_that_frees_a_gpu(
        self, extender: Running, residents: dict[str, Json]
    ) -> None:
        # 4 of one GPU and 4 of the other are 8 of the node, but no GPU of 6
        found = self.ask(extender, 6, [residents["a4"], residents["b4"]])
        sixes = {residents[name]["metadata"]["uid"] for name in ("a6", "b6")}
        (chosen,) = found["n1"]
        assert chosen in sixes

    def test_an_empty_gpu_that_is_ill_has_nobody_evicted_in_vain(self, api: ApiServer, extender: Running) -> None:
        # its units are not allocatable, so that kube-scheduler found 20 of 20 taken: 4 + 4 free its sum, one 6 a GPU
        api.create(NODES, a_node("m").with_gpus(3, "10GiB").unhealthy(0).as_json())
        assert eventually(lambda: extender.ledger.view("m"))
        there = [submit(api, a_pod().named(f"p{n}").asking(units)) for n, units in enumerate((6, 4, 6, 4))]
        assert [""] * 4 == [extender.bind(pod, "m") for pod in there]
        uids = [pod["metadata"]["uid"] for pod in there]

        (chosen,) = self.ask(extender, 6, [there[1], there[3]], node="m")["m"]
        assert chosen in {uids[0], uids[2]}

    def test_a_whole_gpu_takes_both_of_its_pods(self, extender: Running, residents: dict[str, Json]) -> None:
        found = self.ask(extender, 10, [residents["a6"], residents["b4"]])
        names = {one["metadata"]["uid"]: name for name, one in residents.items()}
        assert sorted(names[uid] for uid in found["n1"]) in (["a4", "a6"], ["b4", "b6"])

    def test_nobody_else_goes_for_a_pod_for_which_somebody_goes_already(
        self, extender: Running, residents: dict[str, Json]
    ) -> None:
        going = residents["a6"]["metadata"]["uid"]
        request = parse(a_pod().named("vip").asking(6).build(), NAMES, GIB)
        assert request is not None
        # as when a6 was evicted for it, is ending, and kube-scheduler has lost the nomination
        assert isinstance(extender.ledger.promise("vip", "default/vip", "n1", [going], choosing(request)), Hold)

        answered = self.ask(extender, 6, [residents["a6"]])
        extender.ledger.release("vip")

        assert {"n1": [going]} == answered

    def test_pods_of_the_same_priority_are_left_alone(self, extender: Running, residents: dict[str, Json]) -> None:
        assert {} == self.ask(extender, 6, [residents["a4"], residents["b4"]], priority=0)

    def test_what_no_eviction_can_free_is_no_candidate(self, extender: Running, residents: dict[str, Json]) -> None:
        assert {} == self.ask(extender, 11, list(residents.values()))

    def test_a_pod_that_asks_nothing_of_ours_keeps_its_victims(self, extender: Running) -> None:
        pod = a_pod().named("plain").as_json()
        body = {"Pod": pod, "NodeNameToMetaVictims": {"n1": {"Pods": [{"UID": "x"}], "NumPDBViolations": 1}}}
        assert body["NodeNameToMetaVictims"] == extender.post("/preempt", body).json["NodeNameToMetaVictims"]

    def test_an_api_server_that_is_away_evicts_nobody_and_is_said(
        self, api: ApiServer, extender: Running, residents: dict[str, Json]
    ) -> None:
        api.faults.refuse(500, path="poddisruptionbudgets")
        meta = {"n1": {"Pods": [{"UID": residents[name]["metadata"]["uid"]} for name in ("a4", "b4")]}}
        pod = a_pod().named("vip").asking(6).as_json()
        pod["metadata"]["uid"], pod["spec"]["priority"] = "vip", 10
        answer = extender.post("/preempt", {"Pod": pod, "NodeNameToMetaVictims": meta})
        assert 503 == answer.status
        assert answer.body.startswith(b"preempt: ")

    def test_nobody_is_evicted_before_it_is_known_who_holds_what(
        self, api: ApiServer, start: Callable[..., Running]
    ) -> None:
        victim = submit(api, a_pod().named("low").asking(4))
        hold = api.faults.hold(method="GET", path=r"/api/v1/pods\?")
        starting = start(wait=False)
        assert hold.reached.wait(PATIENCE)
        assert eventually(lambda: starting.ledger.view("n1"))

        answered = self.ask(starting, 6, [victim])
        hold.release()

        assert {} == answered

    def test_what_is_no_json_is_refused_with_a_sentence(self, extender: Running) -> None:
        answer = extender.post("/preempt", b"[")
        assert 400 == answer.status
        assert answer.body.startswith(b"preempt: the request is not what kube-scheduler sends")


class TestVerbWithMIG:
    """kube-scheduler counts instances of a profile over a whole node, wherever on its GPUs they lie."""

    def bound(self, api: ApiServer, extender: Running, name: str, profile: str, *, gpu: str, priority: int = 0) -> str:
        """Bind a pod to an instance of m, and give its UID."""
        wish = a_pod().named(name).with_container({f"nvidia.com/mig-{profile}": "1"}).wishing(gpu_uuid=gpu)
        body = wish.as_json()
        body["spec"]["priority"] = priority
        pod = api.create(PODS, body, "default")
        assert "" == extender.bind(pod, "m")
        return str(pod["metadata"]["uid"])

    def ask(self, extender: Running, profile: str, gpu: str, victim: str) -> Json:
        pod = a_pod().named("vip").with_container({f"nvidia.com/mig-{profile}": "1"}).wishing(gpu_uuid=gpu).as_json()
        pod["metadata"]["uid"], pod["spec"]["priority"] = "vip", 10
        meta = {"m": {"Pods": [{"UID": victim}], "NumPDBViolations": 0}}
        answer = extender.post("/preempt", {"Pod": pod, "NodeNameToMetaVictims": meta})
        assert 200 == answer.status, answer.body
        found: Json = answer.json["NodeNameToMetaVictims"]
        return found

    @pytest.mark.parametrize("static", [None, ["4g.20gb@0", "3g.20gb@4"]], ids=["dynamic", "static"])
    def test_the_instance_that_the_pod_can_use_is_freed_and_no_other(
        self, api: ApiServer, extender: Running, static: list[str] | None
    ) -> None:
        api.create(NODES, a_node("m").with_mig(static=static).with_mig(static=static).as_json())
        assert eventually(lambda: extender.ledger.view("m"))
        first = self.bound(api, extender, "first", "4g.20gb", gpu="GPU-m-0")
        second = self.bound(api, extender, "second", "4g.20gb", gpu="GPU-m-1", priority=1)
        self.bound(api, extender, "beside", "3g.20gb", gpu="GPU-m-1")

        # both 4g are held: kube-scheduler would have the less important go, which is of a GPU that the pod cannot use
        assert {"m": {"Pods": [{"UID": second}], "NumPDBViolations": 0}} == self.ask(
            extender, "4g.20gb", "GPU-m-1", first
        )
        # where its victim does it stays, and nobody else is looked for
        assert {"m": {"Pods": [{"UID": first}], "NumPDBViolations": 0}} == self.ask(
            extender, "4g.20gb", "GPU-m-0", first
        )

    def test_a_whole_gpu_takes_all_that_lie_on_it(self, api: ApiServer, extender: Running) -> None:
        api.create(NODES, a_node("m").with_mig().as_json())
        assert eventually(lambda: extender.ledger.view("m"))
        there = {self.bound(api, extender, f"p{n}", "2g.10gb", gpu="GPU-m-0") for n in range(3)}

        (found,) = self.ask(extender, "7g.40gb", "GPU-m-0", min(there)).values()

        assert there == {one["UID"] for one in found["Pods"]}
