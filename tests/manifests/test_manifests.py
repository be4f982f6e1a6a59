"""The manifests agree with the programs, with the contract, and with each other."""

import os
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import click
import msgspec
import pytest
import yaml

from cotenant import __version__
from cotenant.contract.configuration import (
    DevicePluginConfiguration,
    ExtenderConfiguration,
    Layout,
    MPSSettings,
    convert,
)
from cotenant.contract.names import Names
from cotenant.contract.pods import Pod
from cotenant.contract.request import parse
from cotenant.contract.units import GIB
from device_plugin.families import nvidia
from device_plugin.main import main as device_plugin
from device_plugin.mps.nursery import main as starts_daemons
from e2e.kustomize import MANIFESTS, aims_at, build
from e2e.rest import Object
from extender.main import main as extender
from tests.manifests.kustomization import (
    FILE,
    containers,
    documents,
    files,
    mounted,
    pod_specs,
)

LAYOUTS = ("second-scheduler", "attached")
ROOTS = [
    *(MANIFESTS / layout for layout in LAYOUTS),
    *(
        MANIFESTS / other
        for other in (
            "admission/webhook",
            "dev-fake-gpus",
            "eviction",
            "memory-watchdog",
            "mig",
            "monitoring",
            "mps",
            "time-slicing",
            "webhook",
        )
    ),
    MANIFESTS / "network-policy",
]
# What is not for `kubectl apply -k`.
FOR_PEOPLE = {MANIFESTS / "attached" / "scheduler-config.yaml", *(MANIFESTS / "examples").glob("*.yaml")}
PROGRAMS: dict[str, click.Command] = {"cotenant-extender": extender, "cotenant-device-plugin": device_plugin}
# Read by the NVIDIA container runtime, when it starts the container.
FOR_THE_RUNTIME = {"NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES"}
NAMESPACE = "cotenant-system"
ROOT = MANIFESTS.parent


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def found(layout: str) -> list[Object]:
    """All objects of a layout."""
    return list(build(MANIFESTS / layout))


def of_kind(found: list[Object], kind: str) -> dict[str, Object]:
    return {one["metadata"]["name"]: one for one in found if one["kind"] == kind}


def ours(found: list[Object]) -> list[Object]:
    """List the containers that run one of our programs."""
    return [one for spec in pod_specs(found).values() for one in containers(spec) if one["command"][0] in PROGRAMS]


def scheduler_config(layout: str) -> Object:
    config: Object = yaml.safe_load((MANIFESTS / layout / "scheduler-config.yaml").read_text())
    return config


def extender_config(layout: str) -> ExtenderConfiguration:
    return convert((MANIFESTS / layout / "extender-config.yaml").read_text(), ExtenderConfiguration)


def port(address: str) -> int:
    return int(address.rpartition(":")[2])


def seconds(duration: str) -> float:
    """Read one of the durations that stand in manifests."""
    number, unit = re.fullmatch(r"(\d+)(ms|s)", duration).groups()  # type: ignore[union-attr]
    return float(number) * {"ms": 0.001, "s": 1.0}[unit]


class TestWebhook:
    """The default layout with the webhook instead of the policies."""

    def test_it_is_the_default_layout_but_for_admission(self) -> None:
        default, webhook = (
            {(one["kind"], one["metadata"]["name"]) for one in build(MANIFESTS / name)}
            for name in ("second-scheduler", "webhook")
        )
        policies = {(one["kind"], one["metadata"]["name"]) for one in build(MANIFESTS / "admission" / "policies")}
        configurations = {(one["kind"], one["metadata"]["name"]) for one in build(MANIFESTS / "admission" / "webhook")}
        assert (policies, configurations) == (default - webhook, webhook - default)

    def test_the_extender_is_configured_alike_but_for_its_certificate(self) -> None:
        webhook = extender_config("webhook")
        assert webhook.tls is not None
        assert msgspec.structs.replace(webhook, tls=None) == extender_config("second-scheduler")

    def test_applying_it_again_leaves_the_authority_that_was_put_in(self) -> None:
        # kubectl leaves alone what a file does not name, and sets what it names, be it empty
        found = list(build(MANIFESTS / "webhook"))
        (mutating,) = of_kind(found, "MutatingWebhookConfiguration").values()
        (validating,) = of_kind(found, "ValidatingWebhookConfiguration").values()
        webhooks = [*mutating["webhooks"], *validating["webhooks"]]
        assert [{"service"}] * 3 == [one["clientConfig"].keys() for one in webhooks]

    def test_whoever_asks_the_extender_asks_by_https(self) -> None:
        spec = pod_specs(list(build(MANIFESTS / "webhook")))["cotenant-scheduler"]
        probes = [
            one[probe]["httpGet"]
            for one in containers(spec)
            for probe in ("startupProbe", "readinessProbe", "livenessProbe")
            if probe in one
        ]
        assert {"HTTPS"} == {probe.get("scheme") for probe in probes}
        (mount,) = [m["mountPath"] for m in containers(spec)[0]["volumeMounts"] if m["name"] == "tls"]
        config = convert((MANIFESTS / "webhook" / "extender-config.yaml").read_text(), ExtenderConfiguration)
        assert config.tls is not None
        assert {mount} == {str(Path(path).parent) for path in (config.tls.cert_file, config.tls.key_file)}


