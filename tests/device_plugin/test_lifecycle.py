"""The device plugin through restarts, losses and outages: of the kubelet, of itself, of the API server, of a GPU."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import grpc
import pytest

from cotenant.cluster import connect
from cotenant.contract.grant import Role
from cotenant.contract.inventory import Health
from cotenant.contract.units import GIB, id_prefix
from cotenant.standins.api_rules import NODES, PODS
from device_plugin.admission.ids import MAX_IDS, layout
from device_plugin.kubelet.registration import Registration
from device_plugin.publisher import Publisher
from tests.device_plugin.node import NAMES, NODE, SECONDS, Node, container_grant, granted, pod_spec, uuid

UNITS = 160  # two GPUs of 80 GiB in units of 1 GiB


def allocatable(node: Node, units: int) -> None:
    node.kubelet.wait(lambda: node.kubelet.allocatable(NAMES.gpu_mem) == units, f"{units} units to be allocatable")


def sockets(node: Node) -> list[Path]:
    return sorted((node.folder / "kubelet" / "device-plugins").glob("cotenant*.sock"))


def serves(node: Node, name: str, gpu: int) -> None:
    """Check that a new pod gets its GPU."""
    pod = node.add_pod(name, container_grant(gpus=[gpu], units=8))
    node.settled(pod)
    assert "Running" == node.kubelet.phase(pod), node.kubelet.message(pod)
    assert uuid(gpu) == node.gpus_seen(pod)


class TestTheKubelet:
    """Whatever the kubelet does, the plugin is registered with it soon after, and no running pod is touched."""

    def test_a_restart_is_noticed_and_running_pods_keep_what_they_hold(self) -> None:
        with Node() as node:
            pod = node.add_pod("p", container_grant(gpus=[1], units=8))
            node.running(pod)
            before = node.ids(pod)
            for round_ in range(3):
                node.reconnected(node.kubelet.restart)
                assert before == node.ids(pod)
                assert "Running" == node.kubelet.phase(pod)
                serves(node, f"after-{round_}", 0)

    def test_a_kubelet_that_starts_after_the_plugin_is_found(self) -> None:
        with Node(plugin=False) as node:
            node.kubelet.stop()
            shutil.rmtree(node.folder / "kubelet")
            node.start_plugin(wait=False)
            node.kubelet.start()
            allocatable(node, UNITS)
            serves(node, "p", 1)

    def test_our_socket_is_made_anew_when_somebody_deletes_it(self) -> None:
        with Node() as node:
            (socket,) = sockets(node)
            socket.unlink()
            # no kubelet comes to dial it, so there is nothing to wait for but the file
            assert wait_for(lambda: bool(sockets(node)))
            serves(node, "p", 1)
            node.reconnected(lambda: node.kubelet.devices.cancel_stream(NAMES.gpu_mem))  # needs the new socket
            serves(node, "q", 0)

    def test_a_stream_that_the_kubelet_loses_is_followed_by_a_new_registration(self) -> None:
        with Node() as node:
            for round_ in range(3):
                node.reconnected(lambda: node.kubelet.devices.cancel_stream(NAMES.gpu_mem))
                serves(node, f"p{round_}", round_ % 2)

    def test_pods_that_started_while_no_plugin_was_there_do_not_confuse(self) -> None:
        with Node(plugin=False) as node:
            # the kubelet knows no such resource and admits the pod without asking anybody
            stray = node.add_pod("stray", container_grant(gpus=[0], units=8))
            node.settled(stray)
            node.start_plugin()
            serves(node, "p", 1)
            assert not node.ids(stray)

    def test_pods_admitted_without_us_that_still_wait_for_their_image_do_not_confuse(self) -> None:
        with Node(plugin=False) as node:
            node.kubelet.faults.hold_starts = True
            stray = node.add_pod("stray", container_grant(gpus=[0], units=8))
            node.kubelet.wait(lambda: node.kubelet.admitted(stray), "the stray pod to be admitted")
            node.start_plugin()
            node.kubelet.faults.hold_starts = False
            serves(node, "p", 1)
            # the kubelet does not start a container without devices once the plugin asks to be called before
            node.kubelet.wait(lambda: node.kubelet.last_error(stray), "the stray pod to be held back")
            assert "no devices found allocated" in node.kubelet.last_error(stray)

    def test_rejected_pods_that_an_old_kubelet_still_lists_do_not_confuse(self) -> None:
        with Node() as node:
            node.kubelet.faults.list_inactive_pods = True
            for n in range(4):
                refused = node.add_pod(f"refused-{n}", annotations={}, spec=pod_spec(container_grant()))
                node.settled(refused)
                assert "Failed" == node.kubelet.phase(refused)
                serves(node, f"good-{n}", n % 2)

    def test_lists_beyond_the_kubelets_rate_limit_are_asked_for_again(self) -> None:
        with Node() as node:
            node.kubelet.pod_resources.BURST = 1
            node.kubelet.pod_resources.PER_SECOND = 20.0
            pods = [node.add_pod(f"p{n}", container_grant(gpus=[n % 2], units=4)) for n in range(8)]
            node.settled(*pods)
            assert ["Running"] * 8 == [node.kubelet.phase(pod) for pod in pods]

    def test_a_kubelet_that_does_not_list_its_pods_gets_no_answer(self) -> None:
        with Node() as node:
            node.kubelet.pod_resources.fails = grpc.StatusCode.INTERNAL
            pod = node.add_pod("p", container_grant(gpus=[0], units=8))
            node.settled(pod)
            assert "the kubelet does not list its pods" in node.kubelet.message(pod)
            node.kubelet.pod_resources.fails = None
            serves(node, "q", 1)


class TestThePlugin:
    """A plugin that starts again remembers nothing and decides the same."""

    def test_a_container_restarts_under_a_plugin_that_has_forgotten_everything(self) -> None:
        with Node() as node:
            first = node.add_pod("p", container_grant(gpus=[1], units=8))
            init = container_grant("fetch", gpus=[0], units=4, role=Role.INIT)
            second = node.add_pod("q", init, container_grant(gpus=[0], units=4))
            node.running(first)
            node.running(second)
            node.stop_plugin()
            allocatable(node, 0)
            node.start_plugin()
            allocatable(node, UNITS)
            node.kubelet.restart_container(first, "main")
            node.kubelet.restart_container(second, "fetch")
            assert uuid(1) == node.gpus_seen(first)
            serves(node, "r", 1)

    def test_a_container_does_not_start_when_its_ids_are_not_of_its_grant(self) -> None:
        with Node() as node:
            pod = node.add_pod("p", container_grant(gpus=[1], units=8))
            node.running(pod)
            # somebody with the right to do so rewrites the grant behind the kubelet's back
            forged = granted(container_grant(gpus=[0], units=8))
            node.api.patch(PODS, "p", {"metadata": {"annotations": forged}}, namespace="default")
            node.kubelet.crash_container(pod, "main")
            node.kubelet.wait(lambda: node.kubelet.last_error(pod), "the refusal")
            assert "but its grant is 8 units of each of GPU-00000000" in node.kubelet.last_error(pod)
            # it is repaired, and the kubelet, which keeps trying, starts it
            right = granted(container_grant(gpus=[1], units=8))
            node.api.patch(PODS, "p", {"metadata": {"annotations": right}}, namespace="default")
            node.kubelet.wait(lambda: node.kubelet.times_started(pod, "main") == 2, "the container to start again")

    def test_containers_restart_while_the_api_server_is_away(self) -> None:
        with Node() as node:
            pod = node.add_pod("p", container_grant(gpus=[1], units=8))
            node.running(pod)
            node.api.stop()
            node.kubelet.restart_container(pod, "main")
            assert 2 == node.kubelet.times_started(pod, "main")
            node.api.start()

    def test_stopping_withdraws_from_the_node_and_then_from_the_kubelet(self) -> None:
        with Node() as node:
            node.wait_published("serving", lambda i: i.serving)
            node.stop_plugin()
            published = node.published()
            assert published is not None
            assert not published.serving
            assert [] == sockets(node)
            allocatable(node, 0)


class TestTheInventory:
    """The node's annotation says what the node has, and its generation grows when that changes and only then."""

    def test_it_lists_each_gpu_in_whole_units(self) -> None:
        with Node(["81559MiB", "40GiB"], config="reservePerGpu: 512MiB") as node:
            published = node.wait_published("serving", lambda i: i.serving)
            # 81559 - 512 = 81047 MiB = 79.1 GiB, floored to 79; 40 GiB - 512 MiB floored to 39
            assert [79 * GIB, 39 * GIB] == [gpu.usable_bytes for gpu in published.gpus]
            allocatable(node, 79 + 39)

    def test_a_restart_without_a_change_keeps_the_generation_apart_from_serving(self) -> None:
        with Node() as node:
            first = node.wait_published("serving", lambda i: i.serving)
            node.stop_plugin()
            node.start_plugin()
            second = node.wait_published("serving again", lambda i: i.serving and i.generation > first.generation)
            # not serving, serving: two changes; a start that finds what it wants to write writes nothing
            assert first.generation + 2 == second.generation
            assert first.gpus == second.gpus

    def test_an_annotation_that_somebody_removes_comes_back(self) -> None:
        with Node() as node:
            node.wait_published("serving", lambda i: i.serving)
            node.api.patch(NODES, NODE, {"metadata": {"annotations": {NAMES.inventory: None}}})
            node.wait_published("back", lambda i: i.serving)

    @pytest.mark.parametrize("text", ["{", '{"version":9}', ""])
    def test_an_annotation_that_cannot_be_read_is_replaced(self, text: str) -> None:
        with Node() as node:
            node.wait_published("serving", lambda i: i.serving)
            node.api.patch(NODES, NODE, {"metadata": {"annotations": {NAMES.inventory: text}}})
            node.wait_published("readable", lambda i: i.serving)

    def test_a_watch_that_is_behind_makes_no_generation_twice(self) -> None:
        with Node() as node:
            first = node.wait_published("serving", lambda i: i.serving)
            node.api.freeze_watches()
            texts = {}
            for lost in (True, False, True):
                node.write_gpus([{"lost": lost}, {}])
                health = Health.UNHEALTHY if lost else Health.HEALTHY
                published = node.wait_published(health, lambda i, health=health: i.gpus[0].health is health)
                texts[published.generation] = published
            assert [first.generation + n for n in (1, 2, 3)] == [*texts]
            node.api.freeze_watches(frozen=False)  # the watch now tells of all that was, one after another
            node.write_gpus([{}, {}])
            last = node.wait_published("healthy", lambda i: i.gpus[0].health is Health.HEALTHY)
            assert last.generation > max(texts)

    def test_an_api_server_that_comes_late_is_told_in_the_end(self) -> None:
        with Node() as node:
            first = node.wait_published("serving", lambda i: i.serving)
            node.api.faults.refuse(500, method="PATCH", path="/nodes/", times=3)
            node.write_gpus([{"lost": True}, {}])
            changed = node.wait_published("changed", lambda i: i.generation > first.generation)
            assert Health.UNHEALTHY is changed.gpus[0].health

    def test_a_node_serves_whose_last_stream_opens_while_the_one_before_it_is_still_being_told(self) -> None:
        asked, go_on = threading.Event(), threading.Event()

        def serving() -> bool:
            found = all(one.serving for one in registrations)
            if threading.current_thread() is slow:
                asked.set()
                go_on.wait(SECONDS)
            return found

        with Node(plugin=False) as node, connect(node.kubeconfig) as cluster:
            publisher = Publisher(cluster, NODE, NAMES, unit_bytes=GIB)
            tell = partial(publisher.ask_serving, serving)
            registrations = [
                Registration(node.folder, f"a/{n}", serving_changed=tell, connected=lambda: None) for n in range(2)
            ]
            slow, last = (threading.Thread(target=one.opened) for one in registrations)
            publisher.start()
            publisher.set_gpus(())
            slow.start()
            assert asked.wait(SECONDS)
            last.start()
            last.join(0.2)  # as far as it comes
            go_on.set()
            slow.join()
            last.join()
            try:
                node.wait_published("serving", lambda i: i.serving)
            finally:
                publisher.stop()


