"""Admission against a model of an honest kubelet: whatever happened before, every container gets its own grant."""

import gc
import tracemalloc
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cotenant.cluster import Unreachable
from cotenant.contract.grant import ContainerGrant, Role
from cotenant.contract.names import Names
from cotenant.contract.pods import Pod, Status
from cotenant.contract.reasons import Reason
from cotenant.contract.units import device_ids
from device_plugin.admission.calls import Admission
from device_plugin.admission.identity import Asked, ListedPod, PodName
from device_plugin.admission.refusal import PodResourcesError, RefusedError
from tests.device_plugin.node import container_grant, granted, pod_spec, uuid

GPU_MEM = Names().gpu_mem
GPUS = 3
UNITS = 40


class Entry:
    """One pod as the model's kubelet has it."""

    def __init__(self, name: str, uid: str, grants: tuple[ContainerGrant, ...]) -> None:
        self.name = PodName("default", name)
        self.uid = uid
        self.grants = grants
        self.held: dict[str, frozenset[str]] = {}
        metadata = {"name": name, "uid": uid, "annotations": granted(*grants)}
        self.pod = msgspec.convert({"metadata": metadata, "spec": pod_spec(*grants)}, Pod)

    @property
    def over(self) -> bool:
        return self.pod.ended

    def report(self, **status: Any) -> Pod:
        """Take a new status; return the pod with it."""
        self.pod = msgspec.structs.replace(self.pod, status=msgspec.convert(status, Status))
        return self.pod


class World:
    """Be the kubelet that is asked (Lister) and the API server with a watch that lags (Pods)."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.server: dict[PodName, Pod] = {}
        self.cache: dict[PodName, Pod] = {}
        self.lists_inactive = False
        self.list_fails = False
        self.away = False

    def list(self, *, deadline: float) -> list[ListedPod]:  # noqa: ARG002
        if self.list_fails:
            raise PodResourcesError("the kubelet does not list its pods: it is a test")
        return [
            ListedPod(
                name=entry.name,
                ids={
                    c.name: frozenset() if entry.over else entry.held.get(c.name, frozenset())
                    for c, role in entry.pod.start_order
                    if role != "init"
                },
            )
            for entry in self.entries
            if self.lists_inactive or not entry.over
        ]

    def known(self, name: PodName) -> Pod | None:
        return self.cache.get(name)

    def all_known(self) -> Sequence[Pod]:
        return [*self.cache.values()]

    def read(self, name: PodName, *, deadline: float) -> Pod | None:  # noqa: ARG002
        if self.away:
            raise Unreachable("it is a test")
        return self.server.get(name)

    def admission(self, **limits: int) -> Admission:
        return Admission(self, self, Names(), has_gpu=lambda gpu: gpu in {uuid(n) for n in range(GPUS)}, **limits)

    def free(self) -> frozenset[str]:
        taken = {device for e in self.entries if not e.over for ids in e.held.values() for device in ids}
        return frozenset(d for n in range(GPUS) for d in device_ids(uuid(n), UNITS)) - taken

    def add(self, name: str, uid: str, *grants: ContainerGrant) -> Entry:
        entry = Entry(name, uid, grants)
        self.entries.append(entry)
        self.server[entry.name] = entry.pod
        return entry

    def sync(self) -> None:
        self.cache = dict(self.server)

    def admit(self, admission: Admission, entry: Entry) -> None:
        """Go through the containers as the device manager does; every answer must be the container's own."""
        reusable: set[str] = set()
        for grant in entry.grants:
            chosen = set(sorted(reusable)[: grant.units])
            if len(chosen) < grant.units:
                chosen = set(admission.prefer(Asked(GPU_MEM, grant.units), self.free() | chosen, chosen))
            admitted = admission.allocate(GPU_MEM, sorted(chosen))
            assert grant == admitted.grant
            assert admitted.pod is None or entry.uid == admitted.pod.uid
            entry.held[grant.name] = frozenset(chosen)
            reusable = reusable | chosen if grant.role is Role.INIT else reusable - chosen


