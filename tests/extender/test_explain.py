"""Why a pod waits: reasons, what is missing, and changes of which each one really makes it fit."""

from typing import Any, Self

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from cotenant.contract.inventory import Foreign, Health
from cotenant.contract.reasons import Reason
from cotenant.contract.request import PodRequest
from cotenant.contract.units import GIB
from extender.inspect import remedies
from extender.inspect.explain import Explanation, NodeVerdict, explain, node_verdict
from extender.inspect.remedies import Change
from extender.ledger import Hold, Ledger
from extender.placement.fit import Placement, choosing, place
from extender.verbs.judge import Judge
from tests.builders import NAMES, NodeBuilder, PodBuilder, a_grant, a_node, a_pod, granted
from tests.steps import steps


class Cluster:
    """A ledger of some nodes and pods, and the pod that is asked about."""

    def __init__(self, *nodes: NodeBuilder) -> None:
        self.ledger = Ledger(NAMES, GIB)
        self._judge = Judge(self.ledger, NAMES, GIB, "best-fit")
        for node in nodes:
            self.ledger.observe_node(node.build())

    def holding(self, name: str, node: str, gpu: int, gib: int, **more: Any) -> Self:
        given = a_grant(granted({f"GPU-{node}-{gpu}": gib * GIB}, **more))
        self.ledger.observe_pod(a_pod().named(name).asking(gib).bound_to(node, given).build())
        return self

    def request(self, pod: PodBuilder) -> PodRequest:
        request = self._judge.request(pod.build())
        assert request is not None
        return request

    def explain(self, pod: PodBuilder) -> Explanation:
        request, views = self.request(pod), self.ledger.views()
        names = [view.name for view in views]
        verdicts = dict(zip(names, self._judge.judge(request, names), strict=True))
        return explain(request, views, verdicts, [*self.ledger.holds(), *self.ledger.promises()])

    def promising(self, pod: PodBuilder, node: str) -> Self:
        request = self.request(pod)
        assert isinstance(self.ledger.promise(pod.build().uid, pod.build().key, node, (), choosing(request)), Hold)
        return self

    def node(self, pod: PodBuilder, name: str) -> NodeVerdict:
        told = {view.name: (view, reason) for view, reason in self.explain(pod).order}
        return node_verdict(*told[name], self.request(pod))

    def changes(self, pod: PodBuilder, kind: str) -> list[str]:
        return [change.sentence for change in self.explain(pod).changes if change.kind == kind]


