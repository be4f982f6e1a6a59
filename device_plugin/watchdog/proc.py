"""Looks processes up in /proc; knows which of them are the plugin's own."""

import os
from collections.abc import Collection
from pathlib import Path

from device_plugin.watchdog import cgroups
from device_plugin.watchdog.cgroups import Origin

# The first PID namespace of a machine has this inode (include/linux/proc_ns.h, PROC_PID_INIT_INO).
_FIRST_PID_NAMESPACE = 0xEFFFFFFC


class GoneError(LookupError):
    """Say that there is no such process any more, or that it is the plugin's own."""


class Processes:
    """Tell the origin of processes by what stands below *root*."""

    def __init__(self, root: Path = Path("/proc")) -> None:
        self._root = root
        self._own = os.getpid()

    def origin(self, pid: int, daemons: Collection[int] = ()) -> Origin | None:
        """Find the pod of a process, None where it is of none; raise GoneError.

        *daemons* are MPS control daemons of the plugin's that others have started for it.
        """
        try:
            text = (self._root / str(pid) / "cgroup").read_text()
        except OSError as error:
            raise GoneError(pid) from error
        found = cgroups.parse(text)
        if self._is_own(pid, {self._own, *daemons}):
            raise GoneError(pid)
        return found

    def sees_all(self) -> bool:
        """Tell whether processes of the whole machine can be seen, so not from within a PID namespace of its own."""
        try:
            return (self._root / "self" / "ns" / "pid").stat().st_ino == _FIRST_PID_NAMESPACE
        except OSError:
            return False

    def _is_own(self, pid: int, own: Collection[int]) -> bool:
        """Tell whether it is one of *own* or was started by one, as MPS servers are by their daemons."""
        while pid > 0:
            if pid in own:
                return True
            try:
                stat = (self._root / str(pid) / "stat").read_text()
            except OSError:
                return False
            # pid (name) state ppid ..., and a name may have blanks and brackets in it
            pid = int(stat.rpartition(")")[2].split()[1])
        return False
