"""Asks several things at once, each in a thread of its own, so that a call that hangs costs its own answer alone."""

import threading
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any


class Unanswered(Exception):  # noqa: N818 - named for what happened
    """Say that a call has not come back, and since when it has been out."""


class Patience:
    """Wait *seconds* for answers; a question that is still out is not asked again, so that no threads pile up.

    The threads are daemons: a driver that hangs must not keep the process from ending.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._changed = threading.Condition()
        self._out: set[Hashable] = set()

    def ask(self, questions: Mapping[Any, Callable[[], Any]], *, times: int = 1) -> dict[Any, Any]:
        """Ask all *questions*; give each its answer, the exception it raised, or an Unanswered.

        Answers may take as many *times* as long as others.
        """
        seconds = times * self.seconds
        answers: dict[Any, Any] = {}
        with self._changed:
            fresh = [key for key in questions if key not in self._out]
            self._out.update(fresh)
        for key in fresh:
            asking = (key, questions[key], answers)
            try:
                threading.Thread(target=self._answer, args=asking, name=f"nvml {key}", daemon=True).start()
            except RuntimeError:  # no more threads are allowed; without an answer it would count as out for ever
                self._answer(*asking)
        deadline = time.monotonic() + seconds
        with self._changed:
            self._changed.wait_for(
                lambda: all(key in answers for key in fresh), timeout=max(0.0, deadline - time.monotonic())
            )
            late = Unanswered(f"NVML has not answered for {seconds:g} s: the driver hangs; reboot the node")
            return {key: answers.get(key, late) for key in questions}

    def one(self, key: Hashable, question: Callable[[], Any]) -> Any:
        """Ask one question; raise what it raises, or Unanswered."""
        answer = self.ask({key: question})[key]
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _answer(self, key: Hashable, question: Callable[[], Any], answers: dict[Any, Any]) -> None:
        answer: Any
        try:
            answer = question()
        except BaseException as error:  # noqa: BLE001 - handed to whoever asked
            answer = error
        with self._changed:
            self._out.discard(key)
            answers[key] = answer
            self._changed.notify_all()
