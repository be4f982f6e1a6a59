"""bind against an API server at its worst; every test ends with nothing lost and nothing given twice."""

import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from cotenant.cluster import connect
from cotenant.contract.pods import Pod
from cotenant.contract.reasons import Reason
from cotenant.contract.units import GIB
from cotenant.standins.api_faults import Hold
from cotenant.standins.api_server import ApiServer
from extender.cluster.binder import AT_ONCE, Binder
from extender.ledger import Ledger, Stage
from extender.verbs.bind import Bind, Refusal
from extender.verbs.judge import Judge
from extender.verbs.wire import BindArgs
from tests.builders import NAMES, Json, a_pod
from tests.extender.running import PATIENCE, Running, bind_args, call, eventually, submit

BINDING = r"/binding$"
FOR_EVER = 100_000


def bound_to(api: ApiServer, name: str) -> str | None:
    pod = api.pod(name)
    assert pod is not None
    node: str | None = pod["spec"].get("nodeName")
    return node


def sent(api: ApiServer) -> list[int]:
    """Give how each Binding that was sent was answered; 0 is not at all."""
    return [write.status for write in api.writes if write.subresource == "binding"]


@pytest.fixture
def pod(api: ApiServer) -> Json:
    """A pod that leaves no room for another of 8 GiB on the GPU that it gets."""
    return submit(api, a_pod().asking(8))


@pytest.fixture
def other(api: ApiServer) -> Json:
    """A pod that takes what is left of n1 besides one like *pod*: its other GPU, whole."""
    return submit(api, a_pod().named("other").asking(10))


class TestRefused:
    """What the API server refuses for certain is given back at once, and said with the pod's name."""

    @pytest.mark.parametrize(
        ("status", "reason"),
        [
            (400, Reason.API_ERROR),
            (403, Reason.API_ERROR),
            (404, Reason.POD_GONE),
            (409, Reason.API_ERROR),
            (422, Reason.API_ERROR),
        ],
    )
    def test_a_refusal_gives_the_memory_back_and_the_next_try_succeeds(
        self, api: ApiServer, extender: Running, pod: Json, status: int, reason: Reason
    ) -> None:
        before = extender.metric(f'cotenant_bind_total{{outcome="{reason}"}}')
        api.faults.refuse(status, path=BINDING)

        error = extender.bind(pod, "n1")

        assert error.startswith("pod default/p was not bound to node n1: ")
        assert before + 1 == extender.metric(f'cotenant_bind_total{{outcome="{reason}"}}')
        assert extender.stage(pod) is None
        assert "" == extender.bind(pod, "n2")
        assert [status, 201] == sent(api)

    def test_an_api_server_that_is_too_busy_is_asked_again(self, api: ApiServer, extender: Running, pod: Json) -> None:
        api.faults.refuse(429, path=BINDING)

        assert "" == extender.bind(pod, "n1")
        assert [429, 201] == sent(api)

    def test_one_that_stays_too_busy_has_certainly_bound_nothing(
        self, api: ApiServer, extender: Running, pod: Json
    ) -> None:
        api.faults.refuse(429, path=BINDING, times=FOR_EVER)

        assert "429" in extender.bind(pod, "n1")
        assert extender.stage(pod) is None
        assert 0 == extender.metric("cotenant_bindings_unsettled")

    def test_a_pod_that_was_bound_meanwhile_is_told_so_and_counted_where_it_is(
        self, api: ApiServer, extender: Running, pod: Json
    ) -> None:
        api.freeze_watches()
        api.store.bind(("default", "p"), {"metadata": {"name": "p"}, "target": {"name": "n2"}})

        assert extender.bind(pod, "n1").endswith("the pod is bound already to n2")
        assert extender.stage(pod) is None

    def test_a_pod_that_asks_nothing_of_ours_and_was_bound_meanwhile_is_told_so(
        self, api: ApiServer, extender: Running
    ) -> None:
        plain = submit(api, a_pod().named("plain"))
        api.freeze_watches()
        api.store.bind(("default", "plain"), {"metadata": {"name": "plain"}, "target": {"name": "n2"}})

        assert extender.bind(plain, "n1").endswith("the pod is bound already to n2")
        assert "" == extender.bind(plain, "n2")

    def test_a_pod_that_is_gone_is_told_so(self, api: ApiServer, extender: Running, pod: Json) -> None:
        api.freeze_watches()
        api.delete_pod("p")

        assert Reason.POD_GONE.sentence in extender.bind(pod, "n1")
        assert extender.stage(pod) is None

    def test_a_pod_re_created_under_its_name_is_another(self, api: ApiServer, extender: Running, pod: Json) -> None:
        api.freeze_watches()
        api.delete_pod("p")
        again = submit(api, a_pod().asking(8))

        assert Reason.POD_GONE.sentence in extender.bind(pod, "n1")
        assert bound_to(api, "p") is None
        assert "" == extender.bind(again, "n1")


