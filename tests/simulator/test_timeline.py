"""Pods come and go, wait while they fit nowhere, and come again when what they ran on is lost."""

from math import inf
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from cotenant.cli.main import main
from cotenant.simulator import document
from cotenant.simulator.document import DocumentError
from cotenant.simulator.scene import Scene, scene
from cotenant.simulator.timeline import Played, Timeline
from cotenant.simulator.times import times_report

Json = dict[str, Any]


def gpus(count: int, memory: str = "10GiB", **more: Any) -> Json:
    return {"model": "A100", "memory": memory, "count": count, **more}


def node(name: str = "n", *cards: Json, **more: Any) -> Json:
    return {"name": name, "cpu": 64, "memory": "256Gi", "gpus": list(cards) or [gpus(1)], **more}


def pod(name: str, units: int, arrival: float = 0, life: float | None = None, **more: Any) -> Json:
    departure = {} if life is None else {"departure": arrival + life}
    return {"name": name, "gpuMem": units, "cpu": 1, "arrival": arrival, **departure, **more}


def a_scene(nodes: list[Json], pods: list[Json], *, afresh: bool = False, **more: Any) -> Scene:
    fields = {"nodes": nodes, "pods": pods, **more}
    return scene(msgspec.convert(fields, document.Document), afresh=afresh)


def played(found: Scene, until: float = 1000, policy: str = "binpack") -> Played:
    timeline = Timeline(found.scheduler(policy), found.mix, found.node)
    return timeline.play(found.jobs, found.losses, residents=found.residents, until=until)


def in_place(found: Scene, nodes: list[str]) -> list[Json]:
    """Give the pods of a scene as a snapshot has them, each placed on the node named."""
    scheduler, pods = found.scheduler("binpack"), []
    for entry, name in zip(found.document.pods, nodes, strict=True):
        scheduler.place(entry.identity, document.request(entry, found.document), frozenset({name}))
        hold = scheduler.ledger.hold(entry.identity)
        assert hold is not None
        placed = msgspec.structs.replace(entry, node=name, grant=hold.grant)
        pods.append(msgspec.to_builtins(placed))
    return pods


def waited(found: Played) -> dict[str, float]:
    return {job.uid.removeprefix("default/"): float(s) for job, s in zip(found.jobs, found.waited, strict=True)}


