"""The extender as users run it, next to a kube-scheduler with the configuration that we ship."""

import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from e2e.cluster import ControlPlane
from e2e.processes import Program, free_ports

MANIFESTS = Path(__file__).resolve().parent.parent / "manifests"
SCHEDULER_CONFIG = MANIFESTS / "second-scheduler" / "scheduler-config.yaml"


class RunningExtender:
    """`cotenant-extender` as a process of its own, ready once the ledger has been read."""

    def __init__(
        self, cluster: ControlPlane, directory: Path, *, user: str = "extender", flags: Sequence[str] = ()
    ) -> None:
        """Prepare an extender that logs into `directory` and reaches the cluster as `user`."""
        self._cluster = cluster
        self._directory = directory
        self._user = user
        self._flags = list(flags)
        self._program: Program | None = None
        self._started = 0
        # kept over restarts: kube-scheduler is told once
        self.listen, self.serve = (f"127.0.0.1:{port}" for port in free_ports(2))

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def program(self) -> Program:
        """The process; raise RuntimeError where it was not started."""
        if self._program is None:
            raise RuntimeError("the extender was not started")
        return self._program

    def start(self) -> None:
        """Start it and wait for its ready line."""
        self._directory.mkdir(parents=True, exist_ok=True)
        self._started += 1
        self._program = Program(
            [
                Path(sys.executable).with_name("cotenant-extender"),
                f"--kubeconfig={self._cluster.kubeconfig(self._user)}",
                f"--listen={self.listen}",
                f"--serve={self.serve}",
                *self._flags,
            ],
            log=self._directory / f"extender-{self._started}.log",
        )
        program = self._program
        program.wait_ready(lambda: "cotenant-extender ready" in program.log.read_text())

    def stop(self) -> None:
        """End it as the kubelet would."""
        if self._program is not None:
            self._program.stop()
            self._program = None

    def scheduler_config(self, **changes: Any) -> dict[str, Any]:
        """Return the KubeSchedulerConfiguration that we ship, pointed at this extender, with changed keys."""
        config: dict[str, Any] = yaml.safe_load(SCHEDULER_CONFIG.read_text())
        config["extenders"][0]["urlPrefix"] = f"http://{self.listen}"
        config.pop("leaderElection", None)
        return config | changes
