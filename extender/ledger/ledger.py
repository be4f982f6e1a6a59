"""Who holds what: every GPU of the cluster, what is held of it, and what is about to be.

A pod's hold::

      assume           confirm: the API server said 201, or the watch showed it
    o --------> ASSUMED -----------------------------------------------> BOUND
    ^             |                                                        |
    |             | forget: the API server refused the Binding             | the pod is gone, or has Succeeded or Failed
    +-------------+--------------------------------------------------------+

An ASSUMED hold whose Binding got no answer stays until the watch or the API server tells its fate: no clock ends it.
A pod seen bound needs no assumption before it (another extender, or this one before a restart, made that).

A waiting pod for which others were evicted is promised what they leave: nobody else is given it, and the pod itself
sees its node without the promise. A promise ends when it is kept, when the pod is gone, or when it is released.

What the ledger promises:

- The sum of what is held of a GPU stays within its usable bytes, as long as nobody else writes grants.
- Everything is rebuilt from nodes and pods alone; observing the same objects in any order ends in the same state.
- One unreadable node or pod changes nothing for the others.
"""

import threading
from collections.abc import Callable, Collection, Iterable
from sys import intern
from typing import Literal, TypeVar

import msgspec

from cotenant.contract import grant as grants
from cotenant.contract.compute import NOTHING, Compute, requests
from cotenant.contract.names import Names
from cotenant.contract.pods import Pod
from cotenant.contract.request import RequestError, parse
from extender.ledger import holds
from extender.ledger.account import Account
from extender.ledger.slots import check_slots
from extender.ledger.trial import Trial
from extender.ledger.ungranted import Ungranted
from extender.ledger.uses import Uses
from extender.ledger.values import Hold, Node, NodeView, Stage, Use, Waiting
from extender.ledger.views import Views

R = TypeVar("R")


