"""GPUs counted by memory: ids stand for units, and the grant says which GPU and how many bytes."""

from collections.abc import Callable, Collection

import structlog

from cotenant.contract.grant import ContainerGrant
from cotenant.contract.reasons import Reason
from device_plugin.admission import Admission, Admitted
from device_plugin.api import deviceplugin_pb2 as pb
from device_plugin.identity import Asked
from device_plugin.refusal import RefusedError

log = structlog.get_logger(__name__)


class Memory:
    """Answer for *resource*, units of GPU memory; *answer* makes the response for a grant.

    *unserved* says why a grant cannot be served as its GPUs are now, "" where it can.

    Every method may be called from any thread and raises RefusedError.
    """

    def __init__(
        self,
        resource: str,
        admission: Admission,
        answer: Callable[[ContainerGrant], pb.ContainerAllocateResponse],
        unserved: Callable[[ContainerGrant], str],
    ) -> None:
        self._resource = resource
        self._admission = admission
        self._answer = answer
        self._unserved = unserved

    def prefer(self, available: Collection[str], must: Collection[str], count: int) -> list[str]:
        """Steer the kubelet to the ids of the granted GPU."""
        return self._admission.prefer(Asked(self._resource, count), available, must)

    def allocate(self, ids: Collection[str]) -> pb.ContainerAllocateResponse:
        """Give the container being admitted what it was granted."""
        admitted = self._admission.allocate(self._resource, ids)
        self._check(admitted)
        log.info("allocate.answered", **admitted.keys(), units=len(ids))
        return self._answer(admitted.grant)

    def start(self, ids: Collection[str]) -> None:
        """Hold a container back that is not the one its device ids were answered for."""
        admitted = self._admission.pre_start(self._resource, ids)
        self._check(admitted)
        log.info("container.starts", **admitted.keys(), units=len(ids))

    def _check(self, admitted: Admitted) -> None:
        why = self._unserved(admitted.grant)
        if why:
            raise RefusedError(Reason.MODE_CONFLICT, f"container {admitted.grant.name}: {why}", admitted.pod)