class TestWaiting:
    def test_a_pod_waits_until_there_is_room(self) -> None:
        found = played(a_scene([node()], [pod("first", 8, 0, 100), pod("second", 8, 30, 100)]))

        assert {"first": 0, "second": 70} == waited(found)

    def test_those_that_came_first_are_tried_first(self) -> None:
        pods = [pod("first", 10, 0, 100), pod("second", 6, 10, 50), pod("third", 6, 20, 50)]
        # second from 100 to 150, then third
        assert {"first": 0, "second": 90, "third": 130} == waited(played(a_scene([node()], pods)))

    def test_a_large_pod_holds_up_no_small_one(self) -> None:
        pods = [pod("first", 6, 0, 100), pod("large", 10, 10, 50), pod("small", 4, 20, 200)]
        # large has the GPU for itself only when small is gone too: 20 + 200 - 10
        assert {"first": 0, "large": 210, "small": 0} == waited(played(a_scene([node()], pods)))

    def test_one_that_never_fits_has_waited_to_the_end(self) -> None:
        found = played(a_scene([node()], [pod("huge", 11, 400)]))

        assert {"huge": 600} == waited(found)
        assert [inf] == found.started.tolist()

    def test_pods_without_gpus_wait_for_cores(self) -> None:
        cores = {"name": "cores", "cpu": 63, "arrival": 0, "departure": 100}
        assert {"cores": 0, "p": 50} == waited(played(a_scene([node()], [cores, pod("p", 1, 50, 10, cpu=2)])))

    def test_a_pod_gets_the_policy_that_it_wishes_for(self) -> None:
        # binpack puts b beside a; spread would have it alone, and c would wait
        pods = [pod("a", 4), pod("b", 4, 1, policy="binpack"), pod("c", 10, 2)]
        assert 0 == waited(played(a_scene([node("n", gpus(2))], pods), policy="spread"))["c"]
        pods = [pod("a", 4), pod("b", 4, 1, policy="spread"), pod("c", 10, 2)]
        assert 998 == waited(played(a_scene([node("n", gpus(2))], pods), policy="binpack"))["c"]

    def test_allocation_is_what_is_held(self) -> None:
        found = played(a_scene([node("n", gpus(2))], [pod("p", 5, 0, 500)]), until=999)

        # 5 of 20 GiB for half of the time
        assert {25.0, 0.0} == set(found.allocated.tolist())
        assert 12.5 == pytest.approx(found.allocated.mean(), abs=0.1)

    def test_the_mean_is_of_all_the_time_and_not_of_moments_that_fall_into_step(self) -> None:
        # ten minutes of each of 400 hours, as a CronJob: the 400 moments are an hour apart and see 10 of 11 of them
        pods = [pod(f"p{n}", 10, 3600 * n, 600) for n in range(400)]
        found = played(a_scene([node()], pods), until=3600 * 399 + 660)

        # 400 times 600 of 1,437,060 s
        assert 16.701 == times_report(found, policy="binpack", seed=0).allocation
        # from the 200th moment on, at 720,331 s and 331 s of the 201st hour: 269 s of that and 199 times 600
        half = times_report(found, policy="binpack", seed=0, since=float(found.at[200])).allocation
        assert 100 * (269 + 199 * 600) / (1_437_060 - 720_331) == pytest.approx(half, abs=0.01)


class TestLosses:
    def test_pods_of_a_lost_node_come_again_and_run_all_of_their_time(self) -> None:
        losses = [{"at": 50, "node": "n"}, {"at": 80, "node": "n", "back": True}]
        found = played(a_scene([node()], [pod("p", 8, 0, 100), pod("q", 8, 170, 100)], events=losses))

        assert 1 == found.restarts
        # p waits for 30 s and runs from 80 to 180; q from then on
        assert {"p": 30, "q": 10} == waited(found)

    def test_a_lost_gpu_takes_its_own_pods_with_it(self) -> None:
        pods = [pod("p", 8, 0), pod("q", 8, 1), pod("r", 8, 2)]
        losses = [{"at": 50, "node": "n", "gpu": 0}, {"at": 90, "node": "n", "gpu": 0, "back": True}]
        found = played(a_scene([node("n", gpus(2))], pods, events=losses))

        assert 1 == found.restarts
        # p was on it, and r has waited longer: it is the first to be tried when the GPU is back
        assert {"p": 950, "q": 0, "r": 88} == waited(found)

    @pytest.mark.parametrize("back", [False, True])
    def test_what_happens_to_a_gpu_of_a_lost_node_brings_no_node_back(self, *, back: bool) -> None:
        losses = [
            {"at": 10, "node": "n"},
            {"at": 20, "node": "n", "gpu": 0, "back": back},
            {"at": 70, "node": "n", "back": True},
        ]
        found = played(a_scene([node("n", gpus(2))], [pod("p", 10, 30)], events=losses))

        assert {"p": 40} == waited(found)

    def test_pods_that_have_a_place_in_a_snapshot_come_again_when_that_is_lost(self) -> None:
        there = [pod("p", 6), pod("q", 6), pod("daemon", 2, owner="DaemonSet/d")]
        snapshot = in_place(a_scene([node("n", gpus(2))], there), ["n", "n", "n"])
        losses = [{"at": 50, "node": "n"}, {"at": 80, "node": "n", "gpu": 0, "back": True}]
        found = played(a_scene([node("n", gpus(2)), node("m")], snapshot, events=losses))

        # m has room for one of them; the daemon's pod belongs to its node
        assert {"p": 0, "q": 950} == waited(found)
        assert 2 == found.restarts

    def test_pods_that_have_a_place_in_a_snapshot_count_as_none_that_came_and_end_when_it_says(self) -> None:
        snapshot = in_place(a_scene([node()], [pod("p", 8, 0, 100), pod("q", 2, 0)]), ["n", "n"])
        found = played(a_scene([node()], [*snapshot, pod("r", 8, 30)]))

        assert {"r": 70} == waited(found)
        # until 100 p and q, then q and r
        assert {100.0} == set(found.allocated.tolist())

    def test_a_node_may_be_lost_twice_and_come_back_with_all_gpus(self) -> None:
        losses = [{"at": at, "node": "n", "back": at in {20, 40}} for at in (10, 20, 30, 40)]
        found = played(a_scene([node()], [pod("p", 10)], events=losses))

        assert {"p": 20} == waited(found)
        assert 2 == found.restarts


