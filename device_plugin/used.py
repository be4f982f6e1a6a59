"""Notes on the node how much of its GPUs is in use, for people who look at the whole cluster: coarsely, and seldom."""

import threading
import time
from collections.abc import Callable, Iterable, Mapping

import structlog

from cotenant.contract import used as notes_of_use
from cotenant.contract.names import Names
from cotenant.contract.units import MIB
from cotenant.contract.used import UsedMemory
from device_plugin.cluster.notes import NodeMetadata, NodeNotes
from device_plugin.nvml import PhysicalGPU

log = structlog.get_logger(__name__)

# Less than a twentieth of a GPU is hardly seen in a strip ...
_NOTABLE_SHARE = 20
# ... but whether anybody uses it at all is; a driver without processes keeps some MiB, one CUDA context takes hundreds.
_IDLE_BYTES = 64 * MIB


class UsedNote:
    """Follow what is in use, and write it down where it has changed notably, every *interval* seconds at most.

    0 writes nothing, and takes away what an earlier plugin wrote. *notes* makes what writes it, told whom to tell of an
    annotation that somebody took: one of its own, so that where this note is refused the record of faults is not. Safe
    to use from many threads.
    """

    def __init__(
        self,
        interval: float,
        names: Names,
        notes: Callable[[Callable[[str], None]], NodeNotes],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._interval = interval
        self._names = names
        self._notes = notes(self._erased)
        self._clock = clock
        self._lock = threading.Lock()
        self._read = False
        # total and used bytes by UUID, as NVML told last
        self._now: Mapping[str, tuple[int, int]] | None = None
        self._written: Mapping[str, int] | None = None
        self._written_at: float | None = None

    def start(self) -> None:
        """Begin to write."""
        self._notes.start()

    def stop(self) -> None:
        """End; the note stays, as the inventory does."""
        self._notes.stop()

    def noticed(self, node: NodeMetadata | None) -> None:
        """Take the node; what an earlier plugin wrote counts as written, so that plugins that start write nothing."""
        self._recall(node)
        self._notes.seen(node)

    def _recall(self, node: NodeMetadata | None) -> None:
        with self._lock:
            if node is None or self._read:
                return
            self._read = True
            text = (node.annotations or {}).get(self._names.used)
            if self._interval and text is not None:
                try:
                    self._written = notes_of_use.decode(text).used
                except ValueError as error:
                    log.warning("used.unreadable", why=f"{error}; it is written anew")
                else:
                    # NodeNotes holds what it is told, and nothing else
                    self._notes.annotate(self._names.used, text)
            elif text is not None:
                self._notes.annotate(self._names.used, None)
            self._settle()

    def looked(self, gpus: Iterable[PhysicalGPU]) -> None:
        """Take a look at all GPUs."""
        with self._lock:
            self._now = {
                gpu.uuid: (gpu.total_bytes, gpu.vitals.used_bytes) for gpu in gpus if gpu.vitals.used_bytes is not None
            }
            self._settle()

    def _erased(self, _key: str) -> None:
        with self._lock:
            self._written = None

    def _settle(self) -> None:
        if not (self._interval and self._read) or self._now is None or (self._written is None and not self._now):
            return
        now = self._clock()
        if self._written_at is not None and now - self._written_at < self._interval:
            return
        if self._written is None or is_notable(self._written, self._now):
            used = {uuid: amount for uuid, (_, amount) in self._now.items()}
            self._written, self._written_at = used, now
            self._notes.annotate(self._names.used, notes_of_use.encode(UsedMemory(used=used)))


def is_notable(written: Mapping[str, int], now: Mapping[str, tuple[int, int]]) -> bool:
    """Tell whether people should hear of it: of what is *now* total and used of each GPU, beside what is *written*."""
    if written.keys() != now.keys():
        return True
    return any(
        abs(used - written[uuid]) * _NOTABLE_SHARE >= max(total, 1)
        or (used <= _IDLE_BYTES) is not (written[uuid] <= _IDLE_BYTES)
        for uuid, (total, used) in now.items()
    )
