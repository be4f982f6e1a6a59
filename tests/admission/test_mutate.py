"""What holds for every pod, whatever it says."""

import contextlib
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from cotenant.contract.names import Names
from cotenant.contract.units import GIB, MIB
from extender.admission import PodError, Request, Settings, mutate, validate
from tests.admission import json_patch
from tests.admission.pods import MEMORY, SOURCES, Object, as_decoded, asking, container, from_annotation, injected, pod
from tests.admission.settings import SETTINGS

# How fast an example is says nothing here, on a machine that does other things as well.
calm = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

VARIABLE_NAMES = st.one_of(st.sampled_from([*SOURCES]), st.sampled_from(["A", "B", "PATH"]))
VARIABLES = st.one_of(
    st.builds(lambda name, value: {"name": name, "value": value}, VARIABLE_NAMES, st.text(max_size=5)),
    st.builds(lambda name: {"name": name, "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}, VARIABLE_NAMES),
    st.builds(from_annotation, st.sampled_from([*SOURCES]), st.sampled_from(["c0", "c1", "other"])),
)
RESOURCES = st.dictionaries(
    st.sampled_from(
        [
            MEMORY,
            "cotenant.io/managed",
            "aliyun.com/gpu-mem",
            "volcano.sh/vgpu-memory",
            "nvidia.com/gpumem",
            "nvidia.com/gpu-memory",
            "nvidia.com/gpu",
            "cpu",
        ]
    ),
    st.one_of(st.integers(0, 10**6), st.sampled_from(["0", "7", "8k", "1500m", "9E", "1e30", "-1", "x", ""])),
    max_size=3,
)


# Such as nobody would refuse, so that what holds for pods that are let in is tried on many.
SOUND_VARIABLES = st.builds(
    lambda name, value: {"name": name, "value": value}, st.sampled_from("AB"), st.sampled_from("xy")
)
SOUND_RESOURCES = st.dictionaries(
    st.sampled_from([MEMORY, "aliyun.com/gpu-mem", "nvidia.com/gpumem"]), st.integers(1, 10**6), min_size=1, max_size=1
)


@st.composite
def pods(
    draw: st.DrawFn, variables: st.SearchStrategy[Object] = VARIABLES, resources: st.SearchStrategy[Object] = RESOURCES
) -> Object:
    made = []
    for index in range(draw(st.integers(1, 4))):
        one = container(f"c{index}")
        if draw(st.booleans()):
            one["env"] = draw(st.lists(variables, max_size=6))
        sections = draw(st.sets(st.sampled_from(["limits", "requests"])))
        if sections:
            one["resources"] = {section: draw(resources) for section in sorted(sections)}
        made.append(one)
    mains = draw(st.integers(1, len(made)))
    scheduler = draw(st.sampled_from(["default-scheduler", "other", "cotenant-scheduler"]))
    return pod(*made[:mains], init=made[mains:], schedulerName=scheduler)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(
                [
                    *("metadata", "spec", "containers", "initContainers", "name", "env", "resources", "limits"),
                    *("requests", "valueFrom", "fieldRef", "fieldPath", "annotations", MEMORY, "aliyun.com/gpu-mem"),
                ]
            ),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=30,
)


def containers(of: Object) -> list[Object]:
    return [*of["spec"]["containers"], *of["spec"].get("initContainers", [])]


def is_ours(variable: Object, container_name: str) -> bool:
    return variable in injected(container_name)


@calm
@given(pods())
def test_a_second_run_finds_nothing_to_do(created: Object) -> None:
    assert [] == mutate(json_patch.apply(created, mutate(created, SETTINGS)), SETTINGS)


@calm
@given(pods())
def test_the_user_s_environment_keeps_its_values_and_its_order(created: Object) -> None:
    patched = json_patch.apply(created, mutate(created, SETTINGS))
    for before, after in zip(containers(created), containers(patched), strict=True):
        users = [one for one in before.get("env", []) if not is_ours(one, before["name"])]
        assert users == [one for one in after.get("env", []) if not is_ours(one, before["name"])]


@calm
@given(st.one_of(pods(), pods(SOUND_VARIABLES, SOUND_RESOURCES)))
def test_a_pod_that_is_let_in_reads_each_variable_from_its_annotation_and_from_nowhere_else(created: Object) -> None:
    patched = json_patch.apply(created, mutate(created, SETTINGS))
    request = Request(operation="CREATE", resource="pods", user="alice", object=patched)
    if validate(request, SETTINGS) is not None:
        return
    for one in containers(patched):
        amounts = one.get("resources", {})
        if any(MEMORY in section for section in amounts.values()):
            ours = [variable for variable in one["env"] if variable["name"] in SOURCES]
            assert injected(one["name"]) == sorted(ours, key=lambda variable: [*SOURCES].index(variable["name"]))
        assert not any("aliyun.com/gpu-mem" in section for section in amounts.values())


@calm
@given(pods())
def test_a_container_that_asks_nothing_is_never_touched(created: Object) -> None:
    patched = json_patch.apply(created, mutate(created, SETTINGS))
    for before, after in zip(containers(created), containers(patched), strict=True):
        asked = {name for section in before.get("resources", {}).values() for name in section}
        if not asked & {
            *(MEMORY, "aliyun.com/gpu-mem", "volcano.sh/vgpu-memory", "nvidia.com/gpumem", "nvidia.com/gpu-memory")
        }:
            assert before == after


@calm
@given(st.dictionaries(st.sampled_from(["metadata", "spec"]), JSON))
def test_any_json_is_read_or_refused(nonsense: Object) -> None:
    request = Request(operation="CREATE", resource="pods", user="alice", object=nonsense, old=nonsense)
    # nothing but a PodError may come out
    with contextlib.suppress(PodError):
        mutate(nonsense, SETTINGS)
    with contextlib.suppress(PodError):
        validate(request, SETTINGS)


def units(created: Object, settings: Settings) -> Any:
    return json_patch.apply(created, mutate(created, settings))["spec"]["containers"][0]["resources"]["limits"][MEMORY]


class TestUnits:
    """An alias is rounded up to the cluster's unit, whatever that is."""

    def test_mib_in_units_of_256_mib(self) -> None:
        # 1000 MiB / 256 MiB = 3.9
        created = pod(container(limits={"nvidia.com/gpumem": 1000}))
        assert "4" == units(created, replace(SETTINGS, unit_bytes=256 * MIB))

    def test_gib_in_units_of_256_mib(self) -> None:
        # 3 GiB = 12 x 256 MiB
        created = pod(container(limits={"aliyun.com/gpu-mem": 3}))
        assert "12" == units(created, replace(SETTINGS, unit_bytes=256 * MIB))

    def test_gib_in_units_of_2_gib(self) -> None:
        # 3 GiB / 2 GiB = 1.5
        created = pod(container(limits={"aliyun.com/gpu-mem": 3}))
        assert "2" == units(created, replace(SETTINGS, unit_bytes=2 * GIB))


def test_another_domain_changes_every_name() -> None:
    settings = replace(SETTINGS, names=Names("gpus.example.org"))
    created = as_decoded(pod(container(limits={"aliyun.com/gpu-mem": 1})))
    patched = json_patch.apply(created, mutate(created, settings))["spec"]["containers"][0]
    assert {"gpus.example.org/gpu-mem": "1", "gpus.example.org/managed": "0"} == patched["resources"]["limits"]
    assert (
        "metadata.annotations['visible-devices.gpus.example.org/main']"
        == (patched["env"][0]["valueFrom"]["fieldRef"]["fieldPath"])
    )


def test_a_pod_without_a_scheduler_gets_ours() -> None:
    """The API server always sends one; whoever calls the function need not."""
    created = pod(asking())
    assert "schedulerName" not in created["spec"]
    assert "cotenant-scheduler" == json_patch.apply(created, mutate(created, SETTINGS))["spec"]["schedulerName"]


class TestMalformedPods:
    """A pod that the API server would not send is refused with the path of what is wrong."""

    @pytest.mark.parametrize(
        ("spec", "path"),
        [
            ({"containers": "none"}, "$.spec.containers"),
            ({"containers": [{"image": "x"}]}, "$.spec.containers[0]"),
            ({"containers": [asking(), {"name": 3}]}, "$.spec.containers[1].name"),
            ({"containers": [container(limits={MEMORY: [8]})]}, "$.spec.containers[0].resources.limits[...]"),
            ({"containers": [container(env=[{"value": "x"}])]}, "$.spec.containers[0].env[0]"),
        ],
    )
    def test_the_sentence_names_the_path(self, spec: Object, path: str) -> None:
        with pytest.raises(PodError) as refusal:
            mutate({"metadata": {}, "spec": spec}, SETTINGS)
        assert path in str(refusal.value)


def test_a_stored_pod_is_not_judged_again() -> None:
    """Pods from before admission was installed, and finalizers of any, must be free to change."""
    stored = pod(asking(0), nodeName="n1")
    request = Request(operation="UPDATE", resource="pods", user="alice", object=stored, old=stored)
    assert validate(request, SETTINGS) is None
