"""Which GPUs an administrator keeps from new pods: reads the node annotation; pure."""

from collections.abc import Collection

import msgspec

_SHOWN = 80


class Cordon(msgspec.Struct, frozen=True):
    """Hold the UUIDs that are cordoned, and what of the annotation cannot be followed, as sentences."""

    uuids: frozenset[str] = frozenset()
    problems: tuple[str, ...] = ()


def read(text: str | None, known: Collection[str]) -> Cordon:
    """Read UUIDs separated by commas, of which this node has the *known* ones.

    A part that is none of them cordons nothing and takes nothing from the others.
    """
    if text is None or not text.strip():
        return Cordon()
    parts = [part.strip() for part in text.split(",")]
    good = frozenset(part for part in parts if part in known)
    problems = [_problem(part) for part in dict.fromkeys(parts) if part not in good]
    return Cordon(good, tuple(problems))


def _problem(part: str) -> str:
    if not part:
        return "a part between two commas is empty"
    shown = part if len(part) <= _SHOWN else f"{part[:_SHOWN]}..."
    if part.isdecimal():
        return f"{shown!r} is an index, which can move: name the GPU by its UUID, as `nvidia-smi -L` shows it"
    return f"{shown!r} is no UUID of a GPU or MIG instance of this node, as `nvidia-smi -L` shows them"
