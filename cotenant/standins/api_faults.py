"""What tests have the stand-in do wrong."""

import re
import threading
from typing import Literal

from cotenant.standins.api_rules import Refused

_HELD_SECONDS = 60.0  # a test that forgets to release must not hang for ever
_REASONS = {
    401: "Unauthorized",
    403: "Forbidden",
    404: "NotFound",
    409: "Conflict",
    410: "Expired",
    422: "Invalid",
    429: "TooManyRequests",
    500: "InternalError",
    503: "ServiceUnavailable",
    504: "Timeout",
}


class Hold:
    """Stop a request on its way: *reached* is set when it has come, release() lets it go on."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self._released = threading.Event()

    def release(self) -> None:
        """Let the request go on."""
        self._released.set()

    def pass_through(self) -> None:
        """Be the request: come, and wait."""
        self.reached.set()
        self._released.wait(_HELD_SECONDS)


class Fault:
    """Be one thing that goes wrong, for so many requests."""

    def __init__(
        self,
        method: str,
        path: str,
        times: int,
        *,
        refusal: Refused | None = None,
        drop: Literal["before", "after"] | None = None,
        hold: Hold | None = None,
        seconds: float = 0.0,
    ) -> None:
        self._method = re.compile(method)
        self._path = re.compile(path)
        self.left = times
        self.refusal = refusal
        self.drop = drop
        self._hold = hold
        self._seconds = seconds

    def meets(self, method: str, path: str) -> bool:
        """Tell whether it is for this request."""
        return self.left > 0 and bool(self._method.fullmatch(method)) and bool(self._path.search(path))

    def pause(self) -> None:
        """Keep the request waiting, where that is the fault."""
        if self._hold is not None:
            self._hold.pass_through()
        if self._seconds:
            threading.Event().wait(self._seconds)


class Faults:
    """Have the next *times* requests go wrong: those whose method and whose path with its query match the patterns."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._faults: list[Fault] = []

    def refuse(
        self,
        status: int,
        message: str = "a fault of the stand-in",
        *,
        method: str = ".*",
        path: str = "",
        times: int = 1,
        retry_after: int | None = None,
    ) -> None:
        """Answer with this status and do nothing."""
        refusal = Refused(status, _REASONS.get(status, "Unknown"), message, retry_after=retry_after)
        self._add(Fault(method, path, times, refusal=refusal))

    def lose_request(self, *, method: str = ".*", path: str = "", times: int = 1) -> None:
        """Close the connection and do nothing."""
        self._add(Fault(method, path, times, drop="before"))

    def lose_reply(self, *, method: str = ".*", path: str = "", times: int = 1) -> None:
        """Do what is asked, then close the connection without an answer."""
        self._add(Fault(method, path, times, drop="after"))

    def delay(self, seconds: float, *, path: str = "") -> None:
        """Do what is asked next *seconds* later."""
        self._add(Fault(".*", path, 1, seconds=seconds))

    def hold(self, *, method: str = ".*", path: str = "") -> Hold:
        """Stop the next request before it does anything, until the test releases it."""
        hold = Hold()
        self._add(Fault(method, path, 1, hold=hold))
        return hold

    def clear(self) -> None:
        """Take back all that have not struck yet."""
        with self._lock:
            self._faults.clear()

    def take(self, method: str, path: str) -> Fault | None:
        """Give the oldest fault for this request, and count it."""
        with self._lock:
            for fault in self._faults:
                if fault.meets(method, path):
                    fault.left -= 1
                    return fault
        return None

    def _add(self, fault: Fault) -> None:
        with self._lock:
            self._faults.append(fault)
