"""Answers the kubelet's three questions: which ids to take, what a container gets, and whether it may start."""

import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple, Protocol

import structlog
from cachetools import LRUCache

from cotenant.cluster import ClusterError
from cotenant.contract.grant import ContainerGrant
from cotenant.contract.names import Names
from cotenant.contract.pods import Pod
from cotenant.contract.reasons import Reason
from device_plugin.admission import identity, ids
from device_plugin.admission.identity import Asked, Candidate, ListedPod, Past, PodName
from device_plugin.admission.refusal import PodResourcesError, RefusedError

log = structlog.get_logger(__name__)

# Allocate runs in the kubelet's one sync loop: while it waits for us, no pod of the node is admitted.
_ALLOCATE_SECONDS = 2.0
# PreStartContainer runs in the pod's own worker, which gives it 30 s.
_PRE_START_SECONDS = 10.0
# A node has 110 pods by default; what is forgotten is asked for again.
_REMEMBERED = 1024
# The same ids are given to one pod after the other, for months; no more than these have them at once (ids.pick).
_HOLDERS = 8


class Lister(Protocol):
    """Be asked what the kubelet's pods hold."""

    def list(self, *, deadline: float) -> list[ListedPod]:
        """List the pods; raise PodResourcesError after the monotonic time *deadline*."""


class Pods(Protocol):
    """Be asked about the pods of this node."""

    def known(self, name: PodName) -> Pod | None:
        """Give the pod from the cache."""

    def all_known(self) -> Sequence[Pod]:
        """List the pods in the cache."""

    def read(self, name: PodName, *, deadline: float) -> Pod | None:
        """Give the pod as the API server has it now; raise ClusterError when it cannot be asked."""


class Admitted(NamedTuple):
    """Name whom an answer is for; *pod* is None for one of several whose answers are the same to the byte."""

    pod: Pod | None
    grant: ContainerGrant

    def keys(self) -> dict[str, str]:
        """Give what names it in logs."""
        gpus = ",".join(share.uuid for share in self.grant.gpus)
        return ({} if self.pod is None else _keys(self.pod)) | {"container": self.grant.name, "gpu": gpus}


