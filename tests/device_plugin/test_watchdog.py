"""The watchdog in a running plugin: processes of made-up GPUs, in the cgroups of the stand-in's containers."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cotenant.contract import overuse
from cotenant.contract.overuse import Overuser, OveruseReport
from cotenant.contract.units import GIB
from cotenant.standins.api_rules import NODES
from cotenant.standins.kubelet import container_id
from device_plugin.watchdog.proc import GoneError, Processes
from tests.builders import a_pod
from tests.device_plugin.node import NAMES, NODE, SECONDS, Node, container_grant, uuid
from tests.device_plugin.test_metrics import read_when
from tests.extender.running import Running, eventually, submit

WATCHING = "watchdog: {interval: 0.05, margin: 512MiB}\nserve: 127.0.0.1:0"


def run(node: Node, pid: int, pod: str, container: str = "main") -> None:
    """Have a process of a pod's container."""
    node.add_process(pid, f"/kubepods/burstable/pod{pod}/{container_id(pod, container)}")


def use(node: Node, first: dict[int, str], second: dict[int, str] | None = None) -> None:
    """Have processes hold memory of the first GPU, by number, and of the second."""
    listed = [[{"pid": pid, "memory": amount} for pid, amount in (some or {}).items()] for some in (first, second)]
    node.write_gpus([{"processes": json.dumps(some)} for some in listed])


def told(node: Node, about: str, reason: str) -> list[str]:
    return [
        event["note"] for event in node.api.events() if (event["regarding"]["name"], event["reason"]) == (about, reason)
    ]


def soon(node: Node, condition: Callable[[], object]) -> bool:
    return node.api.wait_until(condition, SECONDS)


def reported(node: Node) -> list[Overuser]:
    found = node.api.node(NODE)
    assert found is not None
    text = found["metadata"].get("annotations", {}).get(NAMES.overusers)
    return [] if text is None else list(overuse.decode(text).users)


def test_who_uses_more_than_granted_is_told_reported_and_measured_and_its_neighbour_is_not() -> None:
    with Node(config=WATCHING) as node:
        greedy = node.add_pod("greedy", container_grant(gpus=[0], units=8))
        victim = node.add_pod("victim", container_grant(gpus=[0], units=16))
        node.running(greedy)
        node.running(victim)
        run(node, 101, greedy)
        run(node, 102, victim)
        use(node, {101: "9GiB", 102: "16GiB"})
        assert soon(node, lambda: reported(node))
        # 9 GiB are over 8 GiB and the margin of half a GiB
        expected = Overuser(uid=greedy, container="main", gpu=uuid(0), granted_bytes=8 * GIB, used_bytes=9 * GIB)
        assert [expected] == reported(node)
        assert soon(node, lambda: told(node, "greedy", "GPUMemoryOverused"))
        assert [f"container main uses 9 GiB of GPU {uuid(0)}, but was granted 8 GiB"] == told(
            node, "greedy", "GPUMemoryOverused"
        )
        assert [] == told(node, "victim", "GPUMemoryOverused")
        used = "cotenant_container_gpu_memory_used_bytes"
        found = read_when(node, (used, "main", "0", "default", "victim", uuid(0)), 16 * GIB)
        assert 9 * GIB == found[used, "main", "0", "default", "greedy", uuid(0)]
        limits = "cotenant_container_gpu_memory_granted_bytes"
        assert 8 * GIB == found[limits, "main", "0", "default", "greedy", uuid(0)]

        # what was most stays in the report as long as it is over, and then nothing does
        use(node, {101: "20GiB"})
        assert soon(node, lambda: [20 * GIB] == [user.used_bytes for user in reported(node)])
        use(node, {101: "10GiB"})
        use(node, {101: "8GiB"})
        assert soon(node, lambda: reported(node) == [])
        # and once told is told for a while
        use(node, {101: "9GiB"})
        assert soon(node, lambda: reported(node))
        assert 1 == len(told(node, "greedy", "GPUMemoryOverused"))


def test_processes_outside_of_kubernetes_and_pods_without_a_grant_are_told_of() -> None:
    with Node(config=WATCHING) as node:
        bare = node.add_pod("bare", annotations={}, spec={"nodeName": NODE, "containers": [{"name": "main"}]})
        node.running(bare)
        run(node, 7, bare)
        node.add_process(8, "/user.slice/user-0.slice/session-1.scope")
        use(node, {7: "1GiB", 8: "2GiB"}, {9: "3GiB"})  # the last has ended
        assert soon(node, lambda: told(node, NODE, "GPUForeignProcess"))
        assert [f"process 8, which belongs to no pod of this node, uses 2 GiB of GPU {uuid(0)}"] == told(
            node, NODE, "GPUForeignProcess"
        )
        assert soon(node, lambda: told(node, "bare", "GPUMemoryUngranted"))
        assert [f"the pod uses 1 GiB of GPU {uuid(0)}, but has no grant"] == told(node, "bare", "GPUMemoryUngranted")
        found = read_when(node, ("cotenant_gpu_foreign_memory_used_bytes", "0", uuid(0)), 2 * GIB)
        assert 1 == found["cotenant_gpu_foreign_processes", "0", uuid(0)]
        assert 0 == found["cotenant_gpu_foreign_processes", "1", uuid(1)]
        assert [] == reported(node)


