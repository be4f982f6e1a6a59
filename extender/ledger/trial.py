"""One node as it would be without some of its pods, tried in one choice of them after the other."""

from collections.abc import Collection, Mapping

from cotenant.contract.compute import Compute
from extender.ledger.account import Account
from extender.ledger.values import Hold, NodeView


class Trial:
    """Take pods off a copy of a node's account, and put them back; not safe to use from many threads.

    A choice costs by how much it differs from the one before: of hundreds of pods one at a time is given back.
    """

    def __init__(self, account: Account, holds: Mapping[str, Hold], residents: Mapping[str, Compute]) -> None:
        """Try on *account*, which nobody else may have; by UID what pods hold there, and what they take besides."""
        self._account = account
        self._holds = holds
        self._residents = residents
        self._gone: frozenset[str] = frozenset()

    def without(self, uids: Collection[str]) -> NodeView:
        """Show the node without the pods of those UIDs, and with all others."""
        gone = frozenset(uids)
        for uid in self._gone - gone:
            if uid in self._holds:
                self._account.put(self._holds[uid])
            if uid in self._residents:
                self._account.settle_in(self._residents[uid])
        for uid in gone - self._gone:
            if uid in self._holds:
                self._account.drop(self._holds[uid])
            if uid in self._residents:
                self._account.leave(self._residents[uid])
        self._gone = gone
        return self._account.view()
