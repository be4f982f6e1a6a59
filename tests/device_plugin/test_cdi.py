"""CDI specs of MIG instances: what a container gets of one that has just been made."""

import json
from pathlib import Path
from typing import Any

import pytest

from cotenant.contract.inventory import MIGInstance
from cotenant.contract.names import Names
from device_plugin.cdi import Owner, SpecFolder

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
    specs.write(GPU, HALF, OWNER, nodes=nodes, environment={})
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

    def test_without_the_drivers_number_it_is_left_out_and_said_so(self, tmp_path: Path, devices: Path) -> None:
        devices.write_text("Character devices:\n  1 mem\n")

        assert [] == nodes_of(tmp_path, devices, (CAPABILITY, CAPABILITY))
