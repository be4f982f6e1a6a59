"""What the installation page says, done on a whole cluster: our image, the shipped objects, nothing else."""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import yaml

from cotenant.contract import grant as grants
from cotenant.contract.names import Names
from cotenant.contract.units import GIB
from e2e import dockerfile, image
from e2e.kustomize import MANIFESTS, build
from e2e.node import why_not
from e2e.processes import MissingProgramError, find_program
from e2e.rest import Object
from everyday.cluster import WholeCluster, forwarded, write_scheduler_image
from tests.docs.markdown import DOCS, blocks, section, tables

CHART = MANIFESTS.parent / "charts" / "cotenant"
NAMESPACE = "cotenant-system"
NAMES = Names()
# What comes and goes by itself.
FLEETING = {"events", "events.events.k8s.io", "leases.coordination.k8s.io", "componentstatuses"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WholeCluster]:
    """A whole cluster whose node has our image, built by our Dockerfile, and kube-scheduler's."""
    if reason := why_not():
        pytest.skip(reason)
    directory = tmp_path_factory.mktemp("whole")
    (name,) = {
        container["image"]
        for one in build(MANIFESTS / "second-scheduler")
        if one["kind"] == "Deployment"
        for container in one["spec"]["template"]["spec"]["containers"]
    }
    ours, scheduler = directory / "cotenant.tar", directory / "kube-scheduler.tar"
    try:
        for program in ("kube-controller-manager", "kubectl", "helm", "ptp", "ip"):
            find_program(program)
        dockerfile.build(ours)
        write_scheduler_image(scheduler, tag=name)
        with WholeCluster(directory, images=[ours, scheduler]) as started:
            yield started
    except MissingProgramError as missing:
        pytest.skip(str(missing))


@dataclass(frozen=True)
class Way:
    """One way to install, and to remove again."""

    name: str
    install: tuple[str, ...]
    remove: tuple[tuple[str, ...], ...]


def by_kustomize(cluster: WholeCluster) -> Way:
    """Apply a kustomization of one's own on top of ours, as the page advises, for what is special here."""
    folder = cluster.directory / "own"
    folder.mkdir(exist_ok=True)
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [os.path.relpath(MANIFESTS / "dev-fake-gpus", folder)],
        "patches": [
            {
                "target": {"kind": "DaemonSet", "name": "cotenant-device-plugin"},
                "patch": yaml.safe_dump(
                    [
                        {
                            "op": "replace",
                            "path": "/spec/template/spec/volumes/1/hostPath/path",
                            "value": str(cluster.node.pod_resources_socket.parent),
                        }
                    ]
                ),
            }
        ],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return Way(
        "kustomize", ("kubectl", "apply", "-k", str(folder)), (("kubectl", "delete", "--wait", "-k", str(folder)),)
    )


def by_helm(cluster: WholeCluster) -> Way:
    """Install the chart with values for made-up GPUs."""
    values = cluster.directory / "values.yaml"
    gpus = yaml.safe_load((MANIFESTS / "dev-fake-gpus" / "fake-gpus.yaml").read_text())
    values.write_text(
        yaml.safe_dump(
            {"devicePlugin": {"fakeGPUs": gpus, "kubeletRoot": str(cluster.node.kubelet_directory)}},
        )
    )
    install = ("helm", "install", "cotenant", str(CHART), "-n", NAMESPACE, "--create-namespace", "-f", str(values))
    return Way(
        "helm",
        install,
        (
            ("helm", "uninstall", "cotenant", "-n", NAMESPACE, "--wait"),
            ("kubectl", "delete", "namespace", NAMESPACE, "--wait"),
        ),
    )


@pytest.mark.parametrize("way", [by_kustomize, by_helm])
def test_a_newcomer_installs_shares_a_gpu_asks_why_and_removes_it_all(cluster: WholeCluster, way: object) -> None:
    assert callable(way)
    chosen: Way = way(cluster)
    if chosen.name == "helm":
        # Kubernetes never again follows the Leases that a policy compares with once no policy did for a second
        # (docs/troubleshooting.md), so whoever installs a second time has to do this as well.
        cluster.control_plane.restart_api_server()
    before = everything(cluster)

    print(cluster.run(*chosen.install))
    cluster.run("kubectl", "label", "node", cluster.node.name, f"{NAMES.domain}/device-plugin=true")
    for workload in ("deployment/cotenant-scheduler", "daemonset/cotenant-device-plugin"):
        with explained(cluster):
            cluster.run("kubectl", "-n", NAMESPACE, "rollout", "status", workload, "--timeout=150s")

    # the first shared pods: two on one GPU, and one that is larger than any
    for name, units in (("one", 6), ("two", 6), ("large", 100)):
        cluster.api().create(a_pod(name, units))
    with explained(cluster):
        shared = [cluster.api().wait("Pod", name, runs, saying="its start", timeout_s=60) for name in ("one", "two")]
    uuids = set()
    for pod in shared:
        (container,) = grants.decode(pod["metadata"]["annotations"][NAMES.grant]).containers
        environment = cluster.node.environment(pod)
        assert container.gpus[0].uuid == environment["NVIDIA_VISIBLE_DEVICES"]
        assert "0=6144M" == environment["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"]
        assert str(6 * GIB) == environment["COTENANT_GPU_MEM_BYTES"]
        uuids.add(container.gpus[0].uuid)
    assert 1 == len(uuids)

    # why is it pending?
    told = cluster.run("kubectl", "gpumem", "explain", "large")
    print(told)
    assert "default/large asks 100 GiB: waiting, fits on none of 1 GPU nodes" in told
    assert told == cluster.run("cotenant", "explain", "large")
    assert re.search(r"default +one +bound +real-0", cluster.run("kubectl", "gpumem", "pods", "-A"))
    assert {"made-up-gpus"} == doctored(cluster)
    if chosen.name == "kustomize":
        cluster.run("kubectl", "delete", "validatingadmissionpolicybinding", "cotenant-grants")
        cluster.run("kubectl", "label", "node", cluster.node.name, f"{NAMES.domain}/device-plugin-")
        assert {"made-up-gpus", "admission-missing", "label-without-plugin"} <= doctored(cluster)
        cluster.run(*chosen.install)
        cluster.run("kubectl", "label", "node", cluster.node.name, f"{NAMES.domain}/device-plugin=true")
        cluster.run(
            "kubectl", "-n", NAMESPACE, "rollout", "status", "daemonset/cotenant-device-plugin", "--timeout=90s"
        )
        moves_in(cluster)
        assert set(re.findall(r"^# HELP (\S+)", scraped(cluster), re.MULTILINE)) == named_in_the_page()
    if chosen.name == "helm":
        with service_reached(cluster):
            print(cluster.run("helm", "test", "cotenant", "-n", NAMESPACE, "--timeout=90s"))

    cluster.run("kubectl", "delete", "pod", "--all", "--wait")
    for command in chosen.remove:
        cluster.run(*command)
    cluster.run("kubectl", "label", "node", "--all", f"{NAMES.domain}/device-plugin-")
    cluster.run("kubectl", "annotate", "node", "--all", f"{NAMES.inventory}-")
    assert before == everything(cluster)
    node = cluster.api().get("Node", cluster.node.name)["metadata"]
    assert [] == [key for key in (*node["annotations"], *node["labels"]) if NAMES.domain in key]


