"""Whatever comes in over the plugin's socket: a gRPC answer or error, no hang, and a plugin that serves as before."""

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from device_plugin.api import deviceplugin_pb2 as pb
from device_plugin.api import deviceplugin_pb2_grpc as rpc
from tests.device_plugin.node import Node, container_grant, uuid

REQUESTS = int(os.environ.get("COTENANT_FUZZ", "40"))
often = settings(max_examples=REQUESTS, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
# It looks for the pod for this long at most, and there is none.
SECONDS = 30.0

ids = st.lists(st.text(max_size=12) | st.sampled_from(["0", "a-0", f"{uuid(0)}-0", "../../x"]), max_size=6)


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with Node() as running:
        yield running


def sockets(node: Node) -> list[Path]:
    folder = node.folder / "kubelet" / "device-plugins"
    return [path for path in folder.glob("*.sock") if path.name != "kubelet.sock"]


def stub(node: Node) -> rpc.DevicePluginStub:
    (path,) = sockets(node)
    return rpc.DevicePluginStub(grpc.insecure_channel(f"unix:{path}"))


def refused(error: grpc.RpcError) -> str:
    """Give what it says; whatever it is, it is a sentence, and no traceback."""
    said: str = error.details() or ""
    assert "Traceback" not in said
    return said


@often
@given(chosen=ids)
def test_ids_that_nobody_was_granted_start_nothing(node: Node, chosen: list[str]) -> None:
    plugin = stub(node)
    request = pb.AllocateRequest(container_requests=[pb.ContainerAllocateRequest(devices_ids=chosen)])
    with pytest.raises(grpc.RpcError) as error:
        plugin.Allocate(request, timeout=SECONDS)
    assert refused(error.value)
    with pytest.raises(grpc.RpcError) as error:
        plugin.PreStartContainer(pb.PreStartContainerRequest(devices_ids=chosen), timeout=SECONDS)
    assert refused(error.value)


@often
@given(
    body=st.binary(max_size=100), method=st.sampled_from(["Allocate", "GetPreferredAllocation", "PreStartContainer"])
)
def test_bytes_that_are_no_message_are_answered_with_an_error(node: Node, body: bytes, method: str) -> None:
    (path,) = sockets(node)
    with grpc.insecure_channel(f"unix:{path}") as channel:
        call: Callable[..., object] = channel.unary_unary(f"/v1beta1.DevicePlugin/{method}")
        try:
            call(body, timeout=SECONDS)
        except grpc.RpcError as error:
            refused(error)


def test_after_all_that_a_pod_gets_the_gpu_that_it_was_granted(node: Node) -> None:
    (path,) = sockets(node)
    # what is no HTTP/2, and connections that say nothing
    silent = []
    for said in (b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 1000, *([b""] * 50)):
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(path))
        connection.sendall(said)
        silent.append(connection)
    pod = node.add_pod("p", container_grant(gpus=[1], units=8))
    node.running(pod)
    assert uuid(1) == node.gpus_seen(pod)
    for connection in silent:
        connection.close()
