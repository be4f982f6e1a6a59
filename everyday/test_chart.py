"""The chart renders what kustomize renders, value by value what it says, and refuses what the programs would."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from cotenant import __version__
from cotenant.contract import mig_parted
from cotenant.contract.configuration import DevicePluginConfiguration, MPSSettings, convert
from device_plugin.mps.nursery import main as starts_daemons
from e2e.kustomize import MANIFESTS, build
from e2e.processes import MissingProgramError, find_program
from e2e.rest import Object
from tests.docs.markdown import blocks, section
from tests.manifests.kustomization import mounted, pod_specs

CHART = MANIFESTS.parent / "charts" / "cotenant"
NAMESPACE = "cotenant-system"
OF_HELM = {"helm.sh/chart", "app.kubernetes.io/instance", "app.kubernetes.io/managed-by", "app.kubernetes.io/version"}


@pytest.fixture(scope="module", autouse=True)
def _programs() -> None:
    try:
        for name in ("helm", "kubectl"):
            find_program(name)
    except MissingProgramError as missing:
        pytest.skip(str(missing))


def render(*values: str, kubernetes: str = "v1.36.3", namespace: str = NAMESPACE, check: bool = True) -> str:
    words = [find_program("helm"), "template", "cotenant", CHART, "-n", namespace, f"--kube-version={kubernetes}"]
    sets = [word for value in values for word in ("--set-json", value)]
    done = subprocess.run([*map(str, words), *sets], check=False, capture_output=True, text=True)
    assert not (check and done.returncode), done.stderr
    return done.stdout if check else done.stderr


def objects(text: str) -> list[Object]:
    """List the objects of a stream, without those of `helm test`."""
    found = [one for one in yaml.safe_load_all(text) if one]
    return [one for one in found if "helm.sh/hook" not in one["metadata"].get("annotations", {})]


def plain(one: Object) -> Object:
    """Return an object without what each way adds by itself: hashes of ConfigMaps, Helm's labels; ConfigMaps read."""
    one = yaml.safe_load(yaml.safe_dump(one))
    metadata = one["metadata"]
    metadata["labels"] = {k: v for k, v in metadata.get("labels", {}).items() if k not in OF_HELM}
    if one["kind"] == "ConfigMap":
        metadata.pop("labels")
        one["data"] = {name: _read(name, text) for name, text in one["data"].items()}
    if one["kind"] in {"Deployment", "DaemonSet"}:
        template = one["spec"]["template"]
        annotations = template["metadata"].pop("annotations", {})
        assert {*annotations} <= {"checksum/configuration"}
    # kustomize's YAML adds an empty line where an expression was folded
    spaced: Object = _evenly_spaced(one)
    return spaced


def _read(name: str, text: str) -> Any:
    """Read a file; the plugin's as the plugin does, since one way leaves out what is the default."""
    if name == "device-plugin-config.yaml":
        return msgspec.to_builtins(convert(text, DevicePluginConfiguration))
    return yaml.safe_load(text)


