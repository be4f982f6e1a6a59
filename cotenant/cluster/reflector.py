"""Follow every object of one kind: LIST once, then WATCH for ever, after client-go's reflector and kopf's watch loop.

LIST asks with resourceVersion "", "the most recent": with "0" the API server may answer from a cache that lags, so a
program that has just restarted could be shown the past, miss a grant that it made itself, and give the same memory
again.
"""

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Generic, Protocol

import msgspec
import structlog

from cotenant.cluster.backoff import Backoff
from cotenant.cluster.connection import Cluster, Stream
from cotenant.cluster.errors import ApiError, ClusterError, Gone, TimedOut, TooLong, Unreachable
from cotenant.cluster.exchange import ANY
from cotenant.cluster.opening import Opening
from cotenant.cluster.reading import BOOKMARK, Change, NotJSONError, Reader, T, Unreadable
from cotenant.threads import giving_way

_log = structlog.get_logger(__name__)

_PAGE_OBJECTS = 500  # as client-go; a page of 500 pods is about 2 MB
# But an object may have 1.5 MB, which its owner may fill with annotations, and 500 of them are more than our memory. A
# page that becomes longer than this is left, and a fourth of its objects asked for.
_PAGE_BYTES = 16 << 20
_FEWER = 4
_LIST_TIMEOUT_SECONDS = 60.0
# The server ends a watch after this long, so that after it restarts the watches do not all stay on the other servers.
_WATCH_SECONDS = (300, 600)
# A bookmark comes every minute (apiserver/pkg/storage/cacher/cacher.go, defaultBookmarkFrequency), but none as long as
# no object of the kind has changed since the watch began. So after this long another watch is opened: cheap if all was
# well, and if the connection was dead, whatever TCP believes, this is how it is found out.
_SILENCE_SECONDS = 100.0
# A watch that ends sooner than this and brought nothing counts as failed (client-go: "very short watch").
_SHORT_WATCH_SECONDS = 1.0
# After an etcd was restored from a backup our version lies in the future. The API server opens a watch from it all the
# same, and sends what is newer, which for long is nothing; the difference no watch ever tells (tried on 1.36). So after
# so many silent watches in a row, or failures to open one, what there is is listed again. Where objects are many, some
# change or a bookmark is always sooner.
_SILENT_WATCHES_BEFORE_LIST = 4
_FAILURES_BEFORE_LIST = 5


class Counts(msgspec.Struct, frozen=True):
    """Count what a reflector has been through since it was made."""

    lists: int = 0
    watches: int = 0
    errors: int = 0
    unreadable: int = 0
    unknown_events: int = 0


class Sink(Protocol[T]):
    """Be told what there is and what changes, always from the reflector's one thread.

    What a method raises is logged and counted as an error; the next call comes all the same. An object that raises in
    *changed* is lost until it changes again or is listed again, so a sink keeps its own house in order.
    """

    def replaced(self, objects: list[T], started: int, unreadable: list[Unreadable]) -> None:
        """Take *objects* for all there is; *started* is what mark() gave right before the LIST was sent.

        What happened before *started* is in *objects*; what happened after it may or may not be. *unreadable* names
        those that exist but did not decode.
        """

    def changed(self, change: Change, obj: T) -> None:
        """Take *obj* as the newest state of one object, or as its last one when *change* is DELETED."""

    def unreadable(self, change: Change, obj: Unreadable) -> None:
        """Know that one object changed into something that does not decode."""


