"""The pages say what the code does."""

import ast
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest
import yaml
from click.testing import CliRunner

from cotenant.cli.main import main as cotenant
from cotenant.contract import grant as grants
from cotenant.contract import inventory as inventories
from cotenant.contract.boards import board, boards
from cotenant.contract.configuration import DevicePluginConfiguration, ExtenderConfiguration, MPSSettings, convert
from cotenant.contract.environment import INJECTED, informative, injected
from cotenant.contract.grant import ContainerGrant, Isolation
from cotenant.contract.health import KNOWN_XIDS, HealthSettings, Severity, XIDs
from cotenant.contract.inventory import GPU, Family, Inventory
from cotenant.contract.mig_parted import CutGPU, parse, plan
from cotenant.contract.names import ALIASES_IN_GIB, ALIASES_IN_MIB, Names
from cotenant.contract.overuse import WatchdogSettings
from cotenant.contract.reasons import Reason
from cotenant.contract.request import MAX_GPUS
from cotenant.contract.units import GIB
from device_plugin.admission.ids import MAX_IDS
from device_plugin.coexistence.watch import ForeignCollector
from device_plugin.main import main as device_plugin
from device_plugin.metrics import Metrics, Snapshot
from device_plugin.nvml import NVML
from device_plugin.watchdog.usage import Account
from device_plugin.watchdog.watch import UsageCollector
from e2e.kustomize import build
from extender.main import main as extender
from extender.policies import POLICIES
from tests.docs.markdown import DOCS, blocks, section, tables

NAMES = Names()
ROOT = DOCS.parent


