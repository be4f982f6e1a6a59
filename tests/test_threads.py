"""Threads of both programs that fail in ways that nobody foresaw."""

import sys
import threading
from collections.abc import Callable

import pytest

from cotenant.threads import Threads, giving_way

# Far longer than anything takes.
PATIENCE = 30.0


def failing(times: int, then: Callable[[], bool | None] = lambda: None) -> Callable[[], bool | None]:
    """Make a turn that fails so many times, and then does something else."""
    left = list(range(times))

    def turn() -> bool | None:
        if left:
            raise ZeroDivisionError(f"nobody foresaw {left.pop()}")
        return then()

    return turn


@pytest.fixture
def threads() -> Threads:
    return Threads(pauses=(0.001, 0.002))


def test_turns_that_fail_are_counted_and_followed_by_the_next(threads: Threads) -> None:
    turns, last = iter([True, True]), threading.Event()

    def turn() -> bool:
        if next(turns, False):
            return True
        last.set()
        return False

    loop = threads.of("one", failing(3, turn))
    loop.start()
    threads.of("steady", failing(0)).start()

    assert last.wait(PATIENCE)
    loop.join(PATIENCE)
    assert not loop.alive
    assert {"one": 3, "steady": 0} == threads.failures()
    assert [] == threads.ended()


def test_whoever_is_told_of_a_failure_may_fail_too(threads: Threads) -> None:
    told: list[str] = []
    done = threading.Event()

    def tell(error: Exception) -> None:
        told.append(str(error))
        raise ValueError("worse")

    threads.of("one", failing(2, done.set), failed=tell).start()

    assert done.wait(PATIENCE)
    assert ["nobody foresaw 1", "nobody foresaw 0"] == told
    assert {"one": 4} == threads.failures()


def test_one_that_waits_to_begin_anew_ends_at_once() -> None:
    failed = threading.Event()
    loop = Threads(pauses=(3600, 3600)).of("one", failing(1), failed=lambda _: failed.set())
    loop.start()
    assert failed.wait(PATIENCE)

    loop.join(PATIENCE)

    assert not loop.alive


def test_what_is_guarded_fails_alone(threads: Threads) -> None:
    done = []
    for number in range(3):
        with threads.surviving("some"):
            done.append(1 / number)

    assert [1.0, 0.5] == done
    assert {"some": 1} == threads.failures()


def test_one_that_has_not_begun_or_goes_on_has_not_ended(threads: Threads) -> None:
    stopping = threading.Event()
    threads.of("not begun", lambda: False)
    going = threads.of("goes on", lambda: not stopping.wait(0.001))
    going.start()

    assert [] == threads.ended()
    stopping.set()
    going.join(PATIENCE)
    assert [] == threads.ended()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_one_that_ends_on_what_cannot_be_survived_is_named(threads: Threads) -> None:
    def leave() -> bool:
        raise SystemExit

    gone = threads.of("gone", leave)
    gone.start()
    gone.join(PATIENCE)

    assert ["gone"] == threads.ended()


def test_threads_give_way_sooner_until_the_last_that_works_for_long_is_done() -> None:
    usual = sys.getswitchinterval()
    with giving_way():
        with giving_way():
            pass
        assert 0.0005 == pytest.approx(sys.getswitchinterval())

    assert usual == sys.getswitchinterval()


def test_what_fails_while_it_gives_way_leaves_nothing_behind() -> None:
    usual = sys.getswitchinterval()
    with pytest.raises(ZeroDivisionError), giving_way():
        raise ZeroDivisionError

    assert usual == sys.getswitchinterval()
