"""Follow the Lease that names the writer, or hold it: one class for each layout.

In the layout second-scheduler, kube-scheduler's own election decides, since an extender whose scheduler does not
schedule has nothing to bind: its identity begins with the host name that it shares with us, its pod's.
"""

import random
import threading
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Protocol

import msgspec
import structlog

from cotenant.cluster import Change, Cluster, ClusterError, Conflict, NotFound, Reflector, Unreadable, leases, writes
from cotenant.cluster.leases import Lease
from cotenant.cluster.reading import answered
from cotenant.contract.configuration import Writer
from cotenant.threads import Threads
from extender.cluster.writership import Writership

_log = structlog.get_logger(__name__)

_REQUEST_SECONDS = 1.0
_STOP_SECONDS = 2.0
# Short, since it may have been our own last write, whose answer was lost, and half of the time to renew may be over.
_CONFLICT_SECONDS = 0.1
# What client-go assumes of a Lease that does not say, which none of its own is.
_DEFAULT_SECONDS = 15
# kube-scheduler renews its Lease of 3 s five times a second. Where nothing is heard for so long the watch may be dead,
# and another one must be there before the Lease is not believed any more.
_SILENCE_SECONDS = 2.0
# After an outage of the API server nothing is bound until the Lease is read again; who holds it tries as often.
_AGAIN_SECONDS = 0.5


class Election(Protocol):
    """Tell a Writership who the writer is."""

    def start(self) -> None:
        """Begin to tell; return at once."""

    def stop(self) -> None:
        """End it, so that others can take over."""