def test_how_many_pods_go_on_a_gpu_is_what_boards_and_units_say() -> None:
    clients = 48
    rows = tables(section("isolation.md", "How many go on one GPU"))[0]
    for name in ("A100-SXM4-80GB", "H100-SXM5-80GB"):
        profiles = [one.profile for one in board(name).profiles if "+" not in one.name]
        usable = max(one.bytes for one in profiles) // GIB
        for asks, *told in rows:
            units = int(asks.removesuffix(" GiB"))
            cut = max((one for one in profiles if one.bytes >= units * GIB), key=lambda one: one.max_instances)
            mig = f"{cut.max_instances} of {cut.name}, {cut.compute_slices}/7 each"
            assert [str(usable // units), str(min(clients, usable // units)), mig, "1"] == told


def first_column(rows: list[list[str]]) -> list[str]:
    return [row[0] for row in rows]


def encoded_names(kind: type[msgspec.Struct]) -> list[str]:
    return [field.encode_name for field in msgspec.structs.fields(kind)]


# Words in the modules that write Events which are no reasons: actions, kinds, types, and others' words.
NO_REASONS = {"Coexistence", "Configure", "HealthCheck", "MemoryWatch", "Never", "Node", "Normal", "Pod", "Warning"}


def events() -> set[str]:
    """Name the reasons that stand as words in the code: in the modules that write an Event, or have one written."""
    found: set[str] = set()
    for path in (*(ROOT / "extender").rglob("*.py"), *(ROOT / "device_plugin").rglob("*.py")):
        tree = [*ast.walk(ast.parse(path.read_text()))]
        called = {one.func.attr for one in tree if isinstance(one, ast.Call) and isinstance(one.func, ast.Attribute)}
        if called & {"about_node", "about_pod", "_tell", "_say_once", "_tell_configuration"}:
            words = (one.value for one in tree if isinstance(one, ast.Constant) and isinstance(one.value, str))
            found |= {word for word in words if re.fullmatch("[A-Z]+[a-z][A-Za-z]*", word)}
    return found - NO_REASONS


class TestContract:
    """docs/contract.md."""

    def test_the_grants_are_ones_that_the_extender_could_have_written(self) -> None:
        examples = blocks(section("contract.md", "The grant"), "json")
        assert 2 == len(examples)
        for text in examples:
            assert text.strip() == grants.encode(grants.decode(text))

    def test_the_inventory_is_one_that_a_device_plugin_could_have_written(self) -> None:
        (text,) = blocks(section("contract.md", "The inventory"), "json")
        assert text.strip() == inventories.encode(inventories.decode(text))

    def test_every_field_of_the_grant_is_explained(self) -> None:
        (rows,) = tables(section("contract.md", "The grant"))
        assert encoded_names(ContainerGrant) == first_column(rows)

    def test_every_field_of_the_inventory_is_explained(self) -> None:
        node, gpu = tables(section("contract.md", "The inventory"))
        assert encoded_names(Inventory) == first_column(node)
        assert encoded_names(GPU) == first_column(gpu)

    def test_the_resources_and_their_aliases_are_all_there_are(self) -> None:
        ours, others = tables(section("contract.md", "What a pod asks"))
        assert [NAMES.gpu_mem, NAMES.managed] == first_column(ours)
        units = dict.fromkeys(ALIASES_IN_GIB, "GiB") | dict.fromkeys(ALIASES_IN_MIB, "MiB")
        assert units == {row[0]: row[1] for row in others}

    def test_the_wishes_are_all_there_are(self) -> None:
        (rows,) = tables(section("contract.md", "What a pod wishes"))
        values = {row[0]: row[1] for row in rows}
        wishes = {
            NAMES.policy,
            NAMES.isolation,
            NAMES.gpu_model,
            NAMES.gpu_uuid,
            NAMES.gpu_count,
            NAMES.compute_percent,
        }
        assert wishes == values.keys()
        assert ", ".join(Isolation) == values[NAMES.isolation]
        assert f"1 to {MAX_GPUS}" == values[NAMES.gpu_count]

    def test_the_variables_and_their_annotations_are_all_there_are(self) -> None:
        from_annotations, from_plugin = tables(section("contract.md", "What a container gets"))
        (example, _) = blocks(section("contract.md", "The grant"), "json")
        (container,) = grants.decode(example).containers
        annotations = [
            name("<container>") for name in (NAMES.visible_devices, NAMES.mps_memory, NAMES.mps_threads, NAMES.mps_pipe)
        ]
        assert list(zip(INJECTED, annotations, strict=True)) == [(row[0], row[1]) for row in from_annotations]
        assert [*injected(container)] == first_column(from_annotations)
        assert [*informative(container)] == first_column(from_plugin)

    def test_every_reason_stands_there_with_its_sentence(self) -> None:
        (rows,) = tables(section("contract.md", "Reasons"))
        assert [[str(reason), reason.sentence] for reason in Reason] == rows

    def test_every_event_stands_there(self) -> None:
        (rows,) = tables(section("contract.md", "Events"))
        assert sorted(events()) == sorted(first_column(rows))


class TestConfiguration:
    """docs/configuration.md."""

    @pytest.mark.parametrize(
        ("program", "kind"),
        [("cotenant-extender", ExtenderConfiguration), ("cotenant-device-plugin", DevicePluginConfiguration)],
    )
    def test_every_key_stands_there_with_its_default(self, program: str, kind: type[msgspec.Struct]) -> None:
        (rows,) = tables(section("configuration.md", program))
        defaults = msgspec.to_builtins(kind())
        assert list(defaults) == first_column(rows)
        assert [shown(value) for value in defaults.values()] == [row[1] for row in rows]

    @pytest.mark.parametrize(
        ("page", "part", "kind"),
        [
            ("configuration.md", "Pools of nodes", ExtenderConfiguration),
            ("configuration.md", "Pods that are expected", ExtenderConfiguration),
            ("configuration.md", "Rules for GPUs", DevicePluginConfiguration),
            ("mig.md", "Shares of instances", DevicePluginConfiguration),
            ("modes.md", "Counting GPUs", DevicePluginConfiguration),
            ("tenants.md", "Limits of namespaces", ExtenderConfiguration),
        ],
    )
    def test_an_example_of_a_configuration_is_one(self, page: str, part: str, kind: type[msgspec.Struct]) -> None:
        (text,) = blocks(section(page, part), "yaml")
        assert kind() != convert(text, kind)

    @pytest.mark.parametrize(
        ("part", "kind"),
        [
            ("MPS daemons", MPSSettings),
            ("Health of GPUs", HealthSettings),
            ("Memory watchdog", WatchdogSettings),
        ],
    )
    def test_every_key_of_a_part_stands_there_with_its_default(self, part: str, kind: type[msgspec.Struct]) -> None:
        (rows,) = tables(section("configuration.md", part))
        defaults = msgspec.to_builtins(kind())
        assert [(key, shown(value)) for key, value in defaults.items()] == [(row[0], row[1]) for row in rows]

    @pytest.mark.parametrize(
        ("program", "command"), [("cotenant-extender", extender), ("cotenant-device-plugin", device_plugin)]
    )
    def test_every_flag_stands_there(self, program: str, command: click.Command) -> None:
        sentence = re.search(
            r"^Flags: .*?\n\n", section("configuration.md", program) + "\n\n", re.MULTILINE | re.DOTALL
        )
        assert sentence
        flags = {flag for parameter in command.params for flag in parameter.opts if flag.startswith("--")}
        assert flags - {"--version"} == set(re.findall(r"--[a-z-]+", sentence[0]))

    @pytest.mark.parametrize(
        ("what", "text"),
        [
            ("domain", "cotenant.io"),
            ("MIG's prefix, migDomain", "nvidia.com/mig-"),
            ("unit", str(GIB)),
            ("the extender's user", ExtenderConfiguration().extender_user),
        ],
    )
    def test_whoever_changes_what_stands_in_several_places_is_told_of_all(self, what: str, text: str) -> None:
        (rows,) = tables(section("configuration.md", "What stands in several places"))
        (places,) = (row[1].split(", ") for row in rows if row[0] == what)
        having = {
            path.relative_to(ROOT)
            for path in (ROOT / "manifests").rglob("*.yaml")
            for line in path.read_text().splitlines()
            if text in line.partition("#")[0]
        }
        missing = {
            str(path)
            for path in having
            # the two programs' configurations have a word of their own, and nobody changes the examples' by it
            if not path.match("*/extender-config.yaml")
            and not path.match("*/device-plugin-config.yaml")
            and path.parts[1] not in {"examples", "monitoring"}
            and not any(one.match(place) for one in (path, *path.parents) for place in places)
        }
        assert having
        assert set() == missing

    def test_every_policy_is_explained(self) -> None:
        (rows,) = tables(section("configuration.md", "cotenant-extender"))
        (meaning,) = [row[2] for row in rows if row[0] == "policy"]
        assert [] == [name for name in POLICIES if name not in meaning]


def shown(value: Any) -> str:
    """Write a default as the page does."""
    if value in (None, (), {}, ""):
        return "none"
    if isinstance(value, dict):
        return "below"  # in a section of its own
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


class TestInstall:
    """docs/install.md."""

    def test_its_kustomization_names_the_image_that_the_manifests_run(self) -> None:
        (text,) = blocks(section("install.md", "By kustomize"), "yaml")
        (image,) = yaml.safe_load(text)["images"]
        manifest = (ROOT / "manifests" / "base" / "device-plugin.yaml").read_text()
        assert f"image: {image['name']}:{image['newTag']}" in manifest

    @pytest.mark.parametrize(("patched", "replicas"), [(False, 2), (True, 1)], ids=["from 1.32 on", "before 1.30"])
    def test_its_kustomization_for_older_clusters_names_every_image_and_before_1_30_has_one_replica_and_no_policies(
        self, tmp_path: Path, *, patched: bool, replicas: int
    ) -> None:
        text, patches = blocks(section("install.md", "Before Kubernetes 1.36"), "yaml")
        (tmp_path / "kustomization.yaml").write_text(text.replace("PATH", str(ROOT)) + patches * patched)
        built = [*build(tmp_path)]
        pods = [one["spec"]["template"]["spec"] for one in built if one["kind"] in {"Deployment", "DaemonSet"}]
        run = {
            container["image"].rpartition(":")[0]
            for pod in pods
            for container in (*pod["containers"], *pod.get("initContainers", []))
        }
        assert run == {image["name"] for image in yaml.safe_load(text)["images"]}
        assert patched is not any("AdmissionPolicy" in one["kind"] for one in built)
        assert [replicas] == [one["spec"]["replicas"] for one in built if one["kind"] == "Deployment"]

    def test_what_is_taken_off_a_node_is_all_that_the_plugin_and_administrators_note_there(self) -> None:
        labels, annotations = blocks(section("install.md", "Removing it"), "sh")[-1].splitlines()
        assert {NAMES.profile, NAMES.vgpu_licensed, "cotenant.io/device-plugin"} == taken_off(labels)
        notes = {NAMES.inventory, NAMES.used, NAMES.overusers, NAMES.gpu_faults, NAMES.gpu_cordon}
        assert notes == taken_off(annotations)
        (policy,) = (one for one in build(ROOT / "manifests" / "base") if one["kind"] == "ValidatingAdmissionPolicy")
        written = set(re.findall(r"'(cotenant\.io/[\w./-]+)'", yaml.safe_dump(policy["spec"]["variables"], width=1000)))
        assert written <= taken_off(labels) | taken_off(annotations)

    def test_it_names_the_kube_scheduler_that_is_shipped(self) -> None:
        manifest = (ROOT / "manifests" / "second-scheduler" / "scheduler.yaml").read_text()
        (version,) = re.findall(r"image: \S*/kube-scheduler:(\S+)", manifest)
        assert f"`scheduler.yaml`, {version} as shipped" in section("install.md", "By kustomize")


class TestUseCases:
    """docs/use-cases.md."""

    @pytest.mark.parametrize("mode", ["mps", "mig", "time-slicing"])
    def test_before_1_36_the_plugin_is_given_what_the_folder_of_the_mode_gives_it(
        self, tmp_path: Path, mode: str
    ) -> None:
        (text,) = blocks(section("use-cases.md", "Before Kubernetes 1.36"), "yaml")
        kustomization = yaml.safe_load(text.replace("PATH", str(ROOT)))
        if mode == "time-slicing":  # as the sentence below it says
            del kustomization["configMapGenerator"]
            kustomization["resources"].append("time-slicing-config.yaml")
            kustomization["components"] = [str(ROOT / "manifests" / "components" / "nvidia-config")]
        copied = "time-slicing-config.yaml" if mode == "time-slicing" else "device-plugin-config.yaml"
        (tmp_path / copied).write_text((ROOT / "manifests" / mode / copied).read_text())
        (tmp_path / "kustomization.yaml").write_text(
            yaml.safe_dump(kustomization).replace("components/mps", f"components/{mode}")
        )

        def of_the_plugin(folder: Path) -> list[Any]:
            return [
                one
                for one in build(folder)
                if one["kind"] == "DaemonSet"
                or one["metadata"]["name"] in {"cotenant-device-plugin-config", "time-slicing-config"}
            ]

        built = of_the_plugin(tmp_path)
        assert 3 - (mode != "time-slicing") == len(built)
        assert of_the_plugin(ROOT / "manifests" / mode) == built
        assert any("Webhook" in one["kind"] for one in build(tmp_path))


def taken_off(command: str) -> set[str]:
    """Name the labels or annotations that a command takes away."""
    return {word.removesuffix("-") for word in command.split() if word.endswith("-")}


class TestMIG:
    """docs/mig.md."""

    def test_its_commands_print_what_it_shows(self) -> None:
        shown = blocks((DOCS / "mig.md").read_text(), "console")
        assert 4 == len(shown)
        for block in shown:
            command, output = block.split("\n", 1)
            assert command.startswith("$ cotenant ")
            assert output == CliRunner().invoke(cotenant, shlex.split(command)[2:]).output

    def test_the_profiles_of_the_examples_are_of_an_a100_of_40_gb_and_the_others_of_80_gb(self) -> None:
        with_profile = {
            profile: {name for name, one in boards().items() if profile in {each.name for each in one.profiles}}
            for profile in ("1g.5gb", "3g.20gb", "1g.10gb", "3g.40gb")
        }
        assert {"A100-SXM4-40GB"} == with_profile["1g.5gb"] == with_profile["3g.20gb"]
        assert {"A100-SXM4-80GB", "H100-SXM5-80GB"} == with_profile["3g.40gb"]
        assert with_profile["3g.40gb"] <= with_profile["1g.10gb"]

    def test_its_rules_are_a_configuration(self) -> None:
        (text,) = blocks(section("mig.md", "Which GPUs"), "yaml")
        families = [rule.family for rule in convert(text, DevicePluginConfiguration).gpus]
        assert [Family.MIG_STATIC, Family.MIG_DYNAMIC] == families

    def test_its_geometries_are_what_the_text_says(self) -> None:
        (text,) = blocks(section("mig.md", "Cutting GPUs by a label"), "yaml")
        geometry = board("A100-SXM4-40GB").geometry
        gpu = CutGPU(uuid="GPU-0", index=0, device_id=0x20B010DE, geometry=geometry)
        for name, profiles in (("one-large", 3), ("mixed", 3)):
            assert profiles == len(plan(parse(text), name, [gpu])["GPU-0"].instances)

    def test_its_file_of_made_up_gpus_is_one(self, tmp_path: Path) -> None:
        (text,) = blocks(section("mig.md", "How a GPU is cut"), "yaml")
        (tmp_path / "gpus.yaml").write_text(text)
        nvml = NVML.open(fake=tmp_path / "gpus.yaml")
        assert [7, 7, 5] == [len(nvml.mig_profiles(gpu.index)) for gpu in nvml.gpus()]


class TestHealth:
    """docs/health.md."""

    def test_every_class_of_xids_stands_there_with_its_numbers(self) -> None:
        classes, _ = tables(section("health.md", "XIDs"))
        numbers = {row[0]: row[1] for row in classes}
        assert [*Severity] == [*numbers]
        for severity in Severity:
            known = sorted(xid for xid, one in KNOWN_XIDS.items() if one.severity is severity)
            others = "all others" if XIDs().others is severity else ""
            assert ", ".join(map(str, known)) or others == numbers[severity]

    def test_every_xid_of_the_table_is_explained(self) -> None:
        _, explained = tables(section("health.md", "XIDs"))
        known = [[str(xid), str(one.severity), one.words] for xid, one in sorted(KNOWN_XIDS.items())]
        assert known == explained

    def test_its_configuration_and_its_made_up_gpus_are_ones(self, tmp_path: Path) -> None:
        configuration, gpus = blocks((DOCS / "health.md").read_text(), "yaml")
        convert(configuration, DevicePluginConfiguration)
        (tmp_path / "gpus.yaml").write_text(gpus)
        assert NVML.open(fake=tmp_path / "gpus.yaml").gpus()

    def test_every_metric_of_the_plugin_stands_there(self) -> None:
        (rows,) = tables(section("health.md", "Metrics"))
        metrics = Metrics("n", lambda: Snapshot([], {}, {}))
        metrics.add(UsageCollector("n", Account, dict))
        metrics.add(ForeignCollector("n", tuple))
        names = re.findall(r"^# TYPE (\S+) ", metrics.expose().decode(), re.MULTILINE)
        assert sorted(first_column(rows)) == sorted(name for name in names if not name.endswith("_created"))

    def test_its_annotations_are_ours(self) -> None:
        named = set(re.findall(r"(cotenant\.io/[a-z-]+)", (DOCS / "health.md").read_text()))
        ours = {NAMES.gpu_cordon, NAMES.gpu_faults, NAMES.inventory, NAMES.vgpu_licensed, NAMES.overuse}
        assert ours <= named


def test_every_no_of_filter_and_bind_has_a_row_that_says_what_to_do() -> None:
    rows, *_ = tables(section("troubleshooting.md", "The pod is pending"))
    every = list(Reason)
    of_extender = {reason.sentence for reason in every[: every.index(Reason.NO_GRANT)]}
    assert set() == of_extender - {*first_column(rows)}


class TestLimits:
    """docs/limits.md."""

    def test_the_limit_of_ids_is_the_one_that_the_plugin_holds(self) -> None:
        assert f"At most {MAX_IDS:,} device ids per node" in (DOCS / "limits.md").read_text()


def test_on_the_site_a_link_to_a_page_leads_to_it_and_one_out_of_docs_to_the_repository() -> None:
    conf = runpy.run_path(str(DOCS / "conf.py"))
    text = ["[a](../contract.md#reasons) [b](../../manifests/examples/mps.yaml) [c](index.md)"]
    conf["_read"](None, "moving-in/index", text)
    there = f"{conf['REPOSITORY']}manifests/examples/mps.yaml"
    assert [f"[a](../contract.md#reasons) [b]({there}) [c](index.md)"] == text


def test_the_site_shows_help_as_the_command_itself_does() -> None:
    # in a process of its own: click keeps the help option that a command was first asked with
    write = (
        "import runpy; conf = runpy.run_path('docs/conf.py'); "
        "print(*conf['_command']('cotenant', conf['cotenant']), sep='\\n')"
    )
    shown = subprocess.run([sys.executable, "-c", write], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for arguments in (["--help"], ["inspect", "pods", "--help"]):
        said = CliRunner().invoke(cotenant, arguments, prog_name="cotenant", terminal_width=78).output
        assert said.strip() in shown


def test_every_page_stands_in_the_index_where_people_see_it_and_where_the_site_reads_it() -> None:
    text = (DOCS / "index.md").read_text()
    pages = {str(page.relative_to(DOCS).with_suffix("")) for page in (*DOCS.glob("*.md"), *DOCS.glob("*/index.md"))}
    assert pages - {"index"} == set(re.findall(r"\]\(([\w/-]+)\.md\)", text))
    assert pages - {"index"} <= set(re.findall(r"^([a-z][\w/-]*)$", text, re.MULTILINE))


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: str(page.name))
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    named = re.findall(r"(?<![\w/.])(?:manifests|docs|tests|e2e)/[\w./*-]*\w", page.read_text())
    assert [] == [name for name in named if not list(ROOT.glob(name))]
