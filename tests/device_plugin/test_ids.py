"""Device ids against grants."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotenant.contract.inventory import GPU, Health
from cotenant.contract.units import GIB, MIB, device_ids, id_prefix
from device_plugin.admission import ids
from device_plugin.admission.ids import MAX_IDS, TooManyIdsError
from device_plugin.admission.refusal import RefusedError
from tests.device_plugin.node import container_grant, uuid


def gpu(index: int, gib: int, health: Health = Health.HEALTHY) -> GPU:
    total = gib * GIB
    return GPU(uuid=uuid(index), index=index, model="A", total_bytes=total, usable_bytes=total, health=health)


def test_each_unit_of_a_gpu_is_one_id_with_the_gpus_health() -> None:
    found = ids.advertised([gpu(0, 2), gpu(1, 1, Health.UNHEALTHY)], GIB)
    first, second = id_prefix(uuid(0)), id_prefix(uuid(1))
    assert {f"{first}-0": True, f"{first}-1": True, f"{second}-0": False} == found


def test_more_ids_than_a_kubelet_handles_are_refused_with_unit_and_count() -> None:
    with pytest.raises(TooManyIdsError, match=f"units of 1 MiB are {8 * 141 * 1024} device ids, but .* {MAX_IDS}"):
        ids.advertised([gpu(n, 141) for n in range(8)], MIB)


def test_eight_gpus_of_141_gib_in_the_default_unit_are_well_below_the_limit() -> None:
    assert 8 * 141 == len(ids.advertised([gpu(n, 141) for n in range(8)], GIB)) < MAX_IDS
    # and in units of 256 MiB they are still allowed: 8 * 141 * 4 = 4,512
    assert 4512 == len(ids.advertised([gpu(n, 141) for n in range(8)], 256 * MIB)) < MAX_IDS


@given(
    free=st.sets(st.sampled_from([d for n in range(3) for d in device_ids(uuid(n), 6)])),
    gpus=st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True),
    each=st.integers(1, 6),
    data=st.data(),
)
def test_what_is_picked_is_free_is_the_grants_and_holds_what_must_be_taken(
    free: set[str], gpus: list[int], each: int, data: st.DataObject
) -> None:
    grant = container_grant(gpus=gpus, units=each * len(gpus))
    must = data.draw(st.sets(st.sampled_from(sorted(free)), max_size=4)) if free else set()
    try:
        chosen = ids.pick(grant, free, must)
    except RefusedError:
        short = any(sum(d.startswith(id_prefix(uuid(n))) for d in free) < each for n in gpus)
        wrong = any(count > ids.wanted(grant).get(prefix, 0) for prefix, count in ids.layout(must).items())
        assert short or wrong
        return
    assert set(chosen) <= free
    assert must <= set(chosen)
    assert len(chosen) == len(set(chosen))
    ids.check(grant, chosen)


def test_ids_that_the_kubelet_offers_although_they_are_held_are_taken_last() -> None:
    first, second, third = device_ids(uuid(0), 3)
    assert {second, third} == set(ids.pick(container_grant(units=2), [first, second, third], [], {first}))
    assert {first, second, third} == set(ids.pick(container_grant(units=3), [first, second, third], [], {first}))


def test_ids_of_another_gpu_or_in_another_number_are_refused() -> None:
    grant = container_grant(gpus=[0], units=2)
    for wrong in (device_ids(uuid(1), 2), device_ids(uuid(0), 1), device_ids(uuid(0), 3), ["nonsense", "more-1"]):
        with pytest.raises(RefusedError, match="2 units of each of GPU-00000000"):
            ids.check(grant, wrong)
