"""What Prometheus is told: names, values, and that nothing old is told of what has changed."""

import re

from cotenant.contract.reasons import Reason
from cotenant.contract.request import parse
from cotenant.contract.units import GIB
from extender.ledger import Hold, Ledger
from extender.placement.fit import choosing
from tests.builders import NAMES, PodBuilder, a_grant, a_node, a_pod, granted
from tests.extender.scrape import a_ledger, a_metrics, families, text, values

MODEL = (("mode", "time-slicing"), ("model", "NVIDIA H100 80GB HBM3"))


def gpu(node: str, index: int) -> tuple[tuple[str, str], ...]:
    return (("gpu", str(index)), ("node", node), ("uuid", f"GPU-{node}-{index}"))


def assumed(ledger: Ledger, pod: PodBuilder, node: str) -> Hold | Reason:
    """Place a pod on a node, as bind does."""
    request = parse(pod.build(), NAMES, GIB)
    assert request is not None
    return ledger.assume(f"uid-of-{pod.name}", f"default/{pod.name}", node, choosing(request))


class TestNames:
    """Prometheus' own advice: base units, one unit a name, labels that do not stand in the name."""

    def test_every_name_is_ours_in_base_units_and_explained(self) -> None:
        for name, (kind, about, labels) in families(text(a_metrics(a_ledger()))).items():
            assert re.fullmatch(r"cotenant_[a-z_]+", name), name
            assert about.endswith(".")
            assert name.endswith("_total") == (kind == "counter")
            assert not re.search(r"_(ms|millis|mib|gib|percent|minutes)(_|$)", name)
            assert [] == [label for label in labels if f"_by_{label}" in name]

    def test_no_metric_but_one_has_pods_for_labels(self) -> None:
        found = families(text(a_metrics(a_ledger())))
        assert ["cotenant_pod_gpu_memory_bytes"] == [name for name, (_, _, labels) in found.items() if "pod" in labels]

    def test_names_from_the_cluster_are_escaped(self) -> None:
        ledger = a_ledger()
        ledger.observe_node(a_node("odd").with_gpu("10GiB", model='a "b" \\ c').build())
        found = values(text(a_metrics(ledger)))
        assert (
            10.0 * GIB
            == found["cotenant_cluster_memory_capacity_bytes", (("mode", "time-slicing"), ("model", 'a "b" \\ c'))]
        )


