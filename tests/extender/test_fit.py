from collections import Counter
from collections.abc import Sequence
from itertools import combinations, product
from math import inf
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotenant.contract.grant import Grant, Isolation
from cotenant.contract.inventory import Family, Mode
from cotenant.contract.reasons import Reason
from cotenant.contract.request import parse
from cotenant.contract.units import GIB
from extender.ledger import Ledger, NodeView
from extender.placement.fit import Placement, grant, place
from extender.policies import scores
from tests.builders import NAMES, NodeBuilder, PodBuilder, a_grant, a_node, a_pod, granted


def view_of(
    node: NodeBuilder, held: dict[int, int] | None = None, users: dict[int, int | None] | None = None
) -> NodeView:
    """Show a node with so many GiB held of each GPU, by index, under MPS by one pod of that user."""
    ledger = Ledger(NAMES, GIB)
    ledger.observe_node(node.build())
    for index, amount in (held or {}).items():
        mps = node.gpus[index].mode is Mode.MPS
        how: dict[str, Any] = {"mode": "mps", "mps_pipe": node.gpus[index].mps_pipe, "user": (users or {}).get(index)}
        taken = a_grant(granted({f"GPU-{node.name}-{index}": amount * GIB}, **(how if mps else {})))
        ledger.observe_pod(a_pod().named(f"holder-{index}").asking(amount).bound_to(node.name, taken).build())
    view = ledger.view(node.name)
    assert view is not None
    return view


def placed(view: NodeView, pod: PodBuilder) -> Placement | Reason:
    request = parse(pod.build(), NAMES, GIB)
    assert request is not None
    return place(view, request)


def granted_on(view: NodeView, pod: PodBuilder) -> Grant:
    request = parse(pod.build(), NAMES, GIB)
    assert request is not None
    found = place(view, request)
    assert isinstance(found, Placement)
    return grant(request, found)


def gpus_of(view: NodeView, pod: PodBuilder) -> list[list[int]]:
    """Give the indices of the GPUs that each container gets."""
    found = placed(view, pod)
    assert isinstance(found, Placement)
    return [[state.gpu.index for state in states] for states in found.gpus]


def are_served(choice: Sequence[tuple[int, ...]], users: set[int | None], clients: list[int], pod: PodBuilder) -> bool:
    """Tell whether a daemon that serves *users*, so many *clients* on each GPU, takes the pod too: two on each at most.

    *choice* are the GPUs of each container that are the daemon's.
    """
    if any(choice) and users - {dict(pod.spec).get("securityContext", {}).get("runAsUser")}:
        return False
    ordinary = [c.get("restartPolicy") != "Always" for c in pod.init] + [False] * len(pod.main)
    for gpu in {gpu for chosen in choice for gpu in chosen}:
        # an init container here runs before all others, or beside none
        beside = sum(gpu in chosen and not init for init, chosen in zip(ordinary, choice, strict=True))
        if clients[gpu] + max(beside, 1) > 2:
            return False
    return True