class TestFiles:
    """No file is forgotten, none is missing."""

    def test_every_file_belongs_to_a_kustomization_or_says_what_it_is_for(self) -> None:
        listed = set().union(*(files(root) for root in ROOTS)) | FOR_PEOPLE
        shipped = {path for path in MANIFESTS.rglob("*") if path.suffix in {".yaml", ".json"}}
        assert listed == shipped

    @pytest.mark.parametrize("path", sorted(MANIFESTS.rglob(FILE)), ids=lambda path: str(path.parent.name))
    def test_a_kustomization_uses_what_our_reader_of_it_knows_and_patches_what_there_is(self, path: Path) -> None:
        kustomization = yaml.safe_load(path.read_text())
        if kustomization["kind"] == "Component":
            assert {"apiVersion", "kind", "patches"} == kustomization.keys()
            return
        assert kustomization.keys() <= {
            "apiVersion",
            "kind",
            "resources",
            "components",
            "patches",
            "configMapGenerator",
        }
        for entry in kustomization.get("configMapGenerator", []):
            assert (
                {"name", "namespace", "files"} <= entry.keys() <= {"name", "namespace", "files", "behavior", "options"}
            )
        patched = [
            one
            for name in kustomization["resources"]
            for one in (build(path.parent / name) if (path.parent / name).is_dir() else documents(path.parent / name))
        ]
        for patch in kustomization.get("patches", []):
            assert patch["target"].keys() == {"kind", "name"}
            assert any(aims_at(patch["target"], one) for one in patched), patch["target"]

    @pytest.mark.parametrize(
        "path", sorted(MANIFESTS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(MANIFESTS))
    )
    def test_every_document_is_a_mapping_without_repeated_keys(self, path: Path) -> None:
        for document in yaml.compose_all(path.read_text(), Loader=yaml.SafeLoader):
            assert isinstance(document, yaml.MappingNode)
            assert [] == repeated(document)

    def test_no_role_names_an_object_as_a_generated_config_map_is_named(self, found: list[Object]) -> None:
        # kustomize puts the ConfigMap's hash behind such a name wherever a Role has it, whatever the resource
        named = {
            name
            for role in (*of_kind(found, "Role").values(), *of_kind(found, "ClusterRole").values())
            for rule in role["rules"]
            for name in rule.get("resourceNames", [])
        }
        assert set() == named & of_kind(found, "ConfigMap").keys()

    def test_no_object_stands_twice_in_a_layout(self, found: list[Object]) -> None:
        named = [(one["kind"], one["metadata"].get("namespace"), one["metadata"]["name"]) for one in found]
        assert len(set(named)) == len(named)

    def test_the_image_is_this_version(self) -> None:
        texts = (path.read_text() for path in MANIFESTS.rglob("*.yaml"))
        named = [image for text in texts for image in re.findall(r"\bcotenant:[\d.]+", text)]
        assert len(named) > 3
        assert {f"cotenant:{__version__}"} == {*named}


def repeated(node: yaml.Node) -> list[str]:
    """List the keys that stand twice in a mapping, anywhere below *node*: PyYAML lets the last one win."""
    if isinstance(node, yaml.SequenceNode):
        return [key for item in node.value for key in repeated(item)]
    if not isinstance(node, yaml.MappingNode):
        return []
    keys = [key.value for key, _ in node.value]
    return [key for key in set(keys) if keys.count(key) > 1] + [
        key for _, value in node.value for key in repeated(value)
    ]


