"""What the manifests say of clusters, nodes and GPUs that our tests do not run on."""

import pytest
import yaml

from cotenant.contract.boards import boards
from cotenant.contract.configuration import DevicePluginConfiguration, GPURule, convert
from cotenant.contract.inventory import Family
from device_plugin.families.rules import assign
from device_plugin.nvml import PhysicalGPU
from e2e.kustomize import MANIFESTS, aims_at, build
from tests.admission import json_patch
from tests.docs.markdown import blocks, section
from tests.manifests.kustomization import documents, mounted, pod_specs

# As NVML says them, of GPUs that NVIDIA's MIG guide lists and whose profiles we do not know.
ALSO_CUT = (
    "A100-PCIE-40GB",
    "NVIDIA A100 80GB PCIe",
    "NVIDIA A100X",
    "NVIDIA A30X",
    "NVIDIA A800-SXM4-80GB",
    "NVIDIA A800 40GB Active",
    "NVIDIA B300 SXM6 AC",
    "NVIDIA GB300",
    "NVIDIA GH200 480GB",
    "NVIDIA H20",
    "NVIDIA H100 PCIe",
    "NVIDIA H200 NVL",
    "NVIDIA H800",
    "NVIDIA RTX PRO 4500 Blackwell",
    "NVIDIA RTX PRO 5000 Blackwell",
    "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition",
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition",
)
NEVER_CUT = (
    "NVIDIA A10",
    "NVIDIA A10G",
    "NVIDIA A16",
    "NVIDIA A2",
    "NVIDIA A40",
    "NVIDIA GeForce RTX 3080",
    "NVIDIA L4",
    "NVIDIA L40S",
    "NVIDIA RTX 6000 Ada Generation",
    "NVIDIA RTX A1000",
    "NVIDIA RTX A1000 6GB Laptop GPU",
    "NVIDIA RTX A3000 Laptop GPU",
    "NVIDIA RTX A3000",
    "NVIDIA RTX A6000",
    "NVIDIA RTX PRO 4000 Blackwell",
    "NVIDIA RTX PRO 5000 Blackwell Generation Laptop GPU",
    "Quadro RTX 6000",
    "Tesla T4",
    "Tesla V100-SXM2-32GB",
)


@pytest.fixture(scope="module")
def rules() -> tuple[GPURule, ...]:
    """The rules of manifests/mig."""
    (text,) = mounted(list(build(MANIFESTS / "mig")), "cotenant-device-plugin", "device-plugin").values()
    return convert(text, DevicePluginConfiguration).gpus


def family(model: str, rules: tuple[GPURule, ...]) -> Family:
    gpu = PhysicalGPU(uuid="GPU-0", index=0, model=model, total_bytes=1, reserved_bytes=0)
    return assign(gpu, rules).family


class TestQuota:
    """Clusters that let nobody without a quota use the priority classes of Kubernetes' own pods, as GKE does."""

    @pytest.mark.parametrize("layout", ["second-scheduler", "attached"])
    def test_every_class_of_our_pods_is_in_a_quota_of_our_namespace(self, layout: str) -> None:
        found = list(build(MANIFESTS / layout))
        (quota,) = (one for one in found if one["kind"] == "ResourceQuota")
        (scope,) = quota["spec"]["scopeSelector"]["matchExpressions"]
        specs = pod_specs([*found, *documents(MANIFESTS / "examples" / "mps-nursery.yaml")])
        assert "cotenant-mps-nursery" in specs
        assert {*scope["values"]} == {spec["priorityClassName"] for spec in specs.values()}
        assert ("PriorityClass", "In") == (scope["scopeName"], scope["operator"])
        assert "cotenant-system" == quota["metadata"]["namespace"]
        # a plugin and a nursery on each of 20,000 nodes, the most that is measured
        assert 40_000 < int(quota["spec"]["hard"]["pods"].replace("k", "000"))


