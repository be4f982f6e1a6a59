"""Where the programs answer: HOST:PORT, or [HOST]:PORT, of which [::] is every address of IPv6 and of IPv4."""

import socket
from collections.abc import Callable
from socket import AddressFamily
from typing import NamedTuple

_EVERYWHERE = "::"


class Place(NamedTuple):
    """Name where a socket is bound: its family, and the address as bind takes it."""

    family: AddressFamily
    address: tuple[str, int]

    def prepare(self, listener: socket.socket) -> None:
        """Have a socket that is not bound yet take IPv4 beside IPv6, also where net.ipv6.bindv6only is set."""
        if self.address[0] == _EVERYWHERE:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)


def place(text: str, *, has_ipv6: Callable[[], bool] = socket.has_dualstack_ipv6) -> Place:
    """Read HOST:PORT; on a kernel without IPv6, [::] is every address of IPv4."""
    host, _, port = text.rpartition(":")
    host = host.strip("[]")
    if host == _EVERYWHERE and not has_ipv6():
        host = "0.0.0.0"
    family = AddressFamily.AF_INET6 if ":" in host else AddressFamily.AF_INET
    return Place(family, (host, int(port)))
