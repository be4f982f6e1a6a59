"""MIG instances: who holds which slot, where the next one lies, and why none fits."""

from dataclasses import dataclass, field
from typing import Any, Self

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotenant.contract.boards import board
from cotenant.contract.environment import VISIBLE_DEVICES, injected
from cotenant.contract.grant import MIGPlacement, decode
from cotenant.contract.inventory import MIG, MIGProfile
from cotenant.contract.reasons import Reason
from cotenant.contract.units import GIB, MIB
from extender.inspect.explain import explain
from extender.ledger import Hold, Ledger, NodeView
from extender.placement.fit import Placement, choosing, place
from extender.placement.partition import ROOM, Aim
from extender.placement.ranking import Rankings
from extender.verbs.judge import Judge
from tests.builders import NAMES, NodeBuilder, PodBuilder, a_node, a_pod, an_instance, request_of

CUT = a_node().with_mig(static=["1g.5gb@0", "2g.10gb@2"])
PROFILES = ["1g.5gb", "2g.10gb", "3g.20gb", "4g.20gb", "7g.40gb"]


def asking(*profiles: str, name: str = "p", **wishes: str) -> PodBuilder:
    pod = a_pod().named(name).wishing(**wishes)
    for profile in profiles:
        pod = pod.asking("1", of=NAMES.mig(profile))
    return pod


@dataclass
class Cluster:
    """A ledger, and pods that are placed on it as filter and bind do."""

    ledger: Ledger = field(default_factory=lambda: Ledger(NAMES, GIB))
    pods: dict[str, PodBuilder] = field(default_factory=dict)
    made: int = 0

    def with_node(self, node: NodeBuilder) -> Self:
        self.ledger.observe_node(node.build())
        return self

    def view(self, name: str = "n") -> NodeView:
        view = self.ledger.view(name)
        assert view is not None
        return view

    def put(
        self, *profiles: str, name: str | None = None, node: str = "n", aim: Aim = ROOM, **wishes: str
    ) -> Hold | Reason:
        pod = asking(*profiles, name=name or f"p{self.made}", **wishes)
        self.made += 1
        request = request_of(pod)
        held = self.ledger.assume(f"uid-of-{pod.name}", f"default/{pod.name}", node, choosing(request, aim=aim))
        if isinstance(held, Hold):
            self.pods[pod.name] = pod.bound_to(node, decode(held.grant))
        return held

    def where(self, *profiles: str, **more: Any) -> list[tuple[str, str, int]] | Reason:
        held = self.put(*profiles, **more)
        if isinstance(held, Reason):
            return held
        return [(slot.uuid, slot.instance.profile, slot.instance.start) for slot in held.slots]

    def end(self, name: str) -> None:
        del self.pods[name]
        self.ledger.pod_gone(f"uid-of-{name}")


