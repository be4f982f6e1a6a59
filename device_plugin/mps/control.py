"""Speaks to one MPS control daemon, through NVIDIA's own control program: commands on its input, answers on its output.

The commands are those of NVIDIA's documentation ("nvidia-cuda-mps-control"), which works on the daemon whose pipes lie
in CUDA_MPS_PIPE_DIRECTORY. How daemon and program speak to each other is not documented, and not ours to know.
"""

import os
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path

import structlog

log = structlog.get_logger(__name__)

ANSWER_SECONDS = 5.0
_QUIT_SECONDS = 2
_SHOWN = 200
_SIZE = re.compile(r"(\d+)([GM])")


class MPSError(Exception):
    """Say what the daemon did not do, and why."""


class ServerState(StrEnum):
    """Say how an MPS server is; there is one for each user that has clients."""

    INITIALIZING = "INITIALIZING"
    ACTIVE = "ACTIVE"
    FAULT = "FAULT"
    UNKNOWN = "UNKNOWN"

    @classmethod
    def _missing_(cls, value: object) -> "ServerState":  # noqa: ARG003 - a newer program may know more
        return cls.UNKNOWN


class Control:
    """Command the daemon whose folder is *folder*, with the program *program*; every method raises MPSError.

    *answer_seconds* are what an answer may take.
    """

    def __init__(
        self, program: str, folder: Path, uuids: Sequence[str], answer_seconds: float = ANSWER_SECONDS
    ) -> None:
        self._answer_seconds = answer_seconds
        self.program = program
        self.pipe = folder / "pipe"
        self.log = folder / "log"
        self._uuids = tuple(uuids)

    @property
    def environment(self) -> Mapping[str, str]:
        """Give the environment of the daemon and of whoever commands it."""
        return {
            **os.environ,
            "CUDA_MPS_PIPE_DIRECTORY": str(self.pipe),
            "CUDA_MPS_LOG_DIRECTORY": str(self.log),
            # by UUID, so that daemon and clients mean the same GPU whatever each of them sees besides
            "CUDA_VISIBLE_DEVICES": ",".join(self._uuids),
        }

    def command(self, text: str, *, more_seconds: float = 0.0) -> str:
        """Send one command and give the answer, which may take *more_seconds* than others."""
        seconds = self._answer_seconds + more_seconds
        try:
            done = subprocess.run(  # noqa: S603 - the program is the operator's choice
                [self.program],
                input=text + "\n",
                env=self.environment,
                capture_output=True,
                text=True,
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise MPSError(f"the MPS control daemon did not answer `{text}` in {seconds:g} s") from error
        except (OSError, UnicodeError) as error:
            raise MPSError(f"{self.program} cannot be run: {error}") from error
        if done.returncode:
            said = " ".join((done.stdout + done.stderr).split())[:_SHOWN]
            raise MPSError(f"the MPS control daemon refused `{text}`: {said or f'code {done.returncode}'}")
        return done.stdout.strip()

    def servers(self) -> dict[int, ServerState]:
        """Tell the state of every server, by process id; none while nobody uses the GPU."""
        found: dict[int, ServerState] = {}
        for line in self.command("get_server_list").split():
            if line.isascii() and line.isdigit():
                state = self.command(f"get_server_status {line}")
                found[int(line)] = ServerState(state.strip().upper().split()[-1] if state.strip() else "UNKNOWN")
        return found

    def limit_memory(self, device: int, mib: int) -> None:
        """Set how much memory of its *device*-th GPU the daemon lets a client have that asks for no limit itself."""
        # shown in whole GiB, rounded down, from one on: 1044M is 1G
        self._set("default_device_pinned_mem_limit", f" {device}", f"{mib}M", lambda kept: _mib(kept) <= mib)

    def limit_threads(self, percent: int) -> None:
        """Set the share of threads that a client has at most, in percent."""
        self._set("default_active_thread_percentage", "", str(percent), lambda kept: float(kept) <= percent)

    def _set(self, what: str, of: str, value: str, holds: Callable[[str], bool]) -> None:
        """Set a default, and ask whether the daemon has it.

        "If an invalid command is issued and rejected, an error message will be printed to stdout. The exit status of
        the front-end UI is zero if communication with the daemon is successful" (nvidia-cuda-mps-control(1)).
        """
        said, kept = self.command(f"set_{what}{of} {value}"), self.command(f"get_{what}{of}")
        try:
            if holds(kept):
                return
        except ValueError:
            # the words of a driver that shows it in another way, if it had nothing against the command
            if not said:
                log.warning("mps.limit_not_understood", command=f"get_{what}{of}", answer=kept[:_SHOWN])
                return
        raise MPSError(
            f"the MPS control daemon did not take `set_{what}{of} {value}`: it says {said[:_SHOWN]!r}, and has "
            f"{kept[:_SHOWN]!r}"
        )

    def quit(self) -> None:
        """End the daemon and its servers, and with them clients that are still there after some seconds."""
        self.command(f"quit -t {_QUIT_SECONDS}", more_seconds=_QUIT_SECONDS)


def _mib(text: str) -> int:
    """Read a size as the daemon shows it; raise ValueError."""
    found = _SIZE.fullmatch(text)
    if found is None:
        raise ValueError(text)
    return int(found[1]) * (1024 if found[2] == "G" else 1)
