"""CDI specs of MIG instances: what a container gets of one that has just been made."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from structlog.testing import capture_logs

from cotenant.contract.inventory import MIGInstance
from cotenant.contract.names import Names
from device_plugin.cdi import CapabilityError, Owner, SpecFolder, device_name

GPU = "GPU-00000000-0000-0000-0000-000000000001"
HALF = MIGInstance(profile="3g.20gb", start=0, size=4)
OWNER = Owner(uid="u", namespace="default", name="p", instance="MIG-1")
CAPABILITY = "/dev/nvidia-caps/nvidia-cap30"
DEVICES = """Character devices:
  1 mem
195 nvidia
240 nvidia-caps-imex-channels
507 nvidia-caps

Block devices:
  8 sd
"""


@pytest.fixture
def devices(tmp_path: Path) -> Path:
    path = tmp_path / "devices"
    path.write_text(DEVICES)
    return path


def nodes_of(folder: Path, devices: Path, *nodes: tuple[str, str]) -> list[dict[str, Any]]:
    specs = SpecFolder(folder / "cdi", Names(), "nvidia.com/gpu", devices=devices)
    specs.write(GPU, HALF, OWNER, nodes=nodes)
    (spec,) = (json.loads(path.read_text()) for path in (folder / "cdi").glob("*.json"))
    found: list[dict[str, Any]] = spec["devices"][0]["containerEdits"].get("deviceNodes", [])
    return found


class TestDeviceNodes:
    """NVML makes no node for a new instance from within the plugin's container."""

    def test_a_capability_without_a_node_on_the_host_is_given_by_its_numbers(
        self, tmp_path: Path, devices: Path
    ) -> None:
        expected = [{"path": CAPABILITY, "type": "c", "major": 507, "minor": 30}]
        assert expected == nodes_of(tmp_path, devices, (CAPABILITY, CAPABILITY))

    def test_a_node_that_the_host_has_is_given_by_its_path(self, tmp_path: Path, devices: Path) -> None:
        there = tmp_path / "nvidia0"
        there.touch()

        expected = [{"path": "/dev/nvidia0", "hostPath": str(there)}]
        assert expected == nodes_of(tmp_path, devices, ("/dev/nvidia0", str(there)))

    def test_without_the_drivers_number_nothing_is_written_and_why_is_said(self, tmp_path: Path, devices: Path) -> None:
        devices.write_text("Character devices:\n  1 mem\n")

        with pytest.raises(CapabilityError, match=r"names no nvidia-caps, .* CUDA would find no device there"):
            nodes_of(tmp_path, devices, (CAPABILITY, CAPABILITY))

        assert [] == list((tmp_path / "cdi").glob("*"))


def driver_spec(folder: Path, library: str, *names: str, kind: str = "nvidia.com/gpu", version: str = "0.5.0") -> None:
    """Write a spec as `nvidia-ctk cdi generate` does."""
    folder.mkdir(exist_ok=True)
    edits = {"env": ["NVIDIA_VISIBLE_DEVICES=void"], "mounts": [{"hostPath": library, "containerPath": library}]}
    devices = [{"name": name, "containerEdits": {}} for name in names]
    text = yaml.safe_dump({"cdiVersion": version, "kind": kind, "devices": devices, "containerEdits": edits})
    (folder / "nvidia.yaml").write_text(text)


def libraries(spec: dict[str, Any]) -> list[str]:
    return [mount["hostPath"] for mount in spec.get("containerEdits", {}).get("mounts", [])]


class Folders:
    """The two folders that runtimes look for specs in, and the specs of ours there."""

    def __init__(self, folder: Path) -> None:
        self.generated, self.etc = folder / "run", folder / "etc"
        self.anew()

    def anew(self) -> None:
        """Start the plugin anew."""
        self.specs = SpecFolder(self.generated, Names(), "nvidia.com/gpu", also=[self.etc])

    def follow(self, *instances: str) -> None:
        """Look at a GPU that has these instances."""
        self.specs.follow({GPU: {uuid: [] for uuid in instances}})

    def ours(self) -> dict[str, dict[str, Any]]:
        found = (json.loads(path.read_text()) for path in self.generated.glob("cotenant-mig-*.json"))
        return {f"{one['kind']}={one['devices'][0]['name']}": one for one in found}

    def made(self) -> dict[str, Any]:
        """Write the spec of an instance that was made for a pod."""
        self.specs.write(GPU, HALF, OWNER, nodes=[])
        return self.ours()[self.specs.full_name(GPU, HALF)]


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return Folders(tmp_path)


