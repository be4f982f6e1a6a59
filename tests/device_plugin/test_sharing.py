"""Which rules are in force: files and labels, read again while the plugin runs, and never from under a pod."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from cotenant.cluster import writes
from cotenant.contract.configuration import ConfigurationError, DevicePluginConfiguration, convert
from cotenant.contract.inventory import Family, Health
from device_plugin.sharing import Rules
from tests.device_plugin.node import NAMES, NODE, Node, container_grant
from tests.device_plugin.test_nvidia_config import ANY

SLICED = ANY
LABEL = NAMES.profile


class Told:
    """Rules of files in a folder, and what was said of them."""

    def __init__(self, folder: Path, config: str = "", nvidia: str = "") -> None:
        self.file = folder / "config.yaml"
        self.file.write_text(config)
        self.said: list[tuple[str, str]] = []
        first = convert(config, DevicePluginConfiguration)
        self.rules = Rules(first, self.file, nvidia, self.tell)

    def tell(self, reason: str, note: str, *, well: bool) -> None:
        del well
        self.said.append((reason, note))

    def families(self, labels: Mapping[str, str] | None = None) -> list[str]:
        return [f"{rule.family}:{rule.replicas}" for rule in self.rules.look(labels or {}).rules]


def config_map(folder: Path, version: int, **files: str) -> None:
    """Lay files out as the kubelet does a ConfigMap: links into a folder that is swapped by another link."""
    data = folder / f"..{version}"
    data.mkdir(parents=True)
    for name, text in files.items():
        (data / name).write_text(text)
        link = folder / name
        if not link.is_symlink():
            link.symlink_to(Path("..data") / name)
    new = folder / "..data_tmp"
    new.symlink_to(data.name)
    new.rename(folder / "..data")


class TestFiles:
    """The text counts, wherever it lies."""

    def test_an_edited_file_is_taken_over_and_said(self, tmp_path: Path) -> None:
        told = Told(tmp_path, "gpus: [{family: replicas, replicas: 2}]")
        assert ["replicas:2"] == told.families()
        told.file.write_text("gpus: [{family: replicas, replicas: 3}]")
        assert ["replicas:3"] == told.families()
        assert ["ConfigurationTaken"] == [reason for reason, _ in told.said]

    def test_a_bad_edit_keeps_the_last_good_one_and_is_said_once(self, tmp_path: Path) -> None:
        told = Told(tmp_path, "gpus: [{family: replicas, replicas: 2}]")
        told.families()
        told.file.write_text("gpus: [{famly: replicas}]")
        assert [["replicas:2"]] * 3 == [told.families() for _ in range(3)]
        ((reason, note),) = told.said
        assert "BadConfiguration" == reason
        assert f"{told.file}: gpus[0].famly: unknown key; the configuration before it stays in force" == note
        # mended, broken again in the same way: said again
        told.file.write_text("gpus: [{family: replicas, replicas: 4}]")
        told.families()
        told.file.write_text("gpus: [{famly: replicas}]")
        told.families()
        assert ["BadConfiguration", "ConfigurationTaken", "BadConfiguration"] == [reason for reason, _ in told.said]

    def test_keys_that_count_from_the_next_start_are_said(self, tmp_path: Path) -> None:
        told = Told(tmp_path, "unit: 1GiB")
        told.families()
        told.file.write_text("unit: 2GiB")
        told.families()
        assert [("ConfigurationWarning", f"{told.file}: unit: counts from the plugin's next start")] == told.said

    def test_a_mounted_config_map_is_followed_through_its_links(self, tmp_path: Path) -> None:
        config_map(tmp_path / "map", 1, any=SLICED)
        told = Told(tmp_path, nvidia=str(tmp_path / "map" / "any"))
        # and NVIDIA's own resource for all that the file does not name
        assert ["replicas:4", "replicas:1"] == told.families()
        config_map(tmp_path / "map", 2, any=SLICED.replace("4", "8"))
        assert ["replicas:8", "replicas:1"] == told.families()

    def test_our_rules_come_before_nvidias_file(self, tmp_path: Path) -> None:
        (tmp_path / "any").write_text(SLICED)
        told = Told(tmp_path, "gpus: [{indices: [0]}]", str(tmp_path / "any"))
        assert ["memory:1", "replicas:4", "replicas:1"] == told.families()


class TestLabels:
    """A label of the node selects a profile of ours, or a file of NVIDIA's folder."""

    PROFILES = "profiles: {dev: [{family: replicas, replicas: 8}], inference: [{mode: mps}]}"

    def test_the_label_selects_a_profile_and_may_change(self, tmp_path: Path) -> None:
        told = Told(tmp_path, self.PROFILES)
        assert [] == told.families()
        assert ["replicas:8"] == told.families({LABEL: "dev"})
        assert ["memory:1"] == told.families({LABEL: "inference"})

    def test_a_label_that_is_no_profile_stops_the_start_and_later_changes_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match="is 'prod', which is no profile; there are: dev, inference"):
            Told(tmp_path, self.PROFILES).families({LABEL: "prod"})
        told = Told(tmp_path, self.PROFILES)
        told.families({LABEL: "dev"})
        assert ["replicas:8"] == told.families({LABEL: "prod"})

    def test_an_edit_that_was_bad_for_the_label_is_forgotten_with_it(self, tmp_path: Path) -> None:
        good = "gpus: [{family: replicas, replicas: 2}]\nprofiles: {dev: [{family: replicas, replicas: 8}]}"
        told = Told(tmp_path, good)
        told.families({LABEL: "dev"})
        told.file.write_text("gpus: [{family: replicas, replicas: 3}]")
        assert ["replicas:8"] == told.families({LABEL: "dev"})
        told.file.write_text(good)
        assert ["replicas:8"] == told.families({LABEL: "dev"})
        assert ["replicas:2"] == told.families()

    def test_a_profile_that_comes_after_its_label_is_taken_beside_nvidias_files(self, tmp_path: Path) -> None:
        config_map(tmp_path / "map", 1, default=SLICED)
        told = Told(tmp_path, self.PROFILES, str(tmp_path / "map"))
        assert ["replicas:4", "replicas:1"] == told.families()
        assert ["replicas:4", "replicas:1"] == told.families({LABEL: "prod"})
        told.file.write_text("profiles: {prod: [{indices: [0]}]}")
        assert ["memory:1", "replicas:4", "replicas:1"] == told.families({LABEL: "prod"})

    def test_nvidias_label_selects_from_nvidias_config_map(self, tmp_path: Path) -> None:
        config_map(tmp_path / "map", 1, **{"tesla-t4": SLICED, "a100-40gb": SLICED.replace("4", "8")})
        told = Told(tmp_path, nvidia=str(tmp_path / "map"))
        assert ["replicas:8", "replicas:1"] == told.families({"nvidia.com/device-plugin.config": "a100-40gb"})
        assert ["replicas:4", "replicas:1"] == told.families({LABEL: "tesla-t4"})

    def test_a_node_without_a_label_has_the_default_or_the_only_file(self, tmp_path: Path) -> None:
        folder = tmp_path / "map"
        config_map(folder, 1, a=SLICED, b=SLICED)
        with pytest.raises(ConfigurationError, match=r"label the node .* there are: a, b"):
            Told(tmp_path, nvidia=str(folder)).families()
        config_map(folder, 2, a=SLICED, default=SLICED.replace("4", "2"))
        assert ["replicas:2", "replicas:1"] == Told(tmp_path, nvidia=str(folder)).families()

    def test_a_label_reaches_no_file_outside_of_the_folder(self, tmp_path: Path) -> None:
        (tmp_path / "secret").write_text(SLICED)
        config_map(tmp_path / "map", 1, a=SLICED)
        with pytest.raises(ConfigurationError, match="has no file for the node's label"):
            Told(tmp_path, nvidia=str(tmp_path / "map")).families({LABEL: "../secret"})