class Follow:
    """Follow the Lease of the kube-scheduler in our pod.

    An extender that starts while its kube-scheduler holds the Lease already begins a new term: the last Binding of the
    extender before it may still be on its way, and carries the old one. kube-scheduler finds the number changed, reads
    it again and goes on with it (client-go/tools/leaderelection, tryAcquireOrRenew).
    """

    def __init__(
        self,
        cluster: Cluster,
        configuration: Writer,
        writership: Writership,
        *,
        host: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cluster = cluster
        self._configuration = configuration
        self._writership = writership
        self._prefix = f"{host}_"
        self._clock = clock
        self._seen = False
        # the term that the extender before us may have written in, holder and number
        self._before_us: tuple[str, int] | None = None
        self._reflector: Reflector[Lease] = Reflector(
            cluster,
            leases.collection(configuration.namespace),
            Lease,
            self,
            selector={"fieldSelector": f"metadata.name={configuration.name}"},
            silence=_SILENCE_SECONDS,
            longest=_AGAIN_SECONDS,
        )

    def start(self) -> None:
        """Begin to follow; return at once."""
        self._reflector.start()

    def stop(self) -> None:
        """End the watch; kube-scheduler gives the Lease back by itself."""
        self._reflector.stop()

    def ended(self) -> list[str]:
        """Name the watch where its thread has ended without being told to."""
        return ["watch lease"] if self._reflector.ended else []

    def replaced(self, objects: list[Lease], started: int, unreadable: list[Unreadable]) -> None:  # noqa: ARG002
        """Take over a LIST, which has the one Lease or none."""
        self._take(objects[0] if objects else Lease())

    def changed(self, change: Change, obj: Lease) -> None:
        """Take over a renewal or a change of hands."""
        self._take(Lease() if change == "DELETED" else obj)

    def unreadable(self, change: Change, obj: Unreadable) -> None:  # noqa: ARG002
        """Believe nothing of what cannot be read."""
        self._take(Lease())

    def _take(self, lease: Lease) -> None:
        mine = lease.holder.startswith(self._prefix)
        term = (lease.holder, lease.transitions)
        if not self._seen:
            self._seen = True
            self._before_us = term if mine else None
        if mine and term == self._before_us:
            self._begin_term(lease)
            return
        self._writership.observe(
            lease.holder,
            lease.transitions,
            mine=mine,
            until=self._clock() + _duration(lease),
        )

    def _begin_term(self, lease: Lease) -> None:
        """Count the term up; the watch brings the new one. Tried again at the next renewal where it fails."""
        where = self._configuration
        try:
            leases.update(
                self._cluster,
                where.namespace,
                where.name,
                {"leaseTransitions": lease.transitions + 1},
                version=lease.metadata.resource_version,
                timeout=_REQUEST_SECONDS,
            )
        except Conflict:
            return  # renewed meanwhile, which the watch is about to tell
        except ClusterError as error:
            _log.warning("no new term of the writer's Lease could be begun", lease=where.lease, why=str(error))


class Elect:
    """Hold the Lease ourselves, as client-go's leader election does, and label the pod of whoever holds it."""

    def __init__(
        self,
        cluster: Cluster,
        configuration: Writer,
        writership: Writership,
        *,
        pod: str,
        label: str,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        threads: Threads | None = None,
    ) -> None:
        self._cluster = cluster
        self._configuration = configuration
        self._writership = writership
        self._pod = pod
        self._label = label
        self._now = now
        self._rng = random.Random()  # noqa: S311 - spreads load, guards nothing
        # a process that starts again is another holder, with another term
        self._identity = f"{pod}_{uuid.uuid4()}"
        self._lease: Lease | None = None
        # of the last one that was seen
        self._transitions = -1
        # when the Lease was last seen to change; its own times are those of another clock
        self._changed_at = 0.0
        self._labelled = False
        self._stopping = threading.Event()
        self._thread = (threads or Threads()).of("elect", self._turn)

    def start(self) -> None:
        """Begin to stand for election; return at once."""
        self._thread.start()

    def stop(self) -> None:
        """Give the Lease back, so that the next one need not wait for its end. To be called once nothing binds."""
        self._stopping.set()
        self._thread.join(_STOP_SECONDS)
        lease = self._lease
        if lease is None or lease.holder != self._identity or self._thread.alive:
            return
        try:
            self._write(lease, holder="", transitions=lease.transitions, seconds=1.0)
        except ClusterError as error:
            _log.warning("the writer's Lease was not given back", lease=self._configuration.lease, why=str(error))

    def _turn(self) -> bool:
        if self._stopping.is_set():
            return False
        try:
            self._try()
        except Conflict:
            self._lease = None  # somebody was faster: look who
            return not self._stopping.wait(_CONFLICT_SECONDS)
        except ClusterError as error:
            if isinstance(error, NotFound):
                self._lease = None  # somebody deleted it: make another
            _log.warning("the writer's Lease could not be renewed", lease=self._configuration.lease, why=str(error))
        else:
            self._label_pods_once()
        return not self._stopping.wait(self._pause())

    def _pause(self) -> float:
        """Say when to try again: less than the period by up to a fifth by chance, and as soon as the Lease runs out.

        Those who stand by then come at once, and all but one of them meet a conflict; but nobody waits for nothing.
        """
        pause = self._configuration.retry_period * self._rng.uniform(0.8, 1.0)
        lease = self._lease
        if lease is None or not lease.holder or self._holds():
            return pause
        left = self._changed_at + _duration(lease) - time.monotonic()
        return min(pause, left) if left > 0 else pause

    def _holds(self) -> bool:
        return self._lease is not None and self._lease.holder == self._identity

    def _try(self) -> None:
        """Renew the Lease where it is ours, take it where nobody has it, and tell who has."""
        where = self._configuration
        asked_at = time.monotonic()
        lease = self._lease
        if lease is None or lease.holder != self._identity:
            lease = leases.read(self._cluster, where.namespace, where.name, timeout=_REQUEST_SECONDS)
            if lease is None:
                # counted on where one was deleted: a Binding of ours in an earlier term may still be on its way
                transitions = self._transitions + 1
                fields = leases.spec(
                    holder=self._identity,
                    transitions=transitions,
                    seconds=where.lease_duration,
                    now=self._now(),
                    acquired=True,
                )
                made = leases.create(self._cluster, where.namespace, where.name, fields, timeout=_REQUEST_SECONDS)
                self._tell(made, asked_at)
                return
        known = self._lease
        if known is None or known.metadata.resource_version != lease.metadata.resource_version:
            self._changed_at = time.monotonic()
        if lease.holder == self._identity:
            lease = self._write(lease, holder=self._identity, transitions=lease.transitions)
        elif not lease.holder or time.monotonic() - self._changed_at >= _duration(lease):
            lease = self._write(lease, holder=self._identity, transitions=lease.transitions + 1, acquired=True)
        self._tell(lease, asked_at)

    def _write(
        self,
        lease: Lease,
        *,
        holder: str,
        transitions: int,
        seconds: float | None = None,
        acquired: bool = False,
    ) -> Lease:
        where = self._configuration
        return leases.update(
            self._cluster,
            where.namespace,
            where.name,
            leases.spec(
                holder=holder,
                transitions=transitions,
                seconds=where.lease_duration if seconds is None else seconds,
                now=self._now(),
                acquired=acquired,
            ),
            version=lease.metadata.resource_version,
            timeout=_REQUEST_SECONDS,
        )

    def _tell(self, lease: Lease, asked_at: float) -> None:
        mine = lease.holder == self._identity
        if mine and not self._holds():
            self._labelled = False
        self._lease, self._transitions = lease, lease.transitions
        # ours counts from when we asked, so that it ends here before it ends for those who saw it later
        until = asked_at + self._configuration.renew_deadline if mine else self._changed_at + _duration(lease)
        self._writership.observe(lease.holder, lease.transitions, mine=mine, until=until)

    def _label_pods_once(self) -> None:
        if not self._holds() or self._labelled:
            return
        try:
            self._label_pods()
        except ClusterError as error:
            _log.warning("the Service does not find this pod, which binds: no label was written", why=str(error))

    def _label_pods(self) -> None:
        """Have the Service's selector find our pod, and no other one: the last writer may be frozen, not gone."""
        namespace = self._configuration.namespace
        query = {"labelSelector": f"{self._label}=true"}
        body = self._cluster.get(f"/api/v1/namespaces/{namespace}/pods", query=query, timeout=_REQUEST_SECONDS).body
        for other in {item.metadata.name for item in answered(_pods, body).items or ()} - {self._pod}:
            writes.label_pod(
                self._cluster, namespace=namespace, name=other, labels={self._label: None}, timeout=_REQUEST_SECONDS
            )
        writes.label_pod(
            self._cluster, namespace=namespace, name=self._pod, labels={self._label: "true"}, timeout=_REQUEST_SECONDS
        )
        self._labelled = True


def _duration(lease: Lease) -> float:
    return float(lease.spec.lease_duration_seconds or _DEFAULT_SECONDS)


class _Pod(msgspec.Struct, frozen=True):
    metadata: Lease.Metadata


class _Pods(msgspec.Struct, frozen=True):
    items: list[_Pod] | None = None


_pods = msgspec.json.Decoder(_Pods)
