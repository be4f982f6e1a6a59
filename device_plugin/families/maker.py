"""Makes MIG instances for pods that were granted a place, and destroys those whose pod is gone.

What is true is in NVML and in the API server. This process may end between any two calls; whatever it leaves behind is
told by what is there, whom its CDI spec names, and which grants live.
"""

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import structlog

from cotenant.cluster import ClusterError
from cotenant.contract import grant as grants
from cotenant.contract.grant import ContainerGrant, GrantError
from cotenant.contract.inventory import MIGInstance
from cotenant.contract.mig import overlap
from cotenant.contract.names import Names
from cotenant.contract.pods import Pod
from cotenant.contract.reasons import Reason
from device_plugin.admission.identity import PodName, asks
from device_plugin.admission.refusal import RefusedError
from device_plugin.cdi import CapabilityError, Owner, SpecFolder
from device_plugin.nvml import GPUInstance, MIGError, PhysicalGPU

log = structlog.get_logger(__name__)

_READ_SECONDS = 3.0


class Instances(Protocol):
    """Be NVML, as far as instances go; every method may raise MIGError."""

    def mig_instances(self, index: int) -> tuple[GPUInstance, ...]:
        """List the GPU instances of a GPU."""

    def create_mig_instance(self, index: int, profile: str, start: int) -> None:
        """Make one, with its compute instance."""

    def complete_mig_instance(self, index: int, instance: GPUInstance) -> None:
        """Make the compute instance that one lacks."""

    def destroy_mig_instance(self, index: int, instance: GPUInstance) -> None:
        """Destroy one."""

    def mig_nodes(self, gpu: PhysicalGPU, instance: GPUInstance) -> list[tuple[str, str]]:
        """Name the device nodes that a container needs, as it sees them and on the host."""


class Pods(Protocol):
    """Be asked about the pods of this node."""

    @property
    def synced(self) -> bool:
        """Tell whether the cache has been filled once."""

    def all_known(self) -> Sequence[Pod]:
        """List the pods in the cache."""

    def read(self, name: PodName, *, deadline: float) -> Pod | None:
        """Give the pod as the API server has it now; raise ClusterError when it cannot be asked."""


