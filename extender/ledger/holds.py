"""What a pod holds, read from its grant."""

from sys import intern
from typing import TYPE_CHECKING

import msgspec

from cotenant.contract import grant as grants
from cotenant.contract import inventory as inventories
from cotenant.contract.grant import Grant, GrantError
from cotenant.contract.mps import NONE, UNSET_USER, Clients
from cotenant.contract.names import Names
from cotenant.contract.pods import Pod
from cotenant.contract.request import RequestError, parse
from extender.ledger.values import Hold, MIGSlot, Stage

if TYPE_CHECKING:
    from collections.abc import Mapping


def assumed(grant: Grant, *, uid: str, key: str, node: str, since: int) -> Hold:
    """Give what a pod will hold once its Binding with *grant* has been made; *since* is the ledger's mark."""
    return Hold(
        uid=uid,
        key=key,
        node=node,
        stage=Stage.ASSUMED,
        grant=grants.encode(grant),
        charges=grant.charges(),
        alone=_alone(grant),
        clients=grant.clients(),
        slots=_slots(grant),
        gpus=grant.gpus,
        since=since,
    )


def bound(pod: Pod, node: str, text: str, names: Names, unit_bytes: int, *, since: int) -> Hold:
    """Give what a bound pod holds by its grant's *text*, at least as much as it can hold where that is unreadable."""
    charges: Mapping[str, int] = {}
    clients: Mapping[str, Clients] = {}
    alone: frozenset[str] = frozenset()
    slots: tuple[MIGSlot, ...] = ()
    everywhere, unknown, closes_mig, problem, gpus = 0, NONE, False, "", 0
    try:
        grant = grants.decode(text)
        charges = {intern(uuid): amount for uuid, amount in grant.charges().items()}
        alone, clients, slots, gpus = _alone(grant), grant.clients(), _slots(grant), grant.gpus
    except GrantError as error:
        unknown = _possible_clients(pod)
        everywhere, closes_mig = _upper_bound(pod, names, unit_bytes)
        problem, gpus = str(error), _most_gpus(pod, names, unit_bytes)
    return Hold(
        uid=pod.uid,
        key=pod.key,
        node=intern(node),
        stage=Stage.BOUND,
        grant=text,
        charges=charges,
        alone=alone,
        everywhere_bytes=everywhere,
        clients=clients,
        everywhere_clients=unknown,
        slots=slots,
        closes_mig=closes_mig,
        problem=problem,
        gpus=gpus,
        since=since,
    )


def _upper_bound(pod: Pod, names: Names, unit_bytes: int) -> tuple[int, bool]:
    """Count the most that a pod with an unreadable grant can hold of one GPU, and tell whether it can be of a MIG GPU.

    A GPU for itself counts whole.
    """
    try:
        request = parse(pod, names, unit_bytes)
    except RequestError:
        return inventories.MAX_GPU_BYTES, True
    if request is None:
        return 0, False
    if request.profiles:
        return 0, True
    if request.wishes.isolation.whole_gpu:
        return inventories.MAX_GPU_BYTES, False
    return sum(container.units for container in request.containers) * unit_bytes, False


def _most_gpus(pod: Pod, names: Names, unit_bytes: int) -> int:
    """Count the most GPUs that a pod with an unreadable grant can have; 1 where its request cannot be read either."""
    try:
        request = parse(pod, names, unit_bytes)
    except RequestError:
        return 1
    return 0 if request is None else request.gpus


def _slots(grant: Grant) -> tuple[MIGSlot, ...]:
    """List the MIG instances that *grant* gives."""
    return tuple(
        MIGSlot(intern(c.gpus[0].uuid), msgspec.structs.replace(c.mig.instance, uuid=""))
        for c in grant.containers
        if c.mig is not None
    )


def _possible_clients(pod: Pod) -> Clients:
    """Say what a pod with an unreadable grant can be to MPS: any of its containers may be a client."""
    containers = [container for container, _ in pod.start_order]
    users = (pod.user(container) for container in containers)
    return Clients(len(containers), frozenset(UNSET_USER if user is None else user for user in users))


def _alone(grant: Grant) -> frozenset[str]:
    """Name the GPUs that *grant* gives to one pod alone."""
    return frozenset(
        intern(share.uuid) for c in grant.containers if c.mode is inventories.Mode.EXCLUSIVE for share in c.gpus
    )
