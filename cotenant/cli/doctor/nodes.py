"""Checks of GPU nodes, their plugins, and the pods on them."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator

from cotenant.cli.doctor.checks import Said, Severity, check, some
from cotenant.cli.doctor.facts import Facts, Json, annotations, labels, seconds
from cotenant.contract import grant as grants
from cotenant.contract import inventory as inventories
from cotenant.contract.configuration import ExtenderConfiguration
from cotenant.contract.inventory import GPU, MIG, Health, Inventory, Mode
from cotenant.contract.units import count_of, format_bytes

BROKEN, SUSPECT = Severity.BROKEN, Severity.SUSPECT
# The kubelet's word for what it has no room for (pkg/kubelet/lifecycle), other than our own resource.
_OUT_OF = re.compile(r"OutOf(cpu|memory|pods|ephemeral-storage)$")
# And of a container whose pod it admitted before it knew the resource (cm/devicemanager/manager.go).
_NO_DEVICES = "no devices found allocated in local cache"
_CLOCK_SECONDS = 60.0
_LOGS = "kubectl -n {} logs -l app.kubernetes.io/component=device-plugin --prefix"


def _name(body: Json) -> str:
    return str(body["metadata"]["name"])


def _key(pod: Json) -> str:
    return f"{pod['metadata'].get('namespace')}/{_name(pod)}"


def _amount(node: Json, resource: str) -> int:
    return count_of((node.get("status", {}).get("allocatable") or {}).get(resource))


def _inventories(facts: Facts) -> Iterator[tuple[Json, Inventory]]:
    for node in facts.gpu_nodes:
        try:
            yield node, inventories.decode(annotations(node)[facts.names.inventory])
        except (KeyError, inventories.InventoryError):
            continue


def _gpus(facts: Facts) -> Iterator[tuple[str, GPU]]:
    """Give each GPU that is published, with the name of its node."""
    return ((_name(node), gpu) for node, inventory in _inventories(facts) for gpu in inventory.gpus)


@check("no-gpu-nodes")
def _no_gpu_nodes(facts: Facts) -> Said:
    if "nodes" in facts.objects and not facts.gpu_nodes:
        yield SUSPECT, "no node has joined", f"kubectl label node NODE {facts.names.domain}/device-plugin=true"


@check("plugin-not-serving")
def _plugin_not_serving(facts: Facts) -> Said:
    silent = [_name(node) for node in facts.gpu_nodes if facts.names.inventory not in annotations(node)]
    if silent:
        yield (
            BROKEN,
            f"labelled nodes publish no GPUs: {some(silent)}",
            f"their plugin has not started or finds no NVML (runtimeClassName?): {_LOGS.format(facts.namespace)}",
        )
    gone = [_name(node) for node, inventory in _inventories(facts) if not inventory.serving]
    if gone:
        yield (
            BROKEN,
            f"the device plugin is not registered with the kubelet: {some(gone)}",
            f"see what it says: {_LOGS.format(facts.namespace)}",
        )


@check("not-advertised")
def _not_advertised(facts: Facts) -> Said:
    lacking = [
        _name(node)
        for node, inventory in _inventories(facts)
        if inventory.serving and inventory.gpus and not _amount(node, facts.names.gpu_mem)
        if any(gpu.family is inventories.Family.MEMORY for gpu in inventory.gpus)
    ]
    if lacking:
        yield (
            BROKEN,
            f"kubelets do not advertise {facts.names.gpu_mem}, though the plugin serves: {some(lacking)}",
            (
                "the kubelet would start pods without asking the plugin; restart the plugin there, and look for "
                "refused registrations in the kubelet's log"
            ),
        )
    lacking = [
        _name(node)
        for node, inventory in _inventories(facts)
        if inventory.serving and _lacks_instances(node, inventory, facts.names.mig_prefix)
    ]
    if lacking:
        yield (
            BROKEN,
            f"kubelets advertise no MIG instance, though the plugin has some to give: {some(lacking)}",
            f"see what the plugin says there: {_LOGS.format(facts.namespace)}; and the kubelet's log",
        )


def _lacks_instances(node: Json, inventory: Inventory, prefix: str) -> bool:
    named = [name for name in node.get("status", {}).get("allocatable") or {} if name.startswith(prefix)]
    return not any(_amount(node, name) for name in named) and inventory.gives_instances(named=bool(named))


@check("inventory-unreadable")
def _inventory_unreadable(facts: Facts) -> Said:
    for node in facts.gpu_nodes:
        text = annotations(node).get(facts.names.inventory)
        try:
            inventories.decode(text or '{"version":1,"generation":0,"unit":1073741824}')
        except inventories.InventoryError as error:
            yield BROKEN, f"{_name(node)}: {error}", "run the plugin and the extender of one release"


@check("node-unit-differs")
def _node_unit_differs(facts: Facts) -> Said:
    told = facts.extender_configuration()
    if isinstance(told, ExtenderConfiguration):
        others = [_name(node) for node, found in _inventories(facts) if found.unit_bytes != told.unit_bytes]
        if others:
            yield (
                BROKEN,
                f"nodes count in another unit than the extender's {told.unit}: {some(others)}",
                "restart their plugins with the unit of extender-config.yaml",
            )


@check("gpu-advertised-twice")
def _advertised_twice(facts: Facts) -> Said:
    twice = [
        _name(node)
        for node, inventory in _inventories(facts)
        if inventory.gpus
        and any(
            _amount(node, name)
            for name in (node.get("status", {}).get("allocatable") or {})
            if name == "nvidia.com/gpu" or name.startswith(("nvidia.com/gpu.", "nvidia.com/mig-"))
        )
        and all(gpu.family is inventories.Family.MEMORY for gpu in inventory.gpus)
    ]
    if twice:
        yield (
            BROKEN,
            f"another device plugin hands out the same GPUs as nvidia.com/…: {some(twice)}",
            "take these nodes out of NVIDIA's plugin or GPU Operator (nvidia.com/gpu.deploy.device-plugin=false)",
        )


@check("one-uuid-on-two-nodes")
def _one_uuid_on_two_nodes(facts: Facts) -> Said:
    where: defaultdict[str, list[str]] = defaultdict(list)
    for node, gpu in _gpus(facts):
        where[gpu.uuid].append(node)
    for uuid, names in where.items():
        if len(names) > 1:
            yield (
                BROKEN,
                f"GPU {uuid} is on several nodes: {some(names)}",
                "a node was renamed and its old Node object stayed, or its disk was copied: delete what is not there",
            )


@check("gpu-unhealthy")
def _gpu_unhealthy(facts: Facts) -> Said:
    for node, gpu in _gpus(facts):
        if gpu.health is Health.UNHEALTHY:
            yield (
                SUSPECT,
                f"{node} GPU {gpu.index} is unhealthy: {gpu.detail or 'its plugin says no more'}",
                f"nvidia-smi -q -i {gpu.uuid} on the node; docs/runbooks.md, CotenantGPUUnhealthyWithPods",
            )
        mig = gpu.mig or MIG()
        for ill in mig.unhealthy:
            there = ill.place or next((one for one in mig.instances if one.uuid == ill.uuid), None)
            which = f"{there.profile} at slice {there.start}" if there else ill.uuid
            yield (
                SUSPECT,
                f"{node} GPU {gpu.index} gives nobody the MIG instance {which}: {ill.detail}",
                "docs/health.md, What ends a trouble; the rest of the GPU gets pods",
            )


@check("gpu-fenced")
def _gpu_fenced(facts: Facts) -> Said:
    for node, gpu in _gpus(facts):
        if gpu.foreign is None:
            continue
        what = "gets no new pods" if gpu.fenced else f"has {format_bytes(gpu.foreign_bytes)} that count as taken"
        yield (
            SUSPECT,
            f"{node} GPU {gpu.index} {what}: {gpu.foreign.detail}",
            "end those who go around the extender, or take the GPU out of the other plugin; docs/coexistence.md",
        )


@check("mps-without-daemon")
def _mps_without_daemon(facts: Facts) -> Said:
    for node, gpu in _gpus(facts):
        if gpu.mode is Mode.MPS and not gpu.mps_pipe:
            yield (
                BROKEN,
                f"{node} GPU {gpu.index} is in mode mps, and no control daemon listens",
                "its plugin starts the daemon; see its log on that node",
            )


@check("mig-unexplained")
def _mig_unexplained(facts: Facts) -> Said:
    for node, gpu in _gpus(facts):
        if gpu.mig is not None and gpu.mig.unexplained:
            what = ", ".join(f"{one.profile} at slice {one.start}" for one in gpu.mig.unexplained)
            yield (
                SUSPECT,
                f"{node} GPU {gpu.index} has MIG instances that no pod was given: {what}",
                "their slices count as taken; where nothing uses them: nvidia-smi mig -dci and -dgi on the node",
            )


@check("pods-without-grant")
def _pods_without_grant(facts: Facts) -> Said:
    lost, unreadable = [], []
    for pod in facts.of("pods"):
        ended = pod.get("status", {}).get("phase") in {"Succeeded", "Failed"}
        text = annotations(pod).get(facts.names.grant)
        if ended or not pod["spec"].get("nodeName") or not (text or _asks(pod, facts.names.gpu_mem)):
            continue
        key = _key(pod)
        if text is None:
            lost.append(key)
            continue
        try:
            grants.decode(text)
        except grants.GrantError:
            unreadable.append(key)
    if lost:
        yield (
            BROKEN,
            f"pods were bound without a grant, around the extender: {some(lost)}",
            "delete them, and create them without spec.nodeName and with no scheduler of their own",
        )
    if unreadable:
        yield (
            BROKEN,
            f"the grants of pods cannot be read: {some(unreadable)}",
            "delete these pods, and see that the policy cotenant-grants is installed",
        )


@check("held-back")
def _held_back(facts: Facts) -> Said:
    held = [
        _key(pod)
        for pod in facts.of("pods")
        if facts.names.grant in annotations(pod) and any(_NO_DEVICES in _waits_for(status) for status in _statuses(pod))
    ]
    if held:
        yield (
            BROKEN,
            f"pods were admitted by a kubelet that had lost its checkpoint, so that they never start: {some(held)}",
            "delete them; their controllers make others",
        )


def _statuses(pod: Json) -> list[Json]:
    status = pod.get("status", {})
    return [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]


def _waits_for(status: Json) -> str:
    return str((status.get("state", {}).get("waiting") or {}).get("message") or "")


@check("cpu-raced")
def _cpu_raced(facts: Facts) -> Said:
    raced = [
        f"{_key(pod)} ({pod['status']['reason']})"
        for pod in facts.of("pods")
        if facts.names.grant in annotations(pod) and _OUT_OF.match(pod.get("status", {}).get("reason") or "")
    ]
    if raced:
        yield (
            SUSPECT,
            f"kubelets rejected pods of ours, as another scheduler had given their CPU or memory away: {some(raced)}",
            "keep other schedulers' pods off GPU nodes by a taint: docs/operations.md, Two schedulers on one node",
        )


def _asks(pod: Json, resource: str) -> bool:
    containers = [*pod["spec"].get("initContainers", ()), *pod["spec"]["containers"]]
    return any(resource in (one.get("resources", {}).get("limits") or {}) for one in containers)


@check("overcommitted")
def _overcommitted(facts: Facts) -> Said:
    held: Counter[tuple[str, str]] = Counter()
    for pod in facts.of("pods"):
        if pod.get("status", {}).get("phase") in {"Succeeded", "Failed"}:
            continue
        try:
            charges = grants.decode(annotations(pod)[facts.names.grant]).charges()
        except (KeyError, grants.GrantError):
            continue
        held.update({(pod["spec"].get("nodeName", ""), uuid): amount for uuid, amount in charges.items()})
    for node, gpu in _gpus(facts):
        if gpu.family is inventories.Family.MEMORY and held[node, gpu.uuid] > gpu.usable_bytes:
            yield (
                BROKEN,
                f"pods hold more of {node} GPU {gpu.index} than it can give",
                (
                    "the GPU has shrunk, or reservePerGpu has grown: end pods until it fits; "
                    "docs/runbooks.md, CotenantGPUOvercommitted"
                ),
            )


@check("clock-differs")
def _clock_differs(facts: Facts) -> Said:
    known = {_name(node) for node in facts.gpu_nodes}
    ahead = [
        _name(lease)
        for lease in facts.of("leases")
        if _name(lease) in known
        and lease["spec"].get("renewTime")
        and seconds(lease["spec"]["renewTime"]) > facts.now + _CLOCK_SECONDS
    ]
    if ahead:
        yield (
            SUSPECT,
            f"the clocks of nodes are ahead of this machine's by more than a minute: {some(ahead)}",
            "run NTP there (or here): certificates, leases and alerts go by the clock",
        )


@check("label-without-plugin")
def _label_without_plugin(facts: Facts) -> Said:
    label = f"{facts.names.domain}/device-plugin"
    left = [_name(node) for node, _ in _inventories(facts) if labels(node).get(label) != "true"]
    if left and facts.workload("cotenant-device-plugin") is not None:
        yield (
            SUSPECT,
            f"nodes publish GPUs, and have no label {label}=true that keeps a plugin there: {some(left)}",
            f"label them, or take the inventory off: kubectl annotate node NODE {facts.names.inventory}-",
        )
