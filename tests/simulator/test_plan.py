"""Plans: what still fits, the largest that does, how many nodes, and which pods to move and which never."""

import itertools
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from cotenant.cli.main import main
from cotenant.contract import inventory as inventories
from cotenant.contract.inventory import GPU, MIG, Family, Foreign, Health, Inventory, Mode
from cotenant.contract.units import GIB
from cotenant.simulator import document
from cotenant.simulator import moves as moves_of_pods
from cotenant.simulator.capacity import Largest, largest
from cotenant.simulator.document import Asking, Document, GPUEntry, NodeEntry, PodEntry
from cotenant.simulator.moves import MovePlan, Planner
from cotenant.simulator.scene import Scene, scene
from extender.placement.fit import Placement, grant, place
from tests.steps import steps


def a_node(name: str, *sizes: int, **more: Any) -> NodeEntry:
    gpus = tuple(GPUEntry(model=f"GPU-{size}", memory=size * GIB) for size in sizes)
    return NodeEntry(name=name, cpu=64, memory="256Gi", gpus=gpus, **more)


def a_pod(name: str, units: int, *, on: tuple[str, int] | None = None, **more: Any) -> PodEntry:
    """A pod that a ReplicaSet would make anew, on a GPU of a node where that is said."""
    entry = PodEntry(
        name=name,
        uid=f"uid-{name}",
        cpu=1,
        containers=(Asking(name="main", gpu_mem=units),),
        **{"owner": "ReplicaSet/r", **more},
    )
    if on is None:
        return entry
    node, gpu = on
    asked = document.request(msgspec.structs.replace(entry, uuids=()), Document())
    view = scene(Document(nodes=(a_node(node, *[79] * 8),))).ledger.view(node)
    assert view is not None
    placed = place(view, asked, lambda state, _: float(abs(state.gpu.index - gpu)))
    assert isinstance(placed, Placement)
    text = msgspec.json.encode({"version": 1} | msgspec.to_builtins(grant(asked, placed))).decode()
    return msgspec.structs.replace(entry, node=node, grant=text)


def a_gpu(index: int, **more: Any) -> GPU:
    """A GPU of 10 GiB as a device plugin tells of it."""
    return GPU(uuid=f"GPU-{index}", index=index, model="A", total_bytes=10 * GIB, usable_bytes=10 * GIB, **more)


def a_scene(nodes: list[NodeEntry], pods: list[PodEntry], **more: Any) -> Scene:
    return scene(Document(nodes=tuple(nodes), pods=tuple(pods), **more))


def moves(found: Scene, *, most: int = 10, priority: int = 0) -> MovePlan:
    return Planner(found, found.scheduler("binpack"), priority=priority).defragment(most=most)


def new(units: int, count: int = 1, *models: str) -> PodEntry:
    return PodEntry(name="new", containers=(Asking(name="c", gpu_mem=units),), gpu_count=count, models=models)


def room(found: Scene, units: int, *, count: int = 1, most: int = 10, priority: int = 0, **more: Any) -> MovePlan:
    entry = msgspec.structs.replace(new(units, count), **more)
    asked = document.request(entry, found.document)
    return Planner(found, found.scheduler("binpack"), priority=priority).make_room(asked, None, most=most)


