"""A live cluster is read whole, and only pods that may be moved are evicted."""

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result

from cotenant.cli.main import main
from cotenant.cluster import Conflict, NotFound, TooManyRequests, connect
from cotenant.cluster.writes import evict
from cotenant.contract.grant import ContainerGrant, MIGPlacement
from cotenant.contract.inventory import Family, Mode
from cotenant.contract.units import GIB
from cotenant.simulator import document, snapshot
from cotenant.simulator.document import Document, Taint, Toleration
from cotenant.simulator.scene import scene
from cotenant.standins.api_rules import BUDGETS, NODES, PODS, Json
from cotenant.standins.api_server import ApiServer
from tests.builders import NAMES, PodBuilder, a_grant, a_node, a_pod, granted
from tests.steps import steps


def held_by(name: str, node: str, gib: int, *, owner: str = "ReplicaSet", **spec: Any) -> PodBuilder:
    """A pod that its controller would make anew, and that holds so much of a GPU."""
    pod = a_pod().named(name).asking(gib).bound_to(node, a_grant(granted({f"GPU-{node}-0": gib * GIB}, units=gib)))
    owners = [{"kind": owner, "name": "r", "controller": True, "apiVersion": "apps/v1", "uid": "u"}] if owner else []
    metadata = ("ownerReferences", owners), ("labels", {"app": name})
    return replace(pod, spec=(*pod.spec, *spec.items()), metadata=metadata)


def granted_instance(uuid: str) -> ContainerGrant:
    return msgspec.structs.replace(
        granted({uuid: 20 * GIB}, units=1),
        family=Family.MIG_DYNAMIC,
        mode=Mode.MIG,
        mig=MIGPlacement(profile="3g.20gb", start=0, size=4),
    )


def create(api: ApiServer, *pods: PodBuilder) -> None:
    for pod in pods:
        body = pod.as_json()
        api.store.create(PODS, body, namespace=pod.namespace, keep_status=True)


def taken(api: ApiServer, folder: Path) -> Document:
    done = command(api, folder, "snapshot", "--out", str(folder / "snapshot.json"))
    assert 0 == done.exit_code, done.output
    return document.read(folder / "snapshot.json")


def command(api: ApiServer, folder: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, [*arguments, "--kubeconfig", api.kubeconfig(folder / "kubeconfig")])


def budget(name: str, app: str, allowed: int) -> Json:
    return {
        "metadata": {"name": name},
        "spec": {"selector": {"matchLabels": {"app": app}}},
        "status": {"disruptionsAllowed": allowed},
    }


