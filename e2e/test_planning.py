"""Policies, snapshots, plans and shadow scoring on a real API server, asked as a user asks: by command and by scrape.

What a kubelet, a ReplicaSet and the disruption controller would do is done here; evictions are the API server's.
"""

import json
import subprocess
import sys
import threading
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import click
import msgspec
import pytest
import yaml

from cotenant.cli.plan import make
from cotenant.cluster import connect
from cotenant.contract import grant as grants
from cotenant.contract.names import Names
from cotenant.contract.units import GIB
from cotenant.simulator.moves import MovePlan
from e2e import kustomize, nodes, policies
from e2e.cluster import ControlPlane
from e2e.faults.load import pod
from e2e.processes import MissingProgramError, wait_until
from e2e.programs import RunningExtender
from e2e.rest import Api, ApiError

NAMES = Names()
CONFIGURATION = {
    "placement": "decide",
    "policy": "binpack",
    "profilePolicies": {"interactive": "spread"},
    "nodePools": [{"labels": {"pool": "calm"}, "policy": "spread"}],
    "shadow": "spread",
}


@dataclass
class Ground:
    """Three nodes of two GPUs of 10 units, the last of them in the pool `calm`; a kube-scheduler with two profiles."""

    cluster: ControlPlane
    api: Api
    extender: RunningExtender
    configuration: Path

    def place(self, name: str, units: int, **more: Any) -> tuple[str, str]:
        """Create a pod, wait for its place, and give the node and the GPU."""
        one = pod(name, units)
        one["metadata"] |= more.pop("metadata", {})
        one["spec"] |= more
        self.api.create(one)
        placed = self.api.bound(name)
        given = grants.decode(placed["metadata"]["annotations"][NAMES.grant])
        return placed["spec"]["nodeName"], given.containers[0].gpus[0].uuid

    def clear(self) -> None:
        """Delete all pods and budgets."""
        for one in self.api.list("Pod"):
            self.api.delete("Pod", one["metadata"]["name"], grace_s=0)
        for one in self.api.list("PodDisruptionBudget", api_version="policy/v1"):
            self.api.delete("PodDisruptionBudget", one["metadata"]["name"], api_version="policy/v1")

    def cotenant(self, *arguments: str, status: int = 0) -> str:
        """Run the command as a user does; give what it printed."""
        live = () if {"--snapshot", "--trace", "--server"} & {*arguments} else self.kubeconfig
        ran = subprocess.run(
            [Path(sys.executable).with_name("cotenant"), *arguments, *live],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert status == ran.returncode, ran.stdout + ran.stderr
        return ran.stdout

    @property
    def kubeconfig(self) -> tuple[str, str]:
        return "--kubeconfig", str(self.cluster.kubeconfig())

    def metrics(self, name: str) -> dict[str, float]:
        """Scrape one metric: values by labels, as they stand there."""
        with urllib.request.urlopen(f"http://{self.extender.serve}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        found = (line.rpartition(" ") for line in lines if line.startswith((name + "{", name + " ")))
        return {key.removeprefix(name): float(value) for key, _, value in found}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    directory = tmp_path_factory.mktemp("planning")
    try:
        with ControlPlane(directory / "control-plane") as cluster, policies.installed(cluster.api()):
            api = cluster.api()
            allow_profiles(api)
            nodes.register(api, 3, nodes.Shape(gpus=2, gpu_bytes=10 * GIB), prefix="lab")
            api.patch("Node", "lab-2", {"metadata": {"labels": {"pool": "calm"}}})
            urgent = {"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": {"name": "urgent"}}
            api.create(urgent | {"value": 1000})
            configuration = directory / "extender.yaml"
            configuration.write_text(yaml.safe_dump(CONFIGURATION))
            with RunningExtender(cluster, directory / "extender", flags=[f"--config={configuration}"]) as extender:
                config = extender.scheduler_config()
                config["profiles"].append(config["profiles"][0] | {"schedulerName": "interactive"})
                cluster.start_scheduler(config)
                yield Ground(cluster, api, extender, configuration)
    except MissingProgramError as missing:
        pytest.skip(str(missing))


@pytest.fixture
def ground(whole: Ground) -> Iterator[Ground]:
    yield whole
    whole.clear()


def allow_profiles(api: Api) -> None:
    """Name the second profile in the admission policy, as docs/policies.md says, and wait until that holds."""
    for policy in kustomize.build(kustomize.MANIFESTS / "admission" / "policies"):
        for variable in policy["spec"].get("variables", []):
            if variable["name"] == "profiles":
                variable["expression"] = "['interactive']"
                api.apply(json.dumps(policy))
    asking = pod("probe", 1)
    asking["spec"]["schedulerName"] = "interactive"

    def admitted() -> bool:
        try:
            api.call("POST", "/api/v1/namespaces/default/pods", asking, query={"dryRun": "All"})
        except ApiError:
            return False
        return True

    assert wait_until(admitted, timeout_s=30), "the policy goes on refusing the profile"


class TestChoices:
    """The policy is the pod's, its node pool's, its profile's, or the default."""

    def test_profiles_pools_and_pods_have_policies_of_their_own(self, ground: Ground) -> None:
        first = ground.place("first", 2, nodeSelector={"kubernetes.io/hostname": "lab-0"})

        # binpack, then spread, which is the profile's; then binpack again, by the pod's own wish
        assert first == ground.place("packed", 2)
        apart = ground.place("apart", 2, schedulerName="interactive")
        assert first != apart
        wishes = {"annotations": {NAMES.policy: "binpack"}}
        assert first == ground.place("wishing", 2, schedulerName="interactive", metadata=wishes)

        calm = {"nodeSelector": {"pool": "calm"}}
        assert "lab-2" == ground.place("calm-a", 2, **calm)[0]
        # whatever lay there before: four pods of a size on two GPUs, two on each
        places = Counter(ground.place(f"calm-{n}", 2, **calm)[1] for n in range(3))
        assert 2 == len(places)


def six_apart(ground: Ground, *, kept: tuple[str, ...]) -> dict[str, tuple[str, str]]:
    """Put a pod of 4 units on each of the six GPUs, as a ReplicaSet's, the first an urgent one, and have them run."""
    places = {}
    for n in range(6):
        name = f"p{n}"
        owner = {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "r", "uid": "r-1", "controller": True}
        metadata = {
            "ownerReferences": [owner],
            "labels": {"app": "kept" if name in kept else "free"},
            "annotations": {NAMES.policy: "spread"},
        }
        more = {"priorityClassName": "urgent"} if n == 0 else {}
        places[name] = ground.place(name, 4, metadata=metadata, **more)
        # a pod that is pending may be evicted whatever a budget says
        running = {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}
        ground.api.patch("Pod", name, {"status": running}, subresource="status")
    assert 6 == len(set(places.values()))
    return places


def budget(ground: Ground, *, app: str, allowed: int) -> None:
    """Have a PodDisruptionBudget whose status says how many may go, as its controller would write."""
    api, metadata = ground.api, {"name": app, "namespace": "default"}
    made = {"apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": metadata}
    try:
        seen = api.create(made | {"spec": {"minAvailable": 1, "selector": {"matchLabels": {"app": app}}}})
    except ApiError:
        seen = api.get("PodDisruptionBudget", app, api_version="policy/v1")
    status = {"disruptionsAllowed": allowed, "currentHealthy": 1 + allowed, "desiredHealthy": 1, "expectedPods": 2}
    status["observedGeneration"] = seen["metadata"]["generation"]
    api.patch("PodDisruptionBudget", app, {"status": status}, subresource="status", api_version="policy/v1")


class Kubelet(threading.Thread):
    """End pods that are being deleted, a moment later."""

    def __init__(self, api: Api) -> None:
        super().__init__(daemon=True)
        self._api = api
        self._stopping = threading.Event()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self.join()

    def run(self) -> None:
        """Look every half second."""
        while not self._stopping.wait(0.5):
            for one in self._api.list("Pod"):
                if "deletionTimestamp" in one["metadata"]:
                    self._api.delete("Pod", one["metadata"]["name"], grace_s=0)


class TestPlans:
    """Six GPUs of 10 units with a pod of 4 on each: 6 are free of each, and 10 fit after one move."""

    def test_a_snapshot_says_what_the_live_cluster_does(self, ground: Ground, tmp_path: Path) -> None:
        six_apart(ground, kept=("p1",))
        taken = tmp_path / "cluster.json"
        assert "3 nodes with GPUs, 6 pods on them" in ground.cotenant("snapshot", "--out", str(taken))

        for question in (["largest"], ["fit", "--gpu-mem", "6", "--replicas", "7"]):
            status = 1 if "fit" in question else 0
            live = ground.cotenant("plan", *question, "-o", "json", status=status)
            assert live == ground.cotenant("plan", *question, "-o", "json", "--snapshot", str(taken), status=status)
        fit = json.loads(live)
        # one on each GPU, and no seventh
        assert (7, 6) == (fit["wanted"], len(fit["spots"]))
        # 6 x 4 of 20 units a node: three of 10 GPUs hold two each
        needed = json.loads(ground.cotenant("plan", "nodes", "--trace", str(taken), "--like", "lab-0", "-o", "json"))
        assert 2 == needed["nodes"]
        report = tmp_path / "report.json"
        ground.cotenant(
            "simulate", "--trace", str(taken), "--afresh", "--seed", "1", "--json", str(report),
            "--config", str(ground.configuration),
        )  # fmt: skip
        assert 6 == json.loads(report.read_bytes())["pods"]

    def test_pools_and_profiles_hold_in_plans_too(self, ground: Ground) -> None:
        calm = ("plan", "fit", "--gpu-mem", "2", "--replicas", "2", "--selector", "pool=calm", "-o", "json")
        config = ("--config", str(ground.configuration))
        spots, packed = (
            json.loads(ground.cotenant(*calm, *more))["spots"] for more in (config, ("--policy", "binpack"))
        )

        assert [2, 1] == [len({(one["node"], *one["gpus"]) for one in found}) for found in (spots, packed)]

    def test_moves_leave_alone_who_must_not_go_and_are_made(self, ground: Ground) -> None:
        places = six_apart(ground, kept=("p1", "p2", "p3", "p4"))
        budget(ground, app="kept", allowed=0)
        asked = ("plan", "moves", "--gpu-mem", "10", "--policy", "binpack")
        assert "0 of 1 pod " in ground.cotenant("plan", "fit", "--gpu-mem", "10", status=1)

        plan = json.loads(ground.cotenant(*asked, "-o", "json"))

        assert ["p5"] == [move["name"] for move in plan["moves"]]
        assert {"their priority is above 0": 1, "their PodDisruptionBudget allows none": 4} == plan["left"]
        # a dry run: they are all there
        assert 6 == len(ground.api.list("Pod"))
        with Kubelet(ground.api):
            assert "move 1 of 1, default/p5: evicted, and gone" in ground.cotenant(*asked, "--apply")
        assert set(places) - {"p5"} == {one["metadata"]["name"] for one in ground.api.list("Pod")}
        fit = json.loads(ground.cotenant("plan", "fit", "--gpu-mem", "10", "-o", "json"))
        assert [places["p5"][0]] == [spot["node"] for spot in fit["spots"]]
        # what the plan says of the successor comes true
        again = ground.place("p5", 4)
        assert plan["moves"][0]["to_node"] == again[0]

    def test_the_api_servers_refusal_stops_the_moves(self, ground: Ground) -> None:
        six_apart(ground, kept=("p4", "p5"))
        budget(ground, app="free", allowed=0)
        budget(ground, app="kept", allowed=2)
        text = ground.cotenant("plan", "moves", "--gpu-mem", "10", "--policy", "binpack", "-o", "json")
        plan = msgspec.json.decode(text, type=MovePlan)
        assert {"p4", "p5"} >= {move.name for move in plan.moves}
        # others are disrupted between the plan and its moves
        budget(ground, app="kept", allowed=0)

        with (
            connect(ground.kubeconfig[1], pool_size=1) as live,
            pytest.raises(click.ClickException, match="was refused, and the moves after it were not tried") as refusal,
        ):
            make(live, plan.moves, patience=5)

        assert "disruption budget" in str(refusal.value)
        assert 6 == len(ground.api.list("Pod"))


class TestShadow:
    def test_what_another_policy_would_have_made_of_it_is_scraped_and_the_mix_is_learned(self, ground: Ground) -> None:
        before = ground.metrics("cotenant_shadow_placements_total")
        # binpack puts all on one GPU, one after the other; the shadow spreads them over six
        for n in range(4):
            ground.place(f"s{n}", 2, nodeSelector={"kubernetes.io/os": "linux"})

        def followed() -> bool:
            placed = ground.metrics("cotenant_shadow_placements_total")
            return 4 == sum(placed.values()) - sum(before.values())

        assert wait_until(followed, timeout_s=30), ground.metrics("cotenant_shadow_placements_total")
        live, shadow = (
            ground.metrics("cotenant_shadow_empty_gpus")[f'{{policy="{policy}",side="{side}"}}']
            for side, policy in (("live", "binpack"), ("shadow", "spread"))
        )
        # 8 units are one GPU or two, in the pool that is spread over; four in the shadow
        assert live > shadow
        assert 2 == shadow
        assert {"": 0.0} == ground.metrics("cotenant_shadow_pods_refused")
        free = ground.metrics("cotenant_shadow_free_bytes")
        assert {float(52 * GIB)} == set(free.values())
        mix = json.loads(ground.cotenant("inspect", "mix", "--server", f"http://{ground.extender.serve}", "-o", "json"))
        assert not mix["pinned"]
        assert 100 == pytest.approx(sum(one["percent"] for one in mix["items"]), abs=0.5)
        assert {2 * GIB, 4 * GIB} >= {one["memoryBytes"] for one in mix["items"]}
