import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cotenant.cluster import Cluster, Reflector, Unreadable, connect
from cotenant.contract.pods import Pod
from cotenant.standins.api_rules import NODES, PODS
from cotenant.standins.api_server import ApiServer
from tests.cluster.sinks import Notebook

PATH = "/api/v1/pods"
Follow = Callable[..., Reflector[Pod]]

WATCH = r"watch=1"
LIST = r"resourceVersion=&"


class Waits:
    """Write down the waits and make them short; a real one would be up to 30 s."""

    def __init__(self) -> None:
        self.asked: list[float] = []
        self._never = threading.Event()

    def __call__(self, seconds: float) -> bool:
        self.asked.append(seconds)
        return self._never.wait(0.01)


@pytest.fixture
def notebook() -> Notebook:
    return Notebook()


@pytest.fixture
def waits() -> Waits:
    return Waits()


@pytest.fixture
def follow(api: ApiServer, cluster: Cluster, notebook: Notebook, waits: Waits) -> Iterator[Follow]:
    """Start a reflector and let it come as far as its list or its first watch."""
    started: list[Reflector[Pod]] = []

    def begin(*, synced: bool = True, watching: bool = True, **options: Any) -> Reflector[Pod]:
        reflector = Reflector(cluster, PATH, Pod, notebook, **{"wait": waits, **options})
        started.append(reflector)
        reflector.start()
        if synced:
            assert reflector.synced.wait(20)
        if synced and watching:
            assert api.wait_until(lambda: api.watching == 1)
        return reflector

    yield begin
    assert [True] * len(started) == [reflector.stop() for reflector in started]


class TestList:
    """All there is arrives as one picture, before anything else."""

    def test_all_there_is_has_arrived_once_it_counts_as_synced(
        self, api: ApiServer, follow: Follow, notebook: Notebook
    ) -> None:
        api.add_pod("one")
        api.add_pod("two")

        follow()

        assert {"one", "two"} == set(notebook.pods)

    def test_many_pages_arrive_as_one_list(self, api: ApiServer, follow: Follow, notebook: Notebook) -> None:
        for number in range(1201):  # pages of 500, 500 and 201
            api.add_pod(f"pod-{number}")

        follow()

        assert 1201 == len(notebook.pods)
        assert 1 == len(notebook.started)

    def test_pages_may_be_taken_one_by_one_and_only_what_is_kept_of_them_arrives_as_the_list(
        self, api: ApiServer, follow: Follow, notebook: Notebook
    ) -> None:
        for number in range(501):
            api.add_pod(f"pod-{number}")
        pages: list[int] = []

        def keep_the_first(page: list[Pod]) -> list[Pod]:
            pages.append(len(page))
            return page[:1]

        follow(by_page=keep_the_first)

        assert [500, 1] == pages
        assert 2 == len(notebook.pods)

    def test_of_large_objects_fewer_are_asked_for_at_a_time_and_of_small_ones_after_them_more_again(
        self, api: ApiServer, follow: Follow, notebook: Notebook
    ) -> None:
        """A tenant's 500 pods of a megabyte each are more than the extender may have."""
        for number in range(100):  # 24 MB
            api.add_pod(f"large-{number:02}", annotations={"note": "x" * (240 << 10)})
        for number in range(100):
            api.add_pod(f"small-{number:02}")
        pages: list[int] = []

        def count(page: list[Pod]) -> list[Pod]:
            pages.append(len(page))
            return page

        follow(by_page=count)

        # 500 and 125 objects are more than 16 MiB, 31 are 7.4; the fourth page has 7 large ones
        assert [31, 31, 31, 31, 62, 14] == pages
        assert 200 == len(notebook.pods)

    def test_a_list_whose_snapshot_expires_between_two_pages_is_asked_for_in_one_piece(
        self, api: ApiServer, follow: Follow, notebook: Notebook, waits: Waits
    ) -> None:
        for number in range(501):
            api.add_pod(f"pod-{number}")
        second_page = api.faults.hold(path="continue=")
        reflector = follow(synced=False)

        assert second_page.reached.wait(20)
        api.compact()
        second_page.release()

        assert reflector.synced.wait(20)
        assert 501 == len(notebook.pods)
        assert [] == waits.asked

    def test_the_mark_is_taken_before_the_list_is_sent(
        self, api: ApiServer, follow: Follow, notebook: Notebook
    ) -> None:
        marks = iter([41, 42])
        taken: list[int] = []

        def mark() -> int:
            taken.append(next(marks))
            return taken[-1]

        held = api.faults.hold(path=LIST)
        reflector = follow(synced=False, mark=mark)
        assert held.reached.wait(20)
        assert [41] == taken
        held.release()

        assert reflector.synced.wait(20)
        assert [41] == notebook.started

    def test_an_object_that_does_not_decode_is_named_and_stops_no_other(
        self, api: ApiServer, follow: Follow, notebook: Notebook
    ) -> None:
        api.add_pod("good")
        bad = api.add_pod("bad", spec={"nodeName": 7})
        api.add_pod("good-too")

        reflector = follow()

        assert {"good", "good-too"} == set(notebook.pods)
        assert [("bad", "default", bad["metadata"]["uid"])] == [(u.name, u.namespace, u.uid) for u in notebook.unread]
        assert "node_name" in notebook.unread[0].why.lower() or "nodeName" in notebook.unread[0].why
        assert 1 == reflector.counts.unreadable

    def test_a_sink_that_cannot_take_a_list_is_given_another(
        self, api: ApiServer, follow: Follow, notebook: Notebook
    ) -> None:
        api.add_pod("one")
        notebook.trouble = ["replaced", "replaced"]

        reflector = follow()

        assert {"one"} == set(notebook.pods)
        assert 2 == reflector.counts.errors

    def test_a_list_that_is_refused_is_asked_for_again(
        self, api: ApiServer, follow: Follow, notebook: Notebook, waits: Waits
    ) -> None:
        api.add_pod("one")
        api.faults.refuse(403, times=2)

        follow()

        assert {"one"} == set(notebook.pods)
        assert 2 == len(waits.asked)