class TestDynamic:
    def test_instances_lie_where_large_ones_still_fit_and_the_grant_says_so(self) -> None:
        cluster = Cluster().with_node(a_node().with_mig())
        gpu = "GPU-n-0"
        assert [(gpu, "3g.20gb", 4)] == cluster.where("3g.20gb")
        assert [(gpu, "2g.10gb", 2)] == cluster.where("2g.10gb")
        held = cluster.put("2g.10gb")
        assert isinstance(held, Hold)
        (container,) = decode(held.grant).containers
        assert MIGPlacement(profile="2g.10gb", start=0, size=2) == container.mig
        assert 9856 * MIB == container.gpus[0].bytes  # nvidia-smi mig -lgip of an A100 with 40 GB: 9.62 GiB
        assert "void" == injected(container)[VISIBLE_DEVICES]
        assert Reason.NO_MIG_ROOM == cluster.put("1g.5gb")

    def test_a_gpu_in_use_is_filled_before_an_empty_one_and_spread_does_the_opposite(self) -> None:
        node = a_node().with_mig().with_mig()
        cluster = Cluster().with_node(node)
        assert [("GPU-n-0", "1g.5gb", 6)] == cluster.where("1g.5gb")
        assert [("GPU-n-0", "1g.5gb", 5)] == cluster.where("1g.5gb")
        placed = place(cluster.view(), request_of(asking("1g.5gb")), aim=Aim(spread=True))
        assert isinstance(placed, Placement)
        assert "GPU-n-1" == placed.slots[0].state.gpu.uuid

    def test_containers_are_placed_together_where_one_by_one_would_not_do(self) -> None:
        # a 2g goes to 4 or above of an empty GPU, which leaves no 3g beside another 2g
        cluster = Cluster().with_node(a_node().with_mig())
        placed = cluster.where("2g.10gb", "3g.20gb", "2g.10gb")
        assert not isinstance(placed, Reason)
        assert {("2g.10gb", 0), ("2g.10gb", 2), ("3g.20gb", 4)} == {(p, start) for _, p, start in placed}

    def test_what_no_grant_explains_is_taken(self) -> None:
        cluster = Cluster().with_node(a_node().with_mig().with_unexplained("3g.20gb@0"))
        assert [("GPU-n-0", "3g.20gb", 4)] == cluster.where("3g.20gb")
        assert Reason.NO_MIG_ROOM == cluster.put("1g.5gb")

    def test_the_place_of_an_instance_that_met_a_trouble_is_taken_and_the_others_are_not(self) -> None:
        node = a_node().with_mig()
        cluster = Cluster().with_node(node.with_ill_places("3g.20gb@4"))
        assert [("GPU-n-0", "3g.20gb", 0)] == cluster.where("3g.20gb")
        assert Reason.NO_MIG_ROOM == cluster.put("1g.5gb")
        cluster.with_node(node)
        assert [("GPU-n-0", "1g.5gb", 6)] == cluster.where("1g.5gb")
        # of one that holds it still, it is taken once
        cluster.with_node(node.with_ill_places("3g.20gb@0"))
        assert [("GPU-n-0", "1g.5gb", 5)] == cluster.where("1g.5gb")

    def test_a_pod_that_ends_gives_its_place_back_and_one_that_terminates_does_not(self) -> None:
        cluster = Cluster().with_node(a_node().with_mig())
        cluster.put("7g.40gb", name="whole")
        cluster.ledger.observe_pod(cluster.pods["whole"].terminating().build())
        assert Reason.NO_MIG_ROOM == cluster.put("1g.5gb")
        cluster.ledger.observe_pod(cluster.pods["whole"].in_phase("Succeeded").build())
        assert isinstance(cluster.put("1g.5gb"), Hold)

    def test_a_ledger_that_starts_anew_knows_the_same_from_the_api_alone(self) -> None:
        node = a_node().with_mig().with_mig()
        cluster = Cluster().with_node(node)
        for profile in ("3g.20gb", "1g.5gb", "4g.20gb", "2g.10gb"):
            cluster.put(profile)
        again = Cluster()
        for pod in reversed(cluster.pods.values()):
            again.ledger.observe_pod(pod.build())
        again.with_node(node)
        assert cluster.view().mig == again.view().mig
        # and when the node goes and comes back
        again.ledger.node_gone("n")
        again.with_node(node)
        assert cluster.view().mig == again.view().mig

    def test_a_grant_that_cannot_be_read_closes_every_mig_gpu_of_its_node_and_no_other(self) -> None:
        cluster = Cluster().with_node(a_node().with_mig().with_gpus(1)).with_node(a_node("m").with_mig())
        cluster.ledger.observe_pod(asking("1g.5gb", name="odd").bound_to("n", "{not json").build())
        assert Reason.NO_MIG_ROOM == cluster.put("1g.5gb")
        assert isinstance(cluster.put("1g.5gb", node="m"), Hold)
        assert 80 * GIB == cluster.view().gpus[0].free_bytes
        cluster.ledger.pod_gone("uid-of-odd")
        assert isinstance(cluster.put("1g.5gb"), Hold)

    def test_another_extenders_choice_of_a_taken_place_is_never_assumed(self) -> None:
        cluster = Cluster().with_node(a_node().with_mig())
        first = cluster.put("3g.20gb")
        assert isinstance(first, Hold)
        with pytest.raises(ValueError, match=r"3g\.20gb at 4 overlaps 3g\.20gb at 4"):
            cluster.ledger.assume("uid-of-q", "default/q", "n", lambda _: decode(first.grant))

    def test_a_pod_that_went_around_us_is_told_of_only_where_the_instances_are_ours(self) -> None:
        cluster = Cluster()
        for node in ("ours", "theirs"):
            cluster.ledger.observe_pod(asking("1g.5gb", name=f"on-{node}").bound_to(node).build())
        cluster.with_node(a_node("ours").with_mig()).with_node(a_node("theirs").without_inventory())
        assert {"uid-of-on-ours": "default/on-ours"} == cluster.ledger.ungranted()
        assert (True, False) == tuple(cluster.ledger.is_ungranted(f"uid-of-on-{node}") for node in ("ours", "theirs"))


