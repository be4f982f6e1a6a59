"""`cotenant doctor` finds nothing in a cluster as shipped, and each planted fault by its name, and no other."""

import base64
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result

from cotenant.cli.doctor.checks import CHECKS
from cotenant.cli.main import main
from cotenant.contract.inventory import MIG, Family, Foreign, MIGInstance, Mode
from cotenant.contract.units import GIB
from cotenant.standins.api_server import ApiServer
from tests.builders import NAMES, a_grant, a_node, a_pod, granted
from tests.cli.installed import (
    SERVICE,
    Objects,
    a_healthy_node,
    add_gpu_node,
    container,
    edit_file,
    install,
    shipped,
)
from tests.extender import certificates
from tests.extender.running import Running


@pytest.fixture(scope="module")
def extender(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A real extender of another, empty cluster: the doctor asks it only whether it is well."""
    with ApiServer() as api, Running(api, tmp_path_factory.mktemp("extender")) as running:
        yield running


@pytest.fixture
def api(extender: Running) -> Iterator[ApiServer]:
    with ApiServer() as api:
        api.services[SERVICE] = extender.other_address
        yield api


def examine(api: ApiServer, folder: Path, *flags: str) -> Result:
    kubeconfig = api.kubeconfig(folder / "kubeconfig")
    return CliRunner().invoke(main, ["doctor", f"--kubeconfig={kubeconfig}", *flags])


def found(api: ApiServer, folder: Path) -> list[dict[str, str]]:
    result = examine(api, folder, "-o", "json")
    assert isinstance(result.exception, SystemExit | None), result.exception
    findings: list[dict[str, str]] = msgspec.json.decode(result.stdout)
    assert int(any(one["severity"] == "broken" for one in findings)) == result.exit_code
    return findings


class TestWell:
    """What is as it should be."""

    @pytest.mark.parametrize("layout", ["second-scheduler"])
    def test_nothing_is_found_where_all_is_as_shipped(self, api: ApiServer, tmp_path: Path, layout: str) -> None:
        install(api, shipped(layout))
        add_gpu_node(api, a_healthy_node())
        api.add_node("no-gpus")
        result = examine(api, tmp_path)
        assert (0, True) == (result.exit_code, "checks: nothing found" in result.output), result.output

    def test_in_the_attached_layout_it_says_what_only_a_person_can_fill_in(
        self, api: ApiServer, tmp_path: Path
    ) -> None:
        install(api, shipped("attached"))
        add_gpu_node(api, a_healthy_node())
        assert ["verbs-closed"] == [one["check"] for one in found(api, tmp_path)]

    def test_it_only_reads(self, api: ApiServer, tmp_path: Path) -> None:
        install(api, shipped())
        before = len(api.writes)
        examine(api, tmp_path)
        assert before == len(api.writes)

    def test_a_cluster_without_anything_of_ours_is_told_what_to_install(self, api: ApiServer, tmp_path: Path) -> None:
        names = {one["check"] for one in found(api, tmp_path)}
        assert {"extender-missing", "plugin-missing", "admission-missing", "no-gpu-nodes"} == names

    @pytest.mark.parametrize(
        ("version", "layout", "admission"),
        [("v1.36.3", "second-scheduler", "policies"), ("v1.35.0-gke.100", "webhook", "webhook")],
    )
    def test_what_to_install_is_what_the_clusters_version_takes(
        self, api: ApiServer, tmp_path: Path, version: str, layout: str, admission: str
    ) -> None:
        api.version = version
        advice = {one["check"]: one["do"] for one in found(api, tmp_path)}
        assert f"kubectl apply -k manifests/{layout} with your image" in advice["extender-missing"]
        assert f"manifests/admission/{admission} " in advice["admission-missing"]

    def test_an_api_server_that_is_not_there_is_one_sentence(self, api: ApiServer, tmp_path: Path) -> None:
        kubeconfig = api.kubeconfig(tmp_path / "kubeconfig")
        api.stop()
        result = CliRunner().invoke(main, ["doctor", f"--kubeconfig={kubeconfig}"])
        assert (1, True) == (result.exit_code, "the API server cannot be reached" in result.output)


def scheduler(key: str, value: Any) -> Callable[[Objects], None]:
    def plant(objects: Objects) -> None:
        edit_file(objects, "scheduler-config.yaml", lambda config: config["extenders"][0].update({key: value}))

    return plant


def replicas(objects: Objects) -> None:
    objects["Deployment", "cotenant-scheduler"]["spec"]["replicas"] = 2
    edit_file(objects, "extender-config.yaml", lambda config: config.pop("writer"))


def image(kind: str, program: str, name: str) -> Callable[[Objects], None]:
    return lambda objects: container(objects, kind, program).update(image=name)


def file(name: str, key: str, value: Any) -> Callable[[Objects], None]:
    return lambda objects: edit_file(objects, name, lambda config: config.update({key: value}))


def without(*keys: tuple[str, str]) -> Callable[[Objects], None]:
    def plant(objects: Objects) -> None:
        for key in keys:
            del objects[key]

    return plant


def policy_scheduler(objects: Objects) -> None:
    variables = objects["MutatingAdmissionPolicy", "cotenant-pods"]["spec"]["variables"]
    next(one for one in variables if one["name"] == "scheduler")["expression"] = "'packer'"


def fence_of_another_domain(objects: Objects) -> None:
    constraints = objects["ValidatingAdmissionPolicy", "cotenant-writer"]["spec"]["matchConstraints"]
    constraints["objectSelector"] = {"matchLabels": {"gpu.example.com/granted": "true"}}


def webhook_instead(objects: Objects) -> None:
    for key in [key for key in objects if "AdmissionPolicy" in key[0] and key[1] != "cotenant-writer"]:
        del objects[key]
    objects.update(shipped("admission/webhook"))


# of 1 January 2020, by openssl
EXPIRED = """\
-----BEGIN CERTIFICATE-----
MIIBRDCB66ADAgECAgEBMAoGCCqGSM49BAMCMBIxEDAOBgNVBAMMB2V4cGlyZWQw
HhcNMjAwMTAxMDAwMDAwWhcNMjAwMTAyMDAwMDAwWjASMRAwDgYDVQQDDAdleHBp
cmVkMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEanFC0P2uYfbnugehJ2+U7rKR
JfArFxMs0u87JYNp1eXNs99aOorZludifm0NucfF33rafcO2hRbvgjSTpJs4Y6My
MDAwDwYDVR0TAQH/BAUwAwEB/zAdBgNVHQ4EFgQUv9fqjmsU4tw0xQ+YMH5nIVzv
hCMwCgYIKoZIzj0EAwIDSAAwRQIhAIwT0s0zfgLUdCLNrVq3eIieLVbiAYxAor29
UWQ3nbVRAiA6bnQliouyUdG+1/fCyP4k3lGomiOaB7mrO8xbI0Eh3g==
-----END CERTIFICATE-----
"""


def webhook_of(authority: bytes) -> Objects:
    """Make our webhooks, and an extender that has a certificate of *authority*."""
    objects = shipped()
    webhook_instead(objects)
    edit_file(objects, "extender-config.yaml", lambda file: file.update(tls={"certFile": "/c", "keyFile": "/k"}))
    for one in objects.values():
        for webhook in one.get("webhooks", ()):
            webhook["clientConfig"]["caBundle"] = base64.b64encode(authority).decode()
    return objects


@pytest.mark.skipif(bool(certificates.why_not()), reason=certificates.why_not())
def test_an_authority_of_the_webhooks_that_soon_expires_is_found(api: ApiServer, tmp_path: Path) -> None:
    add_gpu_node(api, a_healthy_node())
    # of two days
    short = certificates.Authority(tmp_path / "ca").certificate.read_bytes()
    install(api, webhook_of(EXPIRED.encode() + short))
    (soon,) = found(api, tmp_path)
    assert ("webhook-without-authority", "suspect") == (soon["check"], soon["severity"])
    assert "expires within 30 days: " in soon["what"]


def test_an_authority_of_the_webhooks_that_has_expired_is_found(api: ApiServer, tmp_path: Path) -> None:
    add_gpu_node(api, a_healthy_node())
    install(api, webhook_of(EXPIRED.encode()))
    (over,) = found(api, tmp_path)
    assert ("webhook-without-authority", "broken") == (over["check"], over["severity"])
    assert "has expired, so every call fails: " in over["what"]


def made_up(objects: Objects) -> None:
    container(objects, "DaemonSet", "cotenant-device-plugin")["args"].append("--fake-gpus=/etc/gpus.yaml")


@pytest.mark.parametrize(
    ("name", "plant"),
    [
        ("two-extenders", replicas),
        ("two-extenders", without(("ValidatingAdmissionPolicyBinding", "cotenant-writer"))),
        ("version-skew", image("DaemonSet", "cotenant-device-plugin", "cotenant:0.0.9")),
        ("scheduler-version", image("Deployment", "kube-scheduler", "registry.example/kube-scheduler:v1.34.0")),
        ("configuration-unreadable", file("device-plugin-config.yaml", "unitt", "1GiB")),
        ("unit-differs", file("device-plugin-config.yaml", "unit", "256MiB")),
        ("domain-differs", file("device-plugin-config.yaml", "domain", "gpu.example.com")),
        ("domain-differs", fence_of_another_domain),
        ("admission-missing", without(("ValidatingAdmissionPolicyBinding", "cotenant-grants"))),
        ("webhook-without-authority", webhook_instead),
        ("made-up-gpus", made_up),
        ("plugin-missing", without(("DaemonSet", "cotenant-device-plugin"))),
        ("scheduler-does-not-call", scheduler("urlPrefix", "http://127.0.0.1:9999")),
        ("scheduler-does-not-call", scheduler("managedResources", [])),
        ("scheduler-does-not-call", scheduler("bindVerb", "")),
        ("scheduler-ignores-errors", scheduler("ignorable", value=True)),
        ("scheduler-sends-whole-nodes", scheduler("nodeCacheCapable", value=False)),
        ("scheduler-looks-for-managed", scheduler("managedResources", [{"name": NAMES.managed}])),
        ("scheduler-gives-up-first", scheduler("httpTimeout", "5s")),
        ("scheduler-name-differs", policy_scheduler),
    ],
)
def test_a_fault_in_what_is_installed_is_found_by_name(
    api: ApiServer, tmp_path: Path, name: str, plant: Callable[[Objects], None]
) -> None:
    objects = shipped()
    plant(objects)
    install(api, objects)
    add_gpu_node(api, a_healthy_node())
    assert {name} == {one["check"] for one in found(api, tmp_path)}


def add(node: Any, **more: Any) -> Callable[[ApiServer], None]:
    return lambda api: add_gpu_node(api, node, **more)


def a_pod_without_grant(api: ApiServer) -> None:
    api.add_pod("lost", limits={NAMES.gpu_mem: "1"}, spec={"nodeName": "n1"})


def two_pods_too_many(api: ApiServer) -> None:
    for n in range(2):
        grant = a_grant(granted({"GPU-n1-0": 6 * GIB}))
        api.add_pod(
            f"p{n}",
            annotations=a_pod().bound_to("n1", grant).as_json()["metadata"]["annotations"],
            spec={"nodeName": "n1"},
        )


def a_pod_that_another_schedulers_pod_left_no_cpu(api: ApiServer) -> None:
    grant = a_grant(granted({"GPU-n1-0": GIB}))
    annotations = a_pod().bound_to("n1", grant).as_json()["metadata"]["annotations"]
    rejected = {"phase": "Failed", "reason": "OutOfcpu"}
    api.add_pod("raced", annotations=annotations, spec={"nodeName": "n1"}, status=rejected)


def a_pod_that_the_kubelet_holds_back(api: ApiServer, statuses: str = "containerStatuses") -> None:
    grant = a_grant(granted({"GPU-n1-0": GIB}))
    annotations = a_pod().bound_to("n1", grant).as_json()["metadata"]["annotations"]
    message = "no devices found allocated in local cache for pod u, container main, resource cotenant.io/gpu-mem"
    waiting = {"reason": "CreateContainerConfigError", "message": message}
    status = {"phase": "Pending", statuses: [{"name": "main", "state": {"waiting": waiting}}]}
    api.add_pod("held", annotations=annotations, spec={"nodeName": "n1"}, status=status)


def a_clock_ahead(api: ApiServer) -> None:
    from cotenant.standins.api_rules import LEASES  # noqa: PLC0415

    lease = {"metadata": {"name": "n1"}, "spec": {"renewTime": "2099-01-01T00:00:00.000000Z"}}
    api.create(LEASES, lease, "kube-node-lease")


REFUSALS = {
    # of the one before, refused as it should be
    "healthy": ("old-1_a/2", "2026-01-01T10:00:00.200000Z"),
    # the API server had not heard of the new one yet
    "learning": ("new-1_a/3", "2026-01-01T10:00:00.400000Z"),
    "stuck": ("new-1_a/3", "2026-01-01T10:05:00.000000Z"),
}


def refusals(*which: str) -> Callable[[ApiServer], None]:
    """Have a Lease that new-1 took over at ten, and Bindings refused by one that old-1 held."""

    def plant(api: ApiServer) -> None:
        from cotenant.standins.api_rules import EVENTS, LEASES  # noqa: PLC0415

        held = {"holderIdentity": "new-1_a", "leaseTransitions": 3, "acquireTime": "2026-01-01T10:00:00.000000Z"}
        api.create(LEASES, {"metadata": {"name": "cotenant-scheduler"}, "spec": held}, "cotenant-system")
        for name in which:
            term, at = REFUSALS[name]
            note = (
                f"running Bind: pod default/p was not bound to node n1: the grant was written in the term '{term}', "
                "but the Lease cotenant-system/cotenant-scheduler is held by 'old-1_a' in its term 2"
            )
            event = {"metadata": {"name": name}, "reason": "FailedScheduling", "note": note, "eventTime": at}
            api.create(EVENTS, event, "default")

    return plant


mig = MIG(unexplained=(MIGInstance(profile="1g.10gb", start=0, size=1),))


@pytest.mark.parametrize(
    ("name", "plant"),
    [
        ("plugin-not-serving", add(a_healthy_node("n2").without_inventory())),
        ("plugin-not-serving", add(a_healthy_node("n2").not_serving())),
        ("not-advertised", add(a_healthy_node("n2").advertising(None))),
        ("not-advertised", add(a_node("n2").with_mig().advertising_no_instances())),
        ("inventory-unreadable", add(a_healthy_node("n2").annotated_as("{}"))),
        ("node-unit-differs", add(a_healthy_node("n2").counting_in(256 << 20))),
        ("gpu-advertised-twice", add(a_healthy_node("n2"), **{"nvidia.com__gpu": "2"})),
        ("one-uuid-on-two-nodes", add(a_node("n2").with_gpu("10GiB", uuid="GPU-n1-0").advertising("10"))),
        ("gpu-unhealthy", add(a_healthy_node("n2").unhealthy(1))),
        ("gpu-unhealthy", add(a_node("n2").with_mig(static=["3g.20gb@4"]).with_ill_instances("3g.20gb@4"))),
        ("gpu-unhealthy", add(a_node("n2").with_mig().with_ill_places("3g.20gb@4"))),
        ("gpu-fenced", add(a_node("n2").with_gpu("10GiB", foreign=Foreign(fenced=True)).advertising("10"))),
        ("mps-without-daemon", add(a_node("n2").with_gpu("10GiB", mode=Mode.MPS).advertising("10"))),
        ("mig-unexplained", add(a_node("n2").with_gpu("10GiB", mode=Mode.MIG, family=Family.MIG_DYNAMIC, mig=mig))),
        ("label-without-plugin", add(a_healthy_node("n2"), label=False)),
        ("pods-without-grant", a_pod_without_grant),
        ("overcommitted", two_pods_too_many),
        ("held-back", a_pod_that_the_kubelet_holds_back),
        ("held-back", partial(a_pod_that_the_kubelet_holds_back, statuses="initContainerStatuses")),
        ("cpu-raced", a_pod_that_another_schedulers_pod_left_no_cpu),
        ("clock-differs", a_clock_ahead),
        ("writer-lease-stale", refusals(*REFUSALS)),
    ],
)
def test_a_fault_of_nodes_and_pods_is_found_by_name(
    api: ApiServer, tmp_path: Path, name: str, plant: Callable[[ApiServer], None]
) -> None:
    install(api, shipped())
    add_gpu_node(api, a_healthy_node())
    plant(api)
    findings = found(api, tmp_path)
    assert {name} == {one["check"] for one in findings}
    assert all(one["what"] and one["do"] for one in findings)


def test_what_a_take_over_leaves_behind_is_no_fault(api: ApiServer, tmp_path: Path) -> None:
    install(api, shipped())
    add_gpu_node(api, a_healthy_node())
    refusals("healthy", "learning")(api)
    assert [] == found(api, tmp_path)


def test_every_check_has_a_fault_that_is_planted_here() -> None:
    tests: Any = test_a_fault_in_what_is_installed_is_found_by_name, test_a_fault_of_nodes_and_pods_is_found_by_name
    planted = {fault[0] for test in tests for mark in test.pytestmark for fault in mark.args[1]}
    # in tests of their own
    alone = {"extender-missing", "no-gpu-nodes", "extender-not-answering", "not-readable", "verbs-closed"}
    assert CHECKS.keys() == planted | alone
    assert not planted & alone


def test_an_extender_that_is_away_is_found_by_name(api: ApiServer, tmp_path: Path) -> None:
    install(api, shipped())
    add_gpu_node(api, a_healthy_node())
    api.services.clear()
    assert {"extender-not-answering"} == {one["check"] for one in found(api, tmp_path)}


def test_what_may_not_be_read_is_said_and_hides_nothing_else(api: ApiServer, tmp_path: Path) -> None:
    install(api, shipped())
    add_gpu_node(api, a_healthy_node("n1").not_serving())
    api.faults.refuse(403, "you may not", method="GET", path="/networkpolicies")
    assert {"not-readable", "plugin-not-serving"} == {one["check"] for one in found(api, tmp_path)}


@pytest.fixture
def no_api_server() -> Iterator[dict[str, Any]]:
    """A web server that answers with its page; what is put here is its JSON by path, and "url" says where it is."""
    answers: dict[str, Any] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            body = msgspec.json.encode(answers[path]) if path in answers else b"<html>welcome</html>"
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - http.server's signature
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    answers["url"] = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield answers
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("version", "said"),
    [
        (None, "is no API server, by its answer to /version: "),
        ({"version": "of something else"}, "is no API server, by its answer to /version: "),
        (
            {"gitVersion": "v1.35.0"},
            "the API server's list of /apis/apps/v1/namespaces/cotenant-system/deployments is not",
        ),
    ],
)
def test_what_is_no_api_server_is_said_in_a_sentence(
    no_api_server: dict[str, Any], tmp_path: Path, version: Any, said: str
) -> None:
    if version is not None:
        no_api_server["/version"] = version
    config = {
        "current-context": "c",
        "clusters": [{"name": "c", "cluster": {"server": no_api_server["url"]}}],
        "users": [{"name": "c", "user": {"token": "t"}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "c"}}],
    }
    (tmp_path / "kubeconfig").write_bytes(msgspec.json.encode(config))  # JSON is YAML
    result = CliRunner().invoke(main, ["doctor", f"--kubeconfig={tmp_path / 'kubeconfig'}"])
    assert (1, 1) == (result.exit_code, result.output.count("\n")), result.output
    assert said in result.output