class TestListAgain:
    """Whoever must know what there is now, and not what a watch has told so far, can ask for it."""

    def test_it_is_done_when_what_no_watch_has_told_has_arrived(
        self, api: ApiServer, follow: Follow, notebook: Notebook, waits: Waits
    ) -> None:
        reflector = follow()
        api.freeze_watches()
        api.add_pod("unseen")

        assert reflector.list_again().wait(20)

        assert {"unseen"} == set(notebook.pods)
        assert 2 == reflector.counts.lists
        assert [] == waits.asked

    def test_a_list_that_was_sent_before_does_not_count(
        self, api: ApiServer, follow: Follow, notebook: Notebook
    ) -> None:
        held = api.faults.hold(path=LIST)
        reflector = follow(synced=False)
        assert held.reached.wait(20)

        done = reflector.list_again()
        held.release()

        assert done.wait(20)
        assert 2 == len(notebook.started)

    def test_a_watch_whose_answer_does_not_begin_is_not_waited_for(
        self, api: ApiServer, follow: Follow, notebook: Notebook
    ) -> None:
        held = api.faults.hold(path=WATCH)
        reflector = follow(watching=False)
        assert held.reached.wait(20)
        api.add_pod("unseen")

        assert reflector.list_again().wait(20)

        assert {"unseen"} == set(notebook.pods)
        held.release()
        api.add_pod("seen")
        assert notebook.waits_for(lambda: "seen" in notebook.pods)

    def test_one_that_fails_is_asked_for_until_it_succeeds(
        self, api: ApiServer, follow: Follow, notebook: Notebook
    ) -> None:
        reflector = follow()
        api.faults.refuse(500, path=LIST, times=2)

        assert reflector.list_again().wait(20)
        assert 2 == len(notebook.started)


