"""The table, the rankings and the policies: the same answers as node by node, whatever has changed since."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, Self

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotenant.contract.grant import Grant
from cotenant.contract.inventory import Mode
from cotenant.contract.pods import Pod
from cotenant.contract.reasons import Reason
from cotenant.contract.request import RequestError
from cotenant.contract.units import GIB
from extender.ledger import Hold, Ledger, NodeView
from extender.placement.choices import Pool
from extender.placement.fit import Placement, grant, place
from extender.placement.ranking import Rankings
from extender.policies import POLICIES, waste
from extender.policies.fragmentation import Fragmentation
from extender.policies.mix import Mix, PodClass
from extender.policies.table import Table
from extender.verbs.judge import Judge
from tests.builders import NAMES, NodeBuilder, PodBuilder, a_grant, a_node, a_pod, granted, request_of

MIX = Mix.of(
    [PodClass(4000, 1, 250)] * 30
    + [PodClass(2000, 1, 810)] * 20
    + [PodClass(8000, 1, 1000, ("H100",))] * 20
    + [PodClass(16000, 2, 1000)] * 6
    + [PodClass(32000, 4, 1000)] * 4
    + [PodClass(4000, 0, 0)] * 20
)


# one for nodes and GPUs, or one for each
POLICY = st.sampled_from(sorted(POLICIES)) | st.tuples(*2 * [st.sampled_from(sorted(POLICIES))]).map("/".join)


@dataclass
class Cluster:
    """A ledger, and what is asked of it."""

    ledger: Ledger = field(default_factory=lambda: Ledger(NAMES, GIB))

    def with_node(self, node: NodeBuilder) -> Self:
        self.ledger.observe_node(node.build())
        return self

    def holding(self, node: str, gpu: int, gib: int, *, name: str | None = None, **more: Any) -> Self:
        name = name or f"{node}-{gpu}-{gib}"
        grant = a_grant(granted({f"GPU-{node}-{gpu}": gib * GIB}, **more))
        pod = a_pod().named(name).asking(gib).bound_to(node, grant)
        self.ledger.observe_pod(pod.build())
        return self

    def assume(self, pod: PodBuilder, rankings: Rankings, policy: str, node: str) -> list[int]:
        """Place a pod as bind does, and say on which GPUs."""
        request = request_of(pod)
        prefer = rankings.of(request, policy).preference(node)
        found: list[int] = []

        def choose(view: NodeView) -> Grant:
            placed = place(view, request, prefer)
            assert isinstance(placed, Placement)
            found.extend(state.gpu.index for states in placed.gpus for state in states)
            return grant(request, placed)

        built = pod.build()
        assert isinstance(self.ledger.assume(built.uid, built.key, node, choose, request.compute), Hold)
        return found

    def costs(self, pod: PodBuilder, policy: str, mix: Mix = MIX) -> dict[str, float]:
        rankings = Rankings(self.ledger, mix)
        costs = rankings.of(request_of(pod), policy).costs()
        return {name: float(costs[row]) for name, row in rankings.table.rows.items()}


class Failing(Ledger):
    """A ledger with a switch: a node that cannot be shown."""

    _ill = ""

    @contextmanager
    def failing(self, node: str) -> Iterator[None]:
        self._ill = node
        yield
        self._ill = ""

    def view(self, node: str) -> NodeView | None:
        if node == self._ill:
            raise ArithmeticError
        return super().view(node)


class TestCompute:
    """The ledger counts CPU and memory of every pod on a node with GPUs, as kube-scheduler does."""

    def free_milli(self, ledger: Ledger) -> int:
        view = ledger.view("n")
        assert view is not None
        return view.free_compute.cpu_milli

    def ledger(self) -> Ledger:
        # the builder's nodes offer 64 cores
        return Cluster().with_node(a_node().with_gpus(1)).ledger

    def test_a_pod_that_asks_nothing_of_ours_counts_until_it_has_ended(self) -> None:
        ledger = self.ledger()
        pod = a_pod().with_container(None, {"cpu": "1500m", "memory": "2Gi"}).bound_to("n")

        ledger.observe_pod(pod.build())
        assert 62_500 == self.free_milli(ledger)

        ledger.observe_pod(pod.in_phase("Succeeded").build())
        assert 64_000 == self.free_milli(ledger)

    def test_a_pod_resized_in_place_counts_anew(self) -> None:
        ledger = self.ledger()
        ledger.observe_pod(a_pod().with_container(None, {"cpu": 4}).bound_to("n").build())
        ledger.observe_pod(a_pod().with_container(None, {"cpu": 2}).bound_to("n").build())

        assert 62_000 == self.free_milli(ledger)

    def test_a_pod_counts_from_when_it_is_assumed_and_once(self) -> None:
        cluster = Cluster().with_node(a_node().with_gpus(1, "10GiB"))
        pod = a_pod().with_container({NAMES.gpu_mem: 2}, {NAMES.gpu_mem: 2, "cpu": "250m"})
        cluster.assume(pod, Rankings(cluster.ledger), "binpack", "n")
        assert 63_750 == self.free_milli(cluster.ledger)

        hold = cluster.ledger.hold("uid-of-p")
        assert hold is not None
        cluster.ledger.observe_pod(pod.bound_to("n", hold.grant).build())
        assert 63_750 == self.free_milli(cluster.ledger)

        cluster.ledger.pods_replaced(set(), cluster.ledger.mark())
        assert 64_000 == self.free_milli(cluster.ledger)

    def test_pods_seen_before_their_node_count(self) -> None:
        ledger = Ledger(NAMES, GIB)
        ledger.observe_pod(a_pod().with_container(None, {"cpu": 1}).bound_to("n").build())
        ledger.observe_node(a_node().with_gpus(1).build())

        assert 63_000 == self.free_milli(ledger)

    def test_an_overbooked_node_has_nothing_free_rather_than_less(self) -> None:
        ledger = self.ledger()
        ledger.observe_pod(a_pod().with_container(None, {"cpu": 65}).bound_to("n").build())

        assert 0 == self.free_milli(ledger)


class TestTable:
    """Arrays follow the ledger, by what has changed alone."""

    def test_a_gpu_that_nothing_may_be_placed_on_is_as_if_it_were_not_there(self) -> None:
        table = Table(Cluster().with_node(a_node().with_gpus(3, "10GiB").unhealthy(1)).ledger)

        assert [10 * GIB, 0, 10 * GIB] == table.free_bytes[table.rows["n"]].tolist()
        assert [1000, 0, 1000] == table.usable_milli[table.rows["n"]].tolist()

    def test_milli_are_of_the_largest_gpu_also_when_that_comes_later(self) -> None:
        cluster = Cluster().with_node(a_node("small").with_gpus(1, "40GiB"))
        table = Table(cluster.ledger)
        cluster.with_node(a_node("large").with_gpus(1, "80GiB")).holding("large", 0, 20)
        table.refresh()

        assert [500] == table.free_milli[table.rows["small"]].tolist()
        # 80 - 20 of 80
        assert [750] == table.free_milli[table.rows["large"]].tolist()

    def test_the_row_of_a_node_that_is_gone_is_empty_and_then_another_s(self) -> None:
        cluster = Cluster().with_node(a_node("a").with_gpus(1, "10GiB"))
        table = Table(cluster.ledger)
        row = table.rows["a"]

        cluster.ledger.node_gone("a")
        table.refresh()
        assert not table.known[row]
        assert 0 == table.usable_bytes[row].sum()

        cluster.with_node(a_node("b").with_gpus(1, "20GiB"))
        table.refresh()
        assert {"b": row} == table.rows

    def test_nodes_are_found_by_name_whatever_came_and_went_meanwhile(self) -> None:
        cluster = Cluster().with_node(a_node("a").with_gpus(1)).with_node(a_node("b").with_gpus(1))
        table = Table(cluster.ledger)
        assert [table.rows["b"], table.rows["a"]] == table.locate(["b", "a"]).tolist()
        assert [-1, table.rows["a"]] == table.locate(["c", "a"]).tolist()

        cluster.ledger.node_gone("a")
        cluster.with_node(a_node("c").with_gpus(1))
        table.refresh()
        assert [table.rows["c"], -1] == table.locate(["c", "a"]).tolist()

    def test_what_changed_is_named_since_any_version(self) -> None:
        cluster = Cluster().with_node(a_node("a").with_gpus(1)).with_node(a_node("b").with_gpus(1))
        table = Table(cluster.ledger)
        first, row = table.version, table.rows
        cluster.holding("b", 0, 2)
        table.refresh()
        cluster.holding("a", 0, 2)
        table.refresh()

        assert [] == table.changed_since(first + 2).tolist()
        assert [row["a"]] == table.changed_since(first + 1).tolist()
        assert sorted(row.values()) == table.changed_since(first).tolist()

    def test_a_cluster_that_outgrows_its_arrays_keeps_what_they_held(self) -> None:
        cluster = Cluster().with_node(a_node("first").with_gpus(1, "10GiB")).holding("first", 0, 4)
        table = Table(cluster.ledger)
        for n in range(200):
            cluster.with_node(a_node(f"n{n}").with_gpus(2 if n == 150 else 1, "10GiB"))
        table.refresh()

        assert 201 == table.known.sum()
        assert [6 * GIB, 0] == table.free_bytes[table.rows["first"]].tolist()

    @pytest.mark.parametrize(
        ("boast", "problem"),
        [
            (a_node("boast").with_gpu("1PiB"), Reason.BAD_INVENTORY),
            (a_node("boast").with_gpu("10GiB").with_cpu("10P"), None),
            (a_node("boast").without_inventory().with_cpu("10P"), Reason.NO_INVENTORY),
        ],
        ids=["a GPU of 1 PiB", "10 ** 16 cores", "10 ** 16 cores and no GPU"],
    )
    def test_a_node_that_claims_more_than_there_is_changes_nothing_for_the_others(
        self, boast: NodeBuilder, problem: Reason | None
    ) -> None:
        cluster = Cluster().with_node(a_node("full").with_gpu("10GiB")).with_node(a_node("free").with_gpu("10GiB"))
        rankings = Rankings(cluster.ledger, MIX)
        cluster.holding("full", 0, 10).with_node(boast)
        view = cluster.ledger.view("boast")
        assert view is not None
        assert problem == view.problem

        costs = rankings.of(request_of(a_pod().asking(5)), "priced-leftovers").costs()
        assert np.inf == costs[rankings.table.rows["full"]]
        assert np.isfinite(costs[rankings.table.rows["free"]])

    def test_what_could_not_be_taken_over_is_taken_over_the_next_time(self) -> None:
        cluster = Cluster(Failing(NAMES, GIB)).with_node(a_node("full").with_gpu("10GiB")).with_node(a_node("bad"))
        table = Table(cluster.ledger)
        cluster.holding("full", 0, 10).with_node(a_node("bad").with_gpu("10GiB"))
        with cluster.ledger.failing("bad"), pytest.raises(ArithmeticError):  # type: ignore[attr-defined]
            table.refresh()
        table.refresh()

        assert [[0], [10 * GIB]] == table.free_bytes[[table.rows["full"], table.rows["bad"]]].tolist()

    def test_nodes_without_gpus_come_and_go_without_anything_being_ranked_anew(self) -> None:
        cluster = Cluster().with_node(a_node("gpus").with_gpu("10GiB"))
        request = request_of(a_pod().asking(5))
        rankings = Rankings(cluster.ledger, MIX)
        before = rankings.of(request, "priced-leftovers")
        # no larger than the largest, of which tables are made
        for cores in ("48", "32"):
            cluster.with_node(a_node("plain").without_inventory().with_cpu(cores))
            assert before is rankings.of(request, "priced-leftovers")
            assert int(cores) * 1000 == rankings.table.cpu_total[rankings.table.rows["plain"]]
        cluster.ledger.node_gone("plain")
        assert before is rankings.of(request, "priced-leftovers")

        cluster.with_node(a_node("plain").with_gpu("10GiB"))
        assert before is not rankings.of(request, "priced-leftovers")

    def test_nothing_changed_is_nothing_done(self) -> None:
        table = Table(Cluster().with_node(a_node().with_gpus(1)).ledger)
        version = table.version
        table.refresh()

        assert version == table.version
        assert [] == table.changed_since(version).tolist()


GPUS = st.lists(st.tuples(st.sampled_from([8, 10, 16]), st.integers(0, 16)), min_size=0, max_size=4)
PODS = st.one_of(
    st.builds(
        lambda units, isolation: a_pod().asking(units).wishing(isolation=isolation),
        st.integers(1, 17),
        st.sampled_from(["none", "limited", "strict", "exclusive"]),
    ),
    st.builds(
        lambda units, count: a_pod().asking(units * count).wishing(gpu_count=count),
        st.integers(1, 10),
        st.integers(2, 3),
    ),
    st.builds(lambda one, two: a_pod().asking(one).asking(two), st.integers(1, 9), st.integers(1, 9)),
    st.builds(
        lambda units, model: a_pod().asking(units).wishing(gpu_model=model),
        st.integers(1, 9),
        st.sampled_from(["H100", "a100", "T4"]),
    ),
    st.builds(lambda units: a_pod().asking(units).wishing(gpu_uuid="GPU-n0-1,GPU-n1-0"), st.integers(1, 9)),
    st.builds(lambda init, main: a_pod().with_init(init).asking(main), st.integers(1, 9), st.integers(1, 9)),
)


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    cluster = Cluster()
    for n in range(draw(st.integers(1, 4))):
        node = a_node(f"n{n}")
        gpus = draw(GPUS)
        for size, _ in gpus:
            mps = draw(st.booleans())
            pipe = f"/run/{len(node.gpus) % 2}"
            fields = (
                {"mode": Mode.MPS, "mps_pipe": pipe, "max_clients": draw(st.sampled_from([0, 1, 2]))} if mps else {}
            )
            node = node.with_gpu(f"{size}GiB", model=draw(st.sampled_from(["NVIDIA H100", "NVIDIA A100"])), **fields)
        if draw(st.booleans()) and gpus:
            node = node.unhealthy(0)
        cluster.with_node(node)
        for index, (size, held) in enumerate(gpus):
            if 0 < held <= size:
                gpu = node.gpus[index]
                user = draw(st.sampled_from([None, 7])) if gpu.mode is Mode.MPS else None
                cluster.holding(f"n{n}", index, held, mode=str(gpu.mode), mps_pipe=gpu.mps_pipe, user=user)
    return cluster


class TestAgreement:
    """Ranking all nodes at once finds what looking at one after the other finds."""

    @settings(max_examples=200, deadline=None)
    @given(clusters(), PODS, st.sampled_from([None, 7]), POLICY)
    def test_a_node_is_feasible_where_the_fit_says_so(
        self, cluster: Cluster, pod: PodBuilder, user: int | None, policy: str
    ) -> None:
        request = request_of(pod.running_as(user))
        rankings = Rankings(cluster.ledger, MIX)
        ranking = rankings.of(request, policy)
        costs = ranking.costs()
        for name, row in rankings.table.rows.items():
            view = cluster.ledger.view(name)
            assert view is not None
            fits = isinstance(place(view, request), Placement)
            assert fits == bool(ranking.fits()[row])
            assert fits == np.isfinite(costs[row])
            # and what the policy prefers can be had
            assert fits == isinstance(place(view, request, ranking.preference(name)), Placement)

    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, 1 << 32), POLICY)
    def test_what_is_remembered_is_what_would_be_found_anew(self, seed: int, policy: str) -> None:
        random = Random(seed)
        cluster = Cluster()
        for n in range(6):
            cluster.with_node(a_node(f"n{n}").with_gpus(random.randint(1, 4), "20GiB"))
        rankings = Rankings(cluster.ledger, MIX)
        pods = [
            a_pod().asking(5),
            a_pod().asking(20),
            a_pod().asking(40).wishing(gpu_count=2),
            a_pod().asking(3).asking(4),
        ]
        for step in range(25):
            pod = random.choice(pods)
            ranking = rankings.of(request_of(pod), policy)
            kept = {name: ranking.costs()[row] for name, row in rankings.table.rows.items()}
            assert cluster.costs(pod, policy) == pytest.approx(kept)
            fitting = [name for name, cost in kept.items() if cost < np.inf]
            if fitting and random.random() < 0.7:
                cluster.assume(pod.named(f"p{step}"), rankings, policy, random.choice(fitting))
            elif random.random() < 0.5:
                hold = random.choice(cluster.ledger.holds() or [None])
                if hold is not None:
                    cluster.ledger.pod_gone(hold.uid)
            else:
                n = random.randrange(6)
                node = a_node(f"n{n}").with_gpus(random.randint(1, 4), "20GiB")
                cluster.with_node(node.unhealthy(0) if random.random() < 0.5 else node)


class Hurried(Ledger):
    """A ledger that changes right after somebody has asked what has changed."""

    _meanwhile: Callable[[], None] | None = None

    def after_next_look(self, meanwhile: Callable[[], None]) -> None:
        self._meanwhile = meanwhile

    def changes(self, since: int) -> tuple[int, list[str] | None]:
        found = super().changes(since)
        meanwhile, self._meanwhile = self._meanwhile, None
        if meanwhile is not None:
            meanwhile()
        return found


class TestPuttingOff:
    """What happens to nodes that nobody asks about is taken over later, several at a time."""

    def lab(self, nodes: int = 3) -> Cluster:
        cluster = Cluster()
        for n in range(nodes):
            cluster.with_node(a_node(f"n{n}").with_gpus(1, "80GiB"))
        return cluster

    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, 1 << 32), st.sampled_from(sorted(name for name, one in POLICIES.items() if not one.priced)))
    def test_nodes_that_are_asked_about_are_judged_as_they_are_now(self, seed: int, policy: str) -> None:
        random = Random(seed)
        cluster = self.lab(8)
        # what costs are measured by, the largest node, stays: it may be known late
        cluster.with_node(a_node("largest").with_gpus(6, "80GiB"))
        rankings = Rankings(cluster.ledger, MIX)
        for step in range(40):
            # several containers are searched for node by node
            pod = a_pod().asking(random.choice([3, 20, 50]))
            request = request_of(pod if random.random() < 0.6 else pod.asking(2))
            names = random.sample([f"n{n}" for n in range(8)], 3)
            rows = rankings.table.locate(names)
            ranking = rankings.of(request, policy, asked=rows)
            anew = Rankings(cluster.ledger, MIX)
            expected = anew.of(request, policy).costs(anew.table.locate(names))
            assert pytest.approx(expected.tolist()) == ranking.costs(rows).tolist()
            assert np.isfinite(expected).tolist() == ranking.fits(rows).tolist()
            node, what = f"n{random.randrange(8)}", random.random()
            if what < 0.2:
                cluster.with_node(a_node(node).with_gpus(random.randint(1, 6), "80GiB"))
            elif what < 0.7:
                cluster.holding(node, random.randrange(2), random.randint(1, 9), name=f"p{step}")
            elif (hold := random.choice(cluster.ledger.holds() or [None])) is not None:
                cluster.ledger.pod_gone(hold.uid)

    def test_a_node_that_grows_unasked_keeps_nobody_else_from_being_judged(self) -> None:
        cluster = self.lab()
        rankings = Rankings(cluster.ledger, MIX)
        rows = rankings.table.locate(["n0", "n1"])
        cluster.holding("n0", 0, 5).holding("n2", 0, 5)
        rankings.table.refresh(rows)
        # it was taken over with n0, and gets more GPUs than the table has columns since
        cluster.with_node(a_node("n2").with_gpus(4, "80GiB")).holding("n2", 3, 30)

        ranking = rankings.of(request_of(a_pod().asking(20).asking(20)), "binpack", asked=rows)
        # milli: of 80 GiB, 5 + 40 held, and 40
        assert [437, 500] == ranking.costs(rows).tolist()
        assert [True, True] == ranking.fits(rows).tolist()

    @pytest.mark.parametrize("change", ["grows", "comes"])
    def test_all_policies_of_an_answer_go_by_one_moment(self, change: str) -> None:
        ledger = Hurried(NAMES, GIB)
        cluster = Cluster(ledger=ledger)
        for n in range(64):  # as many as the table has rows at first
            cluster.with_node(a_node(f"n{n}").with_gpus(2, "80GiB"))
        rankings, request = Rankings(ledger, MIX), request_of(a_pod().asking(20))
        pools = (Pool((("pool", "x"),), "binpack"),)
        rows = rankings.table.locate(["n0", "n1"])
        rankings.of(request, "fgd", pools, asked=rows).costs(rows)

        def meanwhile() -> None:
            cluster.holding("n0", 0, 37)
            if change == "comes":
                cluster.with_node(a_node("new").with_gpus(2, "80GiB"))

        ledger.after_next_look(meanwhile)
        rankings.of(request, "fgd", pools, asked=rows).costs(rows)
        anew = Rankings(ledger, MIX)
        expected = anew.of(request, "fgd", pools).costs(anew.table.locate(["n0", "n1"]))
        assert expected.tolist() == rankings.of(request, "fgd", pools, asked=rows).costs(rows).tolist()

    # a pod seen bound changes its node twice
    @pytest.mark.parametrize(("left", "changed"), [(8, 4), (0, 5)])
    def test_when_nobody_waits_for_it_many_changes_are_taken_over_and_few_are_left(
        self, left: int, changed: int
    ) -> None:
        cluster, request = self.lab(12), request_of(a_pod().asking(20))
        rankings = Rankings(cluster.ledger, MIX)
        rankings.catch_up()  # nothing has been asked yet
        rows = rankings.table.locate(["n11"])
        rankings.of(request, "binpack", asked=rows).costs(rows)
        for n in range(changed):
            cluster.holding(f"n{n}", 0, 70)
        version = rankings.table.version

        rankings.catch_up()

        assert left == rankings.table.put_off
        assert bool(left) is (version == rankings.table.version)
        # 10 of 80 GiB are left where 70 are held
        first = rankings.table.locate(["n0", "n11"])
        assert [False, True] == rankings.of(request, "binpack", asked=first).fits(first).tolist()

    def test_no_more_than_32_changes_wait(self) -> None:
        cluster = self.lab()
        table = Table(cluster.ledger)
        asked, before = table.locate(["n0", "n1"]), table.version
        # a pod seen bound changes its node twice: in what it takes of its CPU, and of its GPUs
        for n in range(16):
            cluster.holding("n2", 0, 1, name=f"p{n}")
            table.refresh(asked)
            assert before == table.version

        cluster.holding("n2", 0, 1, name="p16")
        table.refresh(asked)
        # 80 - 17 x 1
        assert 63 * GIB == table.free_bytes[table.rows["n2"], 0]

    def test_changes_that_waited_come_with_that_of_a_node_that_is_asked_about(self) -> None:
        cluster = self.lab()
        table = Table(cluster.ledger)
        before = table.version
        cluster.holding("n2", 0, 30).holding("n0", 0, 10)
        table.refresh(table.locate(["n0"]))

        assert [70 * GIB, 50 * GIB] == [table.free_bytes[table.rows[name], 0] for name in ("n0", "n2")]
        assert before + 1 == table.version
        assert sorted([table.rows["n0"], table.rows["n2"]]) == table.latest.tolist()

    def test_a_node_that_comes_is_not_waited_with(self) -> None:
        cluster = self.lab()
        table = Table(cluster.ledger)
        cluster.with_node(a_node("new").with_gpus(1, "80GiB"))
        table.refresh(table.locate(["n0"]))

        assert "new" in table.rows


class TestPolicies:
    """Each policy chooses what its name says."""

    def two_nodes(self) -> Cluster:
        # a: 2 and 10 GiB free of two GPUs; b: 5 free of one
        cluster = Cluster().with_node(a_node("a").with_gpus(2, "10GiB")).with_node(a_node("b").with_gpus(1, "10GiB"))
        return cluster.holding("a", 0, 8).holding("b", 0, 5)

    def best(self, cluster: Cluster, pod: PodBuilder, policy: str) -> tuple[str, list[int]]:
        costs = cluster.costs(pod, policy)
        node = min(costs, key=lambda name: costs[name])
        return node, cluster.assume(pod, Rankings(cluster.ledger, MIX), policy, node)

    def test_binpack_leaves_the_least_behind(self) -> None:
        assert ("a", [0]) == self.best(self.two_nodes(), a_pod().asking(2), "binpack")
        assert ("b", [0]) == self.best(self.two_nodes(), a_pod().asking(3), "binpack")

    def test_binpack_counts_each_gpu_taken_once(self) -> None:
        # milli of 10 GiB: two containers on one GPU leave 10 - 4 - 3 = 3
        one = Cluster().with_node(a_node().with_gpus(1, "10GiB"))
        assert {"n": 300} == one.costs(a_pod().asking(4).asking(3), "binpack")
        # 10 - 4 on each of two
        two = Cluster().with_node(a_node().with_gpus(2, "10GiB"))
        assert {"n": 1200} == two.costs(a_pod().asking(8).wishing(gpu_count=2), "binpack")

    def test_binpack_takes_the_smallest_gpu_for_who_wants_one_alone(self) -> None:
        # milli of 20 GiB: 10 - 2 are 400, 20 - 2 are 900
        both = Cluster().with_node(a_node("a").with_gpu("10GiB")).with_node(a_node("b").with_gpu("20GiB"))
        pod = a_pod().asking(1).asking(1).wishing(isolation="exclusive")
        assert {"a": 400, "b": 900} == both.costs(pod, "binpack")

    def test_spread_takes_the_emptiest(self) -> None:
        assert ("a", [1]) == self.best(self.two_nodes(), a_pod().asking(2), "spread")

    def test_spread_takes_the_smallest_gpu_for_who_wants_one_alone(self) -> None:
        # which is what filter holds to the limit of the pod's namespace: bind would refuse the larger one
        node = Cluster().with_node(a_node("n").with_gpu("20GiB").with_gpu("10GiB"))
        assert ("n", [1]) == self.best(node, a_pod().asking(2).wishing(isolation="exclusive"), "spread")

    def test_packing_leaves_empty_gpus_alone(self) -> None:
        assert ("b", [0]) == self.best(self.two_nodes(), a_pod().asking(3), "packing")

    def test_clustering_keeps_pods_of_a_kind_together(self) -> None:
        cluster = Cluster().with_node(a_node("a").with_gpus(4, "10GiB")).with_node(a_node("b").with_gpus(4, "10GiB"))
        cluster.holding("a", 0, 10).holding("b", 0, 1)

        assert "a" == self.best(cluster, a_pod().named("whole").asking(10), "clustering")[0]
        assert "b" == self.best(cluster, a_pod().named("part").asking(5), "clustering")[0]

    def test_balanced_gives_cpu_heavy_pods_the_node_whose_gpus_are_used(self) -> None:
        cluster = Cluster().with_node(a_node("a").with_gpus(2, "10GiB")).with_node(a_node("b").with_gpus(2, "10GiB"))
        cluster.holding("a", 0, 10)
        pod = a_pod().with_container({NAMES.gpu_mem: 1}, {NAMES.gpu_mem: 1, "cpu": 32})

        assert "a" == self.best(cluster, pod, "balanced")[0]

    @pytest.mark.parametrize("policy", ["fgd", "priced-leftovers"])
    def test_what_leaves_a_sliver_nobody_wants_loses_to_what_fits_exactly(self, policy: str) -> None:
        # of 20 GiB: 250 milli are 5 GiB; node a would keep 4 GiB = 200 milli, which no pod of the mix can use
        cluster = Cluster().with_node(a_node("a").with_gpus(1, "20GiB")).with_node(a_node("b").with_gpus(1, "20GiB"))
        cluster.holding("a", 0, 11).holding("b", 0, 15)

        assert "b" == self.best(cluster, a_pod().asking(5), policy)[0]

    def test_nodes_and_gpus_may_be_chosen_by_different_policies(self) -> None:
        # by nodes spread takes a, which is left with more; on it binpack takes the fuller GPU that fits
        assert ("a", [1]) == self.best(self.two_nodes(), a_pod().asking(2), "spread/spread")
        assert ("a", [0]) == self.best(self.two_nodes().holding("b", 0, 4), a_pod().asking(2), "spread/binpack")
        assert ("b", [0]) == self.best(self.two_nodes(), a_pod().asking(3), "binpack/spread")

    def test_priced_leftovers_keeps_the_model_that_others_insist_on(self) -> None:
        cluster = Cluster()
        for n in range(4):
            model = "NVIDIA H100" if n == 0 else "NVIDIA A100"
            cluster.with_node(a_node(f"n{n}").with_gpus(1, "20GiB", model=model))
        costs = cluster.costs(a_pod().asking(5), "priced-leftovers")

        assert costs["n0"] > max(costs[f"n{n}"] for n in range(1, 4))

    def test_priced_leftovers_keeps_blocks_for_pods_of_several_gpus(self) -> None:
        cluster = Cluster().with_node(a_node("block").with_gpus(4, "20GiB"))
        for n in range(4):
            cluster.with_node(a_node(f"single{n}").with_gpus(1, "20GiB"))
        costs = cluster.costs(a_pod().asking(20), "priced-leftovers")

        assert costs["block"] > costs["single0"]

    def test_priced_leftovers_keeps_small_gpus_empty_for_pods_that_want_one_alone(self) -> None:
        cluster = (
            Cluster().with_node(a_node("small").with_gpus(1, "10GiB")).with_node(a_node("large").with_gpus(1, "80GiB"))
        )
        cluster.holding("large", 0, 40)
        part = a_pod().asking(5)
        alone = [PodClass(0, 1, 1000, alone=True)] * 30
        parts = [PodClass(0, 1, 62)] * 30

        # 5 of 80 GiB are 62 milli: beside others they leave the small one to whom it serves as well as a large one
        costs = cluster.costs(part, "priced-leftovers", Mix.of(alone + parts))
        assert costs["large"] < costs["small"]

    def test_waste_of_a_gpu_of_any_size_is_what_it_was_where_nobody_wants_one_alone(self) -> None:
        assert (waste.of_gpu(MIX)[:201] == waste.of_gpu(MIX, 200)).all()

    def test_a_virtual_node_of_a_million_cores_is_tabulated_as_one_of_512(self) -> None:
        large, plain = (waste.of_node(MIX, most_milli=2000, most_cpu=cpu) for cpu in (10**9, 512_000))
        milli, cpu = np.array([0, 700, 2000, 2000]), np.array([0, 64_000, 511_000, 10**9])

        assert plain(milli, cpu).tolist() == large(milli, cpu).tolist()

    def test_an_empty_gpu_is_wasted_less_the_more_want_one_alone(self) -> None:
        shares = [PodClass(0, 1, 300)] * 50
        wasted = [waste.of_gpu(Mix.of(shares + [PodClass(0, 1, 1000, alone=True)] * n), 200)[200] for n in (0, 10, 50)]

        # nobody can use 200 milli but those
        assert 200 == wasted[0] > wasted[1] > wasted[2] > 0

    @pytest.mark.parametrize("policy", POLICIES)
    @pytest.mark.parametrize(
        "pod_class",
        [
            PodClass(0, 0, 0),
            PodClass(0, 1, 300),
            PodClass(0, 1, 1000, alone=True),
            PodClass(1000, 2, 1000, ("B200",)),
            PodClass(1, 64, 1000),
        ],
    )
    def test_a_mix_of_one_class_is_as_good_as_any(self, policy: str, pod_class: PodClass) -> None:
        costs = self.two_nodes().costs(a_pod().asking(2), policy, Mix.of([pod_class] * 50))

        assert np.isfinite(list(costs.values())).all()

    @pytest.mark.parametrize("policy", ["fgd", "priced-leftovers"])
    def test_before_any_pod_has_taught_a_mix_nodes_are_packed(self, policy: str) -> None:
        cluster = self.two_nodes()
        assert cluster.costs(a_pod().asking(2), "binpack") == cluster.costs(a_pod().asking(2), policy, Mix())


class TestFragmentation:
    """F of a node, against its definition spelled out."""

    @settings(max_examples=100, deadline=None)
    @given(
        st.lists(
            st.tuples(
                st.lists(st.integers(0, 1000), min_size=4, max_size=4), st.integers(0, 64_000), st.integers(0, 1)
            ),
            min_size=1,
            max_size=6,
        )
    )
    def test_it_is_what_the_next_typical_pod_could_not_use(self, nodes: list[tuple[list[int], int, int]]) -> None:
        cluster = Cluster().with_node(a_node("a").with_gpus(4)).with_node(a_node("b").with_gpus(1, model="A100"))
        table = Table(cluster.ledger)
        expected = []
        for free, cpu, model in nodes:
            total = 0.0
            for pod, frequency in MIX.typical:
                fits = pod.gpus and cpu >= pod.cpu_milli and sum(f >= pod.share_milli for f in free) >= pod.gpus
                fits = fits and (not pod.models or "H100" in table.models[model])
                total += frequency * (sum(f for f in free if f < pod.share_milli) if fits else sum(free))
            expected.append(total)

        found = Fragmentation(MIX, table).of(
            np.array([free for free, _, _ in nodes]),
            np.array([c for _, c, _ in nodes]),
            np.array([m for _, _, m in nodes]),
        )
        assert expected == pytest.approx(found.tolist())

    def test_one_node_alone_counts_to_the_last_bit_as_among_others(self) -> None:
        table = Table(Cluster().with_node(a_node().with_gpus(4)).ledger)
        fragmentation = Fragmentation(MIX, table)
        free, cpu, model = np.array([[930, 810, 190, 0]] * 9), np.array([5000] * 9), np.array([0] * 9)

        assert fragmentation.of(free, cpu, model)[0] == fragmentation.of(free[:1], cpu[:1], model[:1])[0]


class TestTypicalPods:
    """FGD goes by the most frequent classes that are 95 of 100 pods."""

    def test_rare_classes_do_not_count(self) -> None:
        mix = Mix.of([PodClass(1, 1, 500)] * 90 + [PodClass(1, 1, 400)] * 6 + [PodClass(1, 1, 300)] * 4)

        # 90 + 6 = 96 of 100
        assert [500, 400] == [pod.share_milli for pod, _ in mix.typical]
        assert 1 == pytest.approx(sum(frequency for _, frequency in mix.typical))

    def test_it_does_not_matter_in_which_order_pods_came(self) -> None:
        whole, alone = PodClass(1, 1, 1000), PodClass(1, 1, 1000, alone=True)
        assert Mix.of([whole, alone]) == Mix.of([alone, whole])

    def test_no_pods_are_no_mix(self) -> None:
        assert () == Mix().typical


class TestReasons:
    """Why a node does not fit is the fit's to say, as the node is now."""

    def verdict(self, judge: Judge, pod: PodBuilder, node: str = "n") -> float | Reason:
        (verdict,) = judge.judge(request_of(pod), [node])
        return verdict

    def test_a_reason_lasts_until_its_node_changes(self) -> None:
        cluster = Cluster().with_node(a_node().with_gpus(1, "10GiB")).holding("n", 0, 9, name="tenant")
        judge = Judge(cluster.ledger, NAMES, GIB, "priced-leftovers")

        assert [Reason.NO_GPU_FITS] * 2 == [self.verdict(judge, a_pod().asking(5)) for _ in range(2)]
        cluster.with_node(a_node().with_gpus(1, "10GiB").unhealthy(0))
        assert Reason.UNHEALTHY_GPU is self.verdict(judge, a_pod().asking(5))
        cluster.ledger.node_gone("n")
        assert Reason.UNKNOWN_NODE is self.verdict(judge, a_pod().asking(5))
        cluster.ledger.pod_gone("uid-of-tenant")
        cluster.with_node(a_node().with_gpus(1, "10GiB"))
        assert isinstance(self.verdict(judge, a_pod().asking(5)), float)

    def test_a_node_without_a_row_is_nobody_elses(self) -> None:
        # several containers are searched for node by node, by the row's name
        cluster = Cluster().with_node(a_node("a").with_gpus(1, "10GiB")).with_node(a_node("b").with_gpus(1, "10GiB"))
        judge = Judge(cluster.ledger, NAMES, GIB, "binpack")
        pod = a_pod().asking(5).asking(4)

        assert Reason.UNKNOWN_NODE is self.verdict(judge, pod, "none")
        assert isinstance(self.verdict(judge, pod, "b"), float)
        cluster.holding("b", 0, 9)
        assert [Reason.UNKNOWN_NODE, Reason.NO_GPU_FITS] == judge.judge(request_of(pod), ["none", "b"])

    def test_nodes_are_judged_in_the_order_asked_for(self) -> None:
        cluster = Cluster().with_node(a_node("a").with_gpus(1, "10GiB")).with_node(a_node("b").with_gpus(1, "10GiB"))
        cluster.holding("a", 0, 9)
        judge = Judge(cluster.ledger, NAMES, GIB, "binpack")

        names = ["b", "none", "a", "b"]
        # milli: 10 - 5 of 10
        assert [500, Reason.UNKNOWN_NODE, Reason.NO_GPU_FITS, 500] == judge.judge(request_of(a_pod().asking(5)), names)


