"""GPUs counted by memory: ids stand for units, and the grant says which GPU and how many bytes."""

from collections.abc import Callable, Collection

import structlog

from cotenant.contract.grant import ContainerGrant
from device_plugin.admission import Admission
from device_plugin.api import deviceplugin_pb2 as pb
from device_plugin.identity import Asked

log = structlog.get_logger(__name__)


class Memory:
    """Answer for *resource*, units of GPU memory; *answer* makes the response for a grant.

    Every method may be called from any thread and raises RefusedError.
    """

    def __init__(
        self, resource: str, admission: Admission, answer: Callable[[ContainerGrant], pb.ContainerAllocateResponse]
    ) -> None:
        self._resource = resource
        self._admission = admission
        self._answer = answer

    def prefer(self, available: Collection[str], must: Collection[str], count: int) -> list[str]:
        """Steer the kubelet to the ids of the granted GPU."""
        return self._admission.prefer(Asked(self._resource, count), available, must)

    def allocate(self, ids: Collection[str]) -> pb.ContainerAllocateResponse:
        """Give the container being admitted what it was granted."""
        admitted = self._admission.allocate(self._resource, ids)
        log.info("allocate.answered", **admitted.keys(), units=len(ids))
        return self._answer(admitted.grant)

    def start(self, ids: Collection[str]) -> None:
        """Hold a container back that is not the one its device ids were answered for."""
        admitted = self._admission.pre_start(self._resource, ids)
        log.info("container.starts", **admitted.keys(), units=len(ids))
