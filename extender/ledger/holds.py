"""What a pod holds, read from its grant."""

from sys import intern

import msgspec

from cotenant.contract import grant as grants
from cotenant.contract import inventory as inventories
from cotenant.contract.grant import Grant, GrantError
from cotenant.contract.mps import UNSET_USER, Clients
from cotenant.contract.names import Names
from cotenant.contract.pods import Pod
from cotenant.contract.request import RequestError, parse
from extender.ledger.values import Hold, MIGSlot, Stage


def assumed(grant: Grant, *, uid: str, key: str, node: str, since: int) -> Hold:
    """Give what a pod will hold once its Binding with *grant* has been made; *since* is the ledger's mark."""
    hold = Hold(uid=uid, key=key, node=node, stage=Stage.ASSUMED, grant=grants.encode(grant), charges={}, since=since)
    return _given(hold, grant, 0)


def bound(pod: Pod, node: str, text: str, names: Names, unit_bytes: int, *, since: int) -> Hold:
    """Give what a bound pod holds by its grant's *text*, at least as much as it can hold where that is unreadable."""
    hold = Hold(uid=pod.uid, key=pod.key, node=intern(node), stage=Stage.BOUND, grant=text, charges={}, since=since)
    try:
        return _given(hold, grants.decode(text), unit_bytes)
    except GrantError as error:
        return _at_most(msgspec.structs.replace(hold, problem=str(error)), pod, names, unit_bytes)


def _given(hold: Hold, grant: Grant, unit_bytes: int) -> Hold:
    """Fill in what *grant* gives, at least *unit_bytes* for each device id."""
    return msgspec.structs.replace(
        hold,
        charges={intern(uuid): amount for uuid, amount in grant.charges(unit_bytes).items()},
        alone=_alone(grant),
        clients=grant.clients(),
        slots=_slots(grant),
        gpus=grant.gpus,
    )


def _at_most(hold: Hold, pod: Pod, names: Names, unit_bytes: int) -> Hold:
    """Fill in the most that a pod with an unreadable grant can hold: bytes of any one GPU, any MIG GPU, MPS clients.

    A GPU for itself counts whole. Where its request cannot be read either it can hold anything, of one GPU.
    """
    try:
        request = parse(pod, names, unit_bytes)
    except RequestError:
        return msgspec.structs.replace(
            hold,
            everywhere_bytes=inventories.MAX_GPU_BYTES,
            everywhere_clients=_possible_clients(pod),
            closes_mig=True,
            gpus=1,
        )
    if request is None:
        return hold
    if request.profiles:
        return msgspec.structs.replace(hold, closes_mig=True, gpus=request.gpus)
    units = sum(container.units for container in request.containers)
    return msgspec.structs.replace(
        hold,
        everywhere_bytes=inventories.MAX_GPU_BYTES if request.wishes.isolation.whole_gpu else units * unit_bytes,
        everywhere_clients=_possible_clients(pod),
        gpus=request.gpus,
    )


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
