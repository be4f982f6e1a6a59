"""What the extender makes of reports of overuse."""

import itertools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotenant.cluster import connect
from cotenant.contract import overuse as reports
from cotenant.contract.overuse import BEAT_SECONDS, Overuser, OveruseReport
from cotenant.contract.units import GIB
from cotenant.standins.api_rules import NODES
from cotenant.standins.api_server import ApiServer
from extender.cluster.evictions import Evictions
from extender.cluster.evictor import Evictor
from extender.ledger import Ledger
from extender.overuse import Reports
from tests.builders import NAMES, a_pod
from tests.extender.running import PATIENCE, Running, eventually, submit

HOMES = {"p": "n1", "q": "n1", "elsewhere": "n2"}


def user(uid: str) -> Overuser:
    return Overuser(uid=uid, container="main-0", gpu="GPU-1", granted_bytes=8 * GIB, used_bytes=9 * GIB)


def report(*uids: str, beat: int = 1) -> str:
    return reports.encode(OveruseReport(beat=beat, users=tuple(map(user, uids))))


def new() -> Reports:
    return Reports(lambda uid: HOMES.get(uid, ""))


class TestReports:
    """Pure: times are numbers."""

    def test_a_pod_is_over_since_the_first_of_reports_that_follow_each_other(self) -> None:
        known = new()
        for beat in range(4):
            outcome = known.take("n1", report("p", beat=beat), beat * BEAT_SECONDS)
        (suspect,) = outcome.over.values()
        assert (0.0, 3 * BEAT_SECONDS) == (suspect.since, suspect.last)
        assert "container main-0 uses 9 GiB of GPU GPU-1, but was granted 8 GiB" == suspect.sentence

    def test_after_a_pause_it_counts_from_anew(self) -> None:
        known = new()
        known.take("n1", report("p"), 0)
        outcome = known.take("n1", report("p", beat=2), 10 * BEAT_SECONDS)
        assert [10 * BEAT_SECONDS] == [suspect.since for suspect in outcome.over.values()]

    def test_who_is_left_out_of_a_report_is_no_longer_over(self) -> None:
        known = new()
        known.take("n1", report("p", "q"), 0)
        outcome = known.take("n1", report("q", beat=2), 1)
        assert (("p",), {"q"}) == (outcome.ended, {*outcome.over})
        assert ("q",) == known.take("n1", None, 2).ended
        assert set() == known.all_over()

    @pytest.mark.parametrize("uid", ["elsewhere", "unknown"])
    def test_a_node_speaks_of_its_own_pods_only(self, uid: str) -> None:
        outcome = new().take("n1", report(uid, "p"), 0)
        assert {"p"} == {*outcome.over}
        assert (f"node n1 reports overuse of pod {uid}, which holds no GPU memory there",) == outcome.problems

    @pytest.mark.parametrize(
        "text", ["", "{", '{"version":2}', '{"version":1,"beat":-1}', '{"version":1,"beat":1,"users":[{}]}']
    )
    def test_a_report_that_cannot_be_read_accuses_nobody(self, text: str) -> None:
        known = new()
        known.take("n1", report("p"), 0)
        outcome = known.take("n1", text, 1)
        assert ({}, ("p",)) == (outcome.over, outcome.ended)
        assert "node n1: the node's report of overuse" in outcome.problems[0]

    @given(
        st.lists(
            st.tuples(
                st.sampled_from(["n1", "n2", "n3"]),
                st.sets(st.sampled_from(["p", "q", "elsewhere", "x"])),
                st.floats(0, 100),
            ),
            max_size=20,
        )
    )
    def test_nobody_is_over_but_who_stands_in_the_newest_report_of_its_own_node(
        self, story: list[tuple[str, set[str], float]]
    ) -> None:
        known, now, newest = new(), 0.0, dict[str, set[str]]()
        for beat, (node, uids, pause) in enumerate(story):
            now += pause
            outcome = known.take(node, report(*sorted(uids), beat=beat) if uids else None, now)
            newest[node] = {uid for uid in uids if HOMES.get(uid) == node}
            assert newest[node] == {*outcome.over}
            assert all(0 <= suspect.since <= now for suspect in outcome.over.values())
        assert set().union(*newest.values()) == known.all_over()


def bound(api: ApiServer, extender: Running, name: str) -> dict[str, Any]:
    pod = submit(api, a_pod().named(name).asking(4))
    assert "" == extender.bind(pod, "n1")
    assert eventually(lambda: (hold := extender.ledger.hold(pod["metadata"]["uid"])) and hold.stage == "bound")
    return pod


def say(api: ApiServer, node: str, *pods: dict[str, Any], beat: int = 1) -> None:
    text = reports.encode(OveruseReport(beat=beat, users=tuple(user(pod["metadata"]["uid"]) for pod in pods)))
    api.patch(NODES, node, {"metadata": {"annotations": {NAMES.overusers: text if pods else None}}})


def reported_until(api: ApiServer, pod: dict[str, Any], happened: Callable[[], object]) -> bool:
    """Report the pod again and again, each time with another beat."""
    beats = itertools.count(1)

    def look() -> object:
        say(api, "n1", pod, beat=next(beats))
        return happened()

    return eventually(look)


def mark(api: ApiServer, pod: dict[str, Any]) -> str | None:
    found = api.pod(pod["metadata"]["name"])
    text: str | None = (found or pod)["metadata"].get("annotations", {}).get(NAMES.overuse)
    return text


def evictions(api: ApiServer) -> list[tuple[str, int]]:
    return [(write.name, write.status) for write in api.writes if write.subresource == "eviction"]


