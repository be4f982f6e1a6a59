"""One device plugin: its parts, and the order in which they begin and end."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import structlog

from cotenant.cluster import Cluster
from cotenant.contract.configuration import ConfigurationError, DevicePluginConfiguration
from cotenant.contract.inventory import GPU, Health
from cotenant.contract.pods import Pod
from device_plugin.admission.answer import Answers
from device_plugin.admission.calls import Admission
from device_plugin.admission.ids import TooManyIdsError
from device_plugin.admission.refusal import PodResourcesError, RefusedError
from device_plugin.cluster.events import PodEvents
from device_plugin.cluster.notes import NodeMetadata, NodeNotes, labels_of
from device_plugin.cluster.pods import NodePods
from device_plugin.coexistence.watch import Coexistence, ForeignCollector
from device_plugin.families import before
from device_plugin.families.assignment import Assignment, held
from device_plugin.families.memory import Memory
from device_plugin.families.newcomers import Newcomers
from device_plugin.families.occupants import Occupants
from device_plugin.families.partitioning import Partitioning
from device_plugin.families.partitions import Partition
from device_plugin.families.replicas import Replicas
from device_plugin.families.rules import NVIDIA_GPU, Assigned
from device_plugin.handing import Handing
from device_plugin.health.care import Care
from device_plugin.inventory import Daemon, describe
from device_plugin.kubelet.pod_resources import PodResources
from device_plugin.kubelet.resource import Resource
from device_plugin.kubelet.service import Allocator
from device_plugin.looks import Looks
from device_plugin.metrics import Metrics, Snapshot
from device_plugin.mps.keeper import MPSKeeper
from device_plugin.mps.plan import max_clients, name_of, pipe_of, plans
from device_plugin.nvml import NVML, NVMLUnavailableError, PhysicalGPU
from device_plugin.offers import Offers, refuse_too_many
from device_plugin.publisher import Publisher
from device_plugin.serving import HTTPServing
from device_plugin.sharing import Rules, Sharing
from device_plugin.threads import INVENTORY, THREADS
from device_plugin.used import UsedNote
from device_plugin.watchdog.proc import Processes
from device_plugin.watchdog.watch import Watchdog

log = structlog.get_logger(__name__)

# Without knowing the pods nobody can be told apart. With the API server away the kubelet gets no new pods either.
_PODS_SECONDS = 5.0
_LIST_SECONDS = 2.0
_CONFIGURE = "Configure"


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
        config_file: Path | None,
        processes: Processes,
    ) -> None:
        """Wire the parts; *ready* is told once, when a kubelet has our devices; *processes* are this machine's.

        *config_file* is where *configuration* was read from, and is read again.
        """
        self._configuration = configuration
        self._nvml = nvml
        self._ready = ready
        self._told_ready = False
        self._showing = threading.Lock()
        self._physical: tuple[PhysicalGPU, ...] = ()
        self._gpus: dict[str, PhysicalGPU] = {}
        self._described: tuple[GPU, ...] | None = None
        self._last_shown: object = None
        # the device ids that containers held, as far as that mattered
        self._held: frozenset[str] = frozenset()
        self._cuda_version = nvml.cuda_version()
        names = configuration.names
        self._looks = Looks(configuration.inventory_interval, look=self._look, sweep=lambda: self._try(self._sweep))
        self._pods = NodePods(cluster, node, names, gone=self._pod_gone)
        self._events = PodEvents(cluster, node)
        self._lister = PodResources(pod_resources, names.is_granted)
        self._notes = NodeNotes(cluster, node, erased=lambda key: self._care.erased(key))  # noqa: PLW0108 - made later
        self._assignment = Assignment(
            self._in_use, lambda note: self._events.about_node("GPUInUse", _CONFIGURE, note, normal=True)
        )
        self._partitioning = Partitioning(
            nvml,
            configuration,
            self._pods,
            self._notes,
            self._events,
            how=self._assignment.how,
            strategy=lambda: self._sharing.mig_strategy or configuration.mig_strategy,
            held=self._in_use,
            held_otherwise=lambda: self._in_use(dynamic=False),
            ungranted=lambda: self._offers.ungranted | {NVIDIA_GPU},
            tell=lambda reason, note: self._tell_configuration(reason, note, well=reason == "MIGModeOn"),
        )
        self._care = Care(
            configuration.health,
            names,
            nvml,
            self._notes,
            self._events,
            locate=self._partitioning.partitions.locate,
            changed=self._judge_again,
        )
        self._used = UsedNote(configuration.used_memory_interval, names, lambda told: NodeNotes(cluster, node, told))
        self._publisher = Publisher(cluster, node, names, unit_bytes=configuration.unit_bytes, noticed=self._noticed)
        self._admission = Admission(self._lister, self._pods, names, has_gpu=lambda uuid: uuid in self._gpus)
        self._metrics = Metrics(node, self._snapshot)
        self._serving = self._http(configuration.serve) if configuration.serve else None
        self._watchdog = Watchdog(
            configuration.watchdog,
            names,
            nvml,
            self._notes,
            self._events,
            node=node,
            gpus=lambda: self._described or (),
            pods=self._known_pods,
            daemons=lambda: self._mps.pids,
            processes=processes,
        )
        self._metrics.add(self._watchdog.collector(lambda: {gpu.uuid: str(gpu.index) for gpu in self._described or ()}))
        self._plugin_folder = plugin_folder
        self._rules = Rules(configuration, config_file, configuration.nvidia_config, self._tell_configuration)
        self._labels = labels_of(cluster, node) if self._rules.by_label else {}
        self._sharing = Sharing(())
        self._coexistence = self._watch_others(PodResources(pod_resources, lambda _resource: True), node)
        self._mps = MPSKeeper(
            configuration.mps,
            nvml,
            look_seconds=configuration.inventory_interval,
            changed=self._judge_again,
            used=self._in_use,
        )
        self._published = partial(before.read, cluster, node, names)
        self._occupants = Occupants(cluster, node, plugin_folder, names)
        self._newcomers = Newcomers(lambda resources: self._occupants.taken(resources, new_to_us=True), names)
        self._untaken = ""
        self._handing = Handing(
            Answers.of(configuration, lambda uuid: self._gpus[uuid], self._partitioning.specs.name_of),
            self._partitioning,
            shown=lambda: self._described or (),
            problem=lambda gpu: self._daemon(self._gpus[gpu.uuid], self._assignment.of[gpu.uuid]).problem,
        )
        memory = Memory(names.gpu_mem, self._admission, self._handing.granted, self._handing.unserved)
        self._offers = Offers(
            self._resource(names.gpu_mem, memory),
            self._resource,
            shares=lambda name: Replicas(name, self._handing.shares),
            instances=lambda name: Partition(name, self._admission, self._handing.granted, self._partitioning.maker),
        )

    def start(self) -> None:
        """Read the GPUs, then begin to serve.

        Raises TooManyIdsError, NVMLUnavailableError, OccupiedError, ConfigurationError.
        """
        self._pods.start(wait_seconds=_PODS_SECONDS)  # first, so that GPUs that they hold stay as they were
        try:
            self._begin()
        except Exception:
            self._pods.stop()
            raise
        if self._serving is not None:
            self._serving.start()
        self._publisher.start()
        self._notes.start()
        self._used.start()
        self._events.start()
        self._care.start()
        with self._showing:
            self._offers.start()
        self._looks.start()
        self._watchdog.start()

    def stop(self) -> None:
        """Withdraw from the node first, so that nothing is placed on it, then from the kubelet."""
        self._looks.retire()
        self._care.retire()
        self._publisher.stop()
        self._watchdog.stop()
        self._notes.stop(withdraw=(self._configuration.names.overusers,))
        self._looks.stop()
        resources = self._offers.resources
        with ThreadPoolExecutor(len(resources) + 1) as pool:
            ended = [pool.submit(self._mps.stop), *(pool.submit(resource.stop) for resource in resources)]
        for one in ended:
            one.result()
        self._pods.stop()
        self._used.stop()
        self._events.stop()
        self._lister.close()
        self._coexistence.close()
        if self._serving is not None:
            self._serving.stop()
        self._care.stop()

    def _begin(self) -> None:
        """Take over what there is, and have the GPUs as the rules say."""
        gpus = self._nvml.gpus()
        self._gpus = {gpu.uuid: gpu for gpu in gpus}  # whose ids pods may hold by now
        known = self._assignment.recall(self._published())
        self._assign(gpus)
        # before MIG or compute modes change under the pods of another plugin
        self._occupants.refuse({self._configuration.names.gpu_mem, *self._partitioning.partitions.names(gpus)})
        # GPUs that pods hold are then assigned as they were
        self._partitioning.switch_on(gpus, starting=known)
        self._take_inventory()

    def _watch_others(self, lister: PodResources, node: str) -> Coexistence:
        self._metrics.add(ForeignCollector(node, lambda: self._described or ()))
        return Coexistence(
            lister,
            self._configuration.names,
            self._configuration.unit_bytes,
            self._events,
            pods=self._known_pods,
            used=lambda: self._watchdog.account,
            ours=lambda: (resource.name for resource in self._offers.resources),
        )

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

    def _serving_changed(self) -> None:
        self._publisher.ask_serving(lambda: self._offers.serving)

    def _daemon(self, gpu: PhysicalGPU, how: Assigned) -> Daemon:
        name = name_of(gpu.uuid, how)
        return Daemon(
            pipe_of(self._configuration.mps, name),
            max_clients(gpu, self._cuda_version),
            self._mps.problem(name, gpu.uuid),
        )

    def _known_pods(self) -> Sequence[Pod] | None:
        """List the pods of this node; None as long as they are not known."""
        return self._pods.all_known() if self._pods.synced else None

    def _in_use(self, *, dynamic: bool = True) -> frozenset[str] | None:
        """Tell which GPUs pods hold; None where that cannot be told, so that any may be.

        Without *dynamic*, those whose MIG instances are made for them count as no holders.
        """
        pods = self._known_pods()
        if pods is None:
            return None
        try:
            listed = self._lister.devices(deadline=time.monotonic() + _LIST_SECONDS)
        except PodResourcesError as error:
            log.warning("configuration.holders_unknown", error=str(error))
            return None
        parents = self._partitioning.partitions.parents()
        return held(pods, self._configuration.names, listed, self._gpus, parents, dynamic=dynamic)

    def _tell_configuration(self, reason: str, note: str, *, well: bool) -> None:
        self._events.about_node(reason, _CONFIGURE, note, normal=well)

    def _connected(self) -> None:
        try:
            self._admission.overtaken()
        except RefusedError as error:
            log.warning("pods.not_compared", error=str(error))
        if not self._told_ready and self._offers.serving:
            self._told_ready = True
            self._ready(self._described or ())

    def _look(self) -> None:
        self._partitioning.sweep()
        with THREADS.surviving(INVENTORY):
            self._coexistence.look(self._described or ())
        self._try(self._take_inventory)

    def _judge_again(self) -> None:
        self._try(self._show)

    def _try(self, step: Callable[[], None]) -> None:
        """Do a step; where it cannot be done, what was offered before stays."""
        try:
            step()
        except (NVMLUnavailableError, TooManyIdsError) as error:
            log.warning("inventory.not_taken", error=str(error))
            if str(error) != self._untaken and not isinstance(error, NVMLUnavailableError):
                self._tell_configuration("BadConfiguration", f"{error}; what was offered before stays", well=False)
            self._untaken = str(error)

    def _noticed(self, node: NodeMetadata | None) -> None:
        if node is not None:
            self._labels = node.labels or {}
            if self._coexistence.recall(node.annotations or {}):
                self._judge_again()
        self._care.noticed(node)
        self._partitioning.noticed(node)
        self._used.noticed(node)
        self._notes.seen(node)

    def _pod_gone(self) -> None:
        if self._partitioning.dynamic:
            self._looks.wake()

    def _sweep(self) -> None:
        if self._partitioning.sweep():
            self._show()

    def _take_inventory(self) -> None:
        gpus = self._nvml.gpus()
        self._assign(gpus)
        if self._told_ready and self._partitioning.switch_on(gpus):
            gpus = self._nvml.gpus()
        self._partitioning.look(gpus)
        self._care.looked(gpus)
        self._used.looked(gpus)
        self._physical = gpus
        # where NVML is blind a new start may help, but not at the price of daemons that would end with us
        if not self._nvml.blind or self._mps.mortal:
            self._looks.looked()
        self._gpus = {gpu.uuid: gpu for gpu in gpus}
        self._show()
        if self._offers.started and self._newcomers.look():
            for name, why in self._newcomers.said.items():
                self._tell_configuration("ResourceTaken", f"{name} is not offered: {why}", well=False)
            self._show()
        # not under the lock: daemons that are to end may be telling of a change
        self._mps.keep(plans(self._described or (), self._assignment.of), self._gpus)

    def _assign(self, gpus: tuple[PhysicalGPU, ...]) -> None:
        """Take over the rules that hold now, before GPUs that are new to them are shown."""
        self._sharing = self._rules.look(
            self._labels, lambda sharing: refuse_too_many(gpus, sharing.rules, self._configuration)
        )
        with self._showing:
            self._assignment.update(gpus, self._sharing.rules)

    def _show(self) -> None:
        """Tell kubelet and node what the GPUs are by now; called from several threads."""
        with self._showing:
            described = self._care.judged(
                describe(
                    self._physical,
                    self._assignment.of,
                    unit_bytes=self._configuration.unit_bytes,
                    reserve_per_gpu=self._configuration.reserve_per_gpu_bytes,
                    mig=self._partitioning.cut,
                    unfit=self._partitioning.unfit | self._mps.unfit | self._assignment.unfit,
                    daemon=self._daemon,
                )
            )
            partitions = self._partitioning.partitions.offers(
                described, self._assignment.of, packed=self._sharing.packed
            )
            if self._offers.started:
                described, partitions = self._newcomers.sift(
                    described, self._assignment.of, partitions, self._offers.known
                )
            described = self._coexistence.applied(described)
            self._held = self._held_now(described)
            # shares of a GPU may change without a change of the GPU
            shown = described, dict(self._assignment.of), partitions, self._held
            if shown == self._last_shown:
                return
            self._offers.show(
                [gpu for gpu in described if not self._newcomers.withheld(gpu, self._assignment.of[gpu.uuid])],
                self._assignment.of,
                partitions,
                unit_bytes=self._configuration.unit_bytes,
                packed=self._sharing.packed,
                held=self._held,
            )
            self._described, self._last_shown, self._untaken = described, shown, ""
            self._publisher.set_gpus(described)

    def _held_now(self, gpus: Sequence[GPU]) -> frozenset[str]:
        """Name the device ids that containers hold by grants; asked only where some get no new pods."""
        if all(gpu.health is Health.HEALTHY and not (gpu.mig and gpu.mig.unhealthy) for gpu in gpus):
            return frozenset()
        try:
            listed = self._lister.list(deadline=time.monotonic() + _LIST_SECONDS)
        except PodResourcesError as error:
            log.warning("inventory.holders_unknown", error=str(error))
            return self._held
        return frozenset().union(*(ids for pod in listed for ids in pod.ids.values()))

    def _http(self, address: str) -> HTTPServing:
        try:
            return HTTPServing(
                address, expose=self._metrics.expose, unwell=lambda: self._looks.unwell, unready=self._unready
            )
        except OSError as error:
            raise ConfigurationError(f"serve: {address} cannot be had: {error}") from error

    @property
    def serves_at(self) -> str:
        """Give the address of metrics and health, "" where they are not served."""
        return "" if self._serving is None else self._serving.address

    def _snapshot(self) -> Snapshot:
        physical = {gpu.uuid: gpu for gpu in self._physical}
        return Snapshot(
            gpus=[(gpu, physical[gpu.uuid]) for gpu in self._described or () if gpu.uuid in physical],
            xids=self._care.keeper.xids(),
            registered={resource.name: resource.serving for resource in self._offers.resources},
        )

    def _unready(self) -> str:
        missing = [resource.name for resource in self._offers.resources if not resource.serving]
        return f"no kubelet follows {', '.join(missing)}" if missing else self._looks.unwell
