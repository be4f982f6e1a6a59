"""What the installation page says, done on a whole cluster: our image, the shipped objects, nothing else."""

import contextlib
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest
import yaml

from cotenant.contract import grant as grants
from cotenant.contract.names import Names
from cotenant.contract.units import GIB
from e2e import dockerfile, image
from e2e.kustomize import MANIFESTS, build
from e2e.node import why_not
from e2e.processes import MissingProgramError, find_program, wait_until
from e2e.rest import Object
from everyday import modes, moving
from everyday.cluster import WholeCluster, forwarded, write_scheduler_image
from tests.docs.markdown import blocks, section, tables

CHART = MANIFESTS.parent / "charts" / "cotenant"
NAMESPACE = "cotenant-system"
NAMES = Names()
# Also what CI has no time for: the webhook, by kustomize and by a Helm upgrade.
WHOLE = bool(os.environ.get("COTENANT_WHOLE"))
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
        with WholeCluster(directory, images=[ours, scheduler], schedulers=moving.SCHEDULERS) as started:
            yield started
    except MissingProgramError as missing:
        pytest.skip(str(missing))


@dataclass(frozen=True)
class Way:
    """One way to install, and to remove again."""

    name: str
    install: tuple[tuple[str, ...], ...]
    remove: tuple[tuple[str, ...], ...]
    webhook: bool = False

    @property
    def service(self) -> str:
        """Name the extender's Service, as it is reached through the API server's proxy."""
        return f"{NAMESPACE}/{'https' if self.webhook else 'http'}:cotenant-extender:serve"


def by_kustomize(cluster: WholeCluster) -> Way:
    """Apply the layout with made-up GPUs."""
    folder = kustomization(cluster, "own", "dev-fake-gpus")
    return Way("kustomize", (("kubectl", "apply", "-k", folder),), (("kubectl", "delete", "--wait", "-k", folder),))


def by_kustomize_with_the_webhook(cluster: WholeCluster) -> Way:
    """Do what the page says for clusters before Kubernetes 1.36, on this one."""
    folder = kustomization(cluster, "own-webhook", "webhook", fake_gpus=True)
    text = section("install.md", "Before Kubernetes 1.36")
    (commands,) = blocks(text, "sh")
    commands = commands.replace("manifests/webhook", folder).replace("manifests/", f"{MANIFESTS}/")
    script = f"set -e; cd {cluster.directory}; {commands}"
    return Way("webhook", (("sh", "-c", script),), (("kubectl", "delete", "--wait", "-k", folder),), webhook=True)


def kustomization(
    cluster: WholeCluster, name: str, layout: str, *, fake_gpus: bool = False, configuration: Object | None = None
) -> str:
    """Write a kustomization of one's own on top of a layout, as the page advises, for what is special here."""
    folder = cluster.directory / name
    folder.mkdir(exist_ok=True)
    pod, file = "/spec/template/spec", "fake-gpus.yaml"
    shutil.copy(MANIFESTS / "dev-fake-gpus" / file, folder / file)
    generator = {
        "name": "cotenant-device-plugin-config",
        "namespace": NAMESPACE,
        "behavior": "merge",
        "files": [file],
    }
    if configuration:
        (folder / "device-plugin-config.yaml").write_text(yaml.safe_dump(configuration))
        generator["files"] = [file, "device-plugin-config.yaml"]
    written = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [os.path.relpath(MANIFESTS / layout, folder)],
        "components": [os.path.relpath(MANIFESTS / "components" / "fake-gpus", folder)] if fake_gpus else [],
        "configMapGenerator": [generator] if fake_gpus else [],
        "patches": [
            {
                "target": {"kind": "DaemonSet", "name": "cotenant-device-plugin"},
                "patch": yaml.safe_dump(
                    [
                        {
                            "op": "replace",
                            "path": f"{pod}/volumes/1/hostPath/path",
                            "value": str(cluster.node.pod_resources_socket.parent),
                        },
                    ]
                ),
            }
        ],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(written))
    return str(folder)


def by_helm(cluster: WholeCluster) -> Way:
    """Install the chart as the page does on kind, with made-up GPUs."""
    (block,) = blocks(section("install.md", "Trying it on kind"), "sh")
    (line,) = (line for line in block.splitlines() if line.startswith("helm install "))
    words = [str(CHART) if word == "charts/cotenant" else word for word in shlex.split(line)]
    install = (*words, "--set", f"devicePlugin.kubeletRoot={cluster.node.kubelet_directory}")
    return Way(
        "helm",
        (install,),
        (
            ("helm", "uninstall", "cotenant", "-n", NAMESPACE, "--wait"),
            ("kubectl", "delete", "namespace", NAMESPACE, "--wait"),
        ),
    )


@pytest.mark.parametrize("page", moving.PAGES)
def test_an_example_of_another_system_is_one(cluster: WholeCluster, page: str) -> None:
    moving.as_it_was(cluster, page)


