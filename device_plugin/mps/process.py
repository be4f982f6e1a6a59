"""The daemon's process: ours, or one that a plugin before us left behind."""

import contextlib
import os
import signal
import subprocess  # noqa: TC003 - msgspec reads this module's annotations
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

_LOOK_SECONDS = 0.05


class Identity(msgspec.Struct, frozen=True):
    """Name a process for good: a process id is used again, with another time of birth."""

    pid: int
    born: int


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Hold what a plugin writes down of a daemon, for the one that comes after it.

    *compute_modes* are those that the GPUs had before, by UUID.
    """

    program: str
    uuids: tuple[str, ...]
    compute_modes: dict[str, int]
    process: Identity | None = None


_record = msgspec.json.Decoder(Record)


def read(path: Path) -> Record | None:
    """Read a record; None where there is none, or no whole one. Raises OSError where that cannot be told."""
    try:
        return _record.decode(path.read_bytes())
    except (FileNotFoundError, msgspec.DecodeError):
        return None


def write(path: Path, record: Record) -> None:
    """Write a record whole, or not at all; raise OSError."""
    new = path.with_suffix(".new")
    new.write_bytes(msgspec.json.encode(record))
    new.replace(path)


def identify(pid: int, *, parent: int | None = None) -> Identity | None:
    """Find a running process; None where there is none, or one that has ended and waits to be reaped.

    Where a *parent* is named, one that is another's child is none either. Raises OSError where it cannot be told, as
    without a free file descriptor: whoever took that for an end would end those who use it.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # proc(5): after the name in brackets stand the state, the parent and, 18 further, the start time
    if fields[0] == "Z" or (parent is not None and int(fields[1]) != parent):
        return None
    return Identity(pid, int(fields[19]))


def runs(record: Record) -> bool:
    """Tell whether the daemon of a record runs; raise OSError."""
    return record.process is not None and identify(record.process.pid) == record.process


class Process:
    """Watch and end one process, a child of ours or not."""

    def __init__(self, identity: Identity, child: "subprocess.Popen[bytes] | None" = None) -> None:
        self.identity = identity
        self._child = child

    @property
    def alive(self) -> bool:
        """Tell whether it runs; raise OSError."""
        if self._child is not None:
            return self._child.poll() is None
        return identify(self.identity.pid) == self.identity

    def ended(self, seconds: float) -> bool:
        """Wait so long for its end; tell whether it came."""
        until = time.monotonic() + seconds
        while self.alive:
            if time.monotonic() > until:
                return False
            time.sleep(_LOOK_SECONDS)
        return True

    def kill(self) -> None:
        """End it and what it has started, at once; it leads a group of its own."""
        self._kill(os.killpg)

    def kill_alone(self) -> None:
        """End it at once, and nobody of its group."""
        self._kill(os.kill)

    def _kill(self, send: Callable[[int, int], None]) -> None:
        if self.alive:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                send(self.identity.pid, signal.SIGKILL)
            self.ended(1.0)
