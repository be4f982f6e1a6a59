"""Pictures of GPU memory: one strip a GPU, its parts in proportion. Pure functions of text."""

from collections.abc import Callable, Sequence

import msgspec

from cotenant.contract.units import GIB

# index, borders, and "139/139 GiB" to the right
_FRAME = len("  0 ||") + len(" 139/139 GiB")


class Part(msgspec.Struct, frozen=True):
    """Hold what one pod has of a GPU."""

    pod: str
    bytes: int


class GPUPicture(msgspec.Struct, frozen=True):
    """Hold one GPU and who has what of it."""

    index: int
    usable_bytes: int
    parts: tuple[Part, ...]

    @property
    def used_bytes(self) -> int:
        """Add up the parts."""
        return sum(part.bytes for part in self.parts)


class NodePicture(msgspec.Struct, frozen=True):
    """Hold one node and its GPUs, which are of one model."""

    name: str
    model: str
    gpus: tuple[GPUPicture, ...]


class Brush(msgspec.Struct, frozen=True):
    """Say how to draw: *part* paints cells of a pod, *free* those of nobody, *dim* what matters less."""

    part: Callable[[str, int], str]
    free: Callable[[int], str]
    dim: Callable[[str], str]
    border: str


def cells(amounts: Sequence[int], width: int) -> list[int]:
    """Share *width* cells out in proportion to *amounts*; what is not zero gets one, while there are enough."""
    total = sum(amounts)
    if not total:
        return [0 for _ in amounts]
    exact = [amount * width / total for amount in amounts]
    shared = [max(int(share), 1 if share else 0) for share in exact]
    while sum(shared) != width:
        step = 1 if sum(shared) < width else -1
        # who is furthest from its due; nothing that is there vanishes while something larger could give
        candidates = [n for n, share in enumerate(shared) if exact[n] and (step > 0 or share > 1)]
        candidates = candidates or [n for n, share in enumerate(shared) if share]
        best = max(candidates, key=lambda n: (step * (exact[n] - shared[n]), exact[n]))
        shared[best] += step
    return shared


def strip(gpu: GPUPicture, width: int, brush: Brush) -> str:
    """Draw one GPU in *width* columns."""
    free = max(0, gpu.usable_bytes - gpu.used_bytes)
    shares = cells([*(part.bytes for part in gpu.parts), free], width - _FRAME)
    bar = "".join(brush.part(part.pod, share) for part, share in zip(gpu.parts, shares, strict=False))
    figures = f"{gpu.used_bytes / GIB:3.0f}/{gpu.usable_bytes / GIB:.0f} GiB"
    edge = brush.dim(brush.border)
    return f"{gpu.index:>3} {edge}{bar}{brush.free(shares[-1])}{edge} {figures}"


def overview(nodes: Sequence[NodePicture], brush: Brush) -> list[str]:
    """Name all nodes and what GPUs they have, one a line."""
    lines = []
    for node in nodes:
        sizes = sorted({gpu.usable_bytes // GIB for gpu in node.gpus})
        each = f"{', '.join(map(str, sizes))} GiB{' each' if len(node.gpus) > 1 else ''} for pods"
        lines.append(f"  {node.name:<10}  {_gpus(node):<26}  {brush.dim(each)}")
    return lines


def picture(nodes: Sequence[NodePicture], width: int, brush: Brush) -> list[str]:
    """Draw all nodes, a heading each and a strip for each of its GPUs."""
    lines: list[str] = []
    for node in nodes:
        lines.append(f"  {node.name}  {brush.dim(_gpus(node))}")
        lines += [strip(gpu, width, brush) for gpu in node.gpus]
    return lines


def _gpus(node: NodePicture) -> str:
    return f"{len(node.gpus)} x {node.model}" if len(node.gpus) > 1 else node.model