class TestReasons:
    """Every node and GPU has the reason that filter gives, and how many bytes it lacks."""

    def test_a_gpu_lacks_what_is_asked_less_what_it_has_free(self) -> None:
        cluster = Cluster(a_node("n").with_gpus(2, "10GiB")).holding("a", "n", 0, 6).holding("b", "n", 1, 7)

        verdict = cluster.node(a_pod().asking(5), "n")

        # 10 - 6 = 4 and 10 - 7 = 3 are free
        assert [1 * GIB, 2 * GIB] == [gpu.shortfall_bytes for gpu in verdict.gpus]
        assert [Reason.NO_GPU_FITS] * 2 == [gpu.reason for gpu in verdict.gpus]
        assert (Reason.NO_GPU_FITS, 1 * GIB) == (verdict.reason, verdict.shortfall_bytes)

    def test_what_no_gpu_can_hold_is_told_the_largest_gpu_of_all_nodes(self) -> None:
        cluster = Cluster(a_node("a").with_gpus(2, "10GiB"), a_node("b").with_gpu("10GiB").with_gpu("40GiB"))

        told = cluster.explain(a_pod().asking(50)).reasons

        expected = [(Reason.TOO_LARGE, 2, "b GPU 1 has 40 GiB in all")]
        assert expected == [(one.reason, one.nodes, one.best) for one in told]

    def test_who_calls_a_model_or_profile_by_no_name_of_one_is_told_the_names(self) -> None:
        models = ["T4", "L4", "T4", *(f"X{n}" for n in range(8))]
        cluster = Cluster(*(a_node(f"n{n}").with_gpu(model=model) for n, model in enumerate(models)))
        (told,) = cluster.explain(a_pod().asking(5).wishing(gpu_model="B200")).reasons
        # of ten, the first eight
        assert (Reason.NO_SUCH_GPU, "there are L4, T4, X0, X1, X2, X3, X4, X5, ...") == (told.reason, told.best)

        (told,) = Cluster(a_node("n").with_mig()).explain(a_pod().asking(1, of=NAMES.mig("3g.40gb"))).reasons
        assert Reason.NO_MIG_PROFILE == told.reason
        assert "there are 1g.10gb, 1g.5gb, 1g.5gb.me, 2g.10gb, 3g.20gb, 4g.20gb, 7g.40gb" == told.best

    def test_a_gpu_that_is_closed_or_an_inventory_that_is_bad_is_told_with_what_its_plugin_says(self) -> None:
        fenced = a_node("b").with_gpu(foreign=Foreign(fenced=True, detail="held by another plugin's pod"))
        unwell = a_node("a").with_gpu().with_gpu(health=Health.UNHEALTHY, detail="XID 79")
        cluster = Cluster(unwell, a_node("a2").with_gpu().unhealthy(0), fenced, a_node("c").annotated_as("[]"))
        wish = a_pod().asking(5).wishing(gpu_uuid="GPU-a-1,GPU-a2-0,GPU-b-0")
        expected = {
            (Reason.UNHEALTHY_GPU, 2, "a GPU 1: XID 79"),
            (Reason.FENCED_GPU, 1, "b GPU 0: held by another plugin's pod"),
            (Reason.BAD_INVENTORY, 1, f"c: {cluster.ledger.views()[-1].detail}"),
        }
        told = cluster.explain(wish).reasons
        assert expected == {(one.reason, one.nodes, one.best) for one in told}

    def test_of_a_gpu_that_is_cut_the_profiles_of_its_instances_are_told_not_those_that_it_could_have(self) -> None:
        node = a_node("n").with_mig(static=["1g.5gb@0", "2g.10gb@2"]).with_shares("2g.10gb", 2, renamed=True)
        (told,) = Cluster(node).explain(a_pod().asking(1, of=NAMES.mig("4g.20gb"))).reasons
        assert (Reason.NO_MIG_PROFILE, "there are 1g.5gb, 2g.10gb.shared") == (told.reason, told.best)

    def test_each_gpu_has_a_reason_of_its_own(self) -> None:
        node = a_node("n").with_gpu("4GiB").with_gpu("10GiB").with_gpu("10GiB").unhealthy(1)
        verdict = Cluster(node).holding("a", "n", 2, 6).node(a_pod().asking(5), "n")
        expected = [Reason.TOO_LARGE, Reason.UNHEALTHY_GPU, Reason.NO_GPU_FITS]
        assert expected == [gpu.reason for gpu in verdict.gpus]

    def test_a_gpu_of_another_model_is_not_the_one_wished_for(self) -> None:
        cluster = Cluster(a_node("n").with_gpu(model="Tesla T4"))
        verdict = cluster.node(a_pod().asking(5).wishing(gpu_model="A100"), "n")
        assert [Reason.NO_SUCH_GPU] == [gpu.reason for gpu in verdict.gpus]
        # no freed byte makes a T4 an A100
        assert verdict.shortfall_bytes is None

    def test_each_mig_gpu_has_a_reason_of_its_own(self) -> None:
        node = a_node("n").with_mig().with_mig(static=["1g.5gb@0"])
        node = node.with_mig(static=["3g.20gb@0"]).with_shares("3g.20gb", 2)
        node = node.with_mig(static=["3g.20gb@4"]).with_ill_instances("3g.20gb@4")
        node = node.with_mig().unhealthy(4).with_mig("A30-24GB")
        pod = a_pod().asking(1, of=NAMES.mig("3g.20gb")).wishing(isolation="strict", gpu_model="A100")
        expected = [
            None,
            Reason.NO_MIG_PROFILE,
            Reason.ISOLATION_UNAVAILABLE,
            Reason.NO_MIG_ROOM,
            Reason.UNHEALTHY_GPU,
            Reason.NO_SUCH_GPU,
        ]
        assert expected == [gpu.reason for gpu in Cluster(node).node(pod, "n").gpus]

    def test_a_gpu_that_the_namespace_may_not_have_or_that_limits_nobody_says_so(self) -> None:
        node = (
            a_node("n")
            .with_gpu("8GiB", model="T4")
            .with_gpu("8GiB", model="L4")
            .under_mps()
            .with_gpu("8GiB", model="L4")
        )
        cluster = Cluster(node)
        (view,) = cluster.ledger.views()

        def reasons(pod: PodBuilder) -> list[Reason | None]:
            request = cluster.request(pod)
            request = msgspec.structs.replace(request, wishes=msgspec.structs.replace(request.wishes, within=("L4",)))
            return [gpu.reason for gpu in node_verdict(view, None, request).gpus]

        assert [Reason.NAMESPACE_LIMIT, None, None] == reasons(a_pod().asking(1))
        limited = [Reason.NAMESPACE_LIMIT, None, Reason.ISOLATION_UNAVAILABLE]
        assert limited == reasons(a_pod().asking(1).wishing(isolation="limited"))
        assert [Reason.NO_SUCH_GPU] * 3 == reasons(a_pod().asking(1).wishing(gpu_model="B200"))

    def test_nodes_are_counted_by_reason_and_the_closest_gpu_is_named(self) -> None:
        cluster = Cluster(*(a_node(name).with_gpu("10GiB") for name in "abc"), a_node("cpu").without_inventory())
        cluster.holding("x", "a", 0, 8).holding("y", "b", 0, 6).holding("z", "c", 0, 9)

        first, second = cluster.explain(a_pod().asking(5)).reasons

        assert (Reason.NO_GPU_FITS, 3, "b GPU 0 has 4 GiB free") == (first.reason, first.nodes, first.best)
        assert (Reason.NO_INVENTORY, 1, "") == (second.reason, second.nodes, second.best)

    def test_the_node_that_lacks_least_stands_first_after_those_that_fit(self) -> None:
        cluster = Cluster(*(a_node(name).with_gpu("10GiB") for name in ("far", "near", "free")))
        cluster.holding("x", "far", 0, 9).holding("y", "near", 0, 6)
        order = cluster.explain(a_pod().asking(5)).order
        assert ["free", "near", "far"] == [view.name for view, _ in order]


