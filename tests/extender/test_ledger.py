"""The sharp corners of the ledger, each by itself; the state machine beside this looks for those nobody thought of."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotenant.contract.grant import Grant
from cotenant.contract.reasons import Reason
from cotenant.contract.request import RequestError, parse
from cotenant.contract.units import GIB
from extender.ledger import Hold, Ledger, NodeView, Stage
from extender.placement.fit import choosing
from tests.builders import NAMES, NodeBuilder, PodBuilder, a_grant, a_node, a_pod, granted

EIGHT = a_grant(granted({"GPU-n-0": 8 * GIB}))


@pytest.fixture
def ledger() -> Ledger:
    """A ledger that knows the node n with two GPUs of 10 GiB."""
    ledger = Ledger(NAMES, GIB)
    ledger.observe_node(a_node("n").with_gpus(2, "10GiB").build())
    return ledger


def free(ledger: Ledger, node: str = "n") -> list[int]:
    """Count the GiB free on each GPU."""
    view = ledger.view(node)
    assert view is not None
    return [state.free_bytes // GIB for state in view.gpus]


def choice(pod: PodBuilder) -> Callable[[NodeView], Grant | Reason]:
    request = parse(pod.build(), NAMES, GIB)
    assert request is not None
    return choosing(request)


def assume(ledger: Ledger, pod: PodBuilder, node: str = "n") -> Hold:
    hold = ledger.assume(pod.build().uid, pod.build().key, node, choice(pod))
    assert isinstance(hold, Hold)
    return hold


class TestNodes:
    """A node is as good as its inventory, and its own faults are its alone."""

    @pytest.mark.parametrize(
        ("problem", "node"),
        [
            (Reason.NO_INVENTORY, a_node().with_gpus(1).without_inventory()),
            (Reason.BAD_INVENTORY, a_node().annotated_as("not json")),
            (Reason.BAD_INVENTORY, a_node().annotated_as('{"version":99}')),
            (Reason.BAD_INVENTORY, a_node().annotated_as("")),
            (Reason.UNIT_MISMATCH, a_node().with_gpus(1).counting_in(1 << 20)),
            (Reason.PLUGIN_GONE, a_node().with_gpus(1).not_serving()),
            (Reason.NOT_ADVERTISED, a_node().with_gpus(1).advertising(None)),
            (Reason.NOT_ADVERTISED, a_node().with_gpus(1).advertising("0")),
            (Reason.NOT_ADVERTISED, a_node().with_gpus(1).advertising("-5")),
            (Reason.NOT_ADVERTISED, a_node().with_gpus(1).advertising("some")),
            (None, a_node().with_gpus(1)),
        ],
    )
    def test_a_node_says_what_is_wrong_with_it(self, problem: Reason | None, node: NodeBuilder) -> None:
        ledger = Ledger(NAMES, GIB)

        ledger.observe_node(node.build())

        view = ledger.view("n")
        assert view is not None
        assert problem is view.problem

    def test_one_node_that_cannot_be_read_changes_nothing_for_another(self, ledger: Ledger) -> None:
        ledger.observe_node(a_node("m").annotated_as("{").build())

        assert [10, 10] == free(ledger)

    def test_a_detail_says_more_than_the_reason(self) -> None:
        ledger = Ledger(NAMES, GIB)
        ledger.observe_node(a_node().annotated_as('{"version":99}').build())

        assert "has version 99, but this Cotenant reads version 1" in ledger.views()[0].detail

    def test_an_update_that_says_nothing_of_gpus_changes_no_view(self, ledger: Ledger) -> None:
        before = ledger.view("n")

        ledger.observe_node(a_node("n").with_gpus(2, "10GiB").build())

        assert before is ledger.view("n")

    def test_gpus_of_other_families_are_not_shown(self) -> None:
        ledger = Ledger(NAMES, GIB)
        ledger.observe_node(a_node().with_gpu().with_gpu(family="replicas").build())

        assert ["GPU-n-0"] == [state.gpu.uuid for state in ledger.views()[0].gpus]

    def test_a_gpu_that_shrinks_under_its_pods_has_nothing_free(self, ledger: Ledger) -> None:
        ledger.observe_pod(a_pod().asking(8).bound_to("n", EIGHT).build())

        ledger.observe_node(a_node("n").with_gpus(2, "5GiB").build())

        # 5 - 8 is not -3
        assert [0, 5] == free(ledger)

    def test_a_pod_of_before_the_unit_grew_holds_the_larger_units_that_its_device_ids_are_now(self) -> None:
        ledger = Ledger(NAMES, 2 * GIB)
        ledger.observe_node(a_node("n").with_gpus(2, "10GiB").counting_in(2 * GIB).build())

        ledger.observe_pod(a_pod().asking(3).bound_to("n", a_grant(granted({"GPU-n-0": 3 * GIB}, units=3))).build())

        # 10 - 3 * 2: the kubelet has 5 ids of the GPU, and gives those 3 to nobody else
        assert [4, 10] == free(ledger)

    def test_a_gpu_that_is_lost_and_comes_back_still_carries_its_pods(self, ledger: Ledger) -> None:
        ledger.observe_pod(a_pod().asking(8).bound_to("n", EIGHT).build())

        ledger.observe_node(a_node("n").build())
        assert [] == free(ledger)

        ledger.observe_node(a_node("n").with_gpus(2, "10GiB").build())
        assert [2, 10] == free(ledger)

    def test_a_node_that_is_deleted_and_comes_back_still_carries_its_pods(self, ledger: Ledger) -> None:
        ledger.observe_pod(a_pod().asking(8).bound_to("n", EIGHT).build())

        ledger.node_gone("n")
        assert ledger.view("n") is None

        ledger.observe_node(a_node("n").with_gpus(2, "10GiB").build())
        assert [2, 10] == free(ledger)

    def test_a_node_made_anew_with_other_gpus_gives_those_and_goes_on_counting_what_the_old_ones_carry(
        self, ledger: Ledger
    ) -> None:
        ledger.observe_pod(a_pod().asking(8).bound_to("n", EIGHT).build())

        ledger.node_gone("n")
        others = a_node("n").with_gpu("10GiB", uuid="GPU-x").with_gpu("10GiB", uuid="GPU-y")
        ledger.observe_node(others.build())
        assert [10, 10] == free(ledger)

        # the old ones are put in again before their pod is gone
        ledger.observe_node(others.with_gpus(1, "10GiB", uuid="GPU-n-0").build())
        assert [10, 10, 2] == free(ledger)

    def test_pods_seen_before_their_node_are_counted_once_it_comes(self) -> None:
        ledger = Ledger(NAMES, GIB)
        ledger.observe_pod(a_pod().asking(8).bound_to("n", EIGHT).build())
        assert ledger.view("n") is None

        ledger.observe_node(a_node("n").with_gpus(2, "10GiB").build())

        assert [2, 10] == free(ledger)

    def test_a_list_of_nodes_takes_those_not_in_it_away_but_not_those_it_could_not_read(self, ledger: Ledger) -> None:
        ledger.observe_node(a_node("m").with_gpus(1).build())
        ledger.observe_node(a_node("k").with_gpus(1).build())

        ledger.nodes_replaced({"m", "k"})

        assert {"m", "k"} == {view.name for view in ledger.views()}

    def test_a_gpu_that_grows_under_a_pod_of_its_own_stays_closed(self, ledger: Ledger) -> None:
        alone = a_grant(granted({"GPU-n-0": 10 * GIB}, mode="exclusive"))
        ledger.observe_pod(a_pod().asking(1).wishing(isolation="exclusive").bound_to("n", alone).build())

        ledger.observe_node(a_node("n").with_gpus(2, "12GiB").build())

        # 12 - 10 would let a neighbour in
        assert [0, 12] == free(ledger)

        ledger.pod_gone("uid-of-p")
        assert [12, 12] == free(ledger)


class TestHolds:
    """A pod holds its grant from the moment it is assumed until it is gone or has ended."""

    def test_what_is_assumed_is_not_free(self, ledger: Ledger) -> None:
        hold = assume(ledger, a_pod().asking(8))

        assert Stage.ASSUMED is hold.stage
        assert [2, 10] == free(ledger)

    def test_a_refused_binding_gives_it_back(self, ledger: Ledger) -> None:
        assume(ledger, a_pod().asking(8))

        ledger.forget("uid-of-p")

        assert [10, 10] == free(ledger)

    def test_a_bound_pod_cannot_be_forgotten(self, ledger: Ledger) -> None:
        assume(ledger, a_pod().asking(8))
        ledger.confirm("uid-of-p")

        ledger.forget("uid-of-p")

        assert [2, 10] == free(ledger)

    def test_seeing_it_bound_as_assumed_confirms_it(self, ledger: Ledger) -> None:
        hold = assume(ledger, a_pod().asking(8))

        ledger.observe_pod(a_pod().asking(8).bound_to("n", hold.grant).build())

        assert Stage.BOUND is ledger.holds()[0].stage
        assert [2, 10] == free(ledger)

    def test_an_old_word_that_it_is_unbound_does_not_undo_the_assumption(self, ledger: Ledger) -> None:
        assume(ledger, a_pod().asking(8))

        ledger.observe_pod(a_pod().asking(8).build())

        assert [2, 10] == free(ledger)

    def test_a_pod_seen_bound_without_an_assumption_holds_its_grant(self, ledger: Ledger) -> None:
        ledger.observe_pod(a_pod().asking(8).bound_to("n", EIGHT).build())

        assert [2, 10] == free(ledger)

    def test_a_terminating_pod_still_holds(self, ledger: Ledger) -> None:
        ledger.observe_pod(a_pod().asking(8).bound_to("n", EIGHT).in_phase("Running").terminating().build())

        assert [2, 10] == free(ledger)

    @pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
    def test_a_pod_that_has_ended_holds_nothing(self, ledger: Ledger, phase: str) -> None:
        pod = a_pod().asking(8).bound_to("n", EIGHT)
        ledger.observe_pod(pod.build())

        ledger.observe_pod(pod.in_phase(phase).build())

        assert [10, 10] == free(ledger)

    def test_a_pod_is_its_uid_not_its_name(self, ledger: Ledger) -> None:
        ledger.observe_pod(a_pod().with_uid("old").asking(8).bound_to("n", EIGHT).build())
        ledger.observe_pod(a_pod().with_uid("new").asking(1).build())

        ledger.pod_gone("new")
        assert [2, 10] == free(ledger)

        ledger.pod_gone("old")
        assert [10, 10] == free(ledger)

    def test_a_pod_bound_elsewhere_gives_back_what_was_assumed_here(self, ledger: Ledger) -> None:
        ledger.observe_node(a_node("m").with_gpus(1, "10GiB").build())
        assume(ledger, a_pod().asking(8), "n")

        elsewhere = a_grant(granted({"GPU-m-0": 8 * GIB}))
        ledger.observe_pod(a_pod().asking(8).bound_to("m", elsewhere).build())

        assert [10, 10] == free(ledger, "n")
        assert [2] == free(ledger, "m")

    def test_nothing_is_assumed_for_a_pod_that_holds_already(self, ledger: Ledger) -> None:
        assume(ledger, a_pod().asking(8))

        with pytest.raises(ValueError, match="pod default/p cannot be assumed on n"):
            assume(ledger, a_pod().asking(8))
        assert [2, 10] == free(ledger)

    def test_nothing_is_assumed_on_a_node_that_is_unknown(self, ledger: Ledger) -> None:
        with pytest.raises(ValueError, match="the node is unknown"):
            assume(ledger, a_pod().asking(8), "m")

    def test_a_choice_that_does_not_fit_is_not_taken(self, ledger: Ledger) -> None:
        eleven = a_grant(granted({"GPU-n-0": 11 * GIB}))

        with pytest.raises(ValueError, match="was to get 11811160064 bytes of GPU GPU-n-0, which has 10737418240 free"):
            ledger.assume("u", "default/p", "n", lambda _: eleven)
        assert [10, 10] == free(ledger)

    def test_a_choice_of_a_gpu_that_is_not_there_is_not_taken(self, ledger: Ledger) -> None:
        with pytest.raises(ValueError, match="GPU GPU-x, which has 0 free"):
            ledger.assume("u", "default/p", "n", lambda _: a_grant(granted({"GPU-x": GIB})))

    def test_a_refusal_is_handed_through(self, ledger: Ledger) -> None:
        assert Reason.NO_GPU_FITS is ledger.assume("u", "default/p", "n", lambda _: Reason.NO_GPU_FITS)
        assert [] == ledger.holds()

    def test_what_is_promised_is_neither_held_nor_free(self, ledger: Ledger) -> None:
        ledger.observe_pod(a_pod().named("a").asking(2).bound_to("n", a_grant(granted({"GPU-n-0": 2 * GIB}))).build())

        def amounts() -> list[tuple[int, int, int]]:
            view = ledger.view("n")
            assert view is not None
            return [(s.held_bytes // GIB, s.promised_bytes // GIB, s.free_bytes // GIB) for s in view.gpus]

        ledger.promise("p", "default/p", "n", [], choice(a_pod().asking(7)))
        assert [(2, 7, 1), (0, 0, 10)] == amounts()

        ledger.release("p")
        assert [(2, 0, 8), (0, 0, 10)] == amounts()

    def test_a_pod_that_ends_leaves_its_mps_daemon_to_other_users(self, ledger: Ledger) -> None:
        ledger.observe_node(a_node("n").with_gpus(2, "10GiB").under_mps().build())
        pod = a_pod().asking(8).running_as(1000)

        def served() -> list[tuple[int, frozenset[int]]]:
            view = ledger.view("n")
            assert view is not None
            return [(state.clients, state.users) for state in view.gpus]

        assume(ledger, pod)
        # the daemon of both serves one user
        assert [(1, frozenset({1000})), (0, frozenset({1000}))] == served()

        ledger.pod_gone(pod.build().uid)
        assert [(0, frozenset())] * 2 == served()


class TestDoubt:
    """A Binding without an answer holds on until somebody tells its fate."""

    def test_a_read_that_shows_it_bound_settles_it(self, ledger: Ledger) -> None:
        hold = assume(ledger, a_pod().asking(8))

        ledger.settle(a_pod().asking(8).bound_to("n", hold.grant).build())

        assert Stage.BOUND is ledger.holds()[0].stage

    def test_a_read_that_shows_it_unbound_settles_nothing(self, ledger: Ledger) -> None:
        assume(ledger, a_pod().asking(8))

        ledger.settle(a_pod().asking(8).build())

        assert Stage.ASSUMED is ledger.holds()[0].stage

    def test_a_read_older_than_the_pods_end_brings_nothing_back(self, ledger: Ledger) -> None:
        hold = assume(ledger, a_pod().asking(8))
        ledger.pod_gone("uid-of-p")

        ledger.settle(a_pod().asking(8).bound_to("n", hold.grant).build())

        assert [10, 10] == free(ledger)

    def test_a_read_that_shows_it_bound_no_more_frees_it_unless_it_was_bound_again_since(self, ledger: Ledger) -> None:
        unbound = a_pod().asking(8).build()
        ledger.observe_pod(a_pod().asking(8).bound_to("n", EIGHT).build())
        (first,) = ledger.holds()
        ledger.undo(first, unbound)
        assert [10, 10] == free(ledger)
        assert ledger.waiting("uid-of-p") is not None

        assume(ledger, a_pod().asking(8))
        ledger.confirm("uid-of-p")
        ledger.undo(first, unbound)
        assert [2, 10] == free(ledger)

    def test_an_answer_after_the_pods_end_brings_nothing_back(self, ledger: Ledger) -> None:
        assume(ledger, a_pod().asking(8))
        ledger.pod_gone("uid-of-p")

        ledger.confirm("uid-of-p")

        assert [10, 10] == free(ledger)


class TestLists:
    """A LIST is all there was when it was asked for, and says nothing of what was assumed since."""

    def test_a_pod_missing_from_it_is_gone(self, ledger: Ledger) -> None:
        ledger.observe_pod(a_pod().asking(8).bound_to("n", EIGHT).build())

        ledger.pods_replaced(set(), ledger.mark())

        assert [10, 10] == free(ledger)

    def test_an_assumption_older_than_it_is_gone_with_its_pod(self, ledger: Ledger) -> None:
        assume(ledger, a_pod().asking(8))

        ledger.pods_replaced(set(), ledger.mark())

        assert [10, 10] == free(ledger)

    def test_an_assumption_younger_than_it_stays(self, ledger: Ledger) -> None:
        started = ledger.mark()
        assume(ledger, a_pod().asking(8))

        ledger.pods_replaced(set(), started)

        assert [2, 10] == free(ledger)

    def test_an_assumption_younger_than_it_stays_though_it_was_confirmed_meanwhile(self, ledger: Ledger) -> None:
        started = ledger.mark()
        assume(ledger, a_pod().asking(8))
        ledger.confirm("uid-of-p")

        ledger.pods_replaced(set(), started)

        assert [2, 10] == free(ledger)

    def test_a_hold_that_another_extenders_grant_replaced_stays_as_young_as_it_was(self, ledger: Ledger) -> None:
        started = ledger.mark()
        assume(ledger, a_pod().asking(8))
        other = a_grant(granted({"GPU-n-1": 8 * GIB}))
        ledger.settle(a_pod().asking(8).bound_to("n", other).build())

        ledger.pods_replaced(set(), started)

        assert [10, 2] == free(ledger)

    def test_a_pod_it_could_not_read_keeps_what_it_holds(self, ledger: Ledger) -> None:
        ledger.observe_pod(a_pod().asking(8).bound_to("n", EIGHT).build())

        ledger.pods_replaced({"uid-of-p"}, ledger.mark())

        assert [2, 10] == free(ledger)

    def test_a_waiting_pod_missing_from_it_waits_no_more(self, ledger: Ledger) -> None:
        ledger.observe_pod(a_pod().asking(8).build())
        assert ledger.waiting("uid-of-p") is not None

        ledger.pods_replaced(set(), ledger.mark())

        assert ledger.waiting("uid-of-p") is None


class TestUnreadable:
    """A grant that nobody can read counts as the most it could be, on every GPU of its node and of no other."""

    @pytest.mark.parametrize("text", ["", "not json", '{"version":2}', '{"version":1,"containers":[]}'])
    def test_it_counts_on_every_gpu(self, ledger: Ledger, text: str) -> None:
        ledger.observe_node(a_node("m").with_gpus(1, "10GiB").build())

        ledger.observe_pod(a_pod().asking(3).asking(1).bound_to("n", text).build())

        # 3 + 1 units of one GPU at most, and nobody knows of which
        assert [6, 6] == free(ledger, "n")
        assert [10] == free(ledger, "m")
        assert ledger.holds()[0].problem.startswith("the pod's grant ")

    @pytest.mark.parametrize(
        "pod",
        [
            a_pod().asking(1).wishing(isolation="exclusive"),
            a_pod().asking("lots"),
            a_pod().asking("8", of="nvidia.com/gpumem"),
        ],
    )
    def test_one_that_cannot_be_bounded_closes_the_node(self, ledger: Ledger, pod: PodBuilder) -> None:
        ledger.observe_pod(pod.bound_to("n", "not json").build())

        assert [0, 0] == free(ledger)

    @pytest.mark.parametrize("pod", [a_pod(), a_pod().asking(1, of="nvidia.com/mig-1g.5gb")])
    def test_of_a_pod_that_asks_no_memory_it_takes_nothing_of_mps(self, ledger: Ledger, pod: PodBuilder) -> None:
        # whoever may annotate pods would else close the node's daemons to all other users
        ledger.observe_node(a_node("n").with_gpus(2, "10GiB").under_mps(max_clients=1).build())
        ledger.observe_pod(pod.bound_to("n", "not json").build())

        view = ledger.view("n")
        assert view is not None
        assert [(10 * GIB, 0, frozenset())] * 2 == [(gpu.free_bytes, gpu.clients, gpu.users) for gpu in view.gpus]

    def test_it_is_free_again_once_its_pod_is_gone(self, ledger: Ledger) -> None:
        ledger.observe_pod(a_pod().asking(3).bound_to("n", "not json").build())

        ledger.pod_gone("uid-of-p")

        assert [10, 10] == free(ledger)

    def test_it_is_counted_exactly_once_it_can_be_read(self, ledger: Ledger) -> None:
        ledger.observe_pod(a_pod().asking(8).bound_to("n", "not json").build())

        ledger.observe_pod(a_pod().asking(8).bound_to("n", EIGHT).build())

        assert [2, 10] == free(ledger)


class TestStrangers:
    """Pods that went around the extender are named, and hold nothing."""

    def test_a_pod_bound_without_a_grant_is_named(self, ledger: Ledger) -> None:
        ledger.observe_pod(a_pod().asking(8).bound_to("n").build())

        assert {"uid-of-p": "default/p"} == ledger.ungranted()
        assert [10, 10] == free(ledger)

    def test_a_pod_that_asks_nothing_of_ours_is_not(self, ledger: Ledger) -> None:
        ledger.observe_pod(a_pod().bound_to("n").build())

        assert {} == ledger.ungranted()

    def test_one_that_has_got_a_grant_is_no_stranger_any_more(self, ledger: Ledger) -> None:
        ledger.observe_pod(a_pod().asking(8).bound_to("n").build())

        ledger.observe_pod(a_pod().asking(8).bound_to("n", EIGHT).build())

        assert {} == ledger.ungranted()

    def test_one_whose_bind_a_backup_undid_is_none_and_takes_nothing_of_its_node(self, ledger: Ledger) -> None:
        before = ledger.view("n")
        stranger = a_pod().with_container({NAMES.gpu_mem: "8", "cpu": "4"})
        ledger.observe_pod(stranger.bound_to("n").build())

        ledger.observe_pod(stranger.build())

        assert {} == ledger.ungranted()
        assert before == ledger.view("n")

    def test_one_that_is_gone_is_forgotten(self, ledger: Ledger) -> None:
        ledger.observe_pod(a_pod().asking(8).bound_to("n").build())

        ledger.pod_gone("uid-of-p")

        assert not ledger.is_ungranted("uid-of-p")


class TestWaiting:
    """Pods of ours that are not bound are known with what they ask, right or wrong."""

    def test_a_waiting_pod_is_known_by_what_it_asks(self, ledger: Ledger) -> None:
        ledger.observe_pod(a_pod().asking(8).build())

        waiting = ledger.waiting("uid-of-p")
        assert waiting is not None
        assert not isinstance(waiting.request, RequestError)
        assert 8 == waiting.request.containers[0].units

    def test_a_waiting_pod_whose_request_cannot_be_read_is_known_by_why(self, ledger: Ledger) -> None:
        ledger.observe_pod(a_pod().asking("0").build())

        waiting = ledger.waiting("uid-of-p")
        assert waiting is not None
        assert isinstance(waiting.request, RequestError)

    def test_a_pod_that_asks_nothing_of_ours_is_not_known(self, ledger: Ledger) -> None:
        ledger.observe_pod(a_pod().build())

        assert ledger.waiting("uid-of-p") is None

    def test_a_bound_pod_waits_no_more(self, ledger: Ledger) -> None:
        ledger.observe_pod(a_pod().asking(8).build())

        ledger.observe_pod(a_pod().asking(8).bound_to("n", EIGHT).build())

        assert ledger.waiting("uid-of-p") is None


class TestChanges:
    """Whoever remembers something of nodes is told which of them to look at again."""

    def test_a_node_whose_pods_change_has_changed(self, ledger: Ledger) -> None:
        seen, _ = ledger.changes(0)

        assume(ledger, a_pod().asking(8))

        assert ["n"] == ledger.changes(seen)[1]

    def test_nothing_has_changed_when_nothing_has(self, ledger: Ledger) -> None:
        seen, _ = ledger.changes(0)

        ledger.observe_node(a_node("n").with_gpus(2, "10GiB").build())

        assert (seen, []) == ledger.changes(seen)

    def test_a_node_that_went_has_changed(self, ledger: Ledger) -> None:
        seen, _ = ledger.changes(0)

        ledger.node_gone("n")

        assert ["n"] == ledger.changes(seen)[1]


@given(data=st.data())
def test_events_that_come_twice_or_in_another_order_among_pods_end_in_the_same(data: st.DataObject) -> None:
    """The API server keeps the order of one object's changes, and of no two; a resumed watch may repeat one."""
    two = a_grant(granted({"GPU-n-0": 2 * GIB}))
    bound = {name: a_pod().named(name).asking(2).bound_to("n", two) for name in "abc"}
    stories = {name: [a_pod().named(name).asking(2), pod, pod.in_phase("Running")] for name, pod in bound.items()}
    ended = data.draw(st.sets(st.sampled_from("abc")))
    for name in ended:
        stories[name].append(bound[name].in_phase("Succeeded"))
    ledger = Ledger(NAMES, GIB)
    ledger.observe_node(a_node("n").with_gpus(1, "10GiB").build())

    while any(stories.values()):
        name = data.draw(st.sampled_from([name for name, story in stories.items() if story]))
        pod = stories[name].pop(0)
        for _ in range(data.draw(st.integers(1, 3))):
            ledger.observe_pod(pod.build())

    assert {"abc".index(name) for name in set("abc") - ended} == {"abc".index(h.key[-1]) for h in ledger.holds()}
    assert [10 - 2 * (3 - len(ended))] == free(ledger)