class TestDoubt:
    """A Binding whose answer is lost is sent again; until its fate is known its memory stays taken."""

    @pytest.mark.parametrize("status", [500, 503, 504])
    def test_a_server_error_is_tried_again(self, api: ApiServer, extender: Running, pod: Json, status: int) -> None:
        api.faults.refuse(status, path=BINDING)

        assert "" == extender.bind(pod, "n1")
        assert [status, 201] == sent(api)

    def test_a_lost_request_is_sent_again(self, api: ApiServer, extender: Running, pod: Json) -> None:
        api.faults.lose_request(path=BINDING)

        assert "" == extender.bind(pod, "n1")
        assert [0, 201] == sent(api)

    def test_a_lost_reply_is_found_out(self, api: ApiServer, extender: Running, pod: Json) -> None:
        api.freeze_watches()
        api.faults.lose_reply(path=BINDING)

        assert "" == extender.bind(pod, "n1")
        # done, unheard; then "already assigned"
        assert [201, 409] == sent(api)
        assert Stage.BOUND is extender.stage(pod)

    def test_a_lost_reply_and_then_a_new_pod_of_the_name_is_found_out(
        self, api: ApiServer, extender: Running, pod: Json
    ) -> None:
        api.freeze_watches()
        hold = api.faults.hold(path=BINDING)
        errors: list[str] = []
        thread = threading.Thread(target=lambda: errors.append(extender.bind(pod, "n1")))
        thread.start()
        assert hold.reached.wait(PATIENCE)
        api.delete_pod("p")
        submit(api, a_pod().asking(1))
        hold.release()
        thread.join(PATIENCE)

        assert [Reason.POD_GONE.sentence] == [error.rpartition(": ")[2] for error in errors]
        assert extender.stage(pod) is None

    def test_a_server_that_fails_for_long_leaves_it_unsettled_and_taken(
        self, api: ApiServer, extender: Running, pod: Json
    ) -> None:
        api.faults.refuse(500, path=BINDING, times=FOR_EVER)

        error = extender.bind(pod, "n1")

        assert error.startswith("pod default/p was not bound to node n1: ")
        assert 1.0 == extender.metric("cotenant_bindings_unsettled")
        assert Stage.ASSUMED is extender.stage(pod)
        # 10 - 8 = 2 are free on its GPU, 10 on the other: room for 10, and beside them for no more than 2
        assert ["n1"] == extender.fitting(submit(api, a_pod().named("ten").asking(10)), "n1")
        assert [] == extender.fitting(submit(api, a_pod().named("both").asking(3).asking(10)), "n1")
        # it is sent again and again
        tried = len(sent(api))
        assert eventually(lambda: len(sent(api)) > tried + 2)
        api.faults.clear()
        assert api.wait_until(lambda: bound_to(api, "p") == "n1", PATIENCE)
        assert eventually(lambda: extender.metric("cotenant_bindings_unsettled") == 0)
        assert Stage.BOUND is extender.stage(pod)

    def test_a_pod_in_doubt_cannot_be_bound_elsewhere(self, api: ApiServer, extender: Running, pod: Json) -> None:
        api.faults.refuse(500, path=BINDING, times=FOR_EVER)
        extender.bind(pod, "n1")

        assert Reason.UNSETTLED.sentence in extender.bind(pod, "n2")

        api.faults.clear()
        assert api.wait_until(lambda: bound_to(api, "p") == "n1", PATIENCE)

    def test_a_pod_in_doubt_that_is_deleted_gives_its_memory_back(
        self, api: ApiServer, extender: Running, pod: Json
    ) -> None:
        api.faults.refuse(500, path=BINDING, times=FOR_EVER)
        extender.bind(pod, "n1")

        api.delete_pod("p")

        assert eventually(lambda: extender.stage(pod) is None)

    @pytest.mark.parametrize("status", [401, 403, 422, 429])
    def test_a_refusal_after_a_lost_reply_says_nothing_of_what_was_lost(
        self, api: ApiServer, extender: Running, pod: Json, status: int
    ) -> None:
        api.freeze_watches()
        api.faults.lose_reply(path=BINDING)
        api.faults.refuse(status, path=BINDING, times=FOR_EVER)

        assert extender.bind(pod, "n1")

        # it is bound, though nobody here has heard so: its memory must not go to another
        assert "n1" == bound_to(api, "p")
        assert extender.stage(pod) is not None
        api.faults.clear()
        assert eventually(lambda: extender.stage(pod) is Stage.BOUND)

    def test_a_server_that_is_gone_after_a_lost_reply_says_nothing_of_it_either(
        self, api: ApiServer, extender: Running, pod: Json, other: Json
    ) -> None:
        api.freeze_watches()
        api.faults.lose_reply(path=BINDING)
        hold = api.faults.hold(path=BINDING)
        errors: list[str] = []
        thread = threading.Thread(target=lambda: errors.append(extender.bind(pod, "n1")))
        thread.start()
        assert hold.reached.wait(PATIENCE)
        api.stop()
        hold.release()
        thread.join(PATIENCE)

        # from here on nobody answers the door
        assert errors[0].startswith("pod default/p was not bound to node n1: ")
        assert eventually(lambda: extender.metric("cotenant_bindings_unsettled") == 1)
        assert Stage.ASSUMED is extender.stage(pod)

        api.start()
        api.freeze_watches(frozen=False)
        assert eventually(lambda: extender.stage(pod) is Stage.BOUND)
        assert "" == extender.bind(other, "n1")

    def test_an_answer_that_never_comes_is_not_waited_for_for_ever(
        self, api: ApiServer, extender: Running, pod: Json
    ) -> None:
        hold = api.faults.hold(path=BINDING)
        api.faults.refuse(500, path=BINDING, times=FOR_EVER)

        error = extender.bind(pod, "n1")

        assert error.startswith("pod default/p was not bound to node n1: ")
        assert Stage.ASSUMED is extender.stage(pod)
        # the first one comes through after all
        hold.release()
        assert eventually(lambda: extender.stage(pod) is Stage.BOUND)


