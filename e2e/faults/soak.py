"""Pods that come and go for hours: `python -m e2e.faults.soak`; does anything grow, and does the ledger stay right?

A real etcd, kube-apiserver and kube-scheduler; our extender; lab nodes; and one node whose pods our device plugin
serves, by the stand-in of a kubelet. With --stand-ins API server and scheduler are stand-ins too, for machines without
the Go programs; then only that one node is there. Ends with status 1 where memory grew too much, or the extender's sums
differ from the API's.

What a program holds is its anonymous memory, in RAM and swapped out (`RssAnon` and `VmSwap` of proc(5)). What is
resident (`VmRSS`) is printed beside it and judges nothing: it counts pages of files, which the kernel takes away and
gives back.
"""

import json
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import click
import yaml

from cotenant.cluster import connect
from cotenant.contract.units import GIB
from cotenant.standins.api_server import ApiServer
from cotenant.standins.kubelet import Kubelet
from cotenant.standins.kubelet_api import ApiLink
from cotenant.standins.scheduler import Scheduler
from cotenant.standins.scheduler_extender import HTTPExtender
from cotenant.standins.webhooks import Webhooks
from e2e import nodes, policies
from e2e.bench.load import memory_mib
from e2e.cluster import ControlPlane
from e2e.faults.invariants import Picture, broken, leaks
from e2e.faults.load import NAMES, SIZES, Churn
from e2e.processes import MissingProgramError, Program, free_ports, wait_until
from e2e.programs import SCHEDULER_CONFIG
from e2e.rest import Api, ApiError

# The node with a plugin has 4 GPUs of 80 units, and so has each lab node.
NODE = "soak-0"
GPUS = 4
LAB_NODES = 9
# Of all units; the load's pods have 12.9 on average.
FILL = 0.6
# The first part of the run, at most so many seconds, is for memory to level off: it does so after some 50,000 pods
# (docs/decisions/0084).
WARM_SHARE, WARM_MOST_S = 0.375, 2700.0
MOST_GROWTH = 0.02
SAMPLE_S = 5.0
SETTLE_S = 60.0
MODEL = "NVIDIA A100-SXM4-80GB"
GONE = 404


@dataclass
class Findings:
    """What a run has shown: memory in MiB, held and resident, by program, over the seconds of the run."""

    created: int = 0
    seconds: list[float] = field(default_factory=list)
    held: dict[str, list[float]] = field(default_factory=lambda: {"extender": [], "device plugin": []})
    resident: dict[str, list[float]] = field(default_factory=lambda: {"extender": [], "device plugin": []})
    bound: int = 0
    wrong: list[str] = field(default_factory=list)
    errors: int = 0

    @property
    def warm(self) -> float:
        """Say how many seconds the caches had to fill."""
        return min(WARM_SHARE * self.seconds[-1], WARM_MOST_S)

    def note(self, at: float, programs: dict[str, Program]) -> None:
        """Read what each program has."""
        self.seconds.append(at)
        for name, program in programs.items():
            self.held[name].append(memory_mib(program.pid, "RssAnon") + memory_mib(program.pid, "VmSwap"))
            self.resident[name].append(memory_mib(program.pid, "VmRSS"))

    def growth(self, values: list[float]) -> tuple[float, float]:
        """Give what was there after warm-up and in the end: medians over a tenth of the run, in MiB."""
        span = self.seconds[-1]
        warm, tenth = self.warm, span / 10
        at_first = [value for at, value in zip(self.seconds, values, strict=True) if warm <= at <= warm + tenth]
        at_last = [value for at, value in zip(self.seconds, values, strict=True) if at >= span - tenth]
        return median(at_first), median(at_last)


