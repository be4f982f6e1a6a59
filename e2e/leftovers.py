"""What a node leaves in the kernel when its programs end: cgroups, mounts, shims, sysctls; and how each goes away.

Everything here finds its things by the ground's own directory or cgroup, so nothing of another node is touched.
"""

import ctypes
import os
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_MNT_DETACH = 2
_SYSCTLS = tuple(
    # What the kubelet sets to its taste (container_manager_linux.go, setupKernelTunables).
    Path("/proc/sys") / name
    for name in (
        "vm/overcommit_memory",
        "vm/panic_on_oom",
        "kernel/panic",
        "kernel/panic_on_oops",
        "kernel/keys/root_maxkeys",
        "kernel/keys/root_maxbytes",
    )
)


# How long a cgroup may take to be removed.
_REMOVAL_S = 60


def cgroup_v1_controllers() -> list[Path]:
    """Return the mounted cgroup v1 hierarchies; none on a machine with cgroup v2 alone."""
    return [entry for entry in sorted(_CGROUPS.glob("*")) if (entry / "release_agent").exists()]


def _hierarchies() -> list[Path]:
    """Return every cgroup hierarchy: those of v1, and the unified one, where runc puts containers too."""
    return [entry for entry in sorted(_CGROUPS.glob("*")) if (entry / "cgroup.procs").exists()]


def make_cgroup(name: str) -> None:
    """Make a cgroup in every hierarchy, with all CPUs and memory nodes, for the kubelet's `cgroupRoot`."""
    for controller in cgroup_v1_controllers():
        group = controller / name
        group.mkdir(exist_ok=True)
        for setting in ("cpuset.cpus", "cpuset.mems"):
            if (group / setting).exists():
                (group / setting).write_text((controller / setting).read_text())


def kill_cgroup(name: str) -> None:
    """Kill every process in the cgroup and below it."""
    for hierarchy in _hierarchies():
        for group in _below(hierarchy / name):
            for pid in _pids(group):
                _kill(pid)


def remove_cgroup(name: str) -> None:
    """Kill what still runs in the cgroup, then remove it with all below it.

    Raises TimeoutError where one stays: a killed process leaves its cgroup only when its parent has reaped it.
    """
    deadline = time.monotonic() + _REMOVAL_S
    while groups := [group for hierarchy in _hierarchies() for group in _below(hierarchy / name)]:
        if time.monotonic() > deadline:
            raise TimeoutError(f"cgroup {groups[0]} could not be removed in {_REMOVAL_S} s")
        kill_cgroup(name)
        stuck = False
        for group in groups:
            try:
                group.rmdir()
            except OSError:
                stuck = True
        if stuck:
            time.sleep(0.1)


def _below(group: Path) -> list[Path]:
    """Return the cgroup and all below it, the deepest first."""
    return [Path(directory) for directory, _, _ in os.walk(group, topdown=False)]


def _pids(group: Path) -> list[int]:
    try:
        return [int(line) for line in (group / "cgroup.procs").read_text().split()]
    except OSError:
        return []


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def kill_shims(socket: Path) -> None:
    """Kill the shims of the containerd that listens on `socket`."""
    for shim in Path("/proc").glob("[0-9]*"):
        try:
            words = (shim / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if words[0].endswith(b"containerd-shim-runc-v2") and str(socket).encode() in words:
            _kill(int(shim.name))


def shim_sockets(state: Path) -> list[Path]:
    """Return the sockets on which the shims of a containerd's state directory listen: they lie outside of it."""
    bundles = state.glob("io.containerd.runtime.v2.task/*/*/address")
    return [Path(address.read_text().removeprefix("unix://")) for address in bundles]


def remove_files(files: Sequence[Path]) -> None:
    """Remove those of the files that are there."""
    for file in files:
        file.unlink(missing_ok=True)


def unmount_below(directory: Path) -> None:
    """Unmount everything mounted at or below a directory, the latest first."""
    libc = ctypes.CDLL(None, use_errno=True)
    for mount in reversed(list(_mounts(directory))):
        if libc.umount2(os.fsencode(mount), _MNT_DETACH) != 0:
            raise OSError(ctypes.get_errno(), f"cannot unmount {mount}")


def _mounts(directory: Path) -> Iterator[str]:
    prefix = str(directory)
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        point = line.split()[4].encode().decode("unicode_escape")
        if point == prefix or point.startswith(f"{prefix}/"):
            yield point


def remove_links(directory: Path, *, to: Path) -> None:
    """Remove the symbolic links in `directory` that point below `to`."""
    for link in directory.glob("*"):
        if link.is_symlink() and link.readlink().is_relative_to(to):
            link.unlink()


def empty_directory(directory: Path) -> None:
    """Remove everything in a directory, and leave the directory; nothing to do where it is missing."""
    for entry in directory.glob("*"):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def remove_if_empty(directories: Sequence[Path]) -> None:
    """Remove those of the directories that are there and hold nothing."""
    for directory in directories:
        if directory.is_dir() and not any(directory.iterdir()):
            directory.rmdir()


def read_sysctls() -> dict[Path, str]:
    """Return the kernel settings that a kubelet changes, as they are now."""
    return {path: path.read_text() for path in _SYSCTLS if path.exists()}


def restore_sysctls(before: dict[Path, str]) -> None:
    """Write back the kernel settings that differ from `before`."""
    for path, value in before.items():
        if path.read_text() != value:
            path.write_text(value)
