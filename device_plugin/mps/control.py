"""Speaks to one MPS control daemon, through NVIDIA's own control program: commands on its input, answers on its output.

The commands are those of NVIDIA's documentation ("nvidia-cuda-mps-control"), which works on the daemon whose pipes lie
in CUDA_MPS_PIPE_DIRECTORY. How daemon and program speak to each other is not documented, and not ours to know.
"""

import os
import subprocess
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path

ANSWER_SECONDS = 5.0


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
            said = " ".join((done.stdout + done.stderr).split())[:200]
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

    def quit(self, seconds: int) -> None:
        """End the daemon and its servers, clients that are still there after so many seconds with them."""
        self.command(f"quit -t {seconds}", more_seconds=seconds)
