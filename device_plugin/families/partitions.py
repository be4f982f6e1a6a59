"""GPUs that MIG partitions: which instances this node offers under which names, and how each is handed out."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import structlog

from cotenant.contract.configuration import MIGStrategy
from cotenant.contract.grant import ContainerGrant
from cotenant.contract.inventory import GPU, MIG, Family, Health, InstanceShares, MIGInstance, MIGProfile, Mode
from cotenant.contract.names import SHARED, Names
from device_plugin.admission.calls import Admission, Admitted
from device_plugin.admission.ids import instance_ids, share_ids
from device_plugin.api import deviceplugin_pb2 as pb
from device_plugin.families.granted import Granted
from device_plugin.families.maker import Maker
from device_plugin.families.replicas import Shares
from device_plugin.families.rules import NVIDIA_GPU, Assigned
from device_plugin.nvml import NVML, GPUInstance, MIGError, NVMLUnavailableError, PhysicalGPU

log = structlog.get_logger(__name__)


class Partition(Granted):
    """Answer for *resource*, instances of one MIG profile: Allocate asks no NVML, at a start *maker* makes one."""

    def __init__(
        self,
        resource: str,
        admission: Admission,
        answer: Callable[[ContainerGrant], pb.ContainerAllocateResponse],
        maker: Maker,
    ) -> None:
        super().__init__(resource, admission, answer)
        self._maker = maker

    def _prepare(self, admitted: Admitted) -> None:
        # in the kubelet's pod worker, which calls again when it fails
        if admitted.grant.family is Family.MIG_DYNAMIC and admitted.pod is not None:
            self._maker.ensure(admitted.pod, admitted.grant)


class Offered(NamedTuple):
    """Hold what MIG GPUs are offered as: device ids by resource, each with whether it is healthy; and shares.

    *instances* are had by a grant, *whole* are handed out as GPUs without one.
    """

    instances: Mapping[str, Mapping[str, bool]]
    whole: Mapping[str, Shares]


class Partitions:
    """Look at the MIG GPUs of this node."""

    def __init__(
        self,
        nvml: NVML,
        assigned: Callable[[PhysicalGPU], Assigned],
        strategy: Callable[[], MIGStrategy],
        names: Names,
    ) -> None:
        """Take how each GPU is *assigned*, and under which *strategy* instances that are given are named."""
        self._nvml = nvml
        self._assigned = assigned
        self._strategy = strategy
        self._names = names
        self._last: dict[str, MIG] = {}
        self._gpus: Mapping[str, int] = {}
        # why a GPU could not be read, by UUID and what was asked for: said once
        self._failures: dict[tuple[str, str], str] = {}

    def families(self, gpus: Iterable[PhysicalGPU], family: Family) -> dict[str, PhysicalGPU]:
        """Give the GPUs of one family that are fit to be asked, by UUID."""
        return {
            gpu.uuid: gpu for gpu in gpus if self._assigned(gpu).family is family and gpu.mig_enabled and not gpu.fault
        }

    def static(self, gpus: Iterable[PhysicalGPU]) -> list[PhysicalGPU]:
        """List the GPUs whose instances are given, be MIG mode on or not yet."""
        return [gpu for gpu in gpus if self._assigned(gpu).family is Family.MIG_STATIC and not (gpu.guest or gpu.fault)]

    def look(self, gpus: Sequence[PhysicalGPU], unexplained: Mapping[str, tuple[MIGInstance, ...]]) -> dict[str, MIG]:
        """Read what the MIG GPUs can be cut into and are cut into, by UUID.

        A GPU that fails keeps what it was: its device ids become unhealthy, and must not go under pods that hold them.
        """
        found = {gpu.uuid: self._last[gpu.uuid] for gpu in gpus if gpu.fault and gpu.uuid in self._last}
        for family in (Family.MIG_STATIC, Family.MIG_DYNAMIC):
            for uuid, gpu in self.families(gpus, family).items():
                try:
                    profiles = self._nvml.mig_profiles(gpu.index)
                    there = self._nvml.mig_instances(gpu.index) if family is Family.MIG_STATIC else ()
                except (MIGError, NVMLUnavailableError) as error:
                    self._warn(uuid, "look", error)
                    # it may have failed since it was looked at
                    if uuid in self._last:
                        found[uuid] = self._last[uuid]
                    continue
                self._failures.pop((uuid, "look"), None)
                self._tell_divided(gpu, there)
                # one without a compute instance is being made by somebody, or was left behind
                instances = tuple(one.instance for one in there if one.uuid)
                found[uuid] = MIG(
                    profiles=profiles,
                    instances=instances,
                    unexplained=unexplained.get(uuid, ()),
                    shares=self._shares(gpu, profiles) if family is Family.MIG_STATIC else (),
                )
        self._last = found
        self._gpus = {gpu.uuid: gpu.index for gpu in gpus}
        return found

    def names(self, gpus: Sequence[PhysicalGPU]) -> frozenset[str]:
        """Name what GPUs are to be offered as besides memory, be MIG mode on or not yet, as far as they can be read."""
        found = {how.resource for how in map(self._assigned, gpus) if how.resource}
        for gpu in gpus:
            if not (gpu.guest or gpu.fault):
                try:
                    found |= self._names_of(gpu)
                except (MIGError, NVMLUnavailableError) as error:
                    self._warn(gpu.uuid, "names", error)
        return frozenset(found)

    def _names_of(self, gpu: PhysicalGPU) -> set[str]:
        how = self._assigned(gpu)
        if how.mode is not Mode.MIG:
            return set()
        if how.family is Family.MIG_STATIC and self._strategy() is not MIGStrategy.MIXED:
            return {_whole_name(how)}
        profiles = self._nvml.mig_profiles(gpu.index)
        if how.family is Family.MIG_DYNAMIC:
            return {self._names.mig(profile.name) for profile in profiles}
        cut = MIG(shares=self._shares(gpu, profiles))
        there = self._nvml.mig_instances(gpu.index) if gpu.mig_enabled else ()
        return {self._names.mig_prefix + cut.suffix(one.profile) for one in there}

    def misfits(self, gpus: Sequence[PhysicalGPU], cut: Mapping[str, MIG]) -> dict[str, str]:
        """Say why GPUs, *cut* so, cannot be offered under the name of GPUs, by UUID; the others are."""
        strategy = self._strategy()
        static = [gpu for gpu in gpus if self._assigned(gpu).family is Family.MIG_STATIC]
        if not static or strategy is MIGStrategy.MIXED:
            return {}
        others = [gpu.index for gpu in gpus if self._assigned(gpu).resource]
        if others:
            clash = f"{NVIDIA_GPU}, which GPU {others[0]} is offered as too; use mixed"
            return {gpu.uuid: f"migStrategy: {strategy} offers it as {clash}" for gpu in static}
        if strategy is MIGStrategy.NONE:
            return {}
        # one that is lost has a say too, so that its loss does not change which profile counts
        known = [gpu.uuid for gpu in static if gpu.uuid in cut]
        there = {uuid: sorted({one.profile for one in cut[uuid].instances}) for uuid in known}
        alike = Counter(profiles[0] for profiles in there.values() if len(profiles) == 1)
        # of as many GPUs each, that of the first
        usual = alike.most_common(1)[0][0] if alike else ""
        return {uuid: _misfit(profiles, usual) for uuid, profiles in there.items() if profiles != [usual]}

    def parents(self) -> dict[str, str]:
        """Say of which GPU each instance is that is given, by UUID."""
        return {one.uuid: gpu for gpu, mig in self._last.items() for one in mig.instances}

    def locate(self, uuid: str, number: int) -> MIGInstance | None:
        """Find the instance that NVML calls by *number*; None where there is none by now."""
        if uuid not in self._last or uuid not in self._gpus:
            return None
        try:
            there = self._nvml.mig_instances(self._gpus[uuid])
        except MIGError as error:
            self._warn(uuid, "locate", error)
            return None
        self._failures.pop((uuid, "locate"), None)
        return next((one.instance for one in there if one.id == number and one.uuid), None)

    def nodes(self, gpus: Sequence[PhysicalGPU]) -> dict[str, dict[str, list[tuple[str, str]]]]:
        """Name the device nodes of the instances that are given, by MIG UUID, by that of each GPU that can be read."""
        found: dict[str, dict[str, list[tuple[str, str]]]] = {}
        given = self.families(gpus, Family.MIG_STATIC)
        for gpu in gpus:
            if gpu.fault:
                continue
            try:
                there = self._nvml.mig_instances(gpu.index) if gpu.uuid in given else ()
                found[gpu.uuid] = {one.uuid: self._nvml.mig_nodes(gpu, one) for one in there if one.uuid}
            except (MIGError, NVMLUnavailableError) as error:
                self._warn(gpu.uuid, "nodes", error)
            else:
                self._failures.pop((gpu.uuid, "nodes"), None)
        return found

    def _tell_divided(self, gpu: PhysicalGPU, there: Iterable[GPUInstance]) -> None:
        """Say once why somebody's instances are not offered: who asks for one is to compute with all of it."""
        divided = [f"{one.profile} at {one.start}" for one in there if one.divided]
        if not divided:
            self._failures.pop((gpu.uuid, "divided"), None)
            return
        todo = f"nvidia-smi mig -i {gpu.index} -dci, then -cci, makes one compute instance of each"
        self._warn(gpu.uuid, "divided", f"compute instances do not take all of {', '.join(divided)}: {todo}")

    def _warn(self, gpu: str, asked: str, error: Exception | str) -> None:
        if self._failures.get((gpu, asked)) != str(error):
            self._failures[gpu, asked] = str(error)
            log.warning("mig.not_read", gpu=gpu, error=str(error))

    def _shares(self, gpu: PhysicalGPU, profiles: Iterable[MIGProfile]) -> tuple[InstanceShares, ...]:
        """Say which profiles' instances are shared among those that the extender grants."""
        how = self._assigned(gpu)
        return tuple(
            InstanceShares(profile=profile.name, replicas=how.shares_of(profile.name), renamed=how.renamed)
            for profile in profiles
            if self._strategy() is MIGStrategy.MIXED and how.shares_of(profile.name) > 1
        )

    def offers(self, gpus: Sequence[GPU], assigned: Mapping[str, Assigned], *, packed: bool) -> Offered:
        """List the device ids of every resource that MIG GPUs are offered under; those of unhealthy ones are too."""
        static = [gpu for gpu in gpus if gpu.family is Family.MIG_STATIC]
        offered: dict[str, dict[str, bool]] = {}
        whole: dict[str, Shares] = {}
        if self._strategy() is MIGStrategy.MIXED:
            for gpu in static:
                for one in gpu.mig.instances if gpu.mig else ():
                    ids = offered.setdefault(self._names.mig_prefix + (gpu.mig or MIG()).suffix(one.profile), {})
                    replicas = (gpu.mig or MIG()).replicas(one.profile)
                    ids.update(dict.fromkeys(share_ids(one.uuid, replicas), _is_well(gpu, one)))
        else:
            whole = self._whole(static, assigned, packed=packed)
        for gpu in gpus:
            if gpu.family is Family.MIG_DYNAMIC:
                for profile in gpu.mig.profiles if gpu.mig else ():
                    ids = offered.setdefault(self._names.mig(profile.name), {})
                    ids.update(dict.fromkeys(instance_ids(gpu.uuid, profile), gpu.health is Health.HEALTHY))
        return Offered(offered, whole)

    def _whole(self, static: Iterable[GPU], assigned: Mapping[str, Assigned], *, packed: bool) -> dict[str, Shares]:
        """Offer what is there under NVIDIA's name for GPUs, in shares where a rule says so."""
        found: dict[str, Shares] = {}
        for gpu in static:
            how = assigned[gpu.uuid]
            name = _whole_name(how)
            before = found.get(name, Shares({}, single=False))
            ids = {share: well for uuid, well in self._units(gpu) for share in share_ids(uuid, how.replicas)}
            # also where there are none yet: what is known from the start need not be looked for at other plugins' later
            found[name] = Shares({**before.devices, **ids}, before.single or how.single, packed)
        return found

    def _units(self, gpu: GPU) -> list[tuple[str, bool]]:
        """List what of a GPU counts as one, by UUID, each with whether it is healthy."""
        if self._strategy() is MIGStrategy.NONE:
            return [(gpu.uuid, gpu.health is Health.HEALTHY)]
        return [(one.uuid, _is_well(gpu, one)) for one in (gpu.mig.instances if gpu.mig else ())]


def _whole_name(how: Assigned) -> str:
    """Name what instances are offered as that are called GPUs."""
    return NVIDIA_GPU + (SHARED if how.renamed and how.replicas > 1 else "")


def _misfit(profiles: Sequence[str], usual: str) -> str:
    found = f"it has {', '.join(profiles)}" if profiles else "it has no instances"
    most = f", where most GPUs have {usual}" if usual else ""
    return (
        f"migStrategy: single needs instances of one profile on every GPU of family mig-static, and {found}{most}; "
        "use mixed, or cut the GPUs alike"
    )


def _is_well(gpu: GPU, instance: MIGInstance) -> bool:
    return gpu.health is Health.HEALTHY and (gpu.mig is None or instance.uuid not in gpu.mig.unfit)
