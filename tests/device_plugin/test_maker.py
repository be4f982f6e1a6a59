"""The maker of MIG instances is killed at every call of NVML; whatever it left, the next one puts right."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cotenant.cluster import ClusterError
from cotenant.contract.pods import Pod
from cotenant.contract.reasons import Reason
from device_plugin.admission.identity import PodName
from device_plugin.admission.refusal import RefusedError
from device_plugin.cdi import SpecFolder
from device_plugin.families.maker import Maker
from device_plugin.nvml import NVML
from device_plugin.nvml.fake_mig import CrashError, Fault, StateFile
from tests.builders import NAMES, a_grant, a_pod
from tests.device_plugin.node import SECONDS, uuid
from tests.device_plugin.test_mig import placed

A100 = f"gpus: [{{model: NVIDIA A100-SXM4-40GB, memory: 40GiB, mig: true, uuid: {uuid(0)}}}]"


@dataclass
class Pods:
    """The API server's pods, and those of them that the cache has heard of."""

    stored: dict[str, Pod] = field(default_factory=dict)
    heard: set[str] = field(default_factory=set)
    synced: bool = True
    away: bool = False
    # those of whose end it has not heard
    ended: list[Pod] = field(default_factory=list)

    def all_known(self) -> Sequence[Pod]:
        return [*self.ended, *(pod for name, pod in self.stored.items() if name in self.heard)]

    def ended_unheard(self, name: str) -> None:
        self.ended.append(self.stored.pop(name))

    def read(self, name: PodName, *, deadline: float) -> Pod | None:
        del deadline
        if self.away:
            raise ClusterError("nobody answers")
        return self.stored.get(name.name)

    def add(self, name: str, profile: str, start: int, *, heard: bool = True) -> Pod:
        builder = a_pod().named(name).asking("1", of=NAMES.mig(profile))
        pod = builder.bound_to("gpu-1", a_grant(placed(profile, start, name="main-0"))).build()
        self.stored[name] = pod
        if heard:
            self.heard.add(name)
        return pod


class Bench:
    def __init__(self, folder: Path) -> None:
        self.file = folder / "gpus.yaml"
        self.file.write_text(A100)
        self.cdi = folder / "cdi"
        self.state = StateFile(folder / "gpus.yaml")
        self.pods = Pods()

    def maker(self) -> Maker:
        """Start a plugin anew: nothing is remembered but what lies in files."""
        nvml = NVML.open(fake=self.file)
        gpus = {gpu.uuid: gpu for gpu in nvml.gpus()}
        return Maker(nvml, SpecFolder(self.cdi, NAMES, "nvidia.com/gpu"), self.pods, NAMES, gpus=lambda: gpus)

    def ensure(self, pod: Pod, profile: str, start: int) -> None:
        self.maker().ensure(pod, placed(profile, start, name="main-0"))

    def there(self) -> dict[int, tuple[str, str]]:
        return {one.start: (one.profile, one.uuid) for one in self.state.read().instances}

    def specs(self) -> int:
        return len(list(self.cdi.glob("cotenant-mig-*.json")))

    def killed(self, calls: int, when: str, work: Callable[[], object]) -> bool:
        """Do *work*, killed at the *calls*-th call; tell whether it came so far."""
        self.state.arm(Fault(calls=calls, do="crash", when="after" if when == "after" else "before"))
        try:
            work()
        except CrashError:
            return True
        finally:
            self.state.arm(None)
        return False


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_crash_at_any_call_loses_no_instance_in_use_and_leaks_none(bench: Bench, when: str) -> None:
    steady = bench.pods.add("steady", "3g.20gb", 4)
    bench.ensure(steady, "3g.20gb", 4)
    before = bench.there()[4]
    struck = 0
    for calls in range(1, 400):
        pod = bench.pods.add("p", "2g.10gb", 0)
        made = bench.killed(calls, when, lambda pod=pod: bench.ensure(pod, "2g.10gb", 0))  # type: ignore[misc]
        bench.maker().sweep()
        bench.ensure(pod, "2g.10gb", 0)
        assert {0, 4} == bench.there().keys()
        assert ("2g.10gb", True) == (bench.there()[0][0], bool(bench.there()[0][1]))

        del bench.pods.stored["p"]
        bench.pods.heard.discard("p")
        cleared = bench.killed(calls, when, lambda: bench.maker().sweep())
        bench.maker().sweep()
        assert {4: before} == bench.there()
        assert 1 == bench.specs()
        struck += made + cleared
        if not (made or cleared):
            break
    assert struck > 60, "the faults hardly ever struck"
    assert calls < 399, "calls after the last that was tried were not killed"


def test_an_instance_that_somebody_has_divided_is_made_anew(bench: Bench) -> None:
    pod = bench.pods.add("p", "3g.20gb", 4)
    NVML.open(fake=bench.file).create_mig_instance(0, "3g.20gb", 4)
    with bench.state.change() as changed:
        changed.instances[0].compute_slices = 1

    bench.ensure(pod, "3g.20gb", 4)

    (one,) = NVML.open(fake=bench.file).mig_instances(0)
    assert ("3g.20gb", False) == (one.profile, one.divided)


def test_an_instance_is_kept_whose_pod_the_cache_has_not_heard_of(bench: Bench) -> None:
    pod = bench.pods.add("new", "1g.5gb", 6, heard=False)
    bench.ensure(pod, "1g.5gb", 6)
    bench.maker().sweep()
    assert [6] == list(bench.there())
    # and while the API server cannot be asked
    del bench.pods.stored["new"]
    bench.pods.away = True
    bench.maker().sweep()
    assert [6] == list(bench.there())
    bench.pods.away = False
    bench.maker().sweep()
    assert {} == bench.there()