def moves_in(cluster: WholeCluster) -> None:
    """Run the pods of the pages for gpushare and HAMi: gpushare's as it was, and both as they are migrated."""
    for page in ("gpushare", "hami"):
        before, _ = blocks((DOCS / "moving-in" / f"{page}.md").read_text(), "yaml")
        file = cluster.directory / f"{page}.yaml"
        file.write_text(before)
        ours = list(yaml.safe_load_all(cluster.run("cotenant", "migrate", str(file))))
        theirs = [yaml.safe_load(before)] if page == "gpushare" else []
        for n, pod in enumerate((*ours, *theirs)):
            # on a node that is still theirs the label would be there
            pod["spec"].pop("nodeSelector", None)
            pod["metadata"] |= {"name": f"{page}-{n}", "namespace": "default"}
            cluster.api().create(pod)
            bound = cluster.api().wait(
                "Pod", f"{page}-{n}", lambda seen: bool(seen and "nodeName" in seen["spec"]), saying="its binding"
            )
            (container,) = grants.decode(bound["metadata"]["annotations"][NAMES.grant]).containers
            assert 3 * GIB == sum(share.bytes for share in container.gpus)


def scraped(cluster: WholeCluster) -> str:
    """Scrape the extender as it runs, through the API server's proxy."""
    path = f"/api/v1/namespaces/{NAMESPACE}/services/http:cotenant-extender:serve/proxy/metrics"
    return cluster.run("kubectl", "get", "--raw", path)


def named_in_the_page() -> set[str]:
    """Name what docs/metrics.md lists of the extender."""
    (rows,) = tables(section("metrics.md", "Metrics of the extender"))
    return {row[0] for row in rows}


def doctored(cluster: WholeCluster) -> set[str]:
    """Name what the doctor finds."""
    findings = json.loads(cluster.run("cotenant", "doctor", "-o", "json", check=False))
    print(*(f"{one['check']}: {one['what']}" for one in findings), sep="\n")
    return {one["check"] for one in findings}


def a_pod(name: str, units: int) -> Object:
    """Write a pod as a newcomer does."""
    container = {"name": "main", "image": image.BUSYBOX, "command": ["sleep", "1000000"]}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {
            "terminationGracePeriodSeconds": 0,
            "containers": [container | {"resources": {"limits": {NAMES.gpu_mem: units}}}],
        },
    }


def runs(pod: Object | None) -> bool:
    return pod is not None and pod["status"].get("phase") == "Running"


def everything(cluster: WholeCluster) -> set[str]:
    """Name every object of the cluster but those that come and go by themselves."""
    kinds = set(cluster.run("kubectl", "api-resources", "--verbs=list", "-o", "name").split()) - FLEETING
    columns = "-o=custom-columns=K:.kind,S:.metadata.namespace,N:.metadata.name"
    listed = cluster.run("kubectl", "get", "--all-namespaces", columns, "--no-headers", ",".join(sorted(kinds)))
    return set(listed.splitlines())


@contextlib.contextmanager
def explained(cluster: WholeCluster) -> Iterator[None]:
    """Print what the pods say where something in it fails."""
    try:
        yield
    except (AssertionError, TimeoutError):
        print(cluster.run("kubectl", "-n", NAMESPACE, "describe", "pods", check=False))
        for pod in cluster.api().list("Pod", namespace=NAMESPACE):
            for one in (*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]):
                print(one["name"], cluster.node.logs(pod, one["name"])[-3000:])
        raise


@contextlib.contextmanager
def service_reached(cluster: WholeCluster) -> Iterator[None]:
    """Be kube-proxy for the extender's Service."""
    service = cluster.api().get("Service", "cotenant-extender", namespace=NAMESPACE)
    # of two replicas either one may be asked
    pod, *_ = [
        one
        for one in cluster.api().list("Pod", namespace=NAMESPACE, labels="app.kubernetes.io/component=scheduler")
        if runs(one)
    ]
    with forwarded((service["spec"]["clusterIP"], 9481), (pod["status"]["podIP"], 9481)):
        yield