class TestSchedulerConfiguration:
    """kube-scheduler and the extender are told the same."""

    def test_it_calls_the_port_that_the_extender_listens_on(self, layout: str) -> None:
        (stanza,) = scheduler_config(layout)["extenders"]
        assert port(extender_config(layout).listen) == port(stanza["urlPrefix"])

    def test_in_one_pod_it_calls_the_address_that_the_extender_listens_on(self) -> None:
        (stanza,) = scheduler_config("second-scheduler")["extenders"]
        assert f"http://{extender_config('second-scheduler').listen}" == stanza["urlPrefix"]

    def test_it_waits_longer_than_a_bind_may_take(self, layout: str) -> None:
        (stanza,) = scheduler_config(layout)["extenders"]
        seconds = re.fullmatch(r"(\d+)s", stanza["httpTimeout"])
        assert seconds
        assert extender_config(layout).bind_timeout < int(seconds[1])

    def test_it_asks_about_pods_that_admission_marked_and_keeps_checking_gpu_memory(self, layout: str) -> None:
        (stanza,) = scheduler_config(layout)["extenders"]
        assert [{"name": Names().managed, "ignoredByScheduler": True}] == stanza["managedResources"]

    def test_it_sends_names_and_never_binds_around_us(self, layout: str) -> None:
        (stanza,) = scheduler_config(layout)["extenders"]
        assert stanza["nodeCacheCapable"] is True
        assert stanza["ignorable"] is False
        verbs = ("filter", "prioritize", "preempt", "bind")
        assert verbs == tuple(stanza[f"{verb}Verb"] for verb in verbs)

    def test_the_profile_is_the_one_that_admission_names(self) -> None:
        (profile,) = scheduler_config("second-scheduler")["profiles"]
        assert extender_config("second-scheduler").scheduler_name == profile["schedulerName"]

    def test_the_profile_packs_and_counts_gpu_memory_most(self) -> None:
        (profile,) = scheduler_config("second-scheduler")["profiles"]
        arguments = {one["name"]: one["args"] for one in profile["pluginConfig"]}
        strategy = arguments["NodeResourcesFit"]["scoringStrategy"]
        assert "MostAllocated" == strategy["type"]
        assert Names().gpu_mem == max(strategy["resources"], key=lambda one: one["weight"])["name"]
        assert {"defaultingType": "List", "defaultConstraints": []} == arguments["PodTopologySpread"]

    def test_the_lease_is_the_one_that_rbac_grants(self) -> None:
        role = of_kind(list(build(MANIFESTS / "second-scheduler")), "Role")["cotenant-scheduler"]
        election = scheduler_config("second-scheduler")["leaderElection"]
        assert role["metadata"]["namespace"] == election["resourceNamespace"]
        assert [[election["resourceName"]]] * 2 == [rule["resourceNames"] for rule in role["rules"]]


class TestConfigurations:
    """What is shipped is what the code does without it, but for what the layout asks for."""

    def test_the_extender_of_the_second_scheduler_differs_in_where_it_serves_and_whom_it_follows(self) -> None:
        default = ExtenderConfiguration()
        shipped = extender_config("second-scheduler")
        assert default == msgspec.structs.replace(shipped, serve=default.serve, writer=None)

    def test_the_attached_extender_differs_in_where_it_listens_and_serves_and_what_it_holds(self) -> None:
        default = ExtenderConfiguration()
        shipped = extender_config("attached")
        assert Layout.ATTACHED is shipped.layout
        assert default == msgspec.structs.replace(
            shipped,
            listen=default.listen,
            serve=default.serve,
            layout=default.layout,
            bind_timeout=default.bind_timeout,
            writer=None,
        )
        assert (port(default.listen), port(default.serve)) == (port(shipped.listen), port(shipped.serve))

    def test_the_device_plugin_has_the_defaults(self) -> None:
        text = (MANIFESTS / "base" / "device-plugin-config.yaml").read_text()
        assert DevicePluginConfiguration() == convert(text, DevicePluginConfiguration)

    @pytest.mark.parametrize(
        ("path", "kind"),
        [
            ("second-scheduler/extender-config.yaml", ExtenderConfiguration),
            ("attached/extender-config.yaml", ExtenderConfiguration),
            ("base/device-plugin-config.yaml", DevicePluginConfiguration),
        ],
    )
    def test_every_key_with_a_default_is_shown(self, path: str, kind: type[msgspec.Struct]) -> None:
        shown = yaml.safe_load((MANIFESTS / path).read_text())
        # null is not something a person would write
        expected = {field.encode_name for field in msgspec.structs.fields(kind) if field.default is not None}
        assert expected == shown.keys() - {"writer"}


