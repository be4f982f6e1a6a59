"""How the programs hear that they are to end."""

import queue
import signal
import threading
from collections.abc import Callable


def at_the_end(act: Callable[[], None]) -> None:
    """Have *act* called once, by a thread of its own, when SIGTERM or SIGINT comes.

    Not by the handler: that runs in the main thread, between two steps of whatever it is about, and where that is to
    take the lock of the very event to be set, for a wait or for the signal before, the handler would wait for ever.
    """
    # the one queue that a handler may put into at any time
    came: queue.SimpleQueue[None] = queue.SimpleQueue()

    def run() -> None:
        came.get()
        act()

    threading.Thread(target=run, name="signals", daemon=True).start()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: came.put(None))
