"""What nobody expected in a thread of the extender: it is counted, the thread goes on, and one that ends is named."""

import itertools
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from cotenant.cluster import Cluster
from cotenant.contract import overuse as reports
from cotenant.contract.configuration import FragmentedPreemption, Writer
from cotenant.contract.grant import Grant
from cotenant.contract.overuse import Overuser, OveruseReport
from cotenant.contract.pods import Pod
from cotenant.contract.reasons import Reason
from cotenant.contract.request import PodRequest
from cotenant.contract.units import GIB
from cotenant.standins.api_rules import PODS
from cotenant.standins.api_server import ApiServer
from cotenant.threads import Threads
from extender.cluster.binder import Binder
from extender.cluster.election import Follow
from extender.cluster.events import Events
from extender.cluster.evictions import Evictions
from extender.cluster.evictor import Evictor
from extender.cluster.neighbourhood import Neighbourhood
from extender.cluster.nominator import Nominator
from extender.cluster.preemptor import Preemptor
from extender.cluster.writership import Sole, Writership
from extender.ledger import Hold, Ledger, NodeView
from extender.placement.fit import Placement, grant, place
from extender.verbs.judge import Judge
from extender.verbs.lessons import Lessons
from extender.verbs.victims import Search
from extender.verbs.wire import BindArgs
from tests.builders import NAMES, a_node, a_pod, request_of
from tests.extender.running import Running, eventually, submit


class Once:
    """Fail the first time it is asked, and answer the same from then on."""

    def __init__(self, answer: Any) -> None:
        self.asked = itertools.count(1)
        self.times = 0
        self._answer = answer

    def __call__(self, *_: Any) -> Any:
        self.times = next(self.asked)
        if self.times == 1:
            raise ZeroDivisionError("nobody expected this")
        return self._answer

    def judge(self, _request: PodRequest, nodes: list[str], *, namespace: str) -> list[float | Reason]:  # noqa: ARG002
        self()
        return [0.0 for _ in nodes]

    def limited(self, _namespace: str) -> bool:
        return False

    def excess(self, *_: Any) -> None:
        return None


@pytest.fixture
def threads() -> Threads:
    return Threads(pauses=(0.001, 0.001))


@pytest.fixture
def ledger() -> Ledger:
    return Ledger(NAMES, GIB)


def read(pod: Any) -> Pod:
    return msgspec.convert(pod, Pod)


