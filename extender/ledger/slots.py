"""Holds what a grant says of MIG instances against what is free."""

import msgspec

from cotenant.contract import grant as grants
from extender.ledger.values import Hold, NodeView


def check_slots(view: NodeView, hold: Hold, chosen: grants.Grant) -> None:
    """Raise ValueError unless every instance of *chosen* is free, whoever chose it."""
    states = {state.gpu.uuid: state for state in view.mig}
    taken = {uuid: list(state.taken) for uuid, state in states.items()}
    for container in chosen.containers:
        uuid, placement = container.gpus[0].uuid, container.mig
        state = states.get(uuid)
        if placement is None or state is None or state.closed:
            raise ValueError(f"pod {hold.key} was to get an instance of GPU {uuid}, which has none to give")
        instance = msgspec.structs.replace(placement.instance, uuid="")
        if state.static:
            as_offered = (state.replicas(instance.profile), state.suffix(instance.profile))
            free = state.free_shares(taken[uuid]).get(placement.instance, 0)
            if not free or as_offered != (placement.replicas, placement.suffix):
                raise ValueError(f"pod {hold.key} was to get {instance.profile} at {instance.start}, which is not free")
        else:
            state.geometry.check(instance, taken[uuid])  # PlacementError is a ValueError
        taken[uuid].append(instance)