class Maker:
    """Make and destroy the instances of the GPUs that *gpus* gives by UUID; safe to use from many threads."""

    def __init__(
        self,
        nvml: Instances,
        specs: SpecFolder,
        pods: Pods,
        names: Names,
        *,
        gpus: Callable[[], Mapping[str, PhysicalGPU]],
    ) -> None:
        self._nvml = nvml
        self._specs = specs
        self._pods = pods
        self._names = names
        self._gpus = gpus
        # by UUID: to make an instance takes a second or so, and a driver that hangs on one GPU is to hold up no other
        self._locks: dict[str, threading.Lock] = {}

    def ensure(self, pod: Pod, grant: ContainerGrant) -> None:
        """Have the granted instance there, with a CDI spec that names it; raise RefusedError where that cannot be now.

        Called before each start of the container, so most often all is there already.
        """
        gpu = self._gpus().get(grant.gpus[0].uuid)
        if gpu is None or grant.mig is None:
            raise RefusedError(
                Reason.BAD_GRANT, f"container {grant.name} was granted an instance of a GPU that is not here", pod
            )
        wanted = grant.mig.instance
        with self._lock(gpu.uuid):
            try:
                self._ensure(pod, gpu, wanted)
            except (MIGError, CapabilityError, OSError) as error:
                raise RefusedError(
                    Reason.NO_MIG_ROOM,
                    f"the MIG instance of container {grant.name} cannot be made: {error}; it is tried again",
                    pod,
                ) from error

    def sweep(self) -> dict[str, tuple[MIGInstance, ...]]:
        """Destroy the instances that no pod holds; give those that had to stay, by their GPU's UUID.

        Does nothing before the pods of this node are known.
        """
        unexplained: dict[str, tuple[MIGInstance, ...]] = {}
        if not self._pods.synced:
            return unexplained
        held = self._held()
        for uuid, gpu in self._gpus().items():
            with self._lock(uuid):
                try:
                    found = self._nvml.mig_instances(gpu.index)
                except MIGError as error:
                    log.warning("mig.not_listed", gpu=uuid, error=str(error))
                    continue
                stays = [
                    one
                    for one in found
                    if held is None or self._is_held(uuid, one, held) or not self._destroy(uuid, gpu, one)
                ]
                # what a granted pod will have made in a moment is not there yet, and has no spec either
                self._specs.remove_others(uuid, [one.instance for one in stays])
            odd = tuple(one.instance for one in stays if held is not None and not self._is_held(uuid, one, held))
            if odd:
                unexplained[uuid] = odd
        return unexplained

    def _lock(self, uuid: str) -> threading.Lock:
        return self._locks.setdefault(uuid, threading.Lock())

    def _ensure(self, pod: Pod, gpu: PhysicalGPU, wanted: MIGInstance) -> None:
        found = self._nvml.mig_instances(gpu.index)
        same = next((one for one in found if (one.profile, one.start) == (wanted.profile, wanted.start)), None)
        owner = self._specs.owner(gpu.uuid, wanted)
        ours = owner is not None and owner.uid == pod.uid
        if same is not None and same.uuid and ours and owner is not None and owner.instance == same.uuid:
            return
        # one that lacks its compute instance can have no process, whoever began it
        begun = same if same is not None and not same.uuid and not same.divided else None
        for one in found:
            if overlap(one.instance, wanted) and one is not begun:
                self._clear(pod, gpu, one)
        if begun is not None:
            self._nvml.complete_mig_instance(gpu.index, begun)
        else:
            self._nvml.create_mig_instance(gpu.index, wanted.profile, wanted.start)
        there = self._nvml.mig_instances(gpu.index)
        made = next((one for one in there if (one.profile, one.start) == (wanted.profile, wanted.start)), None)
        if made is None or not made.uuid:
            raise MIGError(f"NVML made {wanted.profile} at {wanted.start} of GPU {gpu.index}, and does not list it")
        self._specs.write(
            gpu.uuid,
            wanted,
            Owner(uid=pod.uid, namespace=pod.metadata.namespace, name=pod.metadata.name, instance=made.uuid),
            nodes=self._nvml.mig_nodes(gpu, made),
        )
        log.info("mig.made", gpu=gpu.uuid, profile=made.profile, start=made.start, instance=made.uuid, pod=pod.key)

    def _clear(self, pod: Pod, gpu: PhysicalGPU, one: GPUInstance) -> None:
        """Destroy an instance that is in the way, unless a pod that lives holds it."""
        for other in self._pods.all_known():
            if other.uid != pod.uid and not other.ended:
                for uuid, held in _granted(other, self._names) or ():
                    # the extender may have heard of its end before we do
                    if uuid == gpu.uuid and overlap(one.instance, held) and self._lives(PodName.of(other), other.uid):
                        raise MIGError(f"pod {other.key} holds {one.profile} at {one.start} of GPU {gpu.uuid}")
        self._nvml.destroy_mig_instance(gpu.index, one)
        self._specs.remove(gpu.uuid, one.instance)
        log.info("mig.cleared", gpu=gpu.uuid, profile=one.profile, start=one.start, instance=one.uuid, pod=pod.key)

    def _destroy(self, uuid: str, gpu: PhysicalGPU, one: GPUInstance) -> bool:
        try:
            self._nvml.destroy_mig_instance(gpu.index, one)
        except MIGError as error:
            log.warning("mig.not_destroyed", gpu=uuid, error=str(error))
            return False
        self._specs.remove(uuid, one.instance)
        log.info("mig.destroyed", gpu=uuid, profile=one.profile, start=one.start, instance=one.uuid)
        return True

    def _held(self) -> set[tuple[str, str, int]] | None:
        """Name the places that live grants give, by GPU, profile and start; None where one of them cannot be read."""
        held: set[tuple[str, str, int]] = set()
        for pod in self._pods.all_known():
            granted = [] if pod.ended else _granted(pod, self._names)
            if granted is None:
                log.warning("mig.nothing_swept", pod=pod.key, why="its grant cannot be read, so it may hold anything")
                return None
            held.update((uuid, one.profile, one.start) for uuid, one in granted)
        return held

    def _is_held(self, uuid: str, one: GPUInstance, held: set[tuple[str, str, int]]) -> bool:
        """Tell whether a pod holds an instance: by its grant, or it was made for one that the cache does not show."""
        if (uuid, one.profile, one.start) in held:
            return True
        try:
            owner = self._specs.owner(uuid, one.instance)
        except OSError as error:
            log.warning("mig.owner_unknown", gpu=uuid, profile=one.profile, start=one.start, error=str(error))
            return True
        return owner is not None and self._lives(PodName(owner.namespace, owner.name), owner.uid)

    def _lives(self, name: PodName, uid: str) -> bool:
        """Tell whether a pod lives, as the API server has it now; while that cannot be asked it may."""
        try:
            pod = self._pods.read(name, deadline=time.monotonic() + _READ_SECONDS)
        except ClusterError:
            return True
        return pod is not None and pod.uid == uid and not pod.ended


def _granted(pod: Pod, names: Names) -> list[tuple[str, MIGInstance]] | None:
    """List the instances that a pod was granted; None where it asks some and its grant cannot be read."""
    text = pod.annotations.get(names.grant)
    if text is None:
        return []
    try:
        grant = grants.decode(text)
    except GrantError:
        return None if _asks_instance(pod, names) else []
    return [(c.gpus[0].uuid, c.mig.instance) for c in grant.containers if c.mig is not None]


def _asks_instance(pod: Pod, names: Names) -> bool:
    asked: Iterable[str] = (found.resource for c, _ in pod.start_order if (found := asks(c, names)) is not None)
    return any(resource.startswith(names.mig_prefix) for resource in asked)