class TestEach:
    """Each fails at what it does first, and does what comes next."""

    def test_events(self, api: ApiServer, cluster: Cluster, threads: Threads) -> None:
        events = Events(cluster, "me", may_write=Once(answer=True), threads=threads)
        for name in ("first", "second"):
            pod = submit(api, a_pod().named(name))
            events.complain(pod["metadata"]["uid"], f"default/{name}", "BadGrant", "it is a test")

        assert eventually(lambda: [event["regarding"]["name"] for event in api.events()] == ["second"])
        assert {"events": 1} == threads.failures()
        events.stop()

    def test_events_that_were_kept(self, api: ApiServer, cluster: Cluster, threads: Threads) -> None:
        writing = threading.Event()
        now = Once(datetime.now(UTC))
        events = Events(cluster, "me", may_write=writing.is_set, now=now, threads=threads)
        for name in ("first", "second", "third"):
            pod = submit(api, a_pod().named(name))
            events.complain(pod["metadata"]["uid"], f"default/{name}", "BadGrant", "it is a test")
        assert eventually(lambda: len(events._kept) == 3)

        writing.set()

        assert eventually(lambda: [event["regarding"]["name"] for event in api.events()] == ["second", "third"])
        assert {"events": 1} == threads.failures()
        events.stop()

    def test_nominations(self, api: ApiServer, cluster: Cluster, threads: Threads, ledger: Ledger) -> None:
        nominator = Nominator(cluster, ledger, cast("Judge", Once(None)), threads=threads)
        for name in ("first", "second"):
            pod = read(submit(api, a_pod().named(name).asking(1)))
            nominator.look(pod, request_of(pod), frozenset({"n1"}))
            assert eventually(lambda: 1 == threads.failures()["nominate"])

        assert eventually(lambda: (api.pod("second") or {})["status"].get("nominatedNodeName") == "n1")
        assert "nominatedNodeName" not in (api.pod("first") or {})["status"]
        nominator.stop()

    def test_preemption(self, api: ApiServer, cluster: Cluster, threads: Threads, ledger: Ledger) -> None:
        may_write = Once(answer=False)
        preemptor = Preemptor(
            cluster,
            ledger,
            # it never comes to these where it may not write
            cast("Judge", None),
            cast("Search", None),
            evictions=Evictions(cluster, lambda *_: None),
            tell=lambda *_: None,
            configuration=FragmentedPreemption(after=0.001),
            may_write=may_write,
            threads=threads,
        )
        for name in ("first", "second"):
            pod = read(submit(api, a_pod().named(name).asking(1)))
            preemptor.look(pod, request_of(pod), frozenset({"n1"}))

        assert eventually(lambda: may_write.times == 2)
        assert {"preempt": 1} == threads.failures()
        preemptor.stop()

    def test_preemption_keeps_no_memory_for_a_pod_that_it_could_not_see_to_the_end(
        self, api: ApiServer, cluster: Cluster, threads: Threads, ledger: Ledger
    ) -> None:
        ledger.observe_node(a_node("n1").with_gpus(1, "10GiB").build())
        resident = submit(api, a_pod().named("resident").asking(8))
        body = a_pod().named("vip").asking(8).as_json()
        body["spec"]["priority"] = 10
        vip = api.create(PODS, body, "default")
        hold = assumed(ledger, resident, 8)
        ledger.confirm(resident["metadata"]["uid"])
        binding = {"metadata": {"name": "resident", "annotations": {NAMES.grant: hold.grant}}, "target": {"name": "n1"}}
        api.store.bind(("default", "resident"), binding)
        judge = Judge(ledger, NAMES, GIB, "best-fit")
        preemptor = Preemptor(
            cluster,
            ledger,
            judge,
            Search(ledger, judge, Neighbourhood(cluster)),
            # after the eviction, for which memory has been promised, and before that is noted
            evictions=Evictions(cluster, Once(None)),
            tell=lambda *_: None,
            configuration=FragmentedPreemption(after=0.001),
            threads=threads,
        )
        pod = read(vip)
        preemptor.look(pod, request_of(pod), frozenset({"n1"}))

        assert eventually(lambda: {"preempt": 1} == threads.failures() and not ledger.promises())
        assert [("resident", 201)] == evictions(api)
        assert preemptor.lasts(pod.uid) is None
        preemptor.stop()

    def test_over_users(self, cluster: Cluster, threads: Threads, ledger: Ledger) -> None:
        may_write = Once(answer=True)
        evictor = Evictor(
            cluster,
            ledger,
            NAMES,
            lambda *_: None,
            Evictions(cluster, lambda *_: None),
            grace=None,
            may_write=may_write,
            threads=threads,
        )
        evictor.start(lambda: True)
        for beat in range(2):
            evictor.node_seen("n1", {NAMES.overusers: f"report {beat} that cannot be read"})

        assert eventually(lambda: may_write.times >= 2)
        assert {"overuse": 1} == threads.failures()
        evictor.stop()

    def test_over_users_of_one_report(self, api: ApiServer, cluster: Cluster, threads: Threads, ledger: Ledger) -> None:
        ledger.observe_node(a_node("n1").with_gpus(1, "10GiB").build())
        pods = [submit(api, a_pod().named(name).asking(2)) for name in ("first", "second")]
        for pod in pods:
            assumed(ledger, pod, 2)
        told: list[tuple[str, str]] = []
        evictor = Evictor(
            cluster,
            ledger,
            NAMES,
            lambda _uid, key, reason, _why: told.append((key, reason)),
            Evictions(cluster, Once(None)),
            grace=0.0,
            threads=threads,
        )
        evictor.start(lambda: True)
        users = tuple(
            Overuser(uid=pod["metadata"]["uid"], gpu="GPU-1", granted_bytes=2 * GIB, used_bytes=3 * GIB) for pod in pods
        )
        evictor.node_seen("n1", {NAMES.overusers: reports.encode(OveruseReport(beat=1, users=users))})

        assert eventually(lambda: [("default/second", "GPUMemoryEvicted")] == told)
        assert [("first", 201), ("second", 201)] == evictions(api)
        assert {"overuse": 1} == threads.failures()
        evictor.stop()

    def test_taking_over(self, threads: Threads) -> None:
        listed = threading.Event()
        listed.set()
        writership = Writership(settle=0.0, list_again=lambda: listed, begin=Once(None), threads=threads)
        writership.start()
        writership.observe("me", 1, mine=True, until=float("inf"))

        assert writership.wait(30)
        assert {"take over": 1} == threads.failures()
        writership.stop()

    def test_bindings_in_doubt(self, api: ApiServer, cluster: Cluster, threads: Threads, ledger: Ledger) -> None:
        ledger.observe_node(a_node("n1").with_gpus(1, "10GiB").build())
        writer = Sometimes()
        binder = Binder(cluster, ledger, names=NAMES, bind_timeout=0.3, writer=writer, threads=threads)
        api.faults.refuse(500, path=r"/binding$", times=10_000)
        args = []
        for name in ("first", "second"):
            pod = submit(api, a_pod().named(name).asking(2))
            hold = assumed(ledger, pod, 2)
            args.append(BindArgs(PodName=name, PodNamespace="default", PodUID=hold.uid, Node="n1"))
            refusal = binder.bind(args[-1], {NAMES.grant: hold.grant}, hold, deadline=binder.deadline())
            assert refusal is not None
            assert Reason.UNSETTLED is refusal.reason
        writer.fails = True
        api.faults.clear()

        # the first fails, the second is settled in the same turn; and the first in the next
        assert eventually(lambda: 0 == binder.unsettled())
        assert {"settle bindings": 1} == threads.failures()
        assert ["n1"] * 2 == [(api.pod(one.PodName) or {})["spec"]["nodeName"] for one in args]
        binder.stop()