class TestTheDriversOwnSpec:
    def test_it_is_found_in_either_folder_and_the_generated_one_wins(self, folders: Folders) -> None:
        assert [] == libraries(folders.made())

        driver_spec(folders.etc, "/lib/old.so")
        assert ["/lib/old.so"] == libraries(folders.made())

        driver_spec(folders.generated, "/lib/new.so")
        assert ["/lib/new.so"] == libraries(folders.made())

    def test_specs_of_other_kinds_and_files_that_cannot_be_read_are_passed_by(self, folders: Folders) -> None:
        driver_spec(folders.etc, "/lib/cuda.so")
        driver_spec(folders.generated, "/lib/net.so", kind="vendor.com/net")
        (folders.generated / "broken.yaml").write_text("kind: [nvidia.com/gpu")

        assert ["/lib/cuda.so"] == libraries(folders.made())

    @pytest.mark.parametrize(
        "text",
        [
            b"kind: [nvidia.com/gpu",
            b"kind: nvidia.com/gpu\nwritten: 2024-13-45",
            "kind: nvidia.com/gpu # für alle".encode("latin-1"),
            b"[" * 10_000,
        ],
        ids=["no YAML", "no date", "no UTF-8", "nested"],
    )
    def test_one_that_cannot_be_read_is_told_of_once_and_the_others_count(self, folders: Folders, text: bytes) -> None:
        driver_spec(folders.etc, "/lib/cuda.so", "MIG-old")
        folders.generated.mkdir()
        (folders.generated / "broken.yaml").write_bytes(text)

        with capture_logs() as logs:
            for _ in range(3):
                folders.follow("MIG-old", "MIG-new")

        assert ["cdi.spec_unreadable"] == [one["event"] for one in logs if one["log_level"] == "warning"]
        assert "cotenant.io/mig=MIG-new" == folders.specs.name_of("MIG-new")

    def test_while_one_cannot_be_read_no_container_is_given_an_instance_without_it(self, folders: Folders) -> None:
        folders.generated.mkdir()
        late = folders.generated / "nvidia.yaml"
        late.symlink_to("/proc/self/mem")  # whose first bytes are an I/O error
        with pytest.raises(OSError, match="Input/output error"):
            folders.made()
        folders.follow("MIG-1")
        assert {} == folders.ours()

        late.unlink()
        driver_spec(folders.generated, "/lib/cuda.so")
        assert ["/lib/cuda.so"] == libraries(folders.made())

    def test_what_is_a_date_to_yaml_is_handed_on_as_it_was_written(self, folders: Folders) -> None:
        driver_spec(folders.etc, "/lib/cuda.so")
        spec = folders.etc / "nvidia.yaml"
        spec.write_text(spec.read_text().replace("- NVIDIA_VISIBLE_DEVICES=void", "- 2024-12-31"))

        assert ["2024-12-31"] == folders.made()["containerEdits"]["env"]

    @pytest.mark.parametrize(
        ("driver", "expected"),
        [("0.5.0", "0.6.0"), ("0.7.0", "0.7.0"), ("0.10.0", "0.10.0"), ("1.0.0", "1.0.0"), ("newest", "0.6.0")],
    )
    def test_what_is_copied_from_it_is_under_a_version_that_has_its_fields(
        self, folders: Folders, driver: str, expected: str
    ) -> None:
        driver_spec(folders.etc, "/lib/cuda.so", version=driver)

        # and never under one that has no annotations, which came with 0.6.0
        assert expected == folders.made()["cdiVersion"]

    def test_what_nvidias_runtime_would_inject_besides_is_nothing(self, folders: Folders) -> None:
        (device,) = folders.made()["devices"]

        assert ["NVIDIA_VISIBLE_DEVICES=void", "COTENANT_MIG_UUID=MIG-1"] == device["containerEdits"]["env"]


