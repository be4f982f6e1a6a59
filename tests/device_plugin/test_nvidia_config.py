"""NVIDIA's sharing file: taken as NVIDIA documents it, and refused with a path and a sentence."""

import re
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cotenant.contract.configuration import ConfigurationError, GPURule, MIGStrategy
from cotenant.contract.inventory import Family, Mode
from device_plugin.families import nvidia
from device_plugin.families.nvidia import NVIDIASharing

WHOLE = GPURule(family=Family.REPLICAS, resource="nvidia.com/gpu")

# "Time-Slicing GPUs in Kubernetes" and "MPS" of NVIDIA's documentation: the values under `data` of its ConfigMaps
ANY = """
version: v1
flags:
  migStrategy: none
sharing:
  timeSlicing:
    resources:
    - name: nvidia.com/gpu
      replicas: 4
"""
A100 = """
version: v1
flags:
  migStrategy: mixed
sharing:
  timeSlicing:
    resources:
    - name: nvidia.com/gpu
      replicas: 8
    - name: nvidia.com/mig-1g.5gb
      replicas: 2
    - name: nvidia.com/mig-7g.40gb
      replicas: 7
"""
README = """
version: v1
flags:
  migStrategy: "none"
  failOnInitError: true
  nvidiaDriverRoot: "/"
  plugin:
    passDeviceSpecs: false
    deviceListStrategy: "envvar"
    deviceIDStrategy: "uuid"
sharing:
  timeSlicing:
    renameByDefault: true
    failRequestsGreaterThanOne: true
    resources:
    - name: nvidia.com/gpu
      replicas: 10
"""
MPS = """
version: v1
sharing:
  mps:
    renameByDefault: true
    resources:
    - name: nvidia.com/gpu
      replicas: 10
"""


def shared(**fields: Any) -> GPURule:
    return GPURule(**{"family": Family.REPLICAS, "mode": Mode.TIME_SLICING, "resource": "nvidia.com/gpu", **fields})


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (ANY, shared(replicas=4)),
        (README, shared(resource="nvidia.com/gpu.shared", replicas=10, fail_requests_greater_than_one=True)),
        # as NVIDIA's plugin: under MPS a container has one share
        (
            MPS,
            shared(mode=Mode.MPS, resource="nvidia.com/gpu.shared", replicas=10, fail_requests_greater_than_one=True),
        ),
    ],
    ids=["any", "readme", "mps"],
)
def test_the_examples_of_nvidias_documentation_are_taken_unchanged(text: str, rule: GPURule) -> None:
    found = nvidia.read(text)
    assert (rule, WHOLE) == found.rules
    assert not found.packed


def cut(**fields: Any) -> GPURule:
    return GPURule(**{"mig_enabled": True, "family": Family.MIG_STATIC, **fields})


def test_the_example_with_mig_instances_is_taken_unchanged() -> None:
    found = nvidia.read(A100)
    assert (cut(profile_replicas={"1g.5gb": 2, "7g.40gb": 7}), shared(replicas=8), WHOLE) == found.rules
    assert (MIGStrategy.MIXED, ()) == (found.mig_strategy, found.warnings)
    # where instances are called nvidia.com/gpu, its replicas are those of each, and the others are unused
    found = nvidia.read(
        A100.replace("mixed", "single").replace("timeSlicing:", "timeSlicing:\n    renameByDefault: true")
    )
    assert cut(replicas=8, rename_shared=True) == found.rules[0]
    assert MIGStrategy.SINGLE == found.mig_strategy
    said = "sharing.timeSlicing.resources[1]: nvidia.com/mig-1g.5gb is offered with flags.migStrategy mixed alone"
    assert f"{said}, and it is single" == found.warnings[0]
    # and where the file leaves MIG alone, which is NVIDIA's default
    found = nvidia.read(A100.replace("mixed", "none"))
    assert ((shared(replicas=8), WHOLE), None) == (found.rules, found.mig_strategy)
    assert f"{said}, and it is none" == found.warnings[0]


def test_instances_without_replicas_are_offered_whole() -> None:
    assert (cut(), WHOLE) == nvidia.read("{version: v1, flags: {migStrategy: mixed}}").rules


def test_shares_of_instances_are_renamed_as_nvidia_does() -> None:
    renamed = A100.replace("timeSlicing:", "timeSlicing:\n    renameByDefault: true")
    assert nvidia.read(renamed).rules[0].rename_shared
    other = A100.replace("replicas: 7", "replicas: 7\n      rename: nvidia.com/whole")
    (warning,) = nvidia.read(other).warnings
    assert warning.endswith("is not used for MIG instances; renameByDefault makes it nvidia.com/mig-7g.40gb.shared")


def test_what_is_taken_and_means_nothing_here_is_said() -> None:
    assert (
        "flags.plugin.deviceIDStrategy: is not used; docs/modes.md says what stands for it"
        in nvidia.read(README).warnings
    )
    assert () == nvidia.read(ANY).warnings


def test_replicas_without_resources_are_of_nvidias_gpu_with_a_warning() -> None:
    found = nvidia.read("{version: v1, sharing: {timeSlicing: {replicas: 4}}}")
    assert (shared(replicas=4), WHOLE) == found.rules
    (warning,) = found.warnings
    assert warning.startswith("sharing.timeSlicing.replicas without resources is taken for nvidia.com/gpu")


def devices(value: str) -> tuple[GPURule, ...]:
    entry = f"{{name: nvidia.com/gpu, replicas: 2, rename: slow, devices: {value}}}"
    return nvidia.read(f"{{version: v1, sharing: {{timeSlicing: {{resources: [{entry}]}}}}}}").rules


