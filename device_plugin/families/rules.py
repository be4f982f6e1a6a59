"""Which family and mode each GPU of a node is in: the first rule that names it decides; pure."""

from collections.abc import Sequence
from typing import NamedTuple

from cotenant.contract.configuration import GPURule
from cotenant.contract.inventory import Family, Mode
from cotenant.contract.names import mig_suffix
from cotenant.contract.request import model_wished
from device_plugin.nvml import PhysicalGPU

# What NVIDIA's plugin calls a GPU, and what pods that know nothing of us ask for.
NVIDIA_GPU = "nvidia.com/gpu"


class Assigned(NamedTuple):
    """Say how one GPU is counted and shared."""

    family: Family = Family.MEMORY
    mode: Mode = Mode.TIME_SLICING
    # of GPUs under MPS: those of one group have one daemon
    group: str = ""
    # of the family replicas, and the last two of mig-static too; 0 replicas under no name: a plugin before this one
    # handed out shares, of which nothing more is known, so none is offered until their pods have ended
    resource: str = ""
    replicas: int = 1
    single: bool = False
    # of mig-static: the shares of single profiles' instances, and whether shares have a name of their own
    profiles: tuple[tuple[str, int], ...] = ()
    renamed: bool = False

    def shares_of(self, profile: str) -> int:
        """Count the shares that a static MIG instance of *profile* is."""
        return dict(self.profiles).get(mig_suffix(profile), self.replicas)


def assign(gpu: PhysicalGPU, rules: Sequence[GPURule]) -> Assigned:
    """Find what *rules* say of a GPU; one that none of them names is shared by memory, in turns.

    Each GPU is in one family alone, so no silicon is advertised twice.
    """
    for rule in rules:
        if _names(rule, gpu):
            return Assigned(
                rule.family,
                rule.shared_by,
                group=rule.group,
                resource=(rule.resource or NVIDIA_GPU) if rule.family is Family.REPLICAS else "",
                replicas=rule.replicas,
                single=rule.fail_requests_greater_than_one,
                profiles=tuple(sorted((mig_suffix(name), n) for name, n in rule.profile_replicas.items())),
                renamed=rule.rename_shared,
            )
    return Assigned()


def _names(rule: GPURule, gpu: PhysicalGPU) -> bool:
    return (
        (not rule.uuids or gpu.uuid in rule.uuids)
        and (not rule.indices or gpu.index in rule.indices)
        and model_wished(gpu.model, rule.models)
        # a vGPU with an instance behind it is a GPU to its guest
        and rule.mig_enabled in {None, bool(gpu.mig_enabled) and not gpu.guest}
    )
