"""MIG on real components: what was granted reaches the container, and a storm of pods and crashes leaves nothing wrong.

The GPUs are made up; their instances are kept in a file, with a journal, so that what NVML did can be held against what
the pods were granted and saw.
"""

import os
import random
import stat
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime

import pytest
import yaml

from cotenant.contract import grant as grants
from cotenant.contract.grant import MIGPlacement
from device_plugin.nvml import NVML
from device_plugin.nvml.fake_mig import Fault, StateFile
from e2e import policies
from e2e.agreement import GRANT, phase, settled
from e2e.cluster import ControlPlane
from e2e.kustomize import MANIFESTS
from e2e.node import RealNode, container, pod
from e2e.processes import wait_until
from e2e.programs import RunningExtender, RunningPlugin
from e2e.rest import Api, ApiError, Object

COUNT = 5
GPU = "{{model: NVIDIA A100-SXM4-40GB, memory: 40GiB, mig: true, computeCapability: [8, 0], device: {device}}}"
# How many pods the storm has, and how often the plugin is killed in it: `make mig-storm` has 200 and 10.
PODS = int(os.environ.get("COTENANT_STORM_PODS", "40"))
KILLS = int(os.environ.get("COTENANT_STORM_KILLS", "4"))
SEED = int(os.environ.get("COTENANT_STORM_SEED", "1"))
AT_ONCE = 20
PROFILES = ["1g.5gb"] * 5 + ["2g.10gb"] * 3 + ["3g.20gb"] * 2 + ["4g.20gb", "7g.40gb", "1g.10gb"]


@dataclass
class Ground:
    """All that runs for MIG pods."""

    api: Api
    node: RealNode
    plugin: RunningPlugin
    state: StateFile

    def instance(self, uuid: str) -> tuple[str, str, int] | None:
        """Find an instance that is there: its GPU, profile and start."""
        return next(
            ((one.gpu, one.profile, one.start) for one in self.state.read().instances if one.uuid == uuid), None
        )


@pytest.fixture(scope="module")
def ground(
    control_plane: ControlPlane, real_node: RealNode, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Ground]:
    directory = tmp_path_factory.mktemp("mig")
    api = control_plane.api()
    device = directory / "fake-gpu"
    os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))  # what /dev/null is
    plugin = RunningPlugin(
        real_node,
        directory / "plugin",
        gpus=f"gpus: [{', '.join([GPU.format(device=device)] * COUNT)}]",
        configuration=f"gpus: [{{family: mig-dynamic}}]\ndeviceListStrategy: cdi-cri\ninventoryInterval: 2\n"
        f"cdiDirectory: {real_node.cdi_directory}\n",
    )
    state = StateFile(plugin.fake_gpus)
    with (
        policies.installed(api),
        RunningExtender(control_plane, directory / "extender") as extender,
        control_plane.scheduling(extender.scheduler_config()),
        plugin,
    ):
        yield Ground(api, real_node, plugin, state)


@pytest.fixture(autouse=True)
def nothing_left(ground: Ground) -> Iterator[None]:
    """Delete the pods of a test; then no instance and no spec of one may be left."""
    yield
    ground.state.arm(None)
    if not ground.plugin.program.running:
        ground.plugin.start()
    for left in ground.api.call("GET", "/api/v1/pods")["items"]:
        ground.api.delete("Pod", left["metadata"]["name"], namespace=left["metadata"]["namespace"], grace_s=1)
    assert wait_until(lambda: not ground.api.call("GET", "/api/v1/pods")["items"], timeout_s=120)
    assert wait_until(lambda: ground.state.read().instances == [], timeout_s=60), ground.state.read().instances
    assert wait_until(lambda: not list(ground.node.cdi_directory.glob("cotenant-mig-*")), timeout_s=10)


def asking(name: str, profile: str, script: str = "env; sleep 1000000") -> Object:
    return pod(name, container("main", script, limits={f"nvidia.com/mig-{profile}": 1}))


def placement(seen: Object) -> tuple[str, MIGPlacement]:
    """Read where a pod's first container was placed: the parent's UUID, and the place on it."""
    (granted, *_) = grants.decode(seen["metadata"]["annotations"][GRANT]).containers
    assert granted.mig is not None
    return granted.gpus[0].uuid, granted.mig


def visible(ground: Ground, seen: Object) -> str:
    """Read which instance a container printed that it has: the last line of that name counts."""
    lines = ground.node.logs(seen, "main").splitlines()
    return next((line.partition("=")[2] for line in reversed(lines) if line.startswith("COTENANT_MIG_UUID=")), "")


