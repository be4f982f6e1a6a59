"""A kubelet in Python, as far as device plugins can tell: registration, admission, PodResources, container starts.

It follows kubernetes 1.36 (pkg/kubelet): pods are admitted one after another by one loop, containers start in one
thread per pod, and nothing runs but the bookkeeping. Pods are given directly, or come from an API server that gets
their status and the node's capacity back.
"""

import hashlib
import queue
import random
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Self

import msgspec

from cotenant.standins.devices import DeviceError, DeviceManager
from cotenant.standins.kubelet_pods import KubeletPod, Started, limits, most_at_once, started
from cotenant.standins.pod_resources import PodResourcesServer

_TERMINAL = {"Succeeded", "Failed"}


def container_id(uid: str, name: str) -> str:
    """Name a pod's container as container runtimes do, by 64 hexadecimal digits."""
    return hashlib.sha256(f"{uid}/{name}".encode()).hexdigest()


class Reporter(Protocol):
    """Be told what the kubelet would write to the API server."""

    def pod_status(self, pod: KubeletPod, status: dict[str, Any]) -> None:
        """Take the pod's new status."""

    def pod_gone(self, pod: KubeletPod) -> None:
        """Know that a deleted pod's containers have ended."""

    def node_status(self, capacity: Mapping[str, int], allocatable: Mapping[str, int]) -> None:
        """Take how many devices the node has, and how many of them work, by resource."""


class Faults(msgspec.Struct):
    """Switch on what can go wrong on a real node; may be changed at any time."""

    # before 1.34 List shows rejected and ended pods too (feature gate KubeletPodResourcesListUseActivePods)
    list_inactive_pods: bool = False
    # pods stay admitted without starting, as while their image is pulled
    hold_starts: bool = False


class _Pod:
    """Hold what the kubelet knows of one pod."""

    def __init__(self, pod: KubeletPod) -> None:
        self.pod = pod
        self.phase = "Pending"
        self.reason = ""
        self.message = ""
        self.admitted = False
        # deleted, and its containers have ended; the object may still be there
        self.terminated = False
        self.started: dict[str, Started] = {}
        self.running: set[str] = set()
        self.last_error = ""
        self.start_errors = 0
        self.stopping = threading.Event()

    @property
    def over(self) -> bool:
        """Tell whether the pod holds nothing any more (GetActivePods leaves it out)."""
        return self.terminated or self.phase in _TERMINAL


