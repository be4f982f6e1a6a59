"""What a pod asks of us, read from its resources and wishes; refused with a sentence where it cannot be read."""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

import msgspec

from cotenant.contract.compute import NOTHING, Compute, requests
from cotenant.contract.grant import Isolation, Role, peak
from cotenant.contract.mps import UNSET_USER, Clients
from cotenant.contract.names import ALIASES_IN_GIB, ALIASES_IN_MIB, Names
from cotenant.contract.pods import Container, Pod, Resources
from cotenant.contract.reasons import Reason
from cotenant.contract.units import format_bytes, parse_quantity

_SMALL_NUMBER = re.compile("[1-9][0-9]{0,3}")
# More GPUs than any node has; keeps "1000000000" from being planned for.
MAX_GPUS = 64
# A pod's author is not trusted, and every node is judged by what a pod says: thousands of containers or patterns would
# hold up the scheduling of everybody else's pods.
MAX_CONTAINERS = 64
MAX_WISHES = 64
_LONGEST_WISH = 256
# A pattern is compiled when it is first met, 25 us a letter of the worst, while every other pod's filter waits.
_MODEL_LETTERS = 1024


# All annotations of an object together, keys and values (apimachinery, pkg/api/validation, TotalAnnotationSizeLimitB).
# It is not looked at when a pod is bound, but at each update of the pod from then on.
MAX_ANNOTATIONS_BYTES = 256 << 10
# The most that ours take: the grant's head and the writer's term, a container's five, and each of its GPUs in them.
_POD_BYTES, _CONTAINER_BYTES, _GPU_BYTES = 1024, 1536, 160
# UTF-8 has at most so many bytes for a character.
_CHARACTER_BYTES = 4


class RequestError(ValueError):
    """Say why a pod's request cannot be met by any node, as a Reason and a sentence that names the container."""

    def __init__(self, reason: Reason, sentence: str) -> None:
        super().__init__(sentence)
        self.reason = reason

    def anew(self) -> "RequestError":
        """Give the same to raise, where one is kept: each raise of an object adds its frames, and what they hold."""
        return RequestError(self.reason, str(self))


class ContainerRequest(msgspec.Struct, frozen=True):
    """Say what one container asks for: *units* in all, *share_bytes* of each of its GPUs.

    Or one MIG instance, whose *profile* is written as in the resource's name; then it is one unit of no bytes.
    *user* is its runAsUser, which a GPU under MPS goes by; None where nobody names one.
    """

    name: str
    role: Role
    units: int
    share_bytes: int
    profile: str = ""
    user: int | None = None

    @property
    def clients(self) -> Clients:
        """Say what it would be to MPS."""
        return Clients(1, frozenset({UNSET_USER if self.user is None else self.user}))


class Wishes(msgspec.Struct, frozen=True):
    """Hold what a pod's annotations wish for; empty tuples and strings wish for nothing."""

    gpu_count: int = 1
    isolation: Isolation = Isolation.NONE
    models: tuple[str, ...] = ()
    uuids: tuple[str, ...] = ()
    # not its own wish: the models that its namespace may have, where that is limited
    within: tuple[str, ...] = ()
    policy: str = ""
    threads: int = 100