class Reflector(Generic[T]):
    """Follow the objects of type *kind* under *path* and hand them to *sink*, in one thread of its own.

    Args:
        cluster: where to ask.
        path: of the collection: ``/api/v1/pods``.
        kind: the msgspec type of one object; only its fields are decoded.
        sink: who is told.
        mark: gives the sequence token that *sink* gets back as *started*.
        by_page: is handed each page of a LIST as it comes, and gives what of it is kept until all are here, for kinds
            of which all objects together are too large: 50,000 pods are 100 MB.
        selector: ``fieldSelector`` and ``labelSelector``, where only some objects are wanted.
        silence: seconds without any event or bookmark after which another watch is opened.
        longest: seconds that are waited at most after failures in a row, unless the API server asks for more.
        clock: monotonic seconds.
        rng: spreads waits, so that many programs do not come back at once.
        wait: waits so many seconds or until stop(), and tells whether it was stop().

    """

    def __init__(
        self,
        cluster: Cluster,
        path: str,
        kind: type[T],
        sink: Sink[T],
        *,
        mark: Callable[[], int] = lambda: 0,
        by_page: Callable[[list[T]], list[T]] = lambda page: page,
        selector: Mapping[str, str] | None = None,
        silence: float = _SILENCE_SECONDS,
        longest: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
        wait: Callable[[float], bool] | None = None,
    ) -> None:
        self._cluster = cluster
        self._path = path
        self._sink = sink
        self._mark = mark
        self._by_page = by_page
        self._selector = dict(selector or {})
        self._silence = silence
        self._clock = clock
        self._rng = rng or random.Random()  # noqa: S311 - spreads load, guards nothing
        self._backoff = Backoff(self._rng, longest=longest)
        self._stopping = threading.Event()
        self._wake = threading.Event()
        self._wait = wait or self._sleep
        self._reader = Reader(kind)
        # over _opening and _stream, which stop() and list_again() end from other threads, and over _wanted
        self._guard = threading.Lock()
        self._opening: Opening | None = None
        self._stream: Stream | None = None
        self._wanted: list[threading.Event] = []
        self._thread: threading.Thread | None = None
        self._log = _log.bind(path=path, **self._selector)

        self.synced = threading.Event()
        """Is set once the first LIST was handed over, and stays set."""
        self.last_event_at: float | None = None
        """The clock when the API server last said anything: to a LIST, at the beginning of a watch, or in one."""
        self.counts = Counts()
        """What has happened so far; a new value each time."""

    def start(self) -> None:
        """Begin to follow; return at once."""
        self._thread = threading.Thread(target=self._run, name=f"reflector {self._path}", daemon=True)
        self._thread.start()

    def stop(self, timeout: float = 1.0) -> bool:
        """End the watch under way and the thread; tell whether it ended within *timeout* seconds.

        A LIST that waits for its answer is not cut short; its thread, a daemon, ends when the answer or its timeout
        comes.
        """
        self._stopping.set()
        self._interrupt()
        if self._thread is None or self._thread is threading.current_thread():
            return True
        self._thread.join(timeout)
        return not self._thread.is_alive()

    @property
    def ended(self) -> bool:
        """Tell whether the thread has ended without being told to."""
        thread = self._thread
        return thread is not None and not thread.is_alive() and not self._stopping.is_set()

    def list_again(self) -> threading.Event:
        """List once more, and give what is set when that LIST, sent after this call, has been handed over."""
        done = threading.Event()
        with self._guard:
            self._wanted.append(done)
        self._interrupt()
        return done

    def _interrupt(self) -> None:
        self._wake.set()
        with self._guard:
            if self._opening is not None:
                self._opening.leave()
            if self._stream is not None:
                self._stream.close()

    # From here on everything runs in the reflector's thread.

    def _sleep(self, seconds: float) -> bool:
        self._wake.wait(seconds)
        self._wake.clear()
        return self._stopping.is_set()

    def _run(self) -> None:
        version: str | None = None  # None: what there is must be listed
        silent = 0
        while not self._stopping.is_set():
            try:
                if version is None or self._wanted:
                    # the first time there is nobody to give way to but the other LISTs
                    with giving_way() if self.synced.is_set() else contextlib.nullcontext():
                        version = self._list()
                    silent = 0
                silent += 1
                for newer in self._watch(version):
                    version, silent = newer, 0
                    self._backoff.reset()
                # it stood until it was over, be it without a word
                self._backoff.reset()
                if silent >= _SILENT_WATCHES_BEFORE_LIST:
                    version = None
            except Gone as error:
                self._log.info("the version is too old to watch from, listing again", error=str(error))
                version = None
                self._pause(error)
            except ClusterError as error:
                self._count(errors=1)
                self._log.warning(
                    "the API server cannot be followed", error=str(error), failures=self._backoff.failures
                )
                if self._backoff.failures >= _FAILURES_BEFORE_LIST:
                    version = None
                self._pause(error)
            except Exception:  # noqa: BLE001 - the sink's fault; without a whole list its picture stays wrong
                self._count(errors=1)
                self._log.exception("a list could not be taken in, listing again")
                version = None
                self._pause(None)

    def _pause(self, error: ClusterError | None) -> None:
        asked = error.retry_after if isinstance(error, ApiError) else None
        self._wait(max(self._backoff.next(), asked or 0.0))

    def _list(self) -> str:
        """Hand over all there is and return the version to watch from."""
        with self._guard:
            wanted = len(self._wanted)
        started = self._mark()
        try:
            objects, unreadable, version = self._pages(_PAGE_OBJECTS)
        except Gone:
            # The snapshot was compacted away between two pages; a list in one piece cannot lose it.
            started = self._mark()
            objects, unreadable, version = self._pages(0)
        self.last_event_at = self._clock()
        self._sink.replaced(objects, started, unreadable)
        self._count(lists=1, unreadable=len(unreadable))
        self.synced.set()
        with self._guard:
            done, self._wanted = self._wanted[:wanted], self._wanted[wanted:]
        for one in done:
            one.set()
        return version

    def _pages(self, limit: int) -> tuple[list[T], list[Unreadable], str]:
        objects: list[T] = []
        unreadable: list[Unreadable] = []
        query = {**self._selector, "resourceVersion": ""}
        while True:
            body, limit = self._page(query, limit)
            try:
                page = self._reader.page(body)
            except NotJSONError as error:
                raise Unreachable(f"the API server's list of {self._path} is not JSON: {error}") from error
            for bad in page.unreadable:
                self._log_unreadable(bad)
            objects.extend(self._by_page(page.objects))
            unreadable.extend(page.unreadable)
            if not page.continue_:
                return objects, unreadable, page.version
            # The continue token carries the version of the first page: the pages are one snapshot.
            query = {**self._selector, "continue": page.continue_}

    def _page(self, query: Mapping[str, str], limit: int) -> tuple[bytes, int]:
        """Ask for so many objects, 0 for all, or for fewer where they are large; tell how many to ask for next."""
        while True:
            most = _PAGE_BYTES if limit > 1 else ANY
            asked = {**query, "limit": str(limit)}
            try:
                body = self._cluster.get(self._path, query=asked, timeout=_LIST_TIMEOUT_SECONDS, most=most).body
            except TooLong:
                limit = max(1, limit // _FEWER)
                continue
            # what follows may be small again
            return body, min(limit * 2, _PAGE_OBJECTS) if len(body) * _FEWER < _PAGE_BYTES else limit

    def _watch(self, version: str) -> Iterator[str]:
        """Follow what happens after *version* and yield the version after each event; end when the server ends it."""
        opened = self._clock()
        heard = False
        for line in self._lines(version):
            self.last_event_at = self._clock()
            newer = self._take(line)
            if newer is not None:
                version = newer
            heard = True
            yield version
        least = min(_SHORT_WATCH_SECONDS, self._silence)
        if not heard and self._clock() - opened < least and not (self._stopping.is_set() or self._wanted):
            raise Unreachable("the API server ended a watch at once")

    def _lines(self, version: str) -> Iterator[bytes]:
        query = {
            **self._selector,
            "watch": "1",
            "resourceVersion": version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(self._rng.randint(*_WATCH_SECONDS)),
        }
        with self._guard:
            if self._stopping.is_set() or self._wanted:
                return
            opening = self._opening = Opening(
                lambda: self._cluster.stream(self._path, query=query, silence=self._silence), name=self._path
            )
        stream = opening.wait()
        if stream is None:
            return
        self._count(watches=1)
        self.last_event_at = self._clock()
        with self._guard:
            self._opening, self._stream = None, stream
            if self._stopping.is_set() or self._wanted:  # which came while the watch was being opened
                stream.close()
        try:
            yield from stream.lines()
        except TimedOut:
            self._log.debug("a watch was silent for too long, opening another", seconds=self._silence)
        finally:
            with self._guard:
                self._stream = None

    def _take(self, line: bytes) -> str | None:
        """Hand one event over; return the version it brings us to, None where it does not say."""
        try:
            event = self._reader.event(line)
        except NotJSONError as error:
            # Half a line: what follows cannot be trusted either. The next watch brings it again, whole.
            raise Unreachable(f"a line of the watch is not JSON: {error}") from error
        change, told = event.change, event.told
        if change is None or told is None:
            if event.type != BOOKMARK:
                self._count(unknown_events=1)
                self._log.warning("an unknown kind of watch event was skipped", type=event.type)
        elif isinstance(told, Unreadable):
            self._count(unreadable=1)
            self._log_unreadable(told)
            self._tell(lambda: self._sink.unreadable(change, told))
        else:
            self._tell(lambda: self._sink.changed(change, told))
        return event.version

    def _log_unreadable(self, bad: Unreadable) -> None:
        self._log.error("an object does not decode", name=bad.name, namespace=bad.namespace, why=bad.why)

    def _tell(self, tell: Callable[[], None]) -> None:
        try:
            tell()
        except Exception:  # noqa: BLE001 - one object never stops the others
            self._count(errors=1)
            self._log.exception("an event could not be taken in")

    def _count(self, **more: int) -> None:
        self.counts = msgspec.structs.replace(
            self.counts, **{name: getattr(self.counts, name) + n for name, n in more.items()}
        )
