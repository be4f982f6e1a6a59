"""Programs that are told to end."""

import subprocess
import sys

import pytest

# A process that waits: the signals come while the main thread has the event's own lock, as it has at each wait's
# beginning, or in the set() of the signal before.
WAITING = """
import signal, threading
from cotenant.signals import at_the_end
ending = threading.Event()
at_the_end(ending.set)
with ending._cond:
    for number in ({}):
        signal.raise_signal(number)
ending.wait()
"""


@pytest.mark.parametrize(
    "signals", ["signal.SIGTERM,", "signal.SIGINT,", "signal.SIGTERM, signal.SIGINT, signal.SIGTERM"]
)
def test_signals_that_come_at_the_worst_moment_end_the_program_all_the_same(signals: str) -> None:
    assert 0 == subprocess.run([sys.executable, "-c", WAITING.format(signals)], check=False, timeout=30).returncode
