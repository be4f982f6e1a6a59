"""Who is being admitted: told for certain, or not told; never guessed, whatever is listed."""

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotenant.contract.grant import ContainerGrant, Role
from cotenant.contract.names import Names
from cotenant.contract.pods import Pod
from cotenant.contract.reasons import Reason
from device_plugin.admission import identity
from device_plugin.admission.identity import Asked, ListedPod, Past, PodName
from device_plugin.admission.refusal import RefusedError
from tests.device_plugin.node import container_grant, granted, pod_spec

NAMES = Names()
IDS = frozenset({"0badcafe-1"})


def pod(name: str, *grants: ContainerGrant, **more: Any) -> Pod:
    """Make a pod with *grants* as the API server has it right after it was bound."""
    fields: dict[str, Any] = {
        "metadata": {"name": name, "uid": f"uid-{name}", "annotations": granted(*grants)},
        "spec": pod_spec(*grants),
    }
    return msgspec.convert(fields | more, Pod)


def listed(*pods: Pod, holding: dict[str, set[str]] | None = None) -> list[ListedPod]:
    """List *pods* as the kubelet does; *holding* names the containers of each that have ids."""
    holding = holding or {}
    return [
        ListedPod(
            name=PodName("default", p.metadata.name),
            ids={
                c.name: IDS if c.name in holding.get(p.metadata.name, ()) else frozenset()
                for c, role in p.start_order
                if role != "init"
            },
        )
        for p in pods
    ]


def who(pods: list[Pod], units: int, *, holding: dict[str, set[str]] | None = None, past: Past | None = None) -> str:
    """Tell who is identified, as "pod/container"."""
    known = {PodName("default", p.metadata.name): p for p in pods}
    found = identity.candidates(listed(*pods, holding=holding), known, past or Past(), NAMES)
    identified = identity.identify(found, Asked(NAMES.gpu_mem, units))
    return " = ".join(f"{c.pod.metadata.name}/{c.container}" for c in identified)


def refusal(pods: list[Pod], units: int, **more: Any) -> RefusedError:
    with pytest.raises(RefusedError) as refused:
        who(pods, units, **more)
    return refused.value


EIGHT = container_grant(units=8)


class TestOrder:
    """Within a pod it is the first container, as the kubelet goes through them, that has no devices yet."""

    GRANTS = (
        container_grant("init", units=8, role=Role.INIT),
        container_grant("sidecar", units=8, role=Role.SIDECAR),
        container_grant("a", units=8),
        container_grant("b", units=8),
    )

    @pytest.mark.parametrize(
        ("answered", "holding", "expected"),
        [
            (set(), set(), "p/init"),
            ({"init"}, set(), "p/sidecar"),
            ({"init"}, {"sidecar"}, "p/a"),
            # a plugin that forgot sees by what comes after it that the init container has had its turn
            (set(), {"sidecar"}, "p/a"),
            (set(), {"sidecar", "a"}, "p/b"),
        ],
    )
    def test_goes_by_what_is_listed_and_answered(self, answered: set[str], holding: set[str], expected: str) -> None:
        past = Past(answered={("uid-p", name) for name in answered})
        assert expected == who([pod("p", *self.GRANTS)], 8, holding={"p": holding}, past=past)

    def test_a_pod_whose_containers_all_hold_ids_is_no_candidate(self) -> None:
        assert Reason.NOT_IDENTIFIED is refusal([pod("p", EIGHT)], 8, holding={"p": {"main"}}).reason

    def test_a_container_that_asks_for_nothing_is_passed_by(self) -> None:
        spec = pod_spec(EIGHT)
        spec["containers"].insert(0, {"name": "plain"})
        assert "p/main" == who([pod("p", EIGHT, spec=spec)], 8)


class TestManyPods:
    """Of several pods without devices only the one listed last can be meant."""

    def test_a_pod_that_was_passed_over_gives_way(self) -> None:
        assert "q/main" == who([pod("p", EIGHT), pod("q", EIGHT)], 8, past=Past(passed={"uid-p"}))

    def test_a_pod_that_has_started_gives_way(self) -> None:
        status = {"containerStatuses": [{"name": "other", "started": True, "containerID": "x"}]}
        assert "q/main" == who([pod("p", EIGHT, status=status), pod("q", EIGHT)], 8)

    def test_a_container_that_was_answered_gives_way(self) -> None:
        past = Past(answered={("uid-p", "main")})
        assert "q/main" == who([pod("p", EIGHT), pod("q", EIGHT)], 8, past=past)

    @pytest.mark.parametrize("past", [Past(passed={"uid-p"}), Past(answered={("uid-p", "main")})])
    def test_one_that_would_give_way_is_meant_when_nobody_else_is_there(self, past: Past) -> None:
        assert "p/main" == who([pod("p", EIGHT)], 8, past=past)

    @pytest.mark.parametrize("phase", ["Failed", "Succeeded"])
    def test_a_pod_that_has_ended_is_never_meant(self, phase: str) -> None:
        assert "waits for 8 of cotenant.io/gpu-mem" in str(refusal([pod("p", EIGHT, status={"phase": phase})], 8))

    def test_a_pod_that_was_refused_is_never_meant(self) -> None:
        assert "waits for 8 of cotenant.io/gpu-mem" in str(refusal([pod("p", EIGHT)], 8, past=Past(refused={"uid-p"})))

    def test_sizes_tell_pods_apart(self) -> None:
        assert "q/main" == who([pod("p", EIGHT), pod("q", container_grant(units=4))], 4)

    def test_two_that_differ_in_their_gpu_are_not_told_apart(self) -> None:
        error = refusal([pod("p", EIGHT), pod("q", container_grant(gpus=[1], units=8))], 8)
        assert Reason.NOT_IDENTIFIED is error.reason
        assert "default/p (container main, 8 of cotenant.io/gpu-mem), default/q" in str(error)

    def test_two_with_the_same_answer_need_not_be_told_apart(self) -> None:
        assert "p/main = q/main" == who([pod("p", EIGHT), pod("q", EIGHT)], 8)

    def test_two_without_grants_have_no_same_answer(self) -> None:
        bare = [pod(name, EIGHT, metadata={"name": name, "uid": f"uid-{name}"}) for name in "pq"]
        assert Reason.NOT_IDENTIFIED is refusal(bare, 8).reason


