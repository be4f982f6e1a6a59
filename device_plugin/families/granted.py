"""What containers get by a grant of the extender's: whoever the kubelet admits is told apart, and given just that."""

from collections.abc import Callable, Collection

import structlog

from cotenant.contract.grant import ContainerGrant
from device_plugin.admission.calls import Admission, Admitted
from device_plugin.admission.identity import Asked
from device_plugin.api import deviceplugin_pb2 as pb

log = structlog.get_logger(__name__)


class Granted:
    """Answer for *resource*, whose ids follow grants; *answer* makes the response for one.

    Families say in _serve what an allocation takes besides, and in _prepare what a start does.

    Every method may be called from any thread and raises RefusedError.
    """

    def __init__(
        self, resource: str, admission: Admission, answer: Callable[[ContainerGrant], pb.ContainerAllocateResponse]
    ) -> None:
        self._resource = resource
        self._admission = admission
        self._answer = answer

    def prefer(self, available: Collection[str], must: Collection[str], count: int) -> list[str]:
        """Steer the kubelet to the ids of what was granted."""
        return self._admission.prefer(Asked(self._resource, count), available, must)

    def allocate(self, ids: Collection[str]) -> pb.ContainerAllocateResponse:
        """Give the container being admitted what it was granted."""
        admitted = self._admission.allocate(self._resource, ids)
        self._serve(admitted)
        log.info("allocate.answered", **admitted.keys(), resource=self._resource, units=len(ids))
        return self._answer(admitted.grant)

    def start(self, ids: Collection[str]) -> None:
        """Hold a container back that is not the one its device ids were answered for."""
        admitted = self._admission.pre_start(self._resource, ids)
        self._prepare(admitted)
        log.info("container.starts", **admitted.keys(), resource=self._resource, units=len(ids))

    def _serve(self, admitted: Admitted) -> None:
        """Raise RefusedError where the grant cannot be served now."""

    def _prepare(self, admitted: Admitted) -> None:
        """Have ready what the container is to find when it starts; raise RefusedError where that cannot be."""
