"""The routes: JSON bytes in, JSON bytes out, and always an answer that kube-scheduler reads."""

import time
from collections.abc import Callable
from typing import TypeVar

import msgspec
import structlog
from flask import Flask, Response, request
from werkzeug.exceptions import HTTPException

from cotenant import __version__
from cotenant.contract.reasons import Reason
from extender.metrics import CONTENT_TYPE, Metrics
from extender.verbs.bind import Bind
from extender.verbs.filter import Filter
from extender.verbs.prioritize import Prioritize
from extender.verbs.wire import BindArgs, BindResult, ExtenderArgs, FilterResult, HostPriority

_log = structlog.get_logger(__name__)

T = TypeVar("T")

JSON = "application/json"
# 5,000 names are 86 KB; 500 whole nodes, from a scheduler without nodeCacheCapable, are 6.5 MB.
MAX_BODY = 16 << 20
# What is longer is still read up to here, since a client that is cut off while it sends never sees the answer.
_MAX_DRAINED = 64 << 20
_CHUNK = 1 << 20

_extender_args = msgspec.json.Decoder(ExtenderArgs)
_bind_args = msgspec.json.Decoder(BindArgs)
_encode = msgspec.json.Encoder().encode


class BodyError(ValueError):
    """Say why a request's body cannot be used."""


def verbs(app: Flask, *, filter_: Filter, prioritize: Prioritize, bind: Bind, metrics: Metrics) -> None:
    """Add filter, prioritize and bind.

    They answer 200 whatever happens: of any other status kube-scheduler shows the number and drops the body, where the
    reason stands (pkg/scheduler/extender.go, send). Only prioritize has no place for a reason in its answer.
    """

    @app.post("/filter")
    def _filter() -> Response:
        started = time.perf_counter()
        try:
            result = filter_(_decode(_extender_args, "filter"))
        except BodyError as error:
            result = FilterResult(NodeNames=[], Error=str(error))
        fits = bool(result.NodeNames or (result.Nodes and result.Nodes.items))
        outcome = "error" if result.Error else "ok" if fits else "rejected"
        response = _json(result)
        metrics.answered("filter", outcome, time.perf_counter() - started)
        return response

    @app.post("/prioritize")
    def _prioritize() -> Response:
        started = time.perf_counter()
        try:
            result: list[HostPriority] = prioritize(_decode(_extender_args, "prioritize"))
        except BodyError as error:
            metrics.answered("prioritize", "error", time.perf_counter() - started)
            return Response(f"{error}\n", 400, mimetype="text/plain")
        response = _json(result)
        metrics.answered("prioritize", "ok", time.perf_counter() - started)
        return response

    @app.post("/bind")
    def _bind() -> Response:
        started = time.perf_counter()
        try:
            refusal = bind(_decode(_bind_args, "bind"))
        except BodyError as error:
            metrics.answered("bind", "error", time.perf_counter() - started)
            return _json(BindResult(Error=str(error)))
        metrics.bound(refusal.reason if refusal else None)
        metrics.answered("bind", "rejected" if refusal else "ok", time.perf_counter() - started)
        if refusal is not None:
            _log.warning(refusal.sentence, verb="bind", reason=str(refusal.reason))
        response = _json(BindResult(Error=refusal.sentence if refusal else ""))
        if refusal is not None and refusal.reason is Reason.NOT_WRITER:
            # behind a Service the next connection goes to the one that may, and not before
            response.headers["Connection"] = "close"
        return response


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
    # filter and bind read Error from a 200; for others a 500 says enough
    if request.path in {"/filter", "/bind"}:
        return _json({"Error": sentence})
    return Response(f"{sentence}\n", 500, mimetype="text/plain")


def _decode(decoder: msgspec.json.Decoder[T], verb: str) -> T:
    try:
        return decoder.decode(_body())
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise BodyError(f"{verb}: the request is not what kube-scheduler sends: {error}") from error


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
    # Bytes with a Content-Length, in one write: without the length Go opens a new connection per call.
    return Response(_encode(value), mimetype=JSON)
