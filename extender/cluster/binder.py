"""Write Bindings, and find out what became of those whose answer was lost."""

import random
import threading
import time
from collections.abc import Callable

import msgspec
import structlog

from cotenant.cluster import Cluster, ClusterError, Conflict, NotFound, TooManyRequests, writes
from cotenant.cluster.backoff import Backoff
from cotenant.contract.names import Names
from cotenant.contract.pods import Pod
from cotenant.contract.reasons import Reason
from cotenant.threads import Threads
from extender.cluster import pods
from extender.cluster.writership import Sole, Writer
from extender.ledger import Hold, Ledger, Stage
from extender.verbs.bind import Refusal
from extender.verbs.wire import BindArgs

_log = structlog.get_logger(__name__)

# One request may take this long; a bind tries again until its own, longer, limit.
_REQUEST_SECONDS = 4.0


# How many Bindings are on their way at once. kube-scheduler binds without a limit, but waits for each filter: with a
# hundred binds beside it a filter had to wait for the interpreter behind all of them.
AT_ONCE = 16
_THREAD = "settle bindings"


class _Doubt(msgspec.Struct, frozen=True):
    """Be the outcome of a Binding that may or may not have been written."""

    why: str


class _Busy(_Doubt, frozen=True):
    """Be a Binding that was certainly not written, as there was no room for it; it is tried again after so long."""

    retry_after: float = 0.0


class _Unsettled(msgspec.Struct, frozen=True):
    """Hold a Binding in doubt that kube-scheduler was told has failed."""

    args: BindArgs
    annotations: dict[str, str]
    hold: Hold