@pytest.mark.parametrize("way", [by_kustomize, by_helm, by_kustomize_with_the_webhook])
def test_a_newcomer_installs_shares_a_gpu_asks_why_and_removes_it_all(
    cluster: WholeCluster, way: Callable[[WholeCluster], Way]
) -> None:
    chosen = way(cluster)
    if chosen.webhook and not WHOLE:
        pytest.skip("installing with the webhook takes minutes more: make everyday WHOLE=1")
    if not (WHOLE or chosen.name == "kustomize"):
        cluster.control_plane.restart_api_server()  # see another_lease
    before = everything(cluster)
    with ExitStack() as stack:
        install(cluster, chosen)
        if chosen.webhook:
            stack.enter_context(service_reached(cluster, 443))
        if WHOLE and chosen.name != "kustomize":
            another_lease(cluster, chosen)
        asks_why(cluster, chosen)
        if chosen.name == "kustomize":
            breaks_and_mends(cluster, chosen)
            for page in moving.PAGES:
                moving.as_it_becomes(cluster, page)
            moving.unchanged(cluster)
            assert set(re.findall(r"^# HELP (\S+)", scraped(cluster), re.MULTILINE)) == named_in_the_page()
            changes_modes(cluster)
        if chosen.name == "helm":
            with service_reached(cluster, 9481):
                print(cluster.run("helm", "test", "cotenant", "-n", NAMESPACE, "--timeout=240s"))
            if WHOLE:
                becomes_a_webhook(cluster, chosen)
        cluster.run("kubectl", "delete", "pod", "--all", "--wait")
    for command in chosen.remove:
        cluster.run(*command)
    cluster.run("kubectl", "label", "node", "--all", f"{NAMES.domain}/device-plugin-")
    cluster.run("kubectl", "annotate", "node", "--all", f"{NAMES.inventory}-", f"{NAMES.used}-")
    assert before == everything(cluster)
    node = cluster.api().get("Node", cluster.node.name)["metadata"]
    assert [] == [key for key in (*node["annotations"], *node["labels"]) if NAMES.domain in key]


def another_lease(cluster: WholeCluster, way: Way) -> None:
    """Meet what whoever installs a second time meets, have the doctor say so, and do what it says.

    Kubernetes never again follows the Leases that a policy compares with once no policy did for a second
    (docs/troubleshooting.md).
    """
    cluster.api().create(a_pod("stuck", 6))
    with explained(cluster):
        assert wait_until(lambda: "writer-lease-stale" in doctored(cluster, way.service), timeout_s=120, every_s=5)
    cluster.run("kubectl", "delete", "pod", "stuck", "--wait")
    cluster.control_plane.restart_api_server()


def install(cluster: WholeCluster, way: Way) -> None:
    """Install, and let a node join."""
    for command in way.install:
        print(cluster.run(*command))
    cluster.run("kubectl", "label", "node", cluster.node.name, f"{NAMES.domain}/device-plugin=true")
    rolled_out(cluster)


def rolled_out(cluster: WholeCluster) -> None:
    for workload in ("deployment/cotenant-scheduler", "daemonset/cotenant-device-plugin"):
        with explained(cluster):
            cluster.run("kubectl", "-n", NAMESPACE, "rollout", "status", workload, "--timeout=240s")


def asks_why(cluster: WholeCluster, way: Way) -> None:
    """Have two pods share one GPU, and ask why a third one waits."""
    for name, units in (("one", 6), ("two", 6), ("large", 100)):
        cluster.api().create(a_pod(name, units))
    with explained(cluster):
        shared = [cluster.api().wait("Pod", name, runs, saying="its start") for name in ("one", "two")]
    assert 1 == len({granted_uuid(cluster, pod) for pod in shared})
    told = cluster.run("env", f"COTENANT_SERVICE={way.service}", "kubectl", "gpumem", "explain", "large")
    print(told)
    assert "default/large asks 100 GiB: waiting, fits on none of 1 GPU nodes" in told
    assert told == cluster.run("cotenant", "explain", "large", "--service", way.service)
    pods = cluster.run("env", f"COTENANT_SERVICE={way.service}", "kubectl", "gpumem", "pods", "-A")
    assert re.search(r"default +one +bound +real-0", pods)
    assert {"made-up-gpus"} == doctored(cluster, way.service)
    the_example_shows_what_it_got(cluster)
    # what the plugin notes on the node, as the shipped account may write it; nothing runs on made-up GPUs
    assert wait_until(lambda: {0} == used_bytes(cluster, way), timeout_s=120)


def the_example_shows_what_it_got(cluster: WholeCluster) -> None:
    """Run the page's first pod, in an image that there is here."""
    (pod,) = (one for one in yaml.safe_load_all((MANIFESTS / "examples" / "pod.yaml").read_text()) if one)
    pod["metadata"]["namespace"] = "default"
    pod["spec"]["containers"][0]["image"] = image.BUSYBOX
    cluster.api().create(pod)
    started = cluster.api().wait("Pod", "example", runs, saying="its start")
    expected = {"CUDA_MPS_PINNED_DEVICE_MEM_LIMIT=0=8192M", f"COTENANT_GPU_MEM_BYTES={8 * GIB}"}
    assert wait_until(lambda: expected <= {*cluster.node.logs(started, "main").split()}, timeout_s=10)
    cluster.run("kubectl", "delete", "pod", "example", "--wait", "--grace-period=1")


