"""What other systems' words mean: each reads a container or a pod, and says in our words what it can.

The facts are of the systems' own documents: gpushare-scheduler-extender (docs/userguide.md), HAMi (docs/config.md),
Volcano (docs/user-guide/how_to_use_vgpu.md), NVIDIA's device plugin (README, "Shared Access to GPUs").
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec

from cotenant.contract.names import Names
from cotenant.contract.units import GIB, MIB, format_bytes, parse_quantity

Json = dict[str, Any]

OURS = Names()


class Options(msgspec.Struct, frozen=True):
    """Say what manifests do not: our unit, the memory of the GPUs, how many shares NVIDIA's plugin made of one."""

    unit_bytes: int = GIB
    gpu_bytes: int | None = None
    replicas: int | None = None
    # ask for the isolation that the other system enforced
    keep_limits: bool = False


class Ask(msgspec.Struct, frozen=True):
    """Say in our words what one container asked for; *limited* where the other system held it to its memory."""

    units: int
    gpus: int = 1
    percent: int | None = None
    whole: bool = False
    limited: bool = False


class Note(msgspec.Struct, frozen=True):
    """Say what is not kept, or has to be seen to."""

    sentence: str


class System(msgspec.Struct, frozen=True):
    """Name what a system puts into a pod: resources of a container, and what of the pod belongs to it."""

    name: str
    # any of these in a container says that it is this system's
    resources: tuple[str, ...]
    scheduler: str = ""
    node_labels: tuple[str, ...] = ()
    variables: tuple[str, ...] = ()
    annotations: tuple[str, ...] = ()


_OF_HAMI = ("CUDA_DEVICE_MEMORY_LIMIT", "CUDA_DEVICE_SM_LIMIT", "CUDA_TASK_PRIORITY", "GPU_CORE_UTILIZATION_POLICY")

HAMI = System(
    "HAMi",
    ("nvidia.com/gpumem", "nvidia.com/gpumem-percentage", "nvidia.com/gpucores", "nvidia.com/priority"),
    scheduler="hami-scheduler",
    node_labels=("gpu",),
    variables=_OF_HAMI,
)

# as a label of a pod, over how many GPUs its memory is split; as a resource no more than what its node counts
GPU_COUNT = "aliyun.com/gpu-count"

GPUSHARE = System(
    "gpushare",
    ("aliyun.com/gpu-mem", GPU_COUNT, "aliyun.com/gpu-core.percentage"),
    node_labels=("gpushare", "ack.node.gpu.schedule"),
    variables=("ALIYUN_COM_GPU_MEM_",),
)

NVIDIA = System("NVIDIA", ("nvidia.com/gpu", "nvidia.com/gpu.shared"))

SYSTEMS = (
    GPUSHARE,
    System(
        "Volcano",
        (
            *("volcano.sh/vgpu-memory", "volcano.sh/vgpu-number", "volcano.sh/vgpu-cores"),
            *("volcano.sh/vgpu-memory-percentage", "volcano.sh/gpu-memory", "volcano.sh/gpu-number"),
        ),
        scheduler="volcano",
        variables=_OF_HAMI,  # whose library it uses
    ),
    HAMI,
    # last: HAMi's pods ask for nvidia.com/gpu as well
    NVIDIA,
)


# what other schedulers read of a pod, or write to it
_SCHEDULERS = (
    *("hami.io/", "kai.scheduler/", "volcano.sh/", "scheduling.volcano.sh/", "scheduling.k8s.io/group-name"),
    "ALIYUN_COM_",
)

# what of a GPU HAMi's and Volcano's pods want: MIG, and which profile, or a part by their library
_MODES = ("nvidia.com/vgpu-mode", "volcano.sh/vgpu-mode", "nvidia.com/mig-profile-preference")

_ALL = 100  # percent

NAMES = frozenset(name for system in SYSTEMS for name in system.resources)


def ask(system: System, amounts: Mapping[str, Any], options: Options) -> tuple[Ask | None, list[Note]]:
    """Say in our words what a container of *system* asked for; None, with why, where that cannot be said."""
    asked = {name: _whole(value) for name, value in amounts.items() if name in NAMES}
    whole = {name: amount for name, amount in asked.items() if amount is not None}
    if len(whole) < len(asked):
        odd = {name: amounts[name] for name in asked if name not in whole}
        return None, [
            Note(f"{name}: {'null' if amount is None else str(amount)[:60]!r} cannot be read")
            for name, amount in odd.items()
        ]
    read = {"gpushare": _gpushare, "Volcano": _volcano, "HAMi": _hami, "NVIDIA": _nvidia}[system.name]
    found, notes = read(whole, options)
    if found is not None and not found.units:
        return None, [Note(f"{', '.join(whole)}: 0 is nothing to ask for: take it out")]
    return found, notes


