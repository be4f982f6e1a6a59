"""Who has used more than was granted for how long, as the device plugins report it; pure.

A report counts while its plugin goes on reporting: each has another beat, and whoever stands in reports that follow
each other for long enough may be evicted. A plugin that has gone says nothing more, so its last report evicts nobody.
"""

from collections.abc import Callable, Mapping

import msgspec

from cotenant.contract import overuse as reports
from cotenant.contract.overuse import BEAT_SECONDS, Overuser

# Reports further apart than this do not follow each other.
_GAP_SECONDS = 4 * BEAT_SECONDS


class Suspect(msgspec.Struct, frozen=True):
    """Show a pod that uses more than it was granted, since when, and when that was last reported, in seconds."""

    uid: str
    node: str
    sentence: str
    since: float
    last: float


class Outcome(msgspec.Struct, frozen=True):
    """Show what a report changes.

    *over* are the node's suspects by UID, *ended* the UIDs that no longer are, and *problems* what of the report is not
    believed, as sentences.
    """

    over: Mapping[str, Suspect] = {}
    ended: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


class Reports:
    """Keep the newest report of each node; *lives_on* tells the node where a pod of ours holds memory, "" for none."""

    def __init__(self, lives_on: Callable[[str], str]) -> None:
        self._lives_on = lives_on
        self._over: dict[str, dict[str, Suspect]] = {}

    def take(self, node: str, text: str | None, now: float) -> Outcome:
        """Take a node's report, None for none, at the time *now* in seconds.

        A plugin can speak of the pods of its own node only: whoever breaks out on one node has no other one's evicted.
        """
        before = self._over.pop(node, {})
        problems: list[str] = []
        users: tuple[Overuser, ...] = ()
        if text is not None:
            try:
                users = reports.decode(text).users
            except ValueError as error:
                problems.append(f"node {node}: {error}")
        over: dict[str, Suspect] = {}
        for uid in dict.fromkeys(user.uid for user in users):
            if self._lives_on(uid) != node:
                problems.append(f"node {node} reports overuse of pod {uid}, which holds no GPU memory there")
                continue
            known = before.get(uid)
            followed = known is not None and now - known.last <= _GAP_SECONDS
            over[uid] = Suspect(
                uid=uid,
                node=node,
                sentence="; ".join(user.sentence for user in users if user.uid == uid),
                since=known.since if known is not None and followed else now,
                last=now,
            )
        if over:
            self._over[node] = over
        return Outcome(over, tuple(uid for uid in before if uid not in over), tuple(problems))

    def all_over(self) -> set[str]:
        """Name all pods that stand in a report."""
        return {uid for over in self._over.values() for uid in over}
