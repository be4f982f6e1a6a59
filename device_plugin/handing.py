"""Hands GPUs out as they are shared now: what a container gets for its grant or shares, and why one gets nothing."""

from collections.abc import Callable, Sequence

from cotenant.contract.grant import ContainerGrant
from cotenant.contract.inventory import GPU, Family, Mode
from cotenant.contract.reasons import Reason
from device_plugin.admission.answer import Answers
from device_plugin.admission.refusal import RefusedError
from device_plugin.api import deviceplugin_pb2 as pb
from device_plugin.families.partitioning import Partitioning


class Handing:
    """Answer for what *shown* says this node's GPUs are now; *problem* says why a GPU's MPS daemon serves nobody.

    Safe to use from many threads.
    """

    def __init__(
        self,
        answers: Answers,
        partitioning: Partitioning,
        *,
        shown: Callable[[], Sequence[GPU]],
        problem: Callable[[GPU], str],
    ) -> None:
        self._answers = answers
        self._partitioning = partitioning
        self._shown = shown
        self._problem = problem

    def granted(self, grant: ContainerGrant) -> pb.ContainerAllocateResponse:
        """Answer for a grant."""
        if grant.family is Family.MIG_DYNAMIC and grant.mig is not None:
            return self._answers.made(grant, self._partitioning.specs.full_name(grant.gpus[0].uuid, grant.mig.instance))
        nodes = self._partitioning.nodes.get(grant.mig.uuid, ()) if grant.mig is not None else ()
        return self._answers.granted(grant, nodes)

    def shares(self, uuids: Sequence[str]) -> pb.ContainerAllocateResponse:
        """Answer for shares of GPUs, or where MIG instances are offered as GPUs, for these; raise RefusedError."""
        gpus = [gpu for gpu in self._shown() if gpu.uuid in uuids]
        if len(gpus) < len(uuids) or gpus[0].mode is Mode.MIG:
            return self._answers.unguided(uuids)
        if len({gpu.mps_pipe for gpu in gpus}) > 1:
            raise RefusedError(
                Reason.MODE_CONFLICT,
                f"shares of GPUs {', '.join(uuids)} are under different MPS daemons, of which a process can have one; "
                "ask for 1, or put the GPUs into one group",
            )
        return self._answers.shares(gpus)

    def unserved(self, grant: ContainerGrant) -> str:
        """Say why a grant cannot be served as its GPUs are shared now; "" where it can."""
        uuids = [share.uuid for share in grant.gpus]
        for gpu in (gpu for gpu in self._shown() if gpu.uuid in uuids):
            if gpu.family is not Family.MEMORY or gpu.mps_pipe != grant.mps_pipe:
                return (
                    f"GPU {gpu.uuid} is shared in another way than it was granted for, by now in family {gpu.family}, "
                    f"mode {gpu.mode}; delete the pod so that it is placed again"
                )
            if gpu.foreign is not None and gpu.fenced:
                return f"GPU {gpu.uuid} is {gpu.foreign.detail}; delete the pod so that it is placed again"
            if gpu.mode is Mode.MPS and (why := self._problem(gpu)):
                return f"GPU {gpu.uuid} cannot be used now: {why}"
        return ""
