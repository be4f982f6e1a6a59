"""Preemption by a real kube-scheduler: what its victims become in our hands, and what stays out of its reach."""

import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from cotenant.contract.units import GIB
from e2e import nodes, policies
from e2e.cluster import ControlPlane
from e2e.faults.invariants import Picture, broken
from e2e.faults.load import pod
from e2e.kustomize import MANIFESTS, build
from e2e.processes import MissingProgramError, wait_until
from e2e.programs import RunningExtender
from e2e.rest import Api, Object


@dataclass
class Ground:
    """One node of two GPUs of 10 units, and a kube-scheduler that may evict."""

    api: Api
    extender: RunningExtender

    def create(self, name: str, units: int, *, urgent: bool = False, labels: dict[str, str] | None = None) -> Object:
        one = pod(name, units)
        one["metadata"]["labels"] = labels or {}
        if urgent:
            one["spec"]["priorityClassName"] = "urgent"
        return self.api.create(one)

    def resident(self, name: str, units: int, *, minute: int, labels: dict[str, str] | None = None) -> str:
        """Create a pod, wait until it is placed, and have it started at a minute, as a kubelet would say."""
        self.create(name, units, labels=labels)
        self.api.bound(name)
        status = {"status": {"phase": "Running", "startTime": f"2026-01-01T00:{minute:02}:00Z"}}
        self.api.patch("Pod", name, status, subresource="status")
        return name

    def waits(self, name: str) -> None:
        """Wait until the pod was tried in vain."""
        self.api.unschedulable(name, "no single GPU has the requested memory free")

    def evicted(self) -> set[str]:
        return {one["metadata"]["name"] for one in self.api.list("Pod") if "deletionTimestamp" in one["metadata"]}

    def gone(self, names: set[str]) -> None:
        """End pods for good, which is the kubelet's part."""
        for name in names:
            self.api.delete("Pod", name, grace_s=0)

    def preempted(self) -> int:
        """Count the answers to preempt."""
        with urllib.request.urlopen(f"http://{self.extender.serve}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        return int(
            sum(
                float(line.split()[-1])
                for line in lines
                if line.startswith("cotenant_extender_request_duration_seconds_count") and 'verb="preempt"' in line
            )
        )


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Callable[[str], Ground]]:
    """Start all of it, the extender with a configuration and the rights that are shipped."""
    with ExitStack() as stack:

        def start(configuration: str = "", *, evictions: bool = False) -> Ground:
            cluster = stack.enter_context(ControlPlane(tmp_path / "control-plane"))
            api = cluster.api()
            stack.enter_context(policies.installed(api))
            nodes.register(api, 1, nodes.Shape(gpus=2, gpu_bytes=10 * GIB), prefix="lab")
            urgent = {"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": {"name": "urgent"}}
            api.create({**urgent, "value": 1000})
            for one in build(MANIFESTS / "second-scheduler"):
                if one["kind"] in {"Namespace", "ServiceAccount", "ClusterRole", "ClusterRoleBinding"}:
                    api.apply_object(one)
            for one in build(MANIFESTS / "eviction") if evictions else ():
                api.apply_object(one)
            file = tmp_path / "extender.yaml"
            file.write_text(configuration)
            kubeconfig = cluster.service_account_kubeconfig("cotenant-extender", namespace="cotenant-system")
            extender = stack.enter_context(
                RunningExtender(cluster, tmp_path / "extender", kubeconfig=kubeconfig, flags=[f"--config={file}"])
            )
            cluster.start_scheduler(extender.scheduler_config())
            return Ground(api, extender)

        try:
            yield start
        except MissingProgramError as missing:
            pytest.skip(str(missing))


@pytest.fixture
def ground(begin: Callable[[], Ground]) -> Ground:
    try:
        return begin()
    except MissingProgramError as missing:
        pytest.skip(str(missing))


