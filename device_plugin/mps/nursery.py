"""Starts MPS control daemons in a container of their own, so that they outlive the device plugin's.

When a container ends its processes do, whoever asked for them. So where daemons are to live on while the plugin is
updated, `cotenant-mps-nursery` starts them in a pod that is not updated with it; the plugin watches, limits and ends
them as it does its own children, and the next plugin takes them over.
"""

import socket
import subprocess
import threading
from pathlib import Path

import click
import msgspec
import structlog

from cotenant import logs
from cotenant.signals import at_the_end
from device_plugin.mps.control import Control, MPSError
from device_plugin.mps.process import Identity, Process

log = structlog.get_logger(__name__)

_LONGEST = 65_536
_SECONDS = 5.0
_LOOK_SECONDS = 0.5


class _Wanted(msgspec.Struct, forbid_unknown_fields=True):
    """Ask for a daemon in *folder*, for the GPUs of those UUIDs."""

    folder: str
    uuids: tuple[str, ...]


class _Started(msgspec.Struct, omit_defaults=True):
    pid: int = 0
    error: str = ""


_wanted, _started = msgspec.json.Decoder(_Wanted), msgspec.json.Decoder(_Started)


def start(control: Control) -> "subprocess.Popen[bytes]":
    """Start the daemon that *control* is to command as a child of ours, in a group of its own; raise OSError."""
    with (control.log / "daemon.out").open("ab") as output:
        return subprocess.Popen(  # noqa: S603 - the program is the operator's choice
            [control.program, "-f"],
            env=control.environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def ask(path: str, folder: Path, uuids: tuple[str, ...]) -> int:
    """Have the nursery that listens at *path* start a daemon; give its process id. Raises MPSError."""
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_SECONDS)
            connection.connect(path)
            connection.sendall(msgspec.json.encode(_Wanted(str(folder), uuids)))
            connection.shutdown(socket.SHUT_WR)
            answer = _started.decode(_all(connection))
    except (OSError, msgspec.DecodeError) as error:
        raise MPSError(f"the nursery of MPS daemons at {path} does not answer: {error}") from error
    if answer.error:
        raise MPSError(f"the nursery of MPS daemons: {answer.error}")
    return answer.pid


class Nursery:
    """Answer at *path* until stop(), starting *program* for folders below the socket's own."""

    def __init__(self, path: Path, program: str) -> None:
        """Raise OSError where the socket cannot be had."""
        self._root = path.parent
        self._program = program
        self._stopping = threading.Event()
        self._children: dict[Path, tuple[Control, subprocess.Popen[bytes]]] = {}
        self._root.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        path.chmod(0o600)  # whoever connects has a process started as root
        self._socket.listen()
        self._socket.settimeout(_LOOK_SECONDS)

    def run(self) -> None:
        """Serve until stop(); then end all daemons, in order."""
        while not self._stopping.is_set():
            # an ended child that nobody waits for would count as running
            self._children = {folder: one for folder, one in self._children.items() if one[1].poll() is None}
            try:
                connection, _ = self._socket.accept()
            except TimeoutError:
                continue
            except OSError as error:
                # out of file descriptors, or whoever asked has gone; all clients of the node would end with us
                log.warning("nursery.not_accepted", error=str(error))
                self._stopping.wait(_LOOK_SECONDS)
                continue
            with connection:
                connection.settimeout(_SECONDS)
                try:
                    connection.sendall(msgspec.json.encode(self._answer(_all(connection))))
                except OSError as error:
                    log.warning("nursery.not_answered", error=str(error))
        self._socket.close()
        for control, child in self._children.values():
            try:
                control.quit()
            except MPSError as error:
                log.warning("mps.quit_failed", pid=child.pid, error=str(error))
                child.kill()
            child.wait()

    def stop(self) -> None:
        """Let run() end."""
        self._stopping.set()

    def _answer(self, text: bytes) -> _Started:
        try:
            wanted = _wanted.decode(text)
        except msgspec.DecodeError as error:
            return _Started(error=f"the request cannot be read: {error}")
        folder = Path(wanted.folder)
        if folder.parent != self._root or not (folder / "log").is_dir():
            return _Started(error=f"{folder} is no daemon's folder in {self._root}")
        if folder in self._children:
            # whoever asks knows of none: a plugin was killed before it could write down whom it had asked for
            _, left = self._children.pop(folder)
            Process(Identity(left.pid, 0), left).kill()
        control = Control(self._program, folder, wanted.uuids)
        try:
            child = start(control)
        except OSError as error:
            return _Started(error=f"{self._program} cannot be run: {error}")
        self._children[folder] = control, child
        log.info("nursery.started", folder=str(folder), pid=child.pid)
        return _Started(pid=child.pid)


def _all(connection: socket.socket) -> bytes:
    text = b""
    while len(text) < _LONGEST and (part := connection.recv(_LONGEST)):
        text += part
    return text


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--socket",
    "path",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("/run/cotenant/mps/nursery.sock"),
    show_default=True,
    help="Where the device plugin asks, in the folder of its mps.root.",
)
@click.option("--control", default="nvidia-cuda-mps-control", show_default=True, help="NVIDIA's control program.")
@click.version_option(package_name="cotenant")
def main(*, path: Path, control: str) -> None:
    """Start MPS control daemons for the device plugin of this node, and keep them while it is updated."""
    logs.configure("cotenant-mps-nursery", node="")
    try:
        nursery = Nursery(path, control)
    except OSError as error:
        raise click.ClickException(f"{path} cannot be had: {error}") from error
    at_the_end(nursery.stop)
    click.echo(f"cotenant-mps-nursery ready: {path}")
    nursery.run()
