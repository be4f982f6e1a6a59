"""Rows of a node, its GPUs and their MIG instances, as the ledger shows them."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from cotenant.contract.inventory import MIG, MIGInstance
from extender.inspect.rows import UNEXPLAINED, GPURow, Holder, Kept, NodeRow, Slot
from extender.ledger import GPUState, MIGState, NodeView
from extender.placement.partition import free_bytes


def free_of(state: GPUState | MIGState) -> int:
    """Say how many bytes of a GPU can still be given away."""
    return free_bytes(state) if isinstance(state, MIGState) else state.free_bytes


class Having(NamedTuple):
    """Say who has what, by node and UUID.

    *holders* of UUID "" may have it of any GPU of the node; *slots* are instances with who holds them, or, *kept* for
    them, is to; *kept* is memory, of instances too.
    """

    holders: Mapping[tuple[str, str], Sequence[Holder]]
    slots: Mapping[tuple[str, str], Sequence[tuple[MIGInstance, str]]]
    kept_slots: Mapping[tuple[str, str], Sequence[tuple[MIGInstance, str]]]
    kept: Mapping[tuple[str, str], Sequence[Kept]]


def node_row(view: NodeView, having: Having, used: Mapping[str, int]) -> NodeRow:
    """Show a node with its GPUs; *used* are the bytes in use by UUID, as far as that is known."""
    gpus = tuple(_gpu_row(view, state, having, used.get(state.gpu.uuid)) for state in view.states)
    return NodeRow(node=view.name, problem=view.problem, detail=view.detail, gpus=gpus)


def _slot_rows(
    state: MIGState, held: Sequence[tuple[MIGInstance, str]], kept: Sequence[tuple[MIGInstance, str]]
) -> tuple[Slot, ...]:
    """List the instances of a MIG GPU, those that nobody holds too."""
    mig = state.gpu.mig or MIG()
    places = {one.uuid: one for one in mig.instances}
    unwell = {_place(one.place or places.get(one.uuid)): one.detail for one in mig.unhealthy}
    holders: dict[tuple[str, int, int], list[str]] = {_place(one): [] for one in (*state.taken, *state.instances)}
    unexplained = dict.fromkeys(map(_place, mig.unexplained), UNEXPLAINED)
    waited_for = {_place(one): pod for one, pod in kept}
    for one, pod in held:
        holders.setdefault(_place(one), []).append(pod)
    rows = [
        Slot(
            *place,
            pod=", ".join(sorted(set(pods))) or waited_for.get(place, ""),
            shares=state.replicas(place[0]),
            held=len(pods),
            detail=unwell.get(place, "") or ("" if pods or place in waited_for else unexplained.get(place, "")),
            kept=not pods and place in waited_for,
        )
        for place, pods in holders.items()
    ]
    return tuple(sorted(rows, key=lambda row: (row.start, row.size, row.profile, row.pod)))


def _place(one: MIGInstance | None) -> tuple[str, int, int]:
    return ("", 0, 0) if one is None else (one.profile, one.start, one.size)


def _gpu_row(view: NodeView, state: GPUState | MIGState, having: Having, used: int | None) -> GPURow:
    gpu = state.gpu
    key = view.name, gpu.uuid
    held = [*having.holders.get(key, ()), *having.holders.get((view.name, ""), ())]
    instances = having.slots.get(key, ()), having.kept_slots.get(key, ())
    return GPURow(
        index=gpu.index,
        uuid=gpu.uuid,
        model=gpu.model,
        mode=gpu.mode,
        health=gpu.health,
        detail=gpu.detail,
        usable_bytes=gpu.usable_bytes,
        held_bytes=state.held_bytes,
        free_bytes=free_of(state),
        holders=tuple(sorted(held, key=lambda holder: (-holder.bytes, holder.pod))),
        foreign_bytes=gpu.foreign_bytes,
        fenced=gpu.fenced,
        foreign=gpu.foreign.detail if gpu.foreign is not None else "",
        slices=state.geometry.slices if isinstance(state, MIGState) else 0,
        slots=_slot_rows(state, *instances) if isinstance(state, MIGState) else (),
        clients=state.clients if isinstance(state, GPUState) else 0,
        max_clients=gpu.max_clients,
        used_bytes=used,
        kept=tuple(having.kept.get(key, ())),
    )
