"""One device plugin: its parts, and the order in which they begin and end."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import structlog

from cotenant.cluster import Cluster
from cotenant.contract.configuration import DevicePluginConfiguration
from cotenant.contract.grant import ContainerGrant
from cotenant.contract.inventory import GPU, MIG, Family, MIGInstance
from device_plugin.admission import Admission
from device_plugin.answer import answer, answer_made, answer_unguided
from device_plugin.api import deviceplugin_pb2 as pb
from device_plugin.cdi import SpecFolder
from device_plugin.events import PodEvents
from device_plugin.families.cutter import Cutter
from device_plugin.families.maker import Maker
from device_plugin.families.memory import Memory
from device_plugin.families.occupants import Occupants
from device_plugin.families.partitions import WHOLE, Partition, Partitions, StrategyError, Unguided
from device_plugin.health.care import Care
from device_plugin.ids import TooManyIdsError, advertised
from device_plugin.inventory import describe
from device_plugin.kubelet.pod_resources import PodResources
from device_plugin.kubelet.service import Allocator
from device_plugin.metrics import Metrics, Snapshot
from device_plugin.notes import NodeMetadata, NodeNotes
from device_plugin.nvml import NVML, NVMLUnavailableError, PhysicalGPU
from device_plugin.pods import NodePods
from device_plugin.publisher import Publisher
from device_plugin.refusal import RefusedError
from device_plugin.resource import Resource
from device_plugin.serving import HTTPServing
from device_plugin.watchdog.proc import Processes
from device_plugin.watchdog.watch import Watchdog

log = structlog.get_logger(__name__)

# Without knowing the pods nobody can be told apart. With the API server away the kubelet gets no new pods either.
_PODS_SECONDS = 5.0
# A look that failed is made good by the next; without several the plugin is better started anew.
_STALE_INTERVALS = 3
_STALE_SECONDS = 30.0
# Pods often end together; what they leave is cleared together.
_PAUSE_SECONDS = 0.05


class DevicePlugin:
    """Serve the GPUs of one node until stop()."""

    def __init__(
        self,
        *,
        configuration: DevicePluginConfiguration,
        cluster: Cluster,
        nvml: NVML,
        node: str,
        plugin_folder: Path,
        pod_resources: Path,
        ready: Callable[[tuple[GPU, ...]], None],
        processes: Processes | None = None,
    ) -> None:
        """Wire the parts; *ready* is told once, when a kubelet has our devices; *processes* are this machine's."""
        self._configuration = configuration
        self._nvml = nvml
        self._ready = ready
        self._told_ready = False
        self._showing = threading.Lock()
        self._physical: tuple[PhysicalGPU, ...] = ()
        self._gpus: dict[str, PhysicalGPU] = {}
        self._instance_nodes: dict[str, list[tuple[str, str]]] = {}
        self._described: tuple[GPU, ...] | None = None
        self._stopping = threading.Event()
        names = configuration.names
        self._woken = threading.Event()
        self._pods = NodePods(cluster, node, gone=self._pod_gone)
        self._events = PodEvents(cluster, node)
        self._lister = PodResources(pod_resources, names.is_granted)
        self._notes = NodeNotes(cluster, node, erased=self._erased)
        self._care = Care(configuration.health, names, nvml, self._notes, self._events, changed=self._judge_again)
        self._publisher = Publisher(cluster, node, names, unit_bytes=configuration.unit_bytes, noticed=self._noticed)
        self._admission = Admission(self._lister, self._pods, names, has_gpu=lambda uuid: uuid in self._gpus)
        self._metrics = Metrics(node, self._snapshot)
        self._serving = self._http() if configuration.serve else None
        self._looked_at = time.monotonic()
        self._watchdog = Watchdog(
            configuration.watchdog,
            names,
            nvml,
            self._notes,
            self._events,
            node=node,
            gpus=lambda: self._described or (),
            pods=lambda: self._pods.all_known() if self._pods.synced else None,
            processes=processes,
        )
        self._metrics.add(self._watchdog.collector(lambda: {gpu.uuid: str(gpu.index) for gpu in self._described or ()}))
        self._plugin_folder = plugin_folder
        self._memory = self._resource(names.gpu_mem, Memory(names.gpu_mem, self._admission, self._answer))
        self._partitions = Partitions(nvml, configuration.gpus, configuration.mig_strategy, names)
        self._specs = SpecFolder(Path(configuration.cdi_directory), names, configuration.cdi_kind)
        self._maker = Maker(nvml, self._specs, self._pods, names, gpus=lambda: self._dynamic)
        self._dynamic: dict[str, PhysicalGPU] = {}
        self._mig: dict[str, MIG] = {}
        self._unexplained: dict[str, tuple[MIGInstance, ...]] = {}
        self._cutter = Cutter(
            nvml,
            Path(configuration.mig_configs) if configuration.mig_configs else None,
            names,
            self._notes,
            self._events,
            pods=lambda: self._pods.all_known() if self._pods.synced else None,
            whole=WHOLE,
        )
        self._occupants = Occupants(cluster, node, plugin_folder, names)
        # all that this node offers; a node of which a part is not served is not placed on
        self._resources = [self._memory]
        self._started = False
        self._poller = threading.Thread(target=self._poll, name="inventory", daemon=True)

    def start(self) -> None:
        """Read the GPUs, then begin to serve.

        Raises TooManyIdsError, NVMLUnavailableError, StrategyError.
        """
        if self._partitions.switch_on(self._nvml.gpus()):
            log.info("mig.mode_on")
        self._take_inventory()
        self._occupants.refuse([resource.name for resource in self._resources if resource is not self._memory])
        if self._serving is not None:
            self._serving.start()
        self._publisher.start()
        self._notes.start()
        self._events.start()
        self._care.start()
        self._pods.start(wait_seconds=_PODS_SECONDS)
        with self._showing:
            self._started = True
            for resource in self._resources:
                resource.start()
        self._poller.start()
        self._watchdog.start()
        self._woken.set()  # now that the pods are known, it can be told which instances nobody holds

    def stop(self) -> None:
        """Withdraw from the node first, so that nothing is placed on it, then from the kubelet."""
        self._stopping.set()
        self._woken.set()
        self._care.retire()
        self._publisher.stop()
        self._watchdog.stop()
        self._notes.stop(withdraw=(self._configuration.names.overusers,))
        with ThreadPoolExecutor(len(self._resources)) as pool:
            list(pool.map(Resource.stop, self._resources))
        self._pods.stop()
        self._events.stop()
        self._lister.close()
        if self._serving is not None:
            self._serving.stop()
        self._care.stop()
        if self._poller.is_alive():
            self._poller.join(timeout=1.0)

    def _resource(self, name: str, allocator: Allocator) -> Resource:
        return Resource(
            name,
            allocator,
            self._plugin_folder,
            refused=self._events.refused,
            serving_changed=self._serving_changed,
            connected=self._connected,
            answered=self._metrics.answered,
        )

    def _serving_changed(self, *, serving: bool) -> None:
        self._publisher.set_serving(serving=serving and all(resource.serving for resource in self._resources))

    def _answer(self, grant: ContainerGrant) -> pb.ContainerAllocateResponse:
        gpus = [self._gpus[share.uuid] for share in grant.gpus]
        if grant.family is Family.MIG_DYNAMIC and grant.mig is not None:
            return answer_made(grant, self._specs.full_name(grant.gpus[0].uuid, grant.mig.instance))
        return answer(
            grant,
            gpus,
            strategy=self._configuration.device_list_strategy,
            pass_device_specs=self._configuration.pass_device_specs,
            cdi_kind=self._configuration.cdi_kind,
            instance_nodes=self._instance_nodes.get(grant.mig.uuid, ()) if grant.mig is not None else (),
        )

    def _answer_unguided(self, uuids: Sequence[str]) -> pb.ContainerAllocateResponse:
        return answer_unguided(
            uuids, strategy=self._configuration.device_list_strategy, cdi_kind=self._configuration.cdi_kind
        )

    def _connected(self) -> None:
        try:
            self._admission.overtaken()
        except RefusedError as error:
            log.warning("pods.not_compared", error=str(error))
        if not self._told_ready and all(resource.serving for resource in self._resources):
            self._told_ready = True
            self._ready(self._described or ())

    def _poll(self) -> None:
        due = 0.0
        while not self._stopping.is_set():
            self._woken.wait(max(0.0, due - time.monotonic()))
            self._woken.clear()
            if self._stopping.wait(_PAUSE_SECONDS if self._dynamic else 0):
                return
            try:
                if time.monotonic() < due:
                    self._sweep()
                    continue
                due = time.monotonic() + self._configuration.inventory_interval
                self._sweep(show=False)
                self._take_inventory()
            except (NVMLUnavailableError, TooManyIdsError, StrategyError) as error:
                log.warning("inventory.not_taken", error=str(error))
            except Exception:  # one look that fails for whatever reason must not be the last one
                log.exception("inventory.failed")

    def _judge_again(self) -> None:
        try:
            self._show()
        except (TooManyIdsError, StrategyError) as error:
            log.warning("inventory.not_taken", error=str(error))

    def _noticed(self, node: NodeMetadata | None) -> None:
        self._care.noticed(node)
        self._cutter.noticed(node)
        self._notes.seen(node)

    def _erased(self, key: str) -> None:
        self._care.erased(key)

    def _pod_gone(self) -> None:
        if self._dynamic:
            self._woken.set()

    def _sweep(self, *, show: bool = True) -> None:
        """Destroy the instances that no pod holds any more."""
        if not self._dynamic:
            return
        unexplained = self._maker.sweep()
        if unexplained != self._unexplained:
            self._unexplained = unexplained
            self._mig = self._partitions.look(self._physical, self._unexplained)
            if show:
                self._show()

    def _take_inventory(self) -> None:
        gpus = self._nvml.gpus()
        self._cutter.look(self._partitions.static(gpus))
        self._dynamic = self._partitions.families(gpus, Family.MIG_DYNAMIC)
        self._mig = self._partitions.look(gpus, self._unexplained)
        if self._configuration.pass_device_specs:
            self._instance_nodes = self._partitions.nodes(gpus)
        self._care.looked(gpus)
        self._physical = gpus
        self._looked_at = time.monotonic()
        self._gpus = {gpu.uuid: gpu for gpu in gpus}
        self._show()

    def _show(self) -> None:
        """Tell kubelet and node what the GPUs are by now; called from several threads."""
        with self._showing:
            described = self._care.judged(
                describe(
                    self._physical,
                    self._configuration.gpus,
                    unit_bytes=self._configuration.unit_bytes,
                    reserve_per_gpu=self._configuration.reserve_per_gpu_bytes,
                    mig=self._mig,
                    cutting=self._cutter.announced,
                ),
                self._partitions.numbers,
            )
            if described == self._described:
                return
            devices = advertised(described, self._configuration.unit_bytes)
            instances = self._partitions.offers(described)
            self._described = described
            self._memory.offer(devices)
            self._offer(instances)
            self._publisher.set_gpus(described)

    def _offer(self, instances: Mapping[str, Mapping[str, bool]]) -> None:
        """Offer MIG instances, under names that may not have been offered before; one that is no more stays, empty."""
        known = {resource.name: resource for resource in self._resources if resource is not self._memory}
        for name in instances.keys() - known.keys():
            allocator: Allocator = (
                Unguided(self._answer_unguided)
                if name == WHOLE
                else Partition(name, self._admission, self._answer, self._maker)
            )
            known[name] = self._resource(name, allocator)
            known[name].offer(instances[name])
            self._resources.append(known[name])
            if self._started:
                known[name].start()
        for name, resource in known.items():
            resource.offer(instances.get(name, {}))

    def _http(self) -> HTTPServing:
        return HTTPServing(
            self._configuration.serve or "", expose=self._metrics.expose, unwell=self._unwell, unready=self._unready
        )

    @property
    def serves_at(self) -> str:
        """Give the address of metrics and health, "" where they are not served."""
        return "" if self._serving is None else self._serving.address

    def _snapshot(self) -> Snapshot:
        physical = {gpu.uuid: gpu for gpu in self._physical}
        return Snapshot(
            gpus=[(gpu, physical[gpu.uuid]) for gpu in self._described or () if gpu.uuid in physical],
            xids=self._care.keeper.xids(),
            registered={resource.name: resource.serving for resource in self._resources},
        )

    def _unwell(self) -> str:
        ago = time.monotonic() - self._looked_at
        if ago > _STALE_INTERVALS * self._configuration.inventory_interval + _STALE_SECONDS:
            return f"the GPUs could not be looked at for {ago:.0f} s"
        return ""

    def _unready(self) -> str:
        missing = [resource.name for resource in self._resources if not resource.serving]
        return f"no kubelet follows {', '.join(missing)}" if missing else self._unwell()
