"""GPUs counted by memory: ids stand for units, and the grant says which GPU and how many bytes."""

from collections.abc import Callable

from cotenant.contract.grant import ContainerGrant
from cotenant.contract.reasons import Reason
from device_plugin.admission.calls import Admission, Admitted
from device_plugin.admission.refusal import RefusedError
from device_plugin.api import deviceplugin_pb2 as pb
from device_plugin.families.granted import Granted


class Memory(Granted):
    """Answer for *resource*, units of GPU memory.

    *unserved* says why a grant cannot be served as its GPUs are now, "" where it can.
    """

    def __init__(
        self,
        resource: str,
        admission: Admission,
        answer: Callable[[ContainerGrant], pb.ContainerAllocateResponse],
        unserved: Callable[[ContainerGrant], str],
    ) -> None:
        super().__init__(resource, admission, answer)
        self._unserved = unserved

    def _serve(self, admitted: Admitted) -> None:
        why = self._unserved(admitted.grant)
        if why:
            raise RefusedError(Reason.MODE_CONFLICT, f"container {admitted.grant.name}: {why}", admitted.pod)

    def _prepare(self, admitted: Admitted) -> None:
        self._serve(admitted)
