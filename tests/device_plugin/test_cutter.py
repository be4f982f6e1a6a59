"""Static geometries that NVML refuses to cut: tried ever more seldom, and told of once."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from device_plugin.cluster.notes import NodeMetadata
from device_plugin.families.cutter import Cutter
from device_plugin.nvml import NVML
from device_plugin.nvml.fake_mig import StateFile
from tests.builders import NAMES

REFUSING = "fail: {nvmlDeviceCreateGpuInstanceWithPlacement: 999}"
FILE = """
version: v1
mig-configs:
  small: [{devices: all, mig-enabled: true, mig-devices: {1g.5gb: 7}}]
  large: [{devices: all, mig-enabled: true, mig-devices: {7g.40gb: 1}}]
"""


@dataclass
class Told:
    """What people see: the label of the node, and Events."""

    state: str = ""
    events: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def label(self, _key: str, text: str) -> None:
        self.state = text

    def about_node(self, reason: str, _action: str, note: str, *, normal: bool) -> None:
        del normal
        self.events.append(reason)
        self.notes.append(note)


class Bench:
    """A GPU, whoever cuts it, and a clock that stands."""

    def __init__(self, folder: Path) -> None:
        self.gpus = folder / "gpus.yaml"
        self.geometries = folder / "geometries.yaml"
        self.geometries.write_text(FILE)
        self.write(REFUSING)
        self.nvml = NVML.open(fake=self.gpus)
        self.told = Told()
        self.now = 1000.0
        self.tries = 0
        # the GPUs that pods hold; None: nobody can tell
        self.held: frozenset[str] | None = frozenset()
        self.cutter = Cutter(
            self.nvml,
            self.geometries,
            NAMES,
            self.told,  # type: ignore[arg-type]
            self.told,  # type: ignore[arg-type]
            pods=list,
            whole=list,
            held=lambda: self.held,
            clock=lambda: self.now,
        )

    def write(self, *more: str) -> None:
        """Have one GPU, or as many as are told what they have besides."""
        each = [f"uuid: GPU-{index}, {text}" for index, text in enumerate(more or ("",))]
        lines = [
            f"- {{model: NVIDIA A100-SXM4-40GB, memory: 40GiB, {'' if 'mig:' in text else 'mig: true, '}{text}}}\n"
            for text in each
        ]
        self.gpus.write_text("gpus:\n" + "".join(lines))

    def ask(self, geometry: str) -> None:
        self.cutter.noticed(NodeMetadata(name="gpu-1", labels={NAMES.mig_config: geometry}))

    def look(self, times: int = 1) -> None:
        """Look at the GPU; count how often it was kept from pods for a cut."""
        for _ in range(times):
            self.cutter.look(self.nvml.gpus())
            self.tries += bool(self.cutter.announced)

    def there(self, index: int = 0) -> list[str]:
        return [one.profile for one in self.nvml.mig_instances(index)]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_a_cut_that_fails_is_tried_ever_more_seldom_and_told_of_once(bench: Bench) -> None:
    bench.ask("small")
    bench.look(50)
    assert 1 == bench.tries
    # after 20 s, 40 more, 80 more
    for seconds, tries in ((19, 1), (1, 2), (39, 2), (1, 3), (79, 3), (1, 4)):
        bench.now += seconds
        bench.look(50)
        assert tries == bench.tries
    assert "failed" == bench.told.state
    assert ["MIGGeometry", "MIGGeometryRefused"] == bench.told.events


def test_it_is_cut_once_that_is_possible(bench: Bench) -> None:
    bench.ask("small")
    bench.look(50)
    bench.write()
    bench.look(50)
    assert [] == bench.there()
    bench.now += 20
    bench.look(3)
    assert ["1g.5gb"] * 7 == bench.there()
    assert "success" == bench.told.state
    assert ["MIGGeometry", "MIGGeometryRefused", "MIGGeometry"] == bench.told.events


def test_an_instance_that_somebody_has_divided_is_cut_anew(bench: Bench) -> None:
    bench.write()
    bench.nvml.create_mig_instance(0, "7g.40gb", 0)
    with StateFile(bench.gpus).change() as changed:
        changed.instances[0].compute_slices = 3
    bench.ask("large")
    bench.look(3)
    assert [("7g.40gb", False)] == [(one.profile, one.divided) for one in bench.nvml.mig_instances(0)]
    assert "success" == bench.told.state


def test_a_gpu_that_tells_its_profiles_with_mig_mode_on_alone_is_switched_on_and_then_cut(bench: Bench) -> None:
    off = "computeCapability: [9, 0], mig: false"
    silent = "fail: {nvmlDeviceGetGpuInstancePossiblePlacements_v2: 3}"  # NOT_SUPPORTED
    bench.write(f"{off}, {silent}")
    bench.ask("small")
    bench.look(2)
    assert [True] == [gpu.mig_enabled for gpu in bench.nvml.gpus()]
    assert "pending" == bench.told.state
    bench.write(off)
    bench.look(2)
    assert ["1g.5gb"] * 7 == bench.there()
    assert "success" == bench.told.state


@pytest.mark.parametrize("change", ["the label", "the file"])
def test_whoever_asks_for_something_else_does_not_wait(bench: Bench, change: str) -> None:
    bench.ask("small")
    bench.look(50)
    bench.write()
    if change == "the label":
        bench.ask("large")
    else:
        bench.geometries.write_text(FILE.replace("{1g.5gb: 7}", "{7g.40gb: 1}"))
    bench.look(3)
    assert ["7g.40gb"] == bench.there()


@pytest.mark.parametrize("text", [None, "# für alle".encode("latin-1")], ids=["none", "no UTF-8"])
def test_a_file_that_cannot_be_read_is_told_of_once_and_followed_when_it_can(bench: Bench, text: bytes | None) -> None:
    bench.write()
    bench.ask("small")
    bench.geometries.unlink()
    if text is not None:
        bench.geometries.write_bytes(text)

    bench.look(3)

    assert "failed" == bench.told.state
    assert ["MIGGeometryRefused"] == bench.told.events
    bench.geometries.write_text(FILE)
    bench.look(3)
    assert "success" == bench.told.state


@pytest.mark.parametrize(
    ("held", "said"),
    [
        (
            frozenset({"GPU-0"}),
            "GPU 0 would have to be cut anew, which pods use: some that only the kubelet knows by now",
        ),
        (None, "which pods use its GPUs cannot be told"),
    ],
)
def test_a_gpu_is_not_cut_before_it_is_known_that_nobody_holds_it(
    bench: Bench, held: frozenset[str] | None, said: str
) -> None:
    bench.write()
    bench.held = held
    bench.ask("small")
    bench.look(3)
    assert (0, []) == (bench.tries, bench.there())
    assert said in bench.told.notes[-1]

    bench.held = frozenset()
    bench.look(3)
    assert ["1g.5gb"] * 7 == bench.there()


def test_a_trouble_after_a_success_is_tried_again_as_soon_as_the_first_was(bench: Bench) -> None:
    bench.ask("small")
    # 20 s, 40 more, and a wait of 80 that the success ends
    for seconds in (0, 20, 40):
        bench.now += seconds
        bench.look(2)
    bench.write()
    bench.now += 80
    bench.look(3)
    assert "success" == bench.told.state

    # a person destroys what was made
    for one in bench.nvml.mig_instances(0):
        bench.nvml.destroy_mig_instance(0, one)
    bench.write(REFUSING)
    bench.look(2)
    bench.write()
    bench.now += 20
    bench.look(3)
    assert ["1g.5gb"] * 7 == bench.there()


@pytest.mark.parametrize("refusing", [REFUSING, "fail: {nvmlDeviceGetGpuInstances: 999}"], ids=["cut", "read"])
def test_a_gpu_that_cannot_be_cut_keeps_no_other_from_it(bench: Bench, refusing: str) -> None:
    bench.write(refusing, "")
    bench.ask("small")
    bench.look(3)
    assert ["1g.5gb"] * 7 == bench.there(1)
    assert "failed" == bench.told.state

    bench.write("", "")
    bench.now += 20
    bench.look(3)
    assert ["1g.5gb"] * 7 == bench.there(0)
    assert "success" == bench.told.state


def test_gpus_that_nobody_uses_are_cut_while_pods_use_another(bench: Bench) -> None:
    bench.write("", "", REFUSING)
    bench.held = frozenset({"GPU-0"})
    bench.ask("small")
    bench.look(3)
    assert [0, 7, 0] == [len(bench.there(index)) for index in range(3)]
    assert "failed" == bench.told.state
    assert "GPU 0 would have to be cut anew, which pods use" in bench.told.notes[-1]
    assert "of GPU 2: NVML says" in bench.told.notes[-1]

    # and is not kept waiting by the one that NVML refuses to cut
    bench.held = frozenset()
    bench.look(3)
    assert [7, 7, 0] == [len(bench.there(index)) for index in range(3)]
