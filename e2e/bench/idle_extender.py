"""An extender that decides nothing: the floor that the real one is measured against.

Same server, same JSON library, same client for the Binding; filter lets every node through (or the first alone),
prioritize scores nothing, bind writes a bare Binding. `python -m e2e.idle_extender KUBECONFIG HOST:PORT [--decide]`.
"""

import signal
import threading

import click
import msgspec
from flask import Flask, Response, request

from cotenant.cluster import Cluster, ClusterError, connect, writes
from extender.http.call_server import CallServer
from extender.http.wsgi import Application
from extender.verbs.wire import ArgsReader, BindArgs, BindResult, FilterResult, HostPriority

_args = ArgsReader()
_bind_args = msgspec.json.Decoder(BindArgs)
_encode = msgspec.json.Encoder().encode


def app(cluster: Cluster, *, decide: bool) -> Flask:
    """Make the application."""
    flask = Flask("idle")

    def answer(value: object) -> Response:
        return Response(_encode(value), mimetype="application/json")

    @flask.post("/filter")
    def _filter() -> Response:
        names = _args(request.get_data(cache=False)).candidates.names
        return answer(FilterResult(NodeNames=names[:1] if decide else names))

    @flask.post("/prioritize")
    def _prioritize() -> Response:
        names = _args(request.get_data(cache=False)).candidates.names
        return answer([HostPriority(Host=name, Score=0) for name in names])

    @flask.post("/bind")
    def _bind() -> Response:
        args = _bind_args.decode(request.get_data(cache=False))
        try:
            writes.bind(
                cluster,
                namespace=args.PodNamespace,
                name=args.PodName,
                uid=args.PodUID,
                node=args.Node,
                annotations={},
            )
        except ClusterError as error:
            return answer(BindResult(Error=str(error)))
        return answer(BindResult())

    return flask


@click.command()
@click.argument("kubeconfig")
@click.argument("listen")
@click.option("--decide", is_flag=True)
def main(kubeconfig: str, listen: str, *, decide: bool) -> None:
    """Serve until SIGTERM."""
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    with connect(kubeconfig) as cluster:
        server = CallServer(listen, Application(app(cluster, decide=decide)))
        server.start()
        click.echo("idle-extender ready")
        stopping.wait()
        server.stop()


if __name__ == "__main__":
    main()
