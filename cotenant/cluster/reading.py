"""Read what the API server answers to LIST and WATCH, object by object where one of them does not decode."""

import threading
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar, cast

import msgspec

from cotenant.cluster.errors import Unreachable, error_of
from cotenant.cluster.nesting import decoded

Change = Literal["ADDED", "MODIFIED", "DELETED"]
_CHANGES = frozenset({"ADDED", "MODIFIED", "DELETED"})
BOOKMARK = "BOOKMARK"


class _HasVersion(Protocol):
    @property
    def resource_version(self) -> str | None:
        """Give the version that the object's last change made."""


class KubeObject(Protocol):
    """Be what can be read: a msgspec type whose metadata tells the object's version."""

    @property
    def metadata(self) -> _HasVersion:
        """Give what every object has."""


T = TypeVar("T", bound=KubeObject)


class NotJSONError(ValueError):
    """Say that what came cannot be read at all."""


class Unreadable(msgspec.Struct, frozen=True):
    """Name an object that does not decode, as far as it can be named, and say why it does not."""

    why: str
    name: str | None = None
    namespace: str | None = None
    uid: str | None = None


class Page(NamedTuple, Generic[T]):
    """Hold a page of a LIST: its objects, those that did not decode, the list's version, and how to go on."""

    objects: list[T]
    unreadable: list[Unreadable]
    version: str
    continue_: str


class Event(NamedTuple, Generic[T]):
    """Hold one line of a WATCH: what it calls itself, which change that is, of what, and the version it brings.

    *change* and *told* are None where it tells of no object's change: a bookmark, or a kind that is not known.
    """

    type: str
    change: Change | None
    told: T | Unreadable | None
    version: str | None


A = TypeVar("A")


def answered(decoder: msgspec.json.Decoder[A], body: bytes) -> A:
    """Read the answer to anything but a LIST that is followed; raise Unreachable where it is no such thing.

    That may be a page of a load balancer, say, so of a write it is not known whether it was applied.
    """
    try:
        return decoded(decoder.decode, body)
    except msgspec.MsgspecError as error:
        what = decoder.type.__name__.strip("_")
        raise Unreachable(f"the API server's answer is no {what}: {error}", outcome_unknown=True) from error


# who looks through a type (contract/versions.py)
_one_at_a_time = threading.Lock()


class Reader(Generic[T]):
    """Read objects of type *kind*; only its fields are decoded."""

    def __init__(self, kind: type[T]) -> None:
        with _one_at_a_time:
            self._object = msgspec.json.Decoder(kind)
            # mypy takes the brackets for a type, but *kind* is known only when this runs
            self._page: msgspec.json.Decoder[_Page[T]] = msgspec.json.Decoder(cast("Any", _Page)[kind])
            self._event: msgspec.json.Decoder[_Event[T]] = msgspec.json.Decoder(cast("Any", _Event)[kind])

    def page(self, body: bytes) -> Page[T]:
        """Read a page of a LIST; raise NotJSONError where it is none."""
        try:
            page = decoded(self._page.decode, body)
        except msgspec.MsgspecError:
            return self._piecemeal(body)
        return Page(page.items or [], [], page.metadata.resource_version, page.metadata.continue_)

    def event(self, line: bytes) -> Event[T]:
        """Read a line of a WATCH.

        Raises:
            NotJSONError: it is none.
            ClusterError: it is the API server's word that something went wrong.

        """
        try:
            event = decoded(self._event.decode, line)
        except msgspec.MsgspecError as error:
            return self._oddity(line, error)
        if event.type not in _CHANGES:
            return self._oddity(line, None)
        return Event(event.type, cast("Change", event.type), event.object, event.object.metadata.resource_version)

    def _piecemeal(self, body: bytes) -> Page[T]:
        """Decode a page object by object, so that one that is bad costs only itself."""
        try:
            page = decoded(_raw_page.decode, body)
        except msgspec.MsgspecError as error:
            raise NotJSONError(str(error)) from error
        objects: list[T] = []
        unreadable: list[Unreadable] = []
        for raw in page.items or ():
            try:
                objects.append(decoded(self._object.decode, raw))
            except msgspec.MsgspecError as error:
                unreadable.append(_identify(raw, error))
        return Page(objects, unreadable, page.metadata.resource_version, page.metadata.continue_)

    @staticmethod
    def _oddity(line: bytes, error: msgspec.MsgspecError | None) -> Event[T]:
        """Take what is no plain change: bookmarks, errors, unknown events, and objects that do not decode."""
        try:
            event = decoded(_raw_event.decode, line)
        except msgspec.MsgspecError as worse:
            raise NotJSONError(str(worse)) from worse
        if event.type == "ERROR":
            raise error_of(bytes(event.object))
        version = _version(event.object)
        if event.type in _CHANGES and error is not None:
            return Event(event.type, cast("Change", event.type), _identify(event.object, error), version)
        return Event(event.type, None, None, version)


class _Event(msgspec.Struct, Generic[T], frozen=True):
    type: str
    object: T


class _RawEvent(msgspec.Struct, frozen=True):
    type: str
    object: msgspec.Raw = msgspec.Raw(b"{}")


class _ListMeta(msgspec.Struct, frozen=True, rename="camel"):
    resource_version: str = ""
    continue_: str = msgspec.field(name="continue", default="")


class _Page(msgspec.Struct, Generic[T], frozen=True):
    metadata: _ListMeta
    items: list[T] | None = None


class _RawPage(msgspec.Struct, frozen=True):
    metadata: _ListMeta
    items: list[msgspec.Raw] | None = None


class _Version(msgspec.Struct, frozen=True, rename="camel"):
    resource_version: str | None = None


class _Versioned(msgspec.Struct, frozen=True):
    metadata: _Version = _Version()


_raw_page = msgspec.json.Decoder(_RawPage)
_raw_event = msgspec.json.Decoder(_RawEvent)
_versioned = msgspec.json.Decoder(_Versioned)


def _version(raw: msgspec.Raw) -> str | None:
    try:
        return decoded(_versioned.decode, raw).metadata.resource_version
    except msgspec.MsgspecError:
        return None


def _identify(raw: msgspec.Raw, error: msgspec.MsgspecError) -> Unreadable:
    """Name an object that does not decode, field by field, since any of them may be what is wrong."""
    try:
        metadata = decoded(msgspec.json.decode, raw)["metadata"]
        told = {key: metadata.get(key) for key in ("name", "namespace", "uid")}
    except (msgspec.MsgspecError, TypeError, KeyError, AttributeError):
        told = {}
    return Unreadable(why=str(error), **{key: value for key, value in told.items() if isinstance(value, str)})
