"""Nodes that come back as others."""

from cotenant.contract.inventory import Health
from cotenant.standins.api_rules import NODES
from tests.device_plugin.node import NAMES, NODE, Node, container_grant, uuid


def test_a_node_that_comes_back_with_other_gpus_starts_nothing_by_old_grants() -> None:
    with Node() as node:
        before = node.add_pod("before", container_grant(gpus=[0], units=8))
        node.running(before)
        node.stop_plugin()
        node.api.store.delete(NODES, ("", NODE))
        node.write_gpus([{"uuid": uuid(7), "memory": "40GiB"}])
        node.api.add_node(NODE)
        node.start_plugin(wait=False)
        published = node.wait_published("the new GPU's", lambda i: [uuid(7)] == [gpu.uuid for gpu in i.gpus])
        assert Health.HEALTHY is published.gpus[0].health
        node.kubelet.wait(lambda: 40 == node.kubelet.allocatable(NAMES.gpu_mem), "the new GPU's units")

        late = node.add_pod("late", container_grant(gpus=[0], units=8))
        node.settled(late)

        assert "Failed" == node.kubelet.phase(late)
        assert f"was granted GPU {uuid(0)}, which this node does not have" in node.kubelet.message(late)
        assert frozenset() == node.ids(late)


def test_a_container_whose_gpu_is_gone_is_not_started_again_and_starts_when_it_is_back() -> None:
    with Node() as node:
        pod = node.add_pod("p", container_grant(gpus=[0], units=8))
        node.running(pod)
        node.stop_plugin()
        node.write_gpus([{"uuid": uuid(1), "memory": "80GiB"}])
        node.start_plugin()

        node.kubelet.crash_container(pod, "main")

        node.kubelet.wait(lambda: node.kubelet.last_error(pod), "the refusal")
        assert f"was granted GPU {uuid(0)}, which this node does not have" in node.kubelet.last_error(pod)
        assert 1 == node.kubelet.times_started(pod, "main")
        node.stop_plugin()
        node.write_gpus([{"uuid": uuid(0), "memory": "80GiB"}, {"uuid": uuid(1), "memory": "80GiB"}])
        node.start_plugin()
        node.kubelet.wait(lambda: node.kubelet.times_started(pod, "main") == 2, "the container to start again")
