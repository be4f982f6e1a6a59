"""The manifests as shipped: a real API server takes every object, and the rights they grant are enough and no more.

The pods are not run, for want of a kubelet with images; their containers' commands are, with the files that their
ConfigMaps mount, as their ServiceAccounts. Only addresses, file paths and the way to the API server are replaced.
"""

import json
import sys
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest
import yaml

from cotenant.cluster import connect
from cotenant.contract import grant as grants
from cotenant.contract import inventory as inventories
from cotenant.contract.environment import INJECTED
from cotenant.contract.names import Names
from cotenant.contract.units import GIB
from cotenant.standins.kubelet import Kubelet
from cotenant.standins.kubelet_api import ApiLink
from e2e import nodes
from e2e.cluster import ControlPlane, Scheduler
from e2e.kustomize import MANIFESTS, build
from e2e.processes import MissingProgramError, Program, find_program, free_ports, wait_until
from e2e.rest import APPLY_PATCH, Api, ApiError, Object
from extender.cluster.nominator import SAMPLED_FROM
from tests.manifests.kustomization import container, documents, mounted

NAMESPACE = "cotenant-system"
EXTENDER = "cotenant-extender"
PLUGIN = "cotenant-device-plugin"
NAMES = Names()
# Kept for the device plugin: the others hold pods whose GPUs nobody could serve.
NODE = "own-0"
NOWHERE = {"kubernetes.io/hostname": "nowhere"}
# What our programs call themselves, where they share an account with kube-scheduler.
OURS = "cotenant/"
# Reads as well, but of our accounts only.
AUDIT_POLICY = """\
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
- level: Metadata
  userGroups: [system:serviceaccounts:cotenant-system]
- level: None
"""


class Use(NamedTuple):
    """One right: used, or granted. Subresources stand in `resource`, as RBAC writes them."""

    group: str
    resource: str
    verb: str


