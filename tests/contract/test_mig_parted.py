"""mig-parted's format: what comes out does not hang on the order, and nothing in a file can make it fall over."""

from itertools import permutations

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cotenant.contract.boards import board, boards
from cotenant.contract.configuration import ConfigurationError
from cotenant.contract.mig_parted import CutGPU, Geometries, GeometryError, parse, plan

A100 = board("A100-SXM4-40GB").geometry


def gpu(index: int = 0, *, device_id: int | None = 0x20B010DE, name: str = "A100-SXM4-40GB") -> CutGPU:
    return CutGPU(uuid=f"GPU-{index}", index=index, device_id=device_id, geometry=board(name).geometry)


def file(*specs: str) -> Geometries:
    return parse("version: v1\nmig-configs:\n  it:\n" + "".join(f"  - {{{spec}}}\n" for spec in specs))


@pytest.mark.parametrize("mix", [{"3g.20gb": 1, "2g.10gb": 2}, {"4g.20gb": 1, "2g.10gb": 1, "1g.5gb": 1}])
def test_a_mix_comes_out_whatever_the_order(mix: dict[str, int]) -> None:
    for order in permutations(mix.items()):
        devices = ", ".join(f"{profile}: {count}" for profile, count in order)
        cut = plan(file(f"devices: all, mig-enabled: true, mig-devices: {{{devices}}}"), "it", [gpu()])["GPU-0"]
        assert mix == {profile: [one.profile for one in cut.instances].count(profile) for profile in mix}
        for n, one in enumerate(cut.instances):
            A100.check(one, cut.instances[:n])


def test_devices_and_filters_choose_gpus_and_the_last_that_names_one_decides() -> None:
    gpus = [gpu(0), gpu(1), gpu(2, device_id=0x233010DE, name="H100-SXM5-80GB"), gpu(3)]
    cuts = plan(
        file(
            'device-filter: "0x20B010DE", devices: all, mig-enabled: true, mig-devices: {7g.40gb: 1}',
            'device-filter: ["0x234210DE", "0x233010de"], devices: all, mig-enabled: true, mig-devices: {1g.10gb: 7}',
            "devices: [1], mig-enabled: false",
        ),
        "it",
        gpus,
    )
    assert {"GPU-0": (True, 1), "GPU-1": (False, 0), "GPU-2": (True, 7), "GPU-3": (True, 1)} == {
        uuid: (cut.enabled, len(cut.instances)) for uuid, cut in cuts.items()
    }


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("version: v2\nmig-configs: {}", "version: unknown value 'v2'"),
        ("mig-configs: {}", "version: missing, but required"),
        ("version: v1\nmig-configs: {a: [{devices: all}]}", "mig-configs.a[0].mig-enabled: missing, but required"),
        (
            "version: v1\nmig-configs: {a: [{devices: all, mig-enabled: true, mig-device: {}}]}",
            "mig-configs.a[0].mig-device: unknown key",
        ),
        (
            "version: v1\nmig-configs: {a: [{devices: some, mig-enabled: true}]}",
            "mig-configs.a[0].devices: ",
        ),
        (
            "version: v1\nmig-configs: {a: [{devices: all, mig-enabled: true, mig-devices: {1g.5gb: -1}}]}",
            "expected int >= 0",
        ),
        (
            "version: v1\nmig-configs: {a: [{devices: all, mig-enabled: false, mig-devices: {1g.5gb: 1}}]}",
            "mig-devices: expected none where mig-enabled is false",
        ),
        (
            "version: v1\nmig-configs: {a: [{device-filter: A100, devices: all, mig-enabled: true}]}",
            "device-filter: expected 0x and eight hexadecimal digits, got 'A100'",
        ),
    ],
)
def test_a_file_that_means_nothing_is_refused_by_its_path(text: str, sentence: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        parse(text)
    assert sentence in str(refused.value)


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        (
            "devices: all, mig-enabled: true, mig-devices: {2g.10gb: 4}",
            "mig-configs.it[0].mig-devices: GPU 0 cannot hold 4 x 2g.10gb together, in whatever order",
        ),
        (
            "devices: all, mig-enabled: true, mig-devices: {1g.10gb: 0, 2g.20gb: 1}",
            "mig-configs.it[0].mig-devices: GPU 0 has no profile 2g.20gb; its profiles are: 7g.40gb, ",
        ),
    ],
)
def test_a_geometry_that_no_gpu_can_have_is_refused(spec: str, sentence: str) -> None:
    with pytest.raises(GeometryError) as refused:
        plan(file(spec), "it", [gpu()])
    assert str(refused.value).startswith(sentence)


def test_a_name_that_is_not_there_is_told_with_those_that_are() -> None:
    with pytest.raises(GeometryError, match="there is no configuration 'all-1g'; there are: it"):
        plan(file("devices: all, mig-enabled: true"), "all-1g", [gpu()])
    with pytest.raises(GeometryError, match="there is no configuration 'all-1g'; there are: none"):
        plan(parse("version: v1\nmig-configs: {}"), "all-1g", [gpu()])


keys = st.sampled_from(
    ["version", "mig-configs", "devices", "device-filter", "mig-enabled", "mig-devices", "1g.5gb", "3g.20gb", "x", "it"]
)
leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.sampled_from(["v1", "all", "0x20B010DE", "1g.5gb", "", "none"]),
    st.text(max_size=5),
)
trees = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4), max_leaves=15
)
specs = st.fixed_dictionaries(
    {"devices": st.sampled_from(["all", [0], [1], []]), "mig-enabled": st.booleans() | trees},
    optional={"mig-devices": st.dictionaries(keys, st.integers(-1, 9) | trees, max_size=3), "device-filter": trees},
)
files = st.fixed_dictionaries(
    {
        "version": st.just("v1") | trees,
        "mig-configs": st.dictionaries(keys, st.lists(specs | trees, max_size=3), max_size=2),
    }
)


@settings(max_examples=150, deadline=None)
@given(files | trees, st.sampled_from(sorted(boards())))
def test_whatever_stands_in_a_file_ends_in_a_geometry_or_a_sentence(tree: object, name: str) -> None:
    said = "fine"
    try:
        found = parse(yaml.safe_dump(tree))
        for config in found.mig_configs:
            for cut in plan(found, config, [gpu(name=name)]).values():
                for n, one in enumerate(cut.instances):
                    board(name).geometry.check(one, cut.instances[:n])
    except (ConfigurationError, GeometryError) as error:
        said = str(error)
    assert said


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=200) | st.text("{}[]:,-&*!|>'\" \n\tv1ag.5b", max_size=60))
def test_whatever_is_no_file_is_refused(text: str) -> None:
    said = "fine"
    try:
        parse(text)
    except ConfigurationError as error:
        said = str(error)
    assert said