class PodRequest(msgspec.Struct, frozen=True):
    """Say what a pod asks for, container by container in the order the kubelet starts them."""

    containers: tuple[ContainerRequest, ...]
    wishes: Wishes
    # what it takes of a node besides; kube-scheduler sees to it that a node has that, policies may weigh it
    compute: Compute = NOTHING
    # spec.schedulerName: which profile of kube-scheduler it is for
    scheduler: str = ""

    @property
    def shape(self) -> tuple[tuple[tuple[Role, int | str], ...], tuple[int | None, ...], Wishes, Compute]:
        """Give all of the request that decides where it belongs, so not the containers' names.

        The users decide on nodes with GPUs under MPS alone.
        """
        roles = tuple((container.role, container.share_bytes or container.profile) for container in self.containers)
        return roles, tuple(container.user for container in self.containers), self.wishes, self.compute

    @property
    def profiles(self) -> tuple[str, ...]:
        """List the MIG profiles that the containers ask, one each; none where they ask memory."""
        return tuple(container.profile for container in self.containers if container.profile)

    @property
    def whole(self) -> bool:
        """Tell whether all containers share one set of GPUs.

        The kubelet hands an ordinary init container's device ids to the next container without asking us
        (devicemanager/manager.go, devicesToAllocate), so such a pod cannot change GPUs between containers. And a GPU
        for the pod itself is for all of its containers. MIG instances are each container's own, be they strict.
        """
        together = self.wishes.isolation.whole_gpu or any(container.role is Role.INIT for container in self.containers)
        return together and not self.profiles

    @property
    def gpus(self) -> int:
        """Count the GPUs that it would hold, as Grant.gpus does."""
        return self.wishes.gpu_count if self.whole else self.wishes.gpu_count * len(self.containers)

    @property
    def whole_bytes(self) -> int:
        """Count the bytes of each GPU that the pod holds at most when it lies on one set of GPUs."""
        return peak([(c.role, {"": c.share_bytes}) for c in self.containers])[""]

    @property
    def whole_clients(self) -> Clients:
        """Say what the pod would be to MPS when it lies on one set of GPUs."""
        count = peak([(c.role, {"": 1}) for c in self.containers])[""]
        return Clients(count, frozenset().union(*(c.clients.users for c in self.containers)))

    def describe(self) -> str:
        """Say it for a person: "8 GiB", "2 x 40 GiB", "8 GiB + 4 GiB"."""
        if self.profiles:
            return " + ".join(f"MIG {profile}" for profile in self.profiles)
        count = self.wishes.gpu_count
        shares = [format_bytes(c.share_bytes) for c in self.containers]
        return " + ".join(f"{count} x {share}" if count > 1 else share for share in shares)


def parse(pod: Pod, names: Names, unit_bytes: int) -> PodRequest | None:
    """Read what *pod* asks for; None when it asks nothing of ours.

    Raises RequestError when it asks for something that cannot be: amounts that are zero, negative, fractions or absurd,
    limits that differ from requests, memory that does not split over its GPUs, wishes that mean nothing, two families.
    """
    asking = [(c, role, amount) for c, role in pod.start_order if (amount := _amount(c, names)) is not None]
    prefix = names.mig_prefix
    instances = [(c, role, asked) for c, role in pod.start_order if (asked := _asked_instances(c, prefix))]
    if instances:
        return _with_room(_partitioned(pod, [c for c, _, _ in asking], instances, names), pod)
    if not asking:
        return None
    if len(asking) > MAX_CONTAINERS:
        raise RequestError(
            Reason.BAD_REQUEST,
            f"{len(asking)} containers ask {names.gpu_mem}; ask in {MAX_CONTAINERS} or fewer of them",
        )
    wishes = _wishes(pod.annotations, names)
    containers = []
    for container, role, units in asking:
        _refuse_other_families(container, names, names.gpu_mem)
        if units % wishes.gpu_count:
            raise RequestError(
                Reason.BAD_REQUEST,
                f"container {container.name} asks {names.gpu_mem}: {units}, which does not split equally over "
                f"{names.gpu_count}: {wishes.gpu_count}; ask for a multiple of {wishes.gpu_count}",
            )
        containers.append(
            ContainerRequest(
                name=container.name,
                role=Role(role),
                units=units,
                share_bytes=units // wishes.gpu_count * unit_bytes,
                user=pod.user(container),
            )
        )
    scheduler = pod.spec.scheduler_name or ""
    request = PodRequest(containers=tuple(containers), wishes=wishes, compute=requests(pod), scheduler=scheduler)
    first = next((container.name for container in containers if container.role is Role.INIT), None)
    if first is not None and wishes.gpu_count > 1:
        raise RequestError(
            Reason.BAD_REQUEST,
            f"init container {first} asks {names.gpu_mem} in a pod "
            f"with {names.gpu_count}: {wishes.gpu_count}; the kubelet would mix up the GPUs' ids, so let only main "
            "containers ask, or use one GPU",
        )
    return _with_room(request, pod)