class Admission:
    """Tell the containers of one node apart and hold the kubelet's ids against their grants.

    *has_gpu* tells whether this node has a GPU. Every method may be called from any thread and raises RefusedError.
    """

    def __init__(
        self,
        lister: Lister,
        pods: Pods,
        names: Names,
        *,
        has_gpu: Callable[[str], bool],
        remembered: int = _REMEMBERED,
    ) -> None:
        self._lister = lister
        self._pods = pods
        self._names = names
        self._has_gpu = has_gpu
        self._lock = threading.Lock()
        self._answered: LRUCache[tuple[str, str], None] = LRUCache(remembered)
        # whose allocations took exactly these ids, by UID, the latest last; several when the kubelet offered them again
        # (ids.pick). Under their digest, since a set of a hundred ids takes 15 KiB.
        self._holders: LRUCache[bytes, tuple[str, ...]] = LRUCache(remembered)
        self._refused: LRUCache[str, None] = LRUCache(remembered)
        self._passed: LRUCache[str, None] = LRUCache(remembered)
        self._expected: _Expected | None = None

    def prefer(self, asked: Asked, available: Collection[str], must: Collection[str]) -> list[str]:
        """Choose ids on the granted GPUs for the container being admitted, which *asked* for so many."""
        self._expected = None
        found, held = self._identify(asked)
        try:
            picked = ids.pick(self._granted(found[0]), available, must, held)
        except RefusedError as error:
            raise self._refuse(error, found) from error
        if len(found) == 1:
            self._expected = _Expected(asked, frozenset(picked), found[0])
        return picked

    def allocate(self, resource: str, chosen: Iterable[str]) -> Admitted:
        """Tell what the container being admitted was granted, once *chosen* is known to lie on its GPUs."""
        chosen = frozenset(chosen)
        asked = Asked(resource, len(chosen))
        expected, self._expected = self._expected, None
        if expected is not None and (expected.asked, expected.chosen) == (asked, chosen):
            found = [expected.candidate]
        else:
            found, _ = self._identify(asked)
        try:
            grant = self._granted(found[0])
            ids.check(grant, chosen)
        except RefusedError as error:
            raise self._refuse(error, found) from error
        digest = ids.digest(chosen)
        with self._lock:
            if len(found) == 1:
                uid = found[0].pod.uid
                self._answered[uid, found[0].container] = None
                before = [holder for holder in self._holders.get(digest, ()) if holder != uid]
                self._holders[digest] = (*before[1 - _HOLDERS :], uid)
            else:
                # it may be any of them, and PreStartContainer will see which
                self._holders.pop(digest, None)
        return Admitted(found[0].pod if len(found) == 1 else None, grant)

    def pre_start(self, resource: str, held: Iterable[str]) -> Admitted:
        """Check that the container that is about to start with ids *held* of *resource* is the one answered for.

        After a restart of the plugin nothing is remembered; then its grant must explain the ids. Containers start again
        without another Allocate, so that their GPUs may be gone since.
        """
        held = frozenset(held)
        deadline = time.monotonic() + _PRE_START_SECONDS
        owners = [
            (entry.name, container)
            for entry in self._list(deadline)
            for container, owned in entry.ids.items()
            if owned == held
        ]
        if not owners:
            return self._init_container(Asked(resource, len(held)), held)
        # Where two hold the same ids it is not known which one starts: both must be explained, or neither does.
        asked = Asked(resource, len(held))
        checked = [self._check_owner(name, container, asked, held, deadline) for name, container in owners]
        return checked[0]

    def overtaken(self) -> None:
        """Note which pods wait without devices now; their admission is over when another pod's begins.

        Called when a kubelet has just connected: it may have admitted pods of ours without asking anybody.
        """
        listed = self._list(time.monotonic() + _PRE_START_SECONDS)
        pods = {entry.name: pod for entry in listed if (pod := self._pods.known(entry.name)) is not None}
        with self._lock:
            waiting = identity.candidates(listed, pods, self._past(), self._names)
            self._passed.update((candidate.pod.uid, None) for candidate in waiting)

    def _identify(self, asked: Asked) -> tuple[list[Candidate], set[str]]:
        """Tell whom the kubelet admits, and which ids are held by containers.

        The cache answers, as far as what it says has been made sure of.
        """
        deadline = time.monotonic() + _ALLOCATE_SECONDS
        everybody = self._list(deadline)
        sight = _Sight([entry for entry in everybody if not entry.complete], self._pods, deadline)
        while True:
            with self._lock:
                past = self._past()
            found = identity.candidates(sight.listed, sight.pods, past, self._names)
            try:
                identified = identity.identify(found, asked)
            except RefusedError:
                if not sight.refresh(sight.names):
                    raise
                continue
            # The watch can be behind the one that the kubelet follows. Whoever is taken is asked for, and whoever is
            # passed by for what the cache says; and where all seem over, one is meant only if nobody else can be.
            doubtful = {PodName.of(c.pod) for c in found if c.stale or c in identified}
            if any(candidate.stale for candidate in identified):
                doubtful = sight.names
            if not sight.refresh(doubtful):
                break
        self._remember_passed(found, identified)
        return identified, {device for entry in everybody for owned in entry.ids.values() for device in owned}

    def _granted(self, candidate: Candidate) -> ContainerGrant:
        grant = identity.granted(candidate)
        self._require_gpus(grant)
        return grant

    def _require_gpus(self, grant: ContainerGrant) -> None:
        """Refuse a grant of GPUs that are not here: another node's, or of those this node had before."""
        for share in grant.gpus:
            if not self._has_gpu(share.uuid):
                raise RefusedError(
                    Reason.BAD_GRANT,
                    f"container {grant.name} was granted GPU {share.uuid}, which this node does not have; delete "
                    "the pod so that it is placed again",
                )

    def _list(self, deadline: float) -> list[ListedPod]:
        try:
            return self._lister.list(deadline=deadline)
        except PodResourcesError as error:
            raise RefusedError(Reason.NOT_IDENTIFIED, str(error)) from error

    def _holders_of(self, held: frozenset[str]) -> tuple[str, ...]:
        digest = ids.digest(held)
        with self._lock:
            return self._holders.get(digest, ())

    def _past(self) -> Past:
        return Past(
            answered=frozenset(self._answered), refused=frozenset(self._refused), passed=frozenset(self._passed)
        )

    def _remember_passed(self, found: Sequence[Candidate], identified: Sequence[Candidate]) -> None:
        """Note that all pods beside the one admitted have had their turn."""
        meant = {candidate.pod.uid for candidate in identified}
        if len(meant) == 1:
            with self._lock:
                self._passed.update((c.pod.uid, None) for c in found if c.pod.uid not in meant)

    def _refuse(self, error: RefusedError, found: Sequence[Candidate]) -> RefusedError:
        """Remember that the kubelet rejects the pod now; give the error with the pod named."""
        if len({candidate.pod.uid for candidate in found}) > 1:
            return error
        with self._lock:
            self._refused[found[0].pod.uid] = None
        return RefusedError(error.reason, str(error), found[0].pod)

    def _check_owner(
        self, name: PodName, container: str, asked: Asked, held: frozenset[str], deadline: float
    ) -> Admitted:
        try:
            pod = self._pods.read(name, deadline=deadline)
        except ClusterError as error:
            # containers restart also while the API server is away; what we knew of the pod then has to do
            pod = self._pods.known(name)
            if pod is None:
                raise RefusedError(
                    Reason.NOT_IDENTIFIED, f"pod {name} is unknown here, and the API server does not tell: {error}"
                ) from error
        if pod is None:
            raise RefusedError(Reason.POD_GONE, f"pod {name}: {Reason.POD_GONE.sentence}")
        holders = self._holders_of(held)
        if holders and pod.uid not in holders:
            raise RefusedError(
                Reason.NOT_IDENTIFIED,
                f"the device ids of pod {name}, container {container}, were answered for the pod with UID "
                f"{', '.join(sorted(holders))}, not for this one; delete the pod so that it is placed again",
                pod,
            )
        grant = identity.read_grant(pod, container, asked, self._names)
        try:
            ids.check(grant, held)
            self._require_gpus(grant)
        except RefusedError as error:
            raise RefusedError(error.reason, str(error), pod) from error
        return Admitted(pod, grant)

    def _init_container(self, asked: Asked, held: frozenset[str]) -> Admitted:
        """Find the ordinary init container that starts with *held*: the kubelet does not list these."""
        holders = self._holders_of(held)
        for pod in self._pods.all_known():
            if pod.ended or (holders and pod.uid not in holders):
                continue
            for container, role in pod.start_order:
                if role != "init" or identity.asks(container, self._names) != asked:
                    continue
                try:
                    grant = identity.read_grant(pod, container.name, asked, self._names)
                    ids.check(grant, held)
                    self._require_gpus(grant)
                except RefusedError:
                    continue
                return Admitted(pod, grant)
        raise RefusedError(
            Reason.NOT_IDENTIFIED,
            f"the kubelet lists no container with the device ids {', '.join(sorted(held))}, and no init container "
            "was granted their GPU",
        )


