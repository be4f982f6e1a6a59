"""The MIG GPUs of this node: what each is cut into, how it comes to be cut, and what containers need of instances."""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from cotenant.contract.configuration import DeviceListStrategy, DevicePluginConfiguration, MIGStrategy
from cotenant.contract.inventory import MIG, Family, MIGInstance
from device_plugin.cdi import SpecFolder
from device_plugin.cluster.events import PodEvents
from device_plugin.cluster.notes import NodeMetadata, NodeNotes
from device_plugin.cluster.pods import NodePods
from device_plugin.families.cutter import Cutter
from device_plugin.families.maker import Maker
from device_plugin.families.partitions import Partitions
from device_plugin.families.rules import Assigned
from device_plugin.families.switch import Switch
from device_plugin.nvml import NVML, PhysicalGPU
from device_plugin.threads import INVENTORY, THREADS


class Partitioning:
    """Follow what GPUs are cut into, and cut those that this plugin is to cut.

    *how* says what a GPU is for, *strategy* how instances are called, *held* which GPUs pods hold, and *held_otherwise*
    which of them by anything but instances that are made for them. *ungranted* names the resources that are handed out
    without a grant; *tell* hears of GPUs whose MIG mode was to be switched on. Looks and sweeps are not safe to use
    from many threads; what it shows is.
    """

    def __init__(
        self,
        nvml: NVML,
        configuration: DevicePluginConfiguration,
        pods: NodePods,
        notes: NodeNotes,
        events: PodEvents,
        *,
        how: Callable[[PhysicalGPU], Assigned],
        strategy: Callable[[], MIGStrategy],
        held: Callable[[], frozenset[str] | None],
        held_otherwise: Callable[[], frozenset[str] | None],
        ungranted: Callable[[], Collection[str]],
        tell: Callable[[str, str], None],
    ) -> None:
        names = configuration.names
        self.partitions = Partitions(nvml, how, strategy, names)
        self.specs = SpecFolder(
            Path(configuration.cdi_directory),
            names,
            configuration.cdi_kind,
            also=tuple(map(Path, configuration.cdi_static_directories)),
        )
        self.maker = Maker(nvml, self.specs, pods, names, gpus=lambda: self.dynamic)
        self._switch = Switch(nvml, how, held_otherwise, tell)
        self._cutter = Cutter(
            nvml,
            Path(configuration.mig_configs) if configuration.mig_configs else None,
            names,
            notes,
            events,
            pods=lambda: pods.all_known() if pods.synced else None,
            whole=ungranted,
            held=held,
        )
        self._by_cdi = configuration.device_list_strategy is DeviceListStrategy.CDI_CRI
        self._hands_nodes = self._by_cdi or configuration.pass_device_specs
        self._gpus: tuple[PhysicalGPU, ...] = ()
        self._unexplained: Mapping[str, tuple[MIGInstance, ...]] = {}
        # GPUs whose instances are made for pods, by UUID
        self.dynamic: Mapping[str, PhysicalGPU] = {}
        # what MIG GPUs are cut into, by UUID
        self.cut: Mapping[str, MIG] = {}
        # the device nodes of static instances, by UUID, where these are handed out; and by their GPU what was read last
        self.nodes: Mapping[str, Sequence[tuple[str, str]]] = {}
        self._nodes: Mapping[str, Mapping[str, Sequence[tuple[str, str]]]] = {}

    @property
    def unfit(self) -> dict[str, str]:
        """Say why nothing new may be placed on GPUs that are cut wrong, or are about to be cut anew, by UUID."""
        due = dict.fromkeys(self._cutter.announced, "its MIG geometry is about to be changed")
        return self.partitions.misfits(self._gpus, self.cut) | due

    def noticed(self, node: NodeMetadata | None) -> None:
        """Take the label that says which geometry is wanted."""
        self._cutter.noticed(node)

    def switch_on(self, gpus: Sequence[PhysicalGPU], *, starting: bool = False) -> bool:
        """Switch MIG mode on where it is to be; tell whether it was, so that the GPUs are not what they were."""
        return self._switch.look(gpus, starting=starting)

    def look(self, gpus: tuple[PhysicalGPU, ...]) -> None:
        """Take one step towards the geometry that is wanted, and read what there is."""
        # neither this nor CDI is to keep the health of all GPUs from being told
        with THREADS.surviving(INVENTORY):
            self._cutter.look(self.partitions.static(gpus))
        self._gpus = gpus
        self.dynamic = self.partitions.families(gpus, Family.MIG_DYNAMIC)
        self.cut = self.partitions.look(gpus, self._unexplained)
        # before they are offered
        if self._hands_nodes:
            read = self.partitions.nodes(gpus)
            self._nodes = {**self._nodes, **read}
            self.nodes = {uuid: nodes for there in self._nodes.values() for uuid, nodes in there.items()}
            if self._by_cdi:
                with THREADS.surviving(INVENTORY):
                    self.specs.follow(read)

    def sweep(self) -> bool:
        """Destroy the instances that no pod holds any more; tell whether other ones than before had to stay."""
        if not self.dynamic:
            return False
        unexplained = self._unexplained
        with THREADS.surviving(INVENTORY):
            unexplained = self.maker.sweep()
        if unexplained == self._unexplained:
            return False
        self._unexplained = unexplained
        self.cut = self.partitions.look(self._gpus, self._unexplained)
        return True