class TestLargest:
    def test_it_is_told_by_model_and_number_of_gpus(self) -> None:
        found = a_scene(
            [a_node("a", 10, 10), a_node("b", 10, 40)], [a_pod("p", 3, on=("a", 0)), a_pod("q", 1, on=("b", 1))]
        )

        # two of 10 GiB together are on a alone, of which one has 7 left
        assert [
            Largest("GPU-10", 1, 10 * GIB, "a"),
            Largest("GPU-10", 2, 7 * GIB, "a"),
            Largest("GPU-40", 1, 39 * GIB, "b"),
        ] == largest(found.ledger, unit_bytes=GIB)

    def test_closed_nodes_do_not_count(self) -> None:
        found = a_scene([a_node("a", 10), a_node("b", 5)], [])

        assert {"GPU-5"} == {one.model for one in largest(found.ledger, unit_bytes=GIB, closed={"a"})}

    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.lists(st.tuples(st.integers(1, 12), st.integers(0, 12)), min_size=1, max_size=5), max_size=4))
    def test_it_fits_and_one_unit_more_does_not(self, nodes: list[list[tuple[int, int]]]) -> None:
        sizes = [
            (n, gpu, size, min(size, held)) for n, node in enumerate(nodes) for gpu, (size, held) in enumerate(node)
        ]
        entries = [a_node(f"n{n}", *(size + 20 for size, _ in gpus)) for n, gpus in enumerate(nodes)]
        held = [(n, gpu, min(size, units)) for n, gpu, size, units in sizes if units]
        pods = [a_pod(f"p{n}-{gpu}", units, on=(f"n{n}", gpu)) for n, gpu, units in held]
        found = a_scene(entries, pods)

        def fits(model: str, count: int, units: int) -> bool:
            asked = document.request(new(units * count, count, model), found.document)
            return any(isinstance(place(view, asked), Placement) for view in found.ledger.views())

        for one in largest(found.ledger, unit_bytes=GIB):
            assert fits(one.model, one.gpus, one.each_bytes // GIB)
            assert not fits(one.model, one.gpus, one.each_bytes // GIB + 1)


class TestMoves:
    def scattered(self, **more: Any) -> Scene:
        """Four GPUs that are half used, and pods that want whole ones."""
        pods = [a_pod(f"p{n}", 5, on=(f"n{n}", 0), **more) for n in range(4)]
        waiting = [a_pod(f"w{n}", 10) for n in range(20)]
        return a_scene([a_node(f"n{n}", 10) for n in range(4)], pods + waiting)

    def test_halves_are_put_together(self) -> None:
        plan = moves(self.scattered())

        assert 2 == len(plan.moves)
        assert (0, 2) == (plan.before.empty_gpus, plan.after.empty_gpus)
        assert plan.after.fragmented_bytes < plan.before.fragmented_bytes
        assert 10 * GIB == plan.after.largest_bytes
        # what is free is as much as before
        assert plan.before.free_bytes == plan.after.free_bytes

    def test_no_more_are_moved_than_wanted(self) -> None:
        assert 1 == len(moves(self.scattered(), most=1).moves)

    def test_where_all_is_well_nothing_is_moved(self) -> None:
        found = a_scene([a_node("n0", 10), a_node("n1", 10)], [a_pod("p", 10, on=("n0", 0)), a_pod("w", 10)])

        assert () == moves(found).moves

    @pytest.mark.parametrize(
        ("more", "why"),
        [
            ({"stays": "it is a DaemonSet's"}, "it is a DaemonSet's"),
            ({"priority": 1}, "their priority is above 0"),
            ({"uuids": ("n0/0",)}, "they insist on one GPU"),
        ],
    )
    def test_what_must_stay_stays_and_it_is_told_why(self, more: dict[str, Any], why: str) -> None:
        plan = moves(self.scattered(**more))

        assert () == plan.moves
        assert {why: 4} == plan.left

    def test_a_higher_priority_is_moved_where_that_is_allowed(self) -> None:
        assert 2 == len(moves(self.scattered(priority=1), priority=1).moves)

    def test_budgets_are_kept(self) -> None:
        found = self.scattered()
        uids = tuple(f"uid-p{n}" for n in range(4))

        def with_allowed(allowed: int) -> MovePlan:
            budget = document.Budget(name="b", allowed=allowed, pods=uids)
            return moves(scene(msgspec.structs.replace(found.document, budgets=(budget,))))

        assert [0, 1, 2, 2] == [len(with_allowed(allowed).moves) for allowed in range(4)]
        assert {"their PodDisruptionBudget allows none": 4} == with_allowed(0).left

    def test_a_pod_goes_nowhere_that_is_closed_to_it(self) -> None:
        nodes = [a_node("n0", 10, labels={"pool": "a"}), a_node("n1", 10), a_node("n2", 10, cordoned=True)]
        pods = [a_pod("p0", 5, on=("n0", 0), node_selector={"pool": "a"}), a_pod("p1", 5, on=("n1", 0)), a_pod("w", 10)]
        plan = moves(a_scene(nodes, [*pods, *(a_pod(f"w{n}", 10) for n in range(9))]))

        assert [("p1", "n0")] == [(move.name, move.to_node) for move in plan.moves]


# node, GPU, GiB
_STAYING = (("n0", 1, 8), ("n1", 0, 5))


class TestRoom:
    def test_the_smallest_pod_that_makes_room_is_moved(self) -> None:
        pods = [a_pod("large", 6, on=("n0", 0)), a_pod("small", 3, on=("n1", 0)), a_pod("third", 7, on=("n2", 0))]
        plan = room(a_scene([a_node(f"n{n}", 10) for n in range(3)], pods), 10)

        assert plan.fits
        # beside third it just has room: 7 + 3
        assert [("small", "n1", "n2")] == [(move.name, move.node, move.to_node) for move in plan.moves]

    def test_twice_the_cluster_is_twice_the_work(self) -> None:
        def work(nodes: int) -> int:
            names = [f"n{n:02}" for n in range(nodes)]
            pods = [a_pod(f"{name}-{n}", 6, on=(name, 0)) for name in names for n in range(2)]
            found = a_scene([a_node(name, 20) for name in names], pods)
            return steps(lambda: room(found, 20), of=moves_of_pods)

        assert work(60) < 2.2 * work(30)

    def test_nothing_is_moved_for_what_fits(self) -> None:
        plan = room(a_scene([a_node("n0", 10)], [a_pod("p", 5, on=("n0", 0))]), 5)

        assert plan.fits
        assert () == plan.moves

    def test_where_no_moves_help_that_is_told(self) -> None:
        found = a_scene(
            [a_node("n0", 10), a_node("n1", 10)], [a_pod("p", 6, on=("n0", 0)), a_pod("q", 6, on=("n1", 0))]
        )

        assert room(found, 10).fits is False
        assert room(found, 11).fits is False

    def test_several_gpus_of_one_node_are_cleared(self) -> None:
        pods = [a_pod(f"{name}{gpu}", units, on=(name, gpu)) for name, units in (("p", 4), ("q", 5)) for gpu in (0, 1)]
        # p's, which leave less beside a q than beside each other
        plan = room(a_scene([a_node("p", 10, 10), a_node("q", 10, 10)], pods), 20, count=2)

        assert plan.fits
        assert [("p0", "q"), ("p1", "q")] == sorted((move.name, move.to_node) for move in plan.moves)

    def test_of_a_pod_on_several_gpus_only_its_part_makes_room_on_one(self) -> None:
        pods = [
            # 4 GiB, of which 2 are on GPU 0, where 4 are missing
            a_pod("wide", 4, on=("n0", 0), gpu_count=2),
            a_pod("small", 5, on=("n0", 0)),
            *(a_pod(f"stays-{node}", units, on=(node, gpu), stays="x") for node, gpu, units in _STAYING),
        ]
        plan = room(a_scene([a_node("n0", 10, 10), a_node("n1", 10)], pods), 7)

        assert plan.fits
        assert [("small", "n1")] == [(move.name, move.to_node) for move in plan.moves]

    @pytest.mark.parametrize(
        ("sizes", "held", "wish"),
        [
            ((10, 10, 10), (7, 7, 7), {"isolation": "exclusive"}),
            # 5, 6 and 6 GiB are missing
            ((12, 10, 12), (7, 6, 8), {"models": ("GPU-12",)}),
        ],
    )
    def test_gpus_that_the_pod_cannot_have_are_passed_over(
        self, sizes: tuple[int, ...], held: tuple[int, ...], wish: dict[str, Any]
    ) -> None:
        # what is on the second GPU stays; the others can go to n1
        pods = [a_pod(f"p{gpu}", units, on=("n0", gpu), stays="x" * (gpu == 1)) for gpu, units in enumerate(held)]
        plan = room(a_scene([a_node("n0", *sizes), a_node("n1", 8, 8)], pods), 20, count=2, **wish)

        assert plan.fits
        assert [("p0", "n1"), ("p2", "n1")] == sorted((move.name, move.to_node) for move in plan.moves)

    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, 1 << 32))
    def test_a_plan_can_be_carried_out_as_it_stands(self, seed: int) -> None:
        random = Random(seed)
        nodes = [a_node(f"n{n}", *[random.choice([8, 10])] * random.randint(1, 3)) for n in range(4)]
        pods: list[PodEntry] = []
        for n, (entry, size) in enumerate((e, e.gpus[0].memory) for e in nodes):
            for gpu in range(len(entry.gpus)):
                held = random.randint(0, int(size) // GIB)
                if held:
                    more = {"stays": "it stays"} if random.random() < 0.2 else {"priority": random.randint(0, 1)}
                    pods.append(a_pod(f"p{n}-{gpu}", held, on=(entry.name, gpu), **more))
        found = a_scene(nodes, pods)
        wanted, count = random.randint(1, 10), random.choice([1, 1, 2])
        plan = room(found, wanted * count, count=count)
        if plan.fits is None or not plan.fits:
            return

        # from the beginning again: each successor is placed while its pod is still there
        again = scene(found.document)
        scheduler = again.scheduler("binpack")
        entries = {pod.uid: pod for pod in pods}
        for move in plan.moves:
            pod = entries[move.uid]
            assert not pod.stays
            assert not pod.priority
            row = scheduler.place(f"{move.uid}'", document.request(pod, again.document))
            assert move.to_node == scheduler.table.names[row]
            scheduler.remove(move.uid)
        asked = document.request(
            PodEntry(name="new", containers=(Asking(name="c", gpu_mem=wanted * count),), gpu_count=count),
            again.document,
        )
        assert scheduler.fitting(asked).any()


def written(folder: Path, found: Scene) -> str:
    document.write(found.document, folder / "snapshot.json")
    return str(folder / "snapshot.json")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["plan", *arguments])