def test_an_instance_is_made_for_a_pod_reaches_its_container_and_goes_with_it(ground: Ground) -> None:
    ground.api.create(asking("one", "3g.20gb"))

    seen = ground.api.wait("Pod", "one", settled, saying="its start")

    assert "Running" == phase(seen), seen["status"]
    gpu, place = placement(seen)
    assert ("3g.20gb", 4, 4) == (place.profile, place.start, place.size)
    environment = ground.node.environment(seen)
    assert (gpu, "3g.20gb", 4) == ground.instance(environment["COTENANT_MIG_UUID"])
    # so that NVIDIA's runtime, where it is the handler, injects nothing besides
    assert "void" == environment["NVIDIA_VISIBLE_DEVICES"]
    assert "void" == seen["metadata"]["annotations"]["visible-devices.cotenant.io/main"]


def test_a_pod_for_which_no_place_is_left_says_so_and_runs_when_one_is(ground: Ground) -> None:
    for n in range(5):
        ground.api.create(asking(f"whole-{n}", "7g.40gb"))
    for n in range(5):
        ground.api.wait("Pod", f"whole-{n}", lambda p: phase(p) == "Running", saying="running", timeout_s=60)
    ground.api.create(asking("late", "1g.5gb"))

    waiting = ground.api.wait("Pod", "late", lambda p: bool(p and p["status"].get("conditions")), saying="a no")
    assert "no GPU has room for another instance of the MIG profile" in waiting["status"]["conditions"][0]["message"]
    ground.api.delete("Pod", "whole-3", grace_s=1)
    ground.api.wait("Pod", "late", lambda p: phase(p) == "Running", saying="running", timeout_s=60)


def templates(example: str) -> tuple[list[Object], list[tuple[Object, int]]]:
    """Read an example: its objects that are no workloads, and the pods' templates with how many of each there are.

    What is written for one team is made for five, as it says itself.
    """
    others, pods = [], []
    text = (MANIFESTS / "examples" / example).read_text()
    texts = [text.replace("team-a", f"team-{name}") for name in "abcde"] if "team-a" in text else [text]
    for document in (one for text in texts for one in yaml.safe_load_all(text)):
        if "template" in document.get("spec", {}):
            pods.append((document, document["spec"].get("replicas", 1)))
        else:
            others.append(document)
    return others, pods


def instantiate(workload: Object, number: int) -> Object:
    """Make a pod of a workload as its controller would, but one that can run here: busybox stands for CUDA's image."""
    template = workload["spec"]["template"]
    labels = {**template.get("metadata", {}).get("labels", {}), "apps.kubernetes.io/pod-index": str(number)}
    made = pod(f"{workload['metadata']['name']}-{number}", *map(runnable, template["spec"]["containers"]))
    made["metadata"] |= {"namespace": workload["metadata"]["namespace"], "labels": labels}
    return made


def runnable(one: Object) -> Object:
    script = "echo DEVICES=$(ls -d /dev/nvidia?* /dev/nvidia-caps/*); sleep 1000000"
    return container(one["name"], script) | {"env": one.get("env", []), "resources": one["resources"]}


@pytest.mark.parametrize(
    ("example", "count", "profile", "gpus"),
    [("mig-low-qps.yaml", 10, "1g.5gb", {7: 1, 3: 1}), ("mig-teams.yaml", 5, "3g.20gb", {2: 2, 1: 1})],
)
def test_an_example_gives_every_container_an_instance_of_its_own(
    ground: Ground, example: str, count: int, profile: str, gpus: dict[int, int]
) -> None:
    others, workloads = templates(example)
    for document in others:
        ground.api.apply(yaml.safe_dump(document))
        if document["kind"] == "ResourceQuota":  # as kube-controller-manager does, which is not here
            where = f"/api/v1/namespaces/{document['metadata']['namespace']}/resourcequotas/gpus"
            found = ground.api.call("GET", where)
            found["status"] = {"hard": found["spec"]["hard"], "used": dict.fromkeys(found["spec"]["hard"], "0")}
            ground.api.call("PUT", f"{where}/status", found)
    made = [instantiate(workload, n) for workload, replicas in workloads for n in range(replicas)]
    for one in made:
        ground.api.create(one)

    seen = [
        ground.api.wait(
            "Pod",
            one["metadata"]["name"],
            settled,
            namespace=one["metadata"]["namespace"],
            saying="its start",
            timeout_s=120,
        )
        for one in made
    ]

    assert [count, {"Running"}] == [len(seen), {phase(one) for one in seen}]
    uuids = set()
    on: Counter[str] = Counter()
    for one in seen:
        gpu, place = placement(one)
        uuid = ground.node.environment(one, one["spec"]["containers"][0]["name"])["COTENANT_MIG_UUID"]
        assert (gpu, profile, place.start) == ground.instance(uuid)
        uuids.add(uuid)
        on[gpu] += 1
        assert expected_devices(ground, uuid) == printed_devices(ground, one)
    assert count == len(uuids)
    # packed: as few GPUs as hold them, so that the others stay whole
    assert gpus == dict(Counter(on.values()))
    if example == "mig-teams.yaml":
        small = instantiate(workloads[0][0], 7)
        small["spec"]["containers"][0]["resources"] = {"limits": {"nvidia.com/mig-1g.5gb": 1}}
        with pytest.raises(ApiError, match="exceeded quota"):
            ground.api.create(small)


