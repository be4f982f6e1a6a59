"""A node that allows no more threads or files for a while."""

import socket
import threading
import time

import grpc

from device_plugin.api import deviceplugin_pb2 as pb
from device_plugin.api import deviceplugin_pb2_grpc as rpc
from device_plugin.nvml.patience import Patience
from device_plugin.serving import HTTPServing
from tests.device_plugin.node import SECONDS, Node, container_grant, uuid
from tests.exhaustion import no_more_files, no_more_threads


def test_the_kubelet_is_answered_while_no_more_threads_are_allowed_and_after_that() -> None:
    with Node() as node:
        folder = node.folder / "kubelet" / "device-plugins"
        [socket] = folder.glob("cotenant*.sock")
        with grpc.insecure_channel(f"unix:{socket}") as channel:
            plugin = rpc.DevicePluginStub(channel)
            # each keeps a thread that may be there by now
            streams = [plugin.ListAndWatch(pb.Empty()) for _ in range(3)]
            for stream in streams:
                assert next(stream).devices
            with no_more_threads():
                assert plugin.GetDevicePluginOptions(pb.Empty(), timeout=SECONDS).pre_start_required
            for stream in streams:
                stream.cancel()
        pod = node.add_pod("p", container_grant(gpus=[1], units=8))
        node.running(pod)
        assert uuid(1) == node.gpus_seen(pod)


def test_a_gpu_is_asked_though_no_more_threads_are_allowed_and_again_after_that() -> None:
    patience = Patience(SECONDS)
    with no_more_threads():
        assert 80 == patience.one("memory", lambda: 80)
    in_thread = patience.one("thread", threading.current_thread)
    assert threading.current_thread() is not in_thread
    assert 80 == patience.one("memory", lambda: 80)


def test_a_probe_for_which_there_is_no_file_waits_costs_no_core_and_is_answered_after_that() -> None:
    serving = HTTPServing("127.0.0.1:0", expose=lambda: b"", unwell=lambda: "", unready=lambda: "")
    serving.start()
    try:
        with socket.socket() as asking:
            asking.settimeout(SECONDS)
            with no_more_files():
                asking.connect(("127.0.0.1", int(serving.address.rpartition(":")[2])))
                before = time.process_time()
                time.sleep(1)
                spent = time.process_time() - before
            asking.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
            assert asking.recv(1000).startswith(b"HTTP/1.0 200 OK")
        # all of the second, where the connection is asked for again and again
        assert spent < 0.5
    finally:
        serving.stop()
