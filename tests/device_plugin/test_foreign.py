"""What others have of a GPU: by the names that their device ids carry, by processes, by units without a grant."""

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotenant.contract.inventory import GPU, MIG, Family, Foreign, MIGInstance, Mode
from cotenant.contract.pods import Pod
from cotenant.contract.units import GIB, device_ids, id_prefix
from device_plugin.admission.identity import Devices, PodName
from device_plugin.coexistence.foreign import LOOKS, ForeignUse
from device_plugin.watchdog.usage import Account, Stranger, Usage
from tests.builders import NAMES, a_grant, a_pod, granted

ONE = "GPU-11111111-0000-4000-8000-000000000000"
OTHER = "GPU-22222222-0000-4000-8000-000000000000"
INSTANCE = "MIG-33333333-0000-4000-8000-000000000000"
OURS = frozenset({NAMES.gpu_mem})


def a_gpu(uuid: str = ONE, index: int = 0, **more: object) -> GPU:
    fields = {"uuid": uuid, "index": index, "model": "H100", "total_bytes": 80 * GIB, "usable_bytes": 79 * GIB}
    return GPU(**{**fields, **more})  # type: ignore[arg-type]


def devices(pod: str, resource: str, *ids: str) -> Devices:
    return Devices(PodName("default", pod), resource, frozenset(ids))


class Looking:
    """Look again and again at two GPUs."""

    def __init__(self, *gpus: GPU) -> None:
        self._gpus = gpus or (a_gpu(), a_gpu(OTHER, 1))
        self._use = ForeignUse(NAMES, GIB)

    def look(
        self, *listed: Devices, pods: Iterable[Pod] = (), used: Account | None = None, times: int = 1
    ) -> dict[str, Foreign]:
        for _ in range(times):
            found = self._use.look(self._gpus, listed, OURS, pods, used or Account())
        return found


@pytest.mark.parametrize(
    "device",
    # whole, NVIDIA's replicas, gpushare's units, HAMi's shares; and by index, where NVIDIA's plugin is told to
    [ONE, f"{ONE}::0", f"{ONE}-_-17", f"{ONE}-3", "0", "0::2", "0:1"],
)
def test_a_device_of_another_plugin_fences_the_gpu_that_it_names_and_no_other(device: str) -> None:
    found = Looking().look(devices("train", "nvidia.com/gpu", device))
    assert {ONE: Foreign(fenced=True, detail="held by pod default/train as nvidia.com/gpu")} == found


def test_units_of_a_cotenant_of_another_domain_fence_the_gpu_that_they_are_counted_on() -> None:
    found = Looking().look(devices("before", "example.com/gpu-mem", *device_ids(ONE, 2)))
    assert {ONE: Foreign(fenced=True, detail="held by pod default/before as example.com/gpu-mem")} == found


@pytest.mark.parametrize("device", [f"{ONE}0", "GPU-1", "", "2", "00000", "NIC-0"])
def test_a_device_that_only_looks_alike_fences_nothing(device: str) -> None:
    assert {} == Looking().look(devices("train", "nvidia.com/gpu", device))


@pytest.mark.parametrize("resource", ["gpu", "gpu.shared", "gpu-training", "mig-1g.5gb", "mig-1g.5gb.shared"])
def test_an_index_is_a_gpus_in_the_resources_of_nvidias_plugin(resource: str) -> None:
    assert [ONE] == [*Looking().look(devices("train", f"nvidia.com/{resource}", "0"))]


# those of virtual machines have the numbers of IOMMU groups
@pytest.mark.parametrize("resource", ["example.com/nic", "nvidia.com/AD102GL_L40S", "nvidia.com/pgpu"])
def test_a_number_is_no_index_in_others(resource: str) -> None:
    assert {} == Looking().look(devices("vm", resource, "0"))
    assert [ONE] == [*Looking().look(devices("vm", resource, ONE))]


def test_a_mig_instance_of_another_plugins_fences_its_gpu() -> None:
    mig = MIG(instances=(MIGInstance(profile="3g.20gb", start=0, size=4, uuid=INSTANCE),))
    gpu = a_gpu(family=Family.MIG_STATIC, mode=Mode.MIG, mig=mig)
    assert Looking(gpu).look(devices("train", "nvidia.com/mig-3g.20gb", INSTANCE))[ONE].fenced


