"""Find pods in manifests of any kind, and write them anew in our words."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from cotenant.cli import manifests
from cotenant.cli.migrate.kai import FRACTION, KAI, MEMORY, ask_of, is_kais, queue
from cotenant.cli.migrate.systems import (
    GPUSHARE,
    HAMI,
    NAMES,
    NVIDIA,
    OURS,
    SYSTEMS,
    Ask,
    Json,
    Note,
    Options,
    System,
    ask,
    split,
    wishes,
    wishes_hami,
)
from cotenant.contract.configuration import ConfigurationError
from cotenant.contract.environment import INJECTED
from cotenant.contract.request import MAX_GPUS

_WHOLE = "nvidia.com/gpu"
# what stands between the words of a manifest
_BETWEEN = re.compile(r"""[\s{}\[\],:"']+""")
# what NVIDIA's GPU feature discovery says of a node; it also ends the name of the product in -SHARED
_SHARED_LABELS = frozenset({"nvidia.com/gpu.replicas", "nvidia.com/gpu.sharing-strategy"})
_SCHEDULERS = frozenset({system.scheduler for system in (*SYSTEMS, KAI)} - {""})
# of a pod, or a Workflow; a SparkApplication; a RayCluster, by a label
_NAME_SCHEDULERS = frozenset({"schedulerName", "batchScheduler", "ray.io/scheduler-name"})
_WITH_QUEUES = frozenset({"volcano", "kai-scheduler"})


class Migrated(msgspec.Struct, frozen=True):
    """Hold the documents in our words, and what was not kept: for each note, where."""

    documents: tuple[Json, ...]
    notes: tuple[tuple[str, str], ...]
    changed: int


def migrated(documents: Iterable[Any], options: Options) -> Migrated:
    """Migrate documents together, each object of a List by itself; what is no mapping is no manifest, and left out.

    NVIDIA's sharing configuration among them says how many shares a GPU had, and is itself turned into ours.
    """
    found = [one for document in documents for one in _objects(document)]
    notes: list[tuple[str, str]] = []
    kept: list[Json] = []
    sharings = {id(one): sharing for one in found if (sharing := _sharings(one))}
    if sharings:
        options, said = _shares([sharing for each in sharings.values() for sharing in each], options)
        where = ", ".join(_where(one) for one in found if id(one) in sharings)
        notes += [(where, note.sentence) for note in said]
    changed = 0
    for one in found:
        if id(one) in sharings:
            continue
        ours = _apart(one)
        before = changed
        for template in _templates(ours):
            said, touched = _rewrite(template, options)
            notes += [(_where(one), note.sentence) for note in said]
            changed += touched
        notes += [(_where(one), note.sentence) for job in _volcano_jobs(ours) for note in _leave_volcano(job)]
        if changed > before:
            notes += [(_where(one), note.sentence) for note in _scheduled(ours)]
        notes += [(_where(one), note.sentence) for note in _left(ours, options)]
        kept.append(ours)
    return Migrated(tuple(kept), tuple(dict.fromkeys(notes)), changed)


def _objects(document: Any) -> list[Json]:
    """List the objects of a document: those of a List, such as `kubectl get -o yaml` prints, or the document itself."""
    one = _mapping(document)
    inner = _listed(one.get("items")) if one.get("kind") == "List" else [document]
    return [each for each in inner if isinstance(each, dict)]


def _apart(value: Any) -> Any:
    """Copy a document so that none of it is shared: what an alias stands for is written anew in each pod by itself."""
    if isinstance(value, dict):
        return {key: _apart(inner) for key, inner in value.items()}
    return [_apart(inner) for inner in value] if isinstance(value, list) else value


def _where(one: Json) -> str:
    metadata = _mapping(one.get("metadata"))
    return f"{one.get('kind', 'document')}/{metadata.get('name') or metadata.get('generateName', '?')}"


def _sharings(one: Json) -> list[Json]:
    """List NVIDIA's sharing configurations: the document itself, or those in a ConfigMap; others have a sharing too."""
    inner: list[Any] = [one]
    for text in _mapping(one.get("data")).values() if one.get("kind") == "ConfigMap" else ():
        try:
            inner += manifests.read(text) if isinstance(text, str) else ()
        except ConfigurationError:
            continue
    found = [_mapping(_mapping(each).get("sharing")) for each in inner]
    return [sharing for sharing in found if isinstance(sharing.get("timeSlicing") or sharing.get("mps"), dict)]