class TestStatic:
    def test_a_free_instance_is_given_by_its_uuid(self) -> None:
        cluster = Cluster().with_node(a_node().with_mig(static=["3g.20gb@4", "1g.5gb@0", "1g.5gb@1"]))
        seen = []
        for _ in range(2):
            held = cluster.put("1g.5gb")
            assert isinstance(held, Hold)
            seen.append(injected(decode(held.grant).containers[0])[VISIBLE_DEVICES])
        assert ["MIG-1g.5gb@0", "MIG-1g.5gb@1"] == seen
        assert Reason.NO_MIG_ROOM == cluster.put("1g.5gb")
        assert Reason.NO_MIG_PROFILE == cluster.put("2g.10gb")
        cluster.end("p0")
        assert [("GPU-n-0", "1g.5gb", 0)] == cluster.where("1g.5gb")

    def test_an_ill_instance_is_not_given_and_keeps_whom_it_has(self) -> None:
        node = a_node().with_mig(static=["1g.5gb@0", "1g.5gb@1", "1g.5gb@2"])
        cluster = Cluster().with_node(node)
        assert [("GPU-n-0", "1g.5gb", 0)] == cluster.where("1g.5gb", name="first")
        cluster.with_node(node.with_ill_instances("1g.5gb@0", "1g.5gb@1"))
        assert [("GPU-n-0", "1g.5gb", 2)] == cluster.where("1g.5gb")
        assert Reason.NO_MIG_ROOM == cluster.put("1g.5gb")
        cluster.end("first")
        assert Reason.NO_MIG_ROOM == cluster.put("1g.5gb")
        cluster.with_node(node)
        assert [("GPU-n-0", "1g.5gb", 0)] == cluster.where("1g.5gb")

    def test_shares_of_instances_fill_evenly_up_to_their_number_and_come_back(self) -> None:
        node = a_node().with_mig(static=["1g.5gb@0", "1g.5gb@1", "3g.20gb@4"]).with_shares("1g.5gb", 2, renamed=True)
        cluster = Cluster().with_node(node)
        assert [("GPU-n-0", "1g.5gb", start) for start in (0, 1, 0, 1)] == [
            one for _ in range(4) for one in cluster.where("1g.5gb.shared")
        ]
        assert Reason.NO_MIG_ROOM == cluster.put("1g.5gb.shared")
        assert Reason.NO_MIG_PROFILE == cluster.put("1g.5gb")
        cluster.end("p1")
        # one pod with two containers needs two shares, and there is one
        assert Reason.NO_MIG_ROOM == cluster.put("1g.5gb.shared", "1g.5gb.shared")
        assert [("GPU-n-0", "1g.5gb", 1)] == cluster.where("1g.5gb.shared", name="late")
        again = Cluster()
        for pod in cluster.pods.values():
            again.ledger.observe_pod(pod.build())
        assert cluster.view().mig == again.with_node(node).view().mig
        cluster.end("p0")
        cluster.end("late")
        assert [("GPU-n-0", "1g.5gb", start) for start in (0, 1)] == cluster.where("1g.5gb.shared", "1g.5gb.shared")

    def test_the_grant_of_a_share_says_that_nothing_holds_it_apart_from_the_others(self) -> None:
        node = a_node().with_mig(static=["1g.5gb@0", "2g.10gb@2"]).with_shares("1g.5gb", 4)
        cluster = Cluster().with_node(node)
        held = cluster.put("1g.5gb")
        assert isinstance(held, Hold)
        (container,) = decode(held.grant).containers
        assert container.mig is not None
        assert ("MIG-1g.5gb@0", 4, "1g.5gb") == (container.mig.uuid, container.mig.replicas, container.mig.suffix)
        assert ("none", "MIG partition around the instance, nothing between its shares") == (
            container.isolation.given,
            container.isolation.enforced_by,
        )
        assert 4864 * MIB // 4 == container.gpus[0].bytes  # a 1g.5gb of an A100 with 40 GB has 4,864 MiB
        # who asks to be kept from neighbours gets no share, and a whole instance where there is one
        assert Reason.ISOLATION_UNAVAILABLE == cluster.put("1g.5gb", isolation="strict")
        assert [("GPU-n-0", "2g.10gb", 2)] == cluster.where("2g.10gb", isolation="strict")

    def test_a_share_that_another_extender_gave_is_never_given_twice(self) -> None:
        node = a_node().with_mig(static=["1g.5gb@0"]).with_shares("1g.5gb", 2)
        cluster = Cluster().with_node(node)
        first = cluster.put("1g.5gb")
        assert isinstance(first, Hold)
        cluster.put("1g.5gb")
        with pytest.raises(ValueError, match=r"was to get 1g\.5gb at 0, which is not free"):
            cluster.ledger.assume("uid-of-q", "default/q", "n", lambda _: decode(first.grant))

    def test_an_instance_that_is_there_is_taken_before_one_is_made(self) -> None:
        cluster = Cluster().with_node(a_node().with_mig().with_mig(static=["1g.5gb@0"]))
        assert [("GPU-n-1", "1g.5gb", 0)] == cluster.where("1g.5gb")
        assert [("GPU-n-0", "1g.5gb", 6)] == cluster.where("1g.5gb")