class TestChanges:
    """Changes that would make the pod fit, the least first."""

    def test_the_most_that_fits_now_is_named_with_its_gpu(self) -> None:
        cluster = Cluster(a_node("n4").with_gpus(2, "10GiB")).holding("a", "n4", 0, 9).holding("b", "n4", 1, 7)
        assert ["3 GiB fit now on n4 GPU 1"] == cluster.changes(a_pod().asking(5), "smaller")

    def test_of_several_gpus_the_one_with_the_least_decides_what_fits(self) -> None:
        cluster = Cluster(a_node("n").with_gpus(3, "10GiB")).holding("a", "n", 0, 8).holding("b", "n", 1, 4)
        # 2, 6 and 10 are free: two GPUs have 6 each
        assert ["2 x 6 GiB fit now on n GPUs 1, 2"] == cluster.changes(
            a_pod().asking(16).wishing(gpu_count=2), "smaller"
        )

    def test_nothing_smaller_is_offered_where_nothing_is_free(self) -> None:
        assert [] == Cluster(a_node("n").with_gpu("10GiB")).holding("a", "n", 0, 10).changes(
            a_pod().asking(5), "smaller"
        )

    def test_the_smallest_pod_whose_end_is_enough_comes_first(self) -> None:
        cluster = Cluster(a_node("n").with_gpus(2, "10GiB"))
        cluster.holding("train-3", "n", 0, 3).holding("big", "n", 0, 6).holding("huge", "n", 1, 9)
        # of GPU 0, 1 GiB is free: 3 more make 4
        ended = cluster.changes(a_pod().asking(4), "ended")
        assert "it fits on n GPU 0 if default/train-3 (3 GiB) ended" == ended[0]

    def test_several_pods_are_named_where_one_is_not_enough(self) -> None:
        cluster = Cluster(a_node("n").with_gpu("10GiB"))
        for name, gib in (("a", 2), ("b", 3), ("c", 5)):
            cluster.holding(name, "n", 0, gib)
        # 5 of c and the smallest that adds 2
        expected = ["it fits on n GPU 0 if default/c (5 GiB) and default/a (2 GiB) ended"]
        assert expected == cluster.changes(a_pod().asking(7), "ended")

    def test_where_others_use_what_pods_hold_as_well_that_must_be_free_before_anything_is(self) -> None:
        cluster = Cluster(a_node("n").with_gpu("10GiB", foreign=Foreign(bytes=3 * GIB)))
        cluster.holding("a", "n", 0, 2).holding("b", "n", 0, 7)
        # of 10 GiB 2 + 7 are held and 3 are others': without a nothing is free, without b 10 - 2 - 3 = 5
        assert ["it fits on n GPU 0 if default/b (7 GiB) ended"] == cluster.changes(a_pod().asking(1), "ended")

    def test_a_gpu_that_others_use_is_nobodys_alone_whatever_pods_end(self) -> None:
        cluster = Cluster(a_node("n").with_gpu("10GiB", foreign=Foreign(bytes=3 * GIB))).holding("a", "n", 0, 2)
        assert [] == cluster.changes(a_pod().asking(1).wishing(isolation="exclusive"), "ended")

    def test_a_pod_that_wants_a_gpu_for_itself_waits_for_all_pods_of_one(self) -> None:
        cluster = Cluster(a_node("n").with_gpus(2, "10GiB"))
        cluster.holding("a", "n", 0, 1).holding("b", "n", 0, 1).holding("c", "n", 1, 5)
        ended = cluster.changes(a_pod().asking(2).wishing(isolation="exclusive"), "ended")
        assert "it fits on n GPU 1 if default/c (5 GiB) ended" == ended[0]

    def test_pods_of_several_containers_are_tried_out(self) -> None:
        cluster = Cluster(a_node("n").with_gpus(2, "10GiB")).holding("a", "n", 0, 5).holding("b", "n", 1, 5)
        # 6 + 6 need both GPUs with 6 free, and each has 5
        ended = cluster.changes(a_pod().asking(6).asking(6), "ended")
        assert ["it fits on n GPUs 0, 1 if default/a (5 GiB) and default/b (5 GiB) ended"] == ended

    def test_to_try_a_pod_out_costs_by_what_it_holds_and_not_by_what_the_node_has(self) -> None:
        pods = 60
        cluster = Cluster(a_node("n").with_gpus(6, "10GiB"))
        for number in range(pods):
            cluster.holding(f"p{number}", "n", number % 6, 1)
        # each is taken away and given back beside the others: 12 lines for each two pods, or 35 if all GPUs count
        assert steps(lambda: cluster.explain(a_pod().asking(10).asking(10)), of=remedies) < 16 * pods * pods

    def test_a_pod_larger_than_any_gpu_waits_for_no_other_pod(self) -> None:
        cluster = Cluster(a_node("n").with_gpu("10GiB")).holding("a", "n", 0, 5)
        assert [] == cluster.changes(a_pod().asking(11), "ended")

    def test_one_larger_than_any_gpu_may_be_split(self) -> None:
        cluster = Cluster(a_node("n").with_gpus(4, "80GiB")).holding("a", "n", 0, 6)
        # 150 / 2 = 75 fit on GPUs 1 to 3, which have 80
        expected = ["2 x 75 GiB fit now on n GPUs 1, 2, with gpu-count: 2"]
        assert expected == cluster.changes(a_pod().asking(150), "split")
        # 255 is odd, and 255 / 3 are more than 80; 4 do not divide it
        assert [] == cluster.changes(a_pod().asking(255), "split")

    def test_where_all_gpus_are_migs_the_smallest_instance_of_as_much_is_named(self) -> None:
        cluster = Cluster(a_node("n").with_mig())
        # 2g.10gb has 9.6 GiB, so the next is 3g.20gb
        assert ["MIG 3g.20gb instead of memory fits now on n GPU 0"] == cluster.changes(a_pod().asking(10), "instance")
        assert [] == cluster.changes(a_pod().asking(10).wishing(isolation="exclusive"), "instance")

    def test_an_unhealthy_gpu_with_room_is_worth_mending(self) -> None:
        cluster = Cluster(a_node("n").with_gpu("10GiB").unhealthy(0))
        (said,) = cluster.changes(a_pod().asking(5), "mended")
        assert f"it fits on n GPU 0 once this is mended: {Reason.UNHEALTHY_GPU.sentence}" == said

    def test_a_node_whose_plugin_has_gone_is_worth_mending(self) -> None:
        (said,) = Cluster(a_node("n").with_gpu().not_serving()).changes(a_pod().asking(5), "mended")
        assert f"it fits on n GPU 0 once this is mended: {Reason.PLUGIN_GONE.sentence}" == said

    def test_a_wish_that_no_gpu_grants_may_be_given_up(self) -> None:
        pod = a_pod().asking(5).wishing(gpu_model="B200")
        (said,) = Cluster(a_node("n").with_gpu()).changes(pod, "wished")
        assert "it fits on n GPU 0 without its gpu-model" == said

    def test_clients_of_mps_that_stand_in_the_way_are_named(self) -> None:
        cluster = Cluster(a_node("n").with_gpus(1, "10GiB").under_mps(max_clients=2))
        for name, gib in (("a", 1), ("b", 2)):
            cluster.holding(name, "n", 0, gib, mode="mps", mps_pipe="/run/mps/n")
        assert [Reason.TOO_MANY_CLIENTS] == [gpu.reason for gpu in cluster.node(a_pod().asking(5), "n").gpus]
        assert ["it fits on n GPU 0 if default/a (1 GiB) ended"] == cluster.changes(a_pod().asking(5), "ended")
        # another user's pod waits for both to end
        both = ["it fits on n GPU 0 if default/a (1 GiB) and default/b (2 GiB) ended"]
        assert both == cluster.changes(a_pod().asking(5).running_as(7), "ended")

    def test_a_gpu_for_itself_waits_for_other_users_of_its_daemon_on_other_gpus_too(self) -> None:
        cluster = Cluster(a_node("n").with_gpus(2, "10GiB").under_mps())
        for name, gpu in (("a", 0), ("b", 1)):
            cluster.holding(name, "n", gpu, 2, mode="mps", mps_pipe="/run/mps/n")
        alone = a_pod().asking(5).wishing(isolation="exclusive")
        assert ["it fits on n GPU 0 if default/a (2 GiB) ended"] == cluster.changes(alone, "ended")
        both = ["it fits on n GPU 0 if default/a (2 GiB) and default/b (2 GiB) ended"]
        assert both == cluster.changes(alone.running_as(7), "ended")

    def test_clients_that_mps_is_promised_to_serve_are_no_pods_that_could_end(self) -> None:
        cluster = Cluster(a_node("n").with_gpus(1, "10GiB").under_mps(max_clients=1)).promising(a_pod().asking(2), "n")
        pod = a_pod().named("next").asking(5)
        assert [Reason.TOO_MANY_CLIENTS] == [gpu.reason for gpu in cluster.node(pod, "n").gpus]
        assert [] == cluster.changes(pod, "ended")

    def test_nothing_is_proposed_for_a_pod_that_fits(self) -> None:
        told = Cluster(a_node("n").with_gpu()).explain(a_pod().asking(5))
        assert (("n",), ()) == (told.fitting, told.changes)


