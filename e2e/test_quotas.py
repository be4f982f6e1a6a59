"""Quotas on the real API server: Kubernetes' own, kept by its own controller, and the limits of namespaces."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e import nodes, policies
from e2e.cluster import ControlPlane
from e2e.nodes import Shape
from e2e.processes import MissingProgramError, Program, find_program, wait_until
from e2e.programs import RunningExtender
from e2e.rest import Api, ApiError, Object

GPU_MEM = "cotenant.io/gpu-mem"
GIB = 1 << 30


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[ControlPlane]:
    """A control plane with our policies and the controller that keeps ResourceQuotas."""
    try:
        with ControlPlane(tmp_path / "control-plane") as started, policies.installed(started.api()):
            manager = Program(
                [
                    find_program("kube-controller-manager"),
                    f"--kubeconfig={started.kubeconfig()}",
                    "--controllers=resourcequota-controller",
                    "--leader-elect=false",
                    "--secure-port=0",
                ],
                log=tmp_path / "kube-controller-manager.log",
            )
            yield started
            manager.stop()
    except MissingProgramError as missing:
        pytest.skip(str(missing))


def namespace(api: Api, name: str, hard: dict[str, str] | None = None) -> None:
    """Make a namespace with a quota, and wait until it is in force."""
    api.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    if not hard:
        return
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "gpus", "namespace": name}}
    api.create({**quota, "spec": {"hard": hard}})
    api.wait(
        "ResourceQuota",
        "gpus",
        lambda seen: seen is not None and seen.get("status", {}).get("hard") == hard,
        namespace=name,
        saying="to be in force",
    )


def a_pod(name: str, within: str, limits: dict[str, int], **annotations: str) -> Object:
    asks = {resource: str(amount) for resource, amount in limits.items()}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": within, "annotations": annotations},
        "spec": {
            "containers": [{"name": "main", "image": "x", "resources": {"limits": asks}}],
            "automountServiceAccountToken": False,
        },
    }


def test_a_resource_quota_counts_our_resources_as_any(cluster: ControlPlane) -> None:
    api = cluster.api()
    hard = {f"requests.{GPU_MEM}": "16", "requests.nvidia.com/mig-3g.20gb": "1"}
    namespace(api, "team", hard)
    api.create(a_pod("a", "team", {GPU_MEM: 10}))
    api.create(a_pod("instance", "team", {"nvidia.com/mig-3g.20gb": 1}))

    with pytest.raises(ApiError) as memory:
        api.create(a_pod("b", "team", {GPU_MEM: 7}))
    # an alias is rewritten before it is counted: 7000 MiB are 7 GiB
    with pytest.raises(ApiError) as alias:
        api.create(a_pod("c", "team", {"nvidia.com/gpumem": 7000}))
    with pytest.raises(ApiError) as instance:
        api.create(a_pod("d", "team", {"nvidia.com/mig-3g.20gb": 1}))

    for refused in (memory, alias):
        assert 403 == refused.value.code
        assert (
            f"exceeded quota: gpus, requested: requests.{GPU_MEM}=7, used: requests.{GPU_MEM}=10, "
            f"limited: requests.{GPU_MEM}=16"
        ) in str(refused.value)
    assert "used: requests.nvidia.com/mig-3g.20gb=1, limited: requests.nvidia.com/mig-3g.20gb=1" in str(instance.value)
    api.create(a_pod("e", "team", {GPU_MEM: 6}))  # 10 + 6 are all of 16


def test_a_namespace_beyond_its_limit_waits_with_a_sentence_and_goes_on_when_others_end(
    cluster: ControlPlane, tmp_path: Path
) -> None:
    api = cluster.api()
    nodes.register(api, 2, Shape(gpus=2, gpu_bytes=80 * GIB), prefix="large")
    namespace(api, "team")
    config = tmp_path / "extender.yaml"
    config.write_text("namespaces: {team: {gpuMemory: 16GiB, isolations: [none, limited]}}")
    with (
        RunningExtender(cluster, tmp_path / "extender", flags=[f"--config={config}"]) as extender,
        cluster.scheduling(extender.scheduler_config()),
    ):
        api.create(a_pod("a", "team", {GPU_MEM: 10}))
        api.bound("a", namespace="team")
        api.create(a_pod("b", "team", {GPU_MEM: 7}))
        api.create(a_pod("alone", "team", {GPU_MEM: 1}, **{"cotenant.io/isolation": "exclusive"}))
        api.create(a_pod("other", "default", {GPU_MEM: 70}))
        for name, because in (
            ("b", "namespace team may hold 16 GiB of GPU memory, of which its pods leave less than the 7 GiB"),
            ("alone", "namespace team may ask cotenant.io/isolation: none or limited, and the pod asks exclusive"),
        ):
            api.unschedulable(name, because, namespace="team")
        api.bound("other")
        # a message that changed would have kube-scheduler try again and again
        before = attempts(cluster, "b")
        time.sleep(5)
        assert attempts(cluster, "b") - before <= 1

        api.delete("Pod", "a", namespace="team", grace_s=0)
        api.bound("b", namespace="team")


def attempts(cluster: ControlPlane, pod: str) -> int:
    """Count how often kube-scheduler wrote down that it could not place a pod."""
    writes, _ = cluster.audit()
    return sum(one.name == pod and one.subresource == "status" for one in writes)


def test_many_pods_at_once_do_not_pass_a_limit(cluster: ControlPlane, tmp_path: Path) -> None:
    api = cluster.api()
    nodes.register(api, 4, Shape(gpus=4, gpu_bytes=80 * GIB), prefix="large")
    namespace(api, "team")
    config = tmp_path / "extender.yaml"
    config.write_text("namespaces: {team: {gpuMemory: 20GiB, gpus: 9}}")
    with (
        RunningExtender(cluster, tmp_path / "extender", flags=[f"--config={config}"]) as extender,
        cluster.scheduling(extender.scheduler_config()),
    ):
        for n in range(30):
            api.create(a_pod(f"p{n}", "team", {GPU_MEM: 2}))

        def bound() -> int:
            return sum("nodeName" in one["spec"] for one in api.list("Pod", namespace="team"))

        # 20 GiB are ten pods of 2, but 9 GPUs are nine
        assert wait_until(lambda: bound() >= 9, timeout_s=60)
        time.sleep(3)
        assert 9 == bound()
