"""Looks at what others have of this node's GPUs, tells people of changes, and keeps what goes into the inventory."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import structlog
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cotenant.contract import inventory as inventories
from cotenant.contract.inventory import GPU, Foreign, InventoryError
from cotenant.contract.names import Names
from cotenant.contract.pods import Pod
from cotenant.contract.units import format_bytes
from device_plugin.admission.identity import Devices
from device_plugin.admission.refusal import PodResourcesError
from device_plugin.cluster.events import PodEvents
from device_plugin.coexistence import foreign
from device_plugin.coexistence.foreign import ForeignUse
from device_plugin.watchdog.usage import Account

log = structlog.get_logger(__name__)

_ACTION = "Coexistence"
_LIST_SECONDS = 2.0


class Lister(Protocol):
    """Be asked what all containers hold."""

    def devices(self, *, deadline: float) -> Sequence[Devices]:
        """List the devices of every container; raise PodResourcesError after the monotonic time *deadline*."""

    def close(self) -> None:
        """Ask no more."""


class Coexistence:
    """Follow what others have of the GPUs of one node.

    *pods* gives this node's pods, None as long as they are not known; *used* what processes used when last looked at;
    *ours* names the resources that this plugin serves. Safe to use from many threads.
    """

    def __init__(
        self,
        lister: Lister,
        names: Names,
        unit_bytes: int,
        events: PodEvents,
        *,
        pods: Callable[[], Sequence[Pod] | None],
        used: Callable[[], Account],
        ours: Callable[[], Iterable[str]],
    ) -> None:
        self._lister = lister
        self._names = names
        self._events = events
        self._pods = pods
        self._used = used
        self._ours = ours
        self._lock = threading.Lock()
        self._use = ForeignUse(names, unit_bytes)
        # what stands on the node from before this plugin began, until it has looked often enough itself
        self._recalled: Mapping[str, Foreign] | None = None
        self._looks = 0
        self._found: Mapping[str, Foreign] = {}
        self._told: dict[str, Foreign] = {}

    def recall(self, annotations: Mapping[str, str]) -> bool:
        """Take over what a plugin before this one had published; tell whether that is anything, once."""
        with self._lock:
            if self._recalled is not None:
                return False
            try:
                published = inventories.decode(annotations.get(self._names.inventory, "")).gpus
            except InventoryError:
                published = ()
            self._recalled = {gpu.uuid: gpu.foreign for gpu in published if gpu.foreign is not None}
            return bool(self._recalled)

    def look(self, gpus: Sequence[GPU]) -> None:
        """Look once; where the kubelet or the API server cannot be asked nothing changes."""
        pods = self._pods()
        if pods is None:
            return  # else every pod would be without a grant
        try:
            listed = self._lister.devices(deadline=time.monotonic() + _LIST_SECONDS)
        except PodResourcesError as error:
            log.warning("coexistence.not_looked", error=str(error))
            return
        with self._lock:
            self._found = self._use.look(gpus, listed, frozenset(self._ours()), pods, self._used())
            self._looks += 1
            now = self._now()
        self._tell(gpus, now)

    def applied(self, gpus: Iterable[GPU]) -> tuple[GPU, ...]:
        """Give *gpus* with what others have of them."""
        with self._lock:
            return foreign.applied(gpus, self._now())

    def close(self) -> None:
        """Look no more."""
        self._lister.close()

    def _now(self) -> Mapping[str, Foreign]:
        before = self._recalled or {}
        return {**before, **self._found} if self._looks < foreign.LOOKS else self._found

    def _tell(self, gpus: Sequence[GPU], now: Mapping[str, Foreign]) -> None:
        """Tell people of GPUs whose fence or counted memory has changed."""
        for gpu in gpus:
            before, after = self._told.get(gpu.uuid), now.get(gpu.uuid)
            if before == after:
                continue
            name = f"GPU {gpu.index} ({gpu.uuid})"
            if after is None:
                log.info("gpu.foreign_use_ended", gpu=gpu.uuid)
                self._events.about_node("GPUClear", _ACTION, f"{name} is free of others again", normal=True)
            elif after.fenced:
                log.warning("gpu.fenced", gpu=gpu.uuid, why=after.detail)
                self._events.about_node("GPUFenced", _ACTION, f"{name} gets no new pods: {after.detail}")
            else:
                log.warning("gpu.foreign_use", gpu=gpu.uuid, used_bytes=after.bytes, why=after.detail)
                note = f"{format_bytes(after.bytes)} of {name} count as taken: {after.detail}"
                self._events.about_node("GPUForeignUse", _ACTION, note)
        self._told = dict(now)


class ForeignCollector(Collector):
    """Show what others have of the GPUs that *gpus* gives, as they are published."""

    def __init__(self, node: str, gpus: Callable[[], Iterable[GPU]]) -> None:
        self._node = node
        self._gpus = gpus

    def describe(self) -> Iterator[Metric]:
        """Say nothing before there is something to show."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Give a sample for each GPU, as it is published."""
        labels = ["node", "gpu", "uuid"]
        fenced = GaugeMetricFamily(
            "cotenant_gpu_fenced",
            "1 where another plugin's pod holds it, so that nothing is placed there.",
            labels=labels,
        )
        counted = GaugeMetricFamily(
            "cotenant_gpu_foreign_memory_counted_bytes", "What others have of it, as it counts as taken.", labels=labels
        )
        for gpu in self._gpus():
            values = [self._node, str(gpu.index), gpu.uuid]
            fenced.add_metric(values, gpu.foreign is not None and gpu.foreign.fenced)
            counted.add_metric(values, gpu.foreign.bytes if gpu.foreign is not None else 0)
        yield from (fenced, counted)
