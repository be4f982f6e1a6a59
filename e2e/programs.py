"""Our two programs as users run them, next to a kube-scheduler with the configuration that we ship."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import yaml

from e2e.agreement import phase, settled, why_failed
from e2e.cluster import ControlPlane
from e2e.kustomize import MANIFESTS
from e2e.node import RealNode
from e2e.processes import Program, free_ports
from e2e.rest import Api, Object

SCHEDULER_CONFIG = MANIFESTS / "second-scheduler" / "scheduler-config.yaml"


class RunningProgram:
    """One of our programs as a process; started again, it keeps its flags and gets a new log.

    `source` is the tree of another version, whose program is started from then on; None is the one installed here. Both
    run with the libraries of this environment.
    """

    def __init__(self, name: str, directory: Path, flags: Sequence[str]) -> None:
        """Prepare the program; its logs go to `directory`."""
        self._name = name
        self._directory = directory
        self._flags = list(flags)
        self._program: Program | None = None
        self.source: Path | None = None
        self.logs: list[Path] = []

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def program(self) -> Program:
        """The process; raise RuntimeError where it was not started."""
        if self._program is None:
            raise RuntimeError(f"{self._name} was not started")
        return self._program

    def start(self, *, wait: bool = True) -> None:
        """Start it, and wait for its ready line or leave that to wait_ready()."""
        self._directory.mkdir(parents=True, exist_ok=True)
        log = self._directory / f"{self._name}-{len(self.logs) + 1}.log"
        self.logs.append(log)
        command, environment = [str(Path(sys.executable).with_name(self._name))], {}
        if self.source is not None:
            module = f"{self._name.removeprefix('cotenant-').replace('-', '_')}.main"
            command = [sys.executable, "-P", "-c", f"from {module} import main; main()"]
            environment = {"PYTHONPATH": str(self.source)}
        self._program = Program([*command, *self._flags], log=log, environment=environment)
        if wait:
            self.wait_ready()

    def wait_ready(self) -> None:
        """Wait for its ready line."""
        self.program.wait_ready(lambda: f"{self._name} ready" in self.logs[-1].read_text())

    def kill(self) -> None:
        """End it as a crash would."""
        self.program.kill()
        self._program = None

    def stop(self) -> None:
        """End it as the kubelet would."""
        if self._program is not None:
            self._program.stop()
            self._program = None


class RunningExtender(RunningProgram):
    """`cotenant-extender`, ready once the ledger has been read."""

    def __init__(
        self, cluster: ControlPlane, directory: Path, *, kubeconfig: Path | None = None, flags: Sequence[str] = ()
    ) -> None:
        """Prepare an extender that reaches the cluster as the user `extender`, or by `kubeconfig`."""
        # kept over restarts: kube-scheduler is told once
        self.listen, self.serve = (f"127.0.0.1:{port}" for port in free_ports(2))
        super().__init__(
            "cotenant-extender",
            directory,
            [
                f"--kubeconfig={kubeconfig or cluster.kubeconfig('extender')}",
                f"--listen={self.listen}",
                f"--serve={self.serve}",
                *flags,
            ],
        )

    def scheduler_config(self, **changes: Any) -> dict[str, Any]:
        """Return the KubeSchedulerConfiguration that we ship, pointed at this extender, with changed keys."""
        config: dict[str, Any] = yaml.safe_load(SCHEDULER_CONFIG.read_text())
        config["extenders"][0]["urlPrefix"] = f"http://{self.listen}"
        config.pop("leaderElection", None)
        return config | changes


class RunningPlugin(RunningProgram):
    """`cotenant-device-plugin` with made-up GPUs, ready once the kubelet has its devices."""

    def __init__(
        self,
        node: RealNode,
        directory: Path,
        *,
        gpus: str,
        configuration: str = "",
        flags: Sequence[str] = (),
        pod_resources: Path | None = None,
    ) -> None:
        """Prepare a plugin that serves `gpus`, YAML as --fake-gpus takes it, and has the given configuration.

        `pod_resources` is asked instead of the node's own socket.
        """
        directory.mkdir(parents=True, exist_ok=True)
        self.fake_gpus = directory / "gpus.yaml"
        self.fake_gpus.write_text(gpus)
        self.config = config = directory / "configuration.yaml"
        config.write_text(configuration)
        super().__init__(
            "cotenant-device-plugin",
            directory,
            [
                f"--config={config}",
                f"--kubeconfig={node.control_plane.kubeconfig('plugin')}",
                f"--node-name={node.name}",
                f"--pod-resources={pod_resources or node.pod_resources_socket}",
                f"--fake-gpus={self.fake_gpus}",
                *flags,
            ],
        )


@dataclass
class Ground:
    """All that runs where pods are placed, admitted and started: both programs beside a real node."""

    api: Api
    node: RealNode
    extender: RunningExtender
    plugin: RunningPlugin

    def settled(self, name: str) -> Object:
        """Wait until the pod runs or has failed."""
        return self.api.wait("Pod", name, settled, saying="an end", timeout_s=60)

    def running(self, name: str) -> Object:
        """Wait until the pod runs."""
        seen = self.settled(name)
        assert "Running" == phase(seen), why_failed(seen)
        return seen
