"""GPUs that others have as well: seen by the plugin, published, told of, and left alone by the extender."""

from pathlib import Path

from cotenant.contract.inventory import Foreign, Inventory
from cotenant.contract.reasons import Reason
from cotenant.contract.units import GIB, id_prefix
from tests.builders import NAMES, a_pod
from tests.device_plugin.node import NODE, Node, container_grant, uuid
from tests.device_plugin.test_metrics import read_when
from tests.device_plugin.test_watchdog import soon, told, use
from tests.extender.running import Running, eventually, submit

CONFIG = "watchdog: {interval: 0.05}\nserve: 127.0.0.1:0"
BARE = {"nodeName": NODE, "containers": [{"name": "main"}]}


def bare(node: Node, name: str) -> str:
    """Run a pod that asks us nothing."""
    uid = node.add_pod(name, annotations={}, spec=BARE)
    node.running(uid)
    return uid


def foreign(index: int, inventory: Inventory) -> Foreign | None:
    return inventory.gpus[index].foreign


def test_a_gpu_that_another_plugins_pod_holds_is_fenced_until_that_has_ended(tmp_path: Path) -> None:
    with Node(config=CONFIG) as node, Running(node.api, tmp_path) as extender:
        first = node.add_pod("ours", container_grant(gpus=[0], units=8))
        node.running(first)
        train = bare(node, "train")
        node.kubelet.devices.hand_out(train, "main", "nvidia.com/gpu", [uuid(0)])
        published = node.wait_published("fenced", lambda i: foreign(0, i))
        assert Foreign(fenced=True, detail="held by pod default/train as nvidia.com/gpu") == foreign(0, published)
        assert foreign(1, published) is None
        assert soon(node, lambda: told(node, NODE, "GPUFenced"))
        assert [f"GPU 0 ({uuid(0)}) gets no new pods: held by pod default/train as nvidia.com/gpu"] == told(
            node, NODE, "GPUFenced"
        )
        assert 0 == read_when(node, ("cotenant_gpu_fenced", "0", uuid(0)), 1)["cotenant_gpu_fenced", "1", uuid(1)]

        # the extender places on the other, and nowhere where only this one would do; what runs goes on
        assert eventually(lambda: [s.healthy for s in extender.ledger.views()[0].gpus] == [False, True])
        placed = submit(node.api, a_pod().named("next").asking(70))
        assert "" == extender.bind(placed, NODE)
        waiting = submit(node.api, a_pod().named("waits").asking(70))
        wished = submit(node.api, a_pod().named("wished").asking(1).wishing(gpu_uuid=uuid(0)))
        assert {NODE: Reason.NO_GPU_FITS.sentence} == extender.filter(waiting, NODE)["FailedAndUnresolvableNodes"]
        assert {NODE: Reason.FENCED_GPU.sentence} == extender.filter(wished, NODE)["FailedAndUnresolvableNodes"]
        table = extender.get("/v1/nodes?as=table").body.decode()
        assert "fenced: held by pod default/train as nvidia.com/gpu" in table
        assert "once this is mended" in extender.get("/v1/explain/default/wished?as=table").body.decode()
        assert "fenced" in extender.get(f"/nodes/{NODE}/gpus/{uuid(0)}").body.decode()
        assert "Running" == node.kubelet.phase(first)

        node.api.delete_pod("train", grace=0)
        node.wait_published("clear", lambda i: foreign(0, i) is None)
        assert soon(node, lambda: told(node, NODE, "GPUClear"))
        assert eventually(lambda: [NODE] == extender.fitting(wished, NODE))


def test_a_pod_that_was_bound_before_the_fence_is_refused_by_the_plugin() -> None:
    with Node(config=CONFIG) as node:
        train = bare(node, "train")
        node.kubelet.devices.hand_out(train, "main", "nvidia.com/gpu", [uuid(0)])
        node.wait_published("fenced", lambda i: foreign(0, i))
        late = node.add_pod("late", container_grant(gpus=[0], units=8))
        beside = node.add_pod("beside", container_grant(gpus=[1], units=8))
        node.settled(late, beside)
        assert ("Failed", "Running") == (node.kubelet.phase(late), node.kubelet.phase(beside))
        assert "held by pod default/train as nvidia.com/gpu" in node.kubelet.message(late)


def test_memory_of_processes_outside_of_kubernetes_counts_as_taken(tmp_path: Path) -> None:
    with Node(config=CONFIG) as node, Running(node.api, tmp_path) as extender:
        node.add_process(8, "/user.slice/user-0.slice/session-1.scope")
        use(node, {8: "2500MiB"})
        published = node.wait_published("counted", lambda i: foreign(0, i))
        # 2.4 GiB are 3 units
        assert Foreign(bytes=3 * GIB, detail="used without a grant by processes of no pod") == foreign(0, published)
        assert soon(node, lambda: told(node, NODE, "GPUForeignUse"))
        assert (
            3 * GIB
            == read_when(node, ("cotenant_gpu_foreign_memory_counted_bytes", "0", uuid(0)), 3 * GIB)[
                "cotenant_gpu_foreign_memory_counted_bytes", "0", uuid(0)
            ]
        )
        assert eventually(lambda: [77 * GIB, 80 * GIB] == [s.free_bytes for s in extender.ledger.views()[0].gpus])
        # a GPU for the pod alone is not one that others use
        alone = submit(node.api, a_pod().asking(8).wishing(isolation="exclusive", gpu_uuid=uuid(0)))
        assert {NODE: Reason.NO_EMPTY_GPU.sentence} == extender.filter(alone, NODE)["FailedAndUnresolvableNodes"]
        assert "3Gi used by others" in extender.get("/v1/nodes?as=table").body.decode()
        use(node, {})
        node.wait_published("clear", lambda i: foreign(0, i) is None)
        assert eventually(lambda: [NODE] == extender.fitting(alone, NODE))


def test_units_that_the_kubelet_keeps_for_a_pod_without_a_grant_count_as_taken() -> None:
    with Node(config=CONFIG) as node:
        old = bare(node, "old")
        node.kubelet.devices.hand_out(old, "main", NAMES.gpu_mem, [f"{id_prefix(uuid(1))}-{n}" for n in range(5)])
        published = node.wait_published("counted", lambda i: foreign(1, i))
        assert Foreign(bytes=5 * GIB, detail="used without a grant by pod default/old") == foreign(1, published)


def test_a_plugin_that_starts_keeps_the_fence_until_it_has_looked_itself() -> None:
    with Node(config=CONFIG) as node:
        train = bare(node, "train")
        node.kubelet.devices.hand_out(train, "main", "nvidia.com/gpu", [uuid(0)])
        node.wait_published("fenced", lambda i: foreign(0, i))
        node.stop_plugin()
        before = node.published()
        node.start_plugin()
        after = node.wait_published("serving", lambda i: i.serving)
        # one change, to serving: it never said that the GPU was clear
        assert before is not None
        assert (before.generation + 1, foreign(0, before)) == (after.generation, foreign(0, after))


def test_a_kubelet_that_does_not_answer_changes_nothing() -> None:
    import grpc  # noqa: PLC0415 - the status alone

    with Node(config=CONFIG) as node:
        train = bare(node, "train")
        node.kubelet.devices.hand_out(train, "main", "nvidia.com/gpu", [uuid(0)])
        before = node.wait_published("fenced", lambda i: foreign(0, i))
        node.kubelet.pod_resources.fails = grpc.StatusCode.UNAVAILABLE
        node.api.delete_pod("train", grace=0)
        node.write_gpus([{}, {"lost": True}])
        after = node.wait_published("changed", lambda i: i.generation > before.generation)
        assert foreign(0, after) == foreign(0, before)