class TestDoors:
    """Where a pod may not go it is not placed."""

    def nodes(self, *nodes: Json, **wants: Any) -> set[str]:
        found = a_scene(list(nodes), [pod("p", 1, **wants)])
        scheduler = found.scheduler("binpack")
        (job,) = found.jobs
        fitting = scheduler.fitting(job.request, job.nodes)
        return {name for name, row in scheduler.table.rows.items() if fitting[row]}

    def test_cordoned_nodes_take_nothing_new(self) -> None:
        assert {"b"} == self.nodes(node("a", cordoned=True), node("b"))

    def test_node_selectors_are_kept(self) -> None:
        assert {"b"} == self.nodes(node("a"), node("b", labels={"pool": "x"}), nodeSelector={"pool": "x"})

    def test_taints_keep_off_who_does_not_tolerate_them(self) -> None:
        tainted = (
            node("a", taints=[{"key": "gpu", "value": "yes"}]),
            node("b", taints=[{"key": "k", "effect": "PreferNoSchedule"}]),
        )
        assert {"b"} == self.nodes(*tainted)
        assert {"a", "b"} == self.nodes(*tainted, tolerations=[{"key": "gpu", "value": "yes"}])
        assert {"a", "b"} == self.nodes(*tainted, tolerations=[{"operator": "Exists"}])
        assert {"b"} == self.nodes(*tainted, tolerations=[{"key": "gpu", "value": "no"}])
        assert {"b"} == self.nodes(*tainted, tolerations=[{"key": "gpu", "value": "yes", "effect": "NoExecute"}])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 12), st.integers(1, 2), st.floats(0, 100), st.floats(0, 60)), min_size=1, max_size=25
    ),
    st.lists(st.tuples(st.floats(0, 150), st.sampled_from("ab"), st.sampled_from([None, 0, 1]), st.booleans())),
    st.sampled_from(["priced-leftovers", "fgd", "spread", "binpack/spread"]),
)
def test_nothing_is_overbooked_and_everything_that_can_end_does(
    pods: list[tuple[int, int, float, float]], losses: list[tuple[float, str, int | None, bool]], policy: str
) -> None:
    found = a_scene(
        [node("a", gpus(2)), node("b", gpus(1), gpus(1, "12GiB"))],
        [
            pod(f"p{n}", units * count, arrival, life, gpuCount=count)
            for n, (units, count, arrival, life) in enumerate(pods)
        ],
        events=[
            {"at": at, "node": name, "back": back} | ({} if gpu is None else {"gpu": gpu})
            for at, name, gpu, back in losses
        ],
    )
    done = played(found, until=100_000, policy=policy)

    assert (done.allocated <= 100).all()
    assert (done.waited >= 0).all()
    lost = {view.name for view in found.ledger.views() if len(view.healthy) < 2} | {"a", "b"} - {
        view.name for view in found.ledger.views()
    }
    for job, started in zip(done.jobs, done.started, strict=True):
        units = job.request.containers[0].share_bytes >> 30
        # two GPUs of 12 GiB are on no node, one is on b
        if not lost and units <= (10 if job.request.wishes.gpu_count > 1 else 12):
            assert started < inf
    if not lost:
        # all have come and gone
        assert 0 == done.allocated[-1]
        assert [] == [
            hold for hold in found.ledger.holds() if done.started[[j.uid for j in done.jobs].index(hold.uid)] == inf
        ]