class Ground:
    """Everything that runs; the stack ends it."""

    def __init__(self, stack: ExitStack, directory: Path, *, stand_ins: bool) -> None:
        """Start all of it."""
        self._stack, self._directory = stack, directory
        (directory / "kubelet").mkdir(parents=True)
        self._plane: ControlPlane | None = None
        self._server: ApiServer | None = None
        self.api, self._kubeconfig = self._stand_ins() if stand_ins else self._real()
        self._create_node()
        listen, self.serve = (f"127.0.0.1:{port}" for port in free_ports(2))
        self.programs = {
            "extender": self._program("cotenant-extender", f"--listen={listen}", f"--serve={self.serve}"),
            "device plugin": self._start_node(),
        }
        if self._plane is not None:
            config = yaml.safe_load(SCHEDULER_CONFIG.read_text())
            config["extenders"][0]["urlPrefix"] = f"http://{listen}"
            config.pop("leaderElection", None)
            self._plane.start_scheduler(config)
        if self._server is not None:
            self._server.store.admit = Webhooks(f"http://{self.serve}/admission", user="you")
            cluster = stack.enter_context(connect(self._kubeconfig("scheduler")))
            scheduler = Scheduler(cluster, HTTPExtender(f"http://{listen}"))
            stack.callback(scheduler.stop)
            scheduler.start()

    def metrics(self) -> str:
        """Scrape the extender."""
        with urllib.request.urlopen(f"http://{self.serve}/metrics", timeout=30) as answer:
            text: str = answer.read().decode()
        return text

    def _real(self) -> tuple[Api, Callable[[str], str]]:
        plane = self._plane = self._stack.enter_context(ControlPlane(self._directory / "control-plane"))
        api = plane.api()
        self._stack.enter_context(policies.installed(api))
        nodes.register(api, LAB_NODES, nodes.Shape(gpus=GPUS, gpu_bytes=80 * GIB), prefix="lab")
        return api, lambda user: str(plane.kubeconfig(user))

    def _stand_ins(self) -> tuple[Api, Callable[[str], str]]:
        server = self._server = self._stack.enter_context(ApiServer())
        api = Api(server.url, token="any", ca_file=None)
        return api, lambda user: server.kubeconfig(self._directory / f"{user}.kubeconfig", user=user)

    def _create_node(self) -> None:
        plain = nodes.node(NODE, nodes.Shape(gpus=GPUS), prefix="soak")
        del plain["metadata"]["annotations"]
        amounts = {key: value for key, value in plain["status"]["capacity"].items() if key != NAMES.gpu_mem}
        plain["status"] |= {"capacity": amounts, "allocatable": amounts}
        self.api.create(plain)

    def _start_node(self) -> Program:
        folder = self._directory / "kubelet"
        cluster = self._stack.enter_context(connect(self._kubeconfig("admin")))
        link = ApiLink(cluster, NODE, delete=self._end)
        kubelet = Kubelet(NODE, folder, reporter=link)
        kubelet.start()
        self._stack.callback(kubelet.stop)
        link.start(kubelet)
        self._stack.callback(link.stop)
        gpus = self._directory / "gpus.yaml"
        gpus.write_text(yaml.safe_dump({"gpus": [{"model": MODEL, "memory": "80GiB", "count": GPUS}]}))
        return self._program(
            "cotenant-device-plugin",
            f"--node-name={NODE}",
            f"--kubelet-dir={folder}",
            f"--pod-resources={kubelet.pod_resources.socket}",
            f"--fake-gpus={gpus}",
        )

    def _end(self, namespace: str, name: str) -> None:
        """Delete a pod whose containers have ended, unless somebody has done so."""
        try:
            self.api.delete("Pod", name, namespace=namespace, grace_s=0)
        except ApiError as error:
            if error.code != GONE:
                raise

    def _program(self, name: str, *flags: str) -> Program:
        log = self._directory / f"{name}.log"
        user = name.rpartition("-")[2]
        command: list[str | Path] = [
            Path(sys.executable).with_name(name),
            f"--kubeconfig={self._kubeconfig(user)}",
            *flags,
        ]
        program = Program(command, log=log)
        self._stack.callback(program.stop)
        program.wait_ready(lambda: f"{name} ready" in log.read_text())
        return program


