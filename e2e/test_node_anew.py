"""A node whose plugin folder has no room, and one that comes back with other GPUs, on the real kubelet."""

import os
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cotenant.contract import grant as grants
from e2e.agreement import GRANT, disagreements, phase, settled
from e2e.faults.invariants import Picture, broken, leaks
from e2e.node import DEVICE_PLUGINS, RealNode
from e2e.processes import wait_until
from e2e.programs import Ground
from e2e.rest import Object
from e2e.test_node_faults import ground, held, lasting

__all__ = ["ground"]  # the fixture

OTHER = "GPU-00000000-0000-4000-8000-00000000000b"
FEWER_AND_LARGER = f"gpus: [{{model: NVIDIA H200, memory: 141GiB, uuid: {OTHER}}}]"


@contextmanager
def small_disk(node: RealNode) -> Iterator[None]:
    """Give the kubelet a disk of its own for sockets and checkpoint, of 128 KiB and 24 files; no plugin may run."""
    node.kill_kubelet()
    options = "size=128k,nr_inodes=24,mode=750"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "cotenant-test", str(DEVICE_PLUGINS)], check=True)
    try:
        node.start_kubelet()
        yield
    finally:
        node.kill_kubelet()
        subprocess.run(["umount", "--lazy", str(DEVICE_PLUGINS)], check=True)
        node.start_kubelet()


def fill_bytes() -> Path:
    """Use up the disk's room, files may still be made."""
    filler = DEVICE_PLUGINS / "filler"
    with filler.open("wb", buffering=0) as sink:
        try:
            while True:
                sink.write(b"x" * 512)
        except OSError:
            return filler


def fill_files() -> list[Path]:
    """Use up the disk's inodes: no file, and no socket, can be made."""
    made: list[Path] = []
    try:
        while True:
            path = DEVICE_PLUGINS / f"filler-{len(made)}"
            path.touch(exist_ok=False)
            made.append(path)
    except OSError:
        return made


def started(seen: Object) -> list[tuple[str, int]]:
    """Tell one start of a pod's containers from another."""
    return [(one["containerID"], one["restartCount"]) for one in seen["status"]["containerStatuses"]]


def wrong(ground: Ground, running: dict[str, Object]) -> list[str]:
    """Hold the pods that are to run undisturbed, and all sums, to the API, their environment and the kubelet."""
    now = {name: ground.api.get("Pod", name) for name in running}
    found = [f"{name} was disturbed" for name, seen in now.items() if started(seen) != started(running[name])]
    compared, said = disagreements(
        ground.node, list(now.values()), lambda node, seen, name: node.environment(seen, name)
    )
    picture = Picture.of(ground.api)
    leaked: list[str] = []

    def quiet() -> bool:
        with urllib.request.urlopen(f"http://{ground.extender.serve}/metrics", timeout=10) as answer:
            leaked[:] = leaks(picture, answer.read().decode())
        return not leaked

    wait_until(quiet, timeout_s=15)
    return [*found, *said, *broken(picture), *leaked, *([] if compared == len(now) else [f"{compared} compared"])]


def test_a_full_disk_under_checkpoint_and_sockets_costs_the_pods_of_that_moment_and_nothing_after(
    ground: Ground,
) -> None:
    ground.plugin.kill()
    with small_disk(ground.node):
        ground.plugin.start()
        ground.api.create(lasting("before", 19))
        kept = {"before": ground.running("before")}

        # no room to write down an allocation: the kubelet rejects the pod, for which the plugin has answered
        filler = fill_bytes()
        for n in range(3):
            ground.api.create(lasting(f"p{n}", 20))
        rejected = [ground.api.wait("Pod", f"p{n}", settled, saying="an end", timeout_s=60) for n in range(3)]
        assert ["Failed"] * 3 == [phase(seen) for seen in rejected]
        for seen in rejected:
            assert 'failed to write checkpoint file "kubelet_internal_checkpoint"' in seen["status"]["message"]
            assert "no space left on device" in seen["status"]["message"]
        assert [] == wrong(ground, kept)

        # with room again the next ones get it: 19 + 3 x 20 = 79 on one GPU, 3 x 20 on the other
        filler.unlink()
        for n in range(6):
            ground.api.create(lasting(f"n{n}", 20))
        kept |= {f"n{n}": ground.running(f"n{n}") for n in range(6)}
        assert [] == wrong(ground, kept)

        # no room for a socket: the plugin is there and nobody can ask it, so that nothing is placed here
        ground.plugin.kill()
        for left in DEVICE_PLUGINS.glob("cotenant*.sock"):
            left.unlink()
        fillers = fill_files()
        ground.plugin.start(wait=False)
        assert wait_until(lambda: not Picture.of(ground.api).inventories()[ground.node.name].serving, timeout_s=30), (
            "it says that it serves"
        )
        ground.api.create(lasting("late", 8))
        ground.api.unschedulable("late")
        assert [] == wrong(ground, kept)

        for path in fillers:
            path.unlink()
        ground.plugin.wait_ready()
        kept["late"] = ground.running("late")
        assert [] == wrong(ground, kept)

        # what the kubelet has written down meanwhile is whole
        before = held(ground.node)
        ground.node.restart_kubelet()
        assert wait_until(lambda: held(ground.node) == before, timeout_s=30), (before, held(ground.node))
        assert [] == wrong(ground, kept)


def test_a_node_made_anew_with_other_gpus_gives_those_and_starts_nothing_on_what_is_gone(ground: Ground) -> None:
    api, node = ground.api, ground.node
    api.create(lasting("old", 20))
    old = ground.running("old")
    pid = node.pid(old, "c0")
    # bound, and not admitted any more before the node goes
    ground.plugin.kill()
    node.kill_kubelet()
    api.create(lasting("bound", 20))
    api.bound("bound")

    api.delete("Node", node.name)
    ground.plugin.fake_gpus.write_text(FEWER_AND_LARGER)
    node.start_kubelet()
    ground.plugin.start()

    (gpu,) = Picture.of(api).inventories()[node.name].gpus
    assert (OTHER, 141 << 30) == (gpu.uuid, gpu.usable_bytes)
    assert "Failed" == phase(api.wait("Pod", "bound", settled, saying="an end"))
    api.create(lasting("new", 100))
    new = ground.running("new")
    assert OTHER == node.environment(new, "c0")["NVIDIA_VISIBLE_DEVICES"]
    # the old one runs on as long as it does
    assert started(old) == started(api.get("Pod", "old"))
    # 141 - 100 = 41 are free of the GPU, but 20 of the node's 141 are the old pod's in kube-scheduler's own sum
    api.create(lasting("next", 40))
    api.unschedulable("next", "Insufficient cotenant.io/gpu-mem")
    # and is not started again on a GPU that is gone
    os.kill(pid, signal.SIGKILL)

    def refused(seen: Object | None) -> bool:
        state = seen["status"]["containerStatuses"][0]["state"] if seen else {}
        return "which this node does not have" in state.get("waiting", {}).get("message", "")

    api.wait("Pod", "old", refused, saying="the plugin's no", timeout_s=60)
    api.delete("Pod", "old")
    kept = {"new": new, "next": ground.running("next")}
    api.gone("old")
    assert {OTHER} == {
        grants.decode(one["metadata"]["annotations"][GRANT]).containers[0].gpus[0].uuid for one in kept.values()
    }
    assert [] == wrong(ground, kept)