class Kubelet:
    """Run one node under *directory*, laid out as /var/lib/kubelet is."""

    def __init__(
        self,
        node: str,
        directory: Path,
        *,
        reporter: Reporter | None = None,
        retry_seconds: float = 0.05,
    ) -> None:
        """Prepare the node; *retry_seconds* is how long a failed start waits, about a second on a real node."""
        self.node = node
        self.directory = directory
        self.faults = Faults()
        self._reporter = reporter
        self._retry_seconds = retry_seconds
        self._pods: dict[str, _Pod] = {}
        self._changed = threading.Condition()
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._loop: threading.Thread | None = None
        self._node_allocatable: dict[str, int] = {}
        self.devices = DeviceManager(
            directory / "device-plugins", active=self._active, changed=self._tell_node, rng=random.Random(0)
        )
        socket = directory / "pod-resources" / "kubelet.sock"
        self.pod_resources = PodResourcesServer(socket, pods=self._listed, devices=self.devices)

    def start(self) -> Self:
        """Begin to serve and to admit; pods that were there before are admitted again first."""
        self.pod_resources.start()
        self.devices.start()
        with self._changed:
            known = sorted(self._pods.values(), key=lambda p: p.pod.metadata.name)
        # HandlePodAdditions of the first batch; only after it do sources count as ready (syncLoopIteration)
        for pod in known:
            self._work.put(partial(self._admit, pod))
        self._work.put(self._sources_ready)
        self._loop = threading.Thread(target=self._sync_loop, name=f"kubelet {self.node}", daemon=True)
        self._loop.start()
        return self

    def stop(self) -> None:
        """End the kubelet's process; containers keep running."""
        self._work.put(None)
        if self._loop is not None:
            self._loop.join()
        for pod in self._pods.values():
            pod.stopping.set()
        self.devices.stop()
        self.pod_resources.stop()

    def restart(self) -> None:
        """End and start the process: sockets are deleted, bound pods admitted again, held devices kept."""
        self.stop()
        self.start()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    # What an API server would say.

    def add(self, pod: KubeletPod | Mapping[str, Any]) -> None:
        """Bind a pod to this node; it is admitted when its turn comes."""
        manifest = pod if isinstance(pod, KubeletPod) else msgspec.convert(pod, KubeletPod)
        self._work.put(lambda: self._add(manifest))

    def update(self, pod: KubeletPod | Mapping[str, Any]) -> None:
        """Change a pod; a deletionTimestamp ends its containers."""
        manifest = pod if isinstance(pod, KubeletPod) else msgspec.convert(pod, KubeletPod)
        self._work.put(lambda: self._update(manifest))

    def remove(self, uid: str) -> None:
        """Delete a pod at once."""
        self._work.put(lambda: self._remove(uid))

    # What happens on the node.

    def finish(self, uid: str) -> None:
        """Let all containers of a pod end well."""
        with self._changed:
            pod = self._pods[uid]
            pod.stopping.set()
            pod.phase = "Succeeded"
            pod.running.clear()
            self._changed.notify_all()
        self._tell(pod)

    def restart_container(self, uid: str, container: str) -> None:
        """Let one container end and start again, as a crash does; return when it runs."""
        times = self.times_started(uid, container)
        self.crash_container(uid, container)
        self.wait(lambda: self.times_started(uid, container) > times, "the container to start again")

    def crash_container(self, uid: str, container: str) -> None:
        """Let one container end; it is started again until it starts."""
        pod = self._pods[uid]
        threading.Thread(target=self._start_container, args=(pod, container), daemon=True).start()

    # What a test can ask; all texts are empty for a pod that this node does not know.

    def wait(self, condition: Callable[[], Any], what: str, seconds: float = 20.0) -> None:
        """Wait until *condition* holds; raise TimeoutError that says what was waited for."""
        with self._changed:
            if not self._changed.wait_for(condition, timeout=seconds):
                raise TimeoutError(f"waited {seconds} s for {what}")

    def phase(self, uid: str) -> str:
        """Give the pod's phase."""
        pod = self._pods.get(uid)
        return pod.phase if pod else ""

    def message(self, uid: str) -> str:
        """Give the message of a pod's status."""
        pod = self._pods.get(uid)
        return pod.message if pod else ""

    def reason(self, uid: str) -> str:
        """Give the reason of a pod's status."""
        pod = self._pods.get(uid)
        return pod.reason if pod else ""

    def last_error(self, uid: str) -> str:
        """Give the last error that kept a container from starting."""
        pod = self._pods.get(uid)
        return pod.last_error if pod else ""

    def started(self, uid: str, container: str) -> Started | None:
        """Give what a container was started with; None before that."""
        pod = self._pods.get(uid)
        return pod.started.get(container) if pod else None

    def times_started(self, uid: str, container: str) -> int:
        """Count how often a container has started."""
        started = self.started(uid, container)
        return started.times if started else 0

    def admitted(self, uid: str) -> bool:
        """Tell whether a pod has been admitted."""
        pod = self._pods.get(uid)
        return pod is not None and pod.admitted

    def allocatable(self, resource: str) -> int:
        """Give how many devices of a resource the node advertises; 0 when it does not."""
        return self._node_allocatable.get(resource, 0)

    # The sync loop: one pod at a time.

    def _sync_loop(self) -> None:
        while (step := self._work.get()) is not None:
            step()

    def _sources_ready(self) -> None:
        self.devices.sources_ready = True

    def _add(self, manifest: KubeletPod) -> None:
        pod = _Pod(manifest)
        with self._changed:
            if manifest.metadata.uid in self._pods:
                return
            self._pods[manifest.metadata.uid] = pod
        self._admit(pod)

    def _update(self, manifest: KubeletPod) -> None:
        pod = self._pods.get(manifest.metadata.uid)
        if pod is None:
            self._add(manifest)
            return
        pod.pod = manifest
        if manifest.metadata.deletion_timestamp and not pod.terminated:
            with self._changed:
                pod.terminated = True
                pod.stopping.set()
                pod.running.clear()
                self._changed.notify_all()
            if self._reporter is not None:
                self._reporter.pod_gone(manifest)

    def _remove(self, uid: str) -> None:
        with self._changed:
            pod = self._pods.pop(uid, None)
            if pod is not None:
                pod.stopping.set()
            self._changed.notify_all()

    def _admit(self, pod: _Pod) -> None:
        """Allocate for each container in order, then check that all fits (canAdmitPod and its handlers)."""
        if pod.over or pod.pod.metadata.deletion_timestamp:
            return
        uid = pod.pod.metadata.uid
        try:
            for container, role in pod.pod.containers:
                self.devices.allocate(
                    uid,
                    container["name"],
                    limits(container),
                    init=role != "main",
                    sidecar=role == "sidecar",
                    running=container["name"] in pod.running,
                )
        except DeviceError as error:
            self._reject(pod, "UnexpectedAdmissionError", f"Allocate failed due to {error}, which is unexpected")
            return
        if problem := self._does_not_fit(pod):
            self._reject(pod, *problem)
            return
        with self._changed:
            pod.admitted = True
            pod.stopping = threading.Event()
            self._changed.notify_all()
        threading.Thread(target=self._start_pod, args=(pod, pod.stopping), name=f"pod {uid}", daemon=True).start()

    def _does_not_fit(self, pod: _Pod) -> tuple[str, str] | None:
        """Compare with the node's allocatable; what the node does not list is not checked (lifecycle/predicate.go)."""
        for resource, capacity in self._node_allocatable.items():
            if self.devices.has_pod(pod.pod.metadata.uid):
                capacity = max(capacity, self.devices.allocated(resource))  # noqa: PLW2901 - sanitizeNodeAllocatable
            requested = most_at_once(pod.pod, resource)
            others = [p for p in self._pods.values() if p is not pod and not p.over]
            used = sum(most_at_once(p.pod, resource) for p in others)
            if requested and used + requested > capacity:
                return f"OutOf{resource}", (
                    f"Node didn't have enough resource: {resource}, requested: {requested}, used: {used}, "
                    f"capacity: {capacity}"
                )
        return None

    def _reject(self, pod: _Pod, reason: str, message: str) -> None:
        with self._changed:
            pod.phase, pod.reason, pod.message = "Failed", reason, f"Pod was rejected: {message}"
            self._changed.notify_all()
        self._tell(pod)

    # The pod workers.

    def _start_pod(self, pod: _Pod, stopping: threading.Event) -> None:
        for container, role in pod.pod.containers:
            if container["name"] in pod.running or (role == "init" and container["name"] in pod.started):
                continue
            while self.faults.hold_starts and not stopping.is_set():
                stopping.wait(self._retry_seconds)
            if not self._start_container(pod, container["name"], stopping):
                return
        with self._changed:
            pod.phase = "Running"
            self._changed.notify_all()
        self._tell(pod)

    def _start_container(self, pod: _Pod, name: str, stopping: threading.Event | None = None) -> bool:
        """Start one container, again and again until it starts; tell whether it did before the pod was stopped."""
        stopping = stopping or pod.stopping
        uid = pod.pod.metadata.uid
        container, role = next((c, r) for c, r in pod.pod.containers if c["name"] == name)
        while not stopping.is_set():
            try:
                self.devices.pre_start(uid, name, list(limits(container)))
            except DeviceError as error:
                with self._changed:
                    pod.last_error, pod.start_errors = str(error), pod.start_errors + 1
                    self._changed.notify_all()
                stopping.wait(self._retry_seconds)
                continue
            with self._changed:
                times = pod.started[name].times if name in pod.started else 0
                pod.started[name] = started(
                    pod.pod,
                    container,
                    node=self.node,
                    responses=self.devices.responses(uid, name),
                    ids=self.devices.held(uid, name),
                    times=times + 1,
                )
                if role != "init":
                    pod.running.add(name)
                self._changed.notify_all()
            return True
        return False

    # What goes back to the API server.

    def _active(self) -> list[str]:
        with self._changed:
            return [uid for uid, pod in self._pods.items() if not pod.over]

    def _listed(self) -> list[KubeletPod]:
        with self._changed:
            inactive = self.faults.list_inactive_pods
            return [pod.pod for pod in self._pods.values() if inactive or not pod.over]

    def _tell(self, pod: _Pod) -> None:
        if self._reporter is None:
            return
        statuses: dict[str, list[dict[str, Any]]] = {"containerStatuses": [], "initContainerStatuses": []}
        for container, role in pod.pod.containers:
            name = container["name"]
            last = pod.started.get(name)
            status = {"name": name, "ready": name in pod.running, "started": name in pod.running, "restartCount": 0}
            status |= {"image": container.get("image", ""), "imageID": ""}
            if last is not None:
                run = container_id(pod.pod.metadata.uid, name)
                status |= {"containerID": f"standin://{run}", "restartCount": last.times - 1}
            statuses["containerStatuses" if role == "main" else "initContainerStatuses"].append(status)
        told = {"phase": pod.phase, "reason": pod.reason, "message": pod.message}
        self._reporter.pod_status(pod.pod, {k: v for k, v in told.items() if v} | statuses)

    def _tell_node(self) -> None:
        capacity, allocatable = self.devices.capacity()
        with self._changed:
            self._node_allocatable = allocatable
            self._changed.notify_all()
        if self._reporter is not None:
            self._reporter.node_status(capacity, allocatable)
