"""The device plugin against a stand-in kubelet and API server, over real gRPC and HTTP."""

import pytest

from cotenant.contract.grant import Role
from cotenant.contract.units import id_prefix
from device_plugin.admission.ids import layout
from tests.device_plugin.node import NAMES, Node, container_grant, granted, pod_spec, uuid


def test_a_pod_gets_the_gpu_it_was_granted_and_the_three_accounts_agree() -> None:
    with Node() as node:
        pod = node.add_pod("p", container_grant(gpus=[1], units=8))
        node.running(pod)
        started = node.kubelet.started(pod, "main")
        assert started is not None
        assert {id_prefix(uuid(1)): 8} == layout(node.ids(pod))
        assert uuid(1) == started.env["NVIDIA_VISIBLE_DEVICES"]
        assert uuid(1) == started.env["COTENANT_GPU_UUIDS"]
        assert "0=8192M" == started.env["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"]  # 8 GiB = 8 * 1024 MiB


def test_a_burst_of_equal_pods_on_different_gpus_is_told_apart() -> None:
    with Node(["80GiB"] * 4) as node:
        # 24 pods of 8 units over 4 GPUs in turn: 6 * 8 = 48 of 80 units each
        pods = {node.add_pod(f"p{n}", container_grant(gpus=[n % 4], units=8)): n % 4 for n in range(24)}
        node.settled(*pods)
        for pod, gpu in pods.items():
            assert "Running" == node.kubelet.phase(pod), node.kubelet.message(pod)
            assert uuid(gpu) == node.gpus_seen(pod)
            assert {id_prefix(uuid(gpu)): 8} == layout(node.ids(pod))


def test_containers_of_one_pod_get_their_own_gpus() -> None:
    with Node() as node:
        first, second = container_grant("a", gpus=[1], units=8), container_grant("b", gpus=[0], units=8)
        pod = node.add_pod("p", first, second)
        node.running(pod)
        assert (uuid(1), uuid(0)) == (node.gpus_seen(pod, "a"), node.gpus_seen(pod, "b"))
        assert {id_prefix(uuid(1)): 8} == layout(node.ids(pod, "a"))
        assert {id_prefix(uuid(0)): 8} == layout(node.ids(pod, "b"))


def test_a_container_over_two_gpus_holds_half_its_units_on_each() -> None:
    with Node() as node:
        pod = node.add_pod("p", container_grant(gpus=[0, 1], units=16))
        node.running(pod)
        assert {id_prefix(uuid(0)): 8, id_prefix(uuid(1)): 8} == layout(node.ids(pod))
        assert f"{uuid(0)},{uuid(1)}" == node.gpus_seen(pod)


@pytest.mark.parametrize("main_units", [6, 8, 12], ids=["fewer", "as-many", "more"])
def test_an_init_containers_ids_are_taken_over_by_the_next_container(main_units: int) -> None:
    with Node() as node:
        init = container_grant("fetch", gpus=[1], units=8, role=Role.INIT)
        pod = node.add_pod("p", init, container_grant(gpus=[1], units=main_units))
        node.running(pod)
        shared = node.ids(pod, "fetch") & node.ids(pod)
        assert min(8, main_units) == len(shared)
        assert {id_prefix(uuid(1)): main_units} == layout(node.ids(pod))


def test_a_pod_where_only_the_init_container_asks_runs() -> None:
    with Node() as node:
        pod = node.add_pod("p", container_grant("fetch", gpus=[1], units=8, role=Role.INIT))
        node.running(pod)
        assert uuid(1) == node.gpus_seen(pod, "fetch")
        # and stays no candidate for what comes after it
        other = node.add_pod("q", container_grant(gpus=[0], units=8))
        node.running(other)
        assert uuid(0) == node.gpus_seen(other)


def test_a_sidecar_keeps_its_own_ids() -> None:
    with Node() as node:
        sidecar = container_grant("cache", gpus=[0], units=4, role=Role.SIDECAR)
        pod = node.add_pod("p", sidecar, container_grant(gpus=[1], units=8))
        node.running(pod)
        assert {id_prefix(uuid(0)): 4} == layout(node.ids(pod, "cache"))
        assert {id_prefix(uuid(1)): 8} == layout(node.ids(pod))


def test_a_pod_that_ends_gives_its_ids_to_the_next() -> None:
    with Node(["16GiB"]) as node:
        first = node.add_pod("p", container_grant(units=16))
        node.running(first)
        node.kubelet.finish(first)
        second = node.add_pod("q", container_grant(units=16))
        node.running(second)
        assert node.ids(second)


