"""Switches MIG mode on where a rule wants instances made, on GPUs that need no reset for it and that nobody uses."""

from collections.abc import Callable, Iterable

import structlog

from cotenant.contract.inventory import Family
from device_plugin.families.rules import Assigned
from device_plugin.nvml import NVML, MIGError, PhysicalGPU

log = structlog.get_logger(__name__)

# Hopper: the mode takes effect at once. On an Ampere it would wait for a reset (NVML, nvmlDeviceSetMigMode).
_NO_RESET = (9, 0)


class Switch:
    """Look at GPUs of the family mig-dynamic whose MIG mode is off.

    *held* names the GPUs that pods hold, None where nobody can tell, and leaves out who waits for an instance of its
    own: that is what the mode is needed for. *tell* hears of each GPU what was done, or why not, as an Event's reason
    and note.
    """

    def __init__(
        self,
        nvml: NVML,
        assigned: Callable[[PhysicalGPU], Assigned],
        held: Callable[[], frozenset[str] | None],
        tell: Callable[[str, str], None],
    ) -> None:
        self._nvml = nvml
        self._assigned = assigned
        self._held = held
        self._tell = tell
        self._said: dict[str, str] = {}

    def look(self, gpus: Iterable[PhysicalGPU], *, starting: bool = False) -> bool:
        """Switch on what can be; tell whether anything was.

        Nothing is under way by then: a GPU comes to the family only after a look at which it got no new pods, and is
        unhealthy in it while the mode is off. At the start what pods hold in another way is not of the family.
        """
        due = [gpu for gpu in gpus if self._is_due(gpu)]
        self._said = {gpu.uuid: self._said[gpu.uuid] for gpu in due if gpu.uuid in self._said}
        if not due:
            return False
        held = frozenset() if starting else self._held()
        switched = False
        for gpu in due:
            why = self._objection(gpu, held) or self._switch_on(gpu)
            switched = switched or not why
            if why and self._said.get(gpu.uuid) != why:
                self._said[gpu.uuid] = why
                log.warning("mig.not_switched_on", gpu=gpu.uuid, why=why)
                note = f"MIG mode of GPU {gpu.index} ({gpu.uuid}) is off, and is not switched on: {why}"
                self._tell("MIGModeRefused", note)
        return switched

    def _is_due(self, gpu: PhysicalGPU) -> bool:
        wanted = self._assigned(gpu).family is Family.MIG_DYNAMIC
        return wanted and gpu.mig_enabled is False and not (gpu.guest or gpu.fault)

    def _objection(self, gpu: PhysicalGPU, held: frozenset[str] | None) -> str:
        """Say why the mode must not be switched now."""
        if gpu.compute_capability is not None and gpu.compute_capability < _NO_RESET:
            return f"this model needs a reset for it: drain it, and `nvidia-smi -i {gpu.index} -mig 1`"
        if held is None:
            return "which pods use it cannot be told; it is tried again"
        if gpu.uuid in held:
            return "pods hold it; it is tried again when they have ended"
        processes = self._nvml.processes([gpu.index])[gpu.index]
        if processes and not isinstance(processes, str):
            some = ", ".join(str(one.pid) for one in processes[:5])
            return f"processes use it ({some}); it is tried again when they have ended"
        return ""

    def _switch_on(self, gpu: PhysicalGPU) -> str:
        """Switch one on; say why that failed, "" where it did not."""
        try:
            self._nvml.set_mig_mode(gpu.index, on=True)
        except MIGError as error:
            return f"{error}; it is tried again"
        log.info("mig.switched_on", gpu=gpu.uuid)
        self._tell("MIGModeOn", f"MIG mode of GPU {gpu.index} ({gpu.uuid}) was switched on: its rule is mig-dynamic")
        return ""
