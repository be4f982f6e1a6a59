"""Who uses what, against what was granted."""

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotenant.contract.units import GIB
from device_plugin.nvml import GPUProcess
from device_plugin.watchdog import usage
from device_plugin.watchdog.cgroups import Origin
from device_plugin.watchdog.usage import Account
from tests.builders import NAMES, PodBuilder, a_grant, a_pod
from tests.builders import granted as grant_of

GPU = "GPU-1"
OTHER = "GPU-2"


def holding(name: str, amounts: dict[str, int], *, mode: str = "time-slicing", containers: int = 1) -> PodBuilder:
    """Make a pod whose containers main-0, main-1... run and were each granted so many bytes of each GPU."""
    names = [f"main-{n}" for n in range(containers)]
    pod = a_pod().named(name).bound_to("n", a_grant(*(grant_of(amounts, name=one, mode=mode) for one in names)))
    for _ in names:
        pod = pod.with_container(None)
    statuses = [{"name": one, "containerID": f"containerd://{name}-{one}"} for one in names]
    return PodBuilder(**{**vars(pod), "status": (*pod.status, ("containerStatuses", statuses))})


def look(
    pods: list[PodBuilder], processes: Mapping[str, list[tuple[int, int]]], origins: Mapping[int, Origin | None]
) -> Account:
    def origin(pid: int) -> Origin | None:
        return origins[pid]  # a KeyError is a LookupError: it has ended

    listed = {gpu: [GPUProcess(pid, amount) for pid, amount in some] for gpu, some in processes.items()}
    return usage.account(listed, origin, [pod.build() for pod in pods], NAMES)


def of(name: str, container: int = 0) -> Origin:
    return Origin(f"uid-of-{name}", f"{name}-main-{container}")