GOOD = {"nodes": [node()], "pods": [pod("p", 8)]}


class TestBadTraces:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            (b"{", "line 1: expected JSON"),
            (b'{"nodes": [],\n\n"pods" }', "line 3: expected JSON"),
            (b"\xff", "expected JSON"),
            ({"version": 2}, "$.version: expected 1, not 2"),
            ({"nodes": []}, "$.nodes: expected at least one node"),
            (b"{}", "$.nodes: expected at least one node"),
            ({"unit": "1000"}, "expected whole MiB, such as 1GiB, not '1000'"),
            ({"nodes": [{"name": "n"}]}, "$.nodes[0]: object missing required field 'cpu'"),
            ({"podz": []}, "$: object contains unknown field 'podz'"),
            ({"nodes": [node(cpu="-4")]}, "$.nodes[0].cpu: expected an amount such as 4, 500m or 16Gi, not '-4'"),
            (
                {"nodes": [node("n", gpus(1, "80 apples"))]},
                "$.nodes[0].gpus[0].memory: expected an amount such as 80GiB",
            ),
            ({"nodes": [node("n", gpus(1, "1MiB"))]}, "$.nodes[0].gpus[0].memory: expected at least one unit"),
            ({"nodes": [node("n", gpus(65))]}, "$.nodes[0].gpus[0].count: expected 'int' <= 64"),
            ({"nodes": [node("n", gpus(40), gpus(40))]}, "$.nodes[0].gpus: expected at most 64 GPUs"),
            (
                {"nodes": [node("n", gpus(2, uuid="GPU-1"))]},
                "$.nodes[0].gpus[0].count: expected 1 for a GPU with a uuid",
            ),
            ({"nodes": [node(), node()]}, "$.nodes[1].name: expected a name that no other node has, not 'n'"),
            ({"pods": [pod("p", -1)]}, "$.pods[0]: container main asks cotenant.io/gpu-mem: -1"),
            (
                {"pods": [pod("p", 1, gpuCount=2)]},
                "$.pods[0]: container main asks cotenant.io/gpu-mem: 1, which does not split",
            ),
            ({"pods": [pod("p", 1, isolation="a lot")]}, "$.pods[0]: cotenant.io/isolation: 'a lot' is none of"),
            ({"pods": [pod("p", 1, cpu="many")]}, "$.pods[0].cpu: expected an amount"),
            ({"pods": [pod("p", 1, -5)]}, "$.pods[0].arrival: expected 'float' >= 0"),
            ({"pods": [pod("p", 1, 5, -1)]}, "$.pods[0].departure: expected no less than its arrival, 5, not 4"),
            ({"pods": [pod("p", 1), pod("p", 1)]}, "$.pods[1].name: expected a name or UID that no other pod has"),
            ({"pods": [pod("p", 1, node="nowhere")]}, "$.pods[0].node: expected the name of a node, not 'nowhere'"),
            ({"pods": [pod("p", 1, containers=[{"name": "c", "gpuMem": 1}])]}, "$.pods[0].gpuMem: expected either"),
            ({"events": [{"at": 1, "node": "m"}]}, "$.events[0].node: expected the name of a node, not 'm'"),
            ({"events": [{"at": 1, "node": "n", "gpu": 1}]}, "$.events[0].gpu: expected the index of a GPU that n has"),
            (
                {"nodes": [node("n", inventory="{bad")], "events": [{"at": 1, "node": "n", "gpu": 0}]},
                "$.events[0].gpu: expected a node whose GPUs can be read: the node's inventory is not versioned JSON",
            ),
        ],
    )
    def test_it_is_refused_by_file_and_place(self, tmp_path: Path, text: bytes | Json, expected: str) -> None:
        path = tmp_path / "trace.json"
        path.write_bytes(text if isinstance(text, bytes) else msgspec.json.encode(GOOD | text))
        with pytest.raises(DocumentError) as refusal:
            document.read(path)

        assert str(refusal.value).startswith(f"{path}, ")
        assert expected in str(refusal.value)

    @given(
        st.binary(max_size=60)
        | st.recursive(st.none() | st.integers() | st.text(max_size=4), st.lists).map(msgspec.json.encode)
    )
    def test_nothing_else_is_ever_raised(self, tmp_path_factory: pytest.TempPathFactory, text: bytes) -> None:
        path = tmp_path_factory.mktemp("any") / "trace.json"
        path.write_bytes(text)
        with pytest.raises(DocumentError):
            document.read(path)

    def test_a_document_survives_being_written_and_read(self, tmp_path: Path) -> None:
        first = msgspec.convert(GOOD | {"events": [{"at": 3, "node": "n", "gpu": 0}]}, document.Document)
        document.write(first, tmp_path / "trace.json")

        assert first == document.read(tmp_path / "trace.json")


