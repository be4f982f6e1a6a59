"""What `cotenant plan` prints for people."""

from collections.abc import Sequence

from cotenant.contract.request import PodRequest
from cotenant.contract.units import GIB, counted, format_bytes
from cotenant.simulator.capacity import Fit, Largest, Needed
from cotenant.simulator.moves import MovePlan
from extender.inspect.tables import plain

_SHOWN_SPOTS = 20


def fit_table(answer: Fit, asked: PodRequest) -> str:
    """Write where a deployment fits."""
    fits = len(answer.spots)
    lines = [f"{fits} of {counted(answer.wanted, 'pod')} of {asked.describe()} fit"]
    lines += [
        f"  {spot.pod:24} {spot.node:32} GPU {', '.join(map(str, spot.gpus))}" for spot in answer.spots[:_SHOWN_SPOTS]
    ]
    if fits > _SHOWN_SPOTS:
        lines.append(f"  ... and {fits - _SHOWN_SPOTS} more: -o json lists all")
    if fits < answer.wanted:
        lines.append(f"the next one fits on none of {counted(sum(answer.reasons.values()), 'node')}:")
        lines += [f"  {count:6} {reason}" for reason, count in answer.reasons.items()]
    return "\n".join(lines)


def largest_table(answer: Sequence[Largest], unit_bytes: int) -> str:
    """Write the largest requests."""
    lines = [f"{'model':32}{'GPUs':>6}{'each':>12}{'gpu-mem':>10}  node"]
    for one in answer:
        units = one.each_bytes // unit_bytes * one.gpus
        lines.append(
            f"{plain(one.model)[:31]:32}{one.gpus:6}{format_bytes(one.each_bytes):>12}{units:10}  {one.node or '-'}"
        )
    return "\n".join(lines)


def moves_table(plan: MovePlan) -> str:
    """Write a plan."""
    lines = []
    if plan.fits is not None:
        ways = "it fits as it is" if not plan.moves else f"it fits after {counted(len(plan.moves), 'move')}"
        lines += [ways if plan.fits else "no moves were found after which it fits", ""]
    elif not plan.moves:
        lines += ["no move brings what it costs", ""]
    for n, move in enumerate(plan.moves, start=1):
        # whoever makes a pod may write anything for its owner
        owner = plain(move.owner) or "no owner"
        whose = f"{move.namespace}/{move.name} ({owner}, priority {move.priority})"
        way = f"{_where(move.node, move.gpus)} -> {_where(move.to_node, move.to_gpus)}"
        frees = f", frees {_gib(move.gain_bytes)}" if move.gain_bytes > 0 else ""
        lines.append(f"{n:3} {whose}, {format_bytes(move.held_bytes)}: {way}{frees}")
    lines += [*([""] if plan.moves else []), f"{'':28}{'before':>16}{'after':>16}"]
    for name, show in _STATE.items():
        before, after = getattr(plan.before, name), getattr(plan.after, name)
        write = str if name == "empty_gpus" else _gib
        lines.append(f"{show:28}{write(before):>16}{write(after):>16}")
    if plan.left:
        lines += ["", "left where they are:"]
        lines += [f"  {count:6} pods: {why}" for why, count in sorted(plan.left.items(), key=lambda item: -item[1])]
    return "\n".join(lines)


def _gib(amount_bytes: int) -> str:
    return f"{amount_bytes / GIB:,.1f} GiB"


def _where(node: str, gpus: tuple[int, ...]) -> str:
    return f"{node} GPU {', '.join(map(str, gpus))}"


_STATE = {
    "free_bytes": "free",
    "fragmented_bytes": "of that, fragmented",
    "empty_gpus": "empty GPUs",
    "largest_bytes": "largest piece of one GPU",
}


def needed_table(answer: Needed, like: str, *, most: int, wait: float) -> str:
    """Write how many nodes are needed."""
    waits = f"no pod waits longer than {wait:g} s" if wait else "every pod is placed at once"
    if answer.impossible:
        first, *more = answer.impossible
        others = f" and {len(more)} more pods" if more else ""
        return f"{first}{others}: even an empty node like {like} is too small, or of another kind than they ask"
    if answer.nodes < 0:
        return f"{most} nodes like {like} are not enough: raise --most"
    short = max((count for count, done in answer.tried.items() if not done), default=0)
    few = f"{short} {'is' if short == 1 else 'are'} too few. " if short else ""
    return (
        f"{counted(answer.nodes, 'node')} like {like}: {waits}; at most {answer.allocation:.2f} % of their GPU memory "
        f"is held\n{few}By sums alone it would be {answer.by_sums}, for {answer.by_what}."
    )
