"""A stand-in for kube-scheduler 1.36: the scheduling of pods with one extender, as far as an extender can tell.

Of the plugins there is only NodeResourcesFit, and of that only extended resources; no preemption, no Events, and every
change of a node or a bound pod wakes every waiting pod, as it does those that an extender rejected. Functions name what
they follow in pkg/scheduler.
"""

import random
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Generic, Literal, Self, TypeVar

import msgspec
import structlog

from cotenant.cluster import Cluster, ClusterError, Reflector, Unreadable
from cotenant.cluster.connection import STRATEGIC_MERGE_PATCH
from cotenant.standins.scheduler_extender import MANAGED, ExtenderError, HTTPExtender
from cotenant.standins.scheduler_queue import Queue, Waiting
from cotenant.standins.scheduler_rules import Node, Pod, no_fit, requested, sample_size

log = structlog.get_logger(__name__)

T = TypeVar("T")

_ENDED = {"Succeeded", "Failed"}
# The real one has no limit, but its client sends 50 requests a second.
_BINDS_AT_ONCE = 16
_SYNC_SECONDS = 30.0


class Scheduler:
    """Schedule the pods of one schedulerName until stop(); usable as a context manager, which starts it.

    Args:
        cluster: whose pods and nodes; must outlive the scheduler.
        extender: is asked about every pod that names one of its resources; others are bound nowhere.
        name: the schedulerName.
        percentage_of_nodes: percentageOfNodesToScore; 0 adapts to the size of the cluster.
        backoff: the first and the longest seconds that a pod waits after a failure.
        rng: breaks ties between nodes of the same score.

    """

    def __init__(
        self,
        cluster: Cluster,
        extender: HTTPExtender,
        *,
        name: str = "cotenant-scheduler",
        percentage_of_nodes: int = 0,
        backoff: tuple[float, float] = (1.0, 10.0),
        rng: random.Random | None = None,
    ) -> None:
        self._cluster = cluster
        self._extender = extender
        self._name = name
        self._percentage = percentage_of_nodes
        self._rng = rng or random.Random()
        self._queue = Queue(first=backoff[0], longest=backoff[1])
        # all of these under the queue's lock
        self._nodes: dict[str, Node] = {}
        # by UID: the node of a pod that is bound, or assumed to be, and what it takes there
        self._charges: dict[str, tuple[str, dict[str, int]]] = {}
        self._used: dict[str, Counter[str]] = {}
        self._next_start = 0
        self._binders = ThreadPoolExecutor(_BINDS_AT_ONCE, thread_name_prefix="scheduler bind")
        self._loop = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._pods_reflector = Reflector(cluster, "/api/v1/pods", Pod, _Sink(self._pod, lambda pod: pod.metadata.uid))
        self._nodes_reflector = Reflector(
            cluster, "/api/v1/nodes", Node, _Sink(self._node, lambda node: node.metadata.name)
        )

    def start(self) -> Self:
        """Read the cluster, then begin to schedule; raise TimeoutError when it cannot be read."""
        for reflector in (self._nodes_reflector, self._pods_reflector):
            reflector.start()
            if not reflector.synced.wait(_SYNC_SECONDS):
                raise TimeoutError(f"the stand-in scheduler has not read the cluster in {_SYNC_SECONDS} s")
        self._loop.start()
        return self

    def stop(self) -> None:
        """End; binds under way are waited for."""
        self._queue.stop()
        self._pods_reflector.stop()
        self._nodes_reflector.stop()
        if self._loop.is_alive():
            self._loop.join()
        self._binders.shutdown()
        self._extender.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    # What the watches say (eventhandlers.go)

    def _node(self, change: str, node: Node) -> None:
        with self._queue.lock:
            if change == "DELETED":
                self._nodes.pop(node.metadata.name, None)
            else:
                self._nodes[node.metadata.name] = node
            self._queue.wake_all()

    def _pod(self, change: str, pod: Pod) -> None:
        uid, node = pod.metadata.uid, pod.spec.get("nodeName")
        with self._queue.lock:
            if change == "DELETED" or pod.status.get("phase") in _ENDED:
                self._queue.drop(uid)
                if self._release(uid):
                    self._queue.wake_all()
            elif node:
                self._queue.drop(uid)
                self._release(uid)
                self._charge(pod, node)
                self._queue.wake_all()
            elif pod.spec.get("schedulerName") == self._name and pod.metadata.deletion_timestamp is None:
                self._queue.put(pod)

    def _charge(self, pod: Pod, node: str) -> None:
        requests = requested(pod)
        self._charges[pod.metadata.uid] = node, requests
        self._used.setdefault(node, Counter()).update(requests)

    def _release(self, uid: str) -> bool:
        charge = self._charges.pop(uid, None)
        if charge is not None:
            self._used[charge[0]].subtract(charge[1])
        return charge is not None

    # One pod (schedule_one.go)

    def _run(self) -> None:
        while (entry := self._queue.pop()) is not None:
            try:
                self._schedule(entry, entry.pod)
            except (ExtenderError, ValueError) as error:  # ValueError: a node's or pod's quantity is none
                self._failed(entry, "SchedulerError", str(error))

    def _schedule(self, entry: Waiting, pod: Pod) -> None:
        with self._queue.lock:
            nodes = dict(self._nodes)
        if not nodes:
            self._failed(entry, "Unschedulable", "no nodes available to schedule pods")
            return
        reasons: dict[str, list[str]] = {}
        feasible = self._feasible(pod, nodes, reasons)
        if not feasible:
            self._failed(entry, "Unschedulable", no_fit(len(nodes), reasons))
            return
        node = feasible[0] if len(feasible) == 1 else self._best(pod, feasible)
        with self._queue.lock:
            if pod.metadata.uid not in self._queue:
                return  # it was deleted, or somebody else bound it
            self._charge(pod, node)
        self._binders.submit(self._bind, entry, pod, node)

    def _feasible(self, pod: Pod, nodes: dict[str, Node], reasons: dict[str, list[str]]) -> list[str]:
        """Find the nodes that fit the pod; note in *reasons* why others do not (findNodesThatFitPod)."""
        nominated = pod.status.get("nominatedNodeName")
        if nominated in nodes:
            try:
                if found := self._pass_extender(pod, self._pass_filters(pod, [nodes[nominated]], reasons), reasons):
                    return found
            except ExtenderError as error:
                log.info("standin.nominated_node_failed", pod=pod.metadata.name, node=nominated, error=str(error))
        # a ring, so that in a large cluster each attempt looks at other nodes
        start = self._next_start % len(nodes)
        ring = list(nodes.values())
        sample = self._pass_filters(pod, ring[start:] + ring[:start], reasons)
        self._next_start = (self._next_start + len(sample) + len(reasons)) % len(nodes)
        return self._pass_extender(pod, sample, reasons)

    def _pass_filters(self, pod: Pod, nodes: Sequence[Node], reasons: dict[str, list[str]]) -> list[str]:
        """Keep nodes with enough left of every extended resource, until there are enough of them (fitsRequest)."""
        requests = {name: amount for name, amount in requested(pod).items() if amount and name != MANAGED}
        enough = sample_size(len(nodes), self._percentage)
        found: list[str] = []
        with self._queue.lock:
            for node in nodes:
                name = node.metadata.name
                used, there = self._used.get(name, Counter()), node.allocatable
                short = [r for r, amount in requests.items() if amount > there.get(r, 0) - used[r]]
                if short:
                    reasons[name] = [f"Insufficient {resource}" for resource in short]
                    continue
                found.append(name)
                if len(found) == enough:
                    break
        return found

    def _pass_extender(self, pod: Pod, nodes: list[str], reasons: dict[str, list[str]]) -> list[str]:
        if not nodes or not self._extender.is_interested(pod):
            return nodes
        left, failed = self._extender.filter(pod, nodes)
        reasons.update({node: [message] for node, message in failed.items()})
        return left

    def _best(self, pod: Pod, nodes: Sequence[str]) -> str:
        """Choose by score, and among equals by chance (prioritizeNodes); an extender that fails scores nothing."""
        try:
            scores = self._extender.prioritize(pod, nodes) if self._extender.is_interested(pod) else {}
        except ExtenderError as error:
            log.info("standin.no_scores", pod=pod.metadata.name, error=str(error))
            scores = {}
        return max(nodes, key=lambda node: (scores.get(node, 0), self._rng.random()))

    def _bind(self, entry: Waiting, pod: Pod, node: str) -> None:
        """Bind; where that fails, forget what was assumed and wake the others (handleBindingCycleError)."""
        try:
            if not self._extender.is_interested(pod):
                raise ExtenderError("the stand-in scheduler binds by its extender only")
            self._extender.bind(pod, node)
        except ExtenderError as error:
            with self._queue.lock:
                if pod.metadata.uid not in self._queue:
                    return  # bound all the same, or deleted: the watch has said so
                self._release(pod.metadata.uid)
                self._queue.wake_all()
            self._failed(entry, "SchedulerError", str(error))

    def _failed(self, entry: Waiting, reason: Literal["Unschedulable", "SchedulerError"], message: str) -> None:
        """Queue the pod again and say why in its status, where that is news (handleSchedulingFailure).

        The patch comes back as a change of the pod and wakes it. Only a message that stays the same ends that.
        """
        if not self._queue.put_back(entry, error=reason == "SchedulerError"):
            return
        with self._queue.lock:
            pod = entry.pod
        told: dict[str, str] = {"type": "PodScheduled", "status": "False", "reason": reason, "message": message}
        conditions: list[dict[str, str]] = pod.status.get("conditions") or []
        known = next((c for c in conditions if c.get("type") == "PodScheduled"), {})
        if all(known.get(key) == value for key, value in told.items()):
            return
        if known.get("status") != "False":
            told["lastTransitionTime"] = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        body = msgspec.json.encode({"metadata": {"uid": pod.metadata.uid}, "status": {"conditions": [told]}})
        path = f"/api/v1/namespaces/{pod.metadata.namespace}/pods/{pod.metadata.name}/status"
        try:
            self._cluster.patch(path, body, content_type=STRATEGIC_MERGE_PATCH)
        except ClusterError as error:
            log.info("standin.condition_lost", pod=pod.metadata.name, error=str(error))


class _Sink(Generic[T]):
    """Turn what a reflector says into single changes."""

    def __init__(self, told: Callable[[str, T], None], key: Callable[[T], str]) -> None:
        self._told = told
        self._key = key
        self._known: dict[str, T] = {}

    def replaced(self, objects: list[T], started: int, unreadable: list[Unreadable]) -> None:  # noqa: ARG002
        """Take *objects* for all there are."""
        for key in self._known.keys() - {self._key(obj) for obj in objects}:
            self.changed("DELETED", self._known[key])
        for obj in objects:
            self.changed("MODIFIED", obj)

    def changed(self, change: str, obj: T) -> None:
        """Pass a change on."""
        if change == "DELETED":
            self._known.pop(self._key(obj), None)
        else:
            self._known[self._key(obj)] = obj
        self._told(change, obj)

    def unreadable(self, change: str, obj: Unreadable) -> None:
        """Skip what is no pod or node."""
