"""What KAI's words mean: a pod asks by annotations, and one of its containers has what they say.

The facts are of KAI's own documents: docs/gpu-sharing/README.md, and the constants that its binder reads.
"""

from collections.abc import Iterator, Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

from cotenant.cli.migrate.systems import Ask, Json, Note, Options, System
from cotenant.contract.request import MAX_GPUS
from cotenant.contract.units import MIB, format_bytes

FRACTION, MEMORY = "gpu-fraction", "gpu-memory"
_COUNT, _CONTAINER, _PERCENT = "gpu-fraction-num-devices", "gpu-fraction-container-name", "gpu-sm-percentage"
# What KAI reads of a pod besides, and nothing here does.
_NOT_KEPT = (f"{FRACTION}.limit", f"{MEMORY}.limit", "gpu-sm-cores", "mps")
_BY_CONTAINER = ("nvidia.com/container.", "kai.scheduler/container.")
_QUEUE = "kai.scheduler/queue"
_LONGEST = 20
_ALL_PERCENT = 100

KAI = System(
    "KAI",
    (),
    scheduler="kai-scheduler",
    annotations=(FRACTION, MEMORY, _COUNT, _CONTAINER, _PERCENT, *_NOT_KEPT),
)


def is_kais(annotations: Mapping[str, str]) -> bool:
    """Tell whether a pod with these annotations asks KAI for a part of a GPU."""
    return FRACTION in annotations or MEMORY in annotations or any(key.startswith(_BY_CONTAINER) for key in annotations)


def ask_of(annotations: Mapping[str, str], spec: Json, options: Options) -> tuple[tuple[Json, Ask] | None, list[Note]]:
    """Say which container asks what in our words; None, with why, where that cannot be said."""
    container, first = _container(annotations.get(_CONTAINER, ""), spec)
    count = _number(annotations.get(_COUNT, "1"), MAX_GPUS)
    objection = _objection(annotations, container, 0 if count > 1 and first else count)
    if container is None or objection:
        return None, [Note(objection)]
    each, notes = _each(annotations, options)
    if not each:
        return None, notes
    percent = _number(annotations.get(_PERCENT, ""), _ALL_PERCENT)
    if percent:
        notes.append(Note(f"{percent} percent of a GPU's cores: kept as a wish, enforced on GPUs under MPS only"))
    elif _PERCENT in annotations:
        notes.append(Note(f"{_PERCENT}: {annotations[_PERCENT][:60]} is not kept: it is no whole number up to 100"))
    notes += [
        Note(f"{key}: {annotations[key][:60]} is not kept: see isolation") for key in _NOT_KEPT if key in annotations
    ]
    return (container, Ask(each * count, gpus=count, percent=percent or None)), notes


def _objection(annotations: Mapping[str, str], container: Json | None, count: int) -> str:
    """Say why what a pod asks for *container* cannot be said in our words; "" where it can, but for the amount."""
    if any(key.startswith(_BY_CONTAINER) for key in annotations):
        return "annotations of single containers (gpu-memory.request, ...) are not read: ask by hand"
    if FRACTION in annotations and MEMORY in annotations:
        return f"{FRACTION} and {MEMORY} in one pod: leave out one of them"
    if container is None:
        return f"{_CONTAINER}: {annotations.get(_CONTAINER, '')[:60]!r} is none of the pod's containers"
    if "nvidia.com/gpu" in _named(container):
        return f"container {container.get('name')} asks nvidia.com/gpu beside a part of one: take it out"
    return "" if count else f"{_COUNT}: {annotations.get(_COUNT, '')[:60]!r} cannot be had here"


def queue(labels: Mapping[str, Any]) -> Iterator[Note]:
    """Say of a pod's queue that it is not kept; the label stays, since selectors may name it."""
    if _QUEUE in labels:
        yield Note(f"queue {labels[_QUEUE]} is not kept: limits of namespaces hold teams to their part")


def _each(annotations: Mapping[str, str], options: Options) -> tuple[int, list[Note]]:
    """Count the units of each GPU; 0, with why, where they cannot be counted."""
    unit = options.unit_bytes
    if MEMORY in annotations:
        amount = _number(annotations[MEMORY], 1 << 40) * MIB
        each = -(-amount // unit)
        if not amount:
            return 0, [Note(f"{MEMORY}: {annotations[MEMORY][:60]!r} is no whole number of MiB")]
        said = f"{format_bytes(amount)} a GPU are rounded up to {format_bytes(each * unit)}"
        return each, [Note(said)] if each * unit != amount else []
    text = annotations[FRACTION]
    try:
        fraction = Decimal(text) if len(text) <= _LONGEST else Decimal(0)
    except InvalidOperation:
        fraction = Decimal(0)
    if not (fraction.is_finite() and 0 < fraction <= 1):
        return 0, [Note(f"{FRACTION}: {text[:60]!r} is no number between 0 and 1")]
    if options.gpu_bytes is None:
        return 0, [Note(f"{text} of a GPU's memory: say with --gpu-memory how much that is")]
    amount = int(options.gpu_bytes * fraction)
    each = amount // unit
    if not each:
        return 0, [Note(f"{text} of a GPU's memory is less than one unit; use a smaller unit")]
    # up, two halves of 79 GiB would not be on one GPU any more
    whole, part = format_bytes(options.gpu_bytes), format_bytes(each * unit)
    said = f"{text} of {whole} are rounded down to {part}, so that as many fit"
    return each, [Note(said)] if each * unit != amount else []


def _container(name: str, spec: Json) -> tuple[Json | None, bool]:
    """Find the container that has the GPU, the first unless one is named, and tell whether it is an init container."""
    for key in ("containers", "initContainers"):
        listed = spec.get(key)
        for one in listed if isinstance(listed, list) else ():
            if isinstance(one, dict) and (one.get("name") == name or not name):
                return one, key == "initContainers"
    return None, False


def _named(container: Json) -> set[str]:
    resources = container.get("resources")
    parts = [resources.get(key) for key in ("limits", "requests")] if isinstance(resources, dict) else []
    return {str(name) for part in parts if isinstance(part, dict) for name in part}


def _number(text: str, most: int) -> int:
    """Read a whole number from 1 to *most*; 0 where it is none."""
    good = text.isascii() and text.isdecimal() and len(text) <= _LONGEST
    return int(text) if good and int(text) <= most else 0