class Ledger:
    """Keep who holds what of every GPU; safe to use from many threads."""

    def __init__(self, names: Names, unit_bytes: int, *, labels: Collection[str] = ()) -> None:
        """Make an empty one, that keeps those of a node's *labels*."""
        self._labels = frozenset(labels)
        self._names = names
        self._unit_bytes = unit_bytes
        self._lock = threading.RLock()
        self._accounts: dict[str, Account] = {}
        self._views = Views(self._lock, lambda node: self._accounts[node].view())
        self._holds: dict[str, Hold] = {}
        self._uses = Uses()
        # by UID; counted of their nodes while the pod holds nothing
        self._promises: dict[str, Hold] = {}
        self._waiting: dict[str, Waiting] = {}
        # what every bound pod takes of its node, by UID: those that ask nothing of ours too
        self._residents: dict[str, tuple[str, Compute]] = {}
        self._ungranted = Ungranted(self._cuts)
        self._sequence = 0

    # --- what others ask ---

    def view(self, node: str) -> NodeView | None:
        """Show the node called *node*, or None where the API server has none."""
        return self._views.get(node)

    def views(self) -> list[NodeView]:
        """Show all nodes as they are now."""
        return self._views.all()

    def without(self, node: str, uids: Collection[str]) -> NodeView | None:
        """Show the node as it would be without the pods of those UIDs, or None where the API server has none."""
        trial = self.trial(node, uids)
        return None if trial is None else trial.without(uids)

    def trial(self, node: str, uids: Collection[str]) -> Trial | None:
        """Let any of the pods of those UIDs be taken off the node as it is now; None where the API server has none."""
        with self._lock:
            account = self._accounts.get(node)
            if account is None or account.read_from is None:
                return None
            held = {uid: self._holds.get(uid) or self._promises.get(uid) for uid in uids}
            residents = {uid: self._residents[uid] for uid in uids if uid in self._residents}
            return Trial(
                account.copied(),
                {uid: hold for uid, hold in held.items() if hold is not None and hold.node == node},
                {uid: compute for uid, (where, compute) in residents.items() if where == node},
            )

    def changed_so_far(self) -> int:
        """Count the changes of all nodes' views until now, to ask changes() with later."""
        return self._views.changes_so_far

    def changes(self, since: int) -> tuple[int, list[str] | None]:
        """Name the nodes whose view has changed after so many changes, and say how many there are by now.

        None instead of names when that is too long ago to tell: any node may have changed. A view read after this call
        is at least as new as the number it gave.
        """
        return self._views.changes(since)

    def hold(self, uid: str) -> Hold | None:
        """Show what the pod of that UID holds."""
        return self._holds.get(uid)

    def holds(self) -> list[Hold]:
        """Show all holds as they are now."""
        with self._lock:
            return list(self._holds.values())

    def use_of(self, namespace: str) -> Use:
        """Say what the pods of a namespace hold, bound or assumed."""
        return self._uses.of(namespace)

    def uses(self) -> dict[str, Use]:
        """Say it of every namespace whose pods hold anything."""
        with self._lock:
            return self._uses.all()

    def takes(self, uid: str) -> Compute:
        """Say what CPU and memory the bound or assumed pod of that UID takes of its node; nothing for others."""
        _, compute = self._residents.get(uid, ("", NOTHING))
        return compute

    def promised(self, uid: str) -> Hold | None:
        """Show what is kept for the waiting pod of that UID."""
        return self._promises.get(uid)

    def promises(self) -> list[Hold]:
        """Show what is kept for pods that hold nothing yet."""
        with self._lock:
            return [promised for uid, promised in self._promises.items() if uid not in self._holds]

    def waiting(self, uid: str) -> Waiting | None:
        """Show the pod of that UID if it is ours and not bound."""
        return self._waiting.get(uid)

    def all_waiting(self) -> list[Waiting]:
        """Show all pods of ours that are not bound, as they are now."""
        with self._lock:
            return list(self._waiting.values())

    def ungranted(self) -> dict[str, str]:
        """Name the bound pods that ask our resource without a grant, namespace/name by UID."""
        with self._lock:
            return self._ungranted.all()

    def is_ungranted(self, uid: str) -> bool:
        """Tell whether the pod of that UID is bound, asks our resource, and has no grant."""
        return uid in self._ungranted

    def mark(self) -> int:
        """Count up: assumptions made from now on are younger than this mark."""
        with self._lock:
            self._sequence += 1
            return self._sequence

    # --- what preemption does ---

    def promise(
        self, uid: str, key: str, node: str, gone: Collection[str], choose: Callable[[NodeView], grants.Grant | R]
    ) -> Hold | R:
        """Keep for a waiting pod what *choose* grants it on *node* as that will be without the pods *gone*, by UID.

        Or give back the refusal that *choose* returns, which must be quick and must not call the ledger. Raises
        ValueError when the node is unknown, or the pod holds something or was promised something already.
        """
        with self._lock:
            view = self.without(node, gone)
            if view is None or uid in self._holds or uid in self._promises:
                raise ValueError(
                    f"pod {key} cannot be promised anything on {node}: it has a place, or the node is gone"
                )
            chosen = choose(view)
            if not isinstance(chosen, grants.Grant):
                return chosen
            hold = holds.assumed(chosen, uid=uid, key=key, node=node, since=self.mark())
            self._promises[uid] = promised = msgspec.structs.replace(hold, stage=Stage.PROMISED)
            self._count_promise(promised, 1)
            return promised

    def release(self, uid: str) -> None:
        """Keep nothing for the pod of that UID any more."""
        with self._lock:
            promised = self._promises.pop(uid, None)
            if promised is not None and uid not in self._holds:
                self._count_promise(promised, -1)

    # --- what bind does ---

    def assume(
        self,
        uid: str,
        key: str,
        node: str,
        choose: Callable[[NodeView], grants.Grant | R],
        compute: Compute = NOTHING,
        *,
        limit: Callable[[Hold, Use], R | None] = lambda _hold, _use: None,
    ) -> Hold | R:
        """Reserve for a pod what *choose* grants it on *node*, or give back the refusal of *choose* or *limit*.

        *compute* is what the pod takes of the node besides. *choose* sees the node as it is under the lock, and *limit*
        what the pod is to hold and its namespace does; both must be quick and must not call the ledger. Raises
        ValueError when the node is unknown, the pod already holds something, or the choice does not fit.
        """
        with self._lock:
            view, held = self._view_for(uid, node), self._holds.get(uid)
            if view is None or held is not None:
                raise ValueError(f"pod {key} cannot be assumed on {node}: {held or 'the node is unknown'}")
            chosen = choose(view)
            if not isinstance(chosen, grants.Grant):
                return chosen
            hold = holds.assumed(chosen, uid=uid, key=key, node=node, since=self.mark())
            refusal = limit(hold, self._uses.of(hold.namespace))
            if refusal is not None:
                return refusal
            free = {state.gpu.uuid: state.free_bytes for state in view.gpus}
            if hold.slots:
                check_slots(view, hold, chosen)
            for uuid, amount in hold.charges.items() if not hold.slots else ():
                if amount > free.get(uuid, 0):
                    raise ValueError(
                        f"pod {key} was to get {amount} bytes of GPU {uuid}, which has {free.get(uuid, 0)} free"
                    )
            self._settle_in(uid, node, compute, show=False)
            self._put(hold)
            return hold

    def confirm(self, uid: str) -> None:
        """Note that the API server has bound the pod as assumed."""
        with self._lock:
            hold = self._holds.get(uid)
            if hold is not None and hold.stage is Stage.ASSUMED:
                self._holds[uid] = msgspec.structs.replace(hold, stage=Stage.BOUND)
                self._waiting.pop(uid, None)
                self.release(uid)

    def forget(self, uid: str) -> None:
        """Give back what was assumed for a pod whose Binding the API server has refused for certain."""
        with self._lock:
            hold = self._holds.get(uid)
            if hold is not None and hold.stage is Stage.ASSUMED:
                self._leave(uid)
                self._drop(uid)

    def forget_assumed(self) -> None:
        """Give back all that is assumed and not bound, since nothing of it can be written any more.

        As a term of the writer begins, after a LIST: the fence refuses Bindings of earlier terms, and in between
        another extender may have given the same memory away.
        """
        with self._lock:
            for uid in [hold.uid for hold in self._holds.values() if hold.stage is Stage.ASSUMED]:
                self.forget(uid)

    def settle(self, pod: Pod) -> None:
        """Take over a read of a pod that is assumed, made because its Binding's outcome is in doubt.

        A read of a pod that is not assumed any more is dropped: the watch has told its end since, and taking over the
        older word would hold memory for a pod that is gone.
        """
        with self._lock:
            hold = self._holds.get(pod.uid)
            if hold is not None and hold.stage is Stage.ASSUMED and pod.spec.node_name:
                self.observe_pod(pod)

    def undo(self, hold: Hold, pod: Pod) -> None:
        """Take over a read of a pod, made since it held *hold* as bound, that shows it bound nowhere.

        So the API server's data are those of a backup, and what it held is another's to have; unless it has been given
        a place again since.
        """
        with self._lock:
            if hold.stage is Stage.BOUND and not pod.spec.node_name and self._holds.get(pod.uid) == hold:
                self._leave(pod.uid)
                self._drop(pod.uid)
                self.observe_pod(pod)

    # --- what the watch tells ---

    def observe_node(self, node: Node) -> None:
        """Take over what the API server says of a node."""
        with self._lock:
            account = self._account(node.metadata.name)
            if account.read(node, self._names, self._unit_bytes, self._labels):
                self._refresh(account)

    def node_gone(self, name: str) -> None:
        """Take over that a node is gone; its pods hold what they hold until they are gone too."""
        with self._lock:
            account = self._accounts.get(name)
            if account is None:
                return
            account.gone()
            self._views.drop(name)
            self._prune(account)

    def nodes_replaced(self, listed: Collection[str]) -> list[str]:
        """Take over a LIST of all nodes, by name: those that are not in it are gone, and named.

        What it says of each was taken over before, page by page; what of it was unreadable stays as it is.
        """
        with self._lock:
            gone = [name for name in self._accounts if name not in listed]
            for name in gone:
                self.node_gone(name)
            return gone

    def observe_pod(self, pod: Pod) -> None:
        """Take over what the API server says of a pod that exists."""
        with self._lock:
            if pod.ended:
                self.pod_gone(pod.uid)
            elif pod.spec.node_name is None or pod.spec.node_name == "":
                self._observe_unbound(pod)
            else:
                self._observe_bound(pod, pod.spec.node_name)

    def pod_gone(self, uid: str) -> None:
        """Take over that a pod is gone or has ended: whatever it held is free."""
        with self._lock:
            self._waiting.pop(uid, None)
            self._ungranted.drop(uid)
            self.release(uid)
            self._leave(uid)
            self._drop(uid)

    def observe_pods(self, pods: Iterable[Pod]) -> None:
        """Take over part of a LIST of pods."""
        with self._lock:
            for pod in pods:
                self.observe_pod(pod)

    def pods_replaced(self, listed: Collection[str], started: int) -> list[str]:
        """Take over a LIST of all pods, by UID, that was asked for after *started*, a mark(); name those that are gone.

        A pod that is not in it is, unless it was assumed later: the list may be older than such a pod, or it has gone
        before; who lists finds that out. What it says of each was taken over before, page by page; one that was
        unreadable keeps what it holds.
        """
        with self._lock:
            known = {
                *self._holds,
                *self._promises,
                *self._waiting,
                *self._ungranted.uids(),
                *self._residents,
            }
            held = {uid: self._holds.get(uid) for uid in known if uid not in listed}
            gone = [uid for uid, hold in held.items() if hold is None or hold.since <= started]
            for uid in gone:
                self.pod_gone(uid)
            return gone

    # --- within ---

    def _observe_unbound(self, pod: Pod) -> None:
        self._ungranted.drop(pod.uid)
        # An assumption outlives this: the watch may be older than the Binding on its way.
        if pod.uid not in self._holds:
            self._leave(pod.uid)
        try:
            request = parse(pod, self._names, self._unit_bytes)
        except RequestError as error:
            self._waiting[pod.uid] = Waiting(pod.uid, pod.key, error, pod.metadata.resource_version)
            return
        if request is not None:
            self._waiting[pod.uid] = Waiting(pod.uid, pod.key, request, pod.metadata.resource_version)

    def _observe_bound(self, pod: Pod, node: str) -> None:
        self._waiting.pop(pod.uid, None)
        self.release(pod.uid)
        self._settle_in(pod.uid, node, requests(pod))
        text = pod.annotations.get(self._names.grant)
        held = self._holds.get(pod.uid)
        if held is not None and held.node == node and held.grant == text:
            self.confirm(pod.uid)
            return
        if text is None:
            self._note_ungranted(pod, node)
            # Bound, and not by us: what we assumed for it cannot come true any more. A grant that was taken away later
            # looks the same; admission lets nobody do that (docs/decisions/0006).
            self._drop(pod.uid)
            return
        self._ungranted.drop(pod.uid)
        # a LIST under way may still be older than the pod
        since = held.since if held is not None else 0
        hold = holds.bound(pod, node, text, self._names, self._unit_bytes, since=since)
        self._drop(pod.uid)
        self._put(hold)

    def _note_ungranted(self, pod: Pod, node: str) -> None:
        try:
            request = parse(pod, self._names, self._unit_bytes)
        except RequestError:
            self._ungranted.note(pod, node, None)
            return
        if request is not None:
            self._ungranted.note(pod, node, request)

    def _cuts(self, node: str) -> bool:
        """Tell whether a node has MIG GPUs of ours."""
        view = self.view(node)
        return view is not None and bool(view.mig)

    def _settle_in(self, uid: str, node: str, compute: Compute, *, show: bool = True) -> None:
        """Count what a pod takes of its node; a pod that was resized in place counts anew.

        *show* is false where the node is shown anew right after.
        """
        if self._residents.get(uid) == (node, compute):
            return
        self._leave(uid)
        account = self._account(node)
        self._residents[uid] = (account.name, compute)
        account.settle_in(compute)
        if show:
            self._refresh_if_ours(account)

    def _leave(self, uid: str) -> None:
        resident = self._residents.pop(uid, None)
        if resident is None:
            return
        name, compute = resident
        account = self._account(name)
        account.leave(compute)
        self._refresh_if_ours(account)
        self._prune(account)

    def _refresh_if_ours(self, account: Account) -> None:
        # most pods of a cluster run on nodes without GPUs, where nobody asks what they leave
        if account.inventory is not None:
            self._refresh(account)

    def _view_for(self, uid: str, node: str) -> NodeView | None:
        """Show the node as the pod of that UID sees it: without what is kept for itself."""
        promised = self._promises.get(uid)
        return self.without(node, [uid]) if promised is not None and promised.node == node else self.view(node)

    def _count_promise(self, promised: Hold, times: Literal[1, -1]) -> None:
        account = self._account(promised.node)
        if times > 0:
            account.put(promised)
        else:
            account.drop(promised)
        self._refresh(account)
        self._prune(account)

    def _put(self, hold: Hold) -> None:
        promised = self._promises.get(hold.uid)
        if promised is not None and hold.uid not in self._holds:
            self._count_promise(promised, -1)
        account = self._account(hold.node)
        self._holds[hold.uid] = hold
        self._uses.put(hold)
        account.put(hold)
        self._refresh(account)

    def _drop(self, uid: str) -> None:
        hold = self._holds.pop(uid, None)
        if hold is None:
            return
        self._uses.drop(hold)
        account = self._account(hold.node)
        account.drop(hold)
        self._refresh(account)
        self._prune(account)
        promised = self._promises.get(uid)
        if promised is not None:  # its Binding was refused: it waits again
            self._count_promise(promised, 1)

    def _account(self, name: str) -> Account:
        account = self._accounts.get(name)
        if account is None:
            account = self._accounts[intern(name)] = Account(name=intern(name))
        return account

    def _prune(self, account: Account) -> None:
        """Drop the account of a node that is gone once nothing is held on it."""
        if account.idle:
            self._accounts.pop(account.name, None)

    def _refresh(self, account: Account) -> None:
        """Have a node shown anew after it changed."""
        if account.read_from is None:
            return  # the API server has no such node; pods may still hold something there
        self._views.outdate(account.name)
