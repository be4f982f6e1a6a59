"""Read the ledger for people: nodes with their GPUs, pods, and why one of them waits.

Whoever asks waits for whoever asked before: many readers together cost kube-scheduler's filter no more than one.
"""

import threading
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import NamedTuple, TypeAlias

import msgspec

from cotenant.contract import grant as grants
from cotenant.contract.inventory import Health
from cotenant.contract.pods import Pod
from cotenant.contract.reasons import Reason
from cotenant.contract.request import PodRequest, RequestError
from extender.inspect.destination import Judging, destination
from extender.inspect.explain import counts, explain, node_verdict
from extender.inspect.gpus import free_of, node_row
from extender.inspect.holdings import Holdings, Lasts, not_told, state_of
from extender.inspect.rows import (
    Expected,
    MixPage,
    NamespacePage,
    NodePage,
    NodeRow,
    PodExplanation,
    PodPage,
    PodRow,
    State,
    Totals,
)
from extender.inspect.tenancy import tenancy
from extender.ledger import Hold, Ledger, NodeView, Waiting
from extender.policies.table import MILLI
from extender.used import Used

# Judged at a time: kube-scheduler's next filter waits for the judge meanwhile.
_PIECE = 250
# Pods that ask alike are judged once; of more different sizes than this on one page the rest are not.
_SHAPES = 16
_HELD_UP = "about to be scheduled, or something else holds it up; see the events of kubectl describe pod"


class _Ungranted(NamedTuple):
    uid: str
    key: str


_Entry: TypeAlias = Hold | Waiting | _Ungranted