class TestNodes:
    @pytest.mark.parametrize(
        ("problem", "mig_problem", "node"),
        [
            (Reason.NOT_ADVERTISED, Reason.NOT_ADVERTISED, a_node().with_mig().advertising_no_instances()),
            (None, Reason.NOT_ADVERTISED, a_node().with_gpu().with_mig().advertising_no_instances()),
            (None, None, a_node().with_mig().unhealthy(0).advertising_no_instances()),
            # a plugin that has died leaves the names there
            (Reason.NOT_ADVERTISED, Reason.NOT_ADVERTISED, CUT.advertising_no_instances("0")),
            # migStrategy: single offers instances as GPUs
            (None, None, CUT.advertising_no_instances()),
            (None, None, CUT.with_ill_instances("1g.5gb@0", "2g.10gb@2").advertising_no_instances("0")),
            (None, None, a_node().with_mig(static=[]).advertising_no_instances("0")),
        ],
    )
    def test_a_kubelet_that_has_no_instance_of_any_profile_is_a_problem_where_a_gpu_has_some_to_give(
        self, problem: Reason | None, mig_problem: Reason | None, node: NodeBuilder
    ) -> None:
        view = Cluster().with_node(node).view()
        assert (problem, mig_problem) == (view.problem, view.mig_problem)

    def test_a_node_of_mig_gpus_alone_needs_no_gpu_memory(self) -> None:
        cluster = Cluster().with_node(a_node().with_mig().advertising("0"))
        assert isinstance(cluster.put("1g.5gb"), Hold)
        assert Reason.NO_SHARED_GPU == place(cluster.view(), request_of(a_pod().asking(1)))

    @pytest.mark.parametrize(
        ("reason", "node"),
        [
            (Reason.NOT_ADVERTISED, a_node().with_mig().advertising_no_instances()),
            (Reason.NO_MIG_PROFILE, a_node().with_gpus(2)),
            (Reason.NO_MIG_PROFILE, a_node().with_mig("A30-24GB")),
            (Reason.UNHEALTHY_GPU, a_node().with_mig().unhealthy(0)),
            (Reason.PLUGIN_GONE, a_node().with_mig().not_serving()),
            (Reason.UNIT_MISMATCH, a_node().with_mig().counting_in(1 << 20)),
            (Reason.NO_INVENTORY, a_node().with_mig().without_inventory()),
        ],
    )
    def test_each_thing_wrong_with_a_node_has_its_reason(self, reason: Reason, node: NodeBuilder) -> None:
        assert reason == Cluster().with_node(node).put("1g.5gb")

    def test_wishes_choose_among_mig_gpus_too(self) -> None:
        cluster = Cluster().with_node(a_node().with_mig().with_mig())
        assert [("GPU-n-1", "1g.5gb", 6)] == cluster.where("1g.5gb", gpu_uuid="GPU-n-1")
        assert Reason.NO_SUCH_GPU == cluster.put("1g.5gb", gpu_model="H100")