class TestAgain:
    """kube-scheduler may call twice; the pod is bound once."""

    def test_a_bind_repeated_after_success_succeeds_and_writes_nothing(
        self, api: ApiServer, extender: Running, pod: Json
    ) -> None:
        assert ["", ""] == [extender.bind(pod, "n1"), extender.bind(pod, "n1")]
        assert [201] == sent(api)

    def test_a_bind_to_another_node_after_success_is_refused(
        self, api: ApiServer, extender: Running, pod: Json
    ) -> None:
        assert "" == extender.bind(pod, "n1")

        assert Reason.BOUND_ELSEWHERE.sentence in extender.bind(pod, "n2")
        assert "n1" == bound_to(api, "p")

    def test_a_bind_repeated_while_the_first_is_under_way_waits_its_turn(
        self, api: ApiServer, extender: Running, pod: Json
    ) -> None:
        hold = api.faults.hold(path=BINDING)
        errors: list[str] = []
        thread = threading.Thread(target=lambda: errors.append(extender.bind(pod, "n1")))
        thread.start()
        assert hold.reached.wait(PATIENCE)

        assert Reason.UNSETTLED.sentence in extender.bind(pod, "n1")
        hold.release()
        thread.join(PATIENCE)

        assert [""] == errors
        assert "" == extender.bind(pod, "n1")

    def test_a_pod_whose_gpu_another_took_since_it_was_judged_gets_the_other_one(
        self, api: ApiServer, extender: Running
    ) -> None:
        # 3 GiB are held of one GPU, so both pods of 7 were to have what is left of it
        assert "" == extender.bind(submit(api, a_pod().named("tenant").asking(3)), "n1")
        first, second = (submit(api, a_pod().named(name).asking(7)) for name in ("first", "second"))
        assert [["n1"], ["n1"]] == [extender.fitting(first, "n1"), extender.fitting(second, "n1")]

        assert ["", ""] == [extender.bind(first, "n1"), extender.bind(second, "n1")]
        tenant, one, another = (hold.charges.keys() for hold in extender.ledger.holds())
        assert tenant == one != another
        assert [201, 201, 201] == sent(api)

    def test_many_binds_at_once_give_no_gpu_twice(self, api: ApiServer, extender: Running) -> None:
        pods = [submit(api, a_pod().named(f"p{n}").asking(4)) for n in range(12)]
        api.faults.lose_reply(path=BINDING, times=3)
        errors: list[str] = []
        threads = [threading.Thread(target=lambda p=pod: errors.append(extender.bind(p, "n1"))) for pod in pods]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)

        # 2 GPUs x 2 pods of 4 in 10 GiB
        assert 4 == errors.count("")
        assert 4 == sum(bound_to(api, f"p{n}") == "n1" for n in range(12))


