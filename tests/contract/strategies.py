"""Inventories and grants of every kind, for Hypothesis."""

from hypothesis import strategies as st

from cotenant.contract.grant import (
    GIVEN,
    ContainerGrant,
    GPUShare,
    Grant,
    Isolation,
    IsolationRecord,
    MIGPlacement,
    Role,
)
from cotenant.contract.inventory import (
    GPU,
    MAX_GPU_BYTES,
    MIG,
    Family,
    Foreign,
    Health,
    Inventory,
    MIGInstance,
    MIGProfile,
    Mode,
)
from cotenant.contract.units import GIB, MIB

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
labels = st.from_regex(r"[a-z0-9]([-a-z0-9]{0,6}[a-z0-9])?", fullmatch=True)
small = st.integers(0, 64)
sizes = st.integers(1, 64)

instances = st.builds(MIGInstance, profile=texts, start=small, size=sizes, uuid=st.just("") | texts)
profiles = st.builds(
    MIGProfile,
    name=texts,
    profile_id=small,
    bytes=st.integers(0, MAX_GPU_BYTES),
    compute_slices=small,
    max_instances=small,
    size=sizes,
    starts=st.lists(small, max_size=3).map(tuple),
)
partitions = st.builds(
    MIG,
    profiles=st.lists(profiles, max_size=2).map(tuple),
    instances=st.lists(instances, max_size=2).map(tuple),
    unexplained=st.lists(instances, max_size=2).map(tuple),
)
modes_of = {
    Family.MEMORY: [Mode.TIME_SLICING, Mode.MPS],
    Family.REPLICAS: [Mode.TIME_SLICING, Mode.MPS],
    Family.MIG_STATIC: [Mode.MIG],
    Family.MIG_DYNAMIC: [Mode.MIG],
}


@st.composite
def gpus(draw: st.DrawFn, uuid: str, unit_bytes: int) -> GPU:
    family = draw(st.sampled_from(Family))
    usable = draw(st.integers(0, 200)) * unit_bytes
    return GPU(
        uuid=uuid,
        index=draw(small),
        model=draw(texts),
        total_bytes=usable + draw(st.integers(0, GIB)),
        usable_bytes=usable,
        family=family,
        mode=draw(st.sampled_from(modes_of[family])),
        health=draw(st.sampled_from(Health)),
        detail=draw(st.just("") | texts),
        max_clients=draw(small),
        mps_pipe=draw(st.just("") | texts),
        mig=draw(st.none() | partitions),
        foreign=draw(
            st.none() | st.builds(Foreign, bytes=st.integers(0, GIB), fenced=st.booleans(), detail=st.just("") | texts)
        ),
    )


@st.composite
def inventories(draw: st.DrawFn) -> Inventory:
    unit_bytes = draw(st.sampled_from([MIB, 256 * MIB, GIB]))
    uuids = draw(st.lists(texts, max_size=4, unique=True))
    return Inventory(
        generation=draw(st.integers(0, 1 << 40)),
        unit_bytes=unit_bytes,
        serving=draw(st.booleans()),
        gpus=tuple(draw(gpus(uuid, unit_bytes)) for uuid in uuids),
    )


@st.composite
def container_grants(draw: st.DrawFn, name: str = "main") -> ContainerGrant:
    mode = draw(st.sampled_from(Mode))
    family = draw(st.sampled_from([Family.MIG_STATIC, Family.MIG_DYNAMIC])) if mode is Mode.MIG else Family.MEMORY
    uuids = draw(st.lists(texts, min_size=1, max_size=1 if mode is Mode.MIG else 3, unique=True))
    given, enforced_by = GIVEN[mode]
    return ContainerGrant(
        name=name,
        role=draw(st.sampled_from(Role)),
        family=family,
        mode=mode,
        gpus=tuple(GPUShare(uuid=uuid, bytes=draw(st.integers(1, 200)) * MIB) for uuid in uuids),
        units=draw(st.integers(1, 9)) * len(uuids),
        threads=draw(st.integers(1, 100)),
        mps_pipe=draw(st.just("") | texts) if mode is Mode.MPS else "",
        user=draw(st.none() | st.integers(0, 65_535)) if mode is Mode.MPS else None,
        mig=draw(st.builds(MIGPlacement, profile=texts, start=small, size=sizes)) if mode is Mode.MIG else None,
        isolation=IsolationRecord(asked=draw(st.sampled_from(Isolation)), given=given, enforced_by=enforced_by),
    )


@st.composite
def pod_grants(draw: st.DrawFn) -> Grant:
    names = draw(st.lists(labels, min_size=1, max_size=4, unique=True))
    return Grant(containers=tuple(draw(container_grants(name)) for name in names))
