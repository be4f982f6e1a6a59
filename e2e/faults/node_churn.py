"""Pods by the hundred on a real kubelet, all that serves them killed meanwhile: `python -m e2e.faults.node_churn`.

Plugin, kubelet and containerd are killed in turn while pods are being admitted. For every container that started, its
grant, the environment that it sees and the device ids that the kubelet keeps for it must agree; and every container
counts on through all of it, started once. Ends with status 1 where one of these does not hold.
"""

import random
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import click

from e2e import policies
from e2e.agreement import GPU_MEM, disagreements, phase, printed, settled, why_failed, wrong_guesses
from e2e.cluster import ControlPlane
from e2e.node import RealNode, container, pod, why_not
from e2e.processes import wait_until
from e2e.programs import RunningExtender, RunningPlugin
from e2e.rest import Object

# 8 GPUs of 79 units, 632 in all. Ten pods hold 51, so six bursts that are there at a time hold 306.
GPUS = "gpus: [{model: NVIDIA H100 80GB HBM3, memory: 80GiB, reserved: 640MiB, count: 8}]"
BURST, BURSTS_KEPT = 10, 6
VICTIMS = ("plugin", "kubelet", "containerd")
PATIENCE_S = 120.0
# A counter counts once a second; a machine that is busy with a restart may keep it from its turn.
COUNTS_WITHIN_S = 30.0
TOLD = "/told"


@dataclass
class Findings:
    """What a run has shown."""

    kills: Counter[str] = field(default_factory=Counter)
    ran: int = 0
    not_run: Counter[str] = field(default_factory=Counter)
    compared: int = 0
    # containers that were seen to count on after a kill
    watched: int = 0
    broken: list[str] = field(default_factory=list)


class Run:
    """A node with everything that serves its pods, and the pods that come and go."""

    def __init__(self, stack: ExitStack, directory: Path, *, seed: int) -> None:
        """Start all of it; the stack ends it."""
        self._rng = random.Random(seed)
        self.findings = Findings()
        self._told = directory / "told"
        self._told.mkdir()
        self.cluster = stack.enter_context(ControlPlane(directory / "control-plane"))
        self.api = self.cluster.api()
        self.node = stack.enter_context(RealNode(self.cluster, directory / "node"))
        stack.enter_context(policies.installed(self.api))
        self.extender = stack.enter_context(RunningExtender(self.cluster, directory / "extender"))
        stack.enter_context(self.cluster.scheduling(self.extender.scheduler_config()))
        self.plugin = stack.enter_context(RunningPlugin(self.node, directory / "plugin", gpus=GPUS))
        self._kept: list[list[Object]] = []
        self._all: list[Object] = []

    def burst(self, number: int, kills: int) -> None:
        """Bring ten pods, kill so many things while they are being admitted, hold all to the truth, let old ones go."""
        pods = [self._pod(number, n) for n in range(BURST)]
        with ThreadPoolExecutor(BURST) as pool:
            created = [one["metadata"]["name"] for one in pool.map(self.api.create, pods)]
        for _ in range(kills):
            victim = VICTIMS[self.findings.kills.total() % len(VICTIMS)]
            # some of the ten run by then, some are being admitted, some are not bound
            time.sleep(self._rng.uniform(0.2, 2.5))
            before = self._counts()
            self._kill(victim)
            self._count_on(before, victim)
        deadline = time.monotonic() + PATIENCE_S
        seen = [
            self.api.wait("Pod", name, settled, saying="an end", timeout_s=max(1, deadline - time.monotonic()))
            for name in created
        ]
        self.findings.ran += sum(phase(one) == "Running" for one in seen)
        self.findings.not_run.update(shortly(one) for one in seen if phase(one) != "Running")
        self._kept.append(seen)
        self._compare()
        if len(self._kept) > BURSTS_KEPT:
            self._remove(self._kept.pop(0))

    def end(self) -> None:
        """Let all pods go, and hold the plugin's own account of whom it answered to the truth."""
        self._compare()
        while self._kept:
            self._remove(self._kept.pop(0))
        self.findings.broken += [
            f"the plugin answered another pod: {one}" for one in wrong_guesses(self.plugin.logs, self._all)
        ]

    def _pod(self, burst: int, n: int) -> Object:
        """Of every ten: six alike of 4 units, two of 4 + 4, one of 4 after an init container of 6, one of 3 + 2."""
        name = f"p{burst}-{n}"
        units = (4, 4) if n in {6, 7} else (3, 2) if n == 9 else (4,)
        containers = [self._container(name, f"c{i}", amount) for i, amount in enumerate(units)]
        before = [self._container(name, "before", 6, goes_on=False)] if n >= 8 else []
        volumes = [{"name": "told", "hostPath": {"path": str(self._told)}}]
        return pod(name, *containers, init=before, spec={"volumes": volumes})

    def _container(self, pod_name: str, name: str, units: int, *, goes_on: bool = True) -> Object:
        """Write down what it sees and that it started, then count."""
        at = f"{TOLD}/{pod_name}.{name}"
        count = f"while :; do printf . >> {at}.count; sleep 1; done" if goes_on else ":"
        script = f"env > {at}.env; echo >> {at}.starts; {count}"
        mounts = [{"name": "told", "mountPath": TOLD}]
        return {**container(name, script, limits={GPU_MEM: units}), "volumeMounts": mounts}

    def _kill(self, victim: str) -> None:
        if victim == "plugin":
            self.plugin.kill()
            self.plugin.start()
        elif victim == "kubelet":
            self.node.restart_kubelet()
        else:
            self.node.restart_containerd()
        self.findings.kills[victim] += 1

    def _counts(self) -> dict[str, int]:
        """Read how far the containers have counted that ran when their pod was seen to run."""
        found = {}
        for seen in (one for burst in self._kept for one in burst):
            for name in running(seen):
                at = f"{seen['metadata']['name']}.{name}"
                count = self._told / f"{at}.count"
                found[at] = count.stat().st_size if count.exists() else 0
        return found

    def _count_on(self, before: dict[str, int], victim: str) -> None:
        """See that each of them goes on counting, and was not started anew."""
        wait_until(lambda: all(n > before[at] for at, n in self._counts().items()), timeout_s=COUNTS_WITHIN_S)
        after = self._counts()
        for at, count in before.items():
            starts = (self._told / f"{at}.starts").stat().st_size
            if after.get(at, 0) <= count or starts != 1:
                self._broken(
                    f"{at} counted to {count} before {victim} was killed, to {after.get(at)} after, started {starts} x"
                )
        self.findings.watched += len(before)

    def _compare(self) -> None:
        """Hold what runs against what ran when it was first seen to, and each container to its grant."""
        well = []
        for seen in (one for burst in self._kept for one in burst if phase(one) == "Running"):
            now = self.api.get("Pod", seen["metadata"]["name"])
            if phase(now) == "Running" and running(seen).items() <= running(now).items():
                well.append(now)
                continue
            said = f"{seen['metadata']['name']} ran as {running(seen)}, and is {phase(now)}: {why_failed(now)}"
            self._broken(said)
        compared, wrong = disagreements(self.node, well, self._saw)
        self.findings.compared += compared
        for one in wrong:
            self._broken(one)

    def _broken(self, sentence: str) -> None:
        if sentence not in self.findings.broken:
            self.findings.broken.append(sentence)
            click.echo(f"     {sentence}")

    def _saw(self, node: RealNode, seen: Object, name: str) -> dict[str, str]:
        del node
        file = self._told / f"{seen['metadata']['name']}.{name}.env"
        return printed(file.read_text()) if file.exists() else {}

    def _remove(self, pods: list[Object]) -> None:
        self._all += pods
        names = [one["metadata"]["name"] for one in pods]
        for name in names:
            self.api.delete("Pod", name)
        for name in names:
            self.api.wait("Pod", name, lambda seen: seen is None, saying="its end", timeout_s=PATIENCE_S)