class TestPrograms:
    """The containers start what there is, with what it knows."""

    def test_every_flag_is_one_of_the_programs(self, found: list[Object]) -> None:
        for one in ours(found):
            known = {name for parameter in PROGRAMS[one["command"][0]].params for name in parameter.opts}
            assert [] == [flag for flag in one["args"] if flag.partition("=")[0] not in known]

    def test_every_file_named_by_a_flag_is_mounted(self, found: list[Object]) -> None:
        for workload, spec in pod_specs(found).items():
            for one in containers(spec):
                (config,) = [flag.partition("=")[2] for flag in one["args"] if flag.startswith("--config=")]
                assert config in mounted(found, workload, one["name"])

    def test_every_variable_is_read_by_somebody(self, found: list[Object]) -> None:
        sources = "".join(path.read_text() for path in (ROOT / "extender").glob("*.py"))
        for one in ours(found):
            variables = {variable["name"] for variable in one.get("env", [])} - FOR_THE_RUNTIME
            by_flags = {parameter.envvar for parameter in PROGRAMS[one["command"][0]].params}
            assert set() == {name for name in variables - by_flags if f'environ.get("{name}")' not in sources}

    def test_probes_and_services_meet_ports(self, found: list[Object]) -> None:
        for workload in (one for one in found if one["kind"] == "Deployment"):
            template = workload["spec"]["template"]
            ports: dict[str, int] = {}
            for one in containers(template["spec"]):
                own = {entry["name"]: entry["containerPort"] for entry in one["ports"]}
                probed = {probe["httpGet"]["port"] for key, probe in one.items() if key.endswith("Probe")}
                # the scheduler's liveness is the extender's, in the same pod
                assert probed <= own.keys() | ports.keys() | set(ports.values())
                ports |= own
            for service in (one for one in found if one["kind"] == "Service"):
                # which of the replicas binds is a label that it sets itself
                selector = {key: value for key, value in service["spec"]["selector"].items() if key != Names().writer}
                assert selector.items() <= template["metadata"]["labels"].items()
                assert {entry["targetPort"] for entry in service["spec"]["ports"]} <= ports.keys() | set(ports.values())
            assert workload["spec"]["selector"]["matchLabels"] == template["metadata"]["labels"]

    def test_the_extender_serves_on_the_port_that_is_probed(self, layout: str, found: list[Object]) -> None:
        (one,) = [one for one in ours(found) if one["command"] == ["cotenant-extender"]]
        ports = {entry["name"]: entry["containerPort"] for entry in one["ports"]}
        assert port(extender_config(layout).serve) == ports["serve"]
        assert port(extender_config(layout).listen) == ports.get("verbs", 9480)

    def test_the_webhooks_call_the_service(self, found: list[Object]) -> None:
        services = {
            (name, entry["port"]) for name, one in of_kind(found, "Service").items() for entry in one["spec"]["ports"]
        }
        called = [
            webhook["clientConfig"]["service"]
            for one in build(MANIFESTS / "admission" / "webhook")
            for webhook in one["webhooks"]
        ]
        assert {NAMESPACE} == {one["namespace"] for one in called}
        assert {(one["name"], one["port"]) for one in called} <= services


