"""Stands between a kubelet and a device plugin, passes their bytes on, and holds a call just where a test wants it.

The plugin is told another kubelet folder, whose kubelet.sock and PodResources socket are served here; the kubelet finds
in its own folder a socket of ours for each resource. When the plugin dies the kubelet's connection ends as the
plugin's own would have. When the kubelet dies the plugin sees its stream end, and what was held before the plugin
arrives there all the same: bytes that lay in a socket. A new kubelet's socket is a new one here, too.
"""

import itertools
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Any, NoReturn, Self

import grpc

from device_plugin.api import deviceplugin_pb2 as pb
from device_plugin.api import deviceplugin_pb2_grpc as rpc
from e2e.node import DEVICE_PLUGINS

_THREADS = 64  # a stream and some held calls for each resource
_MESSAGES = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))
_LOCAL = (*_MESSAGES, ("grpc.use_local_subchannel_pool", 1))
# Longer than any test holds a call: the kubelet sets no time limit on Allocate, and 30 s on PreStartContainer.
_CALL_SECONDS = 120.0
_LOOK_SECONDS = 0.02


class Where(StrEnum):
    """Name the place at which a call is held."""

    # the plugin has not seen it yet
    BEFORE = "before"
    # the plugin has asked the kubelet who is meant, and waits for the answer
    INSIDE = "inside"
    # the plugin has answered, and the kubelet does not have that yet
    AFTER = "after"


class Hold:
    """Hold the next call of one name about one resource.

    *reached* is set once it stands there, *answered* once the plugin has given an answer, whoever is there to get it.
    """

    def __init__(self, resource: str, call: str, where: Where) -> None:
        self.resource = resource
        self.call = call
        self.where = where
        self.reached = threading.Event()
        self.answered = threading.Event()
        self.released = threading.Event()

    def stand(self) -> None:
        """Hold whoever calls until it is released."""
        self.reached.set()
        self.released.wait(_CALL_SECONDS)


class PluginProxy:
    """Serve both sides until it is left; a plugin may die and come back any number of times."""

    def __init__(self, pod_resources: Path) -> None:
        """Prepare; *pod_resources* is the kubelet's own socket."""
        self._made = tempfile.TemporaryDirectory(prefix="proxy-")  # short: a socket's path has 107 bytes at most
        self.kubelet_directory = Path(self._made.name)
        self.pod_resources = self.kubelet_directory / "pod-resources.sock"
        """Both are what the plugin is to be told."""
        self._real_pod_resources = pod_resources
        self._lock = threading.Lock()
        self._holds: list[Hold] = []
        self._inside: Hold | None = None
        self._standing: list[Hold] = []
        self._links: list[_Link] = []
        self._numbers = itertools.count()
        self._servers: list[grpc.Server] = []
        self._left = threading.Event()
        self._follower = threading.Thread(target=self._follow_kubelet, daemon=True)

    def __enter__(self) -> Self:
        registration = _server()
        rpc.add_RegistrationServicer_to_server(_Registrations(self.register), registration)
        registration.add_insecure_port(f"unix:{self.kubelet_directory / 'kubelet.sock'}")
        lister = _server(_Passing(self._channel_to_kubelet(), self._listing))
        lister.add_insecure_port(f"unix:{self.pod_resources}")
        self._servers = [registration, lister]
        for server in self._servers:
            server.start()
        self._follower.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        self._follower.join()
        self.release()
        for link in self._links:
            link.end()
        for server in self._servers:
            server.stop(grace=None).wait()
        self._channel.close()
        self._made.cleanup()

    def hold(self, resource: str, call: str, where: Where) -> Hold:
        """Hold the next call of that name about *resource* there, once; those asked for first come first."""
        hold = Hold(resource, call, where)
        with self._lock:
            self._holds.append(hold)
        return hold

    def release(self) -> None:
        """Let everything go on that is held, and hold nothing more."""
        with self._lock:
            self._holds, self._inside = [], None
            for hold in self._standing:
                hold.released.set()

    def register(self, request: pb.RegisterRequest) -> None:
        """Put a socket of ours before the plugin's and register that; raise grpc.RpcError as the kubelet refuses."""
        link = _Link(
            self.kubelet_directory / request.endpoint,
            DEVICE_PLUGINS / f"proxied-{next(self._numbers)}.sock",
            around=lambda call, pass_on: self._around(request.resource_name, call, pass_on),
            gone=lambda: self._let_go(request.resource_name),
        )
        self._links.append(link)
        told = pb.RegisterRequest()
        told.CopyFrom(request)
        told.endpoint = link.socket.name
        try:
            with grpc.insecure_channel(f"unix:{DEVICE_PLUGINS / 'kubelet.sock'}", options=_LOCAL) as channel:
                rpc.RegistrationStub(channel).Register(told, timeout=20)
        except grpc.RpcError:
            link.end()
            raise

    def _follow_kubelet(self) -> None:
        """Have our kubelet.sock look like another one whenever the kubelet's own is, by which a plugin knows."""
        known = _kubelets_socket()
        while not self._left.wait(_LOOK_SECONDS):
            now = _kubelets_socket()
            if now not in (known, None):
                (self.kubelet_directory / "kubelet.sock").touch()
                known = now

    def _let_go(self, resource: str) -> None:
        """Let calls go on that nobody waits for any more: the plugin has gone, or the kubelet."""
        with self._lock:
            for hold in self._standing:
                if hold.resource == resource:
                    hold.released.set()

    def _channel_to_kubelet(self) -> grpc.Channel:
        self._channel = grpc.insecure_channel(f"unix:{self._real_pod_resources}", options=_LOCAL)
        return self._channel

    def _around(self, resource: str, call: str, pass_on: Callable[[], bytes]) -> bytes:
        """Pass a call of the kubelet's on, held as was asked for."""
        with self._lock:
            hold = next((one for one in self._holds if (one.resource, one.call) == (resource, call)), None)
            if hold is not None:
                self._holds.remove(hold)
                self._standing.append(hold)
                if hold.where is Where.INSIDE:
                    self._inside = hold
        if hold is not None and hold.where is Where.BEFORE:
            hold.stand()
        answer = pass_on()
        if hold is not None:
            hold.answered.set()
            if hold.where is Where.AFTER:
                hold.stand()
        return answer

    def _listing(self, _call: str, pass_on: Callable[[], bytes]) -> bytes:
        """Pass a question of the plugin's on, unless the call in which it asks is to be held inside."""
        with self._lock:
            hold, self._inside = self._inside, None
        if hold is not None:
            hold.stand()
        return pass_on()