class TestRestart:
    """The next extender finds everything at the API server."""

    def test_a_retry_after_a_lost_reply_and_a_restart_succeeds_and_writes_nothing(
        self, api: ApiServer, start: Callable[..., Running], pod: Json, tmp_path: Path
    ) -> None:
        api.faults.lose_reply(path=BINDING)
        api.faults.lose_request(path=BINDING, times=FOR_EVER)
        with Running(api, tmp_path, bindTimeout=0.5) as first:
            assert first.bind(pod, "n1")
        api.faults.clear()
        before = len(sent(api))

        second = start()

        assert "" == second.bind(pod, "n1")
        assert before == len(sent(api))

    def test_a_retry_after_a_lost_request_and_a_restart_may_go_anywhere(
        self, api: ApiServer, start: Callable[..., Running], pod: Json, tmp_path: Path
    ) -> None:
        api.faults.lose_request(path=BINDING, times=FOR_EVER)
        with Running(api, tmp_path, bindTimeout=0.5) as first:
            assert first.bind(pod, "n1")
        api.faults.clear()

        second = start()

        assert ["n1", "n2"] == second.fitting(pod, "n1", "n2")
        assert "" == second.bind(pod, "n2")

    def test_what_was_bound_is_still_taken_after_a_restart(
        self, api: ApiServer, start: Callable[..., Running], pod: Json, other: Json, tmp_path: Path
    ) -> None:
        with Running(api, tmp_path) as first:
            assert "" == first.bind(pod, "n1")
            assert "" == first.bind(other, "n1")

        second = start()

        # 2 GiB are left on one GPU of n1, none on the other
        assert ["n2"] == second.fitting(submit(api, a_pod().named("late").asking(3)), "n1", "n2")


class TestWhileListing:
    """What is bound while a LIST is on its way to the API server, after a watch that could not go on."""

    @pytest.fixture
    def listing(self, api: ApiServer, extender: Running) -> Hold:  # noqa: ARG002
        """A LIST of pods that has yet to reach the API server."""
        hold = api.faults.hold(method="GET", path=r"/api/v1/pods\?.*limit=500")
        submit(api, a_pod().named("before"))
        api.compact()
        api.cut_watches()
        assert hold.reached.wait(PATIENCE)
        return hold

    @pytest.mark.parametrize("answer", [200, 500])
    def test_a_pod_that_has_gone_before_the_list_gives_its_memory_back(
        self, api: ApiServer, extender: Running, listing: Hold, pod: Json, answer: int
    ) -> None:
        assert "" == extender.bind(pod, "n1")
        api.delete_pod("p", grace=0)
        if answer != 200:
            api.faults.refuse(answer, method="GET", path="/pods/p$")
        listing.release()

        assert eventually(lambda: extender.ledger.holds() == [])

    def test_a_pod_that_is_there_keeps_it(self, api: ApiServer, extender: Running, listing: Hold, pod: Json) -> None:
        assert "" == extender.bind(pod, "n1")
        listing.release()
        after = submit(api, a_pod().named("after").asking(1))

        assert eventually(lambda: extender.ledger.waiting(after["metadata"]["uid"]))
        assert ["default/p"] == [hold.key for hold in extender.ledger.holds()]


