"""Nodes that come back as others."""

from __future__ import annotations

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