def _shares(sharings: Iterable[Json], options: Options) -> tuple[Options, list[Note]]:
    """Learn from sharing configurations how many shares a GPU has, which is not guessed where they differ."""
    numbers: set[int] = set()
    said: list[Note] = []
    entries = [
        (key, resource)
        for sharing in sharings
        for key in ("timeSlicing", "mps")
        for resource in map(_mapping, _listed(_mapping(sharing.get(key)).get("resources")))
    ]
    for key, resource in entries:
        # NVIDIA's plugin completes a name without its domain
        name = f"nvidia.com/{str(resource.get('name')).removeprefix('nvidia.com/')}"
        if name == _WHOLE and isinstance(resource.get("replicas"), int):
            numbers.add(max(1, resource["replicas"]))
            if key == "mps":
                said.append(Note("MPS held each share to its part of the memory: let pods ask for isolation: limited"))
                options = msgspec.structs.replace(options, keep_limits=True)
            if resource.get("devices", "all") != "all":
                said.append(Note("devices of a sharing configuration become rules: docs/configuration.md, gpus"))
        elif name.startswith("nvidia.com/mig-"):
            said.append(Note(f"{name} stays: give the file to our device plugin, docs/modes.md"))
    if len(numbers) == 1:
        options = msgspec.structs.replace(options, replicas=options.replicas or numbers.pop())
    if options.replicas is not None:
        shares = f"{options.replicas} shares a GPU become memory"
        said.insert(0, Note(f"{shares}: pods ask for what they need, and need not be alike"))
    elif numbers:
        listed = " or ".join(map(str, sorted(numbers)))
        said.append(
            Note(f"{listed} shares a GPU, by node: say --replicas, and give the pods of each kind by themselves")
        )
    return options, said or [Note("the sharing configuration shares nothing that is known here")]


def _listed(value: object) -> list[Any]:
    """Give what should be a list, and nothing where it is something else."""
    return value if isinstance(value, list) else []