class TestAccounts:
    """Who is who is said in several files, and everywhere the same."""

    def test_the_extenders_account_is_the_one_that_may_write_grants(self, layout: str, found: list[Object]) -> None:
        accounts = of_kind(found, "ServiceAccount")
        user = extender_config(layout).extender_user
        assert user in {
            f"system:serviceaccount:{one['metadata']['namespace']}:{name}" for name, one in accounts.items()
        }
        assert f"'{user}'" in yaml.safe_dump(of_kind(found, "ValidatingAdmissionPolicy")["cotenant-grants"], width=1000)

    def test_the_plugins_account_is_the_one_that_is_held_to_its_node(self, found: list[Object]) -> None:
        name = pod_specs(found)["cotenant-device-plugin"]["serviceAccountName"]
        (condition,) = of_kind(found, "ValidatingAdmissionPolicy")["cotenant-device-plugin"]["spec"]["matchConditions"]
        assert f"'system:serviceaccount:{NAMESPACE}:{name}'" in condition["expression"]

    def test_every_pod_has_an_account_that_exists_and_its_token(self, found: list[Object]) -> None:
        for spec in pod_specs(found).values():
            assert spec["serviceAccountName"] in of_kind(found, "ServiceAccount")
            assert spec["automountServiceAccountToken"] is True

    def test_every_binding_joins_an_account_and_a_role_that_exist(self, found: list[Object]) -> None:
        kubernetes = {"system:kube-scheduler", "system:volume-scheduler", "extension-apiserver-authentication-reader"}
        roles = of_kind(found, "ClusterRole").keys() | of_kind(found, "Role").keys() | kubernetes
        accounts = {(one["metadata"]["namespace"], name) for name, one in of_kind(found, "ServiceAccount").items()}
        for one in (*of_kind(found, "ClusterRoleBinding").values(), *of_kind(found, "RoleBinding").values()):
            assert one["roleRef"]["name"] in roles
            assert {(subject["namespace"], subject["name"]) for subject in one["subjects"]} <= accounts

    def test_no_rule_has_a_wildcard_or_touches_secrets(self, found: list[Object]) -> None:
        for role in (*of_kind(found, "ClusterRole").values(), *of_kind(found, "Role").values()):
            for rule in role["rules"]:
                words = {*rule["apiGroups"], *rule["resources"], *rule["verbs"]}
                assert not words & {"*", "secrets", "escalate", "impersonate", "bind"}

    def test_everything_of_a_namespace_is_in_ours_or_bound_to_kube_systems_role(self, found: list[Object]) -> None:
        spaces = {one["metadata"]["namespace"] for one in found if "namespace" in one["metadata"]}
        assert {NAMESPACE, "kube-system"} >= spaces
        assert NAMESPACE in of_kind(found, "Namespace")
        foreign = [one["kind"] for one in found if one["metadata"].get("namespace") == "kube-system"]
        assert foreign in ([], ["RoleBinding"])


