"""One address for IPv4 and IPv6, of both programs' servers, by real sockets."""

import socket
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

from cotenant.listening import place
from device_plugin.serving import HTTPServing
from extender.http.call_server import CallServer
from extender.http.calls import Answer

# Serves at an address, and gives the one that it took.
Serves = Callable[[str], AbstractContextManager[str]]

with_ipv6 = pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this kernel has no IPv6")


@contextmanager
def extender(address: str) -> Iterator[str]:
    server = CallServer(address, lambda _: Answer(200, b"ok\n"))
    server.start()
    try:
        yield server.address
    finally:
        server.stop()


@contextmanager
def device_plugin(address: str) -> Iterator[str]:
    serving = HTTPServing(address, expose=lambda: b"", unwell=lambda: "", unready=lambda: "")
    serving.start()
    try:
        yield serving.address
    finally:
        serving.stop()


def answer(host: str, address: str) -> bytes:
    with urllib.request.urlopen(f"http://{host}:{address.rpartition(':')[2]}/healthz", timeout=30) as got:
        text: bytes = got.read()
    return text


@with_ipv6
@pytest.mark.parametrize("program", [extender, device_plugin])
@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_who_serves_everywhere_is_reached_by_ipv4_and_by_ipv6(program: Serves, host: str) -> None:
    with program("[::]:0") as address:
        assert address.startswith("[::]:")
        assert b"ok\n" == answer(host, address)


@with_ipv6
@pytest.mark.parametrize("program", [extender, device_plugin])
@pytest.mark.parametrize(("own", "other"), [("127.0.0.1", "[::1]"), ("[::1]", "127.0.0.1")])
def test_who_serves_at_one_address_is_reached_there_alone(program: Serves, own: str, other: str) -> None:
    with program(f"{own}:0") as address:
        assert b"ok\n" == answer(own, address)
        with pytest.raises(OSError, match="refused"):
            answer(other, address)


@with_ipv6
def test_ipv4_is_taken_where_the_node_keeps_it_from_ipv6_sockets() -> None:
    everywhere = place("[::]:0")
    with socket.socket(everywhere.family) as listener:
        # as with the sysctl net.ipv6.bindv6only
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        everywhere.prepare(listener)
        listener.bind(everywhere.address)
        listener.listen()
        socket.create_connection(("127.0.0.1", listener.getsockname()[1]), 30).close()


def test_on_a_kernel_without_ipv6_everywhere_is_all_of_ipv4() -> None:
    everywhere = place("[::]:0", has_ipv6=lambda: False)
    with socket.socket(everywhere.family) as listener:
        everywhere.prepare(listener)
        listener.bind(everywhere.address)
        assert "0.0.0.0" == listener.getsockname()[0]
    # what names IPv6 itself cannot be had there, and is not turned into something else
    assert ("::1", 0) == place("[::1]:0", has_ipv6=lambda: False).address