def running(seen: Object) -> dict[str, tuple[str, int]]:
    """List the main containers that run, each with what tells one start of it from another.

    A container that a kill kept from starting was tried again, and counts as restarted before it ever ran.
    """
    return {
        status["name"]: (status["containerID"], status["restartCount"])
        for status in seen["status"].get("containerStatuses", [])
        if "running" in status["state"]
    }


def shortly(seen: Object) -> str:
    """Say why a pod did not run, in words that many have in common."""
    status = seen["status"]
    if "message" in status:
        return f"{status.get('reason', '')}: {status['message'].rpartition(': ')[2]}"
    states = [one["state"] for one in (*status.get("initContainerStatuses", []), *status["containerStatuses"])]
    reasons = sorted({state["terminated"]["reason"] for state in states if "terminated" in state} - {"Completed"})
    return f"a container that was being started ended: {', '.join(reasons)}"


def spread(kills: int, bursts: int) -> list[int]:
    """Say how many kills each burst gets: none the first, which nothing runs before."""
    later = bursts - 1
    return [0, *(kills * (n + 1) // later - kills * n // later for n in range(later))]


@click.command()
@click.option("--count", default=300, show_default=True, help="How many pods, in bursts of ten.")
@click.option("--kills", default=20, show_default=True, help="How many kills of plugin, kubelet and containerd in all.")
@click.option("--seed", default=1, show_default=True)
def main(*, count: int, kills: int, seed: int) -> None:
    """Churn pods on a real kubelet while what serves them is killed; ends with status 1 where anything was wrong."""
    if reason := why_not():
        raise click.ClickException(reason)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="node-churn-")))
        run = Run(stack, directory, seed=seed)
        found, bursts = run.findings, max(2, count // BURST)
        for number, now in enumerate(spread(kills, bursts)):
            run.burst(number, now)
            click.echo(
                f"{(number + 1) * BURST:4} pods: {found.ran} ran, {found.not_run.total()} did not, "
                f"{found.kills.total()} kills, {found.compared} comparisons, {len(found.broken)} broken"
            )
        run.end()
        click.echo(
            f"{found.ran} pods ran and {found.not_run.total()} did not; killed: "
            + ", ".join(f"{victim} {times} x" for victim, times in found.kills.items())
        )
        for why, times in found.not_run.most_common():
            click.echo(f"  did not run, {times} x: {why}")
        click.echo(
            f"{found.compared} comparisons of grant, environment and device ids; {found.watched} times a "
            "container was seen to count on after a kill"
        )
        for sentence in found.broken:
            click.echo(sentence)
        click.echo(f"{len(found.broken)} mismatches or disturbances")
        sys.exit(bool(found.broken))


if __name__ == "__main__":
    main()