def test_some_gpus_are_shared_under_another_name_and_the_others_stay_whole() -> None:
    slow = {"resource": "nvidia.com/slow", "replicas": 2}
    assert (shared(**slow), WHOLE) == devices("all")
    assert (shared(indices=(0, 1), **slow), WHOLE) == devices("2")
    mixed = devices("[3, '5', GPU-4cf8db2d-06c0-7d70-1a51-e59b25b2c16c]")
    uuid = "GPU-4cf8db2d-06c0-7d70-1a51-e59b25b2c16c"
    assert (shared(indices=(3, 5), **slow), shared(uuids=(uuid,), **slow), WHOLE) == mixed


def test_the_policy_for_shares_is_taken() -> None:
    assert nvidia.read("{version: v1, flags: {plugin: {sharedDevicesAllocationPolicy: packed}}}").packed


@pytest.mark.parametrize(
    ("sentence", "text"),
    [
        ("version: missing, but required", "{}"),
        ("version: ", "{version: v2}"),
        ("sharing.timeSlicing.replikas: unknown key", "{version: v1, sharing: {timeSlicing: {replikas: 4}}}"),
        ("sharing.timeSlicing.replicas: expected int >= 1", "{version: v1, sharing: {timeSlicing: {replicas: 0}}}"),
        (
            "sharing.timeSlicing.resources[0].replicas: missing, but required",
            "{version: v1, sharing: {timeSlicing: {resources: [{name: nvidia.com/gpu}]}}}",
        ),
        (
            "sharing.timeSlicing.resources[0].name: expected nvidia.com/gpu or nvidia.com/mig-PROFILE, got",
            "{version: v1, sharing: {timeSlicing: {resources: [{name: x, replicas: 2}]}}}",
        ),
        (
            "sharing.mps.resources[0].rename: nvidia.com/gpumem means something else than shares of GPUs",
            "{version: v1, sharing: {mps: {resources: [{name: gpu, replicas: 2, rename: gpumem}]}}}",
        ),
        (
            "sharing.mps.resources[0].devices[1]: MIG-1 is a MIG instance, which is not shared",
            "{version: v1, sharing: {mps: {resources: [{name: gpu, replicas: 2, devices: [0, MIG-1]}]}}}",
        ),
        (
            "sharing.mps.resources[0].devices: the list is empty; leave the entry out to share no GPU",
            "{version: v1, sharing: {mps: {resources: [{name: gpu, replicas: 2, devices: []}]}}}",
        ),
        (
            "sharing.mps.resources[0]: MIG instances are not shared by MPS, by NVIDIA's plugin neither",
            "{version: v1, sharing: {mps: {resources: [{name: mig-1g.5gb, replicas: 2}]}}}",
        ),
        (
            "sharing.timeSlicing.resources[0].name: expected a MIG profile, such as 1g.5gb, got 'small'",
            "{version: v1, sharing: {timeSlicing: {resources: [{name: mig-small, replicas: 2}]}}}",
        ),
        (
            "sharing.timeSlicing.resources[2].devices: expected all for MIG instances",
            A100.replace("replicas: 7", "replicas: 7\n      devices: 1"),
        ),
        (
            "sharing.timeSlicing.resources: nvidia.com/gpu stands 2 times",
            "{version: v1, sharing: {timeSlicing: {resources: [{name: gpu, replicas: 2}, {name: gpu, replicas: 3}]}}}",
        ),
        (
            "sharing.timeSlicing.replicas: stands beside resources",
            "{version: v1, sharing: {timeSlicing: {replicas: 2, resources: []}}}",
        ),
        (
            "sharing: timeSlicing and mps exclude each other",
            "{version: v1, sharing: {timeSlicing: {replicas: 2}, mps: {replicas: 2}}}",
        ),
        ("is not valid YAML", "{version: v1"),
    ],
)
def test_what_is_wrong_is_named_by_its_path(sentence: str, text: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(sentence)):
        nvidia.read(text)


_KEYS = [
    "version", "flags", "sharing", "timeSlicing", "mps", "resources", "name", "replicas", "rename", "devices", "plugin",
    "renameByDefault", "failRequestsGreaterThanOne", "migStrategy", "deviceListStrategy", "imex", "channelIDs", "x",
]  # fmt: skip
_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 70)
    | st.floats()
    | st.sampled_from(
        ["v1", "nvidia.com/gpu", "gpu", "all", "0:1", "GPU-1", "packed", "mixed", "", "nvidia.com/mig-1g.5gb"]
    )
    | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_KEYS), inner, max_size=4),
    max_leaves=12,
)


@st.composite
def nearly_right(draw: st.DrawFn) -> Any:
    """A file of NVIDIA's with one thing changed, so that what lies deep is reached."""
    value = yaml.safe_load(draw(st.sampled_from([ANY, A100, README, MPS])))
    place = value
    while True:
        key = draw(st.sampled_from(sorted(place))) if isinstance(place, dict) else draw(st.integers(0, len(place) - 1))
        inner = place[key]
        if not inner or not isinstance(inner, dict | list) or draw(st.booleans()):
            if isinstance(place, dict) and draw(st.booleans()):
                key = draw(st.sampled_from(_KEYS))
            place[key] = draw(_VALUES)
            return value
        place = inner


@given(_VALUES | nearly_right() | st.text(max_size=40))
def test_whatever_stands_in_the_file_is_taken_or_refused_with_a_sentence(value: Any) -> None:
    text = value if isinstance(value, str) else yaml.safe_dump(value)
    try:
        found = nvidia.read(text)
    except ConfigurationError as error:
        said = str(error)
        # a path of keys, which may be any text, or what is wrong with all of it; one sentence, in one line
        assert re.match(r"(?s).+: |is not valid YAML|expected ", said), said
        assert "\n" not in said
    else:
        assert isinstance(found, NVIDIASharing)
        assert WHOLE == found.rules[-1]