class TestBackup:
    """An API server that comes back with the data of a backup has unbound what was bound since."""

    def test_a_pod_bound_since_holds_nothing_and_may_go_anywhere(
        self, api: ApiServer, extender: Running, pod: Json
    ) -> None:
        restore = api.back_up()
        assert "" == extender.bind(pod, "n1")
        assert eventually(lambda: [Stage.BOUND] == [hold.stage for hold in extender.ledger.holds()])
        restore()
        api.writes.clear()

        assert eventually(lambda: extender.ledger.holds() == [])
        assert ["n1", "n2"] == extender.fitting(pod, "n1", "n2")
        assert "" == extender.bind(pod, "n2")
        assert "n2" == bound_to(api, "p")

    def test_a_bind_that_comes_before_the_extender_has_heard_of_it_is_made_again(
        self, api: ApiServer, extender: Running, pod: Json
    ) -> None:
        restore = api.back_up()
        assert "" == extender.bind(pod, "n1")
        assert eventually(lambda: extender.ledger.waiting(pod["metadata"]["uid"]) is None)
        listing = api.faults.hold(method="GET", path=r"/api/v1/pods\?.*limit=500")
        restore()
        api.writes.clear()
        assert listing.reached.wait(PATIENCE)

        assert "" == extender.bind(pod, "n1")
        listing.release()
        assert "n1" == bound_to(api, "p")