def _evenly_spaced(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _evenly_spaced(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_evenly_spaced(one) for one in value]
    return " ".join(value.split()) if isinstance(value, str) else value


def keyed(found: list[Object]) -> dict[tuple[str, str, str], Object]:
    return {(one["kind"], one["metadata"].get("namespace", ""), one["metadata"]["name"]): plain(one) for one in found}


def kustomized(folder: Path) -> list[Object]:
    """Build with the real kustomize, and take the hashes off again."""
    text = subprocess.run(
        [str(find_program("kubectl")), "kustomize", str(folder)], check=True, capture_output=True, text=True
    ).stdout
    for name in {one["metadata"]["name"] for one in yaml.safe_load_all(text) if one["kind"] == "ConfigMap"}:
        text = text.replace(name, name.rpartition("-")[0]) if len(name.rpartition("-")[2]) == 10 else text
    return objects(text)


# A component is nothing by itself.
BUILT = [path.parent for path in MANIFESTS.rglob("kustomization.yaml") if "components" not in path.parts]


@pytest.mark.parametrize("folder", sorted(BUILT), ids=str)
def test_kustomize_builds_what_our_tests_take_it_to_build(folder: Path) -> None:
    assert keyed(kustomized(folder)) == keyed(list(build(folder)))


@pytest.mark.parametrize(
    ("folder", "values"),
    [
        ("second-scheduler", []),
        ("attached", ['layout="attached"']),
        ("dev-fake-gpus", ["devicePlugin.fakeGPUs=@"]),
        ("memory-watchdog", ["devicePlugin.memoryWatchdog=true"]),
        ("mig", ["devicePlugin.mig.enabled=true"]),
        ("mps", ["devicePlugin.mps.enabled=true"]),
        ("time-slicing", ['devicePlugin.nvidiaConfigMap="time-slicing-config"']),
    ],
)
def test_helm_renders_what_kustomize_does(folder: str, values: list[str]) -> None:
    gpus = yaml.safe_load((MANIFESTS / "dev-fake-gpus" / "fake-gpus.yaml").read_text())
    given = [value.replace("@", json.dumps(gpus)) for value in values]
    expected = keyed(kustomized(MANIFESTS / folder))
    # `helm install --create-namespace` makes the one; the other is the user's own
    del expected["Namespace", "", NAMESPACE]
    expected.pop(("ConfigMap", NAMESPACE, "time-slicing-config"), None)
    assert expected == keyed(objects(render(*given)))


def test_modes_stand_beside_each_other_and_rules_of_ones_own_replace_those_of_the_folders(tmp_path: Path) -> None:
    rules: list[Object] = [{"models": ["A100"], "family": "mig-dynamic"}, {"mode": "mps"}]
    names = ("mig", "mps", "memory-watchdog", "nvidia-config")
    configuration = {"deviceListStrategy": "cdi-cri", "gpus": rules}
    (tmp_path / "device-plugin-config.yaml").write_text(yaml.safe_dump(configuration))
    generated = {"name": "cotenant-device-plugin-config", "namespace": NAMESPACE, "behavior": "merge"}
    written = {
        "resources": [os.path.relpath(MANIFESTS / "second-scheduler", tmp_path)],
        "components": [os.path.relpath(MANIFESTS / "components" / name, tmp_path) for name in names],
        "configMapGenerator": [{**generated, "files": ["device-plugin-config.yaml"]}],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(written))
    expected = keyed(kustomized(tmp_path))
    del expected["Namespace", "", NAMESPACE]
    plugin = {
        "mig": {"enabled": True},
        "mps": {"enabled": True},
        "memoryWatchdog": True,
        "nvidiaConfigMap": "time-slicing-config",
        "configuration": {"gpus": rules},
    }
    assert expected == keyed(objects(render(f"devicePlugin={json.dumps(plugin)}")))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"configuration": {"gpus": [{"mode": "mps"}]}}, "set devicePlugin.mps.enabled=true"),
        ({"configuration": {"profiles": {"a": [{"mode": "mps"}]}}}, "set devicePlugin.mps.enabled=true"),
        ({"configuration": {"gpus": [{"family": "mig-dynamic"}]}}, "set devicePlugin.mig.enabled=true"),
        ({"mps": {"nursery": True}}, "set devicePlugin.mps.enabled=true"),
        ({"mig": {"configs": {"all": []}}}, "set devicePlugin.mig.enabled=true"),
        ({"mig": {"enabled": True, "configs": {"all": []}}}, "add {family: mig-static}"),
        ({"configuration": {"migConfigs": "/etc/geometries"}}, "into devicePlugin.mig.configs instead"),
        ({"configuration": {"nvidiaConfig": "/etc/nvidia"}}, "in devicePlugin.nvidiaConfigMap instead"),
        ({"configuration": {"watchdog": {"interval": 5}}}, "set devicePlugin.memoryWatchdog=true"),
        ({"configuration": {"mps": {"root": "/run/mps"}}}, "devicePlugin.configuration.mps.root is /run/mps"),
        ({"configuration": {"cdiDirectory": "/run/cdi"}}, "devicePlugin.configuration.cdiDirectory is /run/cdi"),
        ({"configuration": {"serve": "0.0.0.0:9999"}}, "devicePlugin.configuration.serve is 0.0.0.0:9999"),
        ({"mig": {"enabled": True}, "mps": {"enabled": True}}, "which GPUs are whose"),
    ],
)
def test_a_mode_without_what_it_needs_of_the_node_is_refused(values: Object, said: str) -> None:
    assert said in render(f"devicePlugin={json.dumps(values)}", check=False)


def test_beside_nvidias_file_it_is_the_file_that_says_which_gpus_are_under_mps() -> None:
    plugin = {"mps": {"enabled": True}, "nvidiaConfigMap": "shared-by-mps"}
    maps = [one["data"] for one in objects(render(f"devicePlugin={json.dumps(plugin)}")) if one["kind"] == "ConfigMap"]
    (text,) = (data["device-plugin-config.yaml"] for data in maps if "device-plugin-config.yaml" in data)
    configuration = convert(text, DevicePluginConfiguration)
    assert () == tuple(configuration.gpus)