class TestInstancesThatSomebodyCut:
    """`nvidia-ctk cdi generate` is not run again for them."""

    def test_one_that_the_drivers_spec_does_not_name_gets_a_spec_and_is_handed_out_by_it(
        self, folders: Folders
    ) -> None:
        driver_spec(folders.etc, "/lib/cuda.so", "GPU-1", "MIG-old")

        folders.specs.follow({GPU: {"MIG-old": [], "MIG-new": [("/dev/nvidia0", "/dev/null")]}})

        assert "nvidia.com/gpu=MIG-old" == folders.specs.name_of("MIG-old")
        assert "nvidia.com/gpu=GPU-1" == folders.specs.name_of("GPU-1")
        assert "cotenant.io/mig=MIG-new" == folders.specs.name_of("MIG-new")
        spec = folders.ours()["cotenant.io/mig=MIG-new"]
        assert ["/lib/cuda.so"] == libraries(spec)
        expected = {
            "env": ["NVIDIA_VISIBLE_DEVICES=void", "COTENANT_MIG_UUID=MIG-new"],
            "deviceNodes": [{"path": "/dev/nvidia0", "hostPath": "/dev/null"}],
        }
        assert expected == spec["devices"][0]["containerEdits"]

    def test_it_goes_with_the_instance(self, folders: Folders) -> None:
        driver_spec(folders.etc, "/lib/cuda.so")
        folders.follow("MIG-a", "MIG-b")
        made = folders.made()

        folders.follow("MIG-b")

        assert "nvidia.com/gpu=MIG-a" == folders.specs.name_of("MIG-a")
        assert {"cotenant.io/mig=MIG-b", f"cotenant.io/mig={made['devices'][0]['name']}"} == {*folders.ours()}

        folders.follow()
        assert [made] == list(folders.ours().values())

    def test_a_container_that_was_given_it_starts_again_after_the_drivers_spec_names_it_and_after_a_reboot(
        self, folders: Folders
    ) -> None:
        """The kubelet keeps Allocate's answer in its checkpoint, and does not ask again."""
        driver_spec(folders.etc, "/lib/cuda.so")
        folders.follow("MIG-a")
        given = folders.specs.name_of("MIG-a")
        assert "cotenant.io/mig=MIG-a" == given

        driver_spec(folders.etc, "/lib/cuda.so", "MIG-a")
        folders.follow("MIG-a")
        assert given in folders.ours()
        # whoever comes now is given what is known without us
        assert "nvidia.com/gpu=MIG-a" == folders.specs.name_of("MIG-a")

        # the folder of generated specs is empty after a reboot
        shutil.rmtree(folders.generated)
        folders.anew()
        folders.follow("MIG-a")
        assert given in folders.ours()

    def test_those_of_a_gpu_that_cannot_be_read_stay_and_are_handed_out_under_their_name(
        self, folders: Folders
    ) -> None:
        driver_spec(folders.etc, "/lib/cuda.so")
        folders.specs.follow({GPU: {"MIG-a": []}, "GPU-other": {"MIG-b": []}})

        for restarted in (False, True):
            if restarted:
                folders.anew()
            folders.follow()

            assert ["cotenant.io/mig=MIG-b"] == [*folders.ours()]
            assert "cotenant.io/mig=MIG-b" == folders.specs.name_of("MIG-b")

        folders.specs.follow({"GPU-other": {}})
        assert {} == folders.ours()

    def test_what_cannot_be_written_is_told_of_once_and_keeps_what_there_was(
        self, folders: Folders, tmp_path: Path
    ) -> None:
        driver_spec(folders.etc, "/lib/cuda.so")
        folders.follow("MIG-a")
        node = (CAPABILITY, str(tmp_path / "none"))
        unlisted = SpecFolder(
            folders.generated, Names(), "nvidia.com/gpu", also=[folders.etc], devices=tmp_path / "none"
        )

        with capture_logs() as logs:
            for _ in range(3):
                unlisted.follow({GPU: {"MIG-a": [node]}})

        assert ["cdi.not_written"] == [one["event"] for one in logs if one["log_level"] == "warning"]
        assert "cotenant.io/mig=MIG-a" == unlisted.name_of("MIG-a")
        assert ["cotenant.io/mig=MIG-a"] == [*folders.ours()]

    def test_what_cannot_be_removed_is_told_of_once_and_tried_again(self, folders: Folders) -> None:
        stuck = folders.generated / f"cotenant-mig-{device_name(GPU, HALF)}.json"
        stuck.mkdir(parents=True)

        with capture_logs() as logs:
            for _ in range(3):
                folders.specs.remove(GPU, HALF)
                folders.specs.remove_others(GPU, [])

        assert ["cdi.not_removed"] == [one["event"] for one in logs]
        stuck.rmdir()
        folders.made()
        folders.specs.remove_others(GPU, [])
        assert {} == folders.ours()

    def test_where_no_spec_of_the_drivers_is_seen_nothing_is_written(self, folders: Folders) -> None:
        folders.follow("MIG-a")

        assert {} == folders.ours()
        assert "nvidia.com/gpu=MIG-a" == folders.specs.name_of("MIG-a")
