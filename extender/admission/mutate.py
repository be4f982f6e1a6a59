"""What is added to a pod that asks for GPU memory or MIG instances before it is stored."""

from collections.abc import Iterator, Mapping
from typing import Any

from cotenant.contract.pods import Quantity
from cotenant.contract.units import parse_quantity
from extender.admission.pod import ALIASES, Container, environment, field_path, read
from extender.admission.settings import Settings

Operation = dict[str, Any]

# In an alias's own units: beyond any GPU, and 2**30 GiB still fits the 64-bit integers that the policies count in.
_MOST = 1 << 30


def mutate(pod: Mapping[str, Any], settings: Settings) -> list[Operation]:
    """Make the JSON patch (RFC 6902) that readies *pod* to be placed: none for a pod that asks nothing of ours.

    It names our scheduler where the pod names none, adds the managed resource, rewrites aliases, rounded up to whole
    units, and reads the environment from the annotations of the Binding. A patched pod gets an empty patch. What it
    does not understand it leaves for `validate` to refuse: nothing the user wrote is dropped without a word.

    Raises PodError for JSON that is no pod.
    """
    known = read(pod)
    asking = known.asking(settings.names)
    operations: list[Operation] = []
    if asking and settings.scheduler and (known.spec.scheduler_name or "default-scheduler") == "default-scheduler":
        operations.append({"op": "add", "path": "/spec/schedulerName", "value": settings.scheduler})
    for pointer, container in asking:
        operations += _resources(pointer, container, settings)
        operations += _environment(pointer, container, settings)
    return operations


def _resources(pointer: str, container: Container, settings: Settings) -> Iterator[Operation]:
    names = settings.names
    asked = container.asked_names(names)
    for section, amounts in container.sections():

        def at(name: str, section: str = section) -> str:
            return f"{pointer}/resources/{section}/{name.replace('~', '~0').replace('/', '~1')}"

        if amounts.get(names.managed) != "0":
            yield {"op": "add", "path": at(names.managed), "value": "0"}
        # Asked under two names it is not ours to choose, nor to add up.
        if len(asked) != 1 or asked[0] not in ALIASES or asked[0] not in amounts:
            continue
        units = _units(asked[0], amounts[asked[0]], settings.unit_bytes)
        if units is not None:
            yield {"op": "remove", "path": at(asked[0])}
            yield {"op": "add", "path": at(names.gpu_mem), "value": str(units)}


def _units(alias: str, amount: Quantity, unit_bytes: int) -> int | None:
    """Convert an alias's amount to units, rounded up; None when no GPU could have it."""
    try:
        count = parse_quantity(amount)
    except ValueError:
        return None
    return -(-count * ALIASES[alias] // unit_bytes) if 0 <= count <= _MOST else None


def _environment(pointer: str, container: Container, settings: Settings) -> Iterator[Operation]:
    if not container.env:
        yield {"op": "add", "path": f"{pointer}/env", "value": []}
    # Put first, so that the user's own variables can refer to ours as $(NVIDIA_VISIBLE_DEVICES): the kubelet expands
    # only what stands before. Last first, as each is put before all others.
    for variable, annotation in reversed(environment(container.name, settings.names).items()):
        if any(own.name == variable and own.reads(annotation) for own in container.env or ()):
            continue
        source = {"fieldRef": {"apiVersion": "v1", "fieldPath": field_path(annotation)}}
        yield {"op": "add", "path": f"{pointer}/env/0", "value": {"name": variable, "valueFrom": source}}