class Inspector:
    """Read the ledger for people; safe to use from many threads."""

    def __init__(
        self,
        ledger: Ledger,
        judge: Judging,
        *,
        used: Used | None = None,
        lasts: Lasts = not_told,
    ) -> None:
        """Read what is *used* of GPUs, too, and how long promises last."""
        self._ledger = ledger
        self._judge = judge
        self._used = used
        self._holdings = Holdings(ledger, lasts)
        self._lock = threading.Lock()

    def mix(self) -> MixPage:
        """List the pods that policies expect; memory is as exact as a thousandth of the largest GPU is."""
        mix, largest = self._judge.mix, self._judge.largest_bytes
        return MixPage(
            pinned=self._judge.pinned,
            items=tuple(
                Expected(
                    percent=round(100 * frequency, 2),
                    gpus=kind.gpus,
                    memory_bytes=kind.share_milli * largest // MILLI,
                    cpu_milli=kind.cpu_milli,
                    models=kind.models,
                    alone=kind.alone,
                )
                for kind, frequency in zip(mix.classes, mix.frequencies, strict=True)
            ),
        )

    def namespaces(self, *, limit: int, after: str = "", query: str = "") -> NamespacePage:
        """List namespaces that have limits or whose pods hold anything, those whose name contains *query*."""
        return tenancy(self._ledger.uses(), self._judge.tenants, limit=limit, after=after, query=query)

    def nodes(self, *, limit: int, after: str = "", query: str = "", everything: bool = False) -> NodePage:
        """List nodes whose name, model, problem or health contains *query*.

        Nodes that publish no inventory, as those without GPUs, are left out unless *everything* is asked for.
        """
        with self._lock:
            views = self._ledger.views()
            wanted = sorted((v for v in views if everything or _has_gpus(v)), key=lambda view: view.name)
            found = [view for view in wanted if view.name > after and _mentions(view, query.lower())]
            page = found[:limit]
            having = self._holdings.having({view.name for view in page})
            return NodePage(
                cluster=self._totals(views),
                items=tuple(node_row(view, having, self._used_of(view)) for view in page),
                remaining=len(found) - len(page),
                continue_=page[-1].name if len(found) > len(page) else "",
            )

    def node(self, name: str) -> NodeRow | None:
        """Show one node; None where the API server has none of that name."""
        view = self._ledger.view(name)
        with self._lock:
            return None if view is None else node_row(view, self._holdings.having({name}), self._used_of(view))

    def pods(
        self, *, limit: int, after: str = "", query: str = "", namespace: str = "", state: State | None = None
    ) -> PodPage:
        """List pods whose name, namespace or node contains *query*, of one namespace or state if so asked."""
        query = query.lower()
        with self._lock:
            entries = sorted(
                (
                    (f"{one.key}/{one.uid}", one)
                    for one in self._entries(state)
                    if (not namespace or one.key.startswith(f"{namespace}/"))
                    and (not query or query in one.key.lower() or query in _node_of(one))
                ),
                key=itemgetter(0),
            )
            entries = entries[bisect_right(entries, after, key=itemgetter(0)) :]
            page = entries[:limit]
            rows = self._with_reasons([self._row(one) for _, one in page])
            last = page[-1][0] if len(entries) > len(page) else ""
            return PodPage(items=tuple(rows), remaining=len(entries) - len(page), continue_=last)

    def explain(self, namespace: str, name: str, *, limit: int, start: int = 0) -> PodExplanation | None:
        """Explain a pod, with *limit* nodes from the *start*-th on; None where no pod of that name asks for ours."""
        key = f"{namespace}/{name}"
        with self._lock:
            found = [one for one in self._entries() if one.key == key]
            if not found:
                return None
            # of a pod that ends and its namesake that waits, the one that waits is asked about
            asked = max(found, key=lambda one: (isinstance(one, Waiting), one.uid))
            pod = self._row(asked)
            waiting = self._ledger.waiting(asked.uid)
            if pod.state is not State.WAITING or waiting is None:
                return PodExplanation(pod=pod, summary=_placed(pod))
            if isinstance(waiting.request, RequestError):
                return PodExplanation(pod=pod, summary=f"no node can help: {pod.sentence}")
            return self._explain(pod, waiting.request, limit, start)

    def simulate(self, pod: Pod, *, limit: int) -> PodExplanation | None:
        """Explain a pod that is not there, and say where it would go; None where it asks nothing of ours."""
        with self._lock:
            try:
                request = self._judge.request(pod)
            except RequestError as error:
                row = _waiting_row(Waiting("", pod.key, error))
                return PodExplanation(pod=row, simulated=True, summary=f"no node can help: {error}")
            if request is None:
                return None
            told = self._explain(_waiting_row(Waiting("", pod.key, request)), request, limit, 0)
            views = [view for view in self._ledger.views() if _is_well(view, request)]
            summary = destination(request, pod.metadata.namespace, views, self._judge) if told.fitting else told.summary
            return msgspec.structs.replace(told, simulated=True, summary=summary)

    def _explain(self, pod: PodRow, request: PodRequest, limit: int, start: int) -> PodExplanation:
        try:
            self._judge.policy(request)
            request = self._judge.tenants.hold(pod.namespace, request)
        except RequestError as error:
            said = msgspec.structs.replace(pod, reason=error.reason, sentence=str(error))
            return PodExplanation(pod=said, summary=f"no node can help: {error}")
        excess = self._judge.excess(pod.namespace, request)
        if excess is not None:
            said = msgspec.structs.replace(pod, reason=Reason.NAMESPACE_LIMIT, sentence=excess.sentence)
            return PodExplanation(
                pod=said, summary=f"no node can help before others of its namespace end: {excess.sentence}"
            )
        views = [view for view in self._ledger.views() if _has_gpus(view)]
        names = [view.name for view in views]
        verdicts = dict(zip(names, self._verdicts(request, names, pod.namespace), strict=True))
        told = explain(request, views, verdicts, [*self._ledger.holds(), *self._ledger.promises()])
        page = told.order[start : start + limit]
        left = max(0, len(told.order) - start - len(page))
        if told.fitting:
            where = ", ".join(told.fitting[:3]) + (", ..." if len(told.fitting) > 3 else "")  # noqa: PLR2004 - a few
            summary = (
                f"its GPU memory fits on {len(told.fitting)} of {len(names)} GPU nodes ({where}): it is {_HELD_UP}"
            )
        elif not names:
            summary = "no node publishes a GPU inventory: is the device plugin running?"
        else:
            summary = counts(verdicts.values())
        first = told.reasons[0].reason if told.reasons and not told.fitting else None
        if pod.promise is not None:
            summary = f"{pod.promise.sentence}; {summary}"
        return PodExplanation(
            pod=msgspec.structs.replace(pod, reason=first, sentence=first.sentence if first else ""),
            summary=summary,
            fitting=len(told.fitting),
            reasons=told.reasons,
            changes=told.changes,
            kept=() if told.fitting else self._holdings.kept_for_others(pod.uid, set(names)),
            nodes=tuple(node_verdict(view, reason, request) for view, reason in page),
            remaining=left,
            continue_=str(start + len(page)) if left else "",
        )

    def _verdicts(self, request: PodRequest, names: list[str], namespace: str) -> list[float | Reason]:
        verdicts: list[float | Reason] = []
        for first in range(0, len(names), _PIECE):
            verdicts += self._judge.judge(request, names[first : first + _PIECE], namespace=namespace)
        return verdicts

    def _with_reasons(self, rows: Iterable[PodRow]) -> Iterator[PodRow]:
        """Add to pods that wait how many nodes refuse them for which reason."""
        names = [view.name for view in self._ledger.views() if _has_gpus(view)]
        known: dict[object, tuple[Reason | None, str]] = {}
        for row in rows:
            waiting = self._ledger.waiting(row.uid) if row.state is State.WAITING and row.reason is None else None
            if waiting is None or isinstance(waiting.request, RequestError):
                yield row
                continue
            # namespaces with limits may have less of the same
            limited = row.namespace if self._judge.tenants.of(row.namespace) is not None else ""
            shape = limited, waiting.request.shape
            if shape not in known and len(known) < _SHAPES:
                try:
                    request = self._judge.tenants.hold(row.namespace, waiting.request)
                    verdicts = self._verdicts(request, names, row.namespace)
                except RequestError as error:
                    known[shape] = error.reason, str(error)
                else:
                    refused = Counter(verdict for verdict in verdicts if isinstance(verdict, Reason))
                    every = refused.total() == len(verdicts)
                    first = refused.most_common(1)[0][0] if refused and every else None
                    said = counts(verdicts) if verdicts else "no node publishes a GPU inventory"
                    if verdicts and not every:
                        said = f"fits on {len(verdicts) - refused.total()} of {len(verdicts)} nodes: {_HELD_UP}"
                    known[shape] = first, said
            reason, sentence = known.get(shape, (None, ""))
            said = row.promise.sentence if row.promise is not None else sentence
            yield msgspec.structs.replace(row, reason=reason, sentence=said)

    def _entries(self, state: State | None = None) -> list[_Entry]:
        """List every pod of ours, of one state if so asked, cheaply: rows are made of those on a page alone."""
        holds = self._ledger.holds() if state is not State.UNGRANTED else []
        found: list[_Entry] = []
        if state is not State.WAITING:
            found += [hold for hold in holds if state is None or state_of(hold) is state]
        if state in {None, State.WAITING}:
            held = {hold.uid for hold in holds}
            found += [waiting for waiting in self._ledger.all_waiting() if waiting.uid not in held]
        if state in {None, State.UNGRANTED}:
            found += [_Ungranted(uid, key) for uid, key in self._ledger.ungranted().items()]
        return found

    def _row(self, one: _Entry) -> PodRow:
        if isinstance(one, Hold):
            return self._held_row(one)
        if not isinstance(one, Waiting):
            return _ungranted_row(one.uid, one.key)
        promised = self._ledger.promised(one.uid)
        row = _waiting_row(one)
        return row if promised is None else msgspec.structs.replace(row, promise=self._holdings.promise(promised))

    def _held_row(self, hold: Hold) -> PodRow:
        namespace, _, name = hold.key.partition("/")
        try:
            enforced = {container.isolation.enforced_by for container in grants.decode(hold.grant).containers}
        except grants.GrantError:
            enforced = set()
        return PodRow(
            namespace=namespace,
            name=name,
            uid=hold.uid,
            state=state_of(hold),
            node=hold.node,
            gpus=self._holdings.shares(hold),
            enforced_by=", ".join(sorted(enforced)),
            reason=Reason.BAD_GRANT if hold.problem else None,
            sentence=hold.problem,
        )

    def _used_of(self, view: NodeView) -> Mapping[str, int]:
        return self._used.of(view.name) if self._used is not None and _tells(view) else {}

    def _totals(self, views: Sequence[NodeView]) -> Totals:
        states = [(view, state) for view in views for state in view.states]
        free = [free_of(state) for view, state in states if view.problem_of(state) is None and state.healthy]
        # instances have places of their own: a MIG GPU's free memory is no one piece
        pieces = [state.free_bytes for view in views if view.problem is None for state in view.healthy]
        shared = any(view.gpus for view in views)
        bare = sum(not _has_gpus(view) for view in views)
        holds = self._ledger.holds()
        held = {hold.uid for hold in holds}
        used = [self._used.sums(view.name) for view in views if _tells(view)] if self._used is not None else []
        return Totals(
            nodes=len(views) - bare,
            nodes_with_problems=sum(view.problem is not None for view in views) - bare,
            nodes_without_inventory=bare,
            gpus=len(states),
            unhealthy_gpus=sum(state.gpu.health is not Health.HEALTHY for _, state in states),
            fenced_gpus=sum(state.gpu.fenced for _, state in states),
            usable_bytes=sum(state.gpu.usable_bytes for _, state in states),
            held_bytes=sum(state.held_bytes for _, state in states),
            free_bytes=sum(free),
            largest_free_block_bytes=max(pieces, default=0) if shared else None,
            pods=len(holds),
            waiting=sum(waiting.uid not in held for waiting in self._ledger.all_waiting()),
            used_bytes=sum(amount for amount, _ in used),
            used_gpus=sum(gpus for _, gpus in used),
        )