def test_a_pod_created_again_under_its_name_gets_its_new_grant() -> None:
    with Node() as node:
        for gpu in (0, 1, 0):
            pod = node.add_pod("web-0", container_grant(gpus=[gpu], units=8))
            node.running(pod)
            assert uuid(gpu) == node.gpus_seen(pod)
            node.api.delete_pod("web-0")
            node.kubelet.wait(lambda pod=pod: node.kubelet.phase(pod) == "", "the pod to go")  # type: ignore[misc]
            assert node.api.wait_until(lambda: node.api.pod("web-0") is None)


def test_a_pod_created_again_while_our_watch_is_silent_gets_its_new_grant() -> None:
    with Node() as node:
        first = node.add_pod("web-0", container_grant(gpus=[0], units=8))
        node.running(first)
        node.api.freeze_watches()
        node.kubelet.remove(first)
        node.api.delete_pod("web-0", grace=0)
        second = node.add_pod("web-0", container_grant(gpus=[1], units=8))
        manifest = node.api.pod("web-0")
        assert manifest is not None
        node.kubelet.add(manifest)  # the kubelet's own watch is ahead of ours
        node.running(second)
        assert uuid(1) == node.gpus_seen(second)
        node.api.freeze_watches(frozen=False)


class TestRefusals:
    """Whatever cannot be read or believed fails the pod with a sentence and an Event, and touches no other pod."""

    def refused(self, node: Node, pod: str) -> str:
        node.settled(pod)
        assert "Failed" == node.kubelet.phase(pod)
        assert "UnexpectedAdmissionError" == node.kubelet.reason(pod)
        message = node.kubelet.message(pod)
        assert message.startswith("Pod was rejected: Allocate failed due to ")
        # the next pod is served
        good = node.add_pod("good", container_grant(gpus=[1], units=8))
        node.running(good)
        assert uuid(1) == node.gpus_seen(good)
        return message

    def event(self, node: Node, reason: str) -> str:
        def find() -> list[str]:
            return [str(event["note"]) for event in node.api.events() if event["reason"] == reason]

        assert node.api.wait_until(find), node.api.events()
        return find()[0]

    def test_a_pod_without_a_grant(self) -> None:
        with Node() as node:
            pod = node.add_pod("p", annotations={}, spec=pod_spec(container_grant()))
            assert "pod default/p: the pod has no grant" in self.refused(node, pod)
            assert "the pod has no grant" in self.event(node, "NoGrant")

    @pytest.mark.parametrize(
        ("text", "sentence"),
        [
            ("{not json", "is not versioned JSON"),
            ('{"version":2,"containers":[]}', "has version 2, but this Cotenant reads version 1"),
            ('{"version":1,"containers":[]}', "is not valid"),
            ("", "is not versioned JSON"),
        ],
    )
    def test_a_grant_that_cannot_be_read(self, text: str, sentence: str) -> None:
        with Node() as node:
            pod = node.add_pod("p", annotations={NAMES.grant: text}, spec=pod_spec(container_grant()))
            assert sentence in self.refused(node, pod)
            assert sentence in self.event(node, "BadGrant")

    def test_a_grant_for_another_amount_than_the_container_asks(self) -> None:
        with Node() as node:
            annotations = granted(container_grant(units=4))
            pod = node.add_pod("p", annotations=annotations, spec=pod_spec(container_grant(units=8)))
            assert "has 4 units for it, but it asks for 8" in self.refused(node, pod)

    def test_a_grant_that_does_not_name_the_container(self) -> None:
        with Node() as node:
            annotations = granted(container_grant("other"))
            pod = node.add_pod("p", annotations=annotations, spec=pod_spec(container_grant("main")))
            assert "container main: the grant does not name it" in self.refused(node, pod)

    def test_a_grant_of_a_gpu_that_is_not_here(self) -> None:
        with Node() as node:
            pod = node.add_pod("p", container_grant(gpus=[7]))
            assert f"was granted GPU {uuid(7)}, which this node does not have" in self.refused(node, pod)

    def test_a_grant_of_more_than_the_gpu_has_free(self) -> None:
        with Node(["16GiB", "80GiB"]) as node:
            first = node.add_pod("p", container_grant(gpus=[0], units=12))
            node.running(first)
            second = node.add_pod("q", container_grant(gpus=[0], units=8))
            assert "the kubelet has 4 of the 8 units free" in self.refused(node, second)  # 16 - 12 = 4
            assert "something else holds device ids of it" in self.event(node, "WrongDevices")