def _templates(value: Any) -> Iterator[Json]:
    """Yield every pod, or template of pods, in a document of any kind: what has a spec with containers."""
    if isinstance(value, dict):
        if _is_pod(value):
            yield value
        for inner in value.values():
            yield from _templates(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _templates(inner)


def _is_pod(value: Json) -> bool:
    return isinstance(_mapping(value.get("spec")).get("containers"), list)


def _scheduled(value: Any) -> Iterator[Note]:
    """Tell where an object of pods that are ours now names another scheduler, for them or for itself to give them."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in _NAME_SCHEDULERS and isinstance(inner, str) and inner in _SCHEDULERS:
                yield Note(f"{key}: {inner} is left as it is: Cotenant's places its pods only where they name no other")
            yield from _scheduled(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _scheduled(inner)


def _left(one: Json, options: Options) -> Iterator[Note]:
    """Tell of what another system is asked outside of pods: by a quota, or an object of which pods are made."""
    theirs = NAMES | {FRACTION, MEMORY}
    if options.replicas is None:
        theirs -= {_WHOLE}  # whole GPUs may go on under the plain name
    names = sorted({word.removeprefix("requests.").removeprefix("limits.") for word in _words(one)} & theirs)
    if names:
        yield Note(f"{', '.join(names)} is left as it is: it stands in no pod, so see to it by hand")


def _words(value: Any) -> Iterator[str]:
    """Yield keys and texts of a document, but not those of pods: a quota may have a name as the one or the other."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not (_is_pod(value) and key in {"metadata", "spec"}):
                yield str(key)
                yield from _words(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _words(inner)
    elif isinstance(value, str):
        # also of a pod that stands in a ConfigMap as a text
        yield from (word for word in _BETWEEN.split(value) if "/" in word)


def _containers(spec: Json) -> list[Json]:
    listed = (spec[key] for key in ("initContainers", "containers") if isinstance(spec.get(key), list))
    return [one for part in listed for one in part if isinstance(one, dict)]


def _systems(containers: Iterable[Json], *, hamis: bool) -> list[System]:
    """List the systems that containers ask; NVIDIA's alone, since the others' pods may name its resource too."""
    named = {name for container in containers for name in _amounts(container)}
    found = [system for system in SYSTEMS if named & set(system.resources)]
    if hamis and named & {_WHOLE} and HAMI not in found:
        found.append(HAMI)  # by this name it gives a whole GPU
    return [system for system in found if system.name != "NVIDIA"] or found


def _amounts(container: Json) -> dict[str, Any]:
    resources = _mapping(container.get("resources"))
    return {**_mapping(resources.get("requests")), **_mapping(resources.get("limits"))}


def _mapping(value: object) -> Json:
    """Give what should be a mapping, and nothing where it is something else."""
    return value if isinstance(value, dict) else {}


def _rewrite(template: Json, options: Options) -> tuple[list[Note], int]:
    spec = template["spec"]
    if is_kais(_annotations(template)):
        return _rewrite_kais(template, options)
    containers = _containers(spec)
    systems = _systems(
        containers, hamis=spec.get("schedulerName") == HAMI.scheduler or wishes_hami(_annotations(template))
    )
    if not systems:
        return [], 0
    system = systems[0]
    notes: list[Note] = []
    asks: list[Ask] = []
    theirs = {*system.resources, _WHOLE} if system is HAMI else {*system.resources}
    asking = [container for container in containers if set(_amounts(container)) & theirs]
    for container in asking:
        found, said = ask(system, _amounts(container), options)
        notes += said
        if found is not None and system is GPUSHARE:
            found, said = split(found, _mapping(_mapping(template.get("metadata")).get("labels")))
            notes += said
        if found is None:
            return notes, 0  # left whole as it is: half of a pod in our words would be worse than none
        asks.append(found)
    if len(systems) > 1:
        names = " and ".join(one.name for one in systems)
        return [Note(f"asks {names} in one pod: leave out what it asks of all but one")], 0
    if objection := _objection([one.gpus for one in asks], asking, spec):
        return [Note(objection)], 0
    for container, found in zip(asking, asks, strict=True):
        _ask_ours(container, system, found.units)
    notes += _rewrite_pod(template, system, asks, options)
    return notes, 1


def _objection(counts: list[int], asking: list[Json], spec: Json) -> str:
    """Say why so many GPUs for each of the containers *asking* are refused by admission; "" where they are not."""
    if len(set(counts)) > 1:
        return "its containers ask different numbers of GPUs, and gpu-count is the pod's: ask by hand"
    if max(counts) > MAX_GPUS:
        return f"asks {max(counts)} GPUs, and no pod can have more than {MAX_GPUS}"
    first = [one for one in asking if any(one is each for each in _listed(spec.get("initContainers")))]
    if max(counts) > 1 and first:
        return f"init container {first[0].get('name')} asks several GPUs: only main containers can, so ask by hand"
    return ""


def _rewrite_kais(template: Json, options: Options) -> tuple[list[Note], int]:
    found, notes = ask_of(_annotations(template), template["spec"], options)
    if found is None:
        return notes, 0
    container, asked = found
    _ask_ours(container, KAI, asked.units)
    notes += _rewrite_pod(template, KAI, [asked], options)
    return [*notes, *queue(_mapping(template["metadata"].get("labels")))], 1


def _annotations(template: Json) -> dict[str, str]:
    annotations = _mapping(_mapping(template.get("metadata")).get("annotations"))
    return {str(key): str(value) for key, value in annotations.items()}


def _ask_ours(container: Json, system: System, units: int) -> None:
    resources = container["resources"] = _mapping(container.get("resources"))
    theirs = {*system.resources, _WHOLE}
    for section in ("limits", "requests"):
        if isinstance(resources.get(section), dict):
            resources[section] = {k: v for k, v in resources[section].items() if k not in theirs}
            if not resources[section]:
                del resources[section]
    resources["limits"] = _mapping(resources.get("limits")) | {OURS.gpu_mem: units}


def _rewrite_pod(template: Json, system: System, asks: list[Ask], options: Options) -> Iterator[Note]:
    spec = template["spec"]
    metadata = template["metadata"] = _mapping(template.get("metadata"))
    before = _annotations(template)
    kept, theirs, said = wishes(before)
    yield from said
    percents = {one.percent for one in asks if one.percent}
    if asks[0].gpus > 1:
        kept[OURS.gpu_count] = str(asks[0].gpus)
    if len(percents) == 1:
        kept[OURS.compute_percent] = str(*percents)
    elif percents:
        yield Note(f"its containers ask for different shares of cores, {sorted(percents)}; none is kept")
    if any(one.whole for one in asks):
        kept[OURS.isolation] = "exclusive"
        if not all(one.whole for one in asks):
            yield Note(
                "one of its containers asked a whole GPU: exclusive is the pod's wish, so each gets one for itself"
            )
    elif options.keep_limits:
        kept[OURS.isolation] = "limited"
    elif any(one.limited for one in asks):
        yield Note(f"{system.name}'s library held containers to their memory; here MPS does: --keep-limits asks for it")
    theirs |= {*system.annotations}
    annotations = {k: v for k, v in before.items() if k not in theirs} | kept
    if annotations:
        metadata["annotations"] = annotations
    else:
        metadata.pop("annotations", None)
    yield from _leave(spec, system)


def _volcano_jobs(value: Any, *, volcanos: bool = False) -> Iterator[Json]:
    """Yield the specs of Volcano's Jobs: also of those in a CronJob, a JobTemplate or a List."""
    if isinstance(value, dict):
        volcanos = volcanos or ".volcano.sh/" in str(value.get("apiVersion"))
        spec = _mapping(value.get("spec"))
        if volcanos and isinstance(spec.get("tasks"), list):
            yield spec
    inner = value.values() if isinstance(value, dict) else _listed(value)
    for one in inner:
        yield from _volcano_jobs(one, volcanos=volcanos)


def _leave_volcano(job: Json) -> Iterator[Note]:
    """Have a Volcano Job of our pods name a scheduler that admission replaces: its pods without one get the Job's.

    So does Volcano's controller (pkg/controllers/job/job_controller_util.go, createJobPod); left out, its webhook names
    Volcano's again.
    """
    containers = [one for template in _templates(job) for one in _containers(template["spec"])]
    ours = any(OURS.gpu_mem in _amounts(one) for one in containers)
    if ours and job.get("schedulerName", "volcano") == "volcano":
        job["schedulerName"] = "default-scheduler"
        yield Note("spec.schedulerName: default-scheduler is for its pods to inherit, which admission sends to ours")


def _selected(spec: Json) -> Iterator[tuple[str, str]]:
    """Yield the labels that a pod wants of its node, by selector or affinity, with their values."""
    yield from ((str(label), str(value)) for label, value in _mapping(spec.get("nodeSelector")).items())
    affinity = _mapping(_mapping(spec.get("affinity")).get("nodeAffinity"))
    required = _mapping(affinity.get("requiredDuringSchedulingIgnoredDuringExecution")).get("nodeSelectorTerms")
    for term in map(_mapping, _listed(required)):
        for each in map(_mapping, _listed(term.get("matchExpressions"))):
            yield from ((str(each.get("key")), str(value)) for value in _listed(each.get("values")) or [""])


def _marked(spec: Json, system: System) -> Iterator[Note]:
    """Tell of what a pod wants of its node that nodes with our device plugin need not have."""
    for label, value in _selected(spec):
        if label in system.node_labels:
            yield Note(f"affinity names the node label {label}, which nodes of ours need not have: take it out")
        elif system is NVIDIA and (label in _SHARED_LABELS or value.endswith("-SHARED")):
            yield Note(f"{label}: {value} is of nodes whose GPUs NVIDIA's plugin shares: take it out")


def _leave(spec: Json, system: System) -> Iterator[Note]:
    """Take out of a pod what belonged to the other system."""
    if system.scheduler and spec.get("schedulerName") == system.scheduler:
        del spec["schedulerName"]
        if system.scheduler in _WITH_QUEUES:
            yield Note(f"schedulerName: {system.scheduler} is taken out: gangs and queues are not kept")
    selector = _mapping(spec.get("nodeSelector"))
    for label in system.node_labels:
        if label in selector:
            yield Note(f"nodeSelector {label} is taken out: only nodes with our device plugin advertise the memory")
    spec_selector = {k: v for k, v in selector.items() if k not in system.node_labels}
    if spec_selector:
        spec["nodeSelector"] = spec_selector
    else:
        spec.pop("nodeSelector", None)
    yield from _marked(spec, system)
    for container in _containers(spec):
        variables = container.get("env")
        for variable in map(_mapping, _listed(variables)):
            name = str(variable.get("name", ""))
            if name in INJECTED or name.startswith(system.variables or ("\0",)):
                yield Note(
                    f"container {container.get('name')} sets {name}: take it out, admission refuses or nobody reads it"
                )
