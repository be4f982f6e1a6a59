"""What this node offers its kubelet: gpu-mem, and whatever resources its GPUs are shared or cut under."""

from collections.abc import Callable, Collection, Mapping, Sequence

from cotenant.contract.configuration import ConfigurationError, DevicePluginConfiguration, GPURule
from cotenant.contract.inventory import GPU, Family
from cotenant.contract.units import counted, usable_bytes
from device_plugin.admission.ids import MAX_IDS, TooManyIdsError, advertised
from device_plugin.families.partitions import Offered
from device_plugin.families.replicas import Replicas, Shares, offered
from device_plugin.families.rules import Assigned, assign
from device_plugin.kubelet.resource import Resource
from device_plugin.kubelet.service import Allocator
from device_plugin.nvml import PhysicalGPU

# A GPU is seven instances at most, whatever the board.
_INSTANCES = 7


def refuse_too_many(gpus: Sequence[PhysicalGPU], rules: Sequence[GPURule], settings: DevicePluginConfiguration) -> None:
    """Raise ConfigurationError where *gpus* under *rules* would be more device ids than a kubelet handles.

    Asked before anything is done by the rules. MIG GPUs count as if they were cut as finely as any can be.
    """
    count = 0
    for gpu in gpus:
        how = assign(gpu, rules)
        if how.family is Family.MEMORY:
            count += (
                usable_bytes(
                    total=gpu.total_bytes,
                    reserved=gpu.reserved_bytes,
                    reserve_per_gpu=settings.reserve_per_gpu_bytes,
                    unit_bytes=settings.unit_bytes,
                )
                // settings.unit_bytes
            )
        elif how.family is Family.REPLICAS:
            count += how.replicas
        elif how.family is Family.MIG_STATIC:
            count += _INSTANCES * max([how.replicas, *dict(how.profiles).values()])
    if count > MAX_IDS:
        raise ConfigurationError(
            f"{counted(len(gpus), 'GPU')} would be {count} device ids, but a kubelet handles {MAX_IDS} well: have "
            "fewer replicas"
        )


class Offers:
    """Keep the resources of one node, made by *make* as GPUs come to be counted in them.

    *shares* and *instances* answer for a new one: of shares and of instances handed out as GPUs, which need no grant,
    and of MIG instances. A resource that no GPU is counted in any more stays, with no devices, since the kubelet would
    keep its old ones. Not safe to use from many threads, but for what it shows.
    """

    def __init__(
        self,
        memory: Resource,
        make: Callable[[str, Allocator], Resource],
        *,
        shares: Callable[[str], Replicas],
        instances: Callable[[str], Allocator],
    ) -> None:
        self._memory = memory
        self._make = make
        self._new_shares = shares
        self._new_instances = instances
        self._shares: dict[str, Replicas] = {}
        self._known: dict[str, Resource] = {}
        self.started = False
        # all that this node offers; a node of which a part is not served is not placed on
        self.resources: tuple[Resource, ...] = (memory,)

    @property
    def serving(self) -> bool:
        """Tell whether a kubelet follows all of them."""
        return all(resource.serving for resource in self.resources)

    @property
    def ungranted(self) -> frozenset[str]:
        """Name the resources that are handed out without a grant."""
        return frozenset(self._shares)

    @property
    def known(self) -> frozenset[str]:
        """Name all that was ever offered besides memory."""
        return frozenset(self._known)

    def start(self) -> None:
        """Begin to serve what there is, and from now on what comes."""
        self.started = True
        for resource in self.resources:
            resource.start()

    def show(
        self,
        gpus: Sequence[GPU],
        assigned: Mapping[str, Assigned],
        partitions: Offered,
        *,
        unit_bytes: int,
        packed: bool,
        held: Collection[str],
    ) -> None:
        """Offer *gpus*, and what the MIG GPUs among them are; raise TooManyIdsError, and then change nothing.

        Ids that containers have *held* by grants count as healthy: kube-scheduler takes what pods hold from the sum of
        what is healthy, so that unhealthy ones among it would be taken from the other GPUs.
        """
        units = advertised(gpus, unit_bytes)
        # where rules offer both under one name, instances are unhealthy
        shares = {**partitions.whole, **offered(gpus, assigned, packed=packed)}
        cut = partitions.instances
        count = len(units) + sum(len(one.devices) for one in shares.values()) + sum(map(len, cut.values()))
        if count > MAX_IDS:
            raise TooManyIdsError(
                f"units and shares are {count} device ids, but a kubelet handles {MAX_IDS} well: have fewer replicas"
            )
        self._memory.offer(_well(units, held))
        before = self.resources
        for name in shares:
            if name not in self._shares:
                self._shares[name] = self._new_shares(name)
                self._add(name, self._shares[name])
        for name in cut.keys() - self._known.keys():
            self._add(name, self._new_instances(name))
        for name, replicas in self._shares.items():
            replicas.take(shares.get(name, Shares({}, single=False)))
        devices = {
            **{name: _well(ids, held) for name, ids in cut.items()},
            **{name: one.devices for name, one in shares.items()},
        }
        for name, resource in self._known.items():
            resource.offer(devices.get(name, {}))
        if self.started:
            for resource in self.resources[len(before) :]:
                resource.start()

    def _add(self, name: str, allocator: Allocator) -> None:
        self._known[name] = self._make(name, allocator)
        self.resources = (*self.resources, self._known[name])


def _well(devices: Mapping[str, bool], held: Collection[str]) -> Mapping[str, bool]:
    return {device: well or device in held for device, well in devices.items()}