@st.composite
def shapes(draw: st.DrawFn) -> tuple[ContainerGrant, ...]:
    """Grant a pod of one to three containers; one with an init container lies on one GPU (DESIGN fact 11)."""
    units = st.sampled_from([2, 4])
    roles = [*draw(st.sampled_from([(), (Role.INIT,), (Role.SIDECAR,), (Role.INIT, Role.SIDECAR)])), Role.MAIN]
    first = draw(st.integers(0, GPUS - 1))
    return tuple(
        container_grant(
            f"c{n}",
            gpus=[first if Role.INIT in roles else draw(st.integers(0, GPUS - 1))],
            units=draw(units),
            role=role,
        )
        for n, role in enumerate(roles)
    )


class Life(RuleBasedStateMachine):
    """Let pods come and go under a few names, with a plugin that restarts and a watch that lags."""

    @initialize(lists_inactive=st.booleans())
    def begin(self, lists_inactive: bool) -> None:  # noqa: FBT001
        self.world = World()
        self.world.lists_inactive = lists_inactive
        self.admission = self.world.admission()
        self.count = 0

    def uid(self) -> str:
        self.count += 1
        return f"uid-{self.count}"

    def vacate(self, name: str) -> None:
        """Delete whoever has the name, from server and kubelet alike."""
        self.world.server.pop(PodName("default", name), None)
        self.world.entries = [entry for entry in self.world.entries if entry.name.name != name]

    @rule(name=st.sampled_from(["a", "b", "c", "d"]), grants=shapes(), synced=st.booleans())
    def a_pod_is_admitted(self, name: str, grants: tuple[ContainerGrant, ...], synced: bool) -> None:  # noqa: FBT001
        self.vacate(name)
        entry = self.world.add(name, self.uid(), *grants)
        if synced:
            self.world.sync()
        self.world.admit(self.admission, entry)

    @rule(name=st.sampled_from(["a", "b", "c", "d"]), grants=shapes(), synced=st.booleans())
    def a_pod_starts_without_the_plugin(self, name: str, grants: tuple[ContainerGrant, ...], synced: bool) -> None:  # noqa: FBT001
        self.vacate(name)
        self.world.add(name, self.uid(), *grants)
        self.world.sync()  # the pod is old news by the time the plugin comes
        self.the_plugin_restarts(forgets=synced)

    @rule(name=st.sampled_from(["a", "b", "c", "d"]), grants=shapes())
    def a_kubelet_asks_which_ids_to_take_and_dies(self, name: str, grants: tuple[ContainerGrant, ...]) -> None:
        self.vacate(name)
        self.world.add(name, self.uid(), *grants)
        self.admission.prefer(Asked(GPU_MEM, grants[0].units), self.world.free(), set())
        self.vacate(name)  # the next kubelet never sees it
        self.admission.overtaken()

    @rule(forgets=st.booleans())
    def the_plugin_restarts(self, forgets: bool) -> None:  # noqa: FBT001
        if forgets:
            self.admission = self.world.admission()
            self.world.sync()
        self.admission.overtaken()

    @rule()
    def the_watch_catches_up(self) -> None:
        self.world.sync()

    @precondition(lambda self: self.world.entries)
    @rule(data=st.data(), phase=st.sampled_from(["Running", "Succeeded", "Failed"]))
    def a_pod_moves_on(self, data: st.DataObject, phase: str) -> None:
        entry = data.draw(st.sampled_from(self.world.entries))
        if not entry.over:
            statuses = [{"name": g.name, "started": True, "containerID": "x"} for g in entry.grants]
            self.world.server[entry.name] = entry.report(phase=phase, containerStatuses=statuses)

    @precondition(lambda self: self.world.entries)
    @rule(data=st.data())
    def a_pod_is_deleted(self, data: st.DataObject) -> None:
        self.vacate(data.draw(st.sampled_from(self.world.entries)).name.name)

    @precondition(lambda self: any(e.held and not e.over for e in self.world.entries))
    @rule(data=st.data())
    def a_container_starts(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from([e for e in self.world.entries if e.held and not e.over]))
        grant = data.draw(st.sampled_from([g for g in entry.grants if g.name in entry.held]))
        if grant.role is Role.INIT:
            self.world.sync()  # init containers are looked for among the pods known
        admitted = self.admission.pre_start(GPU_MEM, entry.held[grant.name])
        assert admitted.grant.gpus == grant.gpus

    @invariant()
    def every_containers_ids_are_those_of_its_grant(self) -> None:
        for entry in getattr(self, "world", World()).entries:
            for grant in entry.grants:
                own = {d for share in grant.gpus for d in device_ids(share.uuid, UNITS)}
                assert entry.held.get(grant.name, frozenset()) <= own


