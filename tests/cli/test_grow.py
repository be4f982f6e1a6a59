"""`cotenant grow` makes a twin that fits on new nodes alone."""

from typing import Any

import pytest

from cotenant.cli.grow import PRIORITY_CLASS, objection, twin
from cotenant.contract.names import Names
from tests.builders import NAMES, NodeBuilder, PodBuilder, a_node, a_pod, request_of
from tests.extender.test_explain import Cluster


def made(pod: PodBuilder, names: Names = NAMES, **spec: Any) -> Any:
    body = pod.as_json()
    return twin({**body, "spec": {**body["spec"], **spec}}, ["n2", "n1"], names, image="pause", minutes=5)


def terms(one: Any) -> Any:
    required = one["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    return required["nodeSelectorTerms"]


ELSEWHERE = {"key": "kubernetes.io/hostname", "operator": "NotIn", "values": ["n1", "n2"]}


def test_it_asks_the_same_of_another_node_and_runs_nothing() -> None:
    container = {"name": "main", "image": "train:1", "command": ["train"], "env": [{"name": "A", "value": "b"}]}
    limits = {"cpu": "4", NAMES.gpu_mem: "8", NAMES.managed: "0"}
    one = made(
        a_pod().named("train").wishing(gpu_count=2).annotated({"mine": "x"}),
        containers=[{**container, "resources": {"limits": limits, "requests": limits}}],
        nodeSelector={"pool": "a100"},
        volumes=[{"name": "data", "hostPath": {"path": "/"}}],
    )
    asked = {"cpu": "4", NAMES.gpu_mem: "8"}
    expected = {"name": "main", "image": "pause", "resources": {"limits": asked, "requests": asked}}
    assert [expected] == one["spec"]["containers"]
    assert ({"pool": "a100"}, PRIORITY_CLASS, 300) == tuple(
        one["spec"][key] for key in ("nodeSelector", "priorityClassName", "activeDeadlineSeconds")
    )
    assert "volumes" not in one["spec"]
    assert {NAMES.gpu_count: "2"} == one["metadata"]["annotations"]
    assert [{"matchExpressions": [ELSEWHERE]}] == terms(one)


def test_it_asks_what_sidecars_and_init_containers_ask_too() -> None:
    asking = a_pod().with_init(4).with_sidecar(2).asking(8)
    one = made(asking)
    found = PodBuilder(
        init=tuple(one["spec"]["initContainers"]),
        main=tuple(one["spec"]["containers"]),
    )

    assert request_of(asking) == request_of(found)
    assert {"pause"} == {each["image"] for kind in ("initContainers", "containers") for each in one["spec"][kind]}


def test_under_another_domain_it_wishes_the_same_too() -> None:
    ours = Names("gpu.example.com")
    wishes = {ours.gpu_model: "T4", ours.gpu_count: "2"}
    limits = {"limits": {ours.gpu_mem: "8", ours.managed: "0"}}
    one = made(a_pod().annotated(wishes), ours, containers=[{"name": "main", "resources": limits}])
    assert wishes == one["metadata"]["annotations"]
    assert {"limits": {ours.gpu_mem: "8"}} == one["spec"]["containers"][0]["resources"]


@pytest.mark.parametrize(
    ("expected", "nodes", "pod"),
    [
        ("", [a_node("a").with_gpu("80GiB"), a_node("b").with_mig()], a_pod().asking(80)),
        # a sound node would have the two
        ("", [a_node("a").with_gpus(2).unhealthy(0)], a_pod().asking(2).wishing(gpu_count=2)),
        ("over several GPUs with cotenant.io/gpu-count", [a_node("a").with_gpus(4, "80GiB")], a_pod().asking(150)),
        ("be it empty: ask for what they have", [a_node("a").with_mig()], a_pod().asking(1)),
        ("be it empty: ask for what they have", [a_node("a").with_gpus(1)], a_pod().asking(1).wishing(gpu_model="B2")),
        ("another node is not what it waits for", [], a_pod().asking(1)),
    ],
)
def test_where_an_equal_node_would_refuse_the_pod_too_none_is_asked_for(
    expected: str, nodes: list[NodeBuilder], pod: PodBuilder
) -> None:
    cluster = Cluster(*nodes).holding("p", "a", 0, 1)
    told = cluster.explain(pod)
    said = objection(len(told.fitting), [cluster.node(pod, view.name) for view, _ in told.order], NAMES)
    assert (bool(expected), True) == (bool(said), expected in said)


def test_every_alternative_of_the_pods_own_affinity_is_kept_and_is_elsewhere() -> None:
    zones = [{"matchExpressions": [{"key": "zone", "operator": "In", "values": [zone]}]} for zone in ("a", "b")]
    affinity = {
        "nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": zones}},
        "podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []},
    }
    one = made(a_pod().asking(8), affinity=affinity)
    assert [{"matchExpressions": [*zone["matchExpressions"], ELSEWHERE]} for zone in zones] == terms(one)
    assert "podAntiAffinity" in one["spec"]["affinity"]
