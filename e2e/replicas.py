"""Replicas as the layouts run them: an extender, and in the second-scheduler layout a kube-scheduler in its pod.

The containers of a pod share a host name, by which an extender knows its own kube-scheduler; here each replica has a
UTS namespace of its own, which takes root.
"""

import os
import signal
import socket
import sys
import threading
import urllib.request
from pathlib import Path
from typing import Any, Self

import yaml

from e2e.cluster import ControlPlane, Scheduler
from e2e.kustomize import MANIFESTS
from e2e.processes import Program, find_program, free_ports
from e2e.rest import Api

NAMESPACE = "cotenant-system"
LABEL = "cotenant.io/writer"


def why_not() -> str:
    """Say why replicas cannot run here, "" where they can."""
    return "" if os.geteuid() == 0 else "replicas need a host name of their own each, and so root"


def fence(layout: str) -> str:
    """Return the policy that refuses the Bindings of any but the writer, as shipped."""
    return (MANIFESTS / layout / "writer.yaml").read_text()


class Replica:
    """One pod of a layout: its extender, and its kube-scheduler where it has one."""

    def __init__(
        self,
        cluster: ControlPlane,
        directory: Path,
        name: str,
        *,
        kubeconfig: Path,
        layout: str,
    ) -> None:
        """Prepare it, with the credentials of its account; the files go to `directory`."""
        self.name = name
        self._cluster = cluster
        self._kubeconfig = kubeconfig
        self._layout = layout
        self._directory = directory / name
        self._directory.mkdir(parents=True, exist_ok=True)
        self.verbs, self.serve, self._port = free_ports(3)
        self._starts = 0
        self.extender: Program | None = None
        self.scheduler: Program | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the extender, and once it has read the cluster the kube-scheduler, as in a pod with sidecars."""
        self._starts += 1
        self.start_extender()
        if self._layout == "second-scheduler":
            self._start_scheduler()

    def start_extender(self) -> None:
        """Start the extender alone."""
        config = yaml.safe_load((MANIFESTS / self._layout / "extender-config.yaml").read_text())
        config |= {"listen": f"127.0.0.1:{self.verbs}", "serve": f"127.0.0.1:{self.serve}"}
        path = self._directory / "extender.yaml"
        path.write_text(yaml.safe_dump(config))
        words = [
            Path(sys.executable).with_name("cotenant-extender"),
            f"--config={path}",
            f"--kubeconfig={self._kubeconfig}",
        ]
        log = self._directory / f"extender-{len(list(self._directory.glob('extender-*.log'))) + 1}.log"
        self.extender = self._run(words, log)
        self.extender.wait_ready(lambda: "cotenant-extender ready" in log.read_text())

    def _start_scheduler(self) -> None:
        config = yaml.safe_load((MANIFESTS / self._layout / "scheduler-config.yaml").read_text())
        kubeconfig = self._kubeconfig  # a pod has one account
        config["clientConnection"]["kubeconfig"] = str(kubeconfig)
        config["extenders"][0]["urlPrefix"] = f"http://127.0.0.1:{self.verbs}"
        path = self._directory / "scheduler.yaml"
        path.write_text(yaml.safe_dump(config))
        words: list[str | Path] = [
            find_program("kube-scheduler"),
            f"--config={path}",
            f"--authentication-kubeconfig={kubeconfig}",
            f"--authorization-kubeconfig={kubeconfig}",
            "--bind-address=127.0.0.1",
            f"--secure-port={self._port}",
            f"--cert-dir={self._directory / 'certs'}",
        ]
        self.scheduler = self._run(words, self._directory / f"scheduler-{self._starts}.log")
        serving = Scheduler(self.scheduler, self._port, self._cluster.users["admin"].token)
        # ready also while it stands by
        self.scheduler.wait_ready(serving.ready)

    def _run(self, words: list[Any], log: Path) -> Program:
        rename = 'hostname "$0" && exec "$@"'
        return Program(
            [find_program("unshare"), "--uts", "sh", "-c", rename, self.name, *words],
            log=log,
            environment={"POD_NAME": self.name},
        )

    @property
    def programs(self) -> list[Program]:
        return [one for one in (self.scheduler, self.extender) if one is not None]

    def metrics(self) -> str:
        """Read the extender's metrics."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.serve}/metrics", timeout=10) as answer:
            text: str = answer.read().decode()
        return text

    def kill(self) -> None:
        """End all of it at once, as a node that loses power would."""
        for program in self.programs:
            program.kill()
        self.extender = self.scheduler = None

    def freeze(self) -> None:
        """Stop all of it in the middle of whatever it does."""
        for program in self.programs:
            os.kill(program.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        for program in self.programs:
            if program.running:
                os.kill(program.pid, signal.SIGCONT)

    def stop(self) -> None:
        """End it as the kubelet would."""
        self.thaw()
        for program in self.programs:
            program.stop()
        self.extender = self.scheduler = None


class VerbsService:
    """What kube-proxy makes of the Service `cotenant-verbs`: each new connection goes to the pod that has the label."""

    def __init__(self, api: Api, ports: dict[str, int]) -> None:
        """Prepare a service of the pods by name, with the port of their verbs."""
        self._api = api
        self._ports = ports
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def backend(self) -> str | None:
        """Name the pod that a new connection would go to; kube-proxy picks one of several by chance."""
        found = self._api.list("Pod", namespace=NAMESPACE, labels=f"{LABEL}=true")
        return next((pod["metadata"]["name"] for pod in found), None)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._connect, args=(client,), daemon=True).start()

    def _connect(self, client: socket.socket) -> None:
        name = self.backend()
        try:
            if name is None:
                raise ConnectionRefusedError
            server = socket.create_connection(("127.0.0.1", self._ports[name]), timeout=5)
            server.settimeout(None)
        except OSError:
            client.close()
            return
        for source, sink in ((client, server), (server, client)):
            threading.Thread(target=_pump, args=(source, sink), daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(1 << 16):
            sink.sendall(data)
    except OSError:
        pass
    finally:
        for end in (source, sink):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue
