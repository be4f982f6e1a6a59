"""A manifest's workload asks what its pods will ask once the API server has made them."""

from typing import Any

import pytest

from cotenant.contract.units import GIB
from cotenant.simulator import document
from cotenant.simulator.document import Document
from cotenant.simulator.manifest import read_template


def a_container(**resources: Any) -> dict[str, Any]:
    """A container that is limited to a unit of GPU memory besides."""
    limits = {"cotenant.io/gpu-mem": 1, **resources.pop("limits", {})}
    return {"name": "main", "resources": {"limits": limits, **resources}}


def a_deployment(*containers: dict[str, Any], **spec: Any) -> dict[str, Any]:
    template = {"spec": {"containers": list(containers), **spec}}
    return {"kind": "Deployment", "metadata": {"name": "web"}, "spec": {"replicas": 3, "template": template}}


def asked(*containers: dict[str, Any], **spec: Any) -> tuple[int, int]:
    """Thousandths of a core, and bytes of memory."""
    pod, _ = read_template([a_deployment(*containers, **spec)], Document())
    compute = document.request(pod, Document()).compute
    return compute.cpu_milli, compute.memory_bytes


class TestCompute:
    def test_what_stands_under_limits_alone_is_asked(self) -> None:
        assert (500, 2 * GIB) == asked(a_container(limits={"cpu": "500m", "memory": "2Gi"}))

    def test_what_is_asked_counts_and_not_its_limit(self) -> None:
        # the memory is not asked, so it is as limited
        assert (250, GIB) == asked(a_container(limits={"cpu": 4, "memory": "1Gi"}, requests={"cpu": "250m"}))

    def test_a_fraction_of_a_core_may_be_a_number(self) -> None:
        assert (500, 0) == asked(a_container(requests={"cpu": 0.5}))

    def test_limits_of_the_pod_as_a_whole_are_asked_where_no_container_asks(self) -> None:
        pod = {"limits": {"cpu": 8, "memory": "4Gi"}}
        assert (1000, 4 * GIB) == asked(a_container(requests={"cpu": 1}), resources=pod)

    def test_init_containers_ask_what_they_are_limited_to(self) -> None:
        init = {"name": "load", "resources": {"limits": {"cpu": 6}}}
        # 6 before, 2 later
        assert (6000, 0) == asked(a_container(limits={"cpu": 2}), initContainers=[init])

    @pytest.mark.parametrize("amount", ["abc", "200 cores", "-5", "800GB", float("nan")])
    def test_what_is_no_amount_is_refused(self, amount: str | float) -> None:
        expected = f"expected an amount such as 4, 500m or 16Gi, not '{amount}'"
        odd = {"memory": amount}
        wrong: list[tuple[str, list[dict[str, Any]], dict[str, Any]]] = [
            ("container main, memory", [a_container(requests=odd)], {}),
            ("container main, memory", [a_container(limits=odd)], {}),
            ("the pod, memory", [a_container()], {"resources": {"limits": odd}}),
            ("the pod's overhead, memory", [a_container()], {"overhead": odd}),
        ]
        for where, containers, spec in wrong:
            with pytest.raises(ValueError, match=f"^{where}: {expected}$"):
                asked(*containers, **spec)