class TestSnapshot:
    def test_a_ledger_made_of_it_is_the_live_one(self, api: ApiServer, tmp_path: Path) -> None:
        nodes = [
            a_node("n1").with_gpus(2, "10GiB").with_gpu("80GiB").under_mps(),
            a_node("n2").with_gpus(2).unhealthy(1),
        ]
        for node in nodes:
            api.create(NODES, node.as_json())
        api.add_node("no-gpus")
        create(
            api, held_by("p", "n1", 4), held_by("q", "n2", 70), a_pod().named("w").asking(8).wishing(gpu_model="H100")
        )
        api.add_pod("elsewhere", spec={"nodeName": "no-gpus"})
        api.add_pod(
            "cores", spec={"nodeName": "n1", "containers": [{"name": "c", "resources": {"requests": {"cpu": "3"}}}]}
        )
        found = taken(api, tmp_path)

        assert ["n1", "n2"] == [node.name for node in found.nodes]
        assert {"p", "q", "w", "cores"} == {pod.name for pod in found.pods}
        views = {view.name: view for view in scene(found).ledger.views()}
        assert [6, 10, 80] == [state.free_bytes // GIB for state in views["n1"].gpus]
        assert [10, 80] == [state.free_bytes // GIB for state in views["n2"].gpus]
        assert 1 == len(views["n2"].healthy)
        # of 64 cores
        assert 61_000 == views["n1"].free_compute.cpu_milli
        (waiting,) = scene(found).jobs
        assert ("H100",) == waiting.request.wishes.models

    def test_doors_owners_and_priorities_are_read(self, api: ApiServer, tmp_path: Path) -> None:
        node = a_node("n").with_gpus(1).as_json()
        node["metadata"]["labels"] = {"pool": "a"}
        node["spec"] = {"unschedulable": True, "taints": [{"key": "k", "value": "v", "effect": "NoSchedule"}]}
        api.create(NODES, node)
        tolerations = [{"key": "k", "operator": "Exists"}]
        create(api, held_by("p", "n", 1, priority=7, nodeSelector={"pool": "a"}, tolerations=tolerations))
        found = taken(api, tmp_path)

        assert found.nodes[0].cordoned
        assert {"pool": "a"} == found.nodes[0].labels
        assert (Taint(key="k", value="v"),) == found.nodes[0].taints
        (pod,) = found.pods
        assert (7, "ReplicaSet/r", "") == (pod.priority, pod.owner, pod.stays)
        assert ({"pool": "a"}, (Toleration(key="k", operator="Exists"),)) == (pod.node_selector, pod.tolerations)

    @pytest.mark.parametrize(
        ("pod", "why"),
        [
            (held_by("p", "n", 1, owner=""), "nothing would make it anew"),
            (held_by("p", "n", 1, owner="DaemonSet"), "it is a DaemonSet's"),
            (held_by("p", "n", 1, owner="Job"), "it is a Job's, whose work would be lost"),
            (
                held_by("p", "n", 1).annotated({"cluster-autoscaler.kubernetes.io/safe-to-evict": "false"}),
                "cluster-autoscaler.kubernetes.io/safe-to-evict is false",
            ),
            (
                held_by(
                    "p", "n", 1, affinity={"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [{}]}}
                ),
                "it has affinities, which a plan does not weigh",
            ),
            (
                held_by("p", "n", 1, topologySpreadConstraints=[{"whenUnsatisfiable": "DoNotSchedule"}]),
                "it has topology spread constraints, which a plan does not weigh",
            ),
            (
                held_by("p", "n", 1, volumes=[{"name": "v", "persistentVolumeClaim": {"claimName": "c"}}]),
                "it has a volume, which may be bound to its node",
            ),
            (held_by("p", "n", 1, volumes=[{"name": "v", "emptyDir": {}}]), ""),
        ],
    )
    def test_what_must_stay_is_told(self, api: ApiServer, tmp_path: Path, pod: PodBuilder, why: str) -> None:
        api.create(NODES, a_node("n").with_gpus(1).as_json())
        create(api, pod)

        assert [why] == [found.stays for found in taken(api, tmp_path).pods]

    def test_instances_stay_what_they_are_and_are_no_memory(self, api: ApiServer, tmp_path: Path) -> None:
        api.create(NODES, a_node("n").with_mig().with_gpus(1).as_json())
        instance = {f"{NAMES.mig_prefix}3g.20gb": "1"}
        create(
            api,
            a_pod().named("p").with_container(instance).bound_to("n", a_grant(granted_instance("GPU-n-0"))),
            a_pod().named("w").with_container(instance),
        )
        done = command(api, tmp_path, "snapshot", "--out", str(tmp_path / "snapshot.json"))

        assert "left out: pod default/w: asks MIG instances, which no plan places" in done.output
        found = document.read(tmp_path / "snapshot.json")
        assert {"p": ()} == {pod.name: pod.containers for pod in found.pods}
        assert "it holds MIG instances, which a plan does not place" == found.pods[0].stays
        # the one that is there holds its instance, and none would be placed anew as 1 GiB of memory
        (view,) = scene(found).ledger.views()
        assert ([1], [80]) == ([gpu.pods for gpu in view.mig], [gpu.free_bytes // GIB for gpu in view.gpus])
        assert {0} == {len(job.request.containers) for job in scene(found, afresh=True).jobs}

    def test_budgets_are_read_and_two_of_one_pod_tie_it_down(self, api: ApiServer, tmp_path: Path) -> None:
        api.create(NODES, a_node("n").with_gpus(1).as_json())
        create(api, held_by("p", "n", 1), held_by("q", "n", 2))
        for name, app, allowed in (("one", "p", 1), ("two", "q", 0), ("three", "q", 5), ("none", "x", 1)):
            api.create(BUDGETS, budget(name, app, allowed), "default")
        found = taken(api, tmp_path)

        assert {"one": 1, "two": 0, "three": 5} == {one.name: one.allowed for one in found.budgets}
        assert {"p": "", "q": "two PodDisruptionBudgets"} == {pod.name: pod.stays for pod in found.pods}

    def test_twice_the_cluster_is_twice_the_work(self) -> None:
        def work(count: int) -> int:
            teams = [f"team-{n}" for n in range(count)]
            pods = [replace(held_by("p", "n", 1), namespace=team).as_json() for team in teams]
            budgets = [
                {
                    "metadata": {"name": "b", "namespace": team},
                    "spec": {"selector": {}},
                    "status": {"disruptionsAllowed": 1},
                }
                for team in teams
            ]
            objects = [[msgspec.json.encode(one) for one in kind] for kind in ([a_node("n").as_json()], pods, budgets)]
            return steps(lambda: snapshot.take(*objects, names=NAMES, unit_bytes=GIB, at=""), of=snapshot)

        assert work(60) < 2.2 * work(30)

    def test_what_cannot_be_read_costs_only_itself(self, api: ApiServer, tmp_path: Path) -> None:
        api.create(NODES, a_node("good").with_gpus(1).as_json())
        api.create(NODES, a_node("bad").annotated_as("{").as_json())
        create(api, held_by("p", "good", 1), a_pod().named("odd").asking(3).wishing(gpu_count=2))
        done = command(api, tmp_path, "snapshot", "--out", str(tmp_path / "snapshot.json"))

        assert 0 == done.exit_code
        assert "left out: pod default/odd: container main-0 asks cotenant.io/gpu-mem: 3" in done.output
        problems = {view.name: view.problem for view in scene(document.read(tmp_path / "snapshot.json")).ledger.views()}
        assert problems["good"] is None
        assert problems["bad"] is not None

    def test_a_cluster_that_does_not_answer_is_told(self, api: ApiServer, tmp_path: Path) -> None:
        api.faults.refuse(403, "pods is forbidden", path="/api/v1/pods")
        assert "Error: pods is forbidden" in command(api, tmp_path, "plan", "largest").output
        api.stop()
        done = command(api, tmp_path, "plan", "largest")

        assert 1 == done.exit_code
        assert "Error: the API server cannot be reached" in done.output


class TestApply:
    def scattered(self, api: ApiServer, **budgets: int) -> None:
        """Two GPUs that are half used, and a pod that waits for a whole one."""
        for name in ("n1", "n2"):
            api.create(NODES, a_node(name).with_gpus(1, "10GiB").as_json())
        create(api, held_by("p", "n1", 5), held_by("q", "n2", 5), a_pod().named("w").asking(10))
        for app, allowed in budgets.items():
            api.create(BUDGETS, budget(f"of-{app}", app, allowed), "default")

    def end_evicted(self, api: ApiServer) -> None:
        """Say that a pod's containers have ended, as the kubelet does, once it was evicted."""
        if api.wait_until(lambda: self.evictions(api), timeout=20):
            api.delete_pod(self.evictions(api)[0][0], grace=0)

    def evictions(self, api: ApiServer) -> list[tuple[str, int]]:
        return [(write.name, write.status) for write in api.writes if write.subresource == "eviction"]

    def test_a_dry_run_writes_nothing(self, api: ApiServer, tmp_path: Path) -> None:
        self.scattered(api)
        api.writes.clear()
        done = command(api, tmp_path, "plan", "moves", "--policy", "binpack")

        assert 0 == done.exit_code, done.output
        assert "empty GPUs                                 0               1" in done.output
        assert "nothing was done" in done.output
        assert [] == api.writes

    def test_an_owner_cannot_move_the_cursor_of_a_terminal(self, api: ApiServer, tmp_path: Path) -> None:
        for name in ("n1", "n2"):
            api.create(NODES, a_node(name).with_gpus(1, "10GiB").as_json())
        create(api, *(held_by(name, node, 5, owner="Set\x1b[2J") for name, node in (("p", "n1"), ("q", "n2"))))
        create(api, a_pod().named("w").asking(10))

        assert "(Set?[2J/r, priority 0)" in command(api, tmp_path, "plan", "moves", "--policy", "binpack").output

    def test_pods_are_evicted_once_it_is_asked_for(self, api: ApiServer, tmp_path: Path) -> None:
        self.scattered(api, p=1, q=1)
        kubelet = threading.Thread(target=self.end_evicted, args=(api,))
        kubelet.start()
        done = command(api, tmp_path, "plan", "moves", "--policy", "binpack", "--apply", "--patience", "20")
        kubelet.join()

        assert 0 == done.exit_code, done.output
        ((name, status),) = self.evictions(api)
        assert 201 == status
        assert f"move 1 of 1, default/{name}: evicted, and gone" in done.output
        # the other stays
        assert {"p", "q", "w"} - {name} == {pod["metadata"]["name"] for pod in api.pods()}

    def test_the_first_refusal_ends_it(self, api: ApiServer, tmp_path: Path) -> None:
        self.scattered(api, p=1, q=1)
        plan = command(api, tmp_path, "plan", "moves", "--policy", "binpack", "-o", "json")
        (move,) = msgspec.json.decode(plan.stdout[plan.stdout.index("{") :])["moves"]
        # allowed when it was planned, and no more when it is tried: the stand-in refuses as the API server does
        api.faults.refuse(429, "the budget does not allow it", method="POST", path=f"/pods/{move['name']}/eviction")
        done = command(api, tmp_path, "plan", "moves", "--policy", "binpack", "--apply")

        assert 1 == done.exit_code
        assert "was refused, and the moves after it were not tried: the budget does not allow it" in done.output

    def test_a_pod_that_does_not_go_ends_it(self, api: ApiServer, tmp_path: Path) -> None:
        self.scattered(api)
        for pod in api.pods():
            api.patch(
                PODS, pod["metadata"]["name"], {"spec": {"terminationGracePeriodSeconds": 30}}, namespace="default"
            )
        done = command(api, tmp_path, "plan", "moves", "--policy", "binpack", "--apply", "--patience", "0")

        assert 1 == done.exit_code
        assert "is still there after 0 s: no further one is evicted" in done.output

    def test_another_pod_of_the_same_name_is_not_evicted(self, api: ApiServer, tmp_path: Path) -> None:
        self.scattered(api)
        with connect(api.kubeconfig(tmp_path / "kubeconfig")) as live:
            with pytest.raises(Conflict, match="UID in precondition"):
                evict(live, namespace="default", name="p", uid="another")
            with pytest.raises(NotFound):
                evict(live, namespace="default", name="gone", uid="another")

        assert api.pod("p") is not None

    def test_the_stand_in_keeps_budgets_as_the_api_server_does(self, api: ApiServer, tmp_path: Path) -> None:
        self.scattered(api, p=1)
        create(api, held_by("again", "n1", 1))
        api.patch(PODS, "again", {"metadata": {"labels": {"app": "p"}}}, namespace="default")
        uids = {pod["metadata"]["name"]: pod["metadata"]["uid"] for pod in api.pods()}
        with connect(api.kubeconfig(tmp_path / "kubeconfig")) as live:
            evict(live, namespace="default", name="p", uid=uids["p"])
            with pytest.raises(TooManyRequests, match="would violate the pod's disruption budget"):
                evict(live, namespace="default", name="again", uid=uids["again"])
