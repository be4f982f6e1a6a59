"""Which GPUs a pod wishes for, and whether it is the pod or its namespace that may have none."""

from collections.abc import Iterable

import msgspec

from cotenant.contract.reasons import Reason
from cotenant.contract.request import Wishes, model_wished
from extender.ledger import GPUState, MIGState


def is_wished(state: GPUState | MIGState, wishes: Wishes) -> bool:
    """Tell whether the GPU is of a model and UUID that the pod wishes for, and its namespace may have."""
    gpu = state.gpu
    by_name = not wishes.uuids or gpu.uuid in wishes.uuids
    return by_name and model_wished(gpu.model, wishes.models) and model_wished(gpu.model, wishes.within)


def unwished(states: Iterable[GPUState | MIGState], wishes: Wishes) -> Reason:
    """Say whether it is the pod that wishes for none of *states*, or its namespace that may have none."""
    anywhere = msgspec.structs.replace(wishes, within=())
    return Reason.NAMESPACE_LIMIT if any(is_wished(state, anywhere) for state in states) else Reason.NO_SUCH_GPU
