"""Who has what of GPUs, and for whom the rest is kept, for people."""

from collections import defaultdict
from collections.abc import Callable
from heapq import nsmallest
from typing import TYPE_CHECKING

from extender.inspect.gpus import Having
from extender.inspect.rows import Holder, Kept, Promise, Share, State
from extender.ledger import Hold, Ledger, Stage

if TYPE_CHECKING:
    from cotenant.contract.inventory import MIGInstance

# So many of what is kept for others are named.
_PROMISES = 3

# Tells how many of those who were evicted for the pod of a UID are still there, and for how many seconds it is kept
# what they leave; None where that ends by other means.
Lasts = Callable[[str], tuple[int, float] | None]


def not_told(_uid: str) -> tuple[int, float] | None:
    """Tell nothing of how long anything is kept."""
    return None


class Holdings:
    """Read who has what; *lasts* says how long something is kept."""

    def __init__(self, ledger: Ledger, lasts: Lasts) -> None:
        self._ledger = ledger
        self._lasts = lasts

    def shares(self, hold: Hold) -> tuple[Share, ...]:
        """Say what a pod holds, or is to hold, of which GPUs."""
        view = self._ledger.view(hold.node)
        indices = {state.gpu.uuid: state.gpu.index for state in view.states} if view else {}
        return tuple(Share(indices.get(uuid), uuid, amount) for uuid, amount in hold.charges.items())

    def promise(self, promised: Hold) -> Promise:
        """Say what is kept for a pod."""
        return Promise(promised.key, promised.node, self.shares(promised), _until(self._lasts(promised.uid)))

    def kept_for_others(self, uid: str, nodes: set[str]) -> tuple[Promise, ...]:
        """List what is kept for other pods than that of the UID, on *nodes*."""
        others = [one for one in self._ledger.promises() if one.uid != uid and one.node in nodes]
        most = nsmallest(_PROMISES, others, key=lambda one: (-one.bytes, one.key))
        return tuple(self.promise(one) for one in most)

    def having(self, nodes: set[str]) -> Having:
        """List who has what of the nodes' GPUs."""
        holders: defaultdict[tuple[str, str], list[Holder]] = defaultdict(list)
        slots: defaultdict[tuple[str, str], list[tuple[MIGInstance, str]]] = defaultdict(list)
        for hold in self._ledger.holds():
            if hold.node in nodes:
                for uuid, amount in hold.charges.items():
                    holders[hold.node, uuid].append(Holder(hold.key, amount, state_of(hold)))
                if hold.everywhere_bytes:
                    holders[hold.node, ""].append(Holder(hold.key, hold.everywhere_bytes, state_of(hold)))
                for slot in hold.slots:
                    slots[hold.node, slot.uuid].append((slot.instance, hold.key))
        kept: defaultdict[tuple[str, str], list[Kept]] = defaultdict(list)
        kept_slots: defaultdict[tuple[str, str], list[tuple[MIGInstance, str]]] = defaultdict(list)
        for one in self._ledger.promises():
            if one.node in nodes:
                for uuid, amount in one.charges.items():
                    kept[one.node, uuid].append(Kept(one.key, amount, _until(self._lasts(one.uid))))
                for slot in one.slots:
                    kept_slots[one.node, slot.uuid].append((slot.instance, one.key))
        return Having(holders, slots, kept_slots, kept)


def state_of(hold: Hold) -> State:
    """Say how far a pod that holds something has come."""
    return State.BINDING if hold.stage is Stage.ASSUMED else State.BOUND


def _until(lasts: tuple[int, float] | None) -> str:
    """Say how long something is kept for a pod."""
    if lasts is None:
        return "until it is bound or released"
    victims, seconds = lasts
    if victims:
        gone = "the pod that was evicted for it is" if victims == 1 else f"the {victims} pods evicted for it are"
        return f"until it is bound, or for {seconds:.0f} s once {gone} gone"
    return f"until it is bound, or for {seconds:.0f} s more"