class TestPrivileges:
    """Nothing has more of the node than it needs."""

    def test_the_watchdog_and_the_nodes_processes_come_together(self) -> None:
        plain, watched = (list(build(MANIFESTS / folder)) for folder in ("second-scheduler", "memory-watchdog"))
        for found, interval, sees in ((plain, 0.0, None), (watched, 5.0, True)):
            spec = pod_specs(found)["cotenant-device-plugin"]
            assert sees == spec.get("hostPID")
            said = [one for one in spec["containers"][0]["args"] if one.startswith("--watchdog-interval")]
            (text,) = mounted(found, "cotenant-device-plugin", "device-plugin").values()
            configured = convert(text, DevicePluginConfiguration).watchdog.interval
            assert interval == (float(said[0].partition("=")[2]) if said else configured)
        # nothing else differs
        for found in (plain, watched):
            spec = pod_specs(found)["cotenant-device-plugin"]
            spec.pop("hostPID", None)
            spec["containers"][0]["args"] = spec["containers"][0]["args"][:2]
        assert plain == watched

    def test_no_container_can_gain_privileges(self, found: list[Object]) -> None:
        for spec in pod_specs(found).values():
            assert {"type": "RuntimeDefault"} == spec["securityContext"]["seccompProfile"]
            assert not spec.keys() & {"hostNetwork", "hostPID", "hostIPC"}
            for one in containers(spec):
                context = one["securityContext"]
                assert context["allowPrivilegeEscalation"] is False
                assert context["readOnlyRootFilesystem"] is True
                assert {"drop": ["ALL"]} == context["capabilities"]
                assert "memory" in one["resources"]["requests"]

    def test_only_the_device_plugin_is_root_and_sees_the_host(self, found: list[Object]) -> None:
        for workload, spec in pod_specs(found).items():
            paths = {volume["hostPath"]["path"] for volume in spec["volumes"] if "hostPath" in volume}
            if workload == "cotenant-device-plugin":
                assert {"/var/lib/kubelet/device-plugins", "/var/lib/kubelet/pod-resources"} == paths
            else:
                assert set() == paths
                assert spec["securityContext"]["runAsNonRoot"] is True

    def test_a_rolling_update_never_runs_two_plugins_on_a_node(self, found: list[Object]) -> None:
        strategy = of_kind(found, "DaemonSet")["cotenant-device-plugin"]["spec"]["updateStrategy"]
        assert ("RollingUpdate", 0) == (strategy["type"], strategy["rollingUpdate"]["maxSurge"])

    def test_of_two_extenders_the_api_server_takes_the_word_of_one(self, layout: str, found: list[Object]) -> None:
        (deployment,) = of_kind(found, "Deployment").values()
        assert 2 == deployment["spec"]["replicas"]
        writer = extender_config(layout).writer
        assert writer
        reference = of_kind(found, "ValidatingAdmissionPolicyBinding")["cotenant-writer"]["spec"]["paramRef"]
        assert (writer.namespace, writer.name, "Deny") == (
            reference["namespace"],
            reference["name"],
            reference["parameterNotFoundAction"],
        )
        policy = of_kind(found, "ValidatingAdmissionPolicy")["cotenant-writer"]["spec"]
        assert {Names().granted: "true"} == policy["matchConstraints"]["objectSelector"]["matchLabels"]
        assert f"'{Names().writer}'" in policy["validations"][0]["expression"]
        assert "Fail" == policy["failurePolicy"]

    def test_a_drain_of_many_nodes_leaves_one_of_the_two(self, found: list[Object]) -> None:
        (deployment,) = of_kind(found, "Deployment").values()
        (budget,) = (one["spec"] for one in of_kind(found, "PodDisruptionBudget").values())
        assert deployment["spec"]["selector"] == budget["selector"]
        assert (1, "AlwaysAllow") == (budget["maxUnavailable"], budget["unhealthyPodEvictionPolicy"])

    def test_the_lease_that_the_extender_follows_is_the_one_that_its_kube_scheduler_holds(self) -> None:
        election = scheduler_config("second-scheduler")["leaderElection"]
        writer = extender_config("second-scheduler").writer
        assert writer
        assert f"{election['resourceNamespace']}/{election['resourceName']}" == writer.lease

    def test_the_waits_of_the_longest_take_over_are_below_5_s_together(self) -> None:
        election = scheduler_config("second-scheduler")["leaderElection"]
        lasts, gives_up, looks = (seconds(election[key]) for key in ("leaseDuration", "renewDeadline", "retryPeriod"))
        writer = extender_config("second-scheduler").writer
        own = extender_config("attached").writer
        assert writer
        assert own
        # kube-scheduler looks after 1 to 2.2 periods: so late it sees the last renewal, and again that it has run out
        assert 2.2 * looks + lasts + 2.2 * looks + writer.settle < 5
        # the extender's own election wakes up as the Lease runs out
        assert own.retry_period + own.lease_duration + own.settle < 5
        # kube-scheduler tells renewals of one second from none, and may take the Lease that much earlier
        assert lasts - 1 >= gives_up

    def test_the_verbs_are_served_by_the_extender_that_binds_alone(self) -> None:
        service = of_kind(list(build(MANIFESTS / "attached")), "Service")["cotenant-verbs"]
        assert "true" == service["spec"]["selector"][Names().writer]

    def test_kube_scheduler_starts_after_the_extender_is_ready_and_ends_before_it(self) -> None:
        spec = pod_specs(list(build(MANIFESTS / "second-scheduler")))["cotenant-scheduler"]
        (sidecar,) = spec["initContainers"]
        (scheduler,) = spec["containers"]
        assert (["cotenant-extender"], "Always") == (sidecar["command"], sidecar["restartPolicy"])
        assert "/readyz" == sidecar["startupProbe"]["httpGet"]["path"]
        assert ["kube-scheduler"] == scheduler["command"]


