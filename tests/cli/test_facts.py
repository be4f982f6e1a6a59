"""The demo finds every way in which annotation, environment and device ids can disagree."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from cotenant.cli.demo import facts
from cotenant.contract import grant as grants
from cotenant.contract.environment import MPS_MEMORY, VISIBLE_DEVICES, annotations, informative, injected
from cotenant.contract.grant import ContainerGrant, GPUShare, Grant, Isolation, IsolationRecord, Role
from cotenant.contract.inventory import GPU, Family, Inventory, Mode
from cotenant.contract.names import Names
from cotenant.contract.units import GIB, device_ids
from cotenant.standins.api_server import Write
from cotenant.standins.kubelet_pods import Started

if TYPE_CHECKING:
    from cotenant.cli.demo.stage import Stage

NAMES = Names()
GPUS = tuple(
    GPU(uuid=f"GPU-{n}", index=n, model="Tesla T4", total_bytes=15 * GIB, usable_bytes=14 * GIB) for n in range(2)
)
CONTAINER = ContainerGrant(
    name="main",
    role=Role.MAIN,
    family=Family.MEMORY,
    mode=Mode.TIME_SLICING,
    gpus=(GPUShare(uuid="GPU-0", bytes=2 * GIB), GPUShare(uuid="GPU-1", bytes=2 * GIB)),
    units=4,
    isolation=IsolationRecord(asked=Isolation.NONE, given=Isolation.NONE, enforced_by="nothing"),
)


class Scene:
    """A pod of one container on two GPUs, of which all agree until a test changes something."""

    def __init__(self) -> None:
        self.annotations = annotations(Grant(containers=(CONTAINER,)), NAMES)
        self.environment = injected(CONTAINER) | informative(CONTAINER)
        self.ids = {*device_ids("GPU-0", 2), *device_ids("GPU-1", 2)}
        self.gpus = GPUS

    def disagreements(self) -> list[str]:
        started = Started(
            env=self.environment,
            ids={NAMES.gpu_mem: frozenset(self.ids)},
            mounts={},
            devices={},
            cdi_devices=(),
            times=1,
        )
        inventory = Inventory(generation=1, unit_bytes=GIB, gpus=self.gpus)
        stage = SimpleNamespace(
            names=NAMES,
            inventory=lambda _node: inventory,
            kubelets={"n": SimpleNamespace(started=lambda _uid, _container: started)},
        )
        pod = {"metadata": {"uid": "u", "annotations": self.annotations}, "spec": {"nodeName": "n"}}
        return [found for given in facts.given(cast("Stage", stage), pod) for found in given.disagreements]


def test_what_agrees_is_not_complained_about() -> None:
    assert [] == Scene().disagreements()


def _set(mapping: str, key: str, value: str) -> Callable[[Scene], Any]:
    return lambda scene: getattr(scene, mapping).update({key: value})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        pytest.param(_set("environment", VISIBLE_DEVICES, "all"), "NVIDIA_VISIBLE_DEVICES=all", id="env of all GPUs"),
        pytest.param(_set("environment", MPS_MEMORY, ""), "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT=,", id="env empty"),
        pytest.param(_set("environment", "COTENANT_MODE", "mps"), "COTENANT_MODE=mps", id="env of Allocate"),
        pytest.param(
            _set("annotations", NAMES.visible_devices("main"), "GPU-1"),
            "annotation visible-devices.cotenant.io/main is GPU-1",
            id="annotation",
        ),
        pytest.param(lambda s: s.ids.pop(), "holds ids of", id="an id too few"),
        pytest.param(
            lambda s: setattr(s, "ids", {*device_ids("GPU-0", 1), *device_ids("GPU-1", 3)}),
            "holds ids of",
            id="an id of the other GPU",
        ),
        pytest.param(
            lambda s: setattr(s, "ids", {*device_ids("GPU-0", 2), *device_ids("GPU-9", 2)}),
            "holds ids of",
            id="ids of a foreign GPU",
        ),
        pytest.param(lambda s: setattr(s, "gpus", GPUS[:1]), "GPU GPU-1 is not one of node n", id="a lost GPU"),
    ],
)
def test_a_disagreement_is_found_and_named(change: Callable[[Scene], Any], sentence: str) -> None:
    scene = Scene()
    change(scene)
    found = scene.disagreements()
    assert 1 == len(found), found
    assert sentence in found[0]


def test_a_pod_whose_grant_cannot_be_read_has_nothing() -> None:
    scene = Scene()
    scene.annotations[NAMES.grant] = "{"
    stage = SimpleNamespace(names=NAMES, inventory=lambda _node: None)
    pod = {"metadata": {"uid": "u", "annotations": scene.annotations}, "spec": {"nodeName": "n"}}
    assert [] == facts.given(cast("Stage", stage), pod)
    assert grants.VERSION == 1


BINDING = Write("create", "pods", "binding", "default", "p", 201, "cotenant-extender")


@pytest.mark.parametrize(
    ("writes", "wrong"),
    [
        pytest.param([BINDING], 0, id="one binding"),
        pytest.param([], 1, id="no write"),
        pytest.param([BINDING, BINDING], 1, id="two bindings"),
        pytest.param([BINDING._replace(status=409)], 1, id="a binding that was refused"),
        pytest.param([BINDING._replace(user="kube-scheduler")], 1, id="somebody else's binding"),
        pytest.param([BINDING, Write("patch", "pods", "", "default", "p", 200, "cotenant-extender")], 1, id="a patch"),
        pytest.param(
            [BINDING, Write("patch", "pods", "", "default", "q", 200, "cotenant-device-plugin-n")], 1, id="another pod"
        ),
        pytest.param(
            [BINDING, Write("patch", "pods", "status", "default", "p", 200, "kubelet-n")], 0, id="the kubelet"
        ),
        pytest.param([BINDING, Write("patch", "nodes", "", "", "n", 200, "cotenant-device-plugin-n")], 0, id="a node"),
    ],
)
def test_every_pod_is_written_to_exactly_once(writes: list[Write], wrong: int) -> None:
    stage = cast("Stage", SimpleNamespace(api=SimpleNamespace(writes=writes)))
    assert wrong == len(facts.wrong_writes(stage, {"p"}))


def test_only_a_refusal_by_the_scheduler_is_waiting() -> None:
    def pod(reason: str) -> dict[str, Any]:
        condition = {"type": "PodScheduled", "status": "False", "reason": reason, "message": "why"}
        return {"status": {"conditions": [condition]}}

    assert "why" == facts.why_waiting(pod("Unschedulable"))
    assert "" == facts.why_waiting(pod("SchedulerError"))
    assert "" == facts.why_waiting({})