@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    holds=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 12)), max_size=12),
    asked=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    isolation=st.sampled_from(["none", "exclusive"]),
)
def test_every_change_makes_the_pod_fit(
    sizes: list[int], holds: list[tuple[int, int]], asked: list[int], isolation: str
) -> None:
    node = a_node("n")
    for size in sizes:
        node = node.with_gpu(f"{size}GiB")
    cluster, left = Cluster(node), list(sizes)
    for n, (gpu, gib) in enumerate(holds):
        if gpu < len(left) and gib <= left[gpu]:
            left[gpu] -= gib
            cluster.holding(f"p{n}", "n", gpu, gib)
    pod = asking(asked, isolation)
    told = cluster.explain(pod)
    fits = isinstance(place(cluster.ledger.views()[0], cluster.request(pod)), Placement)
    assert fits == (told.fitting == ("n",))
    assert not (fits and told.changes)
    for change in told.changes:
        after = Cluster(node)
        for hold in cluster.ledger.holds():
            if hold.key not in change.pods:
                ((uuid, amount),) = hold.charges.items()
                after.holding(hold.key.removeprefix("default/"), "n", int(uuid[-1]), amount // GIB)
        wanted = cluster.request(changed(change, asked, isolation))
        assert isinstance(place(after.ledger.views()[0], wanted), Placement)


def asking(units: list[int], isolation: str) -> PodBuilder:
    pod = a_pod().named("asking").wishing(isolation=isolation)
    for amount in units:
        pod = pod.asking(amount)
    return pod


def changed(change: Change, asked: list[int], isolation: str) -> PodBuilder:
    if change.kind == "split":
        (units,) = asked
        return asking([units], isolation).wishing(gpu_count=int(change.sentence.split()[-1]))
    if change.kind == "smaller":
        return asking([int(change.sentence.split()[0])], isolation)
    return asking(asked, "none" if change.kind == "wished" else isolation)
