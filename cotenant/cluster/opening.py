"""A watch that is being opened, and can be left before it is open."""

import threading
from collections.abc import Callable

from cotenant.cluster.connection import Stream


class Opening:
    """Open a watch in a thread of its own: nothing else ends the wait for an answer that does not begin."""

    def __init__(self, begin: Callable[[], Stream], *, name: str) -> None:
        self._begin = begin
        self._guard = threading.Lock()
        self._over = threading.Event()
        self._left = False
        self._stream: Stream | None = None
        self._error: BaseException | None = None
        threading.Thread(target=self._run, name=f"watch {name}", daemon=True).start()

    def wait(self) -> Stream | None:
        """Give the watch once it is open, None where it was left before; raise what opening it raised."""
        self._over.wait()
        if self._error is not None:
            raise self._error
        return None if self._left else self._stream

    def leave(self) -> None:
        """Wait no longer; what is opened later is closed at once."""
        with self._guard:
            if not self._over.is_set():
                self._left = True
                self._over.set()

    def _run(self) -> None:
        stream: Stream | None = None
        error: BaseException | None = None
        try:
            stream = self._begin()
        except BaseException as caught:  # noqa: BLE001 - raised where it is waited for
            error = caught
        with self._guard:
            if not self._left:
                self._stream, self._error = stream, error
                self._over.set()
                return
        if stream is not None:
            stream.close()
