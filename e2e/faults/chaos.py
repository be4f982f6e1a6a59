"""Pods by the thousand through a faulty proxy, the extender killed again and again: `python -m e2e.faults.chaos`.

In the end, with nothing going wrong any more, the judge looks at what is there; before that it looks all the time. Ends
with status 1 where anything was broken, and says by which seed.
"""

import random
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import click

from cotenant.contract.units import GIB
from e2e.faults.failover import NAMES, Ground
from e2e.faults.invariants import STUCK_SECONDS, Patience, Picture, bound_twice, broken, leaks
from e2e.faults.load import Churn
from e2e.faults.proxy import Dice
from e2e.processes import wait_until
from e2e.replicas import Replica, why_not

# Of 3,200 units, which it fills to about 70 %.
KEEP = 180
KILL_EVERY_S = (3.0, 9.0)
QUIET_S = 60.0


@dataclass
class Findings:
    """What a run has shown."""

    created: int = 0
    bound: int = 0
    kills: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    # with room and an extender that binds, and with room alone
    longest_wait_s: float = 0.0
    longest_wait_in_all_s: float = 0.0
    refused_by_the_fence: int = 0
    left_waiting: int = 0
    broken: list[str] = field(default_factory=list)


class Run:
    """One run: two replicas of the attached layout behind the faulty proxy, and kube-scheduler that calls them."""

    def __init__(self, stack: ExitStack, directory: Path, *, seed: int, rate: float, stuck_after: float) -> None:
        """Start all of it; the stack ends it."""
        self._rng = random.Random(seed)
        self.dice = Dice(seed)
        self.ground = Ground(stack, directory, "attached", through_proxy=NAMES, dice=self.dice)
        self.api = self.ground.api
        self.churn = Churn(self.api, rate=rate, keep=KEEP, seed=seed)
        self.patience = Patience(limit_s=stuck_after)
        self.findings = Findings()
        self._over = threading.Event()

    def run(self, seconds: float, kills: int) -> Findings:
        """Let everything go wrong for so long and until so many kills, then nothing, and judge."""
        watching = threading.Thread(target=self._watch, daemon=True)
        watching.start()
        deadline = time.monotonic() + seconds
        with self.churn:
            while time.monotonic() < deadline or self.findings.kills < kills:
                time.sleep(self._rng.uniform(*KILL_EVERY_S))
                victim = self.ground.active() or self._rng.choice([*self.ground.replicas.values()])
                victim.kill()
                self.findings.kills += 1
                victim.start_extender()
        if self.ground.proxy:
            self.ground.proxy.calm()
        self._judge_quiet()
        self._over.set()
        watching.join(10)
        return self._summed_up()

    def _watch(self) -> None:
        """Judge again and again: what is over-committed for a moment only counts as well."""
        while not self._over.wait(1.0):
            picture = Picture.of(self.api)
            self.findings.broken += broken(picture)
            self.patience.look(picture, binding=self._binding())

    def _binding(self) -> bool:
        """Whether an extender binds now."""
        return any("cotenant_writer 1.0" in text for text in map(_metrics, self.ground.replicas.values()))

    def _judge_quiet(self) -> None:
        found: list[str] = []

        def nothing_left() -> bool:
            picture = Picture.of(self.api)
            found[:] = [one for replica in self.ground.replicas.values() for one in leaks(picture, _metrics(replica))]
            free = max(picture.free().values())
            self.findings.left_waiting = sum(
                not pod["spec"].get("nodeName") for pod in picture.pods if pod["metadata"]["namespace"] == "default"
            )
            return not found and (not self.findings.left_waiting or free < GIB)

        wait_until(nothing_left, timeout_s=QUIET_S, every_s=1)
        self.findings.broken += [*broken(Picture.of(self.api), self._events()), *found]

    def _events(self) -> list[dict[str, object]]:
        return self.api.list("Event", api_version="events.k8s.io/v1")

    def _summed_up(self) -> Findings:
        findings = self.findings
        writes, _ = self.ground.cluster.audit()
        bindings = [one for one in writes if one.subresource == "binding"]
        findings.created = self.churn.created
        findings.bound = sum(one.code == 201 for one in bindings)
        findings.refused_by_the_fence = sum(one.code == 403 for one in bindings)
        findings.faults = dict(self.dice.happened)
        findings.longest_wait_s = self.patience.longest
        findings.longest_wait_in_all_s = self.patience.longest_in_all
        findings.broken += [*bound_twice(writes), *self.patience.broken()]
        findings.broken += [f"the load met an error: {error}" for error in self.churn.errors[:3]]
        findings.broken = sorted(set(findings.broken))
        return findings


def _metrics(replica: Replica) -> str:
    try:
        return replica.metrics()
    except OSError:  # killed just now
        return ""


def chaos(directory: Path, *, seconds: float, kills: int, seed: int, rate: float, stuck_after: float) -> Findings:
    """Run once and return what was found."""
    with ExitStack() as stack:
        return Run(stack, directory, seed=seed, rate=rate, stuck_after=stuck_after).run(seconds, kills)


@click.command()
@click.option("--seconds", default=600.0, show_default=True, help="How long everything goes wrong.")
@click.option("--kills", default=100, show_default=True, help="It goes on until there were so many.")
@click.option("--seed", default=1, show_default=True, help="What goes wrong.")
@click.option("--rate", default=9.0, show_default=True, help="Pods a second.")
@click.option(
    "--stuck-after", default=STUCK_SECONDS, show_default=True, help="How long a pod may wait while there is room."
)
@click.option("--keep", type=click.Path(file_okay=False, path_type=Path), help="Leave the logs in this folder.")
def main(*, seconds: float, kills: int, seed: int, rate: float, stuck_after: float, keep: Path | None) -> None:
    """Have everything go wrong for a while, and say what broke."""
    if reason := why_not():
        raise click.ClickException(reason)
    with ExitStack() as stack:
        directory = keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
        found = chaos(directory, seconds=seconds, kills=kills, seed=seed, rate=rate, stuck_after=stuck_after)
    click.echo(f"seed {seed}: {found.created} pods created, {found.bound} bound, extender killed {found.kills} times")
    click.echo("faults: " + ", ".join(f"{kind} {count}" for kind, count in sorted(found.faults.items())))
    click.echo(
        f"longest wait with room and an extender that binds {found.longest_wait_s:.1f} s, with room alone "
        f"{found.longest_wait_in_all_s:.1f} s; {found.left_waiting} left waiting, "
        f"{found.refused_by_the_fence} Bindings of an earlier term refused"
    )
    for sentence in found.broken:
        click.echo(sentence)
    click.echo(f"{len(found.broken)} invariants broken")
    sys.exit(bool(found.broken))


if __name__ == "__main__":
    main()