def expected_devices(ground: Ground, uuid: str) -> list[str]:
    """List what a container must find in /dev: the parent's node, and the capabilities of its instance alone."""
    found = next(one for one in ground.state.read().instances if one.uuid == uuid)
    nodes = [gpu.minor for gpu in NVML.open(fake=ground.plugin.fake_gpus).gpus() if gpu.uuid == found.gpu]
    # the made-up driver numbers them from 3 on: two of each instance, of which a GPU has up to 15
    first = 3 + 30 * int(nodes[0] or 0) + 2 * found.id
    return sorted(
        ["/dev/nvidia-caps", f"/dev/nvidia{nodes[0]}", *(f"/dev/nvidia-caps/nvidia-cap{first + n}" for n in (0, 1))]
    )


def printed_devices(ground: Ground, seen: Object) -> list[str]:
    name = seen["spec"]["containers"][0]["name"]
    assert wait_until(lambda: "DEVICES=" in ground.node.logs(seen, name), timeout_s=10)
    (line,) = [line for line in ground.node.logs(seen, name).splitlines() if line.startswith("DEVICES=")]
    return sorted(line.removeprefix("DEVICES=").split())


# What the kubelet says of a pod that it admits between a plugin's end and the next one's registration, and of one whose
# question the plugin was asked when it was killed (devicemanager/manager.go, devicesToAllocate; gRPC's own codes).
_KILLED = ("no healthy devices present", "rpc error: code = Unavailable", "rpc error: code = Canceled")


@dataclass
class Storm:
    """What was seen of the pods of a storm."""

    placed: dict[str, tuple[str, MIGPlacement]] = field(default_factory=dict)
    saw: dict[str, str] = field(default_factory=dict)
    # when a container had begun for certain, and when it ended, at the earliest
    began: dict[str, float] = field(default_factory=dict)
    ended: dict[str, float] = field(default_factory=dict)
    # what the kubelet said of pods that it did not admit
    rejected: dict[str, str] = field(default_factory=dict)
    overlaps: list[str] = field(default_factory=list)

    def look(self, ground: Ground, pods: Sequence[Object]) -> None:
        """Note what can be seen now: places, what containers printed, and whether two live grants overlap."""
        live: dict[str, list[tuple[int, int, str]]] = {}
        for seen in pods:
            name = seen["metadata"]["name"]
            if GRANT not in seen["metadata"].get("annotations", {}):
                continue
            gpu, place = self.placed[name] = placement(seen)
            if uuid := visible(ground, seen):
                self.saw[name] = uuid
                self.began.setdefault(name, time.time())
            if phase(seen) in {"Succeeded", "Failed"}:
                self._end(name, seen)
                continue
            for start, size, other in live.setdefault(gpu, []):
                if start < place.start + place.size and place.start < start + size:
                    self.overlaps.append(f"{name} and {other} on {gpu}")
            live[gpu].append((place.start, place.size, name))

    def _end(self, name: str, seen: Object) -> None:
        for status in seen["status"].get("containerStatuses", []):
            finished = status["state"].get("terminated", {}).get("finishedAt")
            if finished:
                self.ended[name] = datetime.fromisoformat(finished).timestamp()
        if seen["status"].get("reason"):
            self.rejected[name] = f"{seen['status']['reason']}: {seen['status'].get('message', '')}"

    def refused_by_us(self) -> dict[str, str]:
        """Name the pods that were rejected for another reason than that the plugin was being killed."""
        return {name: why for name, why in self.rejected.items() if not any(one in why for one in _KILLED)}