class TestCommand:
    def test_where_a_deployment_fits_is_told(self, tmp_path: Path) -> None:
        snapshot = written(tmp_path, a_scene([a_node("n0", 10, 10)], [a_pod("p", 4, on=("n0", 0))]))
        (tmp_path / "web.yaml").write_text(
            "kind: Service\n---\nkind: Deployment\nmetadata: {name: web}\nspec:\n  replicas: 3\n  template:\n"
            "    spec:\n      containers:\n"
            "        - {name: main, resources: {limits: {cotenant.io/gpu-mem: 6, cpu: 500m}}}\n"
        )
        done = run("fit", "--snapshot", snapshot, "-f", str(tmp_path / "web.yaml"))

        assert 1 == done.exit_code
        assert "2 of 3 pods of 6 GiB fit" in done.output
        assert (
            "the next one fits on none of 1 node:\n       1 no single GPU has the requested memory free" in done.output
        )
        assert 0 == run("fit", "--snapshot", snapshot, "-f", str(tmp_path / "web.yaml"), "--replicas", "2").exit_code
        text = (tmp_path / "web.yaml").read_text()
        assert done.output == CliRunner().invoke(main, ["plan", "fit", "--snapshot", snapshot, "-f", "-"], text).output

    def test_the_extenders_profiles_and_pools_hold_with_its_configuration(self, tmp_path: Path) -> None:
        pool = a_node("n0", 10, 10, labels={"pool": "calm"}), a_node("n1", 10, 10)
        snapshot = written(tmp_path, a_scene([*pool], []))
        (tmp_path / "extender.yaml").write_text(
            "policy: binpack\nprofilePolicies: {wide: spread}\nnodePools: [{labels: {pool: calm}, policy: spread}]\n"
        )
        (tmp_path / "web.yaml").write_text(
            "kind: Pod\nmetadata: {name: web}\nspec:\n  schedulerName: wide\n"
            "  containers: [{name: main, resources: {limits: {cotenant.io/gpu-mem: 4}}}]\n"
        )
        config = ("--snapshot", snapshot, "--replicas", "2", "-o", "json", "--config", str(tmp_path / "extender.yaml"))

        def gpus(*arguments: str) -> int:
            """Count the GPUs that two pods of 4 GiB would lie on."""
            done = run("fit", *config, *arguments)
            assert 0 == done.exit_code, done.output
            return len({(spot["node"], *spot["gpus"]) for spot in msgspec.json.decode(done.output)["spots"]})

        assert 2 == gpus("--gpu-mem", "4", "--selector", "pool=calm")
        # by the profile that the manifest names
        assert 2 == gpus("-f", str(tmp_path / "web.yaml"))
        # the flag stands for the file's `policy`, and the pool stays
        assert 2 == gpus("--gpu-mem", "4", "--selector", "pool=calm", "--policy", "best-fit")

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("policy: fastest", "policy: 'fastest' is none of"),
            ("nodePool: []", "nodePool: unknown key"),
        ],
    )
    def test_a_bad_configuration_ends_with_a_sentence(self, tmp_path: Path, text: str, expected: str) -> None:
        (tmp_path / "extender.yaml").write_text(text)
        snapshot = written(tmp_path, a_scene([a_node("n0", 10)], []))
        done = run("fit", "--snapshot", snapshot, "--gpu-mem", "1", "--config", str(tmp_path / "extender.yaml"))

        assert 1 == done.exit_code
        assert expected in done.output

    def test_cores_that_are_missing_are_told_apart(self, tmp_path: Path) -> None:
        snapshot = written(tmp_path, a_scene([a_node("n0", 10)], []))
        done = run("fit", "--snapshot", snapshot, "--gpu-mem", "1", "--cpu", "65")

        assert "1 the node has not enough CPU or memory left" in done.output

    def test_the_largest_is_told(self, tmp_path: Path) -> None:
        done = run("largest", "--snapshot", written(tmp_path, a_scene([a_node("n0", 10)], [])))

        assert "GPU-10                               1      10 GiB        10  n0" in done.output

    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            (["fit"], "give --gpu-mem, or --file with a manifest"),
            (["fit", "--cpu", "4"], "--gpu-mem says how many units a pod asks"),
            (["fit", "--gpu-mem", "3", "--gpu-count", "2"], "which does not split equally"),
            (["fit", "--gpu-mem", "3", "--selector", "x"], "expected KEY=VALUE"),
            (["fit", "--gpu-mem", "3", "--cpu", "97x"], "expected an amount such as 4, 500m or 16Gi, not '97x'"),
            (["fit", "--gpu-mem", "3", "--cpu", "-5"], "expected an amount such as 4, 500m or 16Gi, not '-5'"),
            (["moves", "--gpu-mem", "3", "--memory", "800GB"], "expected an amount such as 4, 500m or 16Gi, not '800"),
            (["fit", "--gpu-mem", "3", "--policy", "best"], "'best' is none of"),
            (["moves", "--patience", "nan"], "'nan' is not a number."),
            (["moves", "--apply"], "--apply goes with a live cluster"),
        ],
    )
    def test_what_cannot_be_asked_is_refused(self, tmp_path: Path, arguments: list[str], expected: str) -> None:
        done = run(*arguments, "--snapshot", written(tmp_path, a_scene([a_node("n0", 10)], [])))

        assert done.exit_code in {1, 2}
        assert expected in done.output

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("kind: Deployment", "the Deployment has no spec.template"),
            ("kind: ConfigMap", "expected one Pod or workload that asks cotenant.io/gpu-mem, found 0"),
            ("a: [", "web.yaml: is not valid YAML: line 1, column 5: while parsing a flow node expected"),
            (
                "{kind: Pod, spec: {containers: [{name: c, resources: {limits: {cotenant.io/gpu-mem: 0}}}]}}",
                "container c asks cotenant.io/gpu-mem: 0; ask for 1 unit or more",
            ),
            ("{kind: Pod, spec: {containers: 5}}", "a pod: "),
            (
                "{kind: Pod, spec: {containers: [{name: c, resources: {limits: {nvidia.com/gpumem: 3000}}}]}}",
                "container c asks nvidia.com/gpumem, which is another system's: cotenant migrate FILE",
            ),
            (
                "{kind: Pod, spec: {containers: [{name: c, resources: {limits: {nvidia.com/mig-7g.80gb: 1}}}]}}",
                "asks MIG instances, which no plan places",
            ),
        ],
    )
    def test_a_bad_manifest_is_refused(self, tmp_path: Path, text: str, expected: str) -> None:
        (tmp_path / "web.yaml").write_text(text)
        snapshot = written(tmp_path, a_scene([a_node("n0", 10)], []))
        done = run("fit", "--snapshot", snapshot, "-f", str(tmp_path / "web.yaml"))

        assert 1 == done.exit_code
        assert expected in done.output