@st.composite
def nodes(draw: st.DrawFn) -> tuple[list[Pod], dict[str, set[str]], Past, int]:
    """Make a node in any state: pods of any shape and fate, of which one is being admitted by an honest kubelet."""
    pods, holding = [], {}
    answered, passed, refused = set(), set(), set()
    count = draw(st.integers(1, 5))
    for n in range(count):
        name = f"p{n}"
        roles = draw(st.lists(st.sampled_from([Role.INIT, Role.SIDECAR, Role.MAIN]), max_size=3))
        roles = [*sorted(roles, key=lambda role: role is Role.MAIN), Role.MAIN]
        grants = [
            container_grant(f"c{i}", gpus=[draw(st.integers(0, 2))], units=draw(st.sampled_from([2, 4])), role=role)
            for i, role in enumerate(roles)
        ]
        status: dict[str, Any] = {"phase": draw(st.sampled_from(["Pending", "Pending", "Running", "Failed"]))}
        if draw(st.booleans()):
            status["containerStatuses"] = [{"name": "c0", "started": draw(st.booleans())}]
        pods.append(pod(name, *grants, status=status))
        holding[name] = {g.name for g in grants if draw(st.booleans())}
        answered |= {(f"uid-{name}", g.name) for g in grants if draw(st.booleans())}
        passed |= {f"uid-{name}"} if draw(st.booleans()) else set()
        refused |= {f"uid-{name}"} if draw(st.integers(0, 4)) == 0 else set()
    return pods, holding, Past(answered=answered, passed=passed, refused=refused), draw(st.sampled_from([2, 4]))


@given(nodes())
@settings(max_examples=300, deadline=None)
def test_whoever_is_identified_waits_for_just_that_and_nobody_fresh_disagrees(
    state: tuple[list[Pod], dict[str, set[str]], Past, int],
) -> None:
    pods, holding, past, units = state
    known = {PodName("default", p.metadata.name): p for p in pods}
    found = identity.candidates(listed(*pods, holding=holding), known, past, NAMES)
    try:
        identified = identity.identify(found, Asked(NAMES.gpu_mem, units))
    except RefusedError:
        return
    answers = [candidate.grant for candidate in identified]
    assert all(answer == answers[0] for answer in answers)
    for candidate in identified:
        asked = next(c for c, _ in candidate.pod.start_order if c.name == candidate.container)
        assert Asked(NAMES.gpu_mem, units) == identity.asks(asked, NAMES)
        assert not candidate.pod.ended
        assert candidate.container not in holding[candidate.pod.metadata.name] or (
            next(role for c, role in candidate.pod.start_order if c.name == candidate.container) == "init"
        )
    others = [c for c in found if c not in identified and c.asked.count == units and not c.stale]
    assert not others or identified[0].grant == others[0].grant


@given(nodes())
@settings(max_examples=200, deadline=None)
def test_the_order_of_the_list_decides_nothing(state: tuple[list[Pod], dict[str, set[str]], Past, int]) -> None:
    pods, holding, past, units = state

    def outcome(order: list[Pod]) -> object:
        try:
            return sorted(who(order, units, holding=holding, past=past).split(" = "))
        except RefusedError as error:
            return str(error)

    assert outcome(pods) == outcome(pods[::-1])


class TestGrants:
    """A grant is used when it is readable, for this container, of this amount, and of a kind that is served here."""

    def test_a_grant_of_another_family_is_refused(self) -> None:
        text = granted(EIGHT)[NAMES.grant].replace('"family":"memory"', '"family":"replicas"')
        served = pod("p", EIGHT, metadata={"name": "p", "uid": "u", "annotations": {NAMES.grant: text}})
        with pytest.raises(RefusedError, match="the grant is of family replicas, but it asks for 8 of"):
            identity.read_grant(served, "main", Asked(NAMES.gpu_mem, 8), NAMES)
