"""What the plugin shows over HTTP."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.device_plugin.node import NAMES, NODE, Node, container_grant, pod_spec, uuid
from tests.extender.running import call, eventually

SERVING = "serve: 127.0.0.1:0\nhealth: {cleanProbes: 1}"


def samples(node: Node) -> dict[tuple[str, ...], float]:
    """Read all samples by name and values in the order of the labels' names, the node's left out."""
    assert node.plugin is not None
    answer = call(node.plugin.serves_at, "GET", "/metrics")
    assert 200 == answer.status
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()) if value != NODE)): sample.value
        for family in text_string_to_metric_families(answer.body.decode())
        for sample in family.samples
    }


def read_when(node: Node, key: tuple[str, ...], value: float) -> dict[tuple[str, ...], float]:
    """Read all samples once one of them has come to this value."""
    assert eventually(lambda: samples(node).get(key) == value), samples(node)
    return samples(node)


def test_health_memory_and_xids_of_every_gpu_are_shown() -> None:
    with Node(config=SERVING) as node:
        node.write_gpus([{"xids": [79, 31, 31], "uncorrectedEcc": 2}, {"processes": "[{pid: 1, memory: 3GiB}]"}])
        read_when(node, ("cotenant_gpu_memory_used_bytes", "1", uuid(1)), 3 << 30)
        read_when(node, ("cotenant_gpu_xids_total", "application", "0", uuid(0), "31"), 2)
        found = read_when(node, ("cotenant_device_plugin_gpu_healthy", "0", uuid(0)), 0)
        assert 1 == found["cotenant_device_plugin_gpu_healthy", "1", uuid(1)]
        assert 2 == found["cotenant_gpu_uncorrected_ecc_errors", "0", uuid(0)]
        assert ("cotenant_gpu_uncorrected_ecc_errors", "1", uuid(1)) not in found  # which NVML does not tell
        assert 1 == found["cotenant_gpu_xids_total", "fatal", "0", uuid(0), "79"]
        assert 1 == found["cotenant_device_plugin_registered", NAMES.gpu_mem]


def test_every_call_of_the_kubelet_is_counted_with_its_outcome() -> None:
    with Node(config=SERVING) as node:
        node.running(node.add_pod("p", container_grant(gpus=[0], units=8)))
        node.settled(node.add_pod("q", annotations={}, spec=pod_spec(container_grant(gpus=[0], units=8))))
        found = samples(node)
        counts = {key[1:]: value for key, value in found.items() if key[0].endswith("call_duration_seconds_count")}
        expected = {
            ("GetPreferredAllocation", "ok"): 1,
            ("Allocate", "ok"): 1,
            ("PreStartContainer", "ok"): 1,
            ("GetPreferredAllocation", "refused"): 1,
        }
        assert expected.items() <= counts.items()


def test_health_and_readiness_say_what_is_missing() -> None:
    with Node(config=SERVING) as node:
        assert node.plugin is not None
        address = node.plugin.serves_at
        assert (200, b"ok\n") == (call(address, "GET", "/healthz").status, call(address, "GET", "/readyz").body)
        node.kubelet.stop()
        assert eventually(lambda: call(address, "GET", "/readyz").status == 503)
        assert b"no kubelet follows cotenant.io/gpu-mem\n" == call(address, "GET", "/readyz").body
        assert 200 == call(address, "GET", "/healthz").status
        node.kubelet.start()


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/", 404), ("POST", "/metrics", 405)])
def test_nothing_else_is_answered(method: str, path: str, status: int) -> None:
    with Node(config=SERVING) as node:
        assert node.plugin is not None
        assert status == call(node.plugin.serves_at, method, path).status


def test_nothing_is_served_where_nothing_is_configured() -> None:
    with Node() as node:
        assert node.plugin is not None
        assert "" == node.plugin.serves_at
