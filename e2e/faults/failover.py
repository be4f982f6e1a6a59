"""End or freeze the extender that binds, again and again, under load: `python -m e2e.faults.failover --count 50`.

Prints for each how long no Binding was taken, and of what that was made; in the end what the judge found. Freezing is
the harder case: the one before goes on where it was stopped, in the belief that it still binds.
"""

import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import click

from cotenant.contract.units import GIB
from e2e import nodes
from e2e.audit import Write
from e2e.cluster import ControlPlane, Scheduler
from e2e.faults.invariants import Picture, bound_twice, broken, leaks
from e2e.faults.load import Churn
from e2e.faults.proxy import Dice, FaultProxy
from e2e.kustomize import MANIFESTS, build
from e2e.processes import wait_until
from e2e.replicas import NAMESPACE, Replica, VerbsService, why_not
from e2e.rest import Api, ApiError

NAMES = ("replica-a", "replica-b")
LAYOUTS = {"second-scheduler": "cotenant-scheduler", "attached": "cotenant-extender"}
# 10 nodes x 4 x 80 units = 3,200; the sizes of the load are 12.9 units on average, so 150 pods fill 60 %.
NODES, KEEP, RATE = 10, 150, 8.0


# Whatever the one before had on its way has arrived after so long, and no Lease runs out before.
SURELY_OVER_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Gap:
    """One take-over, in seconds from the end of one writer, by the API server's audit log."""

    # when the one before last renewed the Lease, below 0
    renewed: float
    # when the next one took it
    taken: float
    # when its first Binding was taken
    bound: float

    def __str__(self) -> str:
        before, then = -self.renewed, self.bound - self.taken
        return (
            f"binds again after {self.bound:.2f} s: the Lease, renewed {before:.2f} s before, was taken after "
            f"{self.taken:.2f} s, and {then:.2f} s later the first Binding"
        )


@dataclass
class Outcome:
    """What a series of take-overs has shown."""

    # by how the writer ended
    gaps: dict[str, list[Gap]] = field(default_factory=lambda: {"kill -9": [], "SIGSTOP": []})
    bound: int = 0
    # Bindings that the fence refused
    fenced: int = 0
    broken: list[str] = field(default_factory=list)


class Ground:
    """A control plane with one layout applied, two replicas of it, and pods that come and go."""

    def __init__(
        self,
        stack: ExitStack,
        directory: Path,
        layout: str,
        *,
        through_proxy: Collection[str] = (),
        dice: Dice | None = None,
    ) -> None:
        """Start all of it, the replicas *through_proxy* behind a faulty one; the stack ends it."""
        self.layout = layout
        self.scheduler: Scheduler | None = None
        self.cluster = stack.enter_context(ControlPlane(directory / "control-plane"))
        self.api: Api = self.cluster.api()
        for one in build(MANIFESTS / layout):
            self.api.apply_object(one)
        nodes.register(self.api, NODES, nodes.Shape(gpus=4, gpu_bytes=80 * GIB), prefix="lab")
        self.kubeconfig = self.cluster.service_account_kubeconfig("cotenant-extender", namespace=NAMESPACE)
        self.proxy = stack.enter_context(FaultProxy(self.cluster, dice=dice)) if through_proxy else None
        self.replicas = {
            name: Replica(
                self.cluster,
                directory,
                name,
                layout=layout,
                kubeconfig=self.proxy.kubeconfig(self.kubeconfig)
                if self.proxy and name in through_proxy
                else self.kubeconfig,
            )
            for name in NAMES
        }
        if layout == "attached":
            self._attach(stack)
        for replica in self.replicas.values():
            stack.callback(replica.stop)
            replica.start()
            assert wait_until(lambda: self.active() is not None, timeout_s=60), "nobody took the Lease"

    def _attach(self, stack: ExitStack) -> None:
        """Run the cluster's own kube-scheduler, which calls the extenders through their Service."""
        for name in self.replicas:
            spec = {"containers": [{"name": "x", "image": "x"}], "nodeName": "nowhere"}
            metadata = {"name": name, "namespace": NAMESPACE}
            self.api.create({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})
        service = stack.enter_context(
            VerbsService(self.api, {name: replica.verbs for name, replica in self.replicas.items()})
        )
        config = (MANIFESTS / "attached" / "scheduler-config.yaml").read_text()
        self.scheduler = self.cluster.start_scheduler(config.replace("CLUSTER-IP:9480", service.address))

    def lease(self) -> tuple[str, int]:
        """Read who holds the Lease and in which term."""
        try:
            spec = self.api.get(
                "Lease", LAYOUTS[self.layout], namespace=NAMESPACE, api_version="coordination.k8s.io/v1"
            )["spec"]
        except ApiError:
            return "", 0
        return spec.get("holderIdentity") or "", spec.get("leaseTransitions") or 0

    def active(self) -> Replica | None:
        """Find the replica that holds the Lease."""
        return self.held_by(self.lease()[0])

    def held_by(self, holder: str) -> Replica | None:
        """Find the replica of that name in a Lease."""
        return self.replicas.get(holder.rpartition("_")[0])

    def bindings(self, offset: int) -> tuple[list[Write], int]:
        """List the Bindings of the extender that were sent since *offset* in the audit log."""
        writes, offset = self.cluster.audit(offset=offset)
        return [one for one in writes if one.subresource == "binding"], offset

    def renewals(self, offset: int) -> list[float]:
        """List when the Lease was written since *offset* in the audit log."""
        writes, _ = self.cluster.audit(offset=offset)
        of_ours = (one for one in writes if (one.resource, one.name) == ("leases", LAYOUTS[self.layout]))
        return [one.at.timestamp() for one in of_ours if one.code == 200]