class TestWatch:
    """What changes after the list arrives in order, each change once."""

    def test_changes_arrive_in_order(self, api: ApiServer, follow: Follow, notebook: Notebook) -> None:
        follow()

        api.add_pod("one")
        api.set_phase("one", "Running")
        api.delete_pod("one")

        assert notebook.waits_for(lambda: len(notebook.changes) == 4)
        # a deletion is told twice, as a mark and as the end
        told = [("ADDED", "one"), ("MODIFIED", "one"), ("MODIFIED", "one"), ("DELETED", "one")]
        assert told == notebook.changes

    def test_a_watch_that_ends_is_resumed_without_a_list_and_without_a_gap(
        self, api: ApiServer, follow: Follow, notebook: Notebook
    ) -> None:
        reflector = follow()
        api.add_pod("before")
        assert notebook.waits_for(lambda: "before" in notebook.pods)

        resumed = api.faults.hold(path=WATCH)
        api.cut_watches()
        assert resumed.reached.wait(20)
        api.add_pod("between")
        resumed.release()

        assert notebook.waits_for(lambda: "between" in notebook.pods)
        assert [("ADDED", "before"), ("ADDED", "between")] == notebook.changes
        assert 1 == reflector.counts.lists

    @pytest.mark.parametrize("told", ["as an ERROR event", "as a status"])
    def test_a_version_that_is_too_old_leads_to_a_new_list(
        self, told: str, api: ApiServer, follow: Follow, notebook: Notebook
    ) -> None:
        api.too_old_as_status = told == "as a status"
        api.add_pod("goes")
        reflector = follow()

        resumed = api.faults.hold(path=WATCH)
        api.cut_watches()
        assert resumed.reached.wait(20)
        api.delete_pod("goes")
        api.add_pod("comes")
        api.compact()
        resumed.release()

        assert notebook.waits_for(lambda: len(notebook.started) == 2)
        assert {"comes"} == set(notebook.pods)
        assert [] == notebook.changes
        assert notebook.waits_for(lambda: reflector.counts.lists == 2)

    def test_a_bookmark_keeps_a_quiet_watch_from_growing_too_old(
        self, api: ApiServer, follow: Follow, notebook: Notebook
    ) -> None:
        reflector = follow()

        api.compact()  # the version of the list can no longer be watched from,
        api.send_bookmarks()  # but the bookmark's can
        api.say_to_watches(b'{"type":"ADDED","object":{}}')  # names no version, and tells that the bookmark was taken
        assert notebook.waits_for(lambda: notebook.unread)
        api.cut_watches()
        api.add_pod("one")

        assert notebook.waits_for(lambda: "one" in notebook.pods)
        assert 1 == reflector.counts.lists

    def test_all_that_the_server_says_counts_as_a_sign_of_life(
        self, api: ApiServer, follow: Follow, notebook: Notebook
    ) -> None:
        ticks = iter(range(10**6))
        reflector = follow(clock=lambda: float(next(ticks)))

        api.send_bookmarks()
        api.add_pod("one")
        assert notebook.waits_for(lambda: "one" in notebook.pods)

        # 0 the list, 1 the watch is asked for, 2 it is open, 3 the bookmark, 4 the pod
        assert 4.0 == reflector.last_event_at

    def test_a_connection_that_says_nothing_is_replaced_without_any_fuss(
        self, api: ApiServer, follow: Follow, notebook: Notebook
    ) -> None:
        reflector = follow(silence=1.0)
        api.freeze_watches()
        replaced = api.faults.hold(path=WATCH)

        assert replaced.reached.wait(20)
        api.add_pod("one")
        api.freeze_watches(frozen=False)
        replaced.release()

        assert notebook.waits_for(lambda: "one" in notebook.pods)
        assert (1, 0) == (reflector.counts.lists, reflector.counts.errors)

    def test_what_watches_that_say_nothing_never_tell_is_listed(
        self, api: ApiServer, follow: Follow, notebook: Notebook
    ) -> None:
        reflector = follow(silence=0.5)
        # as those of an API server whose etcd was restored from a backup, from a version that lies in the future
        api.freeze_watches()
        api.add_pod("one")

        assert notebook.waits_for(lambda: "one" in notebook.pods)

        # fewer may be those of a quiet cluster
        assert 4 <= reflector.counts.watches
        assert 0 == reflector.counts.errors

    def test_an_unknown_kind_of_event_is_skipped(self, api: ApiServer, follow: Follow, notebook: Notebook) -> None:
        reflector = follow()

        api.say_to_watches(b'{"type":"FORGOTTEN","object":{"metadata":{"name":"x","uid":"u"}}}')
        api.say_to_watches(b'{"type":"SYNCED","object":{"kind":"Unheard"}}')
        api.add_pod("one")

        assert notebook.waits_for(lambda: "one" in notebook.pods)
        assert [("ADDED", "one")] == notebook.changes
        assert 2 == reflector.counts.unknown_events
        assert 1 == reflector.counts.watches

    @pytest.mark.parametrize("line", [b'{"type":"ADDED","obj', b"<html>502</html>", b"[]", b'"ADDED"', b"\xff\xfe"])
    def test_a_line_that_is_no_event_starts_another_watch_and_loses_nothing(
        self, line: bytes, api: ApiServer, follow: Follow, notebook: Notebook
    ) -> None:
        reflector = follow()

        api.say_to_watches(line)
        api.add_pod("one")

        assert notebook.waits_for(lambda: "one" in notebook.pods)
        assert [("ADDED", "one")] == notebook.changes
        assert (1, 2) == (reflector.counts.lists, reflector.counts.watches)

    def test_an_object_that_stops_to_decode_is_named_and_stops_no_other(
        self, api: ApiServer, follow: Follow, notebook: Notebook
    ) -> None:
        bad = api.add_pod("bad")
        reflector = follow()

        api.patch(PODS, "bad", {"status": {"phase": 9}}, namespace="default", subresource="status")
        api.add_pod("good")

        assert notebook.waits_for(lambda: "good" in notebook.pods)
        assert [("MODIFIED", "unreadable bad"), ("ADDED", "good")] == notebook.changes
        assert [bad["metadata"]["uid"]] == [unreadable.uid for unreadable in notebook.unread]
        assert (1, 1) == (reflector.counts.unreadable, reflector.counts.watches)

    @pytest.mark.parametrize("metadata", [None, [], "x", {"name": 3, "uid": None}, {"name": "n" * 10_000}])
    def test_an_object_without_a_usable_identity_stops_no_other_either(
        self, metadata: object, api: ApiServer, follow: Follow, notebook: Notebook
    ) -> None:
        follow()

        api.say_to_watches(msgspec.json.encode({"type": "ADDED", "object": {"metadata": metadata, "spec": 1}}))
        api.add_pod("good")

        assert notebook.waits_for(lambda: "good" in notebook.pods)
        assert 1 == len(notebook.unread)

    def test_an_object_that_is_nested_deeply_stops_no_other_either(
        self, api: ApiServer, follow: Follow, notebook: Notebook
    ) -> None:
        reflector = follow()
        depths = b'{"f:a":' * 5_000 + b"{}" + b"}" * 5_000

        api.say_to_watches(
            b'{"type":"ADDED","object":{"metadata":{"name":"deep","uid":"u","managedFields":[{"fieldsV1":'
            + depths
            + b"}]}}}"
        )
        api.add_pod("good")

        assert notebook.waits_for(lambda: "good" in notebook.pods)
        assert [("ADDED", "deep"), ("ADDED", "good")] == notebook.changes
        assert (1, 0) == (reflector.counts.lists, reflector.counts.errors)

    def test_a_sink_that_fails_on_one_object_still_gets_the_next(
        self, api: ApiServer, follow: Follow, notebook: Notebook
    ) -> None:
        notebook.trouble = ["one"]
        reflector = follow()

        api.add_pod("one")
        api.add_pod("two")

        assert notebook.waits_for(lambda: "two" in notebook.pods)
        assert {"two"} == set(notebook.pods)
        assert (1, 1) == (reflector.counts.errors, reflector.counts.watches)

    def test_only_what_the_selector_selects_is_followed(
        self, api: ApiServer, follow: Follow, notebook: Notebook
    ) -> None:
        api.add_pod("elsewhere", spec={"nodeName": "n2"})
        waiting = api.add_pod("waiting")
        follow(selector={"fieldSelector": "spec.nodeName=n1"})
        assert {} == notebook.pods

        api.add_pod("elsewhere-too", spec={"nodeName": "n2"})
        uid = waiting["metadata"]["uid"]
        api.store.bind(("default", "waiting"), {"metadata": {"uid": uid}, "target": {"name": "n1"}})

        assert notebook.waits_for(lambda: notebook.changes)
        assert [("ADDED", "waiting")] == notebook.changes