class _Expected(NamedTuple):
    """Hold the container that prefer() has just identified, and the ids that it was told to take.

    Admission is serial, and what comes next is Allocate for the same container (devicemanager/manager.go,
    devicesToAllocate). Where it is for exactly these ids nobody need be asked again who is meant: Allocate then takes
    1 ms, not the 5 to 50 of a List on a busy node. It counts once, so an allocation that comes without
    a question before it (ids handed on by an init container, or the last that are free) is identified by itself.
    """

    asked: Asked
    chosen: frozenset[str]
    candidate: Candidate


class _Sight:
    """Hold the pods that the kubelet lists, during one call: from the cache at first, then asked for."""

    def __init__(self, listed: Sequence[ListedPod], pods: Pods, deadline: float) -> None:
        self.listed = listed
        self.names = {entry.name for entry in listed}
        self.pods: dict[PodName, Pod] = {}
        self._source = pods
        self._deadline = deadline
        self._asked: set[PodName] = set()
        for name in self.names:
            known = pods.known(name)
            if known is None:
                self.refresh({name})
            else:
                self.pods[name] = known

    def refresh(self, names: set[PodName]) -> bool:
        """Ask the API server for those of *names* that were not asked for yet; tell whether there were any."""
        new = names - self._asked
        for name in new:
            self._asked.add(name)
            known = self.pods.get(name)
            try:
                now = self._source.read(name, deadline=self._deadline)
            except ClusterError as error:
                if known is None:
                    raise RefusedError(
                        Reason.NOT_IDENTIFIED,
                        f"the pod being admitted may be {name}, which the API server does not tell: {error}",
                    ) from error
                log.warning("admission.pod_not_read", **_keys(known), error=str(error))
                continue
            # one that is gone may still be what the kubelet admits, which hears of it a moment later
            if now is not None:
                self.pods[name] = now
        return bool(new)


def _keys(pod: Pod) -> dict[str, str]:
    return {"pod": pod.key, "pod_uid": pod.uid}