def take_overs(ground: Ground, count: int, *, seed: int = 1) -> Iterator[tuple[str, Gap, Outcome]]:
    """Have the writer end *count* times, in turn by kill -9 and SIGSTOP; yields each as it is over.

    Raises TimeoutError where nobody binds again.
    """
    rng = random.Random(seed)
    outcome = Outcome()
    with Churn(ground.api, rate=RATE, keep=KEEP, seed=seed) as churn:
        offset = 0
        for number in range(count):
            earlier = offset
            _, offset = ground.cluster.audit()
            _wait_bound(ground, offset, "the load is not bound")
            time.sleep(rng.uniform(0, 1))
            how = "kill -9" if number % 2 == 0 else "SIGSTOP"
            # in one look: it may change hands at any moment, where the machine is busy
            holder, term = ground.lease()
            active = ground.held_by(holder)
            if active is None:
                raise TimeoutError("nobody holds the Lease")
            _, offset = ground.cluster.audit()
            began = time.time()
            active.kill() if how == "kill -9" else active.freeze()
            try:
                first = _wait_bound(ground, offset, f"nobody binds after {how}", after=began, later_than=term)
            except TimeoutError as error:
                load = f"the load created {churn.created} pods and met {len(churn.errors)} errors {churn.errors[-3:]}"
                raise TimeoutError(f"{error}; the Lease: {ground.lease()}; {load}") from error
            written = ground.renewals(earlier)
            gap = Gap(
                renewed=max((at for at in written if at <= began), default=math.nan) - began,
                taken=min((at for at in written if at > began + SURELY_OVER_SECONDS), default=math.nan) - began,
                bound=first - began,
            )
            outcome.gaps[how].append(gap)
            outcome.broken += broken(Picture.of(ground.api))
            if how == "SIGSTOP":
                # it wakes up in the middle of what it did
                active.thaw()
                time.sleep(2)
                outcome.broken += broken(Picture.of(ground.api))
                active.kill()
            active.start()
            yield how, gap, outcome
    if churn.errors:
        outcome.broken.append(f"the load met {len(churn.errors)} errors, such as {churn.errors[0]}")
    writes, _ = ground.bindings(0)
    outcome.bound = sum(one.code == 201 for one in writes)
    outcome.fenced = sum(one.code == 403 for one in writes)
    outcome.broken += [*bound_twice(writes), *settled(ground)]


def settled(ground: Ground) -> list[str]:
    """Compare the extenders' sums with the API's once nothing changes any more."""
    found: list[str] = []

    def quiet() -> bool:
        found[:] = [
            sentence
            for replica in ground.replicas.values()
            for sentence in leaks(Picture.of(ground.api), replica.metrics())
        ]
        return not found

    wait_until(quiet, timeout_s=30, every_s=1)
    return [*broken(Picture.of(ground.api)), *found]


def _wait_bound(ground: Ground, offset: int, otherwise: str, *, after: float = 0.0, later_than: int = -1) -> float:
    """Wait for the next Binding that is taken, in a later term where asked, and give its time."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        writes, offset = ground.bindings(offset)
        taken = [one.at.timestamp() for one in writes if one.code == 201 and one.at.timestamp() > after]
        if taken and ground.lease()[1] > later_than:
            return taken[0]
        time.sleep(0.05)
    raise TimeoutError(f"{otherwise}: no Binding was taken in 60 s")


@click.command()
@click.option("--count", default=50, show_default=True, help="How many take-overs.")
@click.option("--layout", default="second-scheduler", show_default=True, type=click.Choice(sorted(LAYOUTS)))
@click.option("--seed", default=1, show_default=True)
@click.option("--at-most", default=5.0, show_default=True, help="Seconds after which somebody has to bind again.")
def main(*, count: int, layout: str, seed: int, at_most: float) -> None:
    """Measure take-overs under load; ends with status 1 where one took too long, or an invariant is broken."""
    if reason := why_not():
        raise click.ClickException(reason)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="failover-")))
        ground = Ground(stack, directory, layout)
        outcome = Outcome()
        for number, (how, gap, so_far) in enumerate(take_overs(ground, count, seed=seed)):
            outcome = so_far
            click.echo(f"{number + 1:3} {how}: {gap}")
        for how, gaps in outcome.gaps.items():
            if gaps:
                ordered = sorted(gap.bound for gap in gaps)
                click.echo(
                    f"{how}: {len(gaps)} times, median {statistics.median(ordered):.1f} s, longest {ordered[-1]:.2f} s"
                )
        click.echo(f"{outcome.bound} pods bound, {outcome.fenced} Bindings of an earlier writer refused")
        for sentence in outcome.broken:
            click.echo(sentence)
        click.echo(f"{len(outcome.broken)} invariants broken")
        late = sum(gap.bound > at_most for gaps in outcome.gaps.values() for gap in gaps)
        click.echo(f"{late} took longer than {at_most:g} s")
        sys.exit(bool(outcome.broken or late))


if __name__ == "__main__":
    main()
