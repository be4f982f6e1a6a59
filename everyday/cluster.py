"""A whole cluster on this machine: the control plane with its controllers, one real node whose pods have a network.

Here Deployments and DaemonSets run as they do anywhere, so that what is installed is the manifests and nothing else. As
there is no kube-proxy, one address stands for the Service `kubernetes`: the loopback device has it, and who connects
to it is passed on to kube-apiserver.
"""

import contextlib
import json
import os
import socket
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from e2e import image
from e2e.cluster import ControlPlane
from e2e.node import RealNode
from e2e.processes import Program, bin_directory, find_program, free_ports
from e2e.rest import Api

SERVICES = "10.123.0.0/24"
KUBERNETES = "10.123.0.1"
PODS = "10.124.0.0/24"
_CHUNK = 1 << 16
_ROOT = Path(__file__).resolve().parent.parent


class WholeCluster:
    """A running cluster of one node."""

    def __init__(self, directory: Path, *, images: Sequence[Path], schedulers: Sequence[str]) -> None:
        """Prepare a cluster in `directory`; `images` are docker archives for its node, `schedulers` profiles."""
        self.directory = directory
        self._schedulers = schedulers
        self._images = images
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start(self) -> None:
        self.control_plane = self._stack.enter_context(
            ControlPlane(
                self.directory / "control-plane",
                service_accounts=True,
                api_server_flags=[f"--service-cluster-ip-range={SERVICES}"],
            )
        )
        self._stack.enter_context(_no_network_left())
        self._stack.enter_context(forwarded((KUBERNETES, 443), ("127.0.0.1", self.control_plane.port)))
        self._stack.callback(self._start_controllers().stop)
        self.control_plane.start_scheduler({
            "apiVersion": "kubescheduler.config.k8s.io/v1",
            "kind": "KubeSchedulerConfiguration",
            "profiles": [{"schedulerName": name} for name in self._schedulers],
        })  # fmt: skip
        network = {
            "cniVersion": "1.0.0",
            "name": "pods",
            "plugins": [
                {
                    "type": "ptp",
                    "ipam": {
                        "type": "host-local",
                        "dataDir": str(self.directory / "addresses"),
                        "ranges": [[{"subnet": PODS}]],
                        "routes": [{"dst": "0.0.0.0/0"}],
                    },
                }
            ],
        }
        self.node = RealNode(
            self.control_plane, self.directory / "node", network=json.dumps(network), images=self._images
        )
        self._stack.enter_context(self.node)

    def _start_controllers(self) -> Program:
        certs = self.control_plane.directory / "certs"
        (port,) = free_ports(1)
        admin = self.control_plane.kubeconfig()
        program = Program(
            [
                find_program("kube-controller-manager"),
                f"--kubeconfig={admin}",
                f"--authentication-kubeconfig={admin}",
                f"--authorization-kubeconfig={admin}",
                f"--service-account-private-key-file={certs / 'service-account.key'}",
                f"--root-ca-file={self.control_plane.ca_file}",
                "--leader-elect=false",
                "--bind-address=127.0.0.1",
                f"--secure-port={port}",
                f"--cert-dir={self.directory / 'controllers.certs'}",
                # one node, whose lease nobody has to watch
                "--controllers=*,-node-lifecycle-controller,-taint-eviction-controller",
            ],
            log=self.directory / "kube-controller-manager.log",
        )
        program.wait_ready(
            lambda: bool(self.api().list("ServiceAccount", namespace="default")), timeout_s=120
        )  # which pods need
        return program

    def api(self) -> Api:
        """Return a client as admin."""
        return self.control_plane.api()

    def run(self, *command: str | Path, check: bool = True, home: Path | None = None) -> str:
        """Run a program as an admin does, with what we built first on its PATH; return what it prints."""
        path = os.pathsep.join(
            [str(bin_directory()), str(_ROOT / ".venv/bin"), str(_ROOT / "scripts"), os.environ["PATH"]]
        )
        home = home or self.directory
        done = subprocess.run(
            [str(word) for word in command],
            check=False,
            capture_output=True,
            text=True,
            timeout=300,
            env={
                **os.environ,
                "PATH": path,
                "KUBECONFIG": str(self.control_plane.kubeconfig()),
                "HOME": str(home),
                "XDG_CACHE_HOME": str(home / "cache"),
            },
        )
        if check and done.returncode:
            raise AssertionError(f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
        return done.stdout if check else done.stdout + done.stderr


@contextlib.contextmanager
def _no_network_left() -> Iterator[None]:
    """Remove the network namespaces that killed pods leave, with their devices and routes, and restore forwarding."""
    forwarding, ip = Path("/proc/sys/net/ipv4/ip_forward"), find_program("ip")
    before = forwarding.read_text()
    known = {path.name for path in Path("/var/run/netns").glob("cni-*")}
    try:
        yield
    finally:
        for path in Path("/var/run/netns").glob("cni-*"):
            if path.name not in known:
                subprocess.run([ip, "netns", "delete", path.name], check=True)
        forwarding.write_text(before)


def write_scheduler_image(path: Path, *, tag: str) -> None:
    """Write the image of kube-scheduler that the manifests name, around the binary that was built."""
    image.write_program(path, program=find_program("kube-scheduler"), tag=tag)


@contextlib.contextmanager
def forwarded(listen: tuple[str, int], target: tuple[str, int]) -> Iterator[None]:
    """Be kube-proxy for one port of a Service."""
    with _address(listen[0]), _Forwarder(listen, target):
        yield


@contextlib.contextmanager
def _address(address: str) -> Iterator[None]:
    """Give the loopback device an address for a while."""
    ip = find_program("ip")
    subprocess.run([ip, "address", "replace", f"{address}/32", "dev", "lo"], check=True)
    try:
        yield
    finally:
        subprocess.run([ip, "address", "del", f"{address}/32", "dev", "lo"], check=True)


class _Forwarder:
    """Pass every connection on to another address, both ways, until either side ends."""

    def __init__(self, listen: tuple[str, int], target: tuple[str, int]) -> None:
        self._target = target
        self._listener = socket.create_server(listen)

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return  # the listener was closed
            try:
                server = socket.create_connection(self._target)
            except OSError:
                client.close()  # nobody listens there just now, as while the API server is started again
                continue
            for one, other in ((client, server), (server, client)):
                threading.Thread(target=_copy, args=(one, other), daemon=True).start()


def _copy(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(_CHUNK):
            sink.sendall(data)
    for one in (source, sink):
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)
