"""Which of several extenders binds: the holder of a Lease, from the end of its take-over on, and nobody else."""

import itertools
import socket
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest

from cotenant.cluster import Cluster, connect
from cotenant.contract import grant as grants
from cotenant.contract.configuration import Writer
from cotenant.contract.reasons import Reason
from cotenant.contract.units import GIB
from cotenant.standins.api_rules import EVENTS, LEASES, PODS
from cotenant.standins.api_server import ApiServer
from cotenant.threads import Threads
from extender.cluster.election import Elect
from extender.cluster.events import Events
from extender.cluster.writership import Writership
from extender.ledger import Stage
from tests.builders import NAMES, a_grant, a_pod, granted
from tests.extender.running import Running, bind_args, eventually, submit

NAMESPACE = "cotenant-system"
LEASE = (NAMESPACE, "writer")
WRITER = {"lease": "cotenant-system/writer", "settle": 0.01}
QUICK = {"leaseDuration": 1.0, "renewDeadline": 0.8, "retryPeriod": 0.05}
ME = socket.gethostname()
OURS = f"{ME}_1"
FOR_EVER = float("inf")
NOBODY = ("", -1)


@pytest.fixture(autouse=True)
def lease(api: ApiServer) -> Iterator[None]:
    yield
    if held(api) != NOBODY:
        api.store.delete(LEASES, LEASE)


def hold(api: ApiServer, holder: str, transitions: int, *, seconds: int = 60) -> None:
    """Have somebody hold the Lease, as a kube-scheduler would that has just taken it."""
    spec = {"holderIdentity": holder, "leaseTransitions": transitions, "leaseDurationSeconds": seconds}
    if held(api) == NOBODY:
        metadata = {"name": "writer", "namespace": NAMESPACE}
        api.create(LEASES, {"metadata": metadata, "spec": spec}, NAMESPACE)
    else:
        api.patch(LEASES, "writer", {"spec": spec}, namespace=NAMESPACE)


def held(api: ApiServer) -> tuple[str, int]:
    found = api._find(LEASES, *LEASE)
    return (found["spec"]["holderIdentity"], found["spec"]["leaseTransitions"]) if found else NOBODY


def binds(extender: Running) -> bool:
    return extender.metric("cotenant_writer") == 1


def term(api: ApiServer, name: str) -> str:
    found = api.pod(name)
    assert found
    written: str = found["metadata"]["annotations"][NAMES.writer]
    return written


class TestSecondScheduler:
    """The extender beside the kube-scheduler that holds the Lease binds."""

    @pytest.fixture
    def follow(self, start: Callable[..., Running]) -> Callable[[], Running]:
        return lambda: start(layout="second-scheduler", writer=WRITER)

    def test_it_binds_in_the_term_of_its_kube_scheduler(self, api: ApiServer, follow: Callable[[], Running]) -> None:
        extender = follow()
        hold(api, OURS, 4)
        pod = submit(api, a_pod().asking(8))

        assert "" == extender.bind(pod, "n1")
        assert f"{OURS}/4" == term(api, "p")
        hold(api, "gone_1", 5)
        assert eventually(lambda: not binds(extender))

    def test_beside_one_that_stands_by_it_binds_nothing_and_says_so_at_once(
        self, api: ApiServer, follow: Callable[[], Running]
    ) -> None:
        hold(api, "another-pod_1", 4)
        extender = follow()
        pod = submit(api, a_pod().asking(8))

        assert eventually(lambda: Reason.NOT_WRITER.sentence in extender.bind(pod, "n1"))
        assert extender.stage(pod) is None
        assert "close" == extender.post("/bind", bind_args(pod, "n1")).headers["connection"]
        assert ["n1"] == extender.fitting(pod, "n1")

    def test_without_anybody_who_holds_it_nothing_is_bound(self, api: ApiServer, follow: Callable[[], Running]) -> None:
        extender = follow()
        pod = submit(api, a_pod().asking(8))

        assert Reason.NOT_WRITER.sentence in extender.bind(pod, "n1")

    def test_one_that_starts_again_beside_it_begins_a_new_term(
        self, api: ApiServer, follow: Callable[[], Running]
    ) -> None:
        hold(api, OURS, 4)
        extender = follow()
        pod = submit(api, a_pod().asking(8))

        # what the one before it has sent carries 4, and may still be on its way
        assert "" == extender.bind(pod, "n1")
        assert f"{OURS}/5" == term(api, "p")

    def test_it_hears_of_the_lease_as_soon_as_the_api_server_answers_again(
        self, api: ApiServer, follow: Callable[[], Running]
    ) -> None:
        hold(api, OURS, 4)
        # after so many failures those who follow nodes and pods pause for up to half a minute
        api.faults.refuse(503, path="/leases", times=8)

        extender = follow()

        assert eventually(lambda: binds(extender))

    def test_what_was_in_doubt_when_a_term_ended_is_forgotten_as_the_next_begins(
        self, api: ApiServer, follow: Callable[[], Running]
    ) -> None:
        hold(api, OURS, 1)
        extender = follow()
        assert eventually(lambda: binds(extender))
        # ours, all of one GPU, never arrives
        api.faults.refuse(500, path="/binding", times=100_000)
        pod, other = submit(api, a_pod().asking(10)), submit(api, a_pod().named("other").asking(10))
        assert extender.bind(pod, "n1")
        assert Stage.ASSUMED is extender.stage(pod)
        mine = extender.ledger.hold(pod["metadata"]["uid"])
        assert mine

        # another one is the writer, and gives that GPU to another pod
        hold(api, "another-pod_1", 9)
        assert eventually(lambda: not binds(extender))
        grant = grants.encode(a_grant(granted(dict(mine.charges))))
        binding = {"metadata": {"name": "other", "annotations": {NAMES.grant: grant}}, "target": {"name": "n1"}}
        api.store.bind(("default", "other"), binding)
        api.faults.clear()
        hold(api, OURS, 10)
        assert eventually(lambda: binds(extender))

        assert extender.stage(pod) is None
        assert Stage.BOUND is extender.stage(other)
        assert eventually(lambda: extender.metric("cotenant_bindings_unsettled") == 0)
        found = api.pod("p")
        assert found
        assert "nodeName" not in found["spec"]