def test_a_nursery_is_the_one_of_the_example_and_the_plugin_is_told_of_it() -> None:
    found = objects(render('devicePlugin.mps={"enabled":true,"nursery":true}'))
    (example,) = objects((MANIFESTS / "examples" / "mps-nursery.yaml").read_text())
    key = ("DaemonSet", NAMESPACE, "cotenant-mps-nursery")
    assert plain(example) == keyed(found)[key]
    text = mounted(found, "cotenant-device-plugin", "device-plugin")["/etc/cotenant/device-plugin-config.yaml"]
    settings = convert(text, DevicePluginConfiguration).mps
    assert (str(starts_daemons.params[0].default), MPSSettings().root) == (settings.nursery, settings.root)


def test_each_container_has_the_resources_that_are_said_of_it_and_else_those_of_the_manifests() -> None:
    ours, its = {"limits": {"memory": "1Gi"}}, {"requests": {"memory": "2Gi"}}
    mps = {"enabled": True, "nursery": True, "nurseryResources": its}
    found = objects(render(f"devicePlugin={json.dumps({'mps': mps, 'resources': ours})}"))
    plugin, nursery = (pod_specs(found)[name] for name in ("cotenant-device-plugin", "cotenant-mps-nursery"))
    assert (ours, its) == (plugin["containers"][0]["resources"], nursery["containers"][0]["resources"])
    mounts = {"requests": {"cpu": "10m", "memory": "16Mi"}}
    assert [mounts, mounts] == [spec["initContainers"][0]["resources"] for spec in (plugin, nursery)]


def test_the_geometries_of_the_page_reach_the_plugin() -> None:
    (text,) = blocks(section("mig.md", "Cutting GPUs by a label"), "yaml")
    values = {"enabled": True, "configs": yaml.safe_load(text)["mig-configs"]}
    rules = '[{"family": "mig-static"}]'
    found = objects(render(f"devicePlugin.mig={json.dumps(values)}", f"devicePlugin.configuration.gpus={rules}"))
    files = mounted(found, "cotenant-device-plugin", "device-plugin")
    configuration = convert(files["/etc/cotenant/device-plugin-config.yaml"], DevicePluginConfiguration)
    assert configuration.mig_configs is not None
    assert mig_parted.parse(text) == mig_parted.parse(files[configuration.mig_configs])


def test_values_reach_every_place_that_has_to_agree() -> None:
    text = render(
        'domain="gpu.example.com"',
        'unit="256MiB"',
        'schedulerName="packer"',
        'image={"repository":"mirror/cotenant","tag":"9"}',
        'extender={"configuration":{"policy":"binpack"},"extraEnv":[{"name":"A","value":"b"}],"hostNetwork":true}',
        'devicePlugin={"runtimeClassName":"nvidia","nodeSelector":{"gpu":"yes"},"kubeletRoot":"/data/kubelet"}',
        namespace="gpu",
    )
    assert "cotenant.io" not in text
    assert NAMESPACE not in text
    found = {(one["kind"], one["metadata"]["name"]): one for one in objects(text)}
    variables = {
        entry["name"]: entry["expression"]
        for entry in found["MutatingAdmissionPolicy", "cotenant-pods"]["spec"]["variables"]
    }
    # 256 * 2**20
    assert ("268435456", "'packer'") == (variables["unit"], variables["scheduler"])
    data = found["ConfigMap", "cotenant-scheduler-config"]["data"]
    extender, scheduler = (yaml.safe_load(data[f"{name}-config.yaml"]) for name in ("extender", "scheduler"))
    assert ("gpu.example.com", "256MiB", "packer", "binpack") == tuple(
        extender[key] for key in ("domain", "unit", "schedulerName", "policy")
    )
    assert "system:serviceaccount:gpu:cotenant-extender" == extender["extenderUser"]
    assert "packer" == scheduler["profiles"][0]["schedulerName"]
    pods = found["Deployment", "cotenant-scheduler"]["spec"]["template"]["spec"]
    assert {"name": "A", "value": "b"} in pods["initContainers"][0]["env"]
    assert pods["hostNetwork"] is True
    assert "mirror/cotenant:9" == pods["initContainers"][0]["image"]
    plugin = found["DaemonSet", "cotenant-device-plugin"]["spec"]["template"]["spec"]
    assert ("nvidia", {"gpu": "yes"}) == (plugin["runtimeClassName"], plugin["nodeSelector"])
    assert "/data/kubelet/pod-resources" in {v["hostPath"]["path"] for v in plugin["volumes"] if "hostPath" in v}