def test_an_instance_is_kept_of_which_nobody_can_read_whose_it_is(bench: Bench) -> None:
    pod = bench.pods.add("new", "1g.5gb", 6, heard=False)
    bench.ensure(pod, "1g.5gb", 6)
    before = bench.there()
    [spec] = bench.cdi.iterdir()
    away = spec.rename(bench.cdi.parent / spec.name)
    spec.symlink_to("/proc/self/mem")  # whose first bytes are an I/O error
    bench.maker().sweep()
    with pytest.raises(RefusedError, match="Input/output error"):
        bench.ensure(pod, "1g.5gb", 6)
    away.replace(spec)
    bench.ensure(pod, "1g.5gb", 6)
    assert before == bench.there()


def test_nothing_is_swept_before_the_pods_are_known_or_while_a_grant_cannot_be_read(bench: Bench) -> None:
    NVML.open(fake=bench.file).create_mig_instance(0, "1g.5gb", 6)
    bench.pods.synced = False
    bench.maker().sweep()
    assert [6] == list(bench.there())
    bench.pods.synced = True
    odd = a_pod().named("odd").asking("1", of=NAMES.mig("1g.5gb")).bound_to("gpu-1", "{not json").build()
    bench.pods.stored["odd"] = odd
    bench.pods.heard.add("odd")
    bench.maker().sweep()
    assert [6] == list(bench.there())
    del bench.pods.stored["odd"]
    bench.maker().sweep()
    assert {} == bench.there()


def test_an_instance_that_no_container_could_use_starts_none_and_says_why(bench: Bench) -> None:
    pod = bench.pods.add("p", "1g.5gb", 6)
    minors = bench.file.with_name(f"{bench.file.name}.mig-minors")
    minors.write_text("config 1\nmonitor 2\n")
    with pytest.raises(RefusedError, match=r"lists no gpu0/gi13/access and .*; it is tried again") as refused:
        bench.ensure(pod, "1g.5gb", 6)
    assert Reason.NO_MIG_ROOM is refused.value.reason
    assert 0 == bench.specs()
    minors.unlink()  # the made-up driver then lists all there may be
    bench.ensure(pod, "1g.5gb", 6)
    assert 1 == bench.specs()


def test_the_next_pod_of_a_place_gets_an_instance_of_its_own(bench: Bench) -> None:
    first = bench.pods.add("first", "1g.5gb", 6)
    bench.ensure(first, "1g.5gb", 6)
    del bench.pods.stored["first"]
    second = bench.pods.add("second", "1g.5gb", 6)
    bench.ensure(second, "1g.5gb", 6)
    # its UUID is the same
    assert ["create", "use", "end", "destroy", "create", "use"] == [
        what for _, what, _, _ in bench.state.read().journal
    ]
    assert 1 == bench.specs()


def test_a_container_that_starts_again_keeps_its_instance_and_what_another_pod_holds_is_not_touched(
    bench: Bench,
) -> None:
    pod = bench.pods.add("p", "3g.20gb", 4)
    bench.ensure(pod, "3g.20gb", 4)
    before = bench.there()
    bench.ensure(pod, "3g.20gb", 4)
    assert before == bench.there()
    thief = bench.pods.add("thief", "1g.5gb", 5)
    with pytest.raises(RefusedError, match=r"pod default/p holds 3g\.20gb at 4") as refused:
        bench.ensure(thief, "1g.5gb", 5)
    assert Reason.NO_MIG_ROOM is refused.value.reason
    assert before == bench.there()


@pytest.mark.parametrize("away", [False, True])
def test_a_holder_that_has_ended_unheard_keeps_nobody_waiting(bench: Bench, *, away: bool) -> None:
    first = bench.pods.add("first", "3g.20gb", 4)
    bench.ensure(first, "3g.20gb", 4)
    second = bench.pods.add("second", "1g.5gb", 5)
    bench.pods.ended_unheard("first")
    bench.pods.away = away
    if away:
        with pytest.raises(RefusedError, match=r"pod default/first holds 3g\.20gb at 4"):
            bench.ensure(second, "1g.5gb", 5)
    bench.pods.away = False
    bench.ensure(second, "1g.5gb", 5)
    assert {5: "1g.5gb"} == {start: profile for start, (profile, _) in bench.there().items()}


def test_a_gpu_whose_driver_hangs_holds_up_no_instance_of_another(bench: Bench) -> None:
    def write(first: str) -> None:
        one = "model: NVIDIA A100-SXM4-40GB, memory: 40GiB, mig: true"
        bench.file.write_text(f"gpus: [{{{one}, uuid: {uuid(0)}, {first}}}, {{{one}, uuid: {uuid(1)}}}]")

    write("")
    maker = bench.maker()
    waits, goes_on = bench.pods.add("waits", "1g.5gb", 6), bench.pods.add("goes-on", "1g.5gb", 6)
    write("hang: true")
    hung = threading.Thread(target=maker.ensure, args=(waits, placed("1g.5gb", 6, name="main-0")), daemon=True)
    hung.start()
    other = threading.Thread(
        target=maker.ensure, args=(goes_on, placed("1g.5gb", 6, gpu=1, name="main-0")), daemon=True
    )
    other.start()
    other.join(SECONDS)
    assert [uuid(1)] == [one.gpu for one in bench.state.read().instances]

    write("")
    hung.join(SECONDS)
    assert {uuid(0), uuid(1)} == {one.gpu for one in bench.state.read().instances}
