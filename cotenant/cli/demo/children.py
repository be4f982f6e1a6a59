"""The demo's child processes: the real programs, each with a log file, all of them ended at the end."""

import re
import subprocess
import sysconfig
import threading
import time
from pathlib import Path
from typing import IO

_READY_SECONDS = 60.0
_END_SECONDS = 5.0
_LOG_LINES = 5


class DemoError(Exception):
    """Say why the demo cannot go on."""


class Children:
    """Start programs and end them; safe to use from many threads."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._lock = threading.Lock()
        self._running: list[tuple[str, subprocess.Popen[str]]] = []
        self._ending = False

    def start(self, name: str, program: str, *arguments: str, ready: str) -> re.Match[str]:
        """Start an installed program and wait for the line on its stdout that matches *ready*.

        *name* names its log file. Raises DemoError when the program is not installed, ends, or is not ready in time.
        """
        path = Path(sysconfig.get_path("scripts")) / program
        if not path.exists():
            raise DemoError(f"{program} is not installed in {path.parent}: install the package with its scripts")
        with self._lock, (self._logs / f"{name}.log").open("wb") as log:
            if self._ending:
                raise DemoError("the demo is ending")
            child = subprocess.Popen(  # noqa: S603 - our own programs
                [path, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True
            )
            self._running.append((name, child))
        # readline has no time limit of its own; a program that hangs is ended, which ends the line
        deadline = threading.Timer(_READY_SECONDS, child.kill)
        deadline.start()
        try:
            return self._read(name, child, child.stdout, re.compile(ready))
        finally:
            deadline.cancel()

    def _read(
        self, name: str, child: subprocess.Popen[str], output: IO[str] | None, ready: re.Pattern[str]
    ) -> re.Match[str]:
        for line in output or ():
            if match := ready.search(line):
                return match
        status = child.wait()
        words = self.last_words(name)
        raise DemoError(f"{name} ended with status {status} before it was ready; its last words:\n{words}")

    def last_words(self, name: str) -> str:
        """Give the end of a program's log."""
        lines = (self._logs / f"{name}.log").read_text(errors="replace").splitlines()
        return "\n".join(f"  {line}" for line in lines[-_LOG_LINES:]) or "  (it said nothing)"

    def ended(self) -> list[str]:
        """Name those that have ended by themselves."""
        with self._lock:
            return [name for name, child in self._running if child.poll() is not None]

    def end(self) -> None:
        """End all that run, by SIGTERM, and those that do not listen by SIGKILL; start none any more."""
        with self._lock:
            self._ending = True
            running = [child for _, child in self._running]
        for child in running:
            child.terminate()
        deadline = time.monotonic() + _END_SECONDS
        for child in running:
            try:
                child.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            if child.stdout is not None:
                child.stdout.close()
