"""What the ledger shows of each node: made when somebody asks for it, and counted as it changes."""

import threading
from collections import deque
from collections.abc import Callable
from itertools import islice

from extender.ledger.values import NodeView

# Several for each node of the largest clusters, so that only a program that slept for long must look at all of them.
_CHANGES_KEPT = 50_000


class Views:
    """Keep the view of every node that the API server has; the ledger's *lock* is held by whoever changes one."""

    def __init__(self, lock: threading.RLock, make: Callable[[str], NodeView]) -> None:
        """Make views by *make*, of a node's name."""
        self._lock = lock
        self._make = make
        # Replaced view by view, never mutated: readers take no lock, unless a node has changed since it was last shown.
        self._views: dict[str, NodeView] = {}
        # Nodes that have, in the order they did, each once. A view is made when somebody asks for it, so that a LIST of
        # 50,000 pods makes 5,000 views and not 100,000: 2 of 3 s of a start.
        self._outdated: dict[str, None] = {}
        # names of nodes in the order they changed, and how many there have ever been
        self._changed: deque[str] = deque(maxlen=_CHANGES_KEPT)
        self.changes_so_far = 0

    def get(self, node: str) -> NodeView | None:
        """Show a node, or None where the API server has none."""
        if node in self._outdated:
            with self._lock:
                self._show(node)
        return self._views.get(node)

    def all(self) -> list[NodeView]:
        """Show all nodes as they are now."""
        with self._lock:
            for node in list(self._outdated):
                self._show(node)
            return list(self._views.values())

    def changes(self, since: int) -> tuple[int, list[str] | None]:
        """Say how many changes there are by now, and which nodes changed after so many; None where none can tell."""
        with self._lock:
            behind = self.changes_so_far - since
            known = behind <= len(self._changed)
            return self.changes_so_far, list(islice(reversed(self._changed), behind)) if known else None

    def outdate(self, node: str) -> None:
        """Have a node shown anew."""
        self._outdated[node] = None
        self._note_change(node)

    def drop(self, node: str) -> None:
        """Show a node no more."""
        self._views.pop(node, None)
        self._outdated.pop(node, None)
        self._note_change(node)

    def _show(self, node: str) -> None:
        if node in self._outdated:
            self._views[node] = self._make(node)
            # after the view is there: who does not find the node here reads it without the lock
            del self._outdated[node]

    def _note_change(self, node: str) -> None:
        self._changed.append(node)
        self.changes_so_far += 1
