"""A sink that writes down what it is told, and in which a test can wait."""

import threading
from collections.abc import Callable

from cotenant.cluster import Unreadable
from cotenant.contract.pods import Pod


class Notebook:
    """Keep the picture that a reflector paints, and the story of how it came about."""

    def __init__(self) -> None:
        self.pods: dict[str, str] = {}  # name: version
        self.started: list[int] = []
        self.changes: list[tuple[str, str]] = []
        self.unread: list[Unreadable] = []
        self.trouble: list[str] = []  # the names for which to raise, once each; "replaced" for a list
        self._told = threading.Condition()

    def replaced(self, objects: list[Pod], started: int, unreadable: list[Unreadable]) -> None:
        with self._told:
            self._raise_for("replaced")
            self.pods = {pod.metadata.name: pod.metadata.resource_version or "" for pod in objects}
            self.started.append(started)
            self.unread += unreadable
            self._told.notify_all()

    def changed(self, change: str, obj: Pod) -> None:
        name = obj.metadata.name
        with self._told:
            self.changes.append((change, name))
            self._raise_for(name)
            if change == "DELETED":
                self.pods.pop(name, None)
            else:
                self.pods[name] = obj.metadata.resource_version or ""
            self._told.notify_all()

    def unreadable(self, change: str, obj: Unreadable) -> None:
        with self._told:
            self.changes.append((change, f"unreadable {obj.name}"))
            self.unread.append(obj)
            self._told.notify_all()

    def waits_for(self, predicate: Callable[[], object]) -> bool:
        with self._told:
            return self._told.wait_for(lambda: bool(predicate()), timeout=20.0)

    def _raise_for(self, name: str) -> None:
        if name in self.trouble:
            self.trouble.remove(name)
            raise RuntimeError(f"the sink cannot take {name}")