class Learning:
    """Learn until somebody has news, which may be that it is to stop, and forget them then, as a judge does."""

    def __init__(self) -> None:
        self.news = threading.Event()
        self.begun = threading.Event()

    def learn(self, pause: object = None) -> None:
        if pause is not None:
            self.news.clear()
            self.begun.set()
            assert self.news.wait(30)
            self.news.clear()


def test_learning_stops_where_it_is_told_to_within_a_lesson(threads: Threads) -> None:
    judge = Learning()
    lessons = Lessons(cast("Judge", judge), threads)
    lessons.start()
    judge.news.set()
    assert judge.begun.wait(30)

    lessons.stop()

    assert not lessons._thread.alive


class Sometimes(Sole):
    """Be the writer, and fail once when it is asked to."""

    fails = False

    def token(self) -> str | None:
        if self.fails:
            self.fails = False
            raise ZeroDivisionError("nobody expected this")
        return super().token()


def assumed(ledger: Ledger, pod: Any, units: int) -> Hold:
    """Reserve for the pod on n1 what it asks."""
    uid, key = pod["metadata"]["uid"], f"default/{pod['metadata']['name']}"
    hold = ledger.assume(uid, key, "n1", lambda view: granted(view, units))
    assert isinstance(hold, Hold)
    return hold


def evictions(api: ApiServer) -> list[tuple[str, int]]:
    return [(write.name, write.status) for write in api.writes if write.subresource == "eviction"]


def granted(view: NodeView, units: int) -> Grant:
    request = request_of(a_pod().asking(units).build())
    placed = place(view, request)
    assert isinstance(placed, Placement)
    return grant(request, placed)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_health_names_a_thread_that_has_ended_and_metrics_count_what_was_survived(
    api: ApiServer, tmp_path: Path
) -> None:
    def leave() -> bool:
        raise SystemExit

    with Running(api, tmp_path, nominate=True, preemptFragmented={}) as extender:
        assert 200 == extender.get("/healthz").status
        names = "events", "overuse", "settle bindings", "nominate", "preempt", "learn"
        found = extender.get("/metrics").body.decode()
        assert [] == [one for one in names if f'cotenant_thread_failures_total{{thread="{one}"}} 0.0' not in found]

        extender.extender._threads.of("doomed", leave).start()

        assert eventually(lambda: 503 == extender.get("/healthz").status)
        assert b"threads of the extender have ended: doomed; restart it" in extender.get("/healthz").body
        assert 200 == extender.get("/readyz").status


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_health_names_the_watch_of_the_lease_where_that_has_ended(api: ApiServer, tmp_path: Path) -> None:
    def leave() -> float:
        raise SystemExit

    extender = Running(api, tmp_path, layout="second-scheduler", writer={"lease": "cotenant-system/w"})
    assert isinstance(extender.extender._writer, Writership)
    extender.extender._election = Follow(
        extender._cluster,
        Writer(lease="cotenant-system/w"),
        extender.extender._writer,
        host="me",
        # asked as the Lease has been read, in the thread that follows it
        clock=leave,
    )
    with extender:
        assert eventually(lambda: 503 == extender.get("/healthz").status)
        assert b"threads of the extender have ended: watch lease; restart it" in extender.get("/healthz").body
