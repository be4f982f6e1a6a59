"""Listens to the driver's events in a thread of its own."""

import threading
from collections.abc import Callable, Sequence
from contextlib import closing

import structlog

from device_plugin.nvml import NVML, Events, GPUEvent, PhysicalGPU
from device_plugin.nvml.events import EventsError
from device_plugin.threads import THREADS

log = structlog.get_logger(__name__)

# How long one wait for events lasts: so long may the end of the plugin take.
_WAIT_MILLISECONDS = 250
_RETRY_SECONDS = 5.0


class Listener:
    """Hand every event to *heard* until stop(); after an error listen anew, in *retry_seconds*."""

    def __init__(self, nvml: NVML, heard: Callable[[GPUEvent], None], *, retry_seconds: float = _RETRY_SECONDS) -> None:
        self._nvml = nvml
        self._heard = heard
        self._retry_seconds = retry_seconds
        self._lock = threading.Lock()
        self._gpus: tuple[PhysicalGPU, ...] = ()
        # those that were lost since it was last asked for, back by now or not
        self._lost: frozenset[str] = frozenset()
        self._stopping = threading.Event()
        self._loop = THREADS.of("gpu events", self._run)

    def start(self) -> None:
        """Begin to listen."""
        self._loop.start()

    def follow(self, gpus: Sequence[PhysicalGPU]) -> None:
        """Take the GPUs whose events count."""
        with self._lock:
            self._gpus = tuple(gpus)
            self._lost |= {gpu.uuid for gpu in gpus if gpu.lost}

    def retire(self) -> None:
        """End after the wait under way; return at once."""
        self._stopping.set()

    def stop(self) -> None:
        """End after the wait under way."""
        self._stopping.set()
        self._loop.join(2 * _WAIT_MILLISECONDS / 1000)

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                events = self._nvml.events()
                if events is None:
                    return  # such a driver will not come to know them
                with closing(events):
                    self._listen(events)
            except EventsError as error:
                # The probes go on. KDP marks all GPUs unhealthy here, for ever.
                log.warning("nvml.events_lost", error=str(error), retry_seconds=self._retry_seconds)
                self._stopping.wait(self._retry_seconds)

    def _listen(self, events: Events) -> None:
        while not self._stopping.is_set():
            with self._lock:
                gpus, lost, self._lost = self._gpus, self._lost, frozenset()
            for uuid in lost:
                events.lose(uuid)
            for gpu in gpus:
                if not gpu.fault:
                    events.follow(gpu.index, gpu.uuid)
            event = events.wait(_WAIT_MILLISECONDS)
            if event is not None:
                self._heard(event)
