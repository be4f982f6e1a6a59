"""The fields of a pod that admission reads, and what its containers ask for."""

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from cotenant.contract.environment import MPS_MEMORY, MPS_PIPE, MPS_THREADS, VISIBLE_DEVICES
from cotenant.contract.names import ALIASES_IN_GIB, ALIASES_IN_MIB, Names
from cotenant.contract.pods import Quantity, Resources
from cotenant.contract.units import GIB, MIB

# What one of another product's resource is worth, in bytes.
ALIASES = dict.fromkeys(ALIASES_IN_GIB, GIB) | dict.fromkeys(ALIASES_IN_MIB, MIB)


class PodError(ValueError):
    """Say where an object differs from what the API server would send."""


class EnvironmentVariable(msgspec.Struct, frozen=True, rename="camel"):
    """Hold a variable's name and where its value comes from, if it is not a literal."""

    name: str
    value_from: dict[str, Any] | None = None

    def reads(self, annotation: str) -> bool:
        """Tell whether the value is that of the pod's *annotation*."""
        field = (self.value_from or {}).get("fieldRef")
        return isinstance(field, dict) and field.get("fieldPath") == field_path(annotation)


class Container(msgspec.Struct, frozen=True):
    """Hold what admission reads of a container."""

    name: str
    resources: Resources | None = None
    env: tuple[EnvironmentVariable, ...] | None = None

    def sections(self) -> Iterator[tuple[str, dict[str, Quantity]]]:
        """Give limits and requests by their JSON names, where they are there."""
        for name in ("limits", "requests"):
            amounts = getattr(self.resources, name, None)
            if amounts is not None:
                yield name, amounts

    def asked_names(self, names: Names) -> list[str]:
        """List the names, ours and the aliases, under which GPU memory is asked for; most often none."""
        asked = {name for _, amounts in self.sections() for name in amounts}
        return [name for name in (names.gpu_mem, *ALIASES) if name in asked]

    def asks(self, names: Names) -> bool:
        """Tell whether GPU memory or a MIG instance is asked for."""
        return any(
            name == names.gpu_mem or name in ALIASES or name.startswith(names.mig_prefix)
            for _, amounts in self.sections()
            for name in amounts
        )


class Metadata(msgspec.Struct, frozen=True):
    """Hold a pod's annotations; it may not have a name yet."""

    annotations: dict[str, str] | None = None


class Spec(msgspec.Struct, frozen=True, rename="camel"):
    """Hold where a pod is to run, and its containers."""

    containers: tuple[Container, ...] | None = None
    init_containers: tuple[Container, ...] | None = None
    node_name: str | None = None
    scheduler_name: str | None = None


class Pod(msgspec.Struct, frozen=True):
    """Hold what admission reads of a pod."""

    metadata: Metadata = Metadata()
    spec: Spec = Spec()

    def asking(self, names: Names) -> list[tuple[str, Container]]:
        """List the containers that ask for GPU memory or a MIG instance, each with its JSON pointer in the pod."""
        placed = [
            *((f"/spec/containers/{i}", c) for i, c in enumerate(self.spec.containers or ())),
            *((f"/spec/initContainers/{i}", c) for i, c in enumerate(self.spec.init_containers or ())),
        ]
        return [(pointer, container) for pointer, container in placed if container.asks(names)]


# convert() has looked through the type by this, too, before there are threads (contract/versions.py)
_decoder = msgspec.json.Decoder(Pod)


def read(pod: Mapping[str, Any]) -> Pod:
    """Read a pod's JSON; raises PodError with the path of the first field that has another type than the API's."""
    try:
        return msgspec.convert(pod, Pod)
    except msgspec.ValidationError as error:
        raise PodError(f"the pod cannot be read: {error}; send it as the API server writes it") from error


def field_path(annotation: str) -> str:
    """Write the fieldPath by which a container reads an annotation of its pod."""
    return f"metadata.annotations['{annotation}']"


def environment(container: str, names: Names) -> dict[str, str]:
    """Map each injected variable of *container* to the annotation that it is read from."""
    return {
        VISIBLE_DEVICES: names.visible_devices(container),
        MPS_MEMORY: names.mps_memory(container),
        MPS_THREADS: names.mps_threads(container),
        MPS_PIPE: names.mps_pipe(container),
    }
