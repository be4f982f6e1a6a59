"""GPUs counted by shares: which ids the kubelet is steered to, and what a container gets for them."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotenant.contract.inventory import Health
from device_plugin.admission.ids import gpu_of, share_ids
from device_plugin.admission.refusal import RefusedError
from device_plugin.api import deviceplugin_pb2 as pb
from device_plugin.families.replicas import Replicas, Shares
from tests.device_plugin.node import NODE, Node, container_grant, uuid

GPU = "nvidia.com/gpu"


def shares(*replicas: int, packed: bool = False, single: bool = False) -> tuple[Replicas, list[str]]:
    """Serve GPUs A, B, ... with so many shares each; give the ids too."""
    ids = [device for name, count in zip("ABCD", replicas, strict=False) for device in share_ids(name, count)]
    served = Replicas(GPU, lambda uuids: pb.ContainerAllocateResponse(envs={"GPUS": ",".join(uuids)}))
    served.take(Shares(dict.fromkeys(ids, True), single=single, packed=packed))
    return served, ids


class TestPreference:
    """Shares of one request are of different GPUs; the least used come first, or the most."""

    def test_a_gpu_that_is_not_shared_has_its_own_uuid_for_id(self) -> None:
        assert ["GPU-1"] == share_ids("GPU-1", 1)
        assert ["GPU-1::0", "GPU-1::1"] == share_ids("GPU-1", 2)

    def test_the_least_used_gpu_comes_first(self) -> None:
        served, ids = shares(4, 4)
        free = sorted(set(ids) - {"A::0", "A::1", "B::0"})
        assert ["B::1"] == served.prefer(free, [], 1)

    def test_packed_takes_the_most_used(self) -> None:
        served, ids = shares(4, 4, packed=True)
        free = sorted(set(ids) - {"A::0", "A::1", "B::0"})
        assert ["A::2"] == served.prefer(free, [], 1)

    def test_two_shares_are_of_two_gpus_as_long_as_there_are_two(self) -> None:
        served, ids = shares(4, 4, packed=True)
        assert {"A", "B"} == set(map(gpu_of, served.prefer(ids, [], 2)))
        assert Counter(A=2, B=1) == Counter(map(gpu_of, served.prefer(ids, ["A::3"], 3)))

    @given(data=st.data(), replicas=st.lists(st.integers(1, 4), min_size=1, max_size=4), packed=st.booleans())
    def test_any_request_that_can_be_met_is_met_as_evenly_as_can_be(
        self, data: st.DataObject, replicas: list[int], *, packed: bool
    ) -> None:
        served, ids = shares(*replicas, packed=packed)
        free = data.draw(st.lists(st.sampled_from(ids), min_size=1, unique=True))
        must = data.draw(st.lists(st.sampled_from(free), unique=True))
        count = data.draw(st.integers(max(1, len(must)), len(free)))

        chosen = served.prefer(free, must, count)

        assert count == len(chosen) == len(set(chosen))
        assert set(must) <= set(chosen) <= set(free)
        mine, left = Counter(map(gpu_of, chosen)), Counter(map(gpu_of, set(free) - set(chosen)))
        forced = Counter(map(gpu_of, must))
        # nobody has two more than another GPU that still has some, unless the kubelet wanted that
        for gpu, taken in mine.items():
            assert all(taken - 1 <= mine[other] for other in left) or taken == forced[gpu]


class TestAllocate:
    """The ids say all: no grant is needed."""

    def test_the_container_gets_each_gpu_once(self) -> None:
        served, _ = shares(2, 2)
        assert {"GPUS": "A,B"} == dict(served.allocate(["B::1", "A::0", "A::1"]).envs)

    def test_more_than_one_share_is_refused_where_it_is_to_be(self) -> None:
        served, _ = shares(2, single=True)
        served.allocate(["A::0"])
        with pytest.raises(RefusedError, match=r"asks 2 of nvidia.com/gpu, which are shares of GPUs"):
            served.allocate(["A::0", "A::1"])

    def test_ids_of_a_sharing_that_has_changed_are_refused(self) -> None:
        served, _ = shares(2)
        with pytest.raises(RefusedError, match="has no device ids A: the sharing of GPUs has just changed"):
            served.allocate(["A"])


SHARED = "gpus: [{indices: [0], family: replicas, resource: nvidia.com/gpu.shared, replicas: 4}]"
WHOLE = "{indices: [1], family: replicas}"


def asking(count: int, resource: str = GPU) -> dict[str, Any]:
    limits = {resource: str(count)}
    return {"nodeName": NODE, "containers": [{"name": "main", "resources": {"limits": limits}}]}


def env(node: Node, pod: str) -> dict[str, str]:
    started = node.kubelet.started(pod, "main")
    assert started is not None
    return dict(started.env)


class TestOnANode:
    """Shares, whole GPUs and memory on one node, each GPU in one of them."""

    def test_a_node_offers_shares_whole_gpus_and_memory_at_once(self) -> None:
        config = SHARED.replace("gpus: [", f"gpus: [{WHOLE}, ")
        with Node(["16GiB"] * 3, config=config) as node:
            expected = {GPU: 1, "nvidia.com/gpu.shared": 4, "cotenant.io/gpu-mem": 16}
            node.kubelet.wait(lambda: node.kubelet.devices.capacity()[1] == expected, "all resources")
            whole = node.add_pod("whole", annotations={}, spec=asking(1))
            shared = [node.add_pod(f"s{n}", annotations={}, spec=asking(1, "nvidia.com/gpu.shared")) for n in range(4)]
            granted = node.add_pod("granted", container_grant(gpus=[2], units=8))
            node.settled(whole, granted, *shared)
            assert uuid(1) == env(node, whole)["NVIDIA_VISIBLE_DEVICES"]
            assert [uuid(0)] * 4 == [env(node, pod)["NVIDIA_VISIBLE_DEVICES"] for pod in shared]
            assert "nothing" == env(node, shared[0])["COTENANT_ENFORCED_BY"]
            assert uuid(2) == node.gpus_seen(granted)
            held = node.kubelet.devices.held(shared[0], "main")
            assert next(iter(held["nvidia.com/gpu.shared"])).startswith(f"{uuid(0)}::")

    def test_a_gpu_that_tells_no_memory_is_shared_by_replicas_alone(self) -> None:
        with Node(["16GiB"] * 2, config=SHARED, plugin=False) as node:
            unified = {"fail": "{nvmlDeviceGetMemoryInfo: 3, nvmlDeviceGetMemoryInfo_v2: 3}"}  # NOT_SUPPORTED
            node.write_gpus([unified, unified])
            node.start_plugin(wait=False)
            found = node.wait_published("both", lambda i: len(i.gpus) == 2)
            shared, memory = found.gpus
            assert ("", Health.HEALTHY) == (shared.detail, shared.health)
            assert (0, Health.UNHEALTHY) == (memory.usable_bytes, memory.health)
            assert "NVML tells no memory of it, as of a GPU that shares the machine's" in memory.detail
            node.kubelet.wait(
                lambda: node.kubelet.devices.capacity()[1].get("nvidia.com/gpu.shared") == 4, "its shares"
            )
            pod = node.add_pod("s", annotations={}, spec=asking(1, "nvidia.com/gpu.shared"))
            node.settled(pod)
            assert uuid(0) == env(node, pod)["NVIDIA_VISIBLE_DEVICES"]

    def test_the_extender_is_told_that_such_a_gpu_is_not_memory(self) -> None:
        with Node(["16GiB"] * 2, config=SHARED) as node:
            found = node.wait_published("of two families", lambda i: len(i.gpus) == 2)
            assert ["replicas", "memory"] == [str(gpu.family) for gpu in found.gpus]

    def test_a_grant_for_a_gpu_that_is_shared_otherwise_is_refused(self) -> None:
        with Node(["16GiB"] * 2, config=SHARED) as node:
            pod = node.add_pod("p", container_grant(gpus=[0], units=8))
            node.settled(pod)
            assert "Failed" == node.kubelet.phase(pod)
