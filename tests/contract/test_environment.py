from hypothesis import given

from cotenant.contract import grant as grants
from cotenant.contract.environment import (
    INJECTED,
    MPS_MEMORY,
    MPS_PIPE,
    MPS_THREADS,
    NEUTRAL_PIPE,
    VISIBLE_DEVICES,
    annotations,
    informative,
    injected,
)
from cotenant.contract.grant import ContainerGrant, Grant, MIGPlacement
from cotenant.contract.inventory import Family
from cotenant.contract.names import Names
from cotenant.contract.units import GIB, MIB
from cotenant.standins.api_rules import PODS, validate
from tests.builders import a_grant, granted
from tests.contract.strategies import container_grants, pod_grants

NAMES = Names()


class TestInjected:
    """The four variables say exactly what was granted, and what CUDA does without them where they do not apply."""

    def test_a_time_sliced_container_sees_its_gpu_and_nothing_of_mps(self) -> None:
        assert {
            VISIBLE_DEVICES: "GPU-a",
            MPS_MEMORY: "0=8192M",  # 8 GiB = 8 x 1024 MiB; nothing reads it without a control daemon
            MPS_THREADS: "100",
            MPS_PIPE: NEUTRAL_PIPE,
        } == injected(granted({"GPU-a": 8 * GIB}))

    def test_an_mps_container_is_told_its_limit_its_threads_and_its_daemon(self) -> None:
        container = granted({"GPU-a": 8 * GIB}, mode="mps", threads=25, mps_pipe="/run/mps/0")

        assert {
            VISIBLE_DEVICES: "GPU-a",
            MPS_MEMORY: "0=8192M",
            MPS_THREADS: "25",
            MPS_PIPE: "/run/mps/0",
        } == injected(container)

    def test_two_gpus_are_limited_by_the_ordinals_the_container_counts(self) -> None:
        container = granted({"GPU-b": 3 * GIB, "GPU-a": 3 * GIB}, mode="mps", mps_pipe="/run/mps")

        assert "GPU-b,GPU-a" == injected(container)[VISIBLE_DEVICES]
        # ordinal 0 is the first of the visible devices, whatever its index on the node; 3 x 1024 = 3072
        assert "0=3072M,1=3072M" == injected(container)[MPS_MEMORY]

    def test_a_unit_of_256_mib_is_written_in_whole_mib(self) -> None:
        # 3 units x 256 MiB = 768 MiB
        assert "0=768M" == injected(granted({"GPU-a": 3 * 256 * MIB}))[MPS_MEMORY]

    def test_a_mig_instance_still_to_be_made_is_void(self) -> None:
        container = granted(
            {"GPU-a": 10 * GIB},
            mode="mig",
            family=Family.MIG_DYNAMIC,
            mig=MIGPlacement(profile="1g.10gb", start=0, size=1),
        )

        assert "void" == injected(container)[VISIBLE_DEVICES]

    def test_an_mps_grant_without_a_pipe_gets_the_neutral_one(self) -> None:
        assert NEUTRAL_PIPE == injected(granted({"GPU-a": GIB}, mode="mps"))[MPS_PIPE]

    @given(container_grants())
    def test_no_variable_is_ever_empty(self, container: ContainerGrant) -> None:
        values = injected(container)

        # an empty value in the pod's spec would win over the device plugin's
        assert set(INJECTED) == set(values)
        assert all(values.values())

    @given(container_grants())
    def test_the_limits_add_up_to_what_was_granted(self, container: ContainerGrant) -> None:
        limits = dict(part.split("=") for part in injected(container)[MPS_MEMORY].split(","))

        assert [str(n) for n in range(len(container.gpus))] == list(limits)
        assert [share.bytes for share in container.gpus] == [
            int(limit.removesuffix("M")) * MIB for limit in limits.values()
        ]


class TestInformative:
    """People and frameworks are told the truth, which nothing enforces."""

    def test_a_container_can_read_what_it_was_given(self) -> None:
        told = informative(granted({"GPU-a": 8 * GIB, "GPU-b": 8 * GIB}, name="train"))

        assert "train" == told["COTENANT_CONTAINER"]
        assert "GPU-a,GPU-b" == told["COTENANT_GPU_UUIDS"]
        assert "8589934592,8589934592" == told["COTENANT_GPU_MEM_BYTES"]
        assert ("time-slicing", "none", "nothing") == (
            told["COTENANT_MODE"],
            told["COTENANT_ISOLATION"],
            told["COTENANT_ENFORCED_BY"],
        )


class TestAnnotations:
    """The Binding carries the grant and, for each container, the four values its environment is read from."""

    def test_each_container_has_its_own_four(self) -> None:
        grant = a_grant(granted({"GPU-a": GIB}, name="one"), granted({"GPU-b": 2 * GIB}, name="two"))

        written = annotations(grant, NAMES)

        assert 1 + 2 * 4 == len(written)
        assert "GPU-b" == written["visible-devices.cotenant.io/two"]
        assert "0=2048M" == written["mps-memory.cotenant.io/two"]
        assert "100" == written["mps-threads.cotenant.io/two"]
        assert NEUTRAL_PIPE == written["mps-pipe.cotenant.io/two"]
        assert grant == grants.decode(written["cotenant.io/grant"])

    @given(pod_grants())
    def test_whatever_is_granted_kubernetes_takes_the_annotations(self, grant: Grant) -> None:
        written = annotations(grant, NAMES)

        # a bad key passes the Binding, and makes every later update of the pod fail
        validate(PODS, {"metadata": {"name": "p", "annotations": written}})
        assert all(written.values())