class _Link:
    """One registration: a socket before that of the plugin, which lasts as long as the plugin follows."""

    def __init__(
        self,
        plugin: Path,
        socket: Path,
        around: Callable[[str, Callable[[], bytes]], bytes],
        gone: Callable[[], None],
    ) -> None:
        self.socket = socket
        self._gone = gone
        self._channel = grpc.insecure_channel(f"unix:{plugin}", options=_LOCAL)
        self._threads = ThreadPoolExecutor(_THREADS)
        self._server = _server(_Passing(self._channel, around, ended=self._ended), threads=self._threads)
        self._server.add_insecure_port(f"unix:{socket}")
        self._server.start()

    def end(self) -> None:
        """Cut the kubelet off, whatever it waits for, and let go who was held; more than once does no harm."""
        self._server.stop(grace=None).wait()
        self._gone()
        # where the plugin is there yet, it gets what was on its way; where it is not, this fails at once
        self._threads.shutdown()
        self._channel.close()

    def _ended(self) -> None:
        # in a thread of its own: the stream that tells it is one of the server's
        threading.Thread(target=self.end, daemon=True).start()


class _Passing(grpc.GenericRpcHandler):
    """Pass every method's bytes on to *channel*; *ended* is told when a stream from there has ended."""

    def __init__(
        self,
        channel: grpc.Channel,
        around: Callable[[str, Callable[[], bytes]], bytes],
        ended: Callable[[], None] = lambda: None,
    ) -> None:
        self._channel = channel
        self._around = around
        self._ended = ended

    def service(self, details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[bytes, bytes]":
        """Handle the method that is called, whichever it is."""
        method: str = details.method
        if method.endswith("/ListAndWatch"):
            return grpc.unary_stream_rpc_method_handler(lambda request, context: self._stream(method, request, context))
        return grpc.unary_unary_rpc_method_handler(lambda request, context: self._one(method, request, context))

    def _one(self, method: str, request: bytes, context: grpc.ServicerContext) -> bytes:
        def pass_on() -> bytes:
            call: Any = self._channel.unary_unary(method)  # without serializers it takes and gives bytes
            answer: bytes = call(request, timeout=_CALL_SECONDS)
            return answer

        try:
            return self._around(method.rpartition("/")[2], pass_on)
        except grpc.RpcError as error:
            _abort(error, context)
        except ValueError as closed:  # the channel: the plugin has gone
            context.abort(grpc.StatusCode.UNAVAILABLE, str(closed))
            raise

    def _stream(self, method: str, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        call: Any = self._channel.unary_stream(method)
        stream = call(request)
        if context.add_callback(stream.cancel):
            with suppress(grpc.RpcError):
                yield from stream
            self._ended()


class _Registrations(rpc.RegistrationServicer):
    def __init__(self, register: Callable[[pb.RegisterRequest], None]) -> None:
        self._register = register

    def Register(self, request: pb.RegisterRequest, context: grpc.ServicerContext) -> pb.Empty:  # noqa: N802
        try:
            self._register(request)
        except grpc.RpcError as error:
            _abort(error, context)
        return pb.Empty()


def _kubelets_socket() -> int | None:
    """Tell one of the kubelet's sockets from the next; None where there is none."""
    try:
        return (DEVICE_PLUGINS / "kubelet.sock").stat().st_ctime_ns
    except OSError:
        return None


def _server(*handlers: grpc.GenericRpcHandler, threads: ThreadPoolExecutor | None = None) -> grpc.Server:
    return grpc.server(threads or ThreadPoolExecutor(_THREADS), handlers=list(handlers), options=_MESSAGES)


def _abort(error: grpc.RpcError, context: grpc.ServicerContext) -> NoReturn:
    """Answer as the other side did."""
    context.abort(error.code(), error.details() or "")
    raise error