class TestAttached:
    """Extenders elect the one that binds among themselves."""

    @pytest.fixture
    def elect(self, api: ApiServer, start: Callable[..., Running]) -> Iterator[Callable[..., Running]]:
        for name in (ME, "another-pod"):
            api.add_pod(name, namespace=NAMESPACE)
        yield lambda **times: start(layout="attached", writer=WRITER | QUICK | times)
        for name in (ME, "another-pod"):
            api.delete_pod(name, namespace=NAMESPACE, grace=0)

    def test_the_first_takes_the_lease_labels_its_pod_and_binds(
        self, api: ApiServer, elect: Callable[[], Running]
    ) -> None:
        api.patch(PODS, "another-pod", {"metadata": {"labels": {NAMES.writer: "true"}}}, namespace=NAMESPACE)
        extender = elect()
        pod = submit(api, a_pod().asking(8))

        assert "" == extender.bind(pod, "n1")
        holder, transitions = held(api)
        assert f"{holder}/{transitions}" == term(api, "p")
        assert holder.startswith(f"{ME}_")
        # the one before may be frozen, and must not be called any more
        assert eventually(lambda: {ME: "true", "another-pod": None} == labels(api))
        # once: it renews twenty times a second
        api.writes.clear()
        assert eventually(lambda: len(api.writes) > 2)
        assert {"leases"} == {write.resource for write in api.writes}

    def test_it_takes_what_ran_out_and_reads_what_was_bound_before_it_binds(
        self, api: ApiServer, elect: Callable[[], Running]
    ) -> None:
        hold(api, "another-pod_1", 4, seconds=60)
        extender = elect()
        before = submit(api, a_pod().named("before").asking(10))
        after = submit(api, a_pod().named("after").asking(10))
        assert Reason.NOT_WRITER.sentence in extender.bind(after, "n1")
        # The other one binds, and no watch tells of it: only a LIST can.
        api.freeze_watches()
        view = extender.ledger.view("n1")
        assert view
        grant = grants.encode(a_grant(granted({view.gpus[0].gpu.uuid: 10 * GIB})))
        binding = {"metadata": {"name": "before", "annotations": {NAMES.grant: grant}}, "target": {"name": "n1"}}
        api.store.bind(("default", "before"), binding)
        hold(api, "another-pod_1", 4, seconds=1)

        assert eventually(lambda: "" == extender.bind(after, "n1"))
        assert f"{held(api)[0]}/5" == term(api, "after")
        assert Stage.BOUND is extender.stage(before)

    def test_it_takes_what_has_run_out_then_and_not_at_its_next_look(
        self, api: ApiServer, elect: Callable[..., Running]
    ) -> None:
        hold(api, "another-pod_1", 4, seconds=1)

        # it would look again after 320 s at the soonest
        extender = elect(retryPeriod=400, renewDeadline=500, leaseDuration=600)

        assert eventually(lambda: binds(extender))

    def test_one_that_cannot_renew_binds_no_more_and_goes_on_when_it_can(
        self, api: ApiServer, elect: Callable[[], Running]
    ) -> None:
        extender = elect()
        assert eventually(lambda: binds(extender))

        api.faults.refuse(500, method="PATCH", path="/leases/", times=100_000)
        assert eventually(lambda: not binds(extender))
        api.faults.clear()

        assert eventually(lambda: binds(extender))

    def test_where_each_renewal_meets_a_conflict_it_asks_now_and_then(
        self, api: ApiServer, elect: Callable[[], Running]
    ) -> None:
        extender = elect()
        assert eventually(lambda: binds(extender))
        api.writes.clear()

        api.faults.refuse(409, method="PATCH", path="/leases/", times=100_000)
        assert eventually(lambda: not binds(extender))

        # a thousand a second without a wait
        assert 300 > sum(write.status == 409 for write in api.writes)

    def test_it_holds_the_lease_again_after_somebody_deleted_it(
        self, api: ApiServer, elect: Callable[..., Running]
    ) -> None:
        # a take-over that is long enough to be seen
        extender = elect(settle=0.5)
        assert eventually(lambda: binds(extender))

        api.store.delete(LEASES, LEASE)

        assert eventually(lambda: not binds(extender))
        assert eventually(lambda: binds(extender))
        pod = submit(api, a_pod().asking(8))
        assert "" == extender.bind(pod, "n1")
        # not the term of the Lease that was deleted
        assert f"{held(api)[0]}/1" == term(api, "p")

    def test_it_gives_the_lease_back_when_it_ends(self, api: ApiServer, elect: Callable[[], Running]) -> None:
        extender = elect()
        assert eventually(lambda: binds(extender))

        extender.__exit__()

        assert ("", 0) == held(api)
        elect()

    def test_one_that_stands_by_leaves_the_lease_to_its_holder_when_it_ends(
        self, api: ApiServer, elect: Callable[[], Running]
    ) -> None:
        hold(api, "another-pod_1", 4)
        extender = elect()
        assert Reason.NOT_WRITER.sentence in extender.bind(submit(api, a_pod().asking(8)), "n1")

        extender.__exit__()

        assert ("another-pod_1", 4) == held(api)
        elect()

    def test_of_two_that_begin_at_once_one_binds(
        self, api: ApiServer, elect: Callable[[], Running], tmp_path: Path
    ) -> None:
        extender = elect()
        with Running(api, tmp_path, layout="attached", writer=WRITER | QUICK) as other:
            assert eventually(lambda: binds(extender) or binds(other))
            assert not (binds(extender) and binds(other))


