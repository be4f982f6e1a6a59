"""bind: choose the GPUs, reserve them, and write node and grant into the pod in one call."""

import threading
from collections.abc import Callable
from typing import Protocol, Self

import msgspec

from cotenant.contract import grant as grants
from cotenant.contract.environment import read_by_admission
from cotenant.contract.names import Names
from cotenant.contract.pods import Pod
from cotenant.contract.reasons import Reason
from cotenant.contract.request import PodRequest, RequestError
from extender.ledger import Hold, Ledger, NodeView, Stage, Use
from extender.placement.fit import choosing
from extender.verbs.expected import Expected
from extender.verbs.judge import Judge
from extender.verbs.wire import BindArgs


class Refusal(msgspec.Struct, frozen=True):
    """Say why a bind did not happen; the sentence names the pod and the node."""

    reason: Reason
    sentence: str

    @classmethod
    def of(cls, args: BindArgs, reason: Reason, detail: str = "") -> Self:
        """Refuse one bind; *detail* says more than the reason's own sentence."""
        return cls(reason, f"pod {args.key} was not bound to node {args.Node}: {detail or reason.sentence}")


class Binder(Protocol):
    """Write Bindings and find out what became of them."""

    def deadline(self) -> float:
        """Say until when a bind that begins now may take, by a clock that read() and bind() share."""

    def bind(
        self, args: BindArgs, annotations: dict[str, str], hold: Hold | None, *, deadline: float, again: bool = False
    ) -> Refusal | None:
        """Write the Binding; confirm or forget *hold* where the outcome is certain, keep it where it is not.

        *again* says that the same Binding was sent before and its outcome is in doubt.
        """

    def read(self, args: BindArgs, *, deadline: float) -> Pod | Refusal:
        """Read the pod as it is now."""


class Bind:
    """Answer bind."""

    def __init__(
        self,
        ledger: Ledger,
        judge: Judge,
        binder: Binder,
        names: Names,
        *,
        synced: Callable[[], bool],
        writing: Callable[[], bool] = lambda: True,
        heard: Callable[[str, PodRequest], None] = lambda _uid, _request: None,
        expected: Expected | None = None,
    ) -> None:
        self._ledger = ledger
        self._judge = judge
        self._binder = binder
        self._names = names
        self._synced = synced
        # whether this extender is the one that may bind; may wait a little for the end of a take-over
        self._writing = writing
        self._heard = heard
        self._expected = expected or Expected()
        self._lock = threading.Lock()
        self._under_way: set[str] = set()

    def __call__(self, args: BindArgs) -> Refusal | None:
        """Bind the pod; None is a success. Called again after one, succeed again and write nothing."""
        if not self._synced():
            return Refusal.of(args, Reason.CACHE_NOT_SYNCED)
        # all that follows has one, the wait for a take-over too
        deadline = self._binder.deadline()
        if not self._writing():
            return Refusal.of(args, Reason.NOT_WRITER)
        # kube-scheduler may give up on a bind that is still under way and send it again. Two of one pod at a time could
        # undo each other's reservation, each certain of its own answer alone.
        with self._lock:
            if args.PodUID in self._under_way:
                return Refusal.of(args, Reason.UNSETTLED)
            self._under_way.add(args.PodUID)
        try:
            return self._bind(args, deadline)
        finally:
            with self._lock:
                self._under_way.discard(args.PodUID)

    def _bind(self, args: BindArgs, deadline: float) -> Refusal | None:
        hold = self._ledger.hold(args.PodUID)
        if hold is None:
            try:
                reserved = self._reserve(args, deadline)
            finally:
                self._expected.came(args.PodUID)
            if reserved is None:
                return self._binder.bind(args, {}, None, deadline=deadline)
            if isinstance(reserved, Refusal):
                return reserved
            hold, granted = reserved
            return self._binder.bind(args, self._annotations(hold, granted), hold, deadline=deadline)
        if hold.node != args.Node:
            return Refusal.of(args, Reason.UNSETTLED if hold.stage is Stage.ASSUMED else Reason.BOUND_ELSEWHERE)
        if hold.stage is Stage.BOUND:
            return self._bound(args, hold, deadline)
        # the outcome of an earlier bind is in doubt: the same Binding again finds out
        told = self._annotations(hold, grants.decode(hold.grant))
        return self._binder.bind(args, told, hold, deadline=deadline, again=True)

    def _annotations(self, hold: Hold, granted: grants.Grant) -> dict[str, str]:
        return {self._names.grant: hold.grant, **read_by_admission(granted, self._names)}

    def _bound(self, args: BindArgs, hold: Hold, deadline: float) -> Refusal | None:
        """Find out whether a pod that was bound here is bound still, not undone by an API server with an old backup."""
        pod = self._binder.read(args, deadline=deadline)
        if isinstance(pod, Refusal):
            return pod
        if pod.spec.node_name:
            return None
        self._ledger.undo(hold, pod)
        return self._bind(args, deadline)

    def _reserve(self, args: BindArgs, deadline: float) -> tuple[Hold, grants.Grant] | Refusal | None:
        """Reserve GPUs for the pod, and say which; None where it asks nothing of ours and needs none."""
        try:
            request = self._request(args, deadline)
            if request is None or isinstance(request, Refusal):
                return request
            prefer, aim = self._judge.preference(request, args.Node), self._judge.aim(request, args.Node)
        except RequestError as error:
            return Refusal.of(args, error.reason, str(error))

        fitting = choosing(request, prefer, aim)
        granted: list[grants.Grant] = []

        def choose(view: NodeView) -> grants.Grant | Refusal:
            chosen = fitting(view)
            if isinstance(chosen, Reason):
                return Refusal.of(args, chosen)
            granted.append(chosen)
            return chosen

        def limit(hold: Hold, use: Use) -> Refusal | None:
            excess = self._judge.tenants.exceeded_by(hold, use)
            return None if excess is None else Refusal.of(args, Reason.NAMESPACE_LIMIT, excess.sentence)

        if self._ledger.view(args.Node) is None:
            return Refusal.of(args, Reason.UNKNOWN_NODE)
        try:
            outcome = self._ledger.assume(args.PodUID, args.key, args.Node, choose, request.compute, limit=limit)
        except ValueError as error:  # the node went, or another bind of the same pod came first
            return Refusal.of(args, Reason.UNSETTLED, str(error))
        if isinstance(outcome, Refusal):
            return outcome
        self._heard(args.PodUID, request)
        self._judge.bound(args.PodUID, request)
        return outcome, granted[0]

    def _request(self, args: BindArgs, deadline: float) -> PodRequest | Refusal | None:
        waiting = self._ledger.waiting(args.PodUID)
        if waiting is not None:
            if isinstance(waiting.request, RequestError):
                raise waiting.request.anew()
            return self._judge.tenants.hold(args.PodNamespace, waiting.request)
        # The watch has not shown the pod yet, though kube-scheduler's has, or it is not ours at all.
        pod = self._binder.read(args, deadline=deadline)
        if isinstance(pod, Refusal):
            return pod
        request = self._judge.request(pod)
        if request is not None and pod.spec.node_name:
            why = f"{Reason.BOUND_ELSEWHERE.sentence} to {pod.spec.node_name}"
            return Refusal.of(args, Reason.BOUND_ELSEWHERE, why)
        return request