class TestRanking:
    def test_every_node_is_ranked_as_it_is_now(self) -> None:
        cluster = Cluster()
        for n in range(4):
            cluster.with_node(a_node(f"n{n}").with_mig().with_gpus(n % 2))
        rankings = Rankings(cluster.ledger)
        request = request_of(asking("3g.20gb"))
        for n in (1, 1, 2, 3, 1):
            ranking = rankings.of(request, "priced-leftovers")
            for row, name in enumerate(rankings.table.names):
                placed = place(cluster.view(name), request)
                assert isinstance(placed, Placement) == bool(ranking.fits()[row])
            cluster.put("3g.20gb", node=f"n{n}")
        # n1 is full, n2 and n3 have lost the room for a 7g already, n0 would lose it
        ranking = rankings.of(request, "priced-leftovers")
        costs = dict(zip(rankings.table.names, ranking.costs().tolist(), strict=False))
        assert float("inf") == costs["n1"]
        assert costs["n2"] == costs["n3"] < costs["n0"]
        spread = rankings.of(request, "spread").costs().tolist()
        assert min(spread) == dict(zip(rankings.table.names, spread, strict=False))["n0"]

    def test_a_gpu_that_claims_more_slices_than_any_has_is_no_place_and_keeps_nobody_from_the_others(self) -> None:
        known: dict[str, Any] = {
            "name": "1g.5gb",
            "profile_id": 19,
            "bytes": 5 * GIB,
            "compute_slices": 1,
            "max_instances": 7,
            "size": 1,
        }
        odd = MIG(profiles=(MIGProfile(**known, starts=(0, 20)),))
        cluster = Cluster().with_node(a_node("odd").with_mig(mig=odd)).with_node(a_node("good").with_mig())
        ranking = Rankings(cluster.ledger)
        # two together are searched for, one is not
        found = ranking.of(request_of(asking("1g.5gb", "1g.5gb")), "binpack").fits()

        assert {"odd": False, "good": True} == {name: bool(found[row]) for name, row in ranking.table.rows.items()}

    def test_room_is_kept_for_what_is_asked_alone(self) -> None:
        # whoever spares empty GPUs for 4g and 7g puts the first 3g to the left of the first 2g, and has no room for the
        # second 3g in the end: 2g lie at 0, 2 and 4, and 3g at 0 and 4
        every, asked = ROOM, Aim(asked=frozenset({"2g.10gb", "3g.20gb"}))
        found = []
        for aim in (every, asked):
            cluster = Cluster().with_node(a_node().with_mig().with_mig())
            order = ("2g.10gb", "3g.20gb", "2g.10gb", "2g.10gb", "3g.20gb")
            found.append([isinstance(cluster.put(profile, aim=aim), Hold) for profile in order])

        assert [[True] * 4 + [False], [True] * 5] == found

    def test_what_is_placed_counts_as_asked(self) -> None:
        cluster = Cluster().with_node(a_node().with_mig())

        assert [("GPU-n-0", "4g.20gb", 0)] == cluster.where("4g.20gb", aim=Aim(asked=frozenset({"1g.5gb"})))

    @pytest.mark.parametrize("waiting", [False, True])
    def test_what_pods_ask_or_wait_for_is_learned(self, *, waiting: bool) -> None:
        cluster = Cluster().with_node(a_node("n0").with_mig())
        judge = Judge(cluster.ledger, NAMES, GIB, "priced-leftovers")
        for n in range(10):
            for profile in ("2g.10gb", "3g.20gb"):
                judge.bound(f"uid-{n}-{profile}", request_of(asking(profile)))
        if waiting:
            cluster.ledger.observe_pod(asking("4g.20gb", name="waits").build())

        judge.learn()

        aim = judge.aim(request_of(asking("2g.10gb")), "n0")
        assert frozenset({"2g.10gb", "3g.20gb", *(["4g.20gb"] if waiting else [])}) == aim.asked

    def test_a_few_pods_tell_nothing_of_what_is_asked(self) -> None:
        cluster = Cluster().with_node(a_node().with_mig())
        judge = Judge(cluster.ledger, NAMES, GIB, "priced-leftovers")
        for n in range(19):
            judge.bound(f"uid-{n}", request_of(asking("2g.10gb")))
        judge.learn()

        assert Aim() == judge.aim(request_of(asking("2g.10gb")), "n")

    def test_what_holds_instances_after_a_restart_is_what_is_asked(self) -> None:
        cluster = Cluster()
        for n in range(10):
            cluster.with_node(a_node(f"n{n}").with_mig())
            cluster.put("1g.5gb", "1g.5gb", node=f"n{n}")
            cluster.put("3g.20gb", node=f"n{n}")
        judge = Judge(cluster.ledger, NAMES, GIB, "priced-leftovers")
        judge.learn()

        assert frozenset({"1g.5gb", "3g.20gb"}) == judge.aim(request_of(asking("2g.10gb")), "n0").asked

    def test_the_least_that_would_help_is_a_smaller_profile_or_a_pod_that_ends(self) -> None:
        cluster = Cluster().with_node(a_node().with_mig())
        for name, profile in (("a", "3g.20gb"), ("b", "2g.10gb")):
            cluster.put(profile, name=name)
        request = request_of(asking("3g.20gb"))
        view = cluster.view()
        told = explain(request, [view], {"n": Reason.NO_MIG_ROOM}, cluster.ledger.holds())
        said = [change.sentence for change in told.changes]
        assert "MIG 2g.10gb fits now on n GPU 0" == said[0]
        assert "it fits on n GPU 0 if default/b (9.6 GiB) ended" == said[1]


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.integers(0, 3), st.lists(st.sampled_from(PROFILES), min_size=1, max_size=3)), max_size=30
    ),
    static=st.booleans(),
)
def test_no_two_slots_ever_overlap_and_a_refusal_has_no_place_left(
    steps: list[tuple[int, list[str]]],
    static: bool,  # noqa: FBT001 - Hypothesis names it
) -> None:
    node = a_node().with_mig().with_mig()
    cluster = Cluster().with_node(node.with_mig(static=["3g.20gb@0", "2g.10gb@4", "1g.5gb@6"]) if static else node)
    for end, profiles in steps:
        if end == 0 and cluster.pods:
            cluster.end(next(iter(cluster.pods)))
        placed = cluster.put(*profiles)
        if isinstance(placed, Reason) and len(profiles) == 1:
            for state in cluster.view().mig:
                if not state.static:
                    assert () == state.geometry.starts(profiles[0], state.taken)
        taken: dict[str, set[int]] = {}
        for hold in cluster.ledger.holds():
            for slot in hold.slots:
                slices = set(range(slot.instance.start, slot.instance.start + slot.instance.size))
                assert not slices & taken.setdefault(slot.uuid, set())
                taken[slot.uuid] |= slices


def test_a_static_gpu_is_shown_with_its_free_instances() -> None:
    cluster = Cluster().with_node(a_node().with_mig(static=["3g.20gb@4", "1g.5gb@0"]))
    (state,) = cluster.view().mig
    assert {an_instance("3g.20gb@4"): 1, an_instance("1g.5gb@0"): 1} == state.free_shares()
    assert board("A100-SXM4-40GB").geometry.slices == state.geometry.slices