def could_fit(
    free: list[int], empty: list[bool], modes: list[str], pod: PodBuilder, *, users: set[int | None], clients: list[int]
) -> bool:
    """Try every way to give each container its GPUs, and see whether one holds the pod."""
    wishes = {key.partition("/")[2]: value for key, value in pod.annotations}
    count = int(wishes.get("gpu-count", 1))
    alone = wishes.get("isolation") in {"exclusive", "strict"}
    amounts = [int(c["resources"]["limits"][NAMES.gpu_mem]) // count for c in (*pod.init, *pod.main)]
    ordinary = [c.get("restartPolicy") != "Always" for c in pod.init]
    whole = alone or any(ordinary)  # a GPU of its own is for the whole pod
    sets = [
        chosen
        for chosen in combinations(range(len(free)), count)
        if len({modes[gpu] for gpu in chosen}) == 1 and (not alone or all(empty[gpu] for gpu in chosen))
    ]
    for choice in product(sets, repeat=len(amounts)):
        if whole and len(set(choice)) > 1:
            continue
        sidecars = [0] * len(free)
        peak = [0] * len(free)
        for n, (amount, chosen) in enumerate(zip(amounts, choice, strict=True)):
            for gpu in chosen:
                if n < len(ordinary) and ordinary[n]:
                    peak[gpu] = max(peak[gpu], sidecars[gpu] + amount)
                else:
                    sidecars[gpu] += amount
        if not are_served([c if modes[c[0]] == "mps" else () for c in choice], users, clients, pod):
            continue
        peak = [max(most, running) for most, running in zip(peak, sidecars, strict=True)]
        if all(most <= left for most, left in zip(peak, free, strict=True)):
            return True
    return False


@st.composite
def pods(draw: st.DrawFn) -> PodBuilder:
    pod = a_pod()
    count = draw(st.sampled_from([1, 1, 2]))
    for amount in draw(st.lists(st.integers(1, 8), min_size=1, max_size=3)):
        pod = pod.asking(amount * count)
    if count == 1:
        for kind in draw(st.lists(st.sampled_from(["init", "sidecar"]), max_size=1)):
            amount = draw(st.integers(1, 8))
            pod = pod.with_init(amount) if kind == "init" else pod.with_sidecar(amount)
    pod = pod.running_as(draw(st.sampled_from([None, 7])))
    return pod.wishing(gpu_count=count, isolation=draw(st.sampled_from(["none", "none", "exclusive"])))


class TestExact:
    """A pod is placed exactly when some choice of GPUs holds it, and then within what is free."""

    @given(
        sizes=st.lists(st.integers(1, 10), min_size=1, max_size=3),
        held=st.lists(st.integers(0, 10), min_size=3, max_size=3),
        mps=st.lists(st.booleans(), min_size=3, max_size=3),
        users=st.lists(st.sampled_from([None, 7]), min_size=3, max_size=3),
        pod=pods(),
    )
    def test_place_agrees_with_trying_everything(
        self, sizes: list[int], held: list[int], mps: list[bool], users: list[int | None], pod: PodBuilder
    ) -> None:
        node = a_node()
        for size, under_mps in zip(sizes, mps, strict=False):
            node = node.with_gpu(
                f"{size}GiB", **({"mode": Mode.MPS, "mps_pipe": "/p", "max_clients": 2} if under_mps else {})
            )
        taken = {n: min(amount, size) for n, (amount, size) in enumerate(zip(held, sizes, strict=False)) if amount}
        view = view_of(node, taken, dict(enumerate(users)))
        # one daemon for all of them, and so one user
        daemon = {users[n] for n in taken if mps[n]}
        clients = [int(n in taken) for n in range(len(sizes))]
        free = [size - taken.get(n, 0) for n, size in enumerate(sizes)]
        modes = [str(gpu.mode) for gpu in node.gpus]

        found = placed(view, pod)

        empty = [n not in taken for n in range(len(sizes))]
        fits = could_fit(free, empty, modes, pod, users=daemon, clients=clients)
        assert fits == isinstance(found, Placement)
        if isinstance(found, Placement):
            left = {f"GPU-n-{n}": amount * GIB for n, amount in enumerate(free)}
            # what the grant charges is what the ledger will hold it to
            charges = granted_on(view, pod).charges()
            assert [] == [uuid for uuid, amount in charges.items() if amount > left[uuid]]


class TestChoice:
    """Of the GPUs that fit, best fit takes the fullest; wishes and modes come before it."""

    def test_the_gpu_that_is_left_with_least_is_taken(self) -> None:
        # 10 - 4 = 6, 10 - 6 = 4, 10 free: 4 is enough for 3 and the tightest
        assert [[1]] == gpus_of(view_of(a_node().with_gpus(3, "10GiB"), {0: 4, 1: 6}), a_pod().asking(3))

    def test_the_lower_index_wins_a_tie(self) -> None:
        assert [[0]] == gpus_of(view_of(a_node().with_gpus(3, "10GiB")), a_pod().asking(3))

    def test_time_slicing_comes_before_mps_even_where_that_fits_worse(self) -> None:
        node = a_node().with_gpu("4GiB").under_mps().with_gpu("10GiB")

        assert [[1]] == gpus_of(view_of(node), a_pod().asking(4))

    def test_an_mps_gpu_is_taken_where_no_other_fits(self) -> None:
        node = a_node().with_gpu("10GiB").under_mps().with_gpu("4GiB")

        assert [[0]] == gpus_of(view_of(node), a_pod().asking(8))

    def test_who_asks_for_limits_gets_mps(self) -> None:
        node = a_node().with_gpu("10GiB").under_mps().with_gpu("10GiB")
        container = granted_on(view_of(node), a_pod().asking(4).wishing(isolation="limited")).containers[0]

        assert ("GPU-n-0", Mode.MPS, "/run/mps/n") == (container.gpus[0].uuid, container.mode, container.mps_pipe)
        assert Isolation.LIMITED is container.isolation.asked is container.isolation.given

    @pytest.mark.parametrize("isolation", ["strict", "exclusive"])
    def test_who_asks_for_more_gets_an_empty_gpu_charged_whole(self, isolation: str) -> None:
        view = view_of(a_node().with_gpus(2, "10GiB"), {0: 1})
        given = granted_on(view, a_pod().asking(4).wishing(isolation=isolation))

        assert {"GPU-n-1": 10 * GIB} == given.charges()
        assert Isolation.EXCLUSIVE is given.containers[0].isolation.given
        assert 4 == given.containers[0].units

    def test_containers_of_a_pod_may_share_the_gpu_that_is_their_pods_alone(self) -> None:
        pod = a_pod().with_init(2).with_sidecar(1).asking(4).asking(3).wishing(isolation="exclusive")
        given = granted_on(view_of(a_node().with_gpus(1, "10GiB")), pod)

        # one GPU for all four containers, charged once: 10, not 4 x 10
        assert {"GPU-n-0": 10 * GIB} == given.charges()

    def test_several_gpus_are_different_gpus(self) -> None:
        view = view_of(a_node().with_gpus(3, "10GiB"), {1: 4})

        # 5 of each of two: the fuller first
        assert [[1, 0]] == gpus_of(view, a_pod().asking(10).wishing(gpu_count=2))

    def test_several_gpus_are_all_of_one_mode_and_one_daemon(self) -> None:
        mixed = a_node().with_gpu("10GiB").with_gpu("10GiB", mode=Mode.MPS, mps_pipe="/a")
        two_daemons = mixed.with_gpu("10GiB", mode=Mode.MPS, mps_pipe="/b")
        pod = a_pod().asking(10).wishing(gpu_count=2)

        assert Reason.MODE_CONFLICT is placed(view_of(mixed), pod)
        # a process has one CUDA_MPS_PIPE_DIRECTORY
        assert Reason.MODE_CONFLICT is placed(view_of(two_daemons), pod)
        assert [[1, 3]] == gpus_of(view_of(two_daemons.with_gpu("10GiB", mode=Mode.MPS, mps_pipe="/a")), pod)

    def test_a_gpu_under_mps_takes_pods_of_one_user(self) -> None:
        view = view_of(a_node().with_gpus(2, "10GiB").under_mps_each(), {0: 4}, {0: 1000})

        # best fit would be GPU 0, which serves user 1000
        assert [[0]] == gpus_of(view, a_pod().asking(4).running_as(1000))
        assert [[1]] == gpus_of(view, a_pod().asking(4).running_as(2000))
        assert [[1]] == gpus_of(view, a_pod().asking(4))

    def test_a_pod_says_under_mps_as_whom_it_runs(self) -> None:
        view = view_of(a_node().with_gpu("10GiB").under_mps())

        assert 1000 == granted_on(view, a_pod().asking(4).running_as(1000)).containers[0].user
        assert granted_on(view, a_pod().asking(4)).containers[0].user is None

    def test_a_pod_with_users_of_its_own_shares_no_daemon(self) -> None:
        apart = a_pod().asking(4).asking(4).running_as(1000).in_a_user_namespace()
        grant = granted_on(view_of(a_node().with_gpu("10GiB").under_mps()), apart)
        (user,) = {container.user for container in grant.containers}

        view = view_of(a_node().with_gpus(2, "10GiB").under_mps_each(), {0: 4}, {0: user})
        assert [[1]] == gpus_of(view, a_pod().asking(4).running_as(1000))
        # whatever it calls its user
        assert [[1]] == gpus_of(view, a_pod().asking(4).running_as(1000).in_a_user_namespace().with_uid("another"))

    def test_a_gpu_for_the_pod_alone_is_reached_through_its_daemon(self) -> None:
        given = granted_on(
            view_of(a_node().with_gpu("10GiB").under_mps()), a_pod().asking(4).wishing(isolation="strict")
        )

        assert (Mode.EXCLUSIVE, "/run/mps/n") == (given.containers[0].mode, given.containers[0].mps_pipe)

    def test_containers_that_must_not_share_a_gpu_are_spread(self) -> None:
        # 6 + 5 > 10
        assert [[0], [1]] == gpus_of(view_of(a_node().with_gpus(2, "10GiB")), a_pod().asking(6).asking(5))

    def test_a_choice_that_looked_best_is_taken_back_where_it_leaves_no_room(self) -> None:
        # best fit would put 4 onto the 5, and then 5 fits nowhere but there
        view = view_of(a_node().with_gpu("5GiB").with_gpu("4GiB"))

        assert [[1], [0]] == gpus_of(view, a_pod().asking(4).asking(5))

    def test_a_pod_whose_init_containers_ask_lies_on_one_gpu(self) -> None:
        view = view_of(a_node().with_gpus(2, "10GiB"), {0: 4})

        # the init container and both main ones: the larger of 2 and 3 + 4 is 7, more than 10 - 4
        assert [[1], [1], [1]] == gpus_of(view, a_pod().with_init(2).asking(3).asking(4))

    def test_a_gpu_of_another_family_is_never_taken_and_the_node_says_so(self) -> None:
        node = a_node().with_gpu("4GiB").with_gpu("10GiB", family=Family.REPLICAS)

        assert [[0]] == gpus_of(view_of(node), a_pod().asking(4))
        assert Reason.TOO_LARGE is placed(view_of(node), a_pod().asking(5))
        assert "GPU 1: family replicas, not counted by memory" == view_of(node).detail

    def test_a_node_without_a_gpu_of_the_memory_family_takes_nothing(self) -> None:
        node = a_node().with_gpus(2, "10GiB", family=Family.REPLICAS)

        assert Reason.NO_SHARED_GPU is placed(view_of(node), a_pod().asking(1))
        assert Reason.NO_SHARED_GPU is placed(view_of(node.advertising("0")), a_pod().asking(1).wishing(gpu_model="H"))

    def test_an_unhealthy_gpu_is_not_taken_however_well_it_fits(self) -> None:
        view = view_of(a_node().with_gpus(2, "10GiB").unhealthy(0), {0: 5})

        assert [[1]] == gpus_of(view, a_pod().asking(5))

    def test_threads_are_capped_as_wished(self) -> None:
        given = granted_on(view_of(a_node().with_gpus(1)), a_pod().asking(1).wishing(compute_percent=30))

        assert 30 == given.containers[0].threads

    @pytest.mark.parametrize("wish", ["h100", "H100", "*h100*", "A100,H100", "nvidia h100 80gb hbm3", "nvidia*hbm?"])
    def test_a_model_is_wished_for_by_part_or_pattern_in_any_case(self, wish: str) -> None:
        node = a_node().with_gpu(model="NVIDIA L4").with_gpu()

        assert [[1]] == gpus_of(view_of(node), a_pod().asking(1).wishing(gpu_model=wish))

    def test_a_uuid_is_wished_for_exactly(self) -> None:
        view = view_of(a_node().with_gpus(12))

        assert [[1]] == gpus_of(view, a_pod().asking(1).wishing(gpu_uuid="GPU-n-1"))


class TestReasons:
    """Each no says what stands in the way."""

    @pytest.mark.parametrize(
        ("reason", "node", "pod"),
        [
            (Reason.NO_INVENTORY, a_node().without_inventory(), a_pod().asking(1)),
            (Reason.PLUGIN_GONE, a_node().with_gpus(1).not_serving(), a_pod().asking(1)),
            (Reason.NO_SHARED_GPU, a_node(), a_pod().asking(1)),
            (Reason.TOO_FEW_GPUS, a_node().with_gpus(1), a_pod().asking(2).wishing(gpu_count=2)),
            (Reason.UNHEALTHY_GPU, a_node().with_gpus(2).unhealthy(0), a_pod().asking(2).wishing(gpu_count=2)),
            (Reason.TOO_FEW_GPUS, a_node().with_gpus(2).unhealthy(0), a_pod().asking(3).wishing(gpu_count=3)),
            (Reason.UNHEALTHY_GPU, a_node().with_gpu("9GiB").with_gpu("5GiB").unhealthy(0), a_pod().asking(6)),
            (Reason.TOO_LARGE, a_node().with_gpu("9GiB").with_gpu("5GiB").unhealthy(1), a_pod().asking(10)),
            (Reason.UNHEALTHY_GPU, a_node().with_gpus(2).unhealthy(0, 1), a_pod().asking(1)),
            (Reason.UNHEALTHY_GPU, a_node().with_gpus(2).unhealthy(0), a_pod().asking(1).wishing(gpu_uuid="GPU-n-0")),
            (Reason.NO_SUCH_GPU, a_node().with_gpus(1), a_pod().asking(1).wishing(gpu_model="B200")),
            (Reason.NO_SUCH_GPU, a_node().with_gpus(1), a_pod().asking(1).wishing(gpu_uuid="GPU-n")),
            (Reason.ISOLATION_UNAVAILABLE, a_node().with_gpus(1), a_pod().asking(1).wishing(isolation="limited")),
            (Reason.TOO_LARGE, a_node().with_gpus(8, "80GiB"), a_pod().asking(81)),
            (Reason.TOO_LARGE, a_node().with_gpus(8, "80GiB"), a_pod().asking(str(1 << 60))),
            (Reason.TOO_LARGE, a_node().with_gpus(1, "9GiB").with_gpu("5GiB"), a_pod().asking(12).wishing(gpu_count=2)),
            (Reason.TOO_LARGE, a_node().with_gpus(8, "80GiB"), a_pod().with_init(1).asking(50).asking(31)),
            (Reason.NO_GPU_FITS, a_node().with_gpus(1, "10GiB"), a_pod().asking(6).asking(5)),
        ],
    )
    def test_an_empty_node_refuses_with_its_reason(self, reason: Reason, node: NodeBuilder, pod: PodBuilder) -> None:
        assert reason is placed(view_of(node), pod)

    def test_mps_serves_no_second_user_and_no_more_clients_than_it_can(self) -> None:
        node = a_node().with_gpus(1, "10GiB").under_mps(max_clients=1)

        assert Reason.MODE_CONFLICT is placed(view_of(node, {0: 1}, {0: 7}), a_pod().asking(1))
        assert Reason.TOO_MANY_CLIENTS is placed(view_of(node, {0: 1}), a_pod().asking(1))
        assert Reason.TOO_MANY_CLIENTS is placed(view_of(node), a_pod().asking(1).asking(1))
        # what is short of memory says so
        assert Reason.NO_GPU_FITS is placed(view_of(node, {0: 9}), a_pod().asking(2))

    def test_enough_in_all_is_not_enough_on_one(self) -> None:
        # 4 + 4 free, 5 wanted
        assert Reason.NO_GPU_FITS is placed(view_of(a_node().with_gpus(2, "10GiB"), {0: 6, 1: 6}), a_pod().asking(5))

    def test_what_a_gpu_holds_when_it_is_empty_is_not_too_large(self) -> None:
        assert Reason.NO_GPU_FITS is placed(view_of(a_node().with_gpus(2, "10GiB"), {0: 1, 1: 1}), a_pod().asking(10))

    def test_a_full_gpu_is_not_for_who_wants_one_alone(self) -> None:
        pod = a_pod().asking(5).wishing(isolation="exclusive")

        assert Reason.NO_EMPTY_GPU is placed(view_of(a_node().with_gpus(1, "10GiB"), {0: 1}), pod)


class TestSearch:
    """The search for many containers ends, so that one pod cannot keep all others waiting."""

    def test_a_pod_made_to_be_searched_for_ever_is_given_up(self) -> None:
        view = view_of(a_node().with_gpus(16, "80GiB"), {n: n + 1 for n in range(16)})
        pod = a_pod().wishing(gpu_count=8)
        for n in range(9):
            pod = pod.asking(8 * (14 - n % 3))

        # 9 containers x 8 GPUs x some 13 GiB = 936 of 16 x 80 - 136 = 1144 GiB: it may fit, in one of endless ways
        assert isinstance(placed(view, pod), Reason | Placement)

    def test_more_than_is_free_in_all_is_not_searched_for(self) -> None:
        view = view_of(a_node().with_gpus(2, "10GiB"))

        # 3 x 7 = 21 > 2 x 10
        assert Reason.NO_GPU_FITS is placed(view, a_pod().asking(7).asking(7).asking(7))

    def test_sixty_four_small_containers_are_placed(self) -> None:
        pod = a_pod()
        for _ in range(64):
            pod = pod.asking(1)

        # 8 x 8 GiB are filled to the last
        found = placed(view_of(a_node().with_gpus(8, "8GiB")), pod)
        assert isinstance(found, Placement)
        # 64 / 8 on each
        assert [8] * 8 == list(Counter(state.gpu.index for (state,) in found.gpus).values())


class TestScores:
    """kube-scheduler reads whole numbers from 0 to 10; the best node alone has 10."""

    @pytest.mark.parametrize(
        ("expected", "costs"),
        [
            ([], []),
            ([10], [5.0]),
            ([10, 10], [5.0, 5.0]),
            ([10, 1], [0.0, 1.0]),
            ([1, 10], [1.0, 0.0]),
            # 9 - 8 x 5/10 = 5
            ([10, 5, 1], [0.0, 5.0, 10.0]),
            ([0], [inf]),
            ([0, 10, 0], [inf, 3.0, inf]),
            # next to the best is not the best
            ([10, 9, 1], [0.0, 0.001, 1e15]),
        ],
    )
    def test_costs_become_scores(self, expected: list[int], costs: list[float]) -> None:
        assert expected == scores(np.array(costs))

    @given(st.lists(st.just(inf) | st.integers(0, 1 << 60).map(float), max_size=50))
    def test_scores_are_whole_in_order_and_in_bounds(self, costs: list[float]) -> None:
        given = scores(np.array(costs))

        assert len(costs) == len(given)
        assert all(type(score) is int and 0 <= score <= 10 for score in given)
        known = sorted((cost, score) for cost, score in zip(costs, given, strict=True) if cost < inf)
        assert [score for _, score in known] == sorted((score for _, score in known), reverse=True)
        assert [cost == known[0][0] for cost, _ in known] == [score == 10 for _, score in known]
        assert all(score == 0 for cost, score in zip(costs, given, strict=True) if cost == inf)
        assert all(score > 0 for _, score in known)