class TestSignal:
    """SIGTERM ends the program: no new calls, those under way to their end."""

    @contextmanager
    def program(self, api: ApiServer, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
        """Run the command, and give it with the address that it prints."""
        command = [sys.executable, "-c", "from extender.main import main; main()"]
        flags = ["--kubeconfig", api.kubeconfig(tmp_path / "kubeconfig")]
        flags += ["--listen", "127.0.0.1:0", "--serve", "127.0.0.1:0"]
        with (
            (tmp_path / "log").open("w") as log,
            subprocess.Popen(
                [*command, *flags], stdout=subprocess.PIPE, stderr=log, text=True, env={**os.environ}
            ) as process,
        ):
            try:
                yield process, self.address(process)
            finally:
                process.kill()

    @staticmethod
    def address(process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            assert selector.select(PATIENCE)
        sentence = process.stdout.readline()
        assert sentence.startswith("cotenant-extender ready: verbs on 127.0.0.1:")
        assert sentence.endswith("; 2 nodes, 0 pods\n")
        return sentence.partition("verbs on ")[2].partition(",")[0]

    def test_it_ends_at_once_and_cleanly(self, api: ApiServer, tmp_path: Path) -> None:
        with self.program(api, tmp_path) as (process, _):
            process.send_signal(signal.SIGTERM)

            assert 0 == process.wait(PATIENCE)

    def test_a_bind_under_way_is_finished_first(self, api: ApiServer, tmp_path: Path, pod: Json) -> None:
        hold = api.faults.hold(path=BINDING)
        errors: list[str] = []
        with self.program(api, tmp_path) as (process, address):
            bind = lambda: errors.append(call(address, "POST", "/bind", bind_args(pod, "n1")).json["Error"])  # noqa: E731
            thread = threading.Thread(target=bind)
            thread.start()
            assert hold.reached.wait(PATIENCE)
            process.send_signal(signal.SIGTERM)
            # the signal is heard while the bind waits
            assert eventually(lambda: "stopping" in (tmp_path / "log").read_text())
            hold.release()
            thread.join(PATIENCE)

            assert 0 == process.wait(PATIENCE)
        assert [""] == errors
        assert "n1" == bound_to(api, "p")

    def test_a_bind_that_cannot_be_finished_does_not_hold_it_up(
        self, api: ApiServer, tmp_path: Path, pod: Json
    ) -> None:
        api.faults.refuse(500, path=BINDING, times=FOR_EVER)
        with self.program(api, tmp_path) as (process, address):
            thread = threading.Thread(target=call, args=(address, "POST", "/bind", bind_args(pod, "n1")))
            thread.start()
            assert eventually(lambda: sent(api))
            process.send_signal(signal.SIGTERM)

            # ten seconds are promised; the patience is for busy machines
            assert 0 == process.wait(PATIENCE)
            thread.join(PATIENCE)

    @pytest.mark.parametrize(
        ("said", "flags"),
        [
            ("is not HOST:PORT", ["--listen", "here"]),
            ("colour: unknown key", ["--config", "CONFIG"]),
            ("does not exist", ["--kubeconfig", "nowhere"]),
            ("KUBERNETES_SERVICE_HOST is not set", []),
        ],
    )
    def test_a_wrong_start_ends_with_a_sentence(self, tmp_path: Path, said: str, flags: list[str]) -> None:
        config = tmp_path / "extender.yaml"
        config.write_text("colour: blue\n")
        environment = {key: value for key, value in os.environ.items() if not key.startswith("KUBERNETES_")}
        ended = subprocess.run(
            [sys.executable, "-c", "from extender.main import main; main()"]
            + [str(config) if flag == "CONFIG" else flag for flag in flags],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
            timeout=PATIENCE,
        )

        assert 0 != ended.returncode
        assert said in ended.stderr
        assert "Traceback" not in ended.stderr


class TestOneDeadline:
    """bindTimeout is the whole verb's: the wait for a take-over, the GET of an unknown pod, and the Bindings."""

    def test_it_is_taken_before_the_first_wait_and_is_that_of_all_that_follows(self) -> None:
        told: list[tuple[str, float]] = []

        class Recorder:
            def deadline(self) -> float:
                told.append(("deadline", 7.0))
                return 7.0

            def read(self, args: BindArgs, *, deadline: float) -> Pod:
                told.append(("read", deadline))
                return a_pod().named(args.PodName).build()

            def bind(self, *_: object, deadline: float, again: bool = False) -> None:  # noqa: ARG002
                told.append(("bind", deadline))

        def writing() -> bool:
            told.append(("take-over", 7.0))
            return True

        ledger = Ledger(NAMES, GIB)
        judge = Judge(ledger, NAMES, GIB, "best-fit")
        bind = Bind(ledger, judge, Recorder(), NAMES, synced=lambda: True, writing=writing)

        assert bind(BindArgs(PodName="p", PodNamespace="default", PodUID="u", Node="n")) is None
        assert [("deadline", 7.0), ("take-over", 7.0), ("read", 7.0), ("bind", 7.0)] == told

    def test_beyond_so_many_at_once_it_waits_for_its_turn_and_no_longer(self, api: ApiServer, tmp_path: Path) -> None:
        holds = [api.faults.hold(path=BINDING) for _ in range(AT_ONCE)]
        pods = [submit(api, a_pod().named(f"p{n}")) for n in range(AT_ONCE + 1)]
        *first, last = [
            BindArgs(PodName=pod["metadata"]["name"], PodNamespace="default", PodUID=pod["metadata"]["uid"], Node="n1")
            for pod in pods
        ]
        with connect(api.kubeconfig(tmp_path / "kubeconfig")) as cluster:
            binder = Binder(cluster, Ledger(NAMES, GIB), names=NAMES, bind_timeout=PATIENCE)

            def bind(args: BindArgs, deadline: float) -> Refusal | None:
                return binder.bind(args, {}, None, deadline=deadline)

            with ThreadPoolExecutor(AT_ONCE) as threads:
                under_way = [threads.submit(bind, args, binder.deadline()) for args in first]
                assert all(hold.reached.wait(PATIENCE) for hold in holds)
                refusal = bind(last, time.monotonic() + 0.05)
                for hold in holds:
                    hold.release()
            binder.stop()

        assert [None] * AT_ONCE == [one.result() for one in under_way]
        assert refusal is not None
        assert Reason.API_ERROR is refusal.reason
        assert refusal.sentence.endswith("16 other Bindings are on their way, and none has been answered in time")
        assert bound_to(api, f"p{AT_ONCE}") is None

    @pytest.mark.parametrize(("left", "sent_times"), [(0.0, 0), (0.05, 1)])
    def test_with_none_of_it_left_nothing_is_sent_and_with_little_once(
        self, api: ApiServer, tmp_path: Path, left: float, sent_times: int
    ) -> None:
        api.faults.refuse(429, path=BINDING, times=FOR_EVER)
        pod = submit(api, a_pod().named("late"))
        args = BindArgs(PodName="late", PodNamespace="default", PodUID=pod["metadata"]["uid"], Node="n1")
        with connect(api.kubeconfig(tmp_path / "kubeconfig")) as cluster:
            binder = Binder(cluster, Ledger(NAMES, GIB), names=NAMES, bind_timeout=PATIENCE, clock=lambda: 100.0)
            refusal = binder.bind(args, {}, None, deadline=100.0 + left)
            binder.stop()

        assert refusal is not None
        # certain, either way: nothing stays held for it
        assert Reason.API_ERROR is refusal.reason
        assert sent_times == sum(write.subresource == "binding" for write in api.writes)