class Binder:
    """Write Bindings; settle in the background those that stay in doubt.

    The one way to settle a Binding for certain is to send it again: it has the pod's UID, so the API server takes it at
    most once, and its next answer (done, bound already, gone) is also the fate of the first. A GET alone would not do:
    the first one may still be on its way.
    """

    def __init__(
        self,
        cluster: Cluster,
        ledger: Ledger,
        *,
        names: Names,
        bind_timeout: float,
        writer: Writer | None = None,
        clock: Callable[[], float] = time.monotonic,
        threads: Threads | None = None,
    ) -> None:
        self._cluster = cluster
        self._ledger = ledger
        self._names = names
        self._writer = writer or Sole()
        self._bind_timeout = bind_timeout
        self._clock = clock
        self._room = threading.Semaphore(AT_ONCE)
        self._stopping = threading.Event()
        self._wake = threading.Event()
        self._unsettled: dict[str, _Unsettled] = {}
        # of the thread alone
        self._pauses = _backoff()
        self._threads = threads or Threads()
        self._thread = self._threads.of(_THREAD, self._turn)
        self._thread.start()

    def hurry(self) -> None:
        """Send no Binding again: what is in doubt now is told by the first LIST after the next start."""
        self._stopping.set()
        self._wake.set()

    def stop(self) -> None:
        """End the settling, too."""
        self.hurry()
        self._thread.join(_REQUEST_SECONDS)

    def unsettled(self) -> int:
        """Count the Bindings in doubt."""
        return len(self._unsettled)

    def deadline(self) -> float:
        """Say until when a bind that begins now may take."""
        return self._clock() + self._bind_timeout

    def bind(
        self, args: BindArgs, annotations: dict[str, str], hold: Hold | None, *, deadline: float, again: bool = False
    ) -> Refusal | None:
        """Write the Binding; confirm or forget *hold* where the outcome is certain, keep it where it is not.

        *again* says that the same Binding was sent before and its outcome is in doubt.
        """
        backoff: Backoff | None = None
        while True:
            outcome = self._once(args, annotations, hold, deadline, again=again)
            if not isinstance(outcome, _Doubt):
                return outcome
            again = again or not isinstance(outcome, _Busy)
            # made when it is needed, as it asks the kernel for randomness
            backoff = backoff or _backoff()
            delay = max(backoff.next(), outcome.retry_after if isinstance(outcome, _Busy) else 0.0)
            _log.warning(
                "binding in doubt" if again else "binding put off",
                pod=args.key,
                pod_uid=args.PodUID,
                node=args.Node,
                why=outcome.why,
            )
            if self._clock() + delay >= deadline or self._stopping.wait(delay):
                break
        if not again:
            self._ledger.forget(args.PodUID)
            return Refusal.of(args, Reason.API_ERROR, outcome.why)
        if hold is not None:
            self._unsettled[args.PodUID] = _Unsettled(args, annotations, hold)
            self._wake.set()
        return Refusal.of(args, Reason.UNSETTLED, outcome.why)

    def read(self, args: BindArgs, *, deadline: float) -> Pod | Refusal:
        """Read the pod as it is now; another pod of the same name is not it."""
        try:
            pod = self._get(args, deadline)
        except ClusterError as error:
            return Refusal.of(args, Reason.API_ERROR, str(error))
        return pod if pod is not None else Refusal.of(args, Reason.POD_GONE)

    def _once(
        self, args: BindArgs, annotations: dict[str, str], hold: Hold | None, deadline: float, *, again: bool
    ) -> Refusal | _Doubt | None:
        """Send the Binding once, by *deadline*, and settle *hold* by the answer."""
        if not self._room.acquire(timeout=max(0.0, deadline - self._clock())):
            return _Busy(f"{AT_ONCE} other Bindings are on their way, and none has been answered in time")
        try:
            if self._clock() >= deadline:
                # What took all the time is an API server that would hardly answer this one at once: better a pod that
                # is certainly not bound than one in doubt.
                return _Busy("all of bindTimeout went by before its Binding could be sent")
            return self._in_our_term(args, annotations, hold, deadline, again=again)
        finally:
            self._room.release()

    def _in_our_term(
        self, args: BindArgs, annotations: dict[str, str], hold: Hold | None, deadline: float, *, again: bool
    ) -> Refusal | _Doubt | None:
        token = self._writer.token()
        if token is not None:
            # Looked at after the token: when a term begins, what earlier ones assumed is forgotten before there is one.
            # The GPU may be another pod's by now.
            if hold is not None and self._kept(hold) is None:
                return Refusal.of(args, Reason.UNSETTLED, "what was kept for it was given back meanwhile")
            return self._send(args, annotations, hold, token, deadline, again=again)
        # What we are not to bind now another one may: only the watch, or our next term, can tell of an earlier try.
        if again:
            return _Doubt(Reason.NOT_WRITER.sentence)
        self._ledger.forget(args.PodUID)
        return Refusal.of(args, Reason.NOT_WRITER)

    def _send(
        self,
        args: BindArgs,
        annotations: dict[str, str],
        hold: Hold | None,
        token: str,
        deadline: float,
        *,
        again: bool,
    ) -> Refusal | _Doubt | None:
        # what carries no grant takes no memory, and needs no fence
        fenced = bool(token) and hold is not None
        try:
            writes.bind(
                self._cluster,
                namespace=args.PodNamespace,
                name=args.PodName,
                uid=args.PodUID,
                node=args.Node,
                annotations={**annotations, self._names.writer: token} if fenced else annotations,
                labels={self._names.granted: "true"} if fenced else None,
                timeout=self._left(deadline),
            )
        except TooManyRequests as error:
            return _Busy(str(error), error.retry_after or 0.0)
        except Conflict as error:
            return self._conflict(args, hold, error, deadline, again=again)
        except ClusterError as error:
            # That this one was turned away at the door (403, nobody there) tells nothing of an earlier one. That the
            # pod is gone does.
            if error.outcome_unknown or (again and not isinstance(error, NotFound)):
                return _Doubt(str(error))
            self._ledger.forget(args.PodUID)
            if isinstance(error, NotFound):
                return Refusal.of(args, Reason.POD_GONE)
            return Refusal.of(args, Reason.API_ERROR, str(error))
        self._ledger.confirm(args.PodUID)
        return None

    def _conflict(
        self, args: BindArgs, hold: Hold | None, error: Conflict, deadline: float, *, again: bool
    ) -> Refusal | _Doubt | None:
        """Tell a pod that has its node already from one that cannot get any; the 409s differ by their words alone."""
        try:
            pod = self._get(args, deadline)
        except ClusterError as unread:
            return _Doubt(f"{error}; and then: {unread}")
        if pod is None:
            self._ledger.forget(args.PodUID)
            return Refusal.of(args, Reason.POD_GONE)
        if not pod.spec.node_name:
            # An earlier one may still be on its way, unless nothing can bind the pod any more.
            if again and pod.metadata.deletion_timestamp is None:
                return _Doubt(str(error))
            self._ledger.forget(args.PodUID)
            return Refusal.of(args, Reason.API_ERROR, str(error))
        # What it was bound with is what counts, be it ours, of an extender before us, or none.
        self._ledger.settle(pod)
        if pod.spec.node_name == args.Node and (hold is None or hold.grant in pod.annotations.values()):
            return None
        return Refusal.of(args, Reason.BOUND_ELSEWHERE, f"{Reason.BOUND_ELSEWHERE.sentence} to {pod.spec.node_name}")

    def _kept(self, hold: Hold) -> Hold | None:
        """Give *hold* as the ledger has it now; None where it was given back, whatever the pod holds since."""
        now = self._ledger.hold(hold.uid)
        return now if now is not None and (now.grant, now.node) == (hold.grant, hold.node) else None

    def _left(self, deadline: float) -> float:
        """Say for how many seconds a request may wait for its answer; one that is sent at all may wait a little."""
        return max(0.1, min(_REQUEST_SECONDS, deadline - self._clock()))

    def _get(self, args: BindArgs, deadline: float) -> Pod | None:
        return pods.read(
            self._cluster,
            namespace=args.PodNamespace,
            name=args.PodName,
            uid=args.PodUID,
            timeout=self._left(deadline),
        )

    def _turn(self) -> bool:
        if not (self._unsettled or self._stopping.is_set()):
            self._wake.wait()
            self._wake.clear()
            self._pauses = _backoff()
        if self._stopping.wait(self._pauses.next()):
            return False
        for uid, doubt in list(self._unsettled.items()):
            # one that cannot be settled keeps none of the others from it
            with self._threads.surviving(_THREAD):
                self._settle(uid, doubt)
        return True

    def _settle(self, uid: str, doubt: _Unsettled) -> None:
        held = self._kept(doubt.hold)
        over = held is None or held.stage is Stage.BOUND
        if over or not isinstance(
            self._once(doubt.args, doubt.annotations, doubt.hold, self._clock() + _REQUEST_SECONDS, again=True), _Doubt
        ):
            self._unsettled.pop(uid, None)
            _log.info("binding settled", pod=doubt.args.key, pod_uid=uid, node=doubt.args.Node)


def _backoff() -> Backoff:
    return Backoff(random.Random(), shortest=0.1, longest=5.0)  # noqa: S311 - spreads load, guards nothing