def test_what_we_serve_ourselves_fences_nothing() -> None:
    pod = a_pod().named("ours").asking(2).bound_to("n", a_grant(granted({ONE: 2 * GIB}))).build()
    ids = [f"{id_prefix(ONE)}-{n}" for n in range(2)]
    assert {} == Looking().look(devices("ours", NAMES.gpu_mem, *ids), pods=[pod], times=3)


class TestUnitsWithoutAGrant:
    """Ids that the kubelet keeps for a pod without a grant count as taken, at the second look."""

    ids = tuple(f"{id_prefix(ONE)}-{n}" for n in range(3))

    @pytest.mark.parametrize(
        "pods",
        [
            [],
            [a_pod().named("bare").asking(3).bound_to("n").build()],
            # a grant of another GPU is none of this one
            [a_pod().named("bare").asking(3).bound_to("n", a_grant(granted({OTHER: 3 * GIB}))).build()],
        ],
    )
    def test_they_count(self, pods: list[Pod]) -> None:
        looking = Looking()
        assert {} == looking.look(devices("bare", NAMES.gpu_mem, *self.ids), pods=pods)
        found = looking.look(devices("bare", NAMES.gpu_mem, *self.ids), pods=pods)
        assert {ONE: Foreign(bytes=3 * GIB, detail="used without a grant by pod default/bare")} == found

    def test_a_grant_that_the_watch_was_late_with_counts_once(self) -> None:
        looking = Looking()
        looking.look(devices("late", NAMES.gpu_mem, *self.ids))
        pod = a_pod().named("late").asking(3).bound_to("n", a_grant(granted({ONE: 3 * GIB}))).build()
        assert {} == looking.look(devices("late", NAMES.gpu_mem, *self.ids), pods=[pod])

    def test_what_the_pod_uses_besides_is_not_added(self) -> None:
        pod = a_pod().named("bare").asking(3).bound_to("n").build()
        used = Account(usages=(Usage(pod, "main", ONE, 5 * GIB, None, ungranted=True),))
        found = Looking().look(devices("bare", NAMES.gpu_mem, *self.ids), pods=[pod], used=used, times=2)
        assert 5 * GIB == found[ONE].bytes


class TestProcesses:
    """Processes of no pod, and of pods without a grant, count with what they use, in whole units."""

    def test_each_user_counts_in_whole_units(self) -> None:
        bare = a_pod().named("bare").build()
        used = Account(
            usages=(Usage(bare, "main", ONE, GIB // 2, None, ungranted=True),),
            strangers=(Stranger(ONE, 7, 3 * GIB), Stranger(ONE, 8, 1)),
        )
        found = Looking().look(pods=[bare], used=used, times=2)
        # half a GiB is 1, and 3 GiB and a byte are 4
        who = "used without a grant by pod default/bare, processes of no pod"
        assert {ONE: Foreign(bytes=5 * GIB, detail=who)} == found

    def test_one_of_which_nvml_does_not_say_how_much_counts_as_a_unit(self) -> None:
        assert GIB == Looking().look(used=Account(strangers=(Stranger(ONE, 7, 0),)), times=2)[ONE].bytes

    def test_a_process_that_is_seen_once_may_be_a_pods_that_is_not_known_yet(self) -> None:
        looking = Looking()
        assert {} == looking.look(used=Account(strangers=(Stranger(ONE, 7, GIB),)))
        assert {} == looking.look()

    def test_a_pod_that_was_granted_is_the_watchdogs_matter(self) -> None:
        pod = a_pod().bound_to("n", a_grant(granted({ONE: GIB}))).build()
        used = Account(usages=(Usage(pod, "main-0", ONE, 9 * GIB, GIB),))
        assert {} == Looking().look(pods=[pod], used=used, times=3)


@given(st.lists(st.integers(0, 12), min_size=1, max_size=20))
def test_more_is_believed_at_once_and_less_only_when_several_looks_find_it(amounts: list[int]) -> None:
    looking = Looking()
    seen: list[int] = []
    before = 0
    for gib in amounts:
        found = looking.look(used=Account(strangers=(Stranger(ONE, 7, gib * GIB),) if gib else ()))
        # one that was not there at the look before is not believed yet
        seen.append(gib if before else 0)
        before = gib
        most = max(seen[-LOOKS:])
        assert most * GIB == (found[ONE].bytes if ONE in found else 0)
        assert bool(most) == (ONE in found)


def test_a_fence_goes_when_several_looks_find_nobody() -> None:
    looking = Looking()
    holder = devices("train", "nvidia.com/gpu", ONE)
    looking.look(holder)
    for _ in range(LOOKS - 1):
        assert looking.look()[ONE].fenced
    assert {} == looking.look()