@pytest.mark.parametrize("folder", ["second-scheduler", "attached", "webhook"])
def test_what_pods_and_probes_reach_is_served_by_ipv4_and_by_ipv6(folder: str) -> None:
    given = yaml.safe_load((MANIFESTS / folder / "extender-config.yaml").read_text())
    args = pod_specs(list(build(MANIFESTS / folder)))["cotenant-device-plugin"]["containers"][0]["args"]
    (serve,) = (one.removeprefix("--serve=") for one in args if one.startswith("--serve="))
    reached = {given["serve"], serve, *([given["listen"]] if folder == "attached" else [])}
    assert {"[::]"} == {address.rpartition(":")[0] for address in reached}


def test_no_service_and_no_network_policy_looks_for_a_port_by_a_name_that_a_sidecar_gives_it() -> None:
    # before 1.33 Kubernetes, and network plugins for longer, look for names among the main containers' alone
    for folders in (["second-scheduler", "network-policy"], ["attached"], ["webhook", "network-policy"]):
        found = [one for folder in folders for one in build(MANIFESTS / folder)]
        workloads = [one["spec"]["template"] for one in found if one["kind"] in {"Deployment", "DaemonSet"}]
        for one in found:
            if one["kind"] == "Service":
                selector = one["spec"]["selector"]
                wanted = {entry["targetPort"] for entry in one["spec"]["ports"]}
            elif one["kind"] == "NetworkPolicy":
                selector = one["spec"]["podSelector"]["matchLabels"]
                wanted = {entry["port"] for rule in one["spec"]["ingress"] for entry in rule["ports"]}
            else:
                continue
            named = {
                entry["name"]
                for template in workloads
                if template["metadata"]["labels"]["app.kubernetes.io/component"]
                == selector["app.kubernetes.io/component"]
                for container in template["spec"]["containers"]
                for entry in container["ports"]
            }
            assert set() == {name for name in wanted if isinstance(name, str)} - named, one["metadata"]["name"]


def test_a_kube_scheduler_of_before_1_31_is_asked_where_it_answers() -> None:
    asked = {}
    for folder in ("second-scheduler", "webhook"):
        spec = pod_specs(list(build(MANIFESTS / folder)))["cotenant-scheduler"]
        asked[folder] = spec["containers"][0]["readinessProbe"]["httpGet"]["path"]
    assert {"second-scheduler": "/readyz", "webhook": "/healthz"} == asked


class TestMIG:
    """Which GPUs manifests/mig has cut."""

    @pytest.mark.parametrize("model", sorted({*(board.model for board in boards().values()), *ALSO_CUT}))
    def test_a_gpu_that_can_be_cut_is_cut(self, model: str, rules: tuple[GPURule, ...]) -> None:
        assert Family.MIG_DYNAMIC == family(model, rules)

    @pytest.mark.parametrize("model", NEVER_CUT)
    def test_a_gpu_that_cannot_be_cut_is_shared_by_memory(self, model: str, rules: tuple[GPURule, ...]) -> None:
        assert Family.MEMORY == family(model, rules)


def test_mps_servers_beside_the_plugin_are_not_ended_by_a_memory_limit_that_is_the_plugins() -> None:
    limits = {
        mode: pod_specs(list(build(MANIFESTS / mode)))["cotenant-device-plugin"]["containers"][0]["resources"].get(
            "limits"
        )
        for mode in ("second-scheduler", "mps")
    }
    assert {"second-scheduler": {"memory": "256Mi"}, "mps": None} == limits


def test_the_patch_for_selinux_gives_the_plugin_its_type_and_nothing_else() -> None:
    (text,) = blocks(section("troubleshooting.md", "SELinux"), "yaml")
    (patch,) = yaml.safe_load(text)["patches"]
    (plugin,) = (one for one in build(MANIFESTS / "second-scheduler") if aims_at(patch["target"], one))
    patched = json_patch.apply(plugin, yaml.safe_load(patch["patch"]))
    before, after = (one["spec"]["template"]["spec"]["containers"][0]["securityContext"] for one in (plugin, patched))
    assert before | {"seLinuxOptions": {"type": "container_device_plugin_t"}} == after