def test_processes_of_a_container_add_up_and_are_held_against_its_grant() -> None:
    found = look([holding("p", {GPU: 8 * GIB})], {GPU: [(1, 5 * GIB), (2, 4 * GIB)]}, {1: of("p"), 2: of("p")})
    (one,) = found.usages
    assert ("main-0", GPU, 9 * GIB, 8 * GIB) == (one.container, one.gpu, one.used_bytes, one.granted_bytes)
    assert [one] == usage.overuse(found.usages, GIB // 2)
    assert [] == usage.overuse(found.usages, GIB)  # no more than the margin


def test_containers_and_gpus_of_one_pod_are_told_apart() -> None:
    pod = holding("p", {GPU: 4 * GIB, OTHER: 4 * GIB}, containers=2)
    found = look([pod], {GPU: [(1, GIB), (2, 6 * GIB)], OTHER: [(2, GIB)]}, {1: of("p", 0), 2: of("p", 1)})
    assert {("main-0", GPU): GIB, ("main-1", GPU): 6 * GIB, ("main-1", OTHER): GIB} == {
        (one.container, one.gpu): one.used_bytes for one in found.usages
    }
    assert [("main-1", GPU)] == [(one.container, one.gpu) for one in usage.overuse(found.usages, 0)]


def test_the_victim_of_an_over_user_is_not_taken_for_one() -> None:
    pods = [holding("victim", {GPU: 8 * GIB}), holding("greedy", {GPU: 8 * GIB})]
    found = look(pods, {GPU: [(1, 8 * GIB), (2, 70 * GIB)]}, {1: of("victim"), 2: of("greedy")})
    assert ["greedy"] == [one.pod.metadata.name for one in usage.overuse(found.usages, 0)]


def test_a_gpu_that_was_not_granted_was_granted_with_nothing() -> None:
    found = look([holding("p", {GPU: 8 * GIB})], {OTHER: [(1, GIB)]}, {1: of("p")})
    assert [0] == [one.granted_bytes for one in usage.overuse(found.usages, 0)]


def test_where_the_container_is_not_known_yet_the_pod_may_use_all_that_it_was_granted() -> None:
    pod = holding("p", {GPU: 4 * GIB}, containers=2)
    unknown = Origin("uid-of-p", "not in the status yet")
    found = look([pod], {GPU: [(1, 7 * GIB)]}, {1: unknown})
    assert [("", 8 * GIB)] == [(one.container, one.granted_bytes) for one in found.usages]
    assert [] == usage.overuse(found.usages, 0)


def test_who_has_the_gpu_alone_is_shown_and_not_judged() -> None:
    found = look([holding("p", {GPU: 8 * GIB}, mode="exclusive")], {GPU: [(1, 80 * GIB)]}, {1: of("p")})
    assert [None] == [one.granted_bytes for one in found.usages]
    assert [] == usage.overuse(found.usages, 0)


def test_under_mps_the_sum_of_a_containers_processes_is_watched() -> None:
    # MPS would have let each of them have 8 GiB
    found = look(
        [holding("p", {GPU: 8 * GIB}, mode="mps")], {GPU: [(1, 8 * GIB), (2, 8 * GIB)]}, {1: of("p"), 2: of("p")}
    )
    assert [16 * GIB] == [one.used_bytes for one in usage.overuse(found.usages, 0)]


def test_a_pod_without_grant_and_one_whose_grant_cannot_be_read_are_shown_and_not_judged() -> None:
    bare, broken = a_pod().named("bare").bound_to("n"), a_pod().named("broken").bound_to("n", "{")
    found = look([bare, broken], {GPU: [(1, GIB), (2, GIB)]}, {1: of("bare"), 2: of("broken")})
    assert {"bare": True, "broken": False} == {one.pod.metadata.name: one.ungranted for one in found.usages}
    assert [] == usage.overuse(found.usages, 0)


def test_a_static_pod_is_known_by_the_hash_that_its_cgroup_has() -> None:
    pod = holding("p", {GPU: GIB}).annotated({"kubernetes.io/config.hash": "ab" * 16})
    found = look([pod], {GPU: [(1, GIB)]}, {1: Origin("ab" * 16)})
    assert ([], ["p"]) == ([*found.strangers], [one.pod.metadata.name for one in found.usages])


@pytest.mark.parametrize("forged", ["ab" * 16, "uid-of-victim", ""])
def test_a_pod_that_claims_to_be_a_static_one_hides_nothing_and_nobody(forged: str) -> None:
    greedy = holding("greedy", {GPU: GIB}).annotated({"kubernetes.io/config.hash": forged})
    for pods in ([greedy, holding("victim", {GPU: GIB})], [holding("victim", {GPU: GIB}), greedy]):
        found = look(pods, {GPU: [(1, GIB), (2, 70 * GIB)]}, {1: of("victim"), 2: of("greedy")})
        assert () == found.strangers
        assert {"victim": GIB, "greedy": 70 * GIB} == {one.pod.metadata.name: one.used_bytes for one in found.usages}


def test_processes_of_no_pod_and_of_pods_that_are_gone_are_strangers_and_those_that_ended_are_nobody() -> None:
    found = look([], {GPU: [(1, GIB), (2, 2 * GIB), (3, GIB)]}, {1: None, 2: of("gone")})
    assert [(GPU, 1, GIB), (GPU, 2, 2 * GIB)] == [(s.gpu, s.pid, s.used_bytes) for s in found.strangers]
    assert () == found.usages


def test_what_nvml_does_not_tell_counts_nothing() -> None:
    listed = {GPU: [GPUProcess(1, None)]}
    found = usage.account(listed, lambda _: of("p"), [holding("p", {GPU: GIB}).build()], NAMES)
    assert [0] == [one.used_bytes for one in found.usages]


processes = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 90 * GIB)), max_size=12, unique_by=lambda p: p[0])


@given(processes, st.lists(st.sampled_from(["p", "q", "r", "", "ended"]), min_size=51, max_size=51))
def test_no_byte_is_counted_twice_or_lost(listed: list[tuple[int, int]], owners: list[str]) -> None:
    origins = {pid: of(owners[pid]) if owners[pid] else None for pid, _ in listed if owners[pid] != "ended"}
    found = look([holding("p", {GPU: GIB}), holding("q", {GPU: GIB})], {GPU: listed}, origins)
    counted = sum(one.used_bytes for one in found.usages) + sum(one.used_bytes for one in found.strangers)
    assert sum(amount for pid, amount in listed if owners[pid] != "ended") == counted