class TestEvents:
    """What breaks the rules is said once, by the one that writes."""

    @pytest.fixture
    def follow(self, start: Callable[..., Running]) -> Callable[[], Running]:
        return lambda: start(layout="second-scheduler", writer=WRITER)

    def go_around(self, api: ApiServer, name: str) -> None:
        """Bind a pod of ours as somebody does who does not ask the extender."""
        submit(api, a_pod().named(name).asking(8))
        api.store.bind(("default", name), {"metadata": {"name": name}, "target": {"name": "n1"}})

    def said(self, api: ApiServer) -> list[str]:
        return sorted(one["regarding"]["name"] for one in api.events() if one["reason"] == Reason.NO_GRANT)

    def test_who_stands_by_says_it_once_it_has_taken_over_and_not_before(
        self, api: ApiServer, follow: Callable[[], Running]
    ) -> None:
        hold(api, "another-pod_1", 4)
        extender = follow()
        self.go_around(api, "p")
        assert eventually(lambda: extender.metric("cotenant_pods_ungranted") == 1)
        assert [] == self.said(api)

        hold(api, OURS, 5)

        assert eventually(lambda: ["p"] == self.said(api))

    def test_the_next_one_says_again_only_what_the_last_one_could_not(
        self, api: ApiServer, follow: Callable[[], Running]
    ) -> None:
        hold(api, OURS, 4)
        first = follow()
        self.go_around(api, "p")
        assert eventually(lambda: ["p"] == self.said(api))
        first.__exit__()
        self.go_around(api, "q")

        follow()

        assert eventually(lambda: ["p", "q"] == self.said(api))

    def test_what_is_still_said_as_its_hour_ends_is_said_again_soon_after(
        self, api: ApiServer, cluster: Cluster
    ) -> None:
        now = 0.0
        events = Events(cluster, ME, may_write=lambda: True, clock=lambda: now, threads=Threads())

        def complain() -> None:
            events.complain("u", "default/p", Reason.NO_GRANT, "it has no grant")

        def posts() -> list[int]:
            return [write.status for write in api.writes if write.resource == "events"]

        complain()
        assert eventually(lambda: [201] == posts())
        now = 3601.0
        complain()
        assert eventually(lambda: [201, 409] == posts())
        # its thread has noted the refusal
        assert eventually(lambda: [300.0] == [*events._told.values()])
        for event in api.events():
            api.store.delete(EVENTS, (event["metadata"]["namespace"], event["metadata"]["name"]))

        now += 301.0
        complain()

        assert eventually(lambda: [201, 409, 201] == posts())
        events.stop()