@dataclass
class Ground:
    """A control plane with one layout applied, on which its containers are run."""

    stack: ExitStack
    cluster: ControlPlane
    layout: str
    found: list[Object]
    directory: Path
    programs: dict[str, Program] = field(default_factory=dict)

    def __post_init__(self) -> None:
        verbs, serve = free_ports(2)
        self.listen, self.serve = f"127.0.0.1:{verbs}", f"127.0.0.1:{serve}"
        self._addresses = {
            "127.0.0.1:9480": self.listen,
            "CLUSTER-IP:9480": self.listen,
            "[::]:9480": self.listen,
            "[::]:9481": self.serve,
        }

    @property
    def api(self) -> Api:
        return self.cluster.api()

    def here(self, text: str) -> str:
        """Turn the addresses of a shipped file to this machine."""
        for shipped, address in self._addresses.items():
            text = text.replace(shipped, address)
        return text

    def run(self, workload: str, name: str, *flags: str, environment: Mapping[str, str] | None = None) -> Program:
        """Run one container's command until the end of the ground."""
        one = container(self.found, workload, name)
        files = {path: self.directory / Path(path).name for path in mounted(self.found, workload, name)}
        for path, text in mounted(self.found, workload, name).items():
            files[path].write_text(self.local_config(path, text))
        words = [*one["command"], *one["args"]]
        for path, copy in files.items():
            words = [word.replace(path, str(copy)) for word in words]
        program = Program(
            [binary(words[0]), *words[1:], *flags], log=self.directory / f"{name}.log", environment=environment
        )
        self.stack.callback(program.stop)
        self.programs[name] = program
        return program

    def local_config(self, path: str, text: str) -> str:
        """Turn a configuration file to this machine; in a pod kube-scheduler finds its token by itself."""
        text = self.here(text)
        if not path.endswith("scheduler-config.yaml"):
            return text
        config = yaml.safe_load(text)
        config["clientConnection"]["kubeconfig"] = str(self.kubeconfig(EXTENDER))
        return yaml.safe_dump(config)

    def kubeconfig(self, account: str, pod: str | None = None) -> Path:
        return self.cluster.service_account_kubeconfig(account, namespace=NAMESPACE, pod=pod)

    def run_extender(self) -> None:
        (workload,) = [one["metadata"]["name"] for one in self.found if one["kind"] == "Deployment"]
        environment = {"POD_NAME": EXTENDER}
        program = self.run(workload, "extender", f"--kubeconfig={self.kubeconfig(EXTENDER)}", environment=environment)
        program.wait_ready(lambda: self.answers("/readyz"))

    def answers(self, path: str, expected: str = "") -> bool:
        """Tell whether the extender answers, and with what is expected."""
        try:
            with urllib.request.urlopen(f"http://{self.serve}{path}", timeout=10) as answer:
                return expected in answer.read().decode()
        except OSError:
            return False

    def run_scheduler(self) -> None:
        """Run kube-scheduler as the layout does: beside the extender as its account, or the cluster's own."""
        if self.layout == "attached":
            config = self.here((MANIFESTS / "attached" / "scheduler-config.yaml").read_text())
            self.stack.enter_context(self.cluster.scheduling(config))
            return
        kubeconfig = self.kubeconfig(EXTENDER)
        (port,) = free_ports(1)
        program = self.run(
            "cotenant-scheduler",
            "scheduler",
            f"--authentication-kubeconfig={kubeconfig}",
            f"--authorization-kubeconfig={kubeconfig}",
            "--bind-address=127.0.0.1",
            f"--secure-port={port}",
        )
        program.wait_ready(Scheduler(program, port, self.cluster.users["admin"].token).ready)

    def used(self, account: str, *, agent: str = "") -> tuple[set[Use], list[str]]:
        """Return the rights that an account's calls needed, and those of its calls that were refused."""
        rights: set[Use] = set()
        refused: list[str] = []
        for line in self.cluster.audit_log.read_text().splitlines():
            record = json.loads(line)
            reference = record.get("objectRef", {})
            ours = record["user"]["username"] == f"system:serviceaccount:{NAMESPACE}:{account}"
            if not ours or "resource" not in reference or agent not in record.get("userAgent", ""):
                continue
            resource = "/".join(filter(None, (reference["resource"], reference.get("subresource"))))
            rights.add(Use(reference.get("apiGroup", ""), resource, record["verb"]))
            if record.get("responseStatus", {}).get("code") == 403:
                refused.append(f"{record['verb']} {record['requestURI']}: {record['responseStatus'].get('message')}")
        return rights, refused

    def granted(self, account: str) -> set[Use]:
        """Return what roles of ours grant to an account: one of the cluster, and where it has one its namespace's."""
        bindings = [one for one in self.found if one["kind"] in {"ClusterRoleBinding", "RoleBinding"}]
        references = [one["roleRef"] for one in bindings if account in {subject["name"] for subject in one["subjects"]}]
        roles = [
            one
            for one in self.found
            if {"kind": one["kind"], "name": one["metadata"]["name"]}
            in [{"kind": ref["kind"], "name": ref["name"]} for ref in references]
        ]
        return {
            Use(group, resource, verb)
            for one in roles
            for rule in one["rules"]
            for group in rule["apiGroups"]
            for resource in rule["resources"]
            for verb in rule["verbs"]
        }

    def event(self, pod: str, reason: str) -> bool:
        """Tell whether one of our programs has said *reason* of *pod*."""
        events = self.api.list("Event", namespace="default", api_version="events.k8s.io/v1")
        return any(one["regarding"]["name"] == pod and one["reason"] == reason for one in events)


def binary(name: str) -> Path:
    return find_program(name) if name.startswith("kube-") else Path(sys.executable).with_name(name)


def apply_strictly(api: Api, one: Object, *, dry_run: bool = False) -> None:
    """Apply an object as `kubectl apply --server-side` does, which refuses fields that the API server does not know."""
    metadata = one["metadata"]
    path = api.resource(one["kind"], one["apiVersion"]).path(metadata.get("namespace"), metadata["name"])
    query = {"fieldManager": "cotenant", "force": "true", "fieldValidation": "Strict"}
    api.call("PATCH", path, one, query=query | ({"dryRun": "All"} if dry_run else {}), content=APPLY_PATCH)


