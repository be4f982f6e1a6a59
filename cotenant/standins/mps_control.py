"""A stand-in for nvidia-cuda-mps-control: a daemon and its control program, with faults on command, and no GPU.

It speaks the commands of NVIDIA's documentation as far as Cotenant uses them, finds the daemon as that does, by
CUDA_MPS_PIPE_DIRECTORY, and keeps its pid where that does. What no real one knows are the commands that begin with
`fake`, by which tests play clients and accidents:

    fake client UID    somebody of that user connects: his server is started, a child of the daemon's that does nothing,
                       where no other user's is active
    fake leave         all clients disconnect, and the servers end
    fake fault         a client fails: all servers go into FAULT
    fake hang          no command is answered any more
    fake crash CODE    the daemon ends at once
    fake environment   what the daemon was started with, one NAME=VALUE a line
"""

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

PIPE, LOG, DEVICES = "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY", "CUDA_VISIBLE_DEVICES"
_DEFAULT_PIPE = "/tmp/nvidia-mps"
_SOCKET, _PID = "control", "nvidia-cuda-mps-control.pid"
_LONGEST = 65_536
# A server waits to be ended, and outlives a daemon that is killed; for an hour, so that none is left for good.
_SERVER = [sys.executable, "-c", "import time; time.sleep(3600)"]
_SIZE = re.compile("[0-9]+[GMgm]?")


def main() -> None:
    """Be the daemon with -f or -d, or hand the commands on standard input to it."""
    folder = Path(os.environ.get(PIPE, _DEFAULT_PIPE))
    if sys.argv[1:] == ["-f"]:
        _Daemon(folder).run()
    elif sys.argv[1:] == ["-d"]:
        if os.fork() == 0:
            os.setsid()
            _Daemon(folder).run()
    elif sys.argv[1:]:
        sys.exit("usage: nvidia-cuda-mps-control [-d | -f]")
    else:
        _control(folder)


def _control(folder: Path) -> None:
    for line in sys.stdin:
        if not line.strip():
            continue
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                _connect(connection, folder)
                connection.sendall(line.encode())
                connection.shutdown(socket.SHUT_WR)
                answer = b""
                while part := connection.recv(_LONGEST):
                    answer += part
        except OSError:
            sys.exit("Cannot find MPS control daemon process")
        if answer:
            print(answer.decode())  # noqa: T201


def _connect(connection: socket.socket, folder: Path) -> None:
    # a socket's path has 107 characters at most, whatever folder somebody chose
    here = os.open(folder, os.O_DIRECTORY)
    try:
        connection.connect(f"/proc/self/fd/{here}/{_SOCKET}")
    finally:
        os.close(here)


class _Daemon:
    """Answer commands until told to end."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._threads = 100.0
        self._memory: dict[str, str] = {}
        self._servers: dict[int, str] = {}
        self._children: list[subprocess.Popen[bytes]] = []
        self._user: int | None = None
        self._queued: list[int] = []
        self._hanging = False

    def run(self) -> None:
        """Serve until `quit`."""
        if not self._folder.is_dir():
            sys.exit(f"{self._folder} is not there")
        (self._folder / _SOCKET).unlink(missing_ok=True)
        here = os.open(self._folder, os.O_DIRECTORY)
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(f"/proc/self/fd/{here}/{_SOCKET}")
            listening.listen()
            (self._folder / _PID).write_text(f"{os.getpid()}\n")
            print(f"Starting control daemon for {os.environ.get(DEVICES, 'all GPUs')}", flush=True)  # noqa: T201
            while True:
                connection, _ = listening.accept()
                with connection, contextlib.suppress(OSError):
                    self._answer(connection)

    def _answer(self, connection: socket.socket) -> None:
        words = connection.recv(_LONGEST).decode().split()
        while self._hanging:
            time.sleep(0.05)
        if words and words[0] == "quit":
            connection.close()
            self._end(0)
        try:
            text = self._command(words)
        except (ValueError, IndexError):
            # which is no failure of the control program: its exit status tells of the way to the daemon alone
            text = f"Invalid command: {' '.join(words)}"
        connection.sendall(text.encode())

    def _command(self, words: list[str]) -> str:
        match words:
            case ["get_server_list"]:
                return "\n".join(map(str, self._servers))
            case ["get_server_status", pid]:
                return self._servers.get(int(pid), f"Server {pid} not found")
            case [("set_default_active_thread_percentage" | "get_default_active_thread_percentage"), *percent]:
                return self._percentage(*percent)
            case [("set_default_device_pinned_mem_limit" | "get_default_device_pinned_mem_limit"), device, *size]:
                return self._limit(device, *size)
            case ["fake", *rest]:
                return self._fake(rest)
        raise ValueError(words)

    def _percentage(self, percent: str = "") -> str:
        if percent and not 0 < float(percent) <= 100:  # noqa: PLR2004
            raise ValueError(percent)
        self._threads = float(percent or self._threads)
        return str(self._threads)

    def _limit(self, device: str, size: str = "") -> str:
        if int(device) >= len(os.environ.get(DEVICES, "").split(",")) or not _SIZE.fullmatch(size or "0"):
            raise ValueError(size)
        if size:
            self._memory[device] = size
            return ""
        kept = self._memory.get(device, "unlimited")
        # as driver 595 shows it
        gib = int(kept[:-1]) // 1024 if kept.upper().endswith("M") else 0
        return f"{gib}G" if gib else kept

    def _fake(self, words: list[str]) -> str:
        match words:
            case ["client", uid]:
                if self._user not in {None, int(uid)}:
                    self._queued.append(int(uid))
                    return "queued"
                self._user = int(uid)
                if not self._servers:
                    self._start_server()
                return "connected" if "FAULT" not in self._servers.values() else "CUDA_ERROR_MPS_SERVER_NOT_READY"
            case ["leave"]:
                self._end_servers()
                self._user = None
                return ""
            case ["fault"]:
                self._servers = dict.fromkeys(self._servers, "FAULT")
                return ""
            case ["hang"]:
                self._hanging = True
                return ""
            case ["crash", code]:
                self._end(int(code))
            case ["environment"]:
                return "\n".join(f"{name}={os.environ.get(name, '')}" for name in (PIPE, LOG, DEVICES))
        raise ValueError(words)

    def _start_server(self) -> None:
        child = subprocess.Popen(_SERVER, stdin=subprocess.DEVNULL)
        self._children.append(child)
        self._servers[child.pid] = "ACTIVE"

    def _end_servers(self) -> None:
        for child in self._children:
            child.kill()
            child.wait()
        self._children.clear()
        self._servers.clear()

    def _end(self, code: int) -> NoReturn:
        if code == 0:
            self._end_servers()
            for name in (_SOCKET, _PID):
                (self._folder / name).unlink(missing_ok=True)
        os._exit(code)


if __name__ == "__main__":
    main()
