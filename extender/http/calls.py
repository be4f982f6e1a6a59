"""kube-scheduler's calls: JSON bytes in, JSON bytes out, and always an answer that it reads."""

import time
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import msgspec
import structlog

from cotenant.cluster import ClusterError
from cotenant.contract.reasons import Reason
from extender.metrics.registry import Metrics
from extender.verbs.bind import Bind
from extender.verbs.filter import Filter
from extender.verbs.preempt import Preempt
from extender.verbs.prioritize import Prioritize
from extender.verbs.wire import ArgsReader, BindArgs, BindResult, FilterResult, PreemptionArgs

_log = structlog.get_logger(__name__)

T = TypeVar("T")

JSON = "application/json"
TEXT = "text/plain"
# 5,000 names are 86 KB; 500 whole nodes, from a scheduler without nodeCacheCapable, are 6.5 MB.
MAX_BODY = 16 << 20
TOO_LARGE, BUSY = 413, 503

_preemption_args = msgspec.json.Decoder(PreemptionArgs)
_bind_args = msgspec.json.Decoder(BindArgs)
_encode = msgspec.json.Encoder().encode


class BodyError(ValueError):
    """Say why a request's body cannot be used, and with which HTTP status."""

    def __init__(self, sentence: str, status: int = 400) -> None:
        super().__init__(sentence)
        self.status = status


class Answer(NamedTuple):
    """Hold what goes back: an HTTP status, a body, its type, and whether the connection ends after it.

    *more* are further pieces of the body, and *headers* those beside its type and length. *then* is done once all is
    sent.
    """

    status: int
    body: bytes
    mimetype: str = JSON
    last: bool = False
    more: tuple[bytes, ...] = ()
    headers: tuple[tuple[str, str], ...] = ()
    then: Callable[[], None] | None = None


class Calls:
    """Answer filter, prioritize, preempt and bind.

    They answer 200 whatever happens: of any other status kube-scheduler shows the number and drops the body, where the
    reason stands (pkg/scheduler/extender.go, send). Only prioritize and preempt have no place for a reason.
    """

    def __init__(
        self,
        *,
        filter_: Filter,
        prioritize: Prioritize,
        preempt: Preempt,
        bind: Bind,
        metrics: Metrics,
        catch_up: Callable[[], None],
    ) -> None:
        """Answer by the verbs; *catch_up* is called when kube-scheduler has asked its last about a pod."""
        self._filter = filter_
        self._prioritize = prioritize
        self._preempt = preempt
        self._bind = bind
        self._metrics = metrics
        self._catch_up = catch_up
        self._args = ArgsReader()
        self._verbs: dict[str, Callable[[bytes], tuple[str, Answer]]] = {
            "/filter": self._answer_filter,
            "/prioritize": self._answer_prioritize,
            "/preempt": self._answer_preempt,
            "/bind": self._answer_bind,
        }

    @property
    def paths(self) -> list[str]:
        """Name the paths that are answered here."""
        return list(self._verbs)

    def __call__(self, method: str, path: str, body: bytes | BodyError) -> Answer:
        """Answer one request; a *body* that could not be had says why."""
        answer = self._verbs.get(path)
        if answer is None:
            return Answer(404, f"{method} {path}: there is no such path here\n".encode(), TEXT)
        if method != "POST":
            return Answer(405, f"{method} {path}: only POST is answered here\n".encode(), TEXT)
        verb = path[1:]
        started = time.perf_counter()
        try:
            if isinstance(body, BodyError):
                raise body
            outcome, found = answer(body)
        except BodyError as error:
            outcome, found = "error", _unusable(verb, _told(verb, error), error.status)
        except ClusterError as error:
            outcome, found = "error", _unusable(verb, f"{verb}: {error}", 503)
        except Exception as error:  # noqa: BLE001 - whatever it is, kube-scheduler waits for an answer
            _log.exception("request failed", verb=verb)
            sentence = f"{verb} failed inside the extender ({type(error).__name__}); its log says more"
            outcome, found = "error", _unusable(verb, sentence, 500)
        self._metrics.answered(verb, outcome, time.perf_counter() - started)
        return found

    def _answer_filter(self, body: bytes) -> tuple[str, Answer]:
        result = self._filter(_read(self._args, "filter", body))
        fits = bool(result.NodeNames or (result.Nodes and result.Nodes.items))
        # with one node left prioritize is not called
        last = isinstance(result.NodeNames, list) and len(result.NodeNames) == 1
        answer = Answer(200, _encode(result), then=self._catch_up if last else None)
        return "error" if result.Error else "ok" if fits else "rejected", answer

    def _answer_prioritize(self, body: bytes) -> tuple[str, Answer]:
        scores = self._prioritize(_read(self._args, "prioritize", body))
        return "ok", Answer(200, _encode(scores), then=self._catch_up)

    def _answer_preempt(self, body: bytes) -> tuple[str, Answer]:
        result = self._preempt(_read(_preemption_args.decode, "preempt", body))
        return "ok" if result.NodeNameToMetaVictims else "rejected", Answer(200, _encode(result))

    def _answer_bind(self, body: bytes) -> tuple[str, Answer]:
        refusal = self._bind(_read(_bind_args.decode, "bind", body))
        self._metrics.bound(refusal.reason if refusal else None)
        if refusal is None:
            return "ok", Answer(200, _encode(BindResult()))
        _log.warning(refusal.sentence, verb="bind", reason=str(refusal.reason))
        # behind a Service the next connection goes to the one that may bind, and not before
        last = refusal.reason is Reason.NOT_WRITER
        return "rejected", Answer(200, _encode(BindResult(Error=refusal.sentence)), last=last)


def _read(decode: Callable[[bytes], T], verb: str, body: bytes) -> T:
    try:
        return decode(body)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise BodyError(f"{verb}: the request is not what kube-scheduler sends: {error}") from error


def _told(verb: str, error: BodyError) -> str:
    if verb != "filter" or error.status != TOO_LARGE:
        return str(error)
    return f"{error}; set nodeCacheCapable: true, so that kube-scheduler sends names instead of whole nodes"


def _unusable(verb: str, sentence: str, status: int) -> Answer:
    if verb == "filter":
        return Answer(200, _encode(FilterResult(NodeNames=[], Error=sentence)))
    if verb == "bind":
        return Answer(200, _encode(BindResult(Error=sentence)))
    return Answer(status, f"{sentence}\n".encode(), TEXT)
