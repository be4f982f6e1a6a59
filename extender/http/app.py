"""The routes of Flask: for probes, Prometheus and the API server, and for whoever shares an address with them."""

from collections.abc import Callable

import msgspec
import structlog
from flask import Flask, Response, request
from werkzeug.exceptions import HTTPException

from cotenant import __version__
from extender.http.calls import JSON, MAX_BODY, BodyError, Calls
from extender.metrics import CONTENT_TYPE, Metrics

_log = structlog.get_logger(__name__)

# What is longer is still read up to here, since a client that is cut off while it sends never sees the answer.
_MAX_DRAINED = 64 << 20
_CHUNK = 1 << 20

_encode = msgspec.json.Encoder().encode


def verbs(app: Flask, calls: Calls) -> None:
    """Add kube-scheduler's calls, for where they are answered at the same address as everything else."""

    def call() -> Response:
        body: bytes | BodyError
        try:
            body = _body()
        except BodyError as error:
            body = error
        answer = calls(request.method, request.path, body)
        # Bytes with a Content-Length, in one write: without the length Go opens a new connection per call.
        response = Response(answer.body, answer.status, mimetype=answer.mimetype)
        if answer.last:
            response.headers["Connection"] = "close"
        return response

    for path in calls.paths:
        app.add_url_rule(path, endpoint=f"call {path}", view_func=call, methods=["POST"])


def everything_else(
    app: Flask, *, synced: Callable[[], bool], metrics: Metrics, review: dict[str, Callable[[bytes], bytes]]
) -> None:
    """Add health, version, metrics and the admission webhooks, *review* by name (mutate, validate)."""

    @app.get("/healthz")
    def _healthz() -> Response:
        return Response("ok\n", mimetype="text/plain")

    @app.get("/readyz")
    def _readyz() -> Response:
        if synced():
            return Response("ok\n", mimetype="text/plain")
        return Response("the extender has not read the cluster yet\n", 503, mimetype="text/plain")

    @app.get("/version")
    def _version() -> Response:
        return _json({"name": "cotenant-extender", "version": __version__})

    @app.get("/metrics")
    def _metrics() -> Response:
        pieces = metrics.expose()
        # in pieces, so that tens of megabytes are not copied into one; with their length, so that it is one answer
        response = Response(iter(pieces), content_type=CONTENT_TYPE)
        response.content_length = sum(map(len, pieces))
        return response

    @app.post("/admission/<name>")
    def _admission(name: str) -> Response:
        if name not in review:
            return Response(f"there is no admission webhook {name!r}\n", 404, mimetype="text/plain")
        try:
            return Response(review[name](_body()), mimetype=JSON)
        except BodyError as error:
            return Response(f"{error}\n", 413, mimetype="text/plain")


def new_app() -> Flask:
    """Make an application without routes, whose errors are sentences and never tracebacks."""
    app = Flask("cotenant")
    # Flask's answer to what a route raises would be HTML.
    app.register_error_handler(Exception, _failed)
    return app


def _failed(error: Exception) -> Response:
    if isinstance(error, HTTPException):
        return Response(f"{request.method} {request.path}: {error.description}\n", error.code, mimetype="text/plain")
    _log.error("request failed", verb=request.path.strip("/"), exc_info=error)
    sentence = f"{request.path.strip('/')} failed inside the extender ({type(error).__name__}); its log says more"
    return Response(f"{sentence}\n", 500, mimetype="text/plain")


def _body() -> bytes:
    length = request.content_length
    if length is None:
        # sent in chunks, which Go does not do with a body that it has whole: nothing is read beyond this
        request.max_content_length = MAX_BODY + 1
    elif length > MAX_BODY:
        left = min(length, _MAX_DRAINED)
        while left > 0 and (chunk := request.stream.read(min(left, _CHUNK))):
            left -= len(chunk)
        raise BodyError(
            f"the request has {length} bytes, more than the {MAX_BODY} allowed; set nodeCacheCapable: true, so that "
            "kube-scheduler sends names instead of whole nodes"
        )
    body = request.get_data(cache=False)
    if len(body) > MAX_BODY:
        raise BodyError(f"the request has more than the {MAX_BODY} bytes allowed")
    return body


def _json(value: object) -> Response:
    return Response(_encode(value), mimetype=JSON)