class TestTrouble:
    """While the API server is in trouble it is asked ever more seldom, and nothing is lost."""

    def test_waits_double_up_to_thirty_seconds_and_a_list_is_made_after_five_failures(
        self, api: ApiServer, follow: Follow, waits: Waits
    ) -> None:
        api.faults.refuse(500, path=WATCH, times=8)

        reflector = follow()  # until a watch is open

        # 0.5 doubled: 0.5 1 2 4 8 16 30 30, each less up to a half of it by chance
        steps = [0.5, 1, 2, 4, 8, 16, 30, 30]
        assert 8 == len(waits.asked)
        assert [] == [(w, s) for w, s in zip(waits.asked, steps, strict=True) if not s / 2 <= w <= s]
        # the first, and one after the sixth, seventh and eighth failure, each of which has five before it
        assert 1 + 3 == reflector.counts.lists

    def test_an_event_makes_the_waits_short_again(
        self, api: ApiServer, follow: Follow, notebook: Notebook, waits: Waits
    ) -> None:
        api.faults.refuse(500, path=WATCH, times=3)
        follow()
        api.add_pod("one")
        assert notebook.waits_for(lambda: "one" in notebook.pods)

        api.faults.refuse(500, path=WATCH)
        api.cut_watches()
        api.add_pod("two")
        assert notebook.waits_for(lambda: "two" in notebook.pods)

        assert 4 == len(waits.asked)
        assert waits.asked[3] <= 0.5

    def test_so_does_a_watch_that_stood_though_it_had_nothing_to_tell(
        self, api: ApiServer, follow: Follow, waits: Waits
    ) -> None:
        """Else pods of a quiet cluster would be followed again half a minute late, for the trouble of last month."""
        api.faults.refuse(500, path=WATCH, times=3)
        follow(silence=1.0)

        api.faults.refuse(500, path=WATCH)
        after_that = api.faults.hold(path=WATCH)
        assert after_that.reached.wait(20)
        after_that.release()

        assert 4 == len(waits.asked)
        assert waits.asked[3] <= 0.5

    def test_the_server_may_ask_for_a_longer_wait(self, api: ApiServer, follow: Follow, waits: Waits) -> None:
        api.faults.refuse(429, path=LIST, retry_after=17)

        follow()

        assert [17.0] == waits.asked

    def test_an_outage_is_survived_and_what_happened_meanwhile_arrives(
        self, api: ApiServer, follow: Follow, notebook: Notebook
    ) -> None:
        api.add_pod("goes")
        follow()

        api.stop()
        api.delete_pod("goes")
        api.add_pod("comes")
        api.start()

        assert notebook.waits_for(lambda: set(notebook.pods) == {"comes"})

    def test_a_connection_that_breaks_in_the_middle_is_resumed(
        self, api: ApiServer, follow: Follow, notebook: Notebook
    ) -> None:
        reflector = follow()
        api.add_pod("one")
        assert notebook.waits_for(lambda: "one" in notebook.pods)

        api.drop_connections()
        api.add_pod("two")

        assert notebook.waits_for(lambda: "two" in notebook.pods)
        assert 1 == reflector.counts.lists

    @pytest.mark.parametrize("seed", range(3))
    def test_whatever_happens_the_picture_ends_up_true(
        self, seed: int, api: ApiServer, follow: Follow, notebook: Notebook
    ) -> None:
        rng = random.Random(seed)
        follow()
        for step in range(150):
            _do_anything(api, rng, step)
        api.faults.clear()

        truth = {pod["metadata"]["name"]: pod["metadata"]["resourceVersion"] for pod in api.pods()}
        assert notebook.waits_for(lambda: notebook.pods == truth)