class TestCommand:
    def simulate(self, folder: Path, trace: Json, *more: str) -> tuple[int, str]:
        (folder / "trace.json").write_bytes(msgspec.json.encode(trace))
        done = CliRunner().invoke(main, ["simulate", "--trace", str(folder / "trace.json"), "--seed", "1", *more])
        return done.exit_code, done.output

    def test_the_loss_of_a_node_of_a_snapshot_is_played(self, tmp_path: Path) -> None:
        pods = in_place(a_scene([node()], [pod("p", 8)]), ["n"])
        losses = [{"at": 50, "node": "n"}]
        _, output = self.simulate(tmp_path, {"nodes": [node(), node("m")], "pods": pods, "events": losses})

        assert "1 pods in" in output
        assert "1 pod came again after the loss of a node or GPU" in output

    def test_waiting_is_printed_written_and_drawn(self, tmp_path: Path) -> None:
        trace = {"nodes": [node()], "pods": [pod("p", 8, 0, 600), pod("q", 8, 0, 60)]}
        files = "--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.svg")
        status, output = self.simulate(tmp_path, trace, *files)

        assert 0 == status
        # one of two waits for ten minutes
        assert "all pods                         5.00     5.00     9.50     9.90    10.00        0" in output
        written = msgspec.json.decode((tmp_path / "out.json").read_bytes())
        assert 300 == written["waited_s"]["mean"]
        assert "<svg" in (tmp_path / "out.svg").read_text()

    def test_a_pod_that_no_cluster_could_take_is_named(self, tmp_path: Path) -> None:
        bound = pod("odd", 1, gpuCount=2, node="n")
        status, output = self.simulate(tmp_path, {"nodes": [node()], "pods": [bound, pod("p", 1)]})

        assert 0 == status
        assert "default/odd is left out: container main asks cotenant.io/gpu-mem: 1, which does not split" in output

    @pytest.mark.parametrize(
        ("more", "expected"),
        [
            (["--nodes", __file__], "give either --nodes and --pods, or --trace"),
            (["--sequence", __file__], "--sequence goes with --nodes and --pods"),
            (["--ratio", "1.3"], "--ratio goes with --nodes and --pods"),
            (["--policy", "binpack/worst"], "'worst' is none of balanced"),
            (["--strips", "x.svg"], "--strips goes with --nodes and --pods"),
        ],
    )
    def test_options_that_contradict_are_refused(self, tmp_path: Path, more: list[str], expected: str) -> None:
        status, output = self.simulate(tmp_path, GOOD, *more)

        assert 2 == status
        assert expected in output
