"""Which family and mode each GPU is in: the first rule that names it decides."""

from collections.abc import Iterable

import pytest

from cotenant.contract.configuration import ConfigurationError, DevicePluginConfiguration, GPURule, convert
from cotenant.contract.inventory import Family, Mode
from cotenant.contract.pods import Pod
from cotenant.contract.units import device_ids, id_prefix
from device_plugin.admission.identity import Devices, PodName
from device_plugin.families.assignment import Assignment, held
from device_plugin.families.rules import Assigned, assign
from device_plugin.nvml import PhysicalGPU
from tests.builders import NAMES, a_grant, a_pod
from tests.device_plugin.node import uuid
from tests.device_plugin.test_mig import placed

A100, T4 = "NVIDIA A100-SXM4-40GB", "Tesla T4"


def gpu(index: int = 0, model: str = A100) -> PhysicalGPU:
    return PhysicalGPU(uuid=f"GPU-{index}", index=index, model=model, total_bytes=1 << 34, reserved_bytes=0)


def assigned(rules: str, of: PhysicalGPU) -> Assigned:
    return assign(of, convert(f"deviceListStrategy: cdi-cri\ngpus: [{rules}]", DevicePluginConfiguration).gpus)


MEMORY = Assigned(Family.MEMORY, Mode.TIME_SLICING)
DYNAMIC = Assigned(Family.MIG_DYNAMIC, Mode.MIG)


def test_without_rules_every_gpu_is_shared_by_memory_in_turns() -> None:
    assert MEMORY == assigned("", gpu())


@pytest.mark.parametrize(
    ("rule", "of", "expected"),
    [
        ("{models: [A100], family: mig-dynamic}", gpu(), DYNAMIC),
        ("{models: [A100], family: mig-dynamic}", gpu(model=T4), MEMORY),
        ('{models: ["tesla*"], mode: mps}', gpu(model=T4), Assigned(Family.MEMORY, Mode.MPS)),
        (
            "{indices: [1], family: replicas}",
            gpu(1),
            Assigned(Family.REPLICAS, Mode.TIME_SLICING, resource="nvidia.com/gpu"),
        ),
        ("{indices: [1], family: replicas}", gpu(0), MEMORY),
        ("{uuids: [GPU-0], family: mig-static}", gpu(0), Assigned(Family.MIG_STATIC, Mode.MIG)),
        # all that a rule says must hold
        ("{uuids: [GPU-0], models: [T4], family: mig-static}", gpu(0), MEMORY),
        # a rule without a word names every GPU
        ("{mode: mps}", gpu(3), Assigned(Family.MEMORY, Mode.MPS)),
        ("{indices: [0], mode: mps}, {family: replicas}", gpu(0), Assigned(Family.MEMORY, Mode.MPS)),
        (
            "{indices: [0], mode: mps}, {family: replicas}",
            gpu(1),
            Assigned(Family.REPLICAS, Mode.TIME_SLICING, resource="nvidia.com/gpu"),
        ),
    ],
)
def test_the_first_rule_that_names_a_gpu_decides(rule: str, of: PhysicalGPU, expected: Assigned) -> None:
    assert expected == assigned(rule, of)