class TestImage:
    """The Dockerfile, which no test can build."""

    def test_it_is_built_by_the_uv_that_wrote_the_lock_file(self) -> None:
        version = re.search(r"^UV_VERSION := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert version
        assert f"uv=={version[1]}\n" in (ROOT / "Dockerfile").read_text()

    def test_every_dependency_has_a_wheel_for_both_architectures(self) -> None:
        lock = tomllib.loads((ROOT / "uv.lock").read_text())
        packages = {package["name"]: package for package in lock["package"]}
        wanted, seen = ["cotenant"], set()
        while wanted:
            name = wanted.pop()
            if name not in seen:
                seen.add(name)
                wanted += [one["name"] for one in packages[name].get("dependencies", [])]
        for name in seen - {"cotenant", "colorama", "tzdata"}:
            wheels = [one["url"].rpartition("/")[2] for one in packages[name].get("wheels", [])]
            for machine in ("x86_64", "aarch64"):
                fitting = [w for w in wheels if w.endswith("any.whl") or ("manylinux" in w and machine in w)]
                assert fitting, (name, machine)

    def test_everything_that_it_copies_exists_and_is_not_ignored(self) -> None:
        copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
        kept = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"}
        names = {name for line in copied for name in line.split()}
        assert names == kept
        assert [] == [name for name in names if not (ROOT / name).exists()]


def test_the_example_pod_asks_for_gpu_memory_in_six_lines_and_names_nothing_else_of_ours() -> None:
    path = MANIFESTS / "examples" / "pod.yaml"
    (pod,) = documents(path)
    assert 6 == len(path.read_text().splitlines())
    assert {"name"} == pod["metadata"].keys()
    assert {"containers"} == pod["spec"].keys()
    (only,) = pod["spec"]["containers"]
    assert {"limits": {Names().gpu_mem: 8}} == only["resources"]


def test_there_is_a_kustomization_in_every_folder_that_people_apply() -> None:
    assert all((root / FILE).is_file() for root in (*ROOTS, MANIFESTS / "base"))


def test_every_example_asks_for_what_could_be_given() -> None:
    found = {}
    for path in sorted((MANIFESTS / "examples").glob("*.yaml")):
        for one in documents(path):
            template = one if one["kind"] == "Pod" else one.get("spec", {}).get("template")
            if template and "nursery" not in path.name:
                metadata = {"namespace": "default", "uid": "u", **template.get("metadata", {}), "name": "p"}
                request = parse(msgspec.convert({**template, "metadata": metadata}, Pod), Names(), GIB)
                found[path.stem] = request and (request.wishes.gpu_count, str(request.wishes.isolation))
    # shares of GPUs are not ours to grant
    assert {
        "mig-low-qps": (1, "none"),
        "mig-shared": (1, "none"),
        "mig-teams": (1, "none"),
        "mps": (1, "limited"),
        "pod": (1, "none"),
        "time-slicing": None,
        "training": (2, "exclusive"),
    } == found


class TestModes:
    """What the folders for MIG, MPS and time slicing say is what the programs take, and gives them what they need."""

    @pytest.mark.parametrize("mode", ["mig", "mps", "time-slicing"])
    def test_only_the_device_plugin_differs_from_the_default(self, mode: str) -> None:
        plain, other = (
            {(one["kind"], one["metadata"]["name"]): one for one in build(MANIFESTS / folder)}
            for folder in ("second-scheduler", mode)
        )
        plugins = {("DaemonSet", "cotenant-device-plugin"), ("ConfigMap", "cotenant-device-plugin-config")}
        assert {key for key, one in plain.items() if other[key] != one} <= plugins
        assert other.keys() - plain.keys() <= {("ConfigMap", "time-slicing-config")}

    def test_nvidias_file_is_taken_without_a_warning_and_is_where_the_plugin_looks(self) -> None:
        found = list(build(MANIFESTS / "time-slicing"))
        (flag,) = [
            one
            for one in pod_specs(found)["cotenant-device-plugin"]["containers"][0]["args"]
            if one.startswith("--nvidia-config=")
        ]
        (text,) = [
            text
            for path, text in mounted(found, "cotenant-device-plugin", "device-plugin").items()
            if path.startswith(f"{flag.partition('=')[2]}/")
        ]
        read = nvidia.read(text)
        assert (8, ()) == (read.rules[0].replicas, read.warnings)

    @pytest.mark.parametrize(
        ("mode", "expected"),
        [("mps", [("memory", "mps")]), ("mig", [("mig-dynamic", "mig")]), ("second-scheduler", [])],
    )
    def test_all_gpus_are_of_the_mode(self, mode: str, expected: list[tuple[str, str]]) -> None:
        (text,) = mounted(list(build(MANIFESTS / mode)), "cotenant-device-plugin", "device-plugin").values()
        assert expected == [(str(r.family), str(r.shared_by)) for r in convert(text, DevicePluginConfiguration).gpus]

    def test_the_plugin_gets_the_folders_that_it_looks_for(self) -> None:
        (nursery,) = documents(MANIFESTS / "examples" / "mps-nursery.yaml")
        found = list(build(MANIFESTS / "mps"))
        settings = MPSSettings(nursery=str(starts_daemons.params[0].default))
        for spec in (nursery["spec"]["template"]["spec"], pod_specs(found)["cotenant-device-plugin"]):
            (plugin,) = spec["containers"]
            on_node = {one["name"]: one["hostPath"]["path"] for one in spec["volumes"] if "hostPath" in one}
            inside = {on_node[m["name"]]: m["mountPath"] for m in plugin["volumeMounts"] if m["name"] in on_node}
            assert {settings.root: settings.root, settings.shm_folder: "/dev/shm"}.items() <= inside.items()
            # each knows the other's processes by their numbers
            assert spec["hostPID"] is True
        assert ["cotenant-mps-nursery"] == nursery["spec"]["template"]["spec"]["containers"][0]["command"]
        assert "OnDelete" == nursery["spec"]["updateStrategy"]["type"]

    def test_the_shared_memory_of_mps_is_a_file_system_of_its_own_that_is_made_once(self, tmp_path: Path) -> None:
        if os.geteuid() != 0:
            pytest.skip("mounting takes root")
        (nursery,) = documents(MANIFESTS / "examples" / "mps-nursery.yaml")
        plugin = pod_specs(list(build(MANIFESTS / "mps")))["cotenant-device-plugin"]
        commands = []
        for spec in (nursery["spec"]["template"]["spec"], plugin):
            (first,) = spec["initContainers"]
            commands.append(first["command"])
            # only a privileged container may have the node see what it mounts
            assert first["securityContext"]["privileged"] is True
            assert ["Bidirectional"] == [mount["mountPropagation"] for mount in first["volumeMounts"]]
        assert commands[0] == commands[1]

        # as both pods do it, at once, where nobody else sees it
        script = tmp_path / "twice.sh"
        one = shlex.join(commands[0])
        script.write_text(
            # where an earlier release's daemons and clients have the folder beneath for theirs, it stays the one
            f"set -e; mount -t tmpfs nothing /run; mkdir -p /run/cotenant/mps/shm\n"
            f"touch /run/cotenant/mps/shm/theirs; {one}\n"
            "ls /run/cotenant/mps/shm; umount /run\n"
            f"mount -t tmpfs nothing /run; mkdir -p /run/cotenant/mps/shm; {one} & {one}; wait; {one}\n"
            "cd /run/cotenant/mps; stat --format=%a shm; findmnt --noheadings --output FSTYPE,OPTIONS $PWD/shm\n"
        )
        done = subprocess.run(["unshare", "--mount", "sh", str(script)], capture_output=True, text=True, check=False)
        if "Operation not permitted" in done.stderr:
            pytest.skip("nothing may be mounted here")
        assert "" == done.stderr
        left, mode, *mounts = done.stdout.splitlines()
        assert "theirs" == left
        assert ("1777", 1) == (mode, len(mounts))
        assert {"tmpfs", "nosuid", "nodev", "noexec"} <= {*re.split("[ ,]+", mounts[0])}

    def test_who_cuts_gpus_writes_where_the_runtime_reads_and_may_cut(self) -> None:
        spec = pod_specs(list(build(MANIFESTS / "mig")))["cotenant-device-plugin"]
        (plugin,) = spec["containers"]
        folder = DevicePluginConfiguration().cdi_directory
        assert folder in {one["hostPath"]["path"] for one in spec["volumes"] if "hostPath" in one}
        assert folder in {one["mountPath"] for one in plugin["volumeMounts"]}
        assert {"drop": ["ALL"], "add": ["SYS_ADMIN"]} == plugin["securityContext"]["capabilities"]