def _with_room(request: PodRequest, pod: Pod) -> PodRequest:
    """Refuse a pod that the annotations of its grant would leave as one that nobody can update."""
    if pod.spec.node_name:
        return request
    ours = _POD_BYTES + len(request.containers) * (_CONTAINER_BYTES + request.wishes.gpu_count * _GPU_BYTES)
    theirs = pod.annotations
    if sum(map(len, theirs)) + sum(map(len, theirs.values())) <= (MAX_ANNOTATIONS_BYTES - ours) // _CHARACTER_BYTES:
        return request
    size = sum(len(key.encode()) + len(value.encode()) for key, value in theirs.items())
    if size + ours > MAX_ANNOTATIONS_BYTES:
        less = (
            "give it less in annotations"
            if ours < MAX_ANNOTATIONS_BYTES
            else "ask in fewer containers, or for fewer GPUs"
        )
        raise RequestError(
            Reason.NO_ROOM_FOR_GRANT,
            f"the pod's annotations have {size} bytes and a grant may take {ours} more, {MAX_ANNOTATIONS_BYTES} are "
            f"allowed; once bound nobody could update the pod, so {less}",
        )
    return request


def _asked_instances(container: Container, prefix: str) -> list[str]:
    """List the resources of MIG instances, which begin with *prefix*, that *container* names, sorted."""
    if container.resources is None:
        return []
    # the API server sees to it that limits and requests name the same, but not everybody who asks is one
    named = [*(container.resources.limits or ()), *(container.resources.requests or ())]
    return sorted({resource for resource in named if resource.startswith(prefix)})


def _partitioned(
    pod: Pod, others: list[Container], asking: Sequence[tuple[Container, str, list[str]]], names: Names
) -> PodRequest:
    """Read a pod whose containers ask MIG instances; *others* ask memory."""
    if len(asking) > MAX_CONTAINERS:
        raise RequestError(
            Reason.BAD_REQUEST, f"{len(asking)} containers ask MIG instances; ask in {MAX_CONTAINERS} or fewer of them"
        )
    wishes = _wishes(pod.annotations, names)
    containers = []
    for container, role, resources in asking:
        resource = resources[0]
        _refuse_other_families(container, names, resource)
        _refuse_mixed(container, resource, others, names)
        if _whole_amount(container, resource) != 1:
            raise RequestError(
                Reason.BAD_REQUEST,
                f"container {container.name} asks {resource}: {_whole_amount(container, resource)}; "
                "ask for 1, since a process can use one MIG instance",
            )
        if Role(role) is Role.INIT:
            raise RequestError(
                Reason.BAD_REQUEST,
                f"init container {container.name} asks {resource}; the kubelet would hand its instance on to the next "
                "container, so let only main containers and sidecars ask",
            )
        profile = resource.removeprefix(names.mig_prefix)
        containers.append(ContainerRequest(container.name, Role(role), units=1, share_bytes=0, profile=profile))
    if wishes.gpu_count > 1:
        raise RequestError(
            Reason.BAD_REQUEST,
            f"{names.gpu_count}: {wishes.gpu_count} in a pod that asks MIG instances; leave it out",
        )
    if wishes.isolation is Isolation.EXCLUSIVE:
        raise RequestError(
            Reason.BAD_REQUEST,
            f"{names.isolation}: exclusive in a pod that asks MIG instances, whose GPU has others; ask strict",
        )
    scheduler = pod.spec.scheduler_name or ""
    return PodRequest(containers=tuple(containers), wishes=wishes, compute=requests(pod), scheduler=scheduler)


def _refuse_mixed(container: Container, resource: str, others: list[Container], names: Names) -> None:
    if others:
        raise RequestError(
            Reason.TWO_FAMILIES,
            f"container {others[0].name} asks {names.gpu_mem} and container {container.name} asks {resource}; "
            "ask for one of them in a pod",
        )