def _whole(value: object) -> int | None:
    """Read a number of something; None for what is none."""
    if isinstance(value, bool):  # which is an int to Python, and no amount to Kubernetes
        return None
    try:
        number = parse_quantity(value if isinstance(value, int) else str(value))
    except ValueError:
        return None
    return number if number >= 0 else None


def _units(amount: int, options: Options) -> int:
    return -(-amount // options.unit_bytes)


def _gpushare(amounts: Mapping[str, int], options: Options) -> tuple[Ask | None, list[Note]]:
    units = _units(amounts.get("aliyun.com/gpu-mem", 0) * GIB, options)
    if not units:
        return None, [Note("aliyun.com/gpu-mem is missing or 0")]
    percent = amounts.get("aliyun.com/gpu-core.percentage", 0)
    if percent > _ALL:
        return None, [_too_much(percent)]
    notes = [
        Note("aliyun.com/gpu-mem was read as GiB; if gpushare's plugin ran with --memory-unit=MiB, divide by 1024")
    ]
    if percent:
        notes.append(_cores(percent))
    if amounts.get(GPU_COUNT, 1) > 1:
        notes.append(Note(f"{GPU_COUNT}: {amounts[GPU_COUNT]} is not kept: what a container asked lay on one GPU"))
    return Ask(units, percent=percent or None), notes


def split(asked: Ask, labels: Mapping[str, Any]) -> tuple[Ask | None, list[Note]]:
    """Have what a container asked over as many GPUs as its pod's label says (ACK, GPU sharing on several GPUs)."""
    count = _whole(labels.get(GPU_COUNT, 1))
    if not count or asked.units % count:
        said = f"label {GPU_COUNT}: {str(labels[GPU_COUNT])[:60]!r} does not divide its memory: ask by hand"
        return None, [Note(said)]
    return msgspec.structs.replace(asked, gpus=count), []


def _cores(percent: int) -> Note:
    return Note(f"{percent} percent of a GPU's cores: kept as a wish, enforced on GPUs under MPS only")


def _too_much(percent: int) -> Note:
    return Note(f"{percent} percent of a GPU are more than it has: ask for 1 to {_ALL}")


def _sliced(count: int, amount: int, percentage: int, percent: int, options: Options) -> tuple[Ask | None, list[Note]]:
    """Read *count* virtual GPUs of *amount* bytes, or of a *percentage*; neither is the whole GPU."""
    notes = []
    percentage = 0 if amount else percentage
    if max(percentage, percent) > _ALL:
        return None, [_too_much(max(percentage, percent))]
    if _ALL in {percentage, percent}:  # the GPU for itself: HAMi lets no other pod on it, or none fits
        return Ask(max(1, _units(amount, options)) * count, gpus=count, whole=True), []
    if percentage:
        if options.gpu_bytes is None:
            return None, [Note(f"{percentage} percent of a GPU's memory: say with --gpu-memory how much that is")]
        amount = options.gpu_bytes * percentage // 100
    if not amount:
        return Ask(units=count, gpus=count, whole=True), []
    # a part is rounded down: two halves of 79 GiB would not be on one GPU any more
    each = max(1, amount // options.unit_bytes) if percentage else _units(amount, options)
    given = each * options.unit_bytes
    if given != amount:
        which = "up" if given > amount else "down"
        notes.append(Note(f"{format_bytes(amount)} a GPU are rounded {which} to {format_bytes(given)}"))
    if percent:
        notes.append(_cores(percent))
    return Ask(each * count, gpus=count, percent=percent or None, limited=True), notes


def _volcano(amounts: Mapping[str, int], options: Options) -> tuple[Ask | None, list[Note]]:
    if "volcano.sh/gpu-number" in amounts:
        return Ask(amounts["volcano.sh/gpu-number"], gpus=amounts["volcano.sh/gpu-number"], whole=True), []
    if "volcano.sh/gpu-memory" in amounts:  # Volcano's older GPU sharing, without limits
        return Ask(_units(amounts["volcano.sh/gpu-memory"] * MIB, options)), []
    found, notes = _sliced(
        amounts.get("volcano.sh/vgpu-number", 1),
        amounts.get("volcano.sh/vgpu-memory", 0) * MIB,
        amounts.get("volcano.sh/vgpu-memory-percentage", 0),
        amounts.get("volcano.sh/vgpu-cores", 0),
        options,
    )
    if found is not None and amounts.get("volcano.sh/vgpu-memory"):
        said = (
            "volcano.sh/vgpu-memory was read as MiB; if Volcano's plugin ran with --gpu-memory-factor, multiply by that"
        )
        notes.insert(0, Note(said))
    return found, notes


def _hami(amounts: Mapping[str, int], options: Options) -> tuple[Ask | None, list[Note]]:
    found, notes = _sliced(
        amounts.get("nvidia.com/gpu", 1),
        amounts.get("nvidia.com/gpumem", 0) * MIB,
        amounts.get("nvidia.com/gpumem-percentage", 0),
        amounts.get("nvidia.com/gpucores", 0),
        options,
    )
    if amounts.get("nvidia.com/priority"):
        notes.append(Note("nvidia.com/priority between containers of one GPU is not kept: there is no such thing here"))
    return found, notes


def _nvidia(amounts: Mapping[str, int], options: Options) -> tuple[Ask | None, list[Note]]:
    count = amounts.get("nvidia.com/gpu.shared") or amounts.get("nvidia.com/gpu", 0)
    if options.replicas is None:
        sentence = "nvidia.com/gpu is left as it is: whole GPUs, or shares of unknown size"
        return None, [Note(f"{sentence}; say --replicas, or give NVIDIA's sharing configuration with the pods")]
    if options.gpu_bytes is None:
        return None, [Note(f"one of {options.replicas} shares of a GPU: say with --gpu-memory how much memory it has")]
    each = options.gpu_bytes // options.replicas // options.unit_bytes
    if not each:
        return None, [Note(f"a share of {options.replicas} is less than one unit; use a smaller unit")]
    notes = []
    if count > 1:
        notes.append(Note(f"{count} shares were {count} turns on whatever GPUs came; here they are memory of one GPU"))
    return Ask(each * count), notes


def wishes_hami(annotations: Iterable[str]) -> bool:
    """Tell whether a pod with these annotations is one of HAMi's, though it ask for `nvidia.com/gpu` alone."""
    return any(
        key.startswith(("hami.io/", "nvidia.com/use-gpu", "nvidia.com/nouse-gpu", *_MODES)) for key in annotations
    )


def wishes(annotations: Mapping[str, str]) -> tuple[dict[str, str], set[str], Iterator[Note]]:
    """Turn other systems' annotations into our wishes; also name those that are theirs, and say what is not kept."""
    kept: dict[str, str] = {}
    theirs: set[str] = set()
    notes: list[Note] = []
    for key, value in annotations.items():
        if key in {"nvidia.com/use-gputype", "volcano.sh/vgpu-use-gputype"}:
            # theirs is found anywhere in the model's name
            kept[OURS.gpu_model] = ",".join(f"*{part.strip()}*" for part in value.split(",") if part.strip())
        elif key in {"nvidia.com/use-gpuuuid", "volcano.sh/vgpu-use-gpuuuid"}:
            kept[OURS.gpu_uuid] = value
        elif key in {"hami.io/gpu-scheduler-policy", "hami.io/node-scheduler-policy"}:
            if value in {"binpack", "spread"} and kept.get(OURS.policy, value) == value:
                kept[OURS.policy] = value
            else:
                notes.append(Note(f"{key}: {value} is not kept: one policy chooses node and GPU together"))
        elif key.startswith(("nvidia.com/nouse-", "volcano.sh/vgpu-nouse-")):
            notes.append(Note(f"{key}: {value} is not kept: models and UUIDs can be wished for, not ruled out"))
        elif key.startswith(("nvidia.com/use-gpuindex", "nvidia.com/numa-bind")):
            notes.append(Note(f"{key}: {value} is not kept: GPUs can be wished for by model and UUID"))
        elif key.startswith(_MODES):
            notes.append(Note(f"{key}: {value} is not kept: ask for an isolation, docs/contract.md"))
        elif key.startswith(_SCHEDULERS):
            notes.append(Note(f"{key} is not kept: it is the other scheduler's"))
        else:
            continue
        theirs.add(key)
    return kept, theirs, iter(notes)
