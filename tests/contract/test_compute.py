"""CPU and memory of a pod, counted as kube-scheduler counts them (component-helpers/resource/helpers.go)."""

from typing import Any

import msgspec
import pytest

from cotenant.contract.compute import NOTHING, Compute, allocatable, requests
from cotenant.contract.pods import Pod, Status
from cotenant.contract.units import GIB, MIB, parse_milli


def a_pod(*main: dict[str, Any], init: tuple[dict[str, Any], ...] = (), **spec: Any) -> Pod:
    """A pod whose containers ask for so much; an init container with restart=True is a sidecar."""

    def container(n: int, asked: dict[str, Any]) -> dict[str, Any]:
        asked = dict(asked)
        policy = {"restartPolicy": "Always"} if asked.pop("restart", False) else {}
        return {"name": f"c{n}", "resources": {"requests": asked}, **policy}

    return msgspec.convert(
        {
            "metadata": {"name": "p", "uid": "u"},
            "spec": {
                "containers": [container(n, asked) for n, asked in enumerate(main)],
                "initContainers": [container(n, asked) for n, asked in enumerate(init)],
                **spec,
            },
        },
        Pod,
    )


# one that asks 4 cores by its container, and one that does as a whole
RESIZED = [a_pod({"cpu": 4}), a_pod({"cpu": 2}, resources={"requests": {"cpu": 4}})]


def resizing(pod: Pod, in_force: dict[str, Any], allocated: dict[str, Any], *, refused: bool = False) -> Pod:
    """The pod while its first main container, or the pod where it names amounts of its own, is resized in place."""
    told = {"resources": {"requests": in_force}, "allocatedResources": allocated}
    status = told if pod.spec.resources else {"containerStatuses": [{"name": "c0", **told}]}
    reason = "Infeasible" if refused else "Deferred"
    conditions = [{"type": "Ready"}, {"type": "PodResizePending", "reason": reason}]
    return msgspec.structs.replace(pod, status=msgspec.convert({**status, "conditions": conditions}, Status))


def milli(pod: Pod) -> int:
    return requests(pod).cpu_milli


class TestRequests:
    def test_containers_add_up(self) -> None:
        asked = requests(a_pod({"cpu": "250m", "memory": "64Mi"}, {"cpu": 1, "memory": "1Gi"}))

        assert Compute(cpu_milli=1250, memory_bytes=GIB + 64 * MIB) == asked

    def test_an_init_container_counts_where_it_asks_more_than_what_follows(self) -> None:
        assert 3000 == milli(a_pod({"cpu": 1}, {"cpu": 1}, init=({"cpu": 3},)))
        assert 4000 == milli(a_pod({"cpu": 2}, {"cpu": 2}, init=({"cpu": 3},)))

    def test_init_containers_do_not_add_up(self) -> None:
        assert 3000 == milli(a_pod({"cpu": 1}, init=({"cpu": 3}, {"cpu": 2})))

    def test_a_sidecar_runs_beside_all_that_follow(self) -> None:
        # 1 + 3 while the second starts, 1 + 2 later
        assert 4000 == milli(a_pod({"cpu": 2}, init=({"cpu": 1, "restart": True}, {"cpu": 3})))
        # 3 before it, 1 + 4 later
        assert 5000 == milli(a_pod({"cpu": 4}, init=({"cpu": 3}, {"cpu": 1, "restart": True})))

    def test_what_the_pod_as_a_whole_names_counts_instead(self) -> None:
        pod = a_pod({"cpu": 4, "memory": "1Gi"}, resources={"requests": {"cpu": 6}})

        assert Compute(cpu_milli=6000, memory_bytes=GIB) == requests(pod)

    def test_overhead_comes_on_top(self) -> None:
        assert 1250 == milli(a_pod({"cpu": 1}, overhead={"cpu": "250m"}))

    @pytest.mark.parametrize("pod", RESIZED, ids=["container", "pod"])
    def test_while_a_pod_is_resized_in_place_the_most_that_it_has_or_asks_counts(self, pod: Pod) -> None:
        assert 4000 == milli(resizing(pod, {"cpu": 2}, {"cpu": 2}))
        assert 6000 == milli(resizing(pod, {"cpu": 6}, {"cpu": 4}))
        assert 6000 == milli(resizing(pod, {"cpu": 4}, {"cpu": 6}))
        assert 4000 == milli(resizing(pod, {"cpu": 4}, {"cpu": 4}))

    @pytest.mark.parametrize("pod", RESIZED, ids=["container", "pod"])
    def test_a_resize_that_the_node_could_never_hold_asks_nothing(self, pod: Pod) -> None:
        assert 3000 == milli(resizing(pod, {"cpu": 2}, {"cpu": 3}, refused=True))

    def test_an_ordinary_init_container_is_not_resized(self) -> None:
        pod = a_pod({}, init=({"cpu": 2},))

        assert 2000 == milli(resizing(pod, {"cpu": 5}, {"cpu": 5}))

    def test_a_pod_that_asks_nothing_takes_nothing(self) -> None:
        assert NOTHING is requests(a_pod({}))

    @pytest.mark.parametrize("amount", ["", "much", "-1", "1e999999"])
    def test_what_is_no_amount_counts_as_nothing(self, amount: str) -> None:
        assert 1000 == milli(a_pod({"cpu": amount}, {"cpu": 1}))

    def test_what_no_node_has_counts_as_the_most_that_is_counted(self) -> None:
        most = Compute(cpu_milli=1 << 31, memory_bytes=1 << 60)

        # three times 10**15 cores are 3 x 10**18 thousandths
        assert most == requests(a_pod(*3 * [{"cpu": "1P", "memory": "1Ei"}]))
        assert most == allocatable({"cpu": "10P", "memory": "1Ei"})


class TestAllocatable:
    def test_a_node_offers_what_it_says(self) -> None:
        assert Compute(cpu_milli=63_500, memory_bytes=8 * GIB) == allocatable({"cpu": "63500m", "memory": "8Gi"})

    def test_what_is_missing_is_nothing(self) -> None:
        assert NOTHING == allocatable(None)
        assert NOTHING == allocatable({"cpu": "x"})


@pytest.mark.parametrize(
    ("expected", "text"),
    [(1, "1m"), (1500, "1.5"), (2000, 2), (1, "1n"), (101, "100.5m"), (2_000_000, "2k"), (0, "0")],
)
def test_thousandths_are_rounded_up(expected: int, text: str | int) -> None:
    assert expected == parse_milli(text)