class TestValues:
    """The numbers are the ledger's."""

    def test_of_gpus_nodes_and_the_cluster(self) -> None:
        found = values(text(a_metrics(a_ledger())))
        assert 6.0 * GIB == found["cotenant_gpu_memory_allocated_bytes", gpu("n1", 0)]
        assert 0.0 == found["cotenant_gpu_memory_allocated_bytes", gpu("n1", 1)]
        # the plugin of n2 is away
        assert (1.0, 0.0) == (found["cotenant_gpu_health", gpu("n1", 0)], found["cotenant_gpu_health", gpu("n2", 0)])
        assert (3.0, 2.0) == (found["cotenant_cluster_gpus", MODEL], found["cotenant_cluster_gpus_open", MODEL])
        assert 30.0 * GIB == found["cotenant_cluster_memory_capacity_bytes", MODEL]
        assert 10.0 * GIB == found["cotenant_node_largest_free_block_bytes", (("node", "n1"),)]
        assert 1.0 == found["cotenant_nodes", (("problem", "PluginGone"),)]
        assert (
            6.0 * GIB
            == found[
                "cotenant_pod_gpu_memory_bytes",
                (("namespace", "default"), ("node", "n1"), ("pod", "bound"), ("uuid", "GPU-n1-0")),
            ]
        )

    def test_of_mps_and_of_mig(self) -> None:
        found = values(text(a_metrics(a_ledger())))
        clients = [found[f"cotenant_gpu_mps_clients{what}", gpu("mps", 0)] for what in ("", "_limit")]
        assert [1.0, 48.0] == clients
        # a pod holds 3g.20gb of an A100 that is cut once more, and an instance that nobody knows lies on another slice
        ledger = a_ledger()
        ledger.observe_node(a_node("d").with_mig().with_unexplained("1g.5gb@6").build())
        assert isinstance(assumed(ledger, a_pod().named("model").asking("1", of=NAMES.mig("3g.20gb")), "d"), Hold)
        found = values(text(a_metrics(ledger)))
        told = {
            (dict(key)["node"], dict(key)["profile"], dict(key)["state"]): value
            for (name, key), value in found.items()
            if name == "cotenant_mig_instances"
        }
        assert {
            ("cut", "1g.5gb", "unheld"): 1.0,
            ("cut", "3g.20gb", "unheld"): 1.0,
            ("d", "1g.5gb", "unheld"): 1.0,
            ("d", "3g.20gb", "held"): 1.0,
        } == told
        # 8 slices, of which 3g.20gb takes 4 and the other 1; of the static one 4 and 1 can be had
        uuids = {dict(key)["node"]: value for (name, key), value in found.items() if name == "cotenant_mig_slices_free"}
        assert {"d": 3.0, "cut": 5.0} == uuids

    def test_fragmentation_is_the_share_of_pieces_that_pods_like_those_that_run_cannot_use(self) -> None:
        # free: 4 and 10 GiB; one pod of 6 runs, which the 4 are too small for: 4 / 14
        found = values(text(a_metrics(a_ledger())))
        assert abs(4 / 14 - found["cotenant_fragmentation_ratio", ()]) < 1e-5

    def test_of_watches_and_of_pods_that_wait(self) -> None:
        times = iter([100.0] * 3 + [160.0] * 3)
        metrics = a_metrics(a_ledger(), clock=lambda: next(times))
        before, after = values(text(metrics)), values(text(metrics))
        # the watch was heard 10 s before, at 90 of 100 on its clock
        assert 1_000_090.0 == before["cotenant_watch_last_event_timestamp_seconds", (("resource", "pods"),)]
        assert 2.0 == before["cotenant_watch_restarts_total", (("resource", "nodes"),)]
        assert (1.0, 0.0) == (
            before["cotenant_pods_waiting", ()],
            before["cotenant_pods_waiting_longest_seconds", ()],
        )
        assert 60.0 == after["cotenant_pods_waiting_longest_seconds", ()]


class TestScrapes:
    """What is kept between scrapes is never old."""

    def test_a_change_is_told_and_what_is_gone_is_not(self) -> None:
        ledger = a_ledger()
        metrics = a_metrics(ledger)
        first = text(metrics)
        second = values(text(metrics))
        kept = {key: value for key, value in values(first).items() if "scrape" not in key[0]}
        assert kept == {key: value for key, value in second.items() if "scrape" not in key[0]}

        ledger.observe_pod(
            a_pod().named("more").asking(2).bound_to("n1", a_grant(granted({"GPU-n1-1": 2 * GIB}))).build()
        )
        ledger.node_gone("n2")
        ledger.pod_gone("uid-of-bound")
        third = values(text(metrics))
        assert 2.0 * GIB == third["cotenant_gpu_memory_allocated_bytes", gpu("n1", 1)]
        assert 0.0 == third["cotenant_gpu_memory_allocated_bytes", gpu("n1", 0)]
        assert [] == [key for key in third if dict(key[1]).get("node") == "n2" or dict(key[1]).get("pod") == "bound"]

    def test_without_samples_of_gpus_the_sums_are_the_same(self) -> None:
        ledger = a_ledger()
        whole, sums = families(text(a_metrics(ledger))), families(text(a_metrics(ledger, per_gpu=False)))
        assert {name for name, (_, _, labels) in whole.items() if labels & {"uuid"}} == whole.keys() - sums.keys() - {
            "cotenant_gpu_memory_assumed_bytes"
        }
        same = {key for key in values(text(a_metrics(ledger, per_gpu=False))) if "cluster" in key[0]}
        assert all(
            values(text(a_metrics(ledger)))[key] == values(text(a_metrics(ledger, per_gpu=False)))[key] for key in same
        )

    def test_two_nodes_told_apart_are_one_family_each(self) -> None:
        exposed = text(a_metrics(a_ledger()))
        helps = re.findall(r"^# HELP (\S+)", exposed, re.MULTILINE)
        assert sorted(set(helps)) == sorted(helps)
