"""The watchdog: looks at the processes of all GPUs, and tells of those that use what was not granted."""

import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial

import structlog
from cachetools import TTLCache
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cotenant.contract import overuse as reports
from cotenant.contract.inventory import GPU, Family
from cotenant.contract.names import Names
from cotenant.contract.overuse import MAX_USERS, Overuser, OveruseReport, WatchdogSettings
from cotenant.contract.pods import Pod
from cotenant.contract.units import format_bytes
from device_plugin.cluster.events import PodEvents
from device_plugin.cluster.notes import NodeNotes
from device_plugin.nvml import NVML
from device_plugin.threads import THREADS
from device_plugin.watchdog import usage
from device_plugin.watchdog.proc import Processes
from device_plugin.watchdog.usage import Account, Stranger, Usage

log = structlog.get_logger(__name__)

_ACTION = "MemoryWatch"
# Who goes up and down around its margin is told of so often at most.
_AGAIN_AFTER_SECONDS = 600.0
_REMEMBERED = 10_000

_Key = tuple[str, str, str]


class Watchdog:
    """Look every *settings.interval* seconds, from a thread of its own, until stop().

    *gpus* gives the GPUs as they are published, *pods* those of this node, None as long as they are not known.
    *daemons* names the processes of MPS control daemons, whose servers hold some memory for nobody in particular.
    """

    def __init__(
        self,
        settings: WatchdogSettings,
        names: Names,
        nvml: NVML,
        notes: NodeNotes,
        events: PodEvents,
        *,
        node: str,
        gpus: Callable[[], Sequence[GPU]],
        pods: Callable[[], Sequence[Pod] | None],
        daemons: Callable[[], Collection[int]],
        processes: Processes,
    ) -> None:
        self._settings = settings
        self._names = names
        self._nvml = nvml
        self._notes = notes
        self._events = events
        self._node = node
        self._gpus = gpus
        self._pods = pods
        self._daemons = daemons
        self._processes = processes
        self._account = Account()
        self._peaks: dict[_Key, Overuser] = {}
        self._told: TTLCache[object, None] = TTLCache(_REMEMBERED, _AGAIN_AFTER_SECONDS)
        # so that no report looks like one of a plugin before
        self._beat = int(time.time())
        self._written: tuple[Overuser, ...] = ()
        self._written_at = 0.0
        self._stopping = threading.Event()
        self._loop = THREADS.of("watchdog", self._run)

    def start(self) -> None:
        """Begin to look, or take away what an earlier plugin reported that did."""
        if self._settings.interval:
            if not self._processes.sees_all():
                why = "this is a PID namespace of its own, where NVML shows no processes of others: set hostPID"
                log.warning("watchdog.blind", why=why)
                self._events.about_node("WatchdogBlind", _ACTION, f"the memory watchdog sees nothing: {why}")
            self._loop.start()
        else:
            # of one before this, killed before it could take it away; nobody else would
            self._notes.annotate(self._names.overusers, None)

    def stop(self) -> None:
        """End; the report is withdrawn by whoever stops the notes."""
        self._stopping.set()
        self._loop.join(1.0)

    def look(self) -> None:
        """Look once."""
        pods = self._pods()
        if pods is None:
            return  # else everybody would be a stranger
        gpus = {gpu.index: gpu for gpu in self._gpus()}
        found = {}
        for index, listed in self._nvml.processes([*gpus]).items():
            if isinstance(listed, str):
                log.debug("watchdog.gpu_not_read", gpu=gpus[index].uuid, why=listed)
            else:
                found[gpus[index].uuid] = listed
        origin = partial(self._processes.origin, daemons=self._daemons())
        account = usage.account(found, origin, pods, self._names)
        before, self._account = self._account, account
        memory = {gpu.uuid for gpu in gpus.values() if gpu.family is Family.MEMORY}
        # twice in a row: a pod may start before the watch has shown it, or its grant
        again = {(one.gpu, one.pid) for one in before.strangers}
        for stranger in account.strangers:
            if (stranger.gpu, stranger.pid) in again:
                self._tell_stranger(stranger)
        without = {(one.pod.uid, one.gpu) for one in before.usages if one.ungranted}
        for one in account.usages:
            if one.ungranted and one.used_bytes and one.gpu in memory and (one.pod.uid, one.gpu) in without:
                self._tell_ungranted(one)
        over = [one for one in usage.overuse(account.usages, self._settings.margin_bytes) if one.gpu in memory]
        self._report(over)

    @property
    def account(self) -> Account:
        """Give what was found at the last look."""
        return self._account

    def collector(self, indices: Callable[[], dict[str, str]]) -> Collector:
        """Give the metrics of the last look; *indices* gives NVML's index of each GPU by UUID."""
        return UsageCollector(self._node, lambda: self._account, indices)

    def _run(self) -> None:
        while not self._stopping.wait(self._settings.interval):
            self.look()

    def _report(self, over: Sequence[Usage]) -> None:
        before, self._peaks = self._peaks, {}
        for one in over:
            key = (one.pod.uid, one.container, one.gpu)
            seen = before.get(key)
            peak = max(reports.shown_bytes(one.used_bytes), seen.used_bytes if seen else 0)
            user = Overuser(
                uid=one.pod.uid,
                container=one.container,
                gpu=one.gpu,
                granted_bytes=one.granted_bytes or 0,
                used_bytes=peak,
            )
            self._peaks[key] = user
            if seen is None and key not in self._told:
                self._told[key] = None
                log.warning("watchdog.overuse", pod=one.pod.key, pod_uid=one.pod.uid, why=user.sentence)
                self._events.about_pod(one.pod, "GPUMemoryOverused", _ACTION, user.sentence)
        for key in before.keys() - self._peaks.keys():
            log.info("watchdog.overuse_ended", pod_uid=key[0], container=key[1], gpu=key[2])
        self._write(tuple(self._peaks.values())[:MAX_USERS])

    def _write(self, users: tuple[Overuser, ...]) -> None:
        if not users:
            self._notes.annotate(self._names.overusers, None)
        elif users != self._written or time.monotonic() - self._written_at >= reports.BEAT_SECONDS:
            self._beat += 1
            self._written_at = time.monotonic()
            self._notes.annotate(self._names.overusers, reports.encode(OveruseReport(beat=self._beat, users=users)))
        self._written = users

    def _tell_ungranted(self, one: Usage) -> None:
        if (one.pod.uid, one.gpu) not in self._told:
            self._told[one.pod.uid, one.gpu] = None
            note = f"the pod uses {format_bytes(one.used_bytes)} of GPU {one.gpu}, but has no grant"
            log.warning("watchdog.ungranted", pod=one.pod.key, pod_uid=one.pod.uid, why=note)
            self._events.about_pod(one.pod, "GPUMemoryUngranted", _ACTION, note)

    def _tell_stranger(self, stranger: Stranger) -> None:
        if (stranger.gpu, stranger.pid) not in self._told:
            self._told[stranger.gpu, stranger.pid] = None
            note = (
                f"process {stranger.pid}, which belongs to no pod of this node, uses "
                f"{format_bytes(stranger.used_bytes)} of GPU {stranger.gpu}"
            )
            log.warning("watchdog.stranger", gpu=stranger.gpu, pid=stranger.pid, used_bytes=stranger.used_bytes)
            self._events.about_node("GPUForeignProcess", _ACTION, note)