def told(api: ApiServer, reason: str) -> list[str]:
    return [event["regarding"]["name"] for event in api.events() if event["reason"] == reason]


class TestTheProgram:
    """Over the wire."""

    def test_pods_are_marked_and_unmarked_and_never_evicted_unless_configured(
        self, api: ApiServer, start: Callable[..., Running]
    ) -> None:
        extender = start()
        pod = bound(api, extender, "p")
        for beat in range(3):
            say(api, "n1", pod, beat=beat)
            assert eventually(lambda: mark(api, pod))
        say(api, "n1")
        assert eventually(lambda: mark(api, pod) is None)
        assert [] == evictions(api)

    def test_a_mark_that_was_left_by_an_extender_before_is_taken_away_when_it_is_over(
        self, api: ApiServer, start: Callable[..., Running]
    ) -> None:
        first = start()
        pods = [bound(api, first, "p"), bound(api, first, "q")]
        say(api, "n1", *pods)
        assert eventually(lambda: all(mark(api, pod) for pod in pods))
        first.__exit__()
        say(api, "n1", pods[1], beat=2)
        start()
        assert eventually(lambda: mark(api, pods[0]) is None)
        assert mark(api, pods[1])

    def test_who_takes_over_takes_such_marks_away_though_nothing_else_happens(
        self, api: ApiServer, tmp_path: Path
    ) -> None:
        pod = api.add_pod("p", annotations={NAMES.overuse: "too much"})
        writes, asked = threading.Event(), threading.Event()

        def may_write() -> bool:
            asked.set()
            return writes.is_set()

        with connect(api.kubeconfig(tmp_path / "kubeconfig")) as cluster:
            evictions = Evictions(cluster, lambda *_: None)
            evictor = Evictor(
                cluster, Ledger(NAMES, GIB), NAMES, lambda *_: None, evictions, grace=None, may_write=may_write
            )
            evictor.pod_seen(pod["metadata"]["uid"], "default/p", pod["metadata"]["annotations"])
            evictor.start(lambda: True)
            assert asked.wait(PATIENCE)
            assert "too much" == mark(api, pod)

            writes.set()

            assert eventually(lambda: mark(api, pod) is None)
            evictor.stop()

    def test_nobody_is_evicted_by_one_report_however_long_it_stands(
        self, api: ApiServer, start: Callable[..., Running]
    ) -> None:
        extender = start(evictOverusersAfter=0.05)
        pod, other = bound(api, extender, "p"), bound(api, extender, "other")
        say(api, "n1", pod)
        assert eventually(lambda: mark(api, pod))
        # of other things the node's watch goes on telling
        for n in range(5):
            api.patch(NODES, "n1", {"metadata": {"annotations": {"other": str(n)}}})
        say(api, "n2", other)  # which is not its node
        last = bound(api, extender, "last")
        assert (last, []) == (last, evictions(api))

    @pytest.mark.parametrize(
        ("status", "message", "outcome", "reason"),
        [
            (429, "it would violate the pod's disruption budget", "blocked", "GPUMemoryEvictionBlocked"),
            (500, "This pod has more than one PodDisruptionBudget", "blocked", "GPUMemoryEvictionBlocked"),
            (403, "User cannot create resource pods/eviction", "forbidden", "GPUMemoryEvictionForbidden"),
        ],
    )
    def test_an_eviction_that_is_not_allowed_is_told_of_and_tried_again_with_the_next_report(  # noqa: PLR0917
        self, api: ApiServer, start: Callable[..., Running], status: int, message: str, outcome: str, reason: str
    ) -> None:
        extender = start(evictOverusersAfter=0.01)
        pod = bound(api, extender, "p")
        api.faults.refuse(status, message, path="/eviction")
        assert reported_until(api, pod, lambda: told(api, reason))
        assert reported_until(api, pod, lambda: told(api, "GPUMemoryEvicted"))
        assert [("p", status), ("p", 201)] == evictions(api)[:2]
        assert 1 == extender.metric(f'cotenant_evictions_total{{cause="overuse",outcome="{outcome}"}}')
        assert 1 == extender.metric('cotenant_evictions_total{cause="overuse",outcome="ok"}')

    def test_an_api_server_that_is_too_busy_to_evict_is_not_taken_for_a_budget(
        self, api: ApiServer, start: Callable[..., Running]
    ) -> None:
        extender = start(evictOverusersAfter=0.01)
        pod = bound(api, extender, "p")
        api.faults.refuse(429, "Too many requests, please try again later.", path="/eviction")
        assert reported_until(api, pod, lambda: told(api, "GPUMemoryEvicted"))
        assert [("p", 429), ("p", 201)] == evictions(api)[:2]
        assert not told(api, "GPUMemoryEvictionBlocked")
        assert 1 == extender.metric('cotenant_evictions_total{cause="overuse",outcome="error"}')

    def test_another_pod_of_the_same_name_is_not_evicted_for_the_first(
        self, api: ApiServer, start: Callable[..., Running]
    ) -> None:
        extender = start(evictOverusersAfter=0.01)
        pod = bound(api, extender, "p")
        hold = api.faults.hold(method="POST", path="/eviction")
        assert reported_until(api, pod, hold.reached.is_set)
        api.delete_pod("p", grace=0)
        submit(api, a_pod().named("p").with_uid("another").asking(4))
        hold.release()
        assert eventually(lambda: ("p", 409) in evictions(api))
        found = api.pod("p")
        assert found is not None
        assert "deletionTimestamp" not in found["metadata"]
