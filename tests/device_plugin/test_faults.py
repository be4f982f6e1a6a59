"""Troubles of a GPU, probe by probe."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotenant.contract.health import Severity
from device_plugin.health import faults
from device_plugin.health.faults import Faults, Finding, Probe

N = 3
CLEAN = Probe()


def finding(severity: Severity, key: str = "xid-1") -> Finding:
    return Finding(key, severity, f"{key}, which is {severity}")


def after(known: Faults, *probes: Probe) -> Faults:
    for probe in probes:
        known = faults.probed(known, probe, N)
    return known


def unwell(known: Faults) -> bool:
    return bool(faults.ailments(known))


def probes_until_well(known: Faults) -> int:
    for count in range(1000):
        if not unwell(known):
            return count
        known = after(known, CLEAN)
    raise AssertionError("it never got well")


def test_an_applications_own_trouble_is_none_of_the_gpus() -> None:
    assert {} == faults.afflict({}, finding(Severity.APPLICATION))
    assert {} == after({}, Probe(present=(finding(Severity.APPLICATION),)))


def test_a_transient_trouble_is_over_after_as_many_clean_probes_as_configured_and_not_before() -> None:
    known = faults.afflict({}, finding(Severity.TRANSIENT))
    assert unwell(after(known, *[CLEAN] * (N - 1)))
    assert not unwell(after(known, *[CLEAN] * N))


def test_one_more_sign_begins_the_count_anew() -> None:
    known = after(faults.afflict({}, finding(Severity.TRANSIENT)), *[CLEAN] * (N - 1))
    known = faults.afflict(known, finding(Severity.TRANSIENT))
    assert N == probes_until_well(known)


def test_a_probe_that_finds_something_else_is_not_clean() -> None:
    known = after(faults.afflict({}, finding(Severity.TRANSIENT)), *[CLEAN] * (N - 1))
    known = after(known, Probe(present=(finding(Severity.TRANSIENT, "ecc"),)))
    assert N == probes_until_well(known)


def test_who_falls_ill_again_soon_needs_twice_as_many_clean_probes_each_time_up_to_a_limit() -> None:
    known: Faults = {}
    needed = []
    for _ in range(7):
        known = faults.afflict(known, finding(Severity.TRANSIENT))
        needed.append(probes_until_well(known))
        known = after(known, *[CLEAN] * needed[-1])
    # 3, then doubled four times and no more
    assert [3, 6, 12, 24, 48, 48, 48] == needed


def test_who_was_well_for_long_starts_afresh() -> None:
    known = after(faults.afflict({}, finding(Severity.TRANSIENT)), *[CLEAN] * (10 * N))
    assert {} == known


def test_what_lasts_as_long_as_it_is_found_does_not_grow_worse_by_being_found_again() -> None:
    present = Probe(present=(finding(Severity.TRANSIENT, "unreachable"),))
    known = after({}, *[present] * 50)
    assert N == probes_until_well(known)


@pytest.mark.parametrize("probes", [1, N, 100])
def test_a_trouble_that_needs_a_reset_stays_while_nobody_tells_of_one(probes: int) -> None:
    known = faults.afflict({}, finding(Severity.RESET))
    assert unwell(after(known, *[CLEAN] * probes))
    assert unwell(after(known, *[Probe(reset_done=False)] * probes))


def test_a_reset_is_over_when_the_driver_wants_nothing_more_or_the_gpu_was_away_and_came_back() -> None:
    known = faults.afflict({}, finding(Severity.RESET))
    assert not unwell(after(known, *[Probe(reset_done=True)] * N))
    away = Probe(present=(finding(Severity.TRANSIENT, "unreachable"),), lost=True)
    assert unwell(after(known, away, *[CLEAN] * (N - 1)))
    assert not unwell(after(known, away, *[CLEAN] * N))
    # the driver knows better than that
    assert unwell(after(known, away, *[Probe(reset_done=False)] * N))


def test_a_fatal_trouble_outlasts_every_probe() -> None:
    known = faults.afflict({}, finding(Severity.FATAL))
    assert unwell(after(known, *[Probe(reset_done=True)] * 1000))


def test_the_gravest_sign_of_a_trouble_counts_until_it_is_over() -> None:
    known = faults.afflict({}, finding(Severity.FATAL, "recovery"))
    known = faults.afflict(known, finding(Severity.TRANSIENT, "recovery"))
    assert [Severity.FATAL] == [one.severity for one in faults.ailments(known)]


def test_the_gravest_trouble_is_told_first_and_only_what_needs_a_person_is_written_down() -> None:
    known: Faults = {}
    for severity in (Severity.TRANSIENT, Severity.FATAL, Severity.RESET):
        known = faults.afflict(known, finding(severity, str(severity)))
    assert ["fatal", "reset", "transient"] == [one.key for one in faults.ailments(known)]
    assert ["fatal", "reset"] == [one.key for one in faults.lasting(known)]


severities = st.sampled_from(Severity)
keys = st.sampled_from(["a", "b", "c"])
findings = st.builds(finding, severities, keys)
probes = st.builds(
    Probe,
    present=st.lists(findings, max_size=2, unique_by=lambda one: one.key).map(tuple),
    lost=st.booleans(),
    reset_done=st.none() | st.booleans(),
)


@given(st.lists(findings | probes, max_size=40), st.integers(1, 4))
def test_whatever_happens_fatal_stays_and_transient_ends(story: list[Finding | Probe], clean_probes: int) -> None:
    known: Faults = {}
    fatal: set[str] = set()
    for step in story:
        if isinstance(step, Finding):
            known = faults.afflict(known, step)
            seen = [step]
        else:
            known = faults.probed(known, step, clean_probes)
            seen = list(step.present)
        fatal |= {one.key for one in seen if one.severity is Severity.FATAL}
    # 16 times the clean probes is the longest that anything takes that a reset ends
    for _ in range(16 * clean_probes):
        known = faults.probed(known, Probe(reset_done=True), clean_probes)
    assert fatal == {one.key for one in faults.ailments(known)}
