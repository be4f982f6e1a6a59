"""Programs of the end-to-end ground: where they are, how they start, get ready and stop."""

import os
import random
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

BIN_VARIABLE = "COTENANT_BIN"
LOG_TAIL_LINES = 15


class MissingProgramError(Exception):
    """A program that the ground needs is not on this machine; the sentence says which one and how to get it."""


class StartError(Exception):
    """A program ended or did not get ready; the sentence names its log file and quotes the last lines."""


def bin_directory() -> Path:
    """Return the directory that `e2e/build.sh` fills: $COTENANT_BIN, or cotenant/bin of the user's cache."""
    if chosen := os.environ.get(BIN_VARIABLE):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cotenant" / "bin"


def find_program(name: str) -> Path:
    """Return the path of a program: one that `e2e/build.sh` built, else one on the PATH.

    Raises MissingProgramError with a sentence fit for a skipped test.
    """
    built = bin_directory() / name
    if os.access(built, os.X_OK):
        return built
    if found := shutil.which(name):
        return Path(found)
    raise MissingProgramError(
        f"{name} is neither in {bin_directory()} nor on the PATH: run e2e/build.sh {bin_directory()}"
        " (etcd, runc and busybox-static come from the distribution)"
    )


def free_ports(count: int) -> list[int]:
    """Return loopback TCP ports nobody listens on.

    They lie below the kernel's ephemeral range, so no outgoing connection can take one before its program
    listens, and are drawn at random, so that two clusters started at once do not both try the same.
    """
    ports: list[int] = []
    draw = random.SystemRandom()
    while len(ports) < count:
        port = draw.randrange(15000, 32000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in ports:
            ports.append(port)
    return ports


def wait_until(ready: Callable[[], bool], *, timeout_s: float, every_s: float = 0.1) -> bool:
    """Ask `ready` until it says yes; return False where the time is over first."""
    deadline = time.monotonic() + timeout_s
    while not ready():
        if time.monotonic() > deadline:
            return False
        time.sleep(every_s)
    return True


class Program:
    """One started program: its process, and the log file that takes its stdout and stderr.

    Only the process that was started here is ever signalled.
    """

    def __init__(
        self, command: Sequence[str | Path], *, log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        """Start `command` in a session of its own, so that a Ctrl-C at the terminal does not reach it first."""
        self.name = Path(command[0]).name
        self.log = log
        with log.open("ab") as sink:
            self._process = subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                start_new_session=True,
                env={**os.environ, **(environment or {})},
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def tail(self) -> str:
        """Return the last lines of the log, indented, for a sentence about a failure."""
        lines = self.log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        return "".join(f"\n    {line}" for line in lines)

    def wait_ready(self, ready: Callable[[], bool], *, timeout_s: float = 90) -> None:
        """Wait until `ready` says yes; raise StartError where the program ends or the time is over first."""
        wait_until(lambda: not self.running or ready(), timeout_s=timeout_s)
        if not self.running:
            raise StartError(f"{self.name} ended with status {self._process.returncode}, see {self.log}:{self.tail()}")
        if not ready():
            raise StartError(f"{self.name} was not ready after {timeout_s:.0f} s, see {self.log}:{self.tail()}")

    def kill(self) -> None:
        """Kill the program at once, as a crash would."""
        self._process.kill()
        self._process.wait()

    def stop(self, *, patience_s: float = 10) -> None:
        """Ask the program to end, and kill it where it has not after `patience_s`."""
        self._process.terminate()
        try:
            self._process.wait(patience_s)
        except subprocess.TimeoutExpired:
            self.kill()