class TestNodes:
    def trace(self, folder: Path, pods: list[PodEntry]) -> str:
        return written(folder, a_scene([a_node("kind", 10, 10)], pods))

    def test_as_many_as_hold_all_pods(self, tmp_path: Path) -> None:
        # 7 pods of 6 GiB: two on each node of two GPUs, though 42 GiB are 3 nodes by sums
        trace = self.trace(tmp_path, [a_pod(f"p{n}", 6) for n in range(7)])
        done = run("nodes", "--trace", trace, "--like", "kind")

        assert "4 nodes like kind: every pod is placed at once" in done.output
        assert "3 are too few. By sums alone it would be 3, for GPU memory." in done.output

    def test_fewer_where_pods_may_wait(self, tmp_path: Path) -> None:
        pods = [a_pod(f"p{n}", 6, arrival=float(n), departure=float(n + 10)) for n in range(4)]
        arguments = "nodes", "--trace", self.trace(tmp_path, pods), "--like", "kind", "-o", "json"

        assert 2 == msgspec.json.decode(run(*arguments).stdout)["nodes"]
        # the third waits from 2 to 10
        assert 1 == msgspec.json.decode(run(*arguments, "--wait", "8").stdout)["nodes"]
        assert 2 == msgspec.json.decode(run(*arguments, "--wait", "7").stdout)["nodes"]

    def test_what_is_held_at_most_counts_a_moment_too(self, tmp_path: Path) -> None:
        # for 2 s of a day both GPUs are full
        pods = [a_pod("p", 10), a_pod("short", 10, arrival=600.0, departure=602.0), a_pod("last", 1, arrival=86_400.0)]
        done = run("nodes", "--trace", self.trace(tmp_path, pods), "--like", "kind")

        told = (
            "1 node like kind: every pod is placed at once; at most 100.00 % of their GPU memory is held\nBy sums alone"
        )
        assert told in done.output

    @pytest.mark.parametrize(
        ("gpus", "pods", "nodes"),
        [
            # a pod of all of a GPU's memory for each node
            ((a_gpu(0), a_gpu(1, family=Family.MIG_DYNAMIC, mode=Mode.MIG, mig=MIG())), (10, 10, 10), 3),
            ((a_gpu(0), a_gpu(1, family=Family.REPLICAS)), (10, 10, 10), 3),
            # a new node is well, and nobody else's
            ((a_gpu(0, health=Health.UNHEALTHY, foreign=Foreign(bytes=GIB)),), (10, 10), 2),
            # of so many clients MPS serves two
            ((a_gpu(0, mode=Mode.MPS, mps_pipe="/run/mps", max_clients=2),), (1, 1, 1, 1), 2),
        ],
    )
    def test_of_a_live_node_the_gpus_count_that_share_memory(
        self, tmp_path: Path, gpus: tuple[GPU, ...], pods: tuple[int, ...], nodes: int
    ) -> None:
        inventory = inventories.encode(Inventory(generation=7, unit_bytes=GIB, serving=False, gpus=gpus))
        kind = NodeEntry(name="kind", cpu=64, memory="256Gi", inventory=inventory)
        trace = written(tmp_path, a_scene([kind, a_node("other", 1)], [a_pod(f"p{n}", m) for n, m in enumerate(pods)]))
        done = run("nodes", "--trace", trace, "--like", "kind", "-o", "json")

        assert nodes == msgspec.json.decode(done.stdout)["nodes"]

    def test_a_node_whose_inventory_cannot_be_read_is_refused(self, tmp_path: Path) -> None:
        kind = NodeEntry(name="kind", cpu=64, memory="256Gi", inventory="{bad")
        trace = written(tmp_path, a_scene([kind, a_node("other", 10)], [a_pod("p", 10)]))
        done = run("nodes", "--trace", trace, "--like", "kind")

        assert 2 == done.exit_code
        assert "kind: the node's inventory is not versioned JSON" in done.output

    def test_where_no_number_is_enough_that_is_told(self, tmp_path: Path) -> None:
        done = run("nodes", "--trace", self.trace(tmp_path, [a_pod("p", 11)]), "--like", "kind")
        assert 1 == done.exit_code
        assert "uid-p: even an empty node like kind is too small" in done.output

        pods = [a_pod(f"p{n}", 10) for n in range(9)]
        done = run("nodes", "--trace", self.trace(tmp_path, pods), "--like", "kind", "--most", "4")
        assert 1 == done.exit_code
        assert "4 nodes like kind are not enough: raise --most" in done.output

    def test_of_csv_traces_too(self, tmp_path: Path) -> None:
        (tmp_path / "nodes.csv").write_text("sn,cpu_milli,memory_mib,gpu,model\nkind,64000,262144,2,G2\n")
        rows = "\n".join(f"p{n},1000,10,1,{share}" for n, share in enumerate(itertools.repeat(600, 7)))
        (tmp_path / "pods.csv").write_text(f"name,cpu_milli,memory_mib,num_gpu,gpu_milli\n{rows}\n")
        files = "--nodes", str(tmp_path / "nodes.csv"), "--pods", str(tmp_path / "pods.csv")

        assert "4 nodes like kind" in run("nodes", *files, "--like", "kind").output
        assert "has no node 'other'" in run("nodes", *files, "--like", "other").output
        for wrong in ((), files[:2], (*files, "--trace", __file__)):
            assert "give either --nodes and --pods, or --trace" in run("nodes", *wrong, "--like", "kind").output
