"""An extender that decides nothing: the floor that the real one is measured against.

Same JSON library, same client for the Binding; filter lets every node through (or the first alone), prioritize scores
nothing, bind writes a bare Binding. It runs on Flask, as extenders in Python do, or with --lean as bare as our own
calls, on the same server. `python -m e2e.bench.idle_extender KUBECONFIG HOST:PORT [--decide] [--lean]`.
"""

import signal
import threading
from collections.abc import Callable

import click
import msgspec
from flask import Flask, Response, request

from cotenant.cluster import Cluster, ClusterError, connect, writes
from extender.cluster.binder import AT_ONCE
from extender.http.call_server import CallServer, Request
from extender.http.calls import Answer, BodyError
from extender.http.wsgi import Application
from extender.verbs.wire import ArgsReader, BindArgs, BindResult, FilterResult, HostPriority

_args = ArgsReader()
_bind_args = msgspec.json.Decoder(BindArgs)
_encode = msgspec.json.Encoder().encode


class _Idle:
    """Answer the verbs, bytes in and bytes out."""

    def __init__(self, cluster: Cluster, *, decide: bool) -> None:
        self._cluster = cluster
        self._decide = decide
        self._room = threading.Semaphore(AT_ONCE)
        self.verbs: dict[str, Callable[[bytes], bytes]] = {
            "/filter": self._filter,
            "/prioritize": self._prioritize,
            "/bind": self._bind,
        }

    def __call__(self, asked: Request) -> Answer:
        """Answer as our own calls are."""
        if isinstance(asked.body, BodyError):
            raise asked.body
        return Answer(200, self.verbs[asked.path](asked.body))

    def _filter(self, body: bytes) -> bytes:
        candidates = _args(body).candidates
        return _encode(FilterResult(NodeNames=candidates.names[:1] if self._decide else candidates.raw_names))

    @staticmethod
    def _prioritize(body: bytes) -> bytes:
        return _encode([HostPriority(Host=name, Score=0) for name in _args(body).candidates.names])

    def _bind(self, body: bytes) -> bytes:
        args = _bind_args.decode(body)
        try:
            with self._room:
                writes.bind(
                    self._cluster,
                    namespace=args.PodNamespace,
                    name=args.PodName,
                    uid=args.PodUID,
                    node=args.Node,
                    annotations={},
                )
        except ClusterError as error:
            return _encode(BindResult(Error=str(error)))
        return _encode(BindResult())


def _app(idle: _Idle) -> Flask:
    flask = Flask("idle")

    def route(path: str, verb: Callable[[bytes], bytes]) -> None:
        def answer() -> Response:
            return Response(verb(request.get_data(cache=False)), mimetype="application/json")

        flask.add_url_rule(path, path, answer, methods=["POST"])

    for path, verb in idle.verbs.items():
        route(path, verb)
    return flask


@click.command()
@click.argument("kubeconfig")
@click.argument("listen")
@click.option("--decide", is_flag=True)
@click.option("--lean", is_flag=True, help="Serve as our own calls are served, without Flask.")
def main(kubeconfig: str, listen: str, *, decide: bool, lean: bool) -> None:
    """Serve until SIGTERM."""
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    with connect(kubeconfig, pool_size=2 * AT_ONCE) as cluster:
        idle = _Idle(cluster, decide=decide)
        server = CallServer(listen, idle) if lean else CallServer(listen, Application(_app(idle)))
        server.start()
        click.echo("idle-extender ready")
        stopping.wait()
        server.stop()


if __name__ == "__main__":
    main()