class TestOnANode:
    """A change reaches kubelet and node while the plugin runs."""

    SHARED = "inventoryInterval: 0.05\ngpus: [{indices: [0], family: replicas, replicas: 4}]\n"

    def families(self, node: Node) -> list[str]:
        found = node.published()
        return [str(gpu.family) for gpu in found.gpus] if found else []

    def test_a_gpu_goes_to_another_family_when_its_pods_have_ended(self) -> None:
        with Node(["16GiB"] * 2) as node:
            pod = node.add_pod("p", container_grant(gpus=[0], units=8))
            node.running(pod)
            node.edit(self.SHARED)
            assert node.api.wait_until(lambda: any("stays in family memory" in e["note"] for e in node.api.events()))
            assert ["memory", "memory"] == self.families(node)
            node.kubelet.finish(pod)
            node.wait_published("of two families", lambda i: [str(g.family) for g in i.gpus] == ["replicas", "memory"])
            expected = {"nvidia.com/gpu": 4, NAMES.gpu_mem: 16}
            node.kubelet.wait(lambda: node.kubelet.devices.capacity()[1] == expected, "both resources")

    def test_a_gpu_stays_whose_pod_the_watch_has_not_shown(self) -> None:
        with Node(["16GiB"] * 2) as node:
            node.api.freeze_watches()
            pod = node.add_pod("p", container_grant(gpus=[0], units=8))
            node.kubelet.add(node.api.pod("p") or {})
            node.running(pod)
            node.edit(self.SHARED)
            assert node.api.wait_until(lambda: any("stays in family memory" in e["note"] for e in node.api.events()))
            node.api.freeze_watches(frozen=False)
            node.kubelet.finish(pod)
            node.wait_published("of two families", lambda i: [str(g.family) for g in i.gpus] == ["replicas", "memory"])

    def test_a_bad_edit_is_an_event_of_the_node_and_changes_nothing(self) -> None:
        with Node(["16GiB"] * 2) as node:
            node.edit("gpus: [{family: memroy}]")
            assert node.api.wait_until(lambda: any(e["reason"] == "BadConfiguration" for e in node.api.events()))
            (event,) = [e for e in node.api.events() if e["reason"] == "BadConfiguration"]
            assert "Node" == event["regarding"]["kind"]
            assert "gpus[0].family: unknown value 'memroy'" in event["note"]
            node.kubelet.wait(lambda: node.kubelet.allocatable(NAMES.gpu_mem) == 32, "the units")

    def test_an_edit_that_would_make_too_many_ids_changes_nothing_and_health_is_told_all_the_same(self) -> None:
        with Node(["16GiB"] * 6) as node:
            node.edit("inventoryInterval: 0.05\ngpus: [{family: replicas, replicas: 1000}]")
            assert node.api.wait_until(lambda: any(e["reason"] == "BadConfiguration" for e in node.api.events()))
            node.write_gpus([{"memory": "16GiB", "lost": index == 2} for index in range(6)])
            node.wait_published("unwell", lambda i: [g.health for g in i.gpus].count(Health.UNHEALTHY) == 1)
            node.kubelet.wait(lambda: node.kubelet.allocatable(NAMES.gpu_mem) == 80, "the units of five GPUs")
            assert ["memory"] * 6 == self.families(node)
            node.edit("inventoryInterval: 0.05\ngpus: [{family: replicas, replicas: 10}]")
            node.wait_published("shared", lambda i: all(gpu.family is Family.REPLICAS for gpu in i.gpus))
            assert 1 == [event["reason"] for event in node.api.events()].count("BadConfiguration")

    def test_the_nodes_label_is_read_at_the_start_and_followed(self) -> None:
        profiles = "profiles: {dev: [{family: replicas, replicas: 8}], two: [{family: replicas, replicas: 2}]}"
        with Node(["16GiB"] * 2, config=profiles, plugin=False) as node:
            for label, shares in (("dev", 16), ("two", 4)):
                writes.annotate_node(node._cluster, NODE, {}, labels={LABEL: label})
                if node.plugin is None:
                    node.start_plugin()
                node.kubelet.wait(lambda n=shares: node.kubelet.allocatable("nvidia.com/gpu") == n, f"{shares} shares")  # type: ignore[misc]
            # none of this was ever counted by memory
            node.kubelet.wait(lambda: node.kubelet.allocatable(NAMES.gpu_mem) == 0, "no units to be left")

    def test_a_resource_that_no_gpu_is_in_any_more_is_empty(self) -> None:
        with Node(["16GiB"] * 2, config=self.SHARED.partition("\n")[2]) as node:
            node.kubelet.wait(lambda: node.kubelet.allocatable("nvidia.com/gpu") == 4, "4 shares")
            node.edit("inventoryInterval: 0.05")
            node.kubelet.wait(lambda: node.kubelet.allocatable("nvidia.com/gpu") == 0, "no shares")
            node.kubelet.wait(lambda: node.kubelet.allocatable(NAMES.gpu_mem) == 32, "all by memory")
