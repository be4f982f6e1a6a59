"""Limits of this process, reached: what then needs another thread or file does not get it, whatever the user's rights."""

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
def no_more_files(pid: int = 0) -> Iterator[None]:
    """Have a process, this one by default, open no file and take no connection."""
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    taken = {int(name) for name in os.listdir(f"/proc/{pid or 'self'}/fd")}
    lowest = next(number for number in range(len(taken) + 1) if number not in taken)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (lowest, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