class TestRequests:
    """What a pod asks is read once for each version of it."""

    def judge(self, *, version: str) -> Judge:
        ledger = Ledger(NAMES, GIB)
        ledger.observe_pod(self.pod(5, version=version))
        return Judge(ledger, NAMES, GIB, "binpack")

    def pod(self, units: int | str, *, version: str | None) -> Pod:
        return replace(a_pod().asking(units), metadata=(("resourceVersion", version),)).build()

    def asked(self, judge: Judge, pod: Pod) -> int:
        request = judge.request(pod)
        assert request is not None
        return request.containers[0].share_bytes

    def test_the_version_that_the_watch_has_brought_asks_what_it_asked_there(self) -> None:
        judge = self.judge(version="7")

        assert 5 * GIB == self.asked(judge, self.pod(5, version="7"))
        # nobody can say of an object that it is that version, and ask more
        assert 5 * GIB == self.asked(judge, self.pod(9, version="7"))

    @pytest.mark.parametrize("version", ["8", None])
    def test_another_version_is_read_itself(self, version: str | None) -> None:
        assert 9 * GIB == self.asked(self.judge(version="7"), self.pod(9, version=version))

    def test_what_cannot_be_met_is_no_more_so_the_second_time(self) -> None:
        ledger, bad = Ledger(NAMES, GIB), self.pod("1.5", version="8")
        ledger.observe_pod(bad)
        judge = Judge(ledger, NAMES, GIB, "binpack")

        raised = []
        for _ in range(2):
            with pytest.raises(RequestError) as caught:
                judge.request(bad)
            raised.append(caught.value)
        assert str(raised[0]) == str(raised[1])
        assert raised[0].reason is raised[1].reason
        # one object raised for ever would keep the frames of every filter
        assert raised[0] is not raised[1]