def used_bytes(cluster: WholeCluster, way: Way) -> set[int | None]:
    """Ask what is in use of the GPUs."""
    told = cluster.run("env", f"COTENANT_SERVICE={way.service}", "kubectl", "gpumem", "nodes", "-o", "json")
    return {gpu["usedBytes"] for node in json.loads(told)["items"] for gpu in node["gpus"]}


def granted_uuid(cluster: WholeCluster, pod: Object) -> str:
    """Find the container's environment as its grant says, for 6 GiB; give the GPU."""
    (container,) = grants.decode(pod["metadata"]["annotations"][NAMES.grant]).containers
    environment = cluster.node.environment(pod)
    assert container.gpus[0].uuid == environment["NVIDIA_VISIBLE_DEVICES"]
    assert "0=6144M" == environment["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"]
    assert str(6 * GIB) == environment["COTENANT_GPU_MEM_BYTES"]
    return container.gpus[0].uuid


def breaks_and_mends(cluster: WholeCluster, way: Way) -> None:
    """Take two things away that the doctor must miss, and put them back by installing again."""
    cluster.run("kubectl", "delete", "validatingadmissionpolicybinding", "cotenant-grants")
    cluster.run("kubectl", "label", "node", cluster.node.name, f"{NAMES.domain}/device-plugin-")
    assert {"made-up-gpus", "admission-missing", "label-without-plugin"} <= doctored(cluster)
    install(cluster, way)


def becomes_a_webhook(cluster: WholeCluster, way: Way) -> None:
    """Upgrade to the webhook, with the certificate that the chart makes: a pod that was there stays, another starts."""
    (command,) = way.install
    words = ["upgrade" if word == "install" else word for word in command if word != "--create-namespace"]
    print(cluster.run(*words, "--set", "admission=webhook"))
    rolled_out(cluster)
    with service_reached(cluster, 443), explained(cluster):
        cluster.api().create(a_pod("by-webhook", 6))
        granted_uuid(cluster, cluster.api().wait("Pod", "by-webhook", runs, saying="its start"))
        assert runs(cluster.api().get("Pod", "one"))
        assert {"made-up-gpus"} == doctored(cluster, f"{NAMESPACE}/https:cotenant-extender:serve")
        cluster.run("kubectl", "delete", "pod", "--all", "--wait")


def changes_modes(cluster: WholeCluster) -> None:
    """Apply the layouts for MPS and for time slicing over the default one, and run the pods of their examples."""
    modes.could_be_applied(cluster)
    with modes.a_folder_whose_mounts_are_seen():
        for layout, configuration, runs_its_example in (
            ("mps", modes.MPS_CONFIGURATION, modes.twelve_servers_run_under_mps),
            ("time-slicing", None, modes.eight_notebooks_run_in_turns),
        ):
            own = kustomization(cluster, f"own-{layout}", layout, fake_gpus=True, configuration=configuration)
            cluster.run("kubectl", "apply", "-k", own)
            rolled_out(cluster)
            with explained(cluster):
                runs_its_example(cluster)
            cluster.run("kubectl", "delete", "deployment", "--all", "--wait")
            cluster.run("kubectl", "delete", "pod", "--all", "--wait", "--grace-period=1")
    cluster.run("kubectl", "-n", NAMESPACE, "delete", "configmap", "time-slicing-config")


def scraped(cluster: WholeCluster) -> str:
    """Scrape the extender as it runs, through the API server's proxy."""
    path = f"/api/v1/namespaces/{NAMESPACE}/services/http:cotenant-extender:serve/proxy/metrics"
    return cluster.run("kubectl", "get", "--raw", path)


def named_in_the_page() -> set[str]:
    """Name what docs/metrics.md lists of the extender."""
    (rows,) = tables(section("metrics.md", "Metrics of the extender"))
    return {row[0] for row in rows}


def doctored(cluster: WholeCluster, service: str = f"{NAMESPACE}/http:cotenant-extender:serve") -> set[str]:
    """Name what the doctor finds."""
    findings = json.loads(cluster.run("cotenant", "doctor", "-o", "json", "--service", service, check=False))
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
def service_reached(cluster: WholeCluster, port: int) -> Iterator[None]:
    """Be kube-proxy for one port of the extender's Service, in front of one of its pods that run."""
    service = cluster.api().get("Service", "cotenant-extender", namespace=NAMESPACE)
    pods = cluster.api().list("Pod", namespace=NAMESPACE, labels="app.kubernetes.io/component=scheduler")
    there = [one for one in pods if runs(one) and "deletionTimestamp" not in one["metadata"]]
    with forwarded((service["spec"]["clusterIP"], port), (there[0]["status"]["podIP"], 9481)):
        yield
