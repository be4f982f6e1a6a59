"""Who is being admitted? The kubelet does not say, but what it lists leaves one possibility, or the answer is no.

Allocate carries device ids and nothing else. The kubelet admits pods one at a time: it adds a pod to what it lists
right before it admits it, and until then has given it no devices (pkg/kubelet/kubelet.go, HandlePodAdditions). So the
pod being admitted is the one listed without devices for the container to come; any other such pod was listed before and
has been passed over, since its own admission ended without us: the plugin was not registered, or the pod was rejected.

A container start cannot call Allocate behind the admission's back: the kubelet asks PreStartContainer first, which this
plugin requires, and that fails for a container without devices (devicemanager/manager.go,
GetDeviceRunContainerOptions).

Everything here is pure; `device_plugin.admission.calls` brings the facts.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple, Self

import msgspec

from cotenant.contract import grant as grants
from cotenant.contract.grant import ContainerGrant, GrantError
from cotenant.contract.inventory import Family
from cotenant.contract.names import Names
from cotenant.contract.pods import Container, ContainerStatus, Pod
from cotenant.contract.reasons import Reason
from cotenant.contract.units import parse_quantity
from device_plugin.admission.refusal import RefusedError


class PodName(NamedTuple):
    """Name a pod as PodResources does, which tells no UID."""

    namespace: str
    name: str

    @classmethod
    def of(cls, pod: Pod) -> Self:
        """Name a pod that is known."""
        return cls(pod.metadata.namespace, pod.metadata.name)

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


class Devices(NamedTuple):
    """Hold what the kubelet says that one container has of one resource."""

    pod: PodName
    resource: str
    ids: frozenset[str]


class ListedPod(msgspec.Struct, frozen=True):
    """Hold what the kubelet lists of a pod: by container the ids of what is granted, init containers left out.

    A container asks one resource of these, so its ids are of one.
    """

    name: PodName
    ids: Mapping[str, frozenset[str]]

    @property
    def complete(self) -> bool:
        """Tell whether every container that is listed holds ids, so that none of them can be waiting for some."""
        return all(self.ids.values())


class Past(msgspec.Struct, frozen=True):
    """Hold what is known of earlier calls; all of it may be lost in a restart without an answer becoming wrong.

    *answered* are containers that were given an answer, *refused* pods that were told no, and *passed* pods that were
    listed without devices while another was admitted.
    """

    answered: Collection[tuple[str, str]] = frozenset()
    refused: Collection[str] = frozenset()
    passed: Collection[str] = frozenset()


class Asked(msgspec.Struct, frozen=True):
    """Say what the kubelet must find for a container: so many device ids of one resource."""

    resource: str
    count: int

    def __str__(self) -> str:
        return f"{self.count} of {self.resource}"


class Candidate(msgspec.Struct, frozen=True):
    """Name a container that waits for what it *asked* for, with what it was granted or the *problem* with that.

    *stale* is a reason to believe that its admission is over.
    """

    pod: Pod
    container: str
    asked: Asked
    grant: ContainerGrant | None
    problem: tuple[Reason, str] | None
    stale: str


def candidates(listed: Sequence[ListedPod], pods: Mapping[PodName, Pod], past: Past, names: Names) -> list[Candidate]:
    """Find every container that could be waiting for device ids; *pods* are those of the listed that are known."""
    found = [_waiting(entry, pods[entry.name], past, names) for entry in listed if entry.name in pods]
    # a kubelet may list a pod beside the one that was created after it under the same name
    return list({(c.pod.uid, c.container): c for c in found if c is not None}.values())


def identify(found: Sequence[Candidate], asked: Asked) -> list[Candidate]:
    """Tell which of *found* asks for that now: one, or several whose answers are the same to the byte.

    Raises RefusedError when there is none or they differ; never takes one of several for the likelier.
    """
    fitting = [candidate for candidate in found if candidate.asked == asked]
    # A stale one can be meant only where no fresh one is: the pod being admitted is the last one listed.
    possible = [c for c in fitting if not c.stale] or fitting
    if not possible:
        raise RefusedError(
            Reason.NOT_IDENTIFIED,
            f"no pod that the kubelet lists waits for {asked}" + (f"; waiting are {_describe(found)}" if found else ""),
        )
    if len(possible) == 1 or _same_answer(possible):
        return possible
    raise RefusedError(
        Reason.NOT_IDENTIFIED,
        f"the pod being admitted cannot be told for certain: {_describe(possible)} wait for {asked}; "
        "delete those that do not start",
    )


def granted(candidate: Candidate) -> ContainerGrant:
    """Give what the candidate was granted; raise RefusedError that names its pod when that cannot be used."""
    if candidate.grant is None:
        reason, sentence = candidate.problem or (Reason.NO_GRANT, Reason.NO_GRANT.sentence)
        raise RefusedError(reason, sentence, candidate.pod)
    return candidate.grant


def read_grant(pod: Pod, container: str, asked: Asked, names: Names) -> ContainerGrant:
    """Read what *container* was granted; raise RefusedError when nothing was, or not what it *asked* for."""
    text = pod.annotations.get(names.grant)
    if text is None:
        raise RefusedError(Reason.NO_GRANT, f"pod {pod.key}: {Reason.NO_GRANT.sentence}", pod)
    try:
        found = grants.decode(text).container(container)
    except GrantError as error:
        raise RefusedError(Reason.BAD_GRANT, f"pod {pod.key}: {error}", pod) from error
    problem = ""
    if found is None:
        problem = "does not name it"
    elif found.units != asked.count:
        problem = f"has {found.units} units for it, but it asks for {asked}"
    elif _resource(found, names) != asked.resource:
        problem = f"is of {_resource(found, names)}, but it asks for {asked}"
    if found is None or problem:
        raise RefusedError(Reason.BAD_GRANT, f"pod {pod.key}, container {container}: the grant {problem}", pod)
    return found


def _resource(grant: ContainerGrant, names: Names) -> str:
    """Name the resource whose ids the kubelet must hold for *grant*."""
    if grant.mig is not None:
        return names.mig_prefix + grant.mig.suffix
    return names.gpu_mem if grant.family is Family.MEMORY else f"family {grant.family}"


def asks(container: Container, names: Names) -> Asked | None:
    """Read what *container* asks for of all that is granted, as the kubelet does, from its limits; None for nothing."""
    limits = (container.resources.limits or {}) if container.resources else {}
    for resource in filter(names.is_granted, sorted(limits)):
        try:
            count = parse_quantity(limits[resource])
        except ValueError:
            continue  # no API server lets this through; a kubelet would count 0 as well
        if count:
            return Asked(resource, count)
    return None


def _waiting(entry: ListedPod, pod: Pod, past: Past, names: Names) -> Candidate | None:
    """Find the first container of a pod, in the kubelet's order, that has no devices yet."""
    if pod.ended or pod.uid in past.refused:
        return None  # the kubelet never takes up such a pod again
    asking = [(c.name, role, asked) for c, role in pod.start_order if (asked := asks(c, names)) is not None]
    for position, (container, role, asked) in enumerate(asking):
        answered = (pod.uid, container) in past.answered
        if role == "init":
            # not listed: it has had its turn when we answered for it, or when a container after it holds ids
            done = answered or any(entry.ids.get(later) for later, _, _ in asking[position + 1 :])
        else:
            done = bool(entry.ids.get(container))
        if done:
            continue
        stale = ""
        if pod.uid in past.passed:
            stale = "listed while another pod was admitted"
        elif answered:
            stale = "answered before"
        elif _begun(pod):
            stale = "started before"
        elif pod.metadata.deletion_timestamp is not None:
            stale = "being deleted"
        try:
            grant, problem = read_grant(pod, container, asked, names), None
        except RefusedError as error:
            grant, problem = None, (error.reason, str(error))
        return Candidate(pod=pod, container=container, asked=asked, grant=grant, problem=problem, stale=stale)
    return None


def _begun(pod: Pod) -> bool:
    """Tell whether any container has started, which happens only after the whole pod is admitted."""
    statuses: list[ContainerStatus] = [
        *(pod.status.init_container_statuses or ()),
        *(pod.status.container_statuses or ()),
    ]
    return any(status.started or status.container_id or status.restart_count for status in statuses)


def _same_answer(possible: Sequence[Candidate]) -> bool:
    first = possible[0].grant
    return first is not None and all(candidate.grant == first for candidate in possible)


def _describe(found: Sequence[Candidate]) -> str:
    return ", ".join(
        sorted(f"{c.pod.key} (container {c.container}, {c.asked}{', ' + c.stale if c.stale else ''})" for c in found)
    )
