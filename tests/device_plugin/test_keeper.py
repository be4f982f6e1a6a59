"""What is kept of every GPU's health."""

import pytest

from cotenant.contract.configuration import GPURule
from cotenant.contract.health import FaultRecord, FaultRecords, HealthSettings, Severity, XIDs
from cotenant.contract.inventory import Family, Health, MIGInstance
from cotenant.contract.units import GIB
from device_plugin.families.rules import assign
from device_plugin.health.keeper import HealthKeeper
from device_plugin.inventory import Daemon, describe
from device_plugin.nvml import GPUEvent, PhysicalGPU, Recovery, Vitals


class Clock:
    """A clock that stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def gpu(
    uuid: str = "GPU-1", *, fault: str = "", virtualization: int = 0, mig: bool = False, **vitals: object
) -> PhysicalGPU:
    return PhysicalGPU(
        uuid=uuid,
        index=0,
        model="A",
        total_bytes=8 * GIB,
        reserved_bytes=0,
        mig_enabled=mig,
        virtualization=virtualization,
        vitals=Vitals(**vitals),  # type: ignore[arg-type]
        fault=fault,
    )


def instance(uuid: str = "MIG-3") -> MIGInstance:
    return MIGInstance(profile="1g.5gb", start=3, size=1, uuid=uuid)


def keeper(**settings: object) -> HealthKeeper:
    return HealthKeeper(HealthSettings(clean_probes=2, **settings), boot="b")  # type: ignore[arg-type]


def looked(kept: HealthKeeper, *gpus: PhysicalGPU, times: int = 1) -> None:
    for _ in range(times):
        kept.looked(gpus or (gpu(),))


def test_a_transient_xid_of_a_mig_instance_is_that_instances_alone() -> None:
    kept = keeper()
    looked(kept, gpu(mig=True))
    kept.heard(GPUEvent("GPU-1", 1000, gpu_instance=3, compute_instance=0), instance())
    assert ("", "") == (kept.ailment("GPU-1"), kept.ailment("GPU-1", "MIG-4"))
    assert "XID 1000" in kept.ailment("GPU-1", "MIG-3")
    looked(kept, gpu(mig=True), times=2)
    assert "" == kept.ailment("GPU-1", "MIG-3")


def test_the_place_of_an_instance_is_kept_for_as_long_as_its_trouble_may_come_back() -> None:
    kept = keeper()
    kept.heard(GPUEvent("GPU-1", 1000, gpu_instance=3), instance())
    (found,) = kept.places("GPU-1")
    assert ("MIG-3", MIGInstance(profile="1g.5gb", start=3, size=1)) == (found.uuid, found.place)
    assert [] == kept.places("GPU-2")
    # well after 2 clean probes, and forgotten after ten times as many
    looked(kept, gpu(mig=True), times=20)
    assert [] == kept.places("GPU-1")
    assert 0 == instances_kept(kept)


def test_nothing_is_kept_of_instances_whose_programs_err() -> None:
    kept = keeper()
    looked(kept, gpu(mig=True))
    for pod in range(1000):
        kept.heard(GPUEvent("GPU-1", 31, gpu_instance=3), instance(f"MIG-{pod}"))
    assert 0 == instances_kept(kept)
    assert {("GPU-1", 31, Severity.APPLICATION): 1000} == kept.xids()


def instances_kept(kept: HealthKeeper) -> int:
    """Count what is held of instances, which nothing tells but the memory that it takes."""
    return len(kept._places) + sum(bool(subject.instance) for subject in kept._faults)


def test_what_an_instance_met_that_is_not_known_any_more_is_the_whole_gpus() -> None:
    kept = keeper()
    kept.heard(GPUEvent("GPU-1", 1000, gpu_instance=3, compute_instance=0))
    assert "XID 1000" in kept.ailment("GPU-1")


def test_what_needs_a_reset_is_the_whole_gpus_whichever_instance_met_it_and_so_every_instances() -> None:
    kept = keeper()
    kept.heard(GPUEvent("GPU-1", 95, gpu_instance=3), instance())
    assert all("XID 95" in kept.ailment("GPU-1", instance) for instance in ("", "MIG-3", "MIG-4"))


def test_an_event_of_an_unnamed_gpu_may_be_any_ones() -> None:
    kept = keeper()
    looked(kept, gpu("GPU-1"), gpu("GPU-2"))
    kept.heard(GPUEvent("", 1000))
    assert all("XID 1000" in kept.ailment(uuid) for uuid in ("GPU-1", "GPU-2"))


def test_a_double_bit_error_without_an_xid_is_an_uncorrected_memory_error() -> None:
    kept = keeper(uncorrected_ecc=Severity.RESET)
    kept.heard(GPUEvent("GPU-1", None))
    assert "a double-bit memory error" in kept.ailment("GPU-1")
    assert ["ecc"] == [record.key for record in kept.records().faults]


def test_one_gpu_is_none_of_anothers() -> None:
    kept = keeper()
    looked(kept, gpu("GPU-1", fault="gone"), gpu("GPU-2"))
    assert ("gone", "") == (kept.ailment("GPU-1"), kept.ailment("GPU-2"))


@pytest.mark.parametrize("recovery", [Recovery.NONE, Recovery.DRAIN_P2P, Recovery.UNKNOWN, None])
def test_what_the_driver_wants_of_links_or_not_at_all_is_no_trouble(recovery: Recovery | None) -> None:
    kept = keeper()
    looked(kept, gpu(recovery=recovery), times=3)
    assert "" == kept.ailment("GPU-1")


def test_memory_errors_that_were_there_count_nothing_and_a_driver_that_starts_anew_counts_from_zero() -> None:
    kept = keeper()
    for count in (5, 5, 0, 0):
        looked(kept, gpu(uncorrected_ecc=count))
        assert "" == kept.ailment("GPU-1")
    looked(kept, gpu(uncorrected_ecc=1))
    assert "1 more uncorrected memory errors" in kept.ailment("GPU-1")


def test_a_vgpu_may_be_unlicensed_for_its_grace() -> None:
    clock = Clock()
    kept = HealthKeeper(HealthSettings(clean_probes=1, unlicensed_grace=60), clock=clock)
    looked(kept, gpu(licensed=False))
    clock.now += 59
    looked(kept, gpu(licensed=False))
    assert "" == kept.ailment("GPU-1")
    clock.now += 1
    looked(kept, gpu(licensed=False))
    assert "the vGPU has no licence" in kept.ailment("GPU-1")
    looked(kept, gpu(licensed=True))
    assert "" == kept.ailment("GPU-1")
    looked(kept, gpu(licensed=False))  # the grace begins anew
    assert "" == kept.ailment("GPU-1")


def test_records_of_this_boot_that_need_a_person_are_taken_over_and_others_not() -> None:
    def record(severity: Severity) -> FaultRecord:
        return FaultRecord(uuid="GPU-1", key=str(severity), severity=severity, sentence=f"it is {severity}")

    kept = keeper()
    kept.restore(FaultRecords(boot="another", faults=(record(Severity.FATAL),)))
    assert "" == kept.ailment("GPU-1")
    kept.restore(FaultRecords(boot="b", faults=tuple(map(record, Severity))))
    assert {"fatal", "reset"} == {fault.key for fault in kept.records().faults}
    kept.acknowledge()
    assert ("", ()) == (kept.ailment("GPU-1"), kept.records().faults)


def test_xids_are_counted_by_gpu_number_and_class() -> None:
    kept = keeper(xids=XIDs(fatal=(13,)))
    for xid in (13, 31, 31):
        kept.heard(GPUEvent("GPU-1", xid))
    assert {("GPU-1", 13, Severity.FATAL): 1, ("GPU-1", 31, Severity.APPLICATION): 2} == kept.xids()


def test_an_xid_in_two_classes_is_refused() -> None:
    with pytest.raises(ValueError, match="fatal: XID 79 stands in reset too"):
        XIDs(reset=(79,), fatal=(79,))


class TestGuests:
    """vGPUs, as a virtual machine sees them."""

    @staticmethod
    def described(rules: tuple[GPURule, ...] = (), *, mig: bool = False) -> tuple[Health, str]:
        guest = gpu(virtualization=2, mig=mig)
        how = {guest.uuid: assign(guest, rules)}
        none = Daemon("", 0, "")
        (one,) = describe([guest], how, unit_bytes=GIB, reserve_per_gpu=0, daemon=lambda *_: none)
        assert 8 * GIB == one.usable_bytes
        return one.health, one.detail

    def test_they_are_served_as_large_as_they_are_also_with_mig_behind_them(self) -> None:
        assert (Health.HEALTHY, "") == self.described()
        assert (Health.HEALTHY, "") == self.described(mig=True)

    @pytest.mark.parametrize("family", [Family.MIG_STATIC, Family.MIG_DYNAMIC])
    def test_they_are_not_cut(self, family: Family) -> None:
        health, detail = self.described((GPURule(family=family),))
        assert Health.UNHEALTHY is health
        assert (
            f"a vGPU is cut by the hypervisor, not in the virtual machine: take it out of the rules of family {family}"
            in detail
        )