@pytest.mark.parametrize(("layout", "policy"), [("second-scheduler", "scheduler"), ("attached", "extender")])
def test_who_may_reach_what_is_served_is_said_of_the_extender_and_of_the_plugins(layout: str, policy: str) -> None:
    peers = [{"ipBlock": {"cidr": "192.0.2.0/28"}}]
    found = objects(render(f'layout="{layout}"', f'networkPolicy={{"enabled":true,"serveFrom":{json.dumps(peers)}}}'))
    rules = {one["metadata"]["name"]: one["spec"]["ingress"] for one in found if one["kind"] == "NetworkPolicy"}
    assert {f"cotenant-{policy}", "cotenant-device-plugin"} == rules.keys()
    assert [True, True] == [peers in [rule.get("from") for rule in ingress] for ingress in rules.values()]


def test_links_of_alerts_stay_where_the_domain_of_resources_is_another() -> None:
    found = objects(render('domain="gpu.example.com"', "monitoring.enabled=true"))
    (rules,) = (one["spec"]["groups"][0]["rules"] for one in found if one["kind"] == "PrometheusRule")
    assert {"https://cotenant.io/runbooks.html"} == {
        one["annotations"]["runbook_url"].partition("#")[0] for one in rules
    }


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (['layout="attached"', "extender.hostNetwork=true"], "set extender.configuration.verbsTLS"),
        (['extender.configuration={"serve":"127.0.0.1:9999"}'], "extender.configuration.serve is 127.0.0.1:9999"),
    ],
)
def test_an_extender_that_nobody_or_everybody_would_reach_is_refused(values: list[str], said: str) -> None:
    assert said in render(*values, check=False)


def test_who_signs_a_certificate_of_ones_own_is_left_to_cert_manager_where_helm_cannot_know() -> None:
    annotations = {"cert-manager.io/inject-ca-from": f"{NAMESPACE}/webhook"}
    values = {"existingSecret": "webhook-tls", "annotations": annotations}
    found = objects(render(f"webhook={json.dumps(values)}", kubernetes="v1.34.1"))
    hooks = [one for one in found if one["kind"].endswith("WebhookConfiguration")]
    assert [annotations] * 2 == [one["metadata"]["annotations"] for one in hooks]
    assert [{"service"}] * 3 == [one["clientConfig"].keys() for hook in hooks for one in hook["webhooks"]]
    assert not any(one["kind"] == "Secret" for one in found)
    volumes = pod_specs(found)["cotenant-scheduler"]["volumes"]
    assert {"name": "tls", "secret": {"secretName": "webhook-tls"}} in volumes


@pytest.mark.parametrize("admission", ["policies", "webhook"])
def test_the_prefix_of_mig_reaches_both_programs_and_admission(admission: str) -> None:
    text = render('migDomain="cotenant.io"', f'admission="{admission}"', "devicePlugin.mig.enabled=true")
    assert "nvidia.com/mig-" not in text
    found = objects(text)
    for workload, container in (("cotenant-scheduler", "extender"), ("cotenant-device-plugin", "device-plugin")):
        (read,) = (
            yaml.safe_load(file)
            for path, file in mounted(found, workload, container).items()
            if path.endswith(f"{container}-config.yaml")
        )
        assert "cotenant.io" == read["migDomain"]
    kinds = {"policies": "AdmissionPolicy", "webhook": "WebhookConfiguration"}
    asking = [one for one in found if one["kind"].endswith(kinds[admission]) and "/mig-" in json.dumps(one)]
    assert 2 == len([one for one in asking if "startsWith('cotenant.io/mig-')" in json.dumps(one)])


def test_an_older_cluster_gets_the_webhook_with_a_certificate_that_fits() -> None:
    found = {(one["kind"], one["metadata"]["name"]): one for one in objects(render(kubernetes="v1.34.1"))}
    assert not any(kind == "MutatingAdmissionPolicy" for kind, _ in found)
    secret = found["Secret", "cotenant-webhook"]["data"]
    for kind in ("MutatingWebhookConfiguration", "ValidatingWebhookConfiguration"):
        assert {secret["ca.crt"]} == {one["clientConfig"]["caBundle"] for one in found[kind, "cotenant"]["webhooks"]}
    extender = found["Deployment", "cotenant-scheduler"]["spec"]["template"]["spec"]["initContainers"][0]
    config = yaml.safe_load(found["ConfigMap", "cotenant-scheduler-config"]["data"]["extender-config.yaml"])
    mounts = {mount["mountPath"] for mount in extender["volumeMounts"]}
    assert {str(Path(config["tls"][key]).parent) for key in ("certFile", "keyFile")} <= mounts
    assert {"HTTPS"} == {
        extender[f"{probe}Probe"]["httpGet"]["scheme"] for probe in ("startup", "readiness", "liveness")
    }
    # whose liveness asks the extender as well
    scheduler = found["Deployment", "cotenant-scheduler"]["spec"]["template"]["spec"]["containers"][0]
    assert {"port": 9481, "scheme": "HTTPS"}.items() <= scheduler["livenessProbe"]["httpGet"].items()
    # kube-scheduler of the cluster's own version
    assert found["Deployment", "cotenant-scheduler"]["spec"]["template"]["spec"]["containers"][0]["image"].endswith(
        ":v1.34.1"
    )


