"""The routes of Flask: for probes, Prometheus, the API server and people."""

from collections.abc import Callable

import msgspec
import structlog
from flask import Flask, Response, request
from werkzeug.exceptions import HTTPException, NotFound

from cotenant import __version__
from extender.http.calls import JSON
from extender.metrics.registry import CONTENT_TYPE, Metrics

_log = structlog.get_logger(__name__)

REVIEWS = "/admission/"
SIMULATE = "/v1/simulate"
# What an API server takes (k8s.io/apiserver, MaxRequestBodyBytes). In a review the stored object is beside the new one.
_OBJECT_BYTES = 3 << 20

# as the API server calls them (apimachinery, StatusReason)
_REASONS = {
    400: "BadRequest",
    404: "NotFound",
    405: "MethodNotAllowed",
    500: "InternalError",
    503: "ServiceUnavailable",
}

_encode = msgspec.json.Encoder().encode


def everything_else(
    app: Flask,
    *,
    synced: Callable[[], bool],
    ended: Callable[[], list[str]],
    metrics: Metrics,
    review: dict[str, Callable[[bytes], bytes]],
) -> None:
    """Add health, version, metrics and the admission webhooks, *review* by name (mutate, validate).

    *ended* names the threads that have ended and should not have.
    """

    @app.get("/healthz")
    def _healthz() -> Response:
        names = ended()
        if not names:
            return Response("ok\n", mimetype="text/plain")
        sentence = f"threads of the extender have ended: {', '.join(names)}; restart it, its log says why"
        return Response(f"{sentence}\n", 503, mimetype="text/plain")

    @app.get("/readyz")
    def _readyz() -> Response:
        if synced():
            return Response("ok\n", mimetype="text/plain")
        return Response("the extender has not read the cluster yet\n", 503, mimetype="text/plain")

    @app.get("/version")
    def _version() -> Response:
        return Response(_encode({"name": "cotenant-extender", "version": __version__}), mimetype=JSON)

    @app.get("/metrics")
    def _metrics() -> Response:
        pieces = metrics.expose()
        # in pieces, so that tens of megabytes are not copied into one; with their length, so that it is one answer
        response = Response(iter(pieces), content_type=CONTENT_TYPE)
        response.content_length = sum(map(len, pieces))
        return response

    @app.post(f"{REVIEWS}<name>")
    def _admission(name: str) -> Response:
        if name not in review:
            return Response(f"there is no admission webhook {name!r}\n", 404, mimetype="text/plain")
        return Response(review[name](request.get_data(cache=False)), mimetype=JSON)


def most_of_body(path: str) -> int:
    """Say how many bytes a request for *path* may have beside its head."""
    if path.startswith(REVIEWS):
        return 2 * _OBJECT_BYTES
    return _OBJECT_BYTES if path == SIMULATE else 0


def new_app() -> Flask:
    """Make an application without routes, whose errors are sentences and never tracebacks."""
    app = Flask("cotenant")
    # Flask's answer to what a route raises would be HTML.
    app.register_error_handler(Exception, _failed)
    return app


def status(sentence: str, code: int) -> Response:
    """Answer with a Status: of an error that comes through the API server's proxy, kubectl shows nothing else."""
    told = {"kind": "Status", "apiVersion": "v1", "status": "Failure"}
    reason = _REASONS.get(code, "Unknown")
    return Response(_encode({**told, "message": sentence, "reason": reason, "code": code}), code, mimetype=JSON)


def _failed(error: Exception) -> Response:
    if isinstance(error, NotFound):
        sentence, code = f"{request.method} {request.path}: there is no such path here", 404
    elif isinstance(error, HTTPException):
        sentence, code = f"{request.method} {request.path}: {error.description}", error.code or 500
    else:
        _log.error("request failed", verb=request.path.strip("/"), exc_info=error)
        sentence = f"{request.path.strip('/')} failed inside the extender ({type(error).__name__}); its log says more"
        code = 500
    if request.path.startswith("/v1/"):
        return status(sentence, code)
    return Response(f"{sentence}\n", code, mimetype="text/plain")