def four_residents(ground: Ground) -> None:
    """Fill each GPU with a pod of 6 and one of 4 units, those of 6 being older."""
    for minute, name in enumerate(("six-a", "six-b", "four-a", "four-b")):
        ground.resident(name, 6 if name.startswith("six") else 4, minute=minute, labels={"size": name})


class TestVictims:
    """kube-scheduler would evict the two youngest, of 4 units each: 8 of the node, but no GPU of 6."""

    def test_one_pod_that_frees_a_gpu_goes_instead_of_two_that_free_none(self, ground: Ground) -> None:
        four_residents(ground)

        ground.create("urgent", 6, urgent=True)

        assert wait_until(lambda: bool(ground.evicted()), timeout_s=60), "nobody was evicted"
        (victim,) = ground.evicted()
        assert victim in {"six-a", "six-b"}
        # it holds what it has until it is gone
        assert [] == broken(Picture.of(ground.api))
        ground.gone({victim})
        assert "lab-0" == ground.api.bound("urgent")["spec"]["nodeName"]
        assert [] == broken(Picture.of(ground.api))

    def test_a_disruption_budget_turns_the_choice(self, ground: Ground) -> None:
        budget = {
            "apiVersion": "policy/v1",
            "kind": "PodDisruptionBudget",
            "metadata": {"name": "sixes", "namespace": "default"},
            "spec": {"minAvailable": 1, "selector": {"matchLabels": {"size": "six-a"}}},
        }
        ground.api.create(budget)  # nobody updates its status here, so that it allows nothing
        four_residents(ground)

        ground.create("urgent", 6, urgent=True)

        assert wait_until(lambda: bool(ground.evicted()), timeout_s=60), "nobody was evicted"
        assert {"six-b"} == ground.evicted()


class TestFragmentation:
    """kube-scheduler evicts for sums alone, and asks us only about nodes that it would evict from."""

    def two_residents(self, ground: Ground) -> None:
        """Leave 4 units of each GPU, 8 of the node: enough for 6 by the sum, so that there is nothing to evict for."""
        ground.resident("six-a", 6, minute=0)
        ground.resident("six-b", 6, minute=1)

    def test_by_default_the_node_stays_as_it_is_and_the_pod_waits(self, ground: Ground) -> None:
        self.two_residents(ground)

        ground.create("urgent", 6, urgent=True)

        ground.waits("urgent")
        assert set() == ground.evicted()
        assert 0 == ground.preempted()

    def test_where_it_is_configured_one_goes_and_the_pod_runs_in_its_place(self, begin: Callable[..., Ground]) -> None:
        ground = begin("preemptFragmented: {after: 1}", evictions=True)
        self.two_residents(ground)

        ground.create("urgent", 6, urgent=True)

        assert wait_until(lambda: bool(ground.evicted()), timeout_s=60), "nobody was evicted"
        assert 1 == len(ground.evicted())
        ground.api.wait(
            "Pod",
            "urgent",
            lambda seen: bool(seen and seen["status"].get("nominatedNodeName") == "lab-0"),
            saying="its nomination",
            timeout_s=30,
        )
        # another one may have what is free, but not what its victim leaves
        ground.create("rival", 5)
        ground.gone(ground.evicted())
        assert "lab-0" == ground.api.bound("urgent")["spec"]["nodeName"]
        ground.waits("rival")
        assert [] == broken(Picture.of(ground.api))
        assert 0 == ground.preempted()

    def test_without_the_right_nobody_goes_and_the_pod_is_told(self, begin: Callable[..., Ground]) -> None:
        ground = begin("preemptFragmented: {after: 1}")
        self.two_residents(ground)

        ground.create("urgent", 6, urgent=True)

        assert wait_until(
            lambda: any(
                one["reason"] == "GPUMemoryPreemptionForbidden"
                for one in ground.api.list("Event", api_version="events.k8s.io/v1")
            ),
            timeout_s=60,
        )
        assert set() == ground.evicted()