class TestAGPU:
    """One bad GPU takes its own units away and nothing else; when it is back, so are they."""

    def test_a_lost_gpu_takes_its_units_and_its_recovery_gives_them_back(self) -> None:
        with Node() as node:
            pod = node.add_pod("p", container_grant(gpus=[0], units=8))
            node.running(pod)
            node.write_gpus([{"lost": True}, {}])
            allocatable(node, 80 + 8)  # the others, and what the pod holds
            published = node.wait_published("unhealthy", lambda i: i.gpus[0].health is Health.UNHEALTHY)
            assert "fallen off the bus" in published.gpus[0].detail
            assert Health.HEALTHY is published.gpus[1].health
            serves(node, "q", 1)
            node.write_gpus([{}, {}])
            allocatable(node, UNITS)
            serves(node, "r", 0)

    def test_a_gpu_that_fails_one_call_is_unhealthy_with_what_nvml_says(self) -> None:
        with Node() as node:
            node.write_gpus([{}, {"fail": "{nvmlDeviceGetUUID: 999}"}])
            published = node.wait_published("unhealthy", lambda i: i.gpus[1].health is Health.UNHEALTHY)
            assert "NVML says: Unknown Error (code 999)" == published.gpus[1].detail

    def test_a_gpu_in_mig_mode_is_not_handed_out_whole(self) -> None:
        with Node() as node:
            node.write_gpus([{}, {"mig": "true"}])
            published = node.wait_published("unhealthy", lambda i: i.gpus[1].health is Health.UNHEALTHY)
            assert "nvidia-smi -i 1 -mig 0" in published.gpus[1].detail
            allocatable(node, 80)