@pytest.fixture(scope="module", params=["second-scheduler", "attached"])
def ground(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    """A layout applied, its extender and its kube-scheduler running, and nodes of two GPUs of 80 or 10 GiB."""
    directory = tmp_path_factory.mktemp(request.param)
    policy = directory / "audit-policy.yaml"
    policy.write_text(AUDIT_POLICY)
    found = list(build(MANIFESTS / request.param))
    with ExitStack() as stack:
        try:
            cluster = stack.enter_context(
                ControlPlane(directory / "control-plane", api_server_flags=[f"--audit-policy-file={policy}"])
            )
        except MissingProgramError as missing:
            pytest.skip(str(missing))
        for one in found:
            apply_strictly(cluster.api(), one)
        ground = Ground(stack, cluster, request.param, found, directory)
        nodes.register(cluster.api(), 3, nodes.Shape(gpus=2, gpu_bytes=80 * GIB), prefix="lab")
        nodes.register(cluster.api(), 1, nodes.Shape(gpus=2, gpu_bytes=10 * GIB), prefix="small")
        # As many as kube-scheduler samples where it samples, tainted so that they stay empty.
        for n in range(SAMPLED_FROM):
            node = nodes.node(f"crowd-{n}", nodes.Shape(gpus=2, gpu_bytes=10 * GIB), prefix="crowd")
            cluster.api().create(node | {"spec": {"taints": [{"key": "crowd", "effect": "NoSchedule"}]}})
        nodes.register(cluster.api(), 1, nodes.Shape(gpus=0), prefix="own")
        assert wait_until(lambda: readies_pods(ground), timeout_s=60), "admission did not take effect"
        if request.param == "attached":  # what it labels while it binds
            cluster.api().create(plain(EXTENDER, namespace=NAMESPACE, nodeName="nowhere"))
        ground.run_extender()
        ground.run_scheduler()
        assert wait_until(lambda: ground.answers("/metrics", "cotenant_writer 1.0"), timeout_s=60)
        yield ground


def readies_pods(ground: Ground) -> bool:
    """Whether the API server has begun to follow the policies, a moment after it stored them."""
    created = ground.api.call("POST", "/api/v1/namespaces/default/pods", asking("probe", 1), query={"dryRun": "All"})
    try:
        ground.api.create(asking("forged", 1, annotations={NAMES.grant: "x"}))
    except ApiError:
        return "env" in created["spec"]["containers"][0]
    ground.api.delete("Pod", "forged", grace_s=0)
    return False


def plain(
    name: str, *, namespace: str = "default", annotations: Mapping[str, str] | None = None, **spec: Any
) -> Object:
    """A pod that asks nothing of ours."""
    metadata = {"name": name, "namespace": namespace, "annotations": dict(annotations or {})}
    spec = {"containers": [{"name": "main", "image": "x"}], **spec}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def asking(name: str, units: int, *, annotations: Mapping[str, str] | None = None, **spec: Any) -> Object:
    """A pod that asks for GPU memory."""
    pod = plain(name, annotations=annotations, **spec)
    pod["spec"]["containers"][0]["resources"] = {"limits": {NAMES.gpu_mem: units}}
    return pod


def post(url: str, body: object) -> Object:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        decoded: Object = json.load(answer)
    return decoded


class TestObjects:
    """What `kubectl apply` sends is what the API server knows."""

    def test_the_other_admission_and_the_example_are_accepted_too(self, ground: Ground) -> None:
        (example,) = documents(MANIFESTS / "examples" / "pod.yaml")
        example["metadata"]["namespace"] = "default"
        for one in [*build(MANIFESTS / "admission" / "webhook"), example]:
            apply_strictly(ground.api, one, dry_run=True)

    def test_a_misspelt_field_would_have_been_noticed(self, ground: Ground) -> None:
        (daemon_set,) = [one for one in ground.found if one["kind"] == "DaemonSet"]
        misspelt = daemon_set | {"spec": daemon_set["spec"] | {"updateStrategie": {}}}
        with pytest.raises(ApiError, match="updateStrategie"):
            apply_strictly(ground.api, misspelt, dry_run=True)


@pytest.mark.parametrize("version", ["1.33", "1.34", "1.35"])
def test_an_api_server_that_goes_by_an_older_version_takes_the_layout_with_the_webhook(
    tmp_path: Path, version: str
) -> None:
    # older ones it does not emulate
    try:
        ground = ControlPlane(tmp_path, api_server_flags=[f"--emulated-version={version}"])
        ground.start()
    except MissingProgramError as missing:
        pytest.skip(str(missing))
    try:
        for one in build(MANIFESTS / "webhook"):
            apply_strictly(ground.api(), one)
        ground.api().create({"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}})
        annotated = {"metadata": {"annotations": {NAMES.inventory: "{}"}}}
        plugin = Api.from_kubeconfig(ground.service_account_kubeconfig(PLUGIN, namespace=NAMESPACE))

        def refused() -> bool:
            try:
                plugin.patch("Node", NODE, annotated)
            except ApiError as error:
                return "may not write to node" in error.message
            return False

        # an expression that this version did not know would say something else
        assert wait_until(refused, timeout_s=30)
    finally:
        ground.stop()


class TestPlacing:
    """The shipped configuration places the example, and packs."""

    def test_copies_of_the_example_fill_gpus_one_after_the_other(self, ground: Ground) -> None:
        (example,) = documents(MANIFESTS / "examples" / "pod.yaml")
        # A Service over them is what makes kube-scheduler spread pods that name no constraint of their own.
        service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "example"}}
        ground.api.create(service | {"spec": {"selector": {"app": "example"}, "ports": [{"port": 80}]}})
        placed = []
        for n in range(9):
            ground.api.create(example | {"metadata": {"name": f"example-{n}", "labels": {"app": "example"}}})
            # one by one: kube-scheduler scores the next pod while the last one's bind is still under way
            placed.append(ground.api.bound(f"example-{n}"))

        where = Counter(
            (pod["spec"]["nodeName"], share.uuid)
            for pod in placed
            for share in grants.decode(pod["metadata"]["annotations"][NAMES.grant]).containers[0].gpus
        )
        print(f"\n{ground.layout}: {sorted(where.values())} on {sorted({node for node, _ in where})}")
        assert {*INJECTED} <= {variable["name"] for variable in placed[0]["spec"]["containers"][0]["env"]}
        # 8 of 10 units fit once on each GPU of small-0, and least is left there; the other 7 x 8 = 56 on one of 80.
        assert [1, 1, 7] == sorted(where.values())

    def test_who_serves_says_so(self, ground: Ground) -> None:
        for path in ("healthz", "readyz", "metrics"):
            with urllib.request.urlopen(f"http://{ground.serve}/{path}", timeout=10) as answer:
                assert 200 == answer.status


class TestExtendersRights:
    """The extender's ServiceAccount may do what it does, and does what it may."""

    def test_all_that_it_does_is_granted_and_all_that_is_granted_is_used(self, ground: Ground) -> None:
        ground.api.create(asking("simple", 8))
        ground.api.bound("simple")
        # Nodes of the crowd have 20 units but no GPU of 15, so it nominates one that has. In vain, as only
        # kube-scheduler knows, which takes the nomination away again at once: the audit log tells of it.
        tolerations = [{"key": "crowd", "operator": "Exists"}]
        ground.api.create(asking("elsewhere", 15, nodeSelector={nodes.LABEL: "crowd"}, tolerations=tolerations))
        # A pod that somebody else binds goes around the extender, which says so.
        ground.api.create(asking("around", 1, nodeSelector=NOWHERE))
        ground.api.bind("around", "lab-1")
        assert wait_until(lambda: ground.event("around", "NoGrant"), timeout_s=30)
        # It follows the pods that are ours; asked to bind another one, it reads it.
        other = ground.api.create(plain("other", schedulerName="nobody"))
        args = {"PodName": "other", "PodNamespace": "default", "PodUID": other["metadata"]["uid"], "Node": "lab-2"}
        assert {"Error": ""} == post(f"http://{ground.listen}/bind", args)

        # Victims that free no GPU make it look for others, and at disruption budgets.
        vip = asking("vip", 15, priority=1000)
        vip["metadata"]["uid"] = "vip"
        asked = {"Pod": vip, "NodeNameToMetaVictims": {"crowd-0": {"Pods": [{"UID": "nobody"}]}}}
        assert {"NodeNameToMetaVictims": {}} == post(f"http://{ground.listen}/preempt", asked)

        nominated = Use("", "pods/status", "patch")
        assert wait_until(lambda: nominated in ground.used(EXTENDER, agent=OURS)[0], timeout_s=30)

        # One that starts beside a kube-scheduler that leads begins a new term.
        ground.programs["extender"].kill()
        ground.run_extender()
        assert wait_until(lambda: ground.answers("/metrics", "cotenant_writer 1.0"), timeout_s=30)

        # In the second-scheduler layout the account is kube-scheduler's as well, and the Lease that it holds is in it.
        schedulers = {
            use for use in ground.used(EXTENDER, agent="kube-scheduler")[0] if use.resource == "leases"
        } & ground.granted(EXTENDER)
        wait_until(lambda: ground.granted(EXTENDER) - schedulers <= ground.used(EXTENDER, agent=OURS)[0], timeout_s=30)
        used, _ = ground.used(EXTENDER, agent=OURS)
        _, refused = ground.used(EXTENDER)
        assert ground.granted(EXTENDER) == used | schedulers
        assert [] == refused

    @pytest.mark.parametrize(
        ("what", "change"),
        [
            ("an image", {"spec": {"containers": [{"name": "main", "image": "other"}]}}),
            ("an annotation", {"metadata": {"annotations": {"other": "x"}}}),
            ("a label", {"metadata": {"labels": {"other": "x"}}}),
            ("a finalizer", {"metadata": {"finalizers": ["example.io/other"]}}),
        ],
    )
    def test_of_the_pods_beside_it_it_writes_the_writers_label_and_nothing_else(
        self, ground: Ground, what: str, change: Object
    ) -> None:
        name = what.replace(" ", "-")
        ground.api.create(plain(name, namespace=NAMESPACE, nodeName="nowhere"))
        with pytest.raises(ApiError, match="cannot patch" if ground.layout == "second-scheduler" else "nothing else"):
            Api.from_kubeconfig(ground.kubeconfig(EXTENDER)).patch("Pod", name, change, namespace=NAMESPACE)
        assert "other" not in json.dumps(ground.api.get("Pod", name, namespace=NAMESPACE))

    def test_it_may_evict_only_where_that_is_applied(self, ground: Ground) -> None:
        assert not may(ground, EXTENDER, "create", "pods/eviction")
        for one in build(MANIFESTS / "eviction"):
            apply_strictly(ground.api, one)
        assert wait_until(lambda: may(ground, EXTENDER, "create", "pods/eviction"), timeout_s=10)

    def test_kube_scheduler_leads_by_the_lease_that_its_configuration_names(self, ground: Ground) -> None:
        election = yaml.safe_load((MANIFESTS / ground.layout / "scheduler-config.yaml").read_text())["leaderElection"]
        name, namespace = (
            election.get("resourceName", "kube-scheduler"),
            election.get("resourceNamespace", "kube-system"),
        )
        lease = ground.api.get("Lease", name, namespace=namespace, api_version="coordination.k8s.io/v1")
        assert lease["spec"]["holderIdentity"]


@pytest.fixture(scope="module")
def kubeconfig(ground: Ground) -> Path:
    """The credentials of the plugin's pod on its node."""
    ground.api.create(plain("plugin", namespace=NAMESPACE, serviceAccountName=PLUGIN, nodeName=NODE))
    return ground.kubeconfig(PLUGIN, pod="plugin")


class TestPluginsRights:
    """The device plugin's ServiceAccount may do what it does, does what it may, and only on its node."""

    @pytest.mark.parametrize(
        ("what", "change"),
        [
            ("another annotation", {"metadata": {"annotations": {"other": "x"}}}),
            ("a cordon", {"metadata": {"annotations": {NAMES.gpu_cordon: "other"}}}),
            ("a label", {"metadata": {"labels": {"other": "x"}}}),
            ("a taint", {"spec": {"taints": [{"key": "other", "effect": "NoSchedule"}]}}),
            ("cordoning", {"spec": {"unschedulable": True}}),
            ("a finalizer", {"metadata": {"finalizers": ["example.io/other"]}}),
        ],
    )
    def test_it_writes_nothing_but_its_own_notes(
        self, ground: Ground, kubeconfig: Path, what: str, change: Object
    ) -> None:
        del what
        with pytest.raises(ApiError, match=r"of its node and nothing else"):
            Api.from_kubeconfig(kubeconfig).patch("Node", NODE, change)
        assert "other" not in json.dumps(ground.api.get("Node", NODE))

    def test_it_writes_all_its_notes(self, kubeconfig: Path) -> None:
        for value in ("x", None):
            annotations = dict.fromkeys((NAMES.gpu_faults, NAMES.overusers, NAMES.used), value)
            change = {"metadata": {"annotations": annotations, "labels": {NAMES.vgpu_licensed: value}}}
            Api.from_kubeconfig(kubeconfig).patch("Node", NODE, change)

    def test_it_writes_the_inventory_of_no_other_node(self, ground: Ground, kubeconfig: Path) -> None:
        before = ground.api.get("Node", "lab-1")["metadata"]["annotations"]
        change = {"metadata": {"annotations": {NAMES.inventory: "x"}}}
        with pytest.raises(ApiError, match=f"of node '{NODE}' may not write to node lab-1"):
            Api.from_kubeconfig(kubeconfig).patch("Node", "lab-1", change)
        assert before == ground.api.get("Node", "lab-1")["metadata"]["annotations"]

    def test_its_account_without_a_node_writes_nowhere(self, ground: Ground) -> None:
        change = {"metadata": {"annotations": {NAMES.inventory: "x"}}}
        with pytest.raises(ApiError, match="of node '' may not write"):
            Api.from_kubeconfig(ground.kubeconfig(PLUGIN)).patch("Node", NODE, change)

    def test_others_write_to_nodes_as_before(self, ground: Ground) -> None:
        ground.api.patch("Node", "lab-1", {"metadata": {"labels": {"pool": "gpu"}}})
        assert "gpu" == ground.api.get("Node", "lab-1")["metadata"]["labels"]["pool"]

    @pytest.mark.parametrize(
        ("verb", "resource"),
        [
            ("create", "pods/binding"),
            ("create", "bindings"),
            ("create", "pods"),
            ("patch", "pods"),
            ("patch", "pods/status"),
            ("delete", "pods"),
            ("create", "pods/exec"),
            ("update", "nodes"),
            ("patch", "nodes/status"),
            ("get", "secrets"),
            ("get", "configmaps"),
            ("create", "serviceaccounts/token"),
        ],
    )
    def test_it_may_not(self, ground: Ground, verb: str, resource: str) -> None:
        assert not may(ground, PLUGIN, verb, resource)

    def test_it_may_what_it_was_granted(self, ground: Ground) -> None:
        assert may(ground, PLUGIN, "patch", "nodes")

    def test_all_that_it_does_is_granted_and_all_that_is_granted_is_used(
        self, ground: Ground, kubeconfig: Path, tmp_path: Path
    ) -> None:
        gpus = tmp_path / "gpus.yaml"
        gpus.write_text("gpus: [{model: NVIDIA A100-SXM4-80GB, memory: 80GiB, count: 2}]\n")
        with ExitStack() as stack:
            # not tmp_path: the paths of sockets have to be short
            folder = Path(stack.enter_context(TemporaryDirectory()))
            admin = stack.enter_context(connect(str(ground.cluster.kubeconfig())))
            link = ApiLink(admin, NODE, delete=lambda _, name: ground.api.delete("Pod", name, grace_s=0))
            kubelet = stack.enter_context(Kubelet(NODE, folder, reporter=link))
            link.start(kubelet)
            stack.callback(link.stop)
            plugin = ground.run(
                PLUGIN,
                "device-plugin",
                f"--kubeconfig={kubeconfig}",
                f"--kubelet-dir={folder}",
                f"--fake-gpus={gpus}",
                environment={"NODE_NAME": NODE},
            )
            stack.callback(plugin.stop)
            plugin.wait_ready(lambda: f"{PLUGIN} ready" in plugin.log.read_text())
            ground.api.wait("Node", NODE, serves(gpus=2), saying="the inventory", timeout_s=30)
            # A pod that was bound without a grant is refused, and an Event says so.
            ground.api.create(asking("lost", 1, nodeSelector=NOWHERE))
            ground.api.bind("lost", NODE)
            assert wait_until(lambda: ground.event("lost", "NoGrant"), timeout_s=30), plugin.tail()
            wait_until(lambda: ground.granted(PLUGIN) <= ground.used(PLUGIN, agent=OURS)[0], timeout_s=10)
        used, refused = ground.used(PLUGIN, agent=OURS)
        assert ground.granted(PLUGIN) == used
        assert [] == refused


class TestRequestPriority:
    """Which of the API server's priority levels our requests are in, as it says with each answer."""

    LEASES = f"/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases/x"
    PODS = "/api/v1/pods?limit=1"

    @pytest.mark.parametrize(
        ("account", "path", "schema", "level"),
        [
            (EXTENDER, LEASES, "cotenant-leases", "leader-election"),
            (EXTENDER, PODS, "cotenant-extender", "workload-high"),
            (PLUGIN, PODS, "cotenant-device-plugin", "workload-high"),
            # what ours would have without
            ("stranger", LEASES, "service-accounts", "workload-low"),
        ],
    )
    def test_ours_are_where_kube_scheduler_s_are_and_no_one_else_s(
        self, ground: Ground, account: str, path: str, schema: str, level: str
    ) -> None:
        metadata = {"name": "stranger", "namespace": NAMESPACE}
        ground.api.apply_object({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata})
        caller = Api.from_kubeconfig(ground.kubeconfig(account))
        flow = "/apis/flowcontrol.apiserver.k8s.io/v1"
        expected = [
            ground.api.call("GET", f"{flow}/{kind}/{name}")["metadata"]["uid"]
            for kind, name in (("flowschemas", schema), ("prioritylevelconfigurations", level))
        ]

        # it learns of a FlowSchema by a watch
        assert wait_until(lambda: flow_of(caller, path) == expected, timeout_s=30)


def flow_of(caller: Api, path: str) -> list[str | None]:
    """Ask something, whatever the answer, and give the UIDs of the FlowSchema and priority level it was under."""
    connection = caller._connect(30)
    connection.request("GET", path, headers={"Authorization": f"Bearer {caller.token}"})
    answer = connection.getresponse()
    found = [answer.headers[f"X-Kubernetes-PF-{kind}-UID"] for kind in ("FlowSchema", "PriorityLevel")]
    connection.close()
    return found


def serves(*, gpus: int) -> Callable[[Object | None], bool]:
    def check(node: Object | None) -> bool:
        text = (node or {"metadata": {}})["metadata"].get("annotations", {}).get(NAMES.inventory)
        return bool(text) and len(inventories.decode(text).gpus) == gpus and inventories.decode(text).serving

    return check


def may(ground: Ground, account: str, verb: str, resource: str) -> bool:
    """Ask the API server whether an account may do something, of the core group, in some namespace."""
    name, _, subresource = resource.partition("/")
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SubjectAccessReview",
        "spec": {
            "user": f"system:serviceaccount:{NAMESPACE}:{account}",
            "groups": ["system:serviceaccounts", f"system:serviceaccounts:{NAMESPACE}", "system:authenticated"],
            "resourceAttributes": {
                "verb": verb,
                "resource": name,
                "subresource": subresource,
                "namespace": "default",
            },
        },
    }
    path = "/apis/authorization.k8s.io/v1/subjectaccessreviews"
    return bool(ground.api.call("POST", path, review)["status"]["allowed"])
