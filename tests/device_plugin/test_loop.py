"""Threads of the plugin that fail in ways that nobody foresaw."""

import threading
from collections.abc import Callable
from typing import Any

from device_plugin.health.listener import Listener
from device_plugin.loop import Failures, Loop
from device_plugin.nvml import GPUEvent, PhysicalGPU
from tests.device_plugin.node import SECONDS


def failing(times: int, then: Callable[[], None] = lambda: None) -> Callable[[], None]:
    """Make work that fails so many times, and then does something else."""
    left = list(range(times))

    def work() -> None:
        if left:
            raise RuntimeError(f"nobody foresaw {left.pop()}")
        then()

    return work


def test_work_that_fails_is_counted_and_begun_anew() -> None:
    failures, done = Failures(), threading.Event()
    loop = Loop("one", failing(3, done.set), failures=failures, pause_seconds=(0.001, 0.002))
    Loop("steady", failing(0), failures=failures).start()
    loop.start()
    assert done.wait(SECONDS)
    loop.join(SECONDS)
    assert not loop.alive
    assert {"one": 3, "steady": 0} == failures.counts


def test_whoever_is_told_of_a_failure_may_fail_too() -> None:
    told: list[str] = []
    done = threading.Event()

    def tell(error: Exception) -> None:
        told.append(str(error))
        raise ValueError("worse")

    loop = Loop("one", failing(2, done.set), failed=tell, failures=Failures(), pause_seconds=(0.001, 0.001))
    loop.start()
    assert done.wait(SECONDS)
    assert ["nobody foresaw 1", "nobody foresaw 0"] == told


def test_one_that_waits_to_begin_anew_ends_at_once() -> None:
    failed = threading.Event()
    loop = Loop("one", failing(1), failed=lambda _: failed.set(), failures=Failures(), pause_seconds=(3600, 3600))
    loop.start()
    assert failed.wait(SECONDS)
    loop.join(SECONDS)
    assert not loop.alive


def test_events_of_the_driver_are_heard_again_after_one_that_could_not_be_handled() -> None:
    class Driver:
        """Tells of one trouble after the other."""

        def events(self) -> "Driver":
            return self

        def follow(self, _index: int, _uuid: str) -> None:
            pass

        def wait(self, _milliseconds: int) -> GPUEvent:
            return GPUEvent("GPU-0", 79)

        def close(self) -> None:
            pass

    again = threading.Event()
    heard = failing(1, again.set)
    driver: Any = Driver()
    listener = Listener(driver, lambda _: heard())
    listener.follow([PhysicalGPU(uuid="GPU-0", index=0, model="A", total_bytes=1, reserved_bytes=0)])
    listener.start()
    assert again.wait(SECONDS)
    listener.stop()
