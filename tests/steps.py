"""How much work something is, whatever the machine does beside it: the lines that it runs, not how long it takes."""

import sys
from collections.abc import Callable
from types import FrameType, ModuleType
from typing import Any


def steps(call: Callable[[], object], *, of: ModuleType) -> int:
    """Call it, and count the lines of a module that were run; each round of a loop or comprehension is one at least."""
    count = 0

    def trace(frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal count
        if frame.f_code.co_filename != of.__file__:
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count
