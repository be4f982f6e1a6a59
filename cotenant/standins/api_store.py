"""The stand-in's etcd and watch cache: objects, versions, what happened since, and who waits for more."""

import contextlib
import secrets
import threading
import uuid
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

import msgspec

from cotenant.standins import api_rules as rules
from cotenant.standins.api_rules import PODS, Json, Refused, Resource

Key = tuple[str, str]
"""Namespace, "" for none, and name."""

_HISTORY_MAX = 100_000
_SNAPSHOTS_MAX = 16


class Stored(NamedTuple):
    """Hold one version of an object, and its JSON."""

    body: Json
    raw: bytes


class Change(NamedTuple):
    """Hold what happened to one object; *line* is what a test has the watches say, all where *resource* is None."""

    version: int
    resource: Resource | None
    type: str
    now: Stored | None = None
    before: Stored | None = None
    line: bytes = b""


class Selection(NamedTuple):
    """Say which objects are meant."""

    resource: Resource
    namespace: str
    fields: Mapping[str, str] = {}
    labels: Mapping[str, str] = {}

    def has(self, stored: Stored | None) -> bool:
        """Tell whether the object is there and meant."""
        return (
            stored is not None
            and self.namespace in {"", stored.body["metadata"].get("namespace", "")}
            and rules.selected(stored.body, self.fields, self.labels)
        )


class Store:
    """Keep objects and their history under one lock; *changed* wakes all who wait."""

    def __init__(self, admit: Callable[[Json], Json] | None) -> None:
        self.changed: Final = threading.Condition(threading.RLock())
        self.admit = admit
        self.version = 1
        self._objects: dict[Resource, dict[Key, Stored]] = {resource: {} for resource in rules.RESOURCES}
        self._history: list[Change] = []
        self._forgotten = 0  # changes that are no longer in the history
        self._compacted = 0  # the newest version that can no longer be watched from
        self._snapshots: OrderedDict[str, tuple[int, list[Stored]]] = OrderedDict()
        self.cuts = 0
        self.watching = 0  # how many watches are open
        self.frozen = False

    # Reading

    def get(self, resource: Resource, key: Key) -> Stored:
        """Give the object or raise the 404."""
        with self.changed:
            try:
                return self._objects[resource][key]
            except KeyError:
                raise rules.not_found(resource, key[1]) from None

    def all(self, selection: Selection) -> list[Stored]:
        """List what is meant, by namespace and name."""
        with self.changed:
            objects = self._objects[selection.resource]
            return [objects[key] for key in sorted(objects) if selection.has(objects[key])]

    def page(self, selection: Selection, limit: int, token: str) -> tuple[list[Stored], int, str, int]:
        """Give a page of a list, its version, the token of the next page ("" for none) and how many remain."""
        with self.changed:
            if token:
                if token not in self._snapshots:
                    raise Refused(
                        410, "Expired", "The provided continue parameter is too old to display a consistent list"
                    )
                version, rest = self._snapshots.pop(token)
            else:
                version, rest = self.version, self.all(selection)
            if not limit or len(rest) <= limit:
                return rest, version, "", 0
            token = secrets.token_hex(8)
            self._snapshots[token] = version, rest[limit:]
            while len(self._snapshots) > _SNAPSHOTS_MAX:
                self._snapshots.popitem(last=False)
            return rest[:limit], version, token, len(rest) - limit

    def position(self, version: int) -> int:
        """Find where a watch from *version* begins.

        Raises:
            Refused: 410, when what happened right after it is forgotten.

        """
        with self.changed:
            if version < self._compacted:
                raise Refused(410, "Expired", f"too old resource version: {version} ({self._compacted})")
            return self._forgotten + bisect_right(self._history, version, key=lambda change: change.version)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Count a watch for as long as it is open."""
        with self.changed:
            self.watching += 1
            self.changed.notify_all()
        try:
            yield
        finally:
            with self.changed:
                self.watching -= 1
                self.changed.notify_all()

    def news(self, position: int, cuts: int, timeout: float) -> list[Change] | None:
        """Wait at most *timeout* seconds for what happened from *position* on; None when the watches were cut.

        While the watches are frozen it waits for as long as they are.
        """
        with self.changed:
            self.changed.wait_for(lambda: self.cuts != cuts or self._end() > position, timeout)
            self.changed.wait_for(lambda: self.cuts != cuts or not self.frozen)
            # a watch that lags so far that what it needs is forgotten is cut, too
            if self.cuts != cuts or position < self._forgotten:
                return None
            return self._history[position - self._forgotten :]

    def _end(self) -> int:
        return self._forgotten + len(self._history)

    # Writing

    def create(
        self, resource: Resource, body: Json, *, namespace: str = "", keep_status: bool = False, dry_run: bool = False
    ) -> Stored:
        """Create an object as a POST does, or in a *dry_run* show it and keep nothing.

        *keep_status* sets a scene that no client could create in one step.
        """
        with self.changed:
            new = rules.created(
                resource,
                body,
                namespace=namespace,
                now=datetime.now(UTC),
                uid=str(uuid.uuid4()),
                suffix=secrets.token_hex(3)[:5],
            )
            if resource == PODS and self.admit is not None:
                new = self.admit(new)
            if keep_status and "status" in body:
                new["status"] = body["status"]
            rules.validate(resource, new)
            key = _key(new)
            if key in self._objects[resource]:
                raise Refused(409, "AlreadyExists", f'{resource.qualified} "{key[1]}" already exists')
            return Stored(new, msgspec.json.encode(new)) if dry_run else self._write(resource, key, "ADDED", new)

    def update(self, resource: Resource, key: Key, change: Callable[[Json], Json], *, subresource: str = "") -> Stored:
        """Change an object as PUT and PATCH do; *change* makes the wanted object from the present one."""
        with self.changed:
            old = self.get(resource, key).body
            new = rules.updated(resource, old, change(old), subresource=subresource)
            rules.validate(resource, new)
            if new == old:
                return self.get(resource, key)  # the API server makes no new version of it either
            return self._write(resource, key, "MODIFIED", new)

    def bind(self, key: Key, binding: Json) -> None:
        """Bind a pod."""
        with self.changed:
            bound = rules.bound(self.get(PODS, key).body, binding, now=datetime.now(UTC))
            self._write(PODS, key, "MODIFIED", bound)

    def delete(self, resource: Resource, key: Key, *, grace: int | None = None, uid: str | None = None) -> Stored:
        """Delete an object, a bound pod only after its grace: when it is deleted again with 0, as the kubelet does."""
        with self.changed:
            old = self.get(resource, key)
            rules.check_preconditions(resource, old.body["metadata"], {"uid": uid})
            if resource != PODS:
                return self._write(resource, key, "DELETED", old.body)
            seconds = rules.grace_seconds(old.body, grace)
            if old.body["metadata"].get("deletionGracePeriodSeconds", seconds + 1) <= seconds:
                return old  # a grace can only be made shorter
            # the API server marks a pod even where it then deletes it at once: one more event for those who watch
            marked = rules.terminating(old.body, seconds, now=datetime.now(UTC))
            last = self._write(resource, key, "MODIFIED", marked)
            return last if seconds else self._write(resource, key, "DELETED", last.body)

    def _write(self, resource: Resource, key: Key, kind: str, body: Json) -> Stored:
        self.version += 1
        body = {**body, "metadata": {**body["metadata"], "resourceVersion": str(self.version)}}
        stored = Stored(body, msgspec.json.encode(body))
        objects = self._objects[resource]
        before = objects.get(key)
        if kind == "DELETED":
            del objects[key]
        else:
            objects[key] = stored
        self._tell(Change(self.version, resource, kind, stored, before))
        return stored

    # What a test does to the watches

    def say(self, line: bytes, resource: Resource | None = None) -> None:
        """Have the watches of *resource*, or all, say *line*, whatever it is."""
        with self.changed:
            self._tell(Change(self.version, resource, "", line=line))

    def bookmark(self) -> None:
        """Have all watches send a bookmark now."""
        with self.changed:
            self._tell(Change(self.version, None, "BOOKMARK"))

    def cut(self) -> None:
        """End all watches as a server that restarts does."""
        with self.changed:
            self.cuts += 1
            self.changed.notify_all()

    def freeze(self, frozen: bool) -> None:  # noqa: FBT001 - a switch
        """Have the watches say nothing more, not even bookmarks, with their connections open."""
        with self.changed:
            self.frozen = frozen
            self.changed.notify_all()

    def compact(self) -> None:
        """Make what continues from the past fail with 410: watches that are resumed and unfinished lists."""
        with self.changed:
            self._snapshots.clear()
            # even a watch from the present version is too old now, as if much had happened elsewhere
            self.version += 1
            self._compacted = self.version

    def back_up(self) -> Callable[[], None]:
        """Give what makes all objects be as they are now again, as versions go on: etcdutl's --bump-revision."""
        with self.changed:
            saved = {resource: dict(objects) for resource, objects in self._objects.items()}

        def restore() -> None:
            with self.changed:
                self._objects = {resource: dict(objects) for resource, objects in saved.items()}
                self.compact()
                self.cut()

        return restore

    def _tell(self, change: Change) -> None:
        self._history.append(change)
        if len(self._history) > _HISTORY_MAX:
            half = _HISTORY_MAX // 2
            self._compacted = self._history[half - 1].version
            self._forgotten += half
            del self._history[:half]
        self.changed.notify_all()


