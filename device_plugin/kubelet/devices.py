"""The list of device ids, as one versioned value that any number of streams follow."""

import threading
from collections.abc import Callable, Iterator, Mapping


class DeviceList:
    """Hold the newest device ids with their health; every follower gets it, none gets only what another left over."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._version = 0
        self._devices: Mapping[str, bool] = {}
        self._closed = False

    def set(self, devices: Mapping[str, bool]) -> None:
        """Replace the list; wake followers if it differs."""
        with self._changed:
            if devices != self._devices:
                self._devices = dict(devices)
                self._version += 1
                self._changed.notify_all()

    def follow(self, active: Callable[[], bool]) -> Iterator[Mapping[str, bool]]:
        """Give the list now and whenever it changes, until *active* no longer holds or close().

        Whoever makes *active* false calls wake().
        """
        seen = -1

        def woken() -> bool:
            return self._closed or not active() or self._version != seen

        while True:
            with self._changed:
                self._changed.wait_for(woken)
                if self._closed or not active():
                    return
                seen, devices = self._version, self._devices
            yield devices

    def wake(self) -> None:
        """Let followers look whether they are still active."""
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """End all followers."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
