from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotenant.contract.grant import GIVEN, Isolation, Role
from cotenant.contract.inventory import Mode
from tests.builders import a_grant, granted


@dataclass(frozen=True)
class Step:
    """One container of a pod, in start order, and what it holds of each GPU."""

    role: Role
    held: dict[str, int]


steps = st.lists(
    st.builds(
        Step,
        role=st.sampled_from(Role),
        held=st.dictionaries(st.sampled_from(["A", "B"]), st.integers(1, 8), min_size=1),
    ),
    min_size=1,
    max_size=6,
)


def most_ever_held(pod: list[Step]) -> dict[str, int]:
    """Play the pod's life, moment by moment, and note the most it holds of each GPU at any of them.

    Before the main containers, the kubelet starts init containers and sidecars as they stand: an init container runs
    until it ends, beside all sidecars started before it. Then all main containers run beside all sidecars.
    """
    moments: list[list[Step]] = []
    sidecars: list[Step] = []
    for step in pod:
        if step.role is Role.INIT:
            moments.append([*sidecars, step])
        elif step.role is Role.SIDECAR:
            sidecars.append(step)
            moments.append(list(sidecars))
    moments.append([*sidecars, *(step for step in pod if step.role is Role.MAIN)])
    gpus = {gpu for step in pod for gpu in step.held}
    return {gpu: max(sum(step.held.get(gpu, 0) for step in moment) for moment in moments) for gpu in gpus}


class TestCharges:
    """A pod is charged what kube-scheduler counts for it, GPU by GPU: the most it holds at any moment of its life."""

    @given(steps)
    def test_a_pod_is_charged_the_most_it_ever_holds(self, pod: list[Step]) -> None:
        # the kubelet starts main containers last, and so they stand in a grant
        pod = sorted(pod, key=lambda step: step.role is Role.MAIN)
        grant = a_grant(*(granted(step.held, name=f"c{n}", role=step.role) for n, step in enumerate(pod)))

        assert most_ever_held(pod) == grant.charges()

    def test_init_containers_are_charged_the_largest_and_main_ones_their_sum(self) -> None:
        grant = a_grant(
            granted({"A": 6}, name="i0", role="init"),
            granted({"A": 9}, name="i1", role="init"),
            granted({"A": 4}, name="m0"),
            granted({"A": 3}, name="m1"),
        )

        # the largest of 6, 9 and 4 + 3
        assert {"A": 9} == grant.charges()

    def test_a_sidecar_counts_beside_all_that_come_after_it(self) -> None:
        grant = a_grant(
            granted({"A": 6}, name="i0", role="init"),
            granted({"A": 2}, name="s0", role="sidecar"),
            granted({"A": 5}, name="i1", role="init"),
            granted({"A": 3}, name="m0"),
        )

        # max(6, 2 + 5, 2 + 3): the first init container has ended before the sidecar starts
        assert {"A": 7} == grant.charges()

    def test_a_gpu_that_only_an_init_container_uses_is_charged_too(self) -> None:
        grant = a_grant(granted({"A": 6}, name="i0", role="init"), granted({"B": 3}, name="m0"))

        assert {"A": 6, "B": 3} == grant.charges()

    @given(st.lists(st.sampled_from(Role), min_size=1, max_size=5))
    def test_a_gpu_for_the_pod_itself_is_charged_once_however_many_containers_share_it(self, roles: list[Role]) -> None:
        grant = a_grant(
            *(granted({"A": 80}, name=f"c{n}", role=role, mode="exclusive") for n, role in enumerate(roles))
        )

        assert {"A": 80} == grant.charges()


class TestIsolation:
    """Isolations are ordered, and each mode says honestly what it gives."""

    def test_a_stronger_isolation_ranks_higher(self) -> None:
        ordered = [Isolation.NONE, Isolation.LIMITED, Isolation.STRICT, Isolation.EXCLUSIVE]

        assert ordered == sorted(Isolation, key=lambda isolation: isolation.rank)

    @pytest.mark.parametrize(
        ("expected", "isolation"),
        [(False, Isolation.NONE), (False, Isolation.LIMITED), (True, Isolation.STRICT), (True, Isolation.EXCLUSIVE)],
    )
    def test_what_no_sharing_can_give_takes_the_whole_gpu(self, expected: bool, isolation: Isolation) -> None:  # noqa: FBT001
        assert expected is isolation.whole_gpu

    def test_every_mode_says_what_it_gives_and_who_enforces_it(self) -> None:
        assert set(Mode) == set(GIVEN)
        assert (Isolation.NONE, "nothing") == GIVEN[Mode.TIME_SLICING]
        assert "per process" in GIVEN[Mode.MPS][1]

    def test_a_container_is_found_by_its_name(self) -> None:
        grant = a_grant(granted({"A": 1}, name="a"), granted({"A": 2}, name="b"))

        assert 2 == grant.container("b").gpus[0].bytes  # type: ignore[union-attr]
        assert grant.container("c") is None