def test_a_storm_of_pods_while_the_plugin_is_killed_between_calls_of_nvml(  # noqa: C901 - as storms are
    ground: Ground,
) -> None:
    draw = random.Random(SEED)
    storm = Storm()
    profiles: dict[str, str] = {}
    deleted: dict[str, float] = {}
    killed = armed = 0

    def pods() -> list[Object]:
        return ground.api.list("Pod", namespace="default")

    def disturb(progress: float) -> None:
        """Start a plugin that was killed; arm the next kill, so that they spread over the storm."""
        nonlocal killed, armed
        if not ground.plugin.program.running:
            killed += 1
            ground.plugin.start()
        if armed == killed < KILLS and progress * (KILLS + 1) > killed + 1:
            armed += 1
            # the n-th call of NVML about MIG from now, be it of a look, of making, or of destroying
            ground.state.arm(Fault(calls=draw.randrange(1, 80), do="kill", when=draw.choice(["before", "after"])))

    for n in range(PODS):
        name = f"s{n}"
        profiles[name] = draw.choice(PROFILES)
        seconds = draw.choice([1, 2, 4, 8])
        ground.api.create(asking(name, profiles[name], f"env; sleep {seconds}"))
        while True:
            listed = pods()
            storm.look(ground, listed)
            disturb(n / PODS)
            for seen in listed:
                here, at = seen["metadata"]["name"], time.time()
                if phase(seen) in {"Succeeded", "Failed"} or (phase(seen) == "Running" and draw.random() < 0.03):
                    deleted.setdefault(here, at)
                    ground.api.delete("Pod", here, grace_s=1)
            if sum(phase(seen) in {"Pending", "Running"} for seen in listed) < AT_ONCE:
                break
            time.sleep(0.3)
    deadline = time.monotonic() + 60 + PODS * 3
    while left := pods():
        storm.look(ground, left)
        disturb(1.0)
        for seen in left:
            if phase(seen) in {"Succeeded", "Failed"}:
                deleted.setdefault(seen["metadata"]["name"], time.time())
                ground.api.delete("Pod", seen["metadata"]["name"], grace_s=1)
        assert time.monotonic() < deadline, [(p["metadata"]["name"], phase(p), p["status"]) for p in left][:3]
        time.sleep(0.3)
    assert wait_until(lambda: ground.state.read().instances == [], timeout_s=60), "instances that nobody holds are left"

    journal = ground.state.read().journal
    wrong = misdeeds(storm, deleted, journal)
    made = sum(what == "create" for _, what, _, _ in journal)
    said = Counter(next((one for one in _KILLED if one in why), why) for why in storm.rejected.values())
    print(
        f"\n{PODS} pods, {len(storm.placed)} placed, {len(storm.saw)} seen running, {len(storm.rejected)} rejected; "
        f"plugin killed {killed} times by NVML calls; {made} instances made; rejected since: {dict(said)}"
    )
    assert {} == storm.refused_by_us()
    assert [] == storm.overlaps
    assert [] == wrong
    assert killed >= KILLS - 1, "the faults hardly ever struck"
    assert len(storm.saw) >= PODS // 2, "too few were seen running to compare much"


def misdeeds(storm: Storm, deleted: dict[str, float], journal: Sequence[tuple[float, str, str, str]]) -> list[str]:
    """Hold what containers saw against what NVML did: the right instance, theirs alone, until they had ended."""
    wrong: list[str] = []
    # what is made anew in its place has the same UUID: when each of them was there
    lives: dict[str, list[tuple[float, float]]] = {}
    lies: dict[str, str] = {}
    for at, what, which, gpu in journal:
        if what == "use":
            lies[which] = gpu
            lives.setdefault(which, []).append((at, float("inf")))
        elif what == "end":
            lives[which][-1] = lives[which][-1][0], at
    left = {uuid: iter(there) for uuid, there in lives.items()}
    # a container that ended by itself says when; of one that was deleted it is known when that was asked
    ended = {name: int(storm.ended.get(name, deleted[name])) for name in storm.saw}
    for name, uuid in sorted(storm.saw.items(), key=lambda one: (ended[one[0]], storm.began[one[0]])):
        gpu, _ = storm.placed[name]
        if uuid not in lies:
            wrong.append(f"{name} saw {uuid}, which never was")
            continue
        if lies[uuid] != gpu:
            wrong.append(f"{name} was granted GPU {gpu}, and saw an instance of {lies[uuid]}")
        if not any(since < storm.began[name] and ended[name] <= until for since, until in left[uuid]):
            had = f"{uuid} from {storm.began[name]} to {ended[name]}"
            wrong.append(f"{name} had {had}, and not alone or not for as long: {lives[uuid]}")
    return wrong
