"""What is read of GPUs that MIG partitions, where one of them cannot be read for now."""

from pathlib import Path

import pytest
from structlog.testing import capture_logs

from cotenant.contract.configuration import MIGStrategy
from cotenant.contract.inventory import MIG, Family, MIGInstance
from device_plugin.families.partitions import Partitions
from device_plugin.families.rules import Assigned
from device_plugin.nvml import NVML, PhysicalGPU
from device_plugin.nvml.fake_mig import StateFile
from tests.builders import NAMES

# UNKNOWN
UNREADABLE = "fail: {nvmlDeviceGetMigDeviceHandleByIndex: 999}"


class Bench:
    """Two GPUs with an instance each."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "gpus.yaml"
        self.write()
        self.nvml = NVML.open(fake=self.file)
        for gpu in (0, 1):
            self.nvml.create_mig_instance(gpu, "1g.5gb", 0)
        self.strategy = MIGStrategy.MIXED
        self.partitions = Partitions(
            self.nvml, lambda _: Assigned(family=Family.MIG_STATIC), lambda: self.strategy, NAMES
        )

    def write(self, trouble: str = "") -> None:
        """Have GPU 0 be in *trouble*."""
        gpus = (
            f"{{model: NVIDIA A100-SXM4-40GB, memory: 40GiB, uuid: GPU-{index}, mig: true, {more}}}"
            for index, more in enumerate((trouble, ""))
        )
        self.file.write_text(f"gpus: [{', '.join(gpus)}]")

    def read(self) -> dict[str, int]:
        """Count the instances of each GPU that was read."""
        return {gpu: len(there) for gpu, there in self.partitions.nodes(self.nvml.gpus()).items()}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.mark.parametrize("trouble", ["lost: true", UNREADABLE])
def test_a_gpu_that_cannot_be_read_is_not_said_to_have_no_instances(bench: Bench, trouble: str) -> None:
    assert {"GPU-0": 1, "GPU-1": 1} == bench.read()

    bench.write(trouble)
    assert {"GPU-1": 1} == bench.read()

    bench.write()
    for one in bench.nvml.mig_instances(0):
        bench.nvml.destroy_mig_instance(0, one)
    assert {"GPU-0": 0, "GPU-1": 1} == bench.read()


def test_an_instance_that_somebody_has_divided_is_not_offered_and_that_is_said_once(bench: Bench) -> None:
    with StateFile(bench.file).change() as changed:
        changed.instances[0].profile_id, changed.instances[0].compute_slices = 9, 1  # 1c.3g.20gb

    with capture_logs() as logs:
        cut = [bench.partitions.look(bench.nvml.gpus(), {}) for _ in range(2)]

    assert [(0, 1), (0, 1)] == [(len(one["GPU-0"].instances), len(one["GPU-1"].instances)) for one in cut]
    (said,) = logs
    assert "compute instances do not take all of 3g.20gb at 0: nvidia-smi mig -i 0 -dci" in said["error"]


@pytest.mark.parametrize(
    ("cuts", "misfits"),
    [
        (["1g.5gb", "1g.5gb 1g.5gb"], []),
        (["1g.5gb", "2g.10gb", "2g.10gb"], ["GPU-0"]),
        (["1g.5gb", "2g.10gb"], ["GPU-1"]),  # one each: that of the first counts
        (["1g.5gb 2g.10gb", "2g.10gb"], ["GPU-0"]),  # one with both has no say
        (["", "2g.10gb"], ["GPU-0"]),
        (["", ""], ["GPU-0", "GPU-1"]),
    ],
)
def test_under_single_gpus_are_misfits_that_are_not_cut_as_most_are(
    bench: Bench, cuts: list[str], misfits: list[str]
) -> None:
    gpus = [
        PhysicalGPU(uuid=f"GPU-{index}", index=index, model="A", total_bytes=1, reserved_bytes=0)
        for index in range(len(cuts))
    ]
    found = {
        gpu.uuid: MIG(instances=tuple(MIGInstance(profile=name, start=0, size=1) for name in profiles.split()))
        for gpu, profiles in zip(gpus, cuts, strict=True)
    }
    assert [] == [*bench.partitions.misfits(gpus, found)]
    bench.strategy = MIGStrategy.SINGLE
    assert misfits == [*bench.partitions.misfits(gpus, found)]


def test_why_it_cannot_be_read_is_logged_once_until_it_could(bench: Bench) -> None:
    with capture_logs() as logs:
        for trouble in (UNREADABLE, UNREADABLE, "", UNREADABLE):
            bench.write(trouble)
            bench.read()

    assert ["mig.not_read"] * 2 == [one["event"] for one in logs]
