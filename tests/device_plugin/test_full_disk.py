"""Disks that are full where the plugin has to write: for its sockets, and for the CDI specs of instances."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cotenant.contract.inventory import Health
from device_plugin.nvml import NVML
from device_plugin.threads import INVENTORY, THREADS
from tests.device_plugin.node import NAMES, SECONDS, Node, container_grant, uuid
from tests.device_plugin.test_mig import A100, DYNAMIC, Cut, placed


@contextmanager
def small_disk(at: Path, inodes: int) -> Iterator[None]:
    """Mount a disk that has room for so few files; skip where nobody may mount."""
    at.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size=64k,nr_inodes={inodes}", "cotenant-test", str(at)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small disk needs the right to mount one")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(at)], check=True)


def fill(folder: Path) -> list[Path]:
    """Use up the disk's inodes."""
    made: list[Path] = []
    while True:
        path = folder / f"full-{len(made)}"
        try:
            path.touch()
        except OSError:
            return made
        made.append(path)


def test_a_plugin_that_finds_no_room_for_its_socket_serves_as_soon_as_there_is_some() -> None:
    with Node(plugin=False) as node:
        folder = node.folder / "kubelet" / "device-plugins"
        node.kubelet.stop()
        with small_disk(folder, inodes=8):
            node.kubelet.start()
            filler = fill(folder)
            assert filler
            node.start_plugin(wait=False)
            published = node.wait_published("published", lambda i: len(i.gpus) == 2)
            assert not published.serving
            assert 0 == node.kubelet.allocatable(NAMES.gpu_mem)

            for path in filler:
                path.unlink()

            node.wait_published("serving", lambda i: i.serving)
            pod = node.add_pod("p", container_grant(gpus=[1], units=8))
            node.running(pod)
            assert uuid(1) == node.gpus_seen(pod)
            node.stop_plugin()


def test_where_no_spec_can_be_removed_the_health_of_gpus_is_told_all_the_same() -> None:
    with Node(plugin=False) as node:
        cut = Cut(node, "gpus: [{indices: [0], family: mig-static}]\ndeviceListStrategy: cdi-cri\n")
        with small_disk(cut.cdi, inodes=16):
            (cut.cdi / "nvidia.yaml").write_text("{kind: nvidia.com/gpu, devices: []}")
            node.write_gpus([A100, {}])
            cut.cut(("1g.5gb", 0), ("1g.5gb", 1))
            cut.start()
            cut.wait(lambda: len([*cut.cdi.glob("cotenant-mig-*")]) == 2, "specs")
            before = THREADS.failures()[INVENTORY]
            subprocess.run(["mount", "-o", "remount,ro", str(cut.cdi)], check=True)

            nvml = NVML.open(fake=node.gpu_file)
            nvml.destroy_mig_instance(0, nvml.mig_instances(0)[0])
            node.wait_published("with one", lambda i: len(i.gpus[0].mig.instances) == 1)
            node.write_gpus([A100, {"lost": "true"}])

            node.wait_published("unhealthy", lambda i: i.gpus[1].health is Health.UNHEALTHY)
            assert before == THREADS.failures()[INVENTORY]
            node.stop_plugin()


def test_a_container_whose_instance_cannot_be_written_down_starts_as_soon_as_it_can() -> None:
    with Node(plugin=False) as node:
        cut = Cut(node, DYNAMIC)
        with small_disk(cut.cdi, inodes=4):
            cut.start(A100)
            filler = fill(cut.cdi)
            pod = cut.add("p", placed("1g.5gb", 0))
            node.kubelet.wait(lambda: "No space left on device" in node.kubelet.last_error(pod), "the error", SECONDS)
            assert 0 == node.kubelet.times_started(pod, "main")

            for path in filler:
                path.unlink()

            node.running(pod)
            # one instance, which the failed starts did not leave behind
            assert 1 == len(cut.state.read().instances)
            node.stop_plugin()
