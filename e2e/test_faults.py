"""What the API server's side can do to a running extender: it restarts, or the etcd behind it stands still."""

import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cotenant.contract.units import GIB
from e2e import nodes, policies
from e2e.cluster import ControlPlane
from e2e.faults.invariants import Picture, bound_twice, broken, leaks
from e2e.faults.load import Churn
from e2e.processes import MissingProgramError, wait_until
from e2e.programs import RunningExtender

# 4 nodes x 2 x 80 units; the load's pods have 12.9 on average, so 30 of them fill 60 %.
KEEP = 30


@dataclass
class Ground:
    """A control plane with an extender, and pods that come and go."""

    cluster: ControlPlane
    extender: RunningExtender

    def bound(self) -> int:
        """Count the Bindings that were taken so far."""
        writes, _ = self.cluster.audit()
        return sum(one.subresource == "binding" and one.code == 201 for one in writes)

    def goes_on(self, after: str) -> None:
        before = self.bound()
        assert wait_until(lambda: self.bound() > before + 10, timeout_s=90), f"nothing is bound after {after}"

    def judge(self) -> None:
        """Find every pod that fits bound once, no GPU over-committed, and the extender's sums those of the API."""
        api = self.cluster.api()

        def settled() -> bool:
            picture = Picture.of(api)
            waiting = [one for one in picture.pods if not one["spec"].get("nodeName")]
            return not leaks(picture, self.metrics()) and (not waiting or max(picture.free().values()) < GIB)

        assert wait_until(settled, timeout_s=90, every_s=1), leaks(Picture.of(api), self.metrics())
        assert [] == broken(Picture.of(api))
        writes, _ = self.cluster.audit()
        assert [] == bound_twice(writes)

    def metrics(self) -> str:
        with urllib.request.urlopen(f"http://{self.extender.serve}/metrics", timeout=10) as answer:
            text: str = answer.read().decode()
        return text


@pytest.fixture
def ground(tmp_path: Path) -> Iterator[Ground]:
    try:
        with ControlPlane(tmp_path / "control-plane") as cluster, policies.installed(cluster.api()):
            nodes.register(cluster.api(), 4, nodes.Shape(gpus=2, gpu_bytes=80 * GIB), prefix="lab")
            with RunningExtender(cluster, tmp_path / "extender") as extender:
                cluster.start_scheduler(extender.scheduler_config())
                yield Ground(cluster, extender)
    except MissingProgramError as missing:
        pytest.skip(str(missing))


def test_binds_go_on_after_it_and_nothing_is_lost_or_given_twice(ground: Ground) -> None:
    with Churn(ground.cluster.api(), rate=8, keep=KEEP, seed=1):
        assert wait_until(lambda: ground.bound() > 10, timeout_s=60), "the load is not bound"
        ground.cluster.restart_api_server()
        ground.goes_on("the API server's restart")
        ground.cluster.freeze_etcd(6.0)
        ground.goes_on("etcd stood still")
        # killed wherever its Bindings are just now
        ground.extender.kill()
        ground.extender.start()
        ground.goes_on("the extender was killed")
    ground.judge()