def test_a_plugin_that_stops_takes_its_report_with_it() -> None:
    with Node(config=WATCHING) as node:
        greedy = node.add_pod("greedy", container_grant(gpus=[0], units=8))
        node.running(greedy)
        run(node, 101, greedy)
        use(node, {101: "9GiB"})
        assert soon(node, lambda: reported(node))
        node.stop_plugin()
        assert [] == reported(node)


def test_nothing_is_looked_at_where_the_watchdog_is_off() -> None:
    with Node(config="watchdog: {interval: 0}") as node:
        node.add_process(8, "/")
        use(node, {8: "2GiB"})
        node.write_gpus([{"processes": "[{pid: 8, memory: 2GiB}]"}, {"xids": [79]}])
        node.wait_published("unhealthy", lambda i: i.gpus[1].detail)
        assert [] == told(node, NODE, "GPUForeignProcess")


def test_a_plugin_that_does_not_look_takes_away_what_one_that_was_killed_had_reported() -> None:
    with Node(plugin=False) as node:
        user = Overuser(uid="u", container="main", gpu=uuid(0), granted_bytes=8 * GIB, used_bytes=9 * GIB)
        report = overuse.encode(OveruseReport(beat=1, users=(user,)))
        node.api.patch(NODES, NODE, {"metadata": {"annotations": {NAMES.overusers: report}}})
        node.start_plugin()
        assert soon(node, lambda: not reported(node))


def test_the_plugins_own_processes_are_nobodys(tmp_path: Path) -> None:
    for pid, parent in ((os.getpid(), 1), (50, os.getpid()), (51, 50), (60, 1)):
        folder = tmp_path / str(pid)
        folder.mkdir()
        (folder / "cgroup").write_text("0::/\n")
        (folder / "stat").write_text(f"{pid} (nvidia-cuda-mps) S {parent} 1 1\n")
    processes = Processes(tmp_path)
    assert processes.origin(60) is None
    # unless it is a daemon that a nursery started for the plugin, and as little are the servers of one
    (tmp_path / "61").mkdir()
    (tmp_path / "61" / "cgroup").write_text("0::/\n")
    (tmp_path / "61" / "stat").write_text("61 (nvidia-cuda-mps) S 60 1 1\n")
    for pid in (60, 61):
        with pytest.raises(GoneError):
            processes.origin(pid, daemons={60})
    for pid in (os.getpid(), 50, 51, 70):
        try:
            processes.origin(pid)
        except GoneError:
            continue
        raise AssertionError(f"process {pid} was taken for another's")


def test_this_machines_processes_are_read() -> None:
    try:
        Processes().origin(1)
    except GoneError:
        raise AssertionError("process 1 has gone") from None
    assert Processes().sees_all() in {True, False}


def test_the_extender_marks_the_over_user_and_evicts_it_where_configured_and_nobody_else(tmp_path: Path) -> None:
    with (
        Node(config=WATCHING) as node,
        Running(node.api, tmp_path, evictOverusersAfter=0.2) as extender,
    ):
        pods = {}
        for name, units in (("greedy", 8), ("victim", 60)):
            pods[name] = submit(node.api, a_pod().named(name).asking(units).wishing(gpu_uuid=uuid(0)))
            assert "" == extender.bind(pods[name], NODE)
            node.running(pods[name]["metadata"]["uid"])
        run(node, 101, pods["greedy"]["metadata"]["uid"], "main-0")
        run(node, 102, pods["victim"]["metadata"]["uid"], "main-0")
        use(node, {101: "20GiB", 102: "60GiB"})
        sentence = f"container main-0 uses 20 GiB of GPU {uuid(0)}, but was granted 8 GiB"
        assert soon(node, lambda: mark(node, "greedy") == sentence)
        # it is evicted with a report that comes when the grace is over
        amounts = iter(range(21, 80))

        def uses_more_and_goes() -> bool:
            use(node, {101: f"{next(amounts)}GiB", 102: "60GiB"})
            return gone(node, "greedy")

        assert eventually(uses_more_and_goes)
        assert soon(node, lambda: told(node, "greedy", "GPUMemoryEvicted"))
        (note,) = told(node, "greedy", "GPUMemoryEvicted")
        assert note.endswith("; evicted after 0.2 s of it")
        assert "Running" == node.kubelet.phase(pods["victim"]["metadata"]["uid"])
        assert mark(node, "victim") is None
        evicted = [(w.name, w.status) for w in node.api.writes if w.subresource == "eviction"]
        assert {("greedy", 201)} == set(evicted)


def gone(node: Node, name: str) -> bool:
    pod = node.api.pod(name)
    return pod is None or "deletionTimestamp" in pod["metadata"]


def mark(node: Node, name: str) -> str | None:
    pod = node.api.pod(name)
    text: str | None = (pod or {"metadata": {}})["metadata"].get("annotations", {}).get(NAMES.overuse)
    return text