Life.TestCase.settings = settings(max_examples=100, stateful_step_count=20, deadline=None)
TestLife = Life.TestCase


class TestRefusals:
    """Where facts are missing there is no answer, and the text says which."""

    @pytest.fixture
    def world(self) -> World:
        return World()

    def refusal(self, world: World, entry: Entry, admission: Admission | None = None) -> RefusedError:
        with pytest.raises(RefusedError) as refused:
            world.admit(admission or world.admission(), entry)
        return refused.value

    def test_a_pod_that_only_the_kubelet_knows_is_refused_while_the_api_server_is_away(self, world: World) -> None:
        world.away = True
        error = self.refusal(world, world.add("p", "u", container_grant()))
        assert Reason.NOT_IDENTIFIED is error.reason
        assert "may be default/p, which the API server does not tell" in str(error)

    def test_a_pod_that_is_known_is_served_while_the_api_server_is_away(self, world: World) -> None:
        entry = world.add("p", "u", container_grant())
        world.sync()
        world.away = True
        world.admit(world.admission(), entry)

    def test_a_kubelet_that_lists_nothing_gets_no_answer(self, world: World) -> None:
        entry = world.add("p", "u", container_grant())
        world.list_fails = True
        assert "does not list its pods" in str(self.refusal(world, entry))

    def test_ids_that_the_kubelet_chose_against_our_preference_are_refused(self, world: World) -> None:
        world.add("p", "u", container_grant(gpus=[0], units=8))
        with pytest.raises(
            RefusedError, match=r"gave container main the device ids .* 8 units of each of GPU-00000000"
        ):
            world.admission().allocate(GPU_MEM, device_ids(uuid(1), 8))

    @pytest.mark.parametrize(
        "chosen",
        [
            [f"00000000-{n}" for n in range(8, 15)],  # one too few
            [*device_ids(uuid(0), 4), *device_ids(uuid(1), 4)],  # half of them another GPU's
            [f"ffffffff-{n}" for n in range(8)],  # of a GPU that nobody has
            [f"{uuid(0)}::{n}" for n in range(8)],  # as shares are named
            ["0"] * 8,
            [],
        ],
    )
    def test_ids_that_this_node_does_not_have_give_the_pod_being_admitted_nothing_and_others_their_own(
        self, world: World, chosen: list[str]
    ) -> None:
        admission = world.admission()
        world.add("p", "u", container_grant(gpus=[0], units=8))
        with pytest.raises(RefusedError):
            admission.allocate(GPU_MEM, chosen)
        world.admit(admission, world.add("q", "v", container_grant(gpus=[0], units=4)))

    def test_who_was_asked_about_is_not_asked_for_again_but_only_once(self, world: World) -> None:
        admission = world.admission()
        world.add("p", "uid-p", container_grant("c", gpus=[0], units=2))
        chosen = admission.prefer(Asked(GPU_MEM, 2), world.free(), set())
        world.list_fails = True

        assert "uid-p" == getattr(admission.allocate(GPU_MEM, chosen).pod, "uid", None)
        with pytest.raises(RefusedError):
            admission.allocate(GPU_MEM, chosen)

    def test_other_ids_than_those_told_are_allocated_to_whom_the_kubelet_lists(self, world: World) -> None:
        admission = world.admission()
        world.add("p", "uid-p", container_grant("c", gpus=[0], units=2))
        told = admission.prefer(Asked(GPU_MEM, 2), world.free(), set())
        other = sorted({device for device in world.free() if device in device_ids(uuid(0), UNITS)} - set(told))[:2]
        world.list_fails = True

        with pytest.raises(RefusedError, match="does not list"):
            admission.allocate(GPU_MEM, other)

    def test_a_container_may_not_start_with_ids_answered_for_another_pod(self, world: World) -> None:
        entry = world.add("p", "u", container_grant(gpus=[0], units=8))
        admission = world.admission()
        world.admit(admission, entry)
        world.sync()
        # a kubelet gone wrong: it books the ids on a pod with an equal grant
        other = world.add("q", "v", container_grant(gpus=[0], units=8))
        other.held, entry.held = entry.held, {}
        with pytest.raises(RefusedError, match="were answered for the pod with UID u, not for this one"):
            admission.pre_start(GPU_MEM, other.held["main"])

    def test_two_containers_that_the_kubelet_gave_the_same_ids_both_start_again(self, world: World) -> None:
        first = world.add("p", "u", container_grant(gpus=[0], units=UNITS))
        admission = world.admission()
        world.admit(admission, first)
        # the kubelet has forgotten that they are taken, and the GPU has no others
        second = world.add("q", "v", container_grant(gpus=[0], units=UNITS))
        chosen = admission.prefer(Asked(GPU_MEM, UNITS), device_ids(uuid(0), UNITS), [])
        admission.allocate(GPU_MEM, chosen)
        second.held["main"] = frozenset(chosen)
        assert first.held["main"] == second.held["main"]
        assert admission.pre_start(GPU_MEM, chosen).grant.gpus == first.grants[0].gpus

    def test_nothing_grows_with_the_pods_that_came_and_went(self, world: World) -> None:
        admission = world.admission(remembered=50)

        def come_and_go(pods: range) -> int:
            for n in pods:
                # most nodes run many pods of one size, which get the same ids one after the other
                world.admit(admission, world.add(f"p{n}", f"uid-{n:032}", container_grant(gpus=[0], units=8)))
                world.entries.clear()
                world.server.clear()
            gc.collect()
            return tracemalloc.get_traced_memory()[0]

        tracemalloc.start()
        try:
            come_and_go(range(200))
            full = come_and_go(range(200, 400))
            later = come_and_go(range(400, 800))
        finally:
            tracemalloc.stop()
        # a UID alone is 85 bytes, and 400 pods have come since
        assert later - full < 10_000

    def test_a_container_may_not_start_with_ids_that_nobody_holds(self, world: World) -> None:
        with pytest.raises(RefusedError, match="the kubelet lists no container with the device ids"):
            world.admission().pre_start(GPU_MEM, device_ids(uuid(0), 2))

    def test_ids_of_a_container_that_is_not_listed_are_an_init_containers_own_or_nobodys(self, world: World) -> None:
        warm = container_grant("warm", gpus=[0], units=4, role=Role.INIT)
        world.add("p", "u", warm, container_grant(gpus=[0], units=2))
        world.add("q", "v", container_grant(gpus=[1], units=4))
        world.sync()
        admission = world.admission()

        assert warm == admission.pre_start(GPU_MEM, device_ids(uuid(0), 4)).grant
        # four of another GPU than the init container's, and two of the main container's that the kubelet does not list
        for held in (device_ids(uuid(1), 4), device_ids(uuid(0), 2)):
            with pytest.raises(RefusedError, match="and no init container was granted their GPU"):
                admission.pre_start(GPU_MEM, held)

    def test_a_container_of_a_pod_that_is_gone_does_not_start(self, world: World) -> None:
        entry = world.add("p", "u", container_grant(gpus=[0], units=2))
        admission = world.admission()
        world.admit(admission, entry)
        world.sync()
        world.server.clear()

        with pytest.raises(RefusedError, match="pod default/p: ") as refused:
            admission.pre_start(GPU_MEM, entry.held["main"])
        assert Reason.POD_GONE is refused.value.reason

    def test_a_refused_pod_is_named_so_that_people_can_be_told(self, world: World) -> None:
        entry = world.add("p", "u", container_grant(gpus=[0], units=UNITS + 2))
        error = self.refusal(world, entry)
        assert error.pod is not None
        assert "u" == error.pod.uid