@pytest.mark.parametrize(
    ("rule", "sentence"),
    [
        (
            "{family: mig-static, mode: mps}",
            "gpus[0]: mode: MIG instances are not shared by MPS, by NVIDIA's plugin neither",
        ),
        ("{family: mig-dynamic, mode: mps}", "gpus[0]: mode: expected mig with family mig-dynamic, got mps"),
        ("{family: mig-dynamic, replicas: 2}", "gpus[0]: replicas and failRequestsGreaterThanOne are for the families"),
        (
            "{family: replicas, renameShared: true}",
            "gpus[0]: profileReplicas and renameShared are for family mig-static",
        ),
        (
            "{family: mig-static, profileReplicas: {small: 2}}",
            "gpus[0]: profileReplicas: expected a MIG profile, such as 1g.5gb, got 'small'",
        ),
        ("{mode: exclusive}", "gpus[0]: mode: expected time-slicing or mps with family memory, got exclusive"),
        ("{model: A100}", "gpus[0].model: unknown key"),
        ("{indices: [-1]}", "gpus[0].indices[0]: expected int >= 0"),
    ],
)
def test_a_rule_that_cannot_be_is_refused_by_its_path(rule: str, sentence: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        convert(f"gpus: [{rule}]", DevicePluginConfiguration)
    assert sentence in str(refused.value).replace("...", "0")


class TestHeld:
    """Who holds a GPU is told by grants and by the kubelet, each of which may know more than the other."""

    @staticmethod
    def held(ids: Iterable[str], resource: str = NAMES.gpu_mem, *pods: Pod) -> frozenset[str] | None:
        listed = [Devices(PodName("default", "p"), resource, frozenset(ids))]
        return held(pods, NAMES, listed, ["GPU-0", "GPU-1"], {"MIG-1": "GPU-1"})

    @pytest.mark.parametrize(
        ("expected", "ids", "resource"),
        [
            ({"GPU-0"}, device_ids("GPU-0", 2), NAMES.gpu_mem),
            ({"GPU-1"}, [f"{id_prefix('GPU-1')}-1g.5gb.me-0"], NAMES.mig("1g.5gb+me")),
            ({"GPU-1"}, ["MIG-1::3"], NAMES.mig("1g.5gb")),
            ({"GPU-1"}, ["MIG-1"], "nvidia.com/gpu"),
            ({"GPU-0"}, ["GPU-0::1"], "nvidia.com/gpu.shared"),
            # of an instance that nobody knows by now it may be any
            (None, ["MIG-2"], NAMES.mig("1g.5gb")),
            (None, ["MIG-2"], "nvidia.com/gpu"),
        ],
    )
    def test_by_the_ids_of_a_pod_that_the_watch_does_not_show(
        self, expected: set[str] | None, ids: list[str], resource: str
    ) -> None:
        assert expected == self.held(ids, resource)

    def test_an_instance_that_is_not_read_yet_is_of_the_gpu_that_its_grant_names(self) -> None:
        grant = a_grant(placed("1g.5gb", 0, instance="MIG-2"))
        pod = a_pod().named("p").asking("1", of=NAMES.mig("1g.5gb")).bound_to("gpu-1", grant).build()
        assert frozenset({uuid(0)}) == self.held(["MIG-2"], NAMES.mig("1g.5gb"), pod)

    def test_instances_of_another_plugin_keep_none_of_ours(self) -> None:
        pod = a_pod().named("p").asking("1", of=NAMES.mig("1g.5gb")).build()
        assert frozenset() == self.held(["MIG-2"], NAMES.mig("1g.5gb"), pod)

    @pytest.mark.parametrize(
        ("resource", "ids"),
        [(NAMES.gpu_mem, device_ids("GPU-0", 2)), (NAMES.mig("1g.5gb"), [f"{id_prefix('GPU-1')}-1g.5gb-0"])],
    )
    def test_by_anything_but_instances_that_are_made(self, resource: str, ids: list[str]) -> None:
        grant = a_grant(placed("1g.5gb", 0, gpu=1))
        pod = a_pod().named("p").asking("1", of=NAMES.mig("1g.5gb")).bound_to("gpu-1", grant).build()
        expected = frozenset({"GPU-0"} if resource == NAMES.gpu_mem else ())
        listed = [Devices(PodName("default", "p"), resource, frozenset(ids))]
        assert expected == held([pod], NAMES, listed, ["GPU-0", "GPU-1"], {}, dynamic=False)

    def test_a_grant_that_cannot_be_read_may_be_of_any(self) -> None:
        pod = a_pod().named("p").asking("1", of=NAMES.gpu_mem).bound_to("gpu-1", "{not json").build()
        assert self.held([], NAMES.gpu_mem, pod) is None


class TestAssignment:
    """GPUs in use stay as they are, and so does the group that shares an MPS daemon with one."""

    @staticmethod
    def rules(*groups: tuple[str, list[int]]) -> list[GPURule]:
        return [GPURule(indices=tuple(indices), mode=Mode.MPS, group=group) for group, indices in groups]

    @pytest.mark.parametrize(
        ("then", "stay"),
        [
            ([("pair", [0, 1, 2])], ["pair", "pair", ""]),
            ([("pair", [0])], ["pair", "pair", ""]),
            ([("other", [1, 2])], ["pair", "pair", "other"]),
        ],
    )
    def test_nothing_joins_or_leaves_a_group_of_which_one_is_in_use(
        self, then: list[tuple[str, list[int]]], stay: list[str]
    ) -> None:
        gpus = [gpu(n) for n in range(3)]
        used: frozenset[str] = frozenset({"GPU-0"})
        told: list[str] = []
        assignment = Assignment(lambda: used, told.append)
        assignment.update(gpus, self.rules(("pair", [0, 1])))

        for _ in range(2):
            assignment.update(gpus, self.rules(*then))
        assert stay == [assignment.how(one).group for one in gpus]
        assert told

        used = frozenset()
        for _ in range(2):
            assignment.update(gpus, self.rules(*then))
        assert [assignment.how(one) for one in gpus] == [assign(one, self.rules(*then)) for one in gpus]

    @pytest.mark.parametrize("used", [frozenset({"GPU-0"}), None], ids=["held", "nobody-can-tell"])
    def test_a_gpu_stays_as_the_plugin_before_had_it_until_it_is_known_that_nobody_holds_it(
        self, used: frozenset[str] | None
    ) -> None:
        now: frozenset[str] | None = used
        assignment = Assignment(lambda: now, list[str]().append)
        assert assignment.recall({"GPU-0": DYNAMIC})
        # GPU 1 is new to the node, so that nobody can hold it
        gpus = [gpu(0), gpu(1)]

        assignment.update(gpus, self.rules(("", [0, 1])))
        assert [DYNAMIC, Assigned(mode=Mode.MPS)] == [assignment.how(one) for one in gpus]

        now = frozenset()
        for _ in range(2):
            assignment.update(gpus, self.rules(("", [0, 1])))
        assert [Assigned(mode=Mode.MPS)] * 2 == [assignment.how(one) for one in gpus]

    def test_what_an_inventory_does_not_tell_is_as_the_rules_have_it(self) -> None:
        assignment = Assignment(lambda: None, list[str]().append)
        shares = Assigned(Family.REPLICAS, replicas=0)
        assignment.recall({"GPU-0": shares})
        assignment.update([gpu()], [])
        assert shares == assignment.how(gpu())

        # also by an edit
        assignment.update([gpu()], [GPURule(family=Family.REPLICAS, replicas=4)])
        assert Assigned(Family.REPLICAS, resource="nvidia.com/gpu", replicas=4) == assignment.how(gpu())

    def test_a_gpu_that_a_pod_is_given_as_it_is_about_to_change_stays(self) -> None:
        used: frozenset[str] = frozenset()
        assignment = Assignment(lambda: used, list[str]().append)
        assignment.update([gpu(0), gpu(1)], [])
        shares = [GPURule(family=Family.REPLICAS, replicas=4)]

        assignment.update([gpu(0), gpu(1)], shares)
        assert [Family.MEMORY] * 2 == [assignment.how(gpu(n)).family for n in (0, 1)]
        assert {"GPU-0", "GPU-1"} == assignment.unfit.keys()

        used = frozenset({"GPU-0"})
        assignment.update([gpu(0), gpu(1)], shares)
        assert [Family.MEMORY, Family.REPLICAS] == [assignment.how(gpu(n)).family for n in (0, 1)]
        assert {} == assignment.unfit

        used = frozenset()
        assignment.update([gpu(0), gpu(1)], shares)
        assert {"GPU-0"} == assignment.unfit.keys()
        assignment.update([gpu(0), gpu(1)], shares)
        assert Family.REPLICAS is assignment.how(gpu(0)).family

    def test_a_gpu_that_was_gone_while_rules_changed_stays_as_its_pods_have_it(self) -> None:
        assignment = Assignment(lambda: frozenset({"GPU-1"}), list[str]().append)
        shares = [GPURule(family=Family.REPLICAS, replicas=4)]
        assignment.update([gpu(0), gpu(1)], [])
        for _ in range(2):
            assignment.update([gpu(0)], shares)
        for _ in range(2):
            assignment.update([gpu(0), gpu(1)], shares)
        assert [Family.REPLICAS, Family.MEMORY] == [assignment.how(gpu(n)).family for n in (0, 1)]

    def test_at_a_first_start_rules_apply_at_once(self) -> None:
        assignment = Assignment(lambda: frozenset({"GPU-0"}), list[str]().append)
        assert not assignment.recall(None)
        assignment.update([gpu()], self.rules(("", [0])))
        assert Assigned(mode=Mode.MPS) == assignment.how(gpu())

    def test_no_gpu_of_a_group_is_shared_otherwise_while_one_is_in_use(self) -> None:
        gpus = [gpu(n) for n in range(2)]
        told: list[str] = []
        assignment = Assignment(lambda: frozenset({"GPU-0"}), told.append)
        assignment.update(gpus, self.rules(("pair", [0, 1])))
        before = [assignment.how(one) for one in gpus]

        # the daemon's limits are those of all its GPUs together
        more = GPURule(indices=(1,), family=Family.REPLICAS, mode=Mode.MPS, group="pair", replicas=4)
        assignment.update(gpus, [more, *self.rules(("pair", [0]))])

        assert before == [assignment.how(one) for one in gpus]
        assert "the pods of its group" in told[0]
