"""Limits of a process that are reached: what needs another thread or file gets none, whatever rights we have."""

import contextlib
import os
import resource
import threading
from collections.abc import Iterator

# No address space has room for such a stack.
_STACK_BYTES = 1 << 46


@contextlib.contextmanager
def no_more_threads() -> Iterator[None]:
    """Have no thread begin."""
    before = threading.stack_size(_STACK_BYTES)
    try:
        yield
    finally:
        threading.stack_size(before)


@contextlib.contextmanager
def no_more_files(pid: int | None = None) -> Iterator[None]:
    """Have a process, this one by default, open no file and take no connection."""
    pid = pid or os.getpid()
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    with contextlib.closing(os.scandir(f"/proc/{pid}/fd")) as found:
        taken = {int(one.name) for one in found}
    ours = os.open(os.devnull, os.O_RDONLY)
    os.close(ours)
    free = (number for number in range(len(taken) + 1) if number not in taken)
    lowest = ours if pid == os.getpid() else next(free)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (lowest, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


@contextlib.contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """Have no file of this process, or of what it starts meanwhile, become larger than so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