def _node_of(one: _Entry) -> str:
    return one.node.lower() if isinstance(one, Hold) else ""


def _waiting_row(waiting: Waiting) -> PodRow:
    namespace, _, name = waiting.key.partition("/")
    row = PodRow(namespace=namespace, name=name, uid=waiting.uid, state=State.WAITING)
    if isinstance(waiting.request, RequestError):
        return msgspec.structs.replace(row, reason=waiting.request.reason, sentence=str(waiting.request))
    return msgspec.structs.replace(row, asks=waiting.request.describe())


def _ungranted_row(uid: str, key: str) -> PodRow:
    namespace, _, name = key.partition("/")
    return PodRow(
        namespace=namespace,
        name=name,
        uid=uid,
        state=State.UNGRANTED,
        reason=Reason.NO_GRANT,
        sentence=Reason.NO_GRANT.sentence,
    )


def _placed(pod: PodRow) -> str:
    if pod.state is State.UNGRANTED:
        return f"it is bound, but {pod.sentence}: delete it and create it again without spec.nodeName"
    if pod.reason is not None:
        return f"it is bound to {pod.node}, but {pod.sentence}"
    what = ", ".join(share.sentence for share in pod.gpus)
    doing = "is being bound to" if pod.state is State.BINDING else "is bound to"
    return f"it {doing} {pod.node} and holds {what}"


def _is_well(view: NodeView, request: PodRequest) -> bool:
    """Tell whether the node gives what *request* asks, memory or MIG instances: a kubelet may lack one of them."""
    return (view.mig_problem if request.profiles else view.problem) is None


def _tells(view: NodeView) -> bool:
    """Tell whether there is a device plugin to say what is used; what one said that has gone is old."""
    return view.problem not in {Reason.PLUGIN_GONE, Reason.NO_INVENTORY}


def _has_gpus(view: NodeView) -> bool:
    return view.problem is not Reason.NO_INVENTORY


def _mentions(view: NodeView, query: str) -> bool:
    if not query or query in view.name.lower() or (view.problem is not None and query in view.problem.lower()):
        return True
    return any(query in state.gpu.model.lower() or query == state.gpu.health for state in view.states)