def test_a_node_of_eight_gpus_with_141_gib_is_served_whole() -> None:
    with Node(["141GiB"] * 8) as node:
        allocatable(node, 8 * 141)
        pods = [node.add_pod(f"p{n}", container_grant(gpus=[n], units=141)) for n in range(8)]
        node.settled(*pods)
        for gpu, pod in enumerate(pods):
            assert "Running" == node.kubelet.phase(pod), node.kubelet.message(pod)
            assert {id_prefix(uuid(gpu)): 141} == layout(node.ids(pod))


class TestTheCommand:
    """`cotenant-device-plugin` starts or says why not, and ends within seconds of SIGTERM."""

    def command(self, node: Node, *more: str) -> subprocess.Popen[str]:
        arguments = ["--kubeconfig", node.kubeconfig, "--kubelet-dir", str(node.folder / "kubelet")]
        arguments += ["--fake-gpus", str(node.gpu_file), *more]
        return subprocess.Popen(
            [sys.executable, "-c", "from device_plugin.main import main; main()", *arguments],
            env={**os.environ, "NODE_NAME": NODE},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def test_it_says_when_it_is_ready_and_ends_on_sigterm(self) -> None:
        with Node(plugin=False) as node, self.command(node) as process:
            try:
                assert process.stdout is not None
                line = process.stdout.readline()
                assert f"cotenant-device-plugin ready: 2 GPUs, 160 units of 1 GiB on node {NODE}\n" == line
                serves(node, "p", 1)
                process.send_signal(signal.SIGTERM)
                assert 0 == process.wait(timeout=10), process.stderr
            finally:
                process.kill()
            published = node.published()
            assert published is not None
            assert not published.serving
            allocatable(node, 0)

    @pytest.mark.parametrize(
        ("gpus", "config", "sentence"),
        [
            ("gpus: [{model: A, memory: 80GiB, colour: red}]", "", "gpus[0].colour: unknown key"),
            ("gpus: [{model: A, memory: lots}]", "", "'lots' is not a quantity"),
            ("gpus: [{model: A, memory: 141GiB, count: 8}]", "unit: 1MiB", f"but a kubelet handles {MAX_IDS} well"),
            ("gpus: []", "unit: 3", "unit: expected whole MiB"),
        ],
    )
    def test_it_refuses_to_start_with_a_sentence(self, gpus: str, config: str, sentence: str) -> None:
        with Node(plugin=False) as node:
            node.gpu_file.write_text(gpus)
            settings = node.folder / "config.yaml"
            settings.write_text(config)
            with self.command(node, "--config", str(settings)) as process:
                _, errors = process.communicate(timeout=SECONDS)
            assert 1 == process.returncode
            assert sentence in errors
            assert "Traceback" not in errors

    def test_it_names_the_address_that_somebody_else_has(self) -> None:
        with Node(plugin=False) as node, socket.create_server(("127.0.0.1", 0)) as other:
            address = f"127.0.0.1:{other.getsockname()[1]}"
            with self.command(node, "--serve", address) as process:
                _, errors = process.communicate(timeout=SECONDS)
        assert 1 == process.returncode
        assert f"Error: serve: {address} cannot be had: [Errno 98] Address already in use\n" in errors


def wait_for(condition: Callable[[], bool]) -> bool:
    """Wait for something that nobody tells of: a file."""
    tick = threading.Event()
    for _ in range(int(SECONDS / 0.02)):
        if condition():
            return True
        tick.wait(0.02)
    return False


def test_a_greeting_that_goes_on_failing_is_given_up_for_that_of_the_next_stream(tmp_path: Path) -> None:
    def fails() -> None:
        raise ValueError("as every time")

    registration = Registration(tmp_path, "a/greeted", serving_changed=lambda: None, connected=fails)

    def greeting() -> int:
        return sum(thread.name == "connected a/greeted" for thread in threading.enumerate())

    for _ in range(5):
        registration.opened()
        registration.ended()
    assert wait_for(lambda: greeting() == 1)
    registration.retire()
    assert wait_for(lambda: greeting() == 0)


def test_no_pod_of_a_storm_with_kubelet_restarts_gets_another_pods_gpu() -> None:
    with Node(["80GiB"] * 4) as node:
        pods: dict[str, int] = {}
        for burst in range(4):
            # 4 bursts of 10 pods of 4 units on 4 GPUs: 40 * 4 / 4 = 40 of 80 units each
            now = {node.add_pod(f"p{burst}-{n}", container_grant(gpus=[n % 4], units=4)): n % 4 for n in range(10)}
            pods |= now
            node.kubelet.wait(lambda now=now: sum(map(node.kubelet.admitted, now)) > 1, "some")  # type: ignore[misc]
            node.reconnected(node.kubelet.restart)
        node.settled(*pods)
        served = {uid for uid in pods if node.kubelet.phase(uid) == "Running"}
        for uid in served:
            assert uuid(pods[uid]) == node.gpus_seen(uid)
            assert {id_prefix(uuid(pods[uid])): 4} == layout(node.ids(uid))
        for uid in pods.keys() - served:
            # a kubelet that has just started rejects pods before any plugin can have registered; that is its own doing
            assert "no healthy devices present" in node.kubelet.message(uid)
        assert len(served) >= 4 * 2