def _amount(container: Container, names: Names) -> int | None:
    """Read how many units *container* asks for; None when it names neither our resource nor an alias."""
    if container.resources is None:
        return None
    named = {*(container.resources.limits or ()), *(container.resources.requests or ())}
    for alias in (*ALIASES_IN_GIB, *ALIASES_IN_MIB):
        if alias in named:
            # Only admission may rewrite it: the kubelet would never call us for a name we do not advertise.
            raise RequestError(
                Reason.BAD_REQUEST,
                f"container {container.name} asks {alias}, which admission rewrites to {names.gpu_mem}; "
                "the admission policy or webhook is not installed",
            )
    if names.gpu_mem not in named:
        return None
    return _whole_amount(container, names.gpu_mem)


def _whole_amount(container: Container, resource: str) -> int:
    """Read how many of *resource*, which it names, a container asks."""
    amounts = container.resources or Resources()
    limit, request = (amounts.limits or {}).get(resource), (amounts.requests or {}).get(resource)
    if (
        limit is not None
        and request is not None
        and _units(container, resource, limit) != _units(container, resource, request)
    ):
        raise RequestError(
            Reason.BAD_REQUEST,
            f"container {container.name} has limit {limit} and request {request} of {resource}; make them equal",
        )
    return _units(container, resource, limit if limit is not None else request)


def _units(container: Container, resource: str, amount: str | int | None) -> int:
    try:
        units = parse_quantity(amount if amount is not None else "")
    except ValueError as error:
        raise RequestError(Reason.BAD_REQUEST, f"container {container.name} asks {resource}: {error}") from error
    if units < 1:
        raise RequestError(
            Reason.BAD_REQUEST, f"container {container.name} asks {resource}: {units}; ask for 1 unit or more"
        )
    return units


def _refuse_other_families(container: Container, names: Names, resource: str) -> None:
    resources = container.resources
    asked = set((resources and resources.limits) or ()) | set((resources and resources.requests) or ())
    for other in sorted(asked):
        if other != resource and names.is_gpu(other):
            first, second = (names.gpu_mem, resource) if other == names.gpu_mem else (resource, other)
            raise RequestError(
                Reason.TWO_FAMILIES, f"container {container.name} asks both {first} and {second}; ask for one of them"
            )


def _wishes(annotations: dict[str, str], names: Names) -> Wishes:
    wished = annotations.get(names.isolation, Isolation.NONE)
    try:
        isolation = Isolation(wished)
    except ValueError:
        sentence = f"{names.isolation}: {wished[:40]!r} is none of {', '.join(Isolation)}"
        raise RequestError(Reason.BAD_REQUEST, sentence) from None
    models = _list(annotations, names.gpu_model)
    if sum(map(len, models)) > _MODEL_LETTERS:
        raise RequestError(
            Reason.BAD_REQUEST,
            f"{names.gpu_model} has more than {_MODEL_LETTERS} letters; name fewer models, or parts of their names",
        )
    return Wishes(
        gpu_count=_whole_number(annotations, names.gpu_count, default=1, most=MAX_GPUS),
        isolation=isolation,
        models=models,
        uuids=_list(annotations, names.gpu_uuid),
        policy=annotations.get(names.policy, ""),
        threads=_whole_number(annotations, names.compute_percent, default=100, most=100),
    )


def _whole_number(annotations: dict[str, str], key: str, *, default: int, most: int) -> int:
    text = annotations.get(key)
    if text is None:
        return default
    if not (_SMALL_NUMBER.fullmatch(text) and int(text) <= most):
        raise RequestError(Reason.BAD_REQUEST, f"{key}: {text[:40]!r} is not a whole number from 1 to {most}")
    return int(text)


def model_wished(model: str, wishes: Sequence[str]) -> bool:
    """Tell whether a GPU's model is one of *wishes*: patterns where they have a star, else parts of the name."""
    lower = model.lower()
    return not wishes or any(
        fnmatchcase(lower, wish.lower() if "*" in wish else f"*{wish.lower()}*") for wish in wishes
    )


def _list(annotations: dict[str, str], key: str) -> tuple[str, ...]:
    parts = tuple(part for item in annotations.get(key, "").split(",") if (part := item.strip()))
    if len(parts) > MAX_WISHES or any(len(part) > _LONGEST_WISH for part in parts):
        raise RequestError(
            Reason.BAD_REQUEST, f"{key} lists more than {MAX_WISHES} names, or one of more than {_LONGEST_WISH} letters"
        )
    return parts
