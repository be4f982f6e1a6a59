"""How much is in use of every GPU of the cluster, as the device plugins tell it; pure, and for people alone.

Beside the ledger, not in it: what is in use changes what nobody decides, so it makes no node's view anew.
"""

from collections.abc import Mapping
from typing import NamedTuple

from cotenant.contract import used as notes
from cotenant.contract.names import Names


class _Told(NamedTuple):
    """Keep a node's note as it was written, since thousands are kept and a few are asked for, and its sum."""

    text: str
    bytes: int
    gpus: int


class Used:
    """Keep the newest note of each node; one that cannot be read counts as none."""

    def __init__(self, names: Names) -> None:
        self._key = names.used
        self._told: dict[str, _Told] = {}

    def node_seen(self, name: str, annotations: Mapping[str, str] | None) -> None:
        """Take a node's annotations; quick, since the ledger waits."""
        text = annotations.get(self._key) if annotations else None
        known = self._told.get(name)
        if text == (known.text if known is not None else None):
            return
        if text is None:
            del self._told[name]
        else:
            used = _read(text)
            self._told[name] = _Told(text, sum(used.values()), len(used))

    def node_gone(self, name: str) -> None:
        """Take over that a node is gone."""
        self._told.pop(name, None)

    def of(self, node: str) -> Mapping[str, int]:
        """Give the bytes in use by GPU UUID, of those GPUs whose plugin tells it."""
        told = self._told.get(node)
        return _read(told.text) if told is not None else {}

    def sums(self, node: str) -> tuple[int, int]:
        """Give the bytes in use of a node's GPUs together, and of how many that is known."""
        told = self._told.get(node)
        return (told.bytes, told.gpus) if told is not None else (0, 0)


def _read(text: str) -> Mapping[str, int]:
    try:
        return notes.decode(text).used
    except ValueError:
        return {}
