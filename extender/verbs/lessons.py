"""Have the judge learn in the background, so that no pod waits for what is made for the pods after it."""

import threading

from cotenant.threads import Threads, giving_way
from extender.verbs.judge import Judge

# Between two pieces of the work, so that a verdict that waits for the judge's lock gets it.
_PAUSE_SECONDS = 0.001


class Lessons:
    """Call judge.learn() whenever there is something to learn."""

    def __init__(self, judge: Judge, threads: Threads) -> None:
        self._judge = judge
        self._stopping = threading.Event()
        self._thread = threads.of("learn", self._turn)

    def start(self) -> None:
        """Learn from the pods that are there; then go on in a thread."""
        self._judge.learn()
        self._thread.start()

    def stop(self) -> None:
        """End after the lesson under way."""
        self._stopping.set()
        self._judge.news.set()
        self._thread.join(5)

    def _turn(self) -> bool:
        self._judge.news.wait()
        if self._stopping.is_set():
            return False
        with giving_way():
            self._judge.learn(pause=self._pause)
        # learn() clears the news, that of stop() too
        return not self._stopping.is_set()

    def _pause(self) -> None:
        self._stopping.wait(_PAUSE_SECONDS)