# its image may be one minor version older than the cluster
@pytest.mark.parametrize(
    ("kubernetes", "path"), [("v1.30.4", "/healthz"), ("v1.31.4", "/healthz"), ("v1.32.0", "/readyz")]
)
def test_a_kube_scheduler_of_before_1_31_is_asked_where_it_answers(kubernetes: str, path: str) -> None:
    scheduler = pod_specs(objects(render(kubernetes=kubernetes)))["cotenant-scheduler"]["containers"][0]
    assert path == scheduler["readinessProbe"]["httpGet"]["path"]


@pytest.mark.parametrize("layout", ["second-scheduler", "attached"])
@pytest.mark.parametrize(
    ("kubernetes", "policies", "replicas"),
    [
        # no ValidatingAdmissionPolicy of v1, and so no fence between two replicas
        ("v1.29.15", set(), 1),
        ("v1.29.15-gke.100", set(), 1),
        # tokens of pods do not name their node
        ("v1.30.0-gke.100", {"cotenant-writer"}, 2),
        ("v1.31.4", {"cotenant-writer"}, 2),
        ("v1.32.0", {"cotenant-writer", "cotenant-device-plugin"}, 2),
    ],
)
def test_an_older_cluster_gets_the_policies_that_it_knows_and_as_many_replicas_as_they_keep_apart(
    layout: str, kubernetes: str, policies: set[str], replicas: int
) -> None:
    found = objects(render(f'layout="{layout}"', kubernetes=kubernetes))
    # in the other layout it may write to no pod
    expected = policies | ({"cotenant-extender"} if policies and layout == "attached" else set())
    for kind in ("ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"):
        assert expected == {one["metadata"]["name"] for one in found if one["kind"] == kind}
    (deployment,) = (one["spec"] for one in found if one["kind"] == "Deployment")
    strategy = "RollingUpdate" if replicas == 2 else "Recreate"
    assert (replicas, strategy) == (deployment["replicas"], deployment["strategy"]["type"])
    # their account stays
    assert "cotenant-device-plugin" in {one["metadata"]["name"] for one in found if one["kind"] == "ServiceAccount"}


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ('extender={"configuration":{"polcy":"binpack"}}', "additional properties 'polcy' not allowed"),
        ('unit="1GB"', "does not match pattern"),
        ('layout="first"', "value must be one of"),
        ('schedulerName="default-scheduler"', "schedulerName"),
        ('devicePlugin={"configuration":{"inventoryInterval":0}}', "exclusiveMinimum"),
        ("replicas=2", "additional properties 'replicas' not allowed"),
    ],
)
def test_a_wrong_value_is_refused_before_anything_is_installed(value: str, said: str) -> None:
    assert said in render(value, check=False)


def test_the_chart_and_its_image_are_of_this_version() -> None:
    chart: dict[str, Any] = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (__version__, __version__) == (chart["version"], chart["appVersion"])


def test_lint_finds_nothing() -> None:
    done = subprocess.run([str(find_program("helm")), "lint", "--strict", str(CHART)], check=False, capture_output=True)
    assert 0 == done.returncode, done.stdout


def test_a_packaged_chart_needs_no_links(tmp_path: Path) -> None:
    helm = str(find_program("helm"))
    subprocess.run([helm, "package", str(CHART), "-d", str(tmp_path)], check=True, capture_output=True)
    (archive,) = tmp_path.iterdir()
    done = subprocess.run(
        [helm, "template", "cotenant", str(archive), "-n", NAMESPACE, "--kube-version=v1.36.3"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert objects(render()) == objects(done.stdout)


@pytest.mark.parametrize(
    ("configuration", "granted"),
    [
        ("{}", False),
        ('{"preemptFragmented": null}', False),
        ('{"preemptFragmented": {}}', True),
        ('{"evictOverusersAfter": 60}', True),
    ],
)
def test_the_right_to_evict_is_there_only_where_something_evicts(configuration: str, *, granted: bool) -> None:
    rendered = objects(render(f"extender.configuration={configuration}"))
    assert granted == any(one["metadata"]["name"] == "cotenant-evictions" for one in rendered)