def event_line(change: Change, selection: Selection) -> bytes | None:
    """Write a change as a watch of *selection* sees it, None where it does not; what leaves it is DELETED for it."""
    if change.resource not in {None, selection.resource}:
        return None
    if change.line:
        return change.line
    if change.type == "BOOKMARK":
        return bookmark_line(change.version, selection.resource)
    is_in, was_in = selection.has(change.now), selection.has(change.before)
    if change.now is None or not (is_in or was_in):
        return None
    stays = b"MODIFIED" if was_in else b"ADDED"
    kind = stays if is_in and change.type != "DELETED" else b"DELETED"
    return b'{"type":"%s","object":%s}' % (kind, change.now.raw)


def bookmark_line(version: int, resource: Resource) -> bytes:
    """Write a bookmark: an object of the kind with nothing but a version."""
    bookmark: dict[str, Any] = {
        "kind": resource.kind,
        "apiVersion": resource.api_version,
        "metadata": {"resourceVersion": str(version), "creationTimestamp": None},
    }
    if resource == PODS:
        bookmark |= {"spec": {"containers": None}, "status": {}}  # as Go writes an empty Pod
    return msgspec.json.encode({"type": "BOOKMARK", "object": bookmark})


def _key(obj: Json) -> Key:
    return obj["metadata"].get("namespace", ""), obj["metadata"]["name"]
