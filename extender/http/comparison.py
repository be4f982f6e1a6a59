"""The live policy beside its shadow, as the page shows them: what each leaves free, and in pieces."""

import msgspec

from cotenant.contract.units import format_bytes
from extender.http.strip import Part, amount, part
from extender.shadow.placements import Agreement, Comparison, Free


class Leftover(msgspec.Struct, frozen=True):
    """Hold the free memory under one policy as it is drawn; widths are percent of what the freer of the two has."""

    policy: str
    what: str
    usable: Part
    fragmented: Part
    label: str
    largest_bytes: int
    empty_gpus: int


class Compared(msgspec.Struct, frozen=True):
    """Hold the live policy and its shadow as they are shown."""

    sides: tuple[Leftover, Leftover]
    verdict: str
    placed: str


def drawn(told: Comparison | None) -> Compared | None:
    """Draw what shadow scoring tells; None where there is none, or not yet."""
    if told is None:
        return None
    live, shadow = told.live, told.shadow
    whole = max(live.free.free_bytes, shadow.free.free_bytes, 1)
    gain = live.free.fragmented_bytes - shadow.free.fragmented_bytes
    verdict = (
        f"{shadow.policy} would leave {format_bytes(abs(gain))} {'less' if gain > 0 else 'more'} of it in pieces"
        if gain
        else "Both leave as much of it in pieces"
    )
    total = sum(told.agreements.values())
    same = told.agreements[Agreement.SAME_GPUS]
    placed = (
        f"Of {total} pods placed since the extender was started, {shadow.policy} had {same} on the same GPUs, "
        f"{told.agreements[Agreement.SAME_NODE]} on others of the same node, "
        f"{told.agreements[Agreement.OTHER_NODE]} on another node, and no room for "
        f"{told.agreements[Agreement.REFUSED]}; of those, {told.refused} still run."
    )
    sides = (_leftover(live.policy, "live", live.free, whole), _leftover(shadow.policy, "shadow", shadow.free, whole))
    return Compared(sides=sides, verdict=verdict, placed=placed)


def _leftover(policy: str, what: str, free: Free, whole: int) -> Leftover:
    fragmented = min(free.fragmented_bytes, free.free_bytes)
    usable = free.free_bytes - fragmented

    def piece(start: int, size: int, colour: str, what: str) -> Part:
        return part(start, size, whole, colour=colour, title=f"{what}: {amount(size)}", text=amount(size))

    return Leftover(
        policy=policy,
        what=what,
        usable=piece(0, usable, "c2", "of use"),
        fragmented=piece(usable, fragmented, "c1", "in pieces"),
        label=f"{policy} ({what}): {amount(free.free_bytes)} free, of which {amount(fragmented)} lie in pieces",
        largest_bytes=free.largest_bytes,
        empty_gpus=free.empty_gpus,
    )