def soak(directory: Path, *, seconds: float, rate: float, seed: int, stand_ins: bool) -> Findings:
    """Run once, and say what was found."""
    findings = Findings()
    with ExitStack() as stack:
        ground = Ground(stack, directory, stand_ins=stand_ins)
        capacity = GPUS * 80 * (1 if stand_ins else 1 + LAB_NODES)
        keep = int(FILL * capacity / (sum(SIZES) / len(SIZES)))
        began = time.monotonic()
        with Churn(ground.api, rate=rate, keep=keep, seed=seed) as churn:
            while (passed := time.monotonic() - began) < seconds:
                findings.note(passed, ground.programs)
                time.sleep(SAMPLE_S)
                findings.wrong += broken(Picture.of(ground.api))
        findings.created, findings.errors = churn.created, len(churn.errors)
        findings.wrong += settled(ground)
        findings.bound = sum(1 for one in ground.api.list("Pod") if one["spec"].get("nodeName"))
    findings.wrong = sorted(set(findings.wrong))
    return findings


def settled(ground: Ground) -> list[str]:
    """Compare the extender's sums with the API's once nothing changes any more."""
    found: list[str] = []

    def quiet() -> bool:
        found[:] = leaks(Picture.of(ground.api), ground.metrics())
        return not found

    wait_until(quiet, timeout_s=SETTLE_S, every_s=1)
    return [*broken(Picture.of(ground.api)), *found]


def plot(findings: Findings, file: Path) -> None:
    """Draw memory over time."""
    import matplotlib as mpl  # noqa: PLC0415 - half a second, for whoever draws

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    minutes = [at / 60 for at in findings.seconds]
    for name in findings.held:
        (line,) = axes.plot(minutes, findings.held[name], label=f"{name}, held")
        axes.plot(minutes, findings.resident[name], label=f"{name}, resident", color=line.get_color(), alpha=0.4)
    axes.axvline(findings.warm / 60, color="gray", linestyle=":", label="end of warm-up")
    axes.set(xlabel="minutes", ylabel="MiB", title=f"{findings.created:,} pods came and went")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(file, dpi=120)


@click.command()
@click.option(
    "--seconds",
    default=7200.0,
    type=click.FloatRange(min=60.0),
    show_default=True,
    help="How long pods come and go. Under 7,200 at 20 a second, caches may still be filling.",
)
@click.option("--rate", default=20.0, show_default=True, help="Pods a second.")
@click.option("--seed", default=1, show_default=True)
@click.option("--stand-ins", is_flag=True, help="Stand-ins for API server and scheduler too.")
@click.option("--out", default=Path("bench-results"), show_default=True, type=click.Path(path_type=Path))
def main(*, seconds: float, rate: float, seed: int, stand_ins: bool, out: Path) -> None:
    """Let pods come and go, and say what grew and whether the sums are right."""
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        try:
            found = soak(Path(folder), seconds=seconds, rate=rate, seed=seed, stand_ins=stand_ins)
        except MissingProgramError as missing:
            raise click.ClickException(str(missing)) from missing
    out.mkdir(parents=True, exist_ok=True)
    plot(found, out / "soak.png")
    series = {"seconds": found.seconds, "held_mib": found.held, "resident_mib": found.resident}
    (out / "soak.json").write_text(json.dumps(series))
    span = found.seconds[-1]
    click.echo(f"{span:.0f} s, {found.created} pods created ({found.created / span:.1f} a second), {found.bound} bound")
    grown = False
    for name in found.held:
        (held, held_last), (resident, resident_last) = (found.growth(of[name]) for of in (found.held, found.resident))
        share = held_last / held - 1
        grown |= share > MOST_GROWTH
        click.echo(
            f"{name}: holds {held:.1f} MiB after a warm-up of {found.warm:.0f} s and {held_last:.1f} in the end,"
            f" {share:+.1%}; resident {resident:.1f} and {resident_last:.1f}, {resident_last / resident - 1:+.1%}"
        )
    click.echo(f"the load met {found.errors} errors; {len(found.wrong)} invariants broken; plot in {out / 'soak.png'}")
    for sentence in found.wrong:
        click.echo(sentence)
    sys.exit(bool(found.wrong) or grown)


if __name__ == "__main__":
    main()