def _do_anything(api: ApiServer, rng: random.Random, step: int) -> None:
    names = [pod["metadata"]["name"] for pod in api.pods()] or [api.add_pod(f"first-{step}")["metadata"]["name"]]
    labels = {"metadata": {"labels": {"step": str(step)}}}
    deeds: list[Callable[[], object]] = [
        lambda: api.add_pod(f"pod-{step}"),
        lambda: api.add_pod(f"pod-{step}"),
        lambda: api.patch(PODS, rng.choice(names), labels, namespace="default"),
        lambda: api.delete_pod(rng.choice(names)),
        api.cut_watches,
        api.drop_connections,
        api.compact,
        api.send_bookmarks,
        lambda: api.say_to_watches(rng.choice([b"{", b'{"type":"NEW","object":{}}'])),
        lambda: api.faults.refuse(rng.choice([410, 429, 500, 503])),
    ]
    rng.choice(deeds)()


class TestStop:
    """stop() ends the thread, whatever it waits for."""

    def test_a_watch_that_waits_for_an_event_ends_at_once(self, follow: Follow) -> None:
        reflector = follow(silence=1000.0)

        assert reflector.stop(timeout=20)

    def test_a_wait_after_a_failure_ends_at_once(self, api: ApiServer, follow: Follow) -> None:
        api.faults.refuse(500, times=1000, retry_after=1000)
        refused = api.faults.hold(path=LIST)
        reflector = follow(synced=False, wait=None)
        assert not refused.reached.is_set()

        assert reflector.stop(timeout=20)

    def test_a_watch_that_is_just_being_opened_ends_at_once_too(self, api: ApiServer, follow: Follow) -> None:
        opened = api.faults.hold(path=WATCH)
        reflector = follow(watching=False, silence=1000.0)
        assert opened.reached.wait(20)

        assert reflector.stop(timeout=20)
        opened.release()

    def test_one_that_never_started_stops(self, cluster: Cluster, notebook: Notebook) -> None:
        assert Reflector(cluster, PATH, Pod, notebook).stop()