def labels(api: ApiServer) -> dict[str, str | None]:
    return {pod["metadata"]["name"]: pod["metadata"].get("labels", {}).get(NAMES.writer) for pod in api.pods(NAMESPACE)}


class TestClocks:
    """Whoever sets a machine's clock ends nobody's term: all that is measured is measured by a monotonic one."""

    def test_a_wall_clock_that_jumps_to_and_fro_changes_neither_holder_nor_term(
        self, api: ApiServer, tmp_path: Path
    ) -> None:
        years = iter(itertools.cycle([2026, 1970, 2090, 2026, 2001]))
        writership = Writership(settle=0.01, list_again=listed)
        with connect(api.kubeconfig(tmp_path / "kubeconfig")) as cluster:
            lease = msgspec.convert(WRITER | QUICK, Writer)
            elect = Elect(
                cluster, lease, writership, pod=ME, label="x", now=lambda: datetime(next(years), 1, 1, tzinfo=UTC)
            )
            writership.start()
            elect.start()
            try:
                assert eventually(lambda: writership.token() is not None)
                terms = {held(api) for _ in range(20) if not threading.Event().wait(0.1)}
                assert writership.token() is not None
                assert 1 == len(terms)
            finally:
                elect.stop()
                writership.stop()


def listed() -> threading.Event:
    done = threading.Event()
    done.set()
    return done


class TestTakingOver:
    """A term begins with a wait and a LIST, and may end before that."""

    def test_a_term_that_ended_meanwhile_is_not_begun(self) -> None:
        listed = threading.Event()
        writership = Writership(settle=0.0, list_again=lambda: listed)
        writership.start()
        writership.observe("me", 1, mine=True, until=FOR_EVER)
        writership.observe("other", 2, mine=False, until=FOR_EVER)
        listed.set()

        assert not writership.wait(0.5)
        writership.stop()

    def test_a_term_that_comes_back_is_taken_over_anew(self) -> None:
        listings: list[threading.Event] = []

        def list_again() -> threading.Event:
            listings.append(threading.Event())
            return listings[-1]

        writership = Writership(settle=0.0, list_again=list_again)
        writership.start()
        writership.observe("me", 0, mine=True, until=FOR_EVER)
        assert eventually(lambda: len(listings) == 1)
        listings[0].set()
        assert eventually(lambda: writership.token() == "me/0")

        # the Lease was deleted, another one made it and wrote, and it was deleted once more: counts begin at 0 again
        writership.observe("other", 0, mine=False, until=FOR_EVER)
        writership.observe("me", 0, mine=True, until=FOR_EVER)

        assert writership.token() is None
        assert eventually(lambda: len(listings) == 2)
        listings[1].set()
        assert eventually(lambda: writership.token() == "me/0")
        writership.stop()

    def test_what_was_heard_long_ago_is_not_believed(self) -> None:
        now = [0.0]
        listed = threading.Event()
        listed.set()
        writership = Writership(settle=0.0, list_again=lambda: listed, clock=lambda: now[0])
        writership.start()
        writership.observe("me", 1, mine=True, until=10.0)
        assert eventually(lambda: writership.token() == "me/1")

        # a process that was stopped for a while finds its Lease run out, whatever the watch brings later
        now[0] = 10.0
        assert writership.token() is None
        writership.stop()
