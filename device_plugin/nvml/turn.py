"""Lets several NVML libraries use the one pynvml, whose library and symbols are module variables."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pynvml


class Library:
    """Hold one loaded library and the symbols found in it; None stands for the one that pynvml finds by itself."""

    def __init__(self, loaded: Any) -> None:
        self.loaded = loaded
        self.symbols: dict[str, Any] = {}


class Turn:
    """Let any number of calls of one library run at once, and those of another only when these have come back.

    NVML itself is thread safe, and a process has one library but in tests; so a call that hangs holds up no other.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._whose: Library | None = None
        self._running = 0

    @contextmanager
    def of(self, library: Library) -> Iterator[None]:
        """Have pynvml speak to *library* until the end of the block."""
        with self._changed:
            self._changed.wait_for(lambda: self._running == 0 or self._whose is library)
            if self._whose is not library:
                self._whose = library
                pynvml.nvmlLib = library.loaded
                pynvml._nvmlGetFunctionPointer_cache = library.symbols  # noqa: SLF001 - else the other's would be called
            self._running += 1
        try:
            yield
        finally:
            with self._changed:
                library.loaded = pynvml.nvmlLib
                self._running -= 1
                self._changed.notify_all()