class NodeMetadata(msgspec.Struct, rename="camel"):
    name: str
    resource_version: str


class Node(msgspec.Struct):
    metadata: NodeMetadata


def test_another_kind_is_followed_as_well(api: ApiServer, tmp_path: Path) -> None:
    class Names:
        def __init__(self) -> None:
            self.seen: list[str] = []
            self.complete = threading.Event()

        def replaced(self, objects: list[Node], _: int, __: list[Unreadable]) -> None:
            self.seen += [node.metadata.name for node in objects]

        def changed(self, change: str, obj: Node) -> None:
            self.seen.append(f"{change} {obj.metadata.name}")
            self.complete.set()

        def unreadable(self, _: str, __: Unreadable) -> None:
            raise AssertionError

    api.add_node("n1")
    names = Names()
    with connect(api.kubeconfig(tmp_path / "kubeconfig")) as cluster:
        reflector = Reflector(cluster, "/api/v1/nodes", Node, names)
        reflector.start()
        assert reflector.synced.wait(20)
        api.patch(NODES, "n1", {"metadata": {"annotations": {"a/b": "c"}}})
        assert names.complete.wait(20)
        assert reflector.stop()

    assert ["n1", "MODIFIED n1"] == names.seen


class Leaving(Notebook):
    """End the thread that tells of an object, as nothing but a fault of the interpreter's would."""

    def changed(self, change: str, obj: Pod) -> None:  # noqa: ARG002
        raise SystemExit


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_has_ended_is_told_from_one_that_was_stopped(api: ApiServer, cluster: Cluster) -> None:
    reflector = Reflector(cluster, PATH, Pod, Leaving())
    assert not reflector.ended
    reflector.start()
    assert reflector.synced.wait(20)
    assert not reflector.ended

    api.add_pod("one")

    assert api.wait_until(lambda: reflector.ended)
    reflector.stop()
    assert not reflector.ended