class UsageCollector(Collector):
    """Show what *account* gives; *indices* gives NVML's index of each GPU by UUID."""

    def __init__(self, node: str, account: Callable[[], Account], indices: Callable[[], dict[str, str]]) -> None:
        self._node = node
        self._account = account
        self._indices = indices

    def describe(self) -> Iterator[Metric]:
        """Say nothing before there is something to show."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Give what each container uses and was granted of each GPU, and what processes outside of Kubernetes use."""
        account, indices = self._account, self._indices()
        shown = account()
        labels = ["node", "namespace", "pod", "container", "gpu", "uuid"]
        used = GaugeMetricFamily(
            "cotenant_container_gpu_memory_used_bytes", "What the processes of a container use.", labels=labels
        )
        granted = GaugeMetricFamily(
            "cotenant_container_gpu_memory_granted_bytes", "What it was granted of that GPU.", labels=labels
        )
        for one in shown.usages:
            metadata = one.pod.metadata
            values = [self._node, metadata.namespace, metadata.name, one.container, indices.get(one.gpu, ""), one.gpu]
            used.add_metric(values, one.used_bytes)
            if one.granted_bytes is not None:
                granted.add_metric(values, one.granted_bytes)
        foreign = {uuid: [0, 0] for uuid in indices}
        for stranger in shown.strangers:
            sums = foreign.setdefault(stranger.gpu, [0, 0])
            sums[0] += 1
            sums[1] += stranger.used_bytes
        processes = GaugeMetricFamily(
            "cotenant_gpu_foreign_processes",
            "Processes that belong to no pod of the node.",
            labels=["node", "gpu", "uuid"],
        )
        memory = GaugeMetricFamily(
            "cotenant_gpu_foreign_memory_used_bytes", "What they use.", labels=["node", "gpu", "uuid"]
        )
        for uuid, (count, amount) in foreign.items():
            processes.add_metric([self._node, indices.get(uuid, ""), uuid], count)
            memory.add_metric([self._node, indices.get(uuid, ""), uuid], amount)
        yield from (used, granted, processes, memory)
