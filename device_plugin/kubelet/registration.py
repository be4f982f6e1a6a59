"""Keeps the plugin registered with a kubelet that comes and goes.

The kubelet forgets its plugins when it starts, deletes every socket in the folder, and dials a plugin exactly once,
from inside Register. It never says that it has lost one. So three things are watched: the kubelet's socket, our own,
and whether a kubelet follows our devices.
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import structlog

from cotenant.threads import all_there
from device_plugin.api import deviceplugin_pb2 as pb
from device_plugin.api import deviceplugin_pb2_grpc as rpc
from device_plugin.kubelet.service import OPTIONS
from device_plugin.threads import THREADS

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

    from cotenant.threads import Loop

log = structlog.get_logger(__name__)

VERSION = "v1beta1"
KUBELET_SOCKET = "kubelet.sock"

# Two stat calls. Between a kubelet's start and our registration it rejects every pod of ours that it is given, so this
# is kept as short as can be had without anybody noticing it.
_LOOK_SECONDS = 0.02
_BACK_OFF_SECONDS = (0.05, 5.0)
# The kubelet opens its stream right after Register; one that has not by then lost the connection in between.
_STREAM_SECONDS = 5.0
_REGISTER_SECONDS = 10.0
# A kubelet that hangs inside Register does not keep us from ending.
_RETIRE_SECONDS = 1.0
# Every open stream holds a thread, and so does every call; old streams live on until their kubelet is gone.
_THREADS = 32

_Identity = tuple[int, int, int]


class Registration:
    """Serve *servicer* in *folder* and register it for *resource*, again whenever that is needed.

    *serving_changed* is called, from any thread, when *serving* has changed, and may have changed again by then;
    *connected*, in a thread of its own, each time a kubelet has begun to follow our devices.
    """

    def __init__(
        self,
        folder: Path,
        resource: str,
        *,
        serving_changed: Callable[[], None],
        connected: Callable[[], None],
    ) -> None:
        self._folder = folder
        self._resource = resource
        self._serving_changed = serving_changed
        self._connected = connected
        self._servicer: rpc.DevicePluginServicer | None = None
        self._guard = threading.Lock()
        self._streams = 0
        self._stream_changed = threading.Event()
        self._stopping = threading.Event()
        self._servers: list[grpc.Server] = []
        self._pool: ThreadPoolExecutor | None = None
        self._bound = 0
        self._socket: Path | None = None
        self._socket_identity: _Identity | None = None
        self._registered_with: _Identity | None = None
        self._loop = THREADS.of(f"registration {resource}", self._run)
        self._greeting: Loop | None = None

    def start(self, servicer: rpc.DevicePluginServicer) -> None:
        """Begin to serve and to register; return at once."""
        self._servicer = servicer
        self._loop.start()

    def retire(self) -> None:
        """Register no more, whatever the kubelet does; keep serving."""
        self._stopping.set()
        if self._greeting is not None:
            self._greeting.retire()
        self._loop.join(_RETIRE_SECONDS)

    def stop(self, grace_seconds: float = 1.0) -> None:
        """Retire, end all streams and calls, those under way after *grace_seconds*, and remove our socket."""
        self.retire()
        for stopped in [server.stop(grace_seconds) for server in self._servers]:
            stopped.wait()
        if self._socket is not None:
            self._socket.unlink(missing_ok=True)

    @property
    def serving(self) -> bool:
        """Tell whether a kubelet follows our devices now."""
        with self._guard:
            return self._streams > 0

    # What the service tells.

    def opened(self) -> None:
        """Count a stream that has had its first list."""
        with self._guard:
            self._streams += 1
            first = self._streams == 1
        self._stream_changed.set()
        if first:
            self._serving_changed()
        greeting = THREADS.of(f"connected {self._resource}", self._connected)
        with self._guard:
            before, self._greeting = self._greeting, greeting
        if before is not None:
            before.retire()  # one that goes on failing has nothing to do that this one does not
        greeting.start()

    def ended(self) -> None:
        """Count a stream that has ended."""
        with self._guard:
            self._streams -= 1
            last = self._streams == 0
        self._stream_changed.set()
        if last and not self._stopping.is_set():
            self._serving_changed()

    # The thread that keeps it so.

    def _run(self) -> None:
        pause = _BACK_OFF_SECONDS[0]
        while not self._stopping.is_set():
            kubelet = _identity(self._folder / KUBELET_SOCKET)
            if kubelet is None or (kubelet == self._registered_with and self.serving and self._reachable()):
                pause = _BACK_OFF_SECONDS[0]
                self._stopping.wait(_LOOK_SECONDS)
                continue
            # Our socket is deleted by a kubelet that starts, or by somebody. A kubelet that still follows us does so
            # over a connection that lives on without the file, and must not lose it: its stream may not end after a new
            # registration, since it would take the new plugin for the one that left (kubernetes#121994).
            if (self._reachable() or self._serve()) and (
                (kubelet == self._registered_with and self.serving) or self._register()
            ):
                if kubelet != self._registered_with:
                    self._drop_old_servers()
                self._registered_with = kubelet
                continue
            again = time.monotonic() + pause
            pause = min(2 * pause, _BACK_OFF_SECONDS[1])
            # a kubelet that has just started is not made to wait for the failures of the last one
            while time.monotonic() < again and _identity(self._folder / KUBELET_SOCKET) == kubelet:
                if self._stopping.wait(_LOOK_SECONDS):
                    return

    def _reachable(self) -> bool:
        """Tell whether the socket that we have bound is the one that a kubelet would find."""
        return self._socket is not None and _identity(self._socket) == self._socket_identity

    def _serve(self) -> bool:
        """Bind a new socket beside the servers whose kubelet may still be there; tell whether that was possible."""
        if self._servicer is None:
            return False
        # A name of its own: a server that stops unlinks its path, whoever has bound it since.
        socket = self._folder / f"{self._resource.replace('/', '-')}-{self._bound}.sock"
        self._bound += 1
        try:
            self._pool = self._pool or all_there(_THREADS, "kubelet")
            server = grpc.server(self._pool)
            rpc.add_DevicePluginServicer_to_server(self._servicer, server)
            socket.unlink(missing_ok=True)
            server.add_insecure_port(f"unix:{socket}")
            server.start()
        except (OSError, RuntimeError) as error:
            log.warning("registration.cannot_listen", socket=str(socket), error=str(error))
            return False
        self._servers.append(server)
        self._socket, self._socket_identity = socket, _identity(socket)
        return True

    def _drop_old_servers(self) -> None:
        """Stop the servers that only a kubelet which is gone knew of."""
        while len(self._servers) > 1:
            self._servers.pop(0).stop(grace=None)

    def _register(self) -> bool:
        """Register and wait for the kubelet's stream; tell whether it came."""
        if self._socket is None:
            return False
        self._stream_changed.clear()
        # a fresh channel each time: an old one waits out its back-off although the kubelet is back
        target, options = f"unix:{self._folder / KUBELET_SOCKET}", (("grpc.use_local_subchannel_pool", 1),)
        request = pb.RegisterRequest(
            version=VERSION, endpoint=self._socket.name, resource_name=self._resource, options=OPTIONS
        )
        try:
            with grpc.insecure_channel(target, options=options) as channel:
                rpc.RegistrationStub(channel).Register(request, timeout=_REGISTER_SECONDS)
        except grpc.RpcError as error:
            why = error.details() if isinstance(error, grpc.Call) else str(error)
            log.warning("registration.failed", resource=self._resource, error=why)
            return False
        deadline = time.monotonic() + _STREAM_SECONDS
        while not self._stopping.is_set() and time.monotonic() < deadline:
            if self._stream_changed.wait(_LOOK_SECONDS) and self.serving:
                log.info("registration.done", resource=self._resource, socket=self._socket.name)
                return True
        return False


def _identity(path: Path) -> _Identity | None:
    """Tell files of the same name apart; None when there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    # an inode number is soon used again, its time of birth is not
    return status.st_dev, status.st_ino, status.st_ctime_ns
