"""Policy B beside policy A: the same pods on the same nodes, placed as another policy would have.

The shadow is a ledger of its own. It begins as the real one is; from then on it places every pod that the real one
gains where B has it best, and lets go of those that end. So it shows what B would have made of the traffic, and not
what B thinks of A's placements.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum

import msgspec
import numpy as np

from cotenant.contract import grant as grants
from cotenant.contract import inventory as inventories
from cotenant.contract.compute import Compute
from cotenant.contract.inventory import GPU, Inventory
from cotenant.contract.names import Names
from cotenant.contract.pods import Container, Metadata, Pod, Resources, Spec
from cotenant.contract.request import ContainerRequest, PodRequest, Wishes
from extender.ledger import Hold, Ledger, Node, NodeView
from extender.placement.fit import choosing
from extender.placement.ranking import Rankings
from extender.policies.fragmentation import Fragmentation
from extender.policies.mix import Mix
from extender.policies.table import MILLI, Table


class Agreement(StrEnum):
    """Say how B's place for a pod is to A's."""

    SAME_GPUS = "same-gpus"
    SAME_NODE = "same-node"
    OTHER_NODE = "other-node"
    # B had no room left for it
    REFUSED = "refused"


class Free(msgspec.Struct, frozen=True):
    """Sum up what is free of healthy GPUs: all, what the next typical pod could not use, the largest piece."""

    free_bytes: int
    fragmented_bytes: int
    largest_bytes: int
    empty_gpus: int


class Side(msgspec.Struct, frozen=True):
    """Hold what one policy leaves free."""

    policy: str
    free: Free


class Comparison(msgspec.Struct, frozen=True):
    """Hold both sides at one moment: as it is, as the shadow has it, and how often they agreed so far."""

    live: Side
    shadow: Side
    # pods that run, and that the shadow had no room for
    refused: int
    agreements: Mapping[Agreement, int]


class Shadow:
    """Keep what policy *policy* would have made of the pods; not safe to use from many threads."""

    def __init__(self, names: Names, unit_bytes: int, policy: str) -> None:
        self.policy = policy
        self._names = names
        self._unit_bytes = unit_bytes
        self._ledger = Ledger(names, unit_bytes)
        self._rankings = Rankings(self._ledger)
        # what each node was when it was last looked at, and what of that the shadow's ledger was told
        self._views: dict[str, NodeView] = {}
        self._offers: dict[str, tuple[tuple[GPU, ...], int, int]] = {}
        self._pods: set[str] = set()
        self._refused: set[str] = set()
        self._started = False
        self.agreements: Counter[Agreement] = Counter()

    def follow(
        self,
        views: Sequence[NodeView],
        holds: Sequence[Hold],
        takes: Callable[[str], Compute],
        requests: Mapping[str, PodRequest],
        mix: Mix,
    ) -> None:
        """Take over what the real ledger has come to.

        *takes* gives the CPU and memory of a pod by its UID, and *requests* what pods asked, as far as that is known;
        of others the grant tells nearly as much.
        """
        self._rankings.mix = mix
        # it is offered no GPUs that are cut, so what holds an instance is to it as others' pods are
        holds = [hold for hold in holds if not hold.slots]
        present = {hold.uid for hold in holds}
        for uid in self._pods - present:
            self._ledger.pod_gone(uid)
        self._refused &= present
        self._follow_nodes(views, holds, takes)
        news = [hold for hold in holds if hold.uid not in self._pods and hold.charges]
        for hold in news:
            compute = takes(hold.uid)
            if self._started:
                self._place(hold, requests.get(hold.uid) or _request_of(hold, compute))
            else:
                self._ledger.observe_pod(_bound(hold, compute, self._names))
        self._pods = (self._pods & present) | {hold.uid for hold in news}
        self._started = True

    @property
    def refused(self) -> int:
        """Count the pods that run and that B had no room for."""
        return len(self._refused)

    def free(self) -> Free:
        """Sum up what B would have left free."""
        table = self._rankings.table
        table.refresh()
        return free_of(table, self._rankings.mix)

    def _follow_nodes(self, views: Iterable[NodeView], holds: Iterable[Hold], takes: Callable[[str], Compute]) -> None:
        usable = {view.name: view for view in views if view.problem is None}
        for name in self._views.keys() - usable.keys():
            self._ledger.node_gone(name)
            self._offers.pop(name, None)
        changed = [name for name, view in usable.items() if self._views.get(name) is not view]
        self._views = usable
        ours: dict[str, list[Compute]] = {name: [] for name in changed}
        for hold in holds:
            if hold.node in ours:
                ours[hold.node].append(takes(hold.uid))
        for name in changed:
            offer = _offer(usable[name], ours[name])
            if self._offers.get(name) != offer:
                self._offers[name] = offer
                self._ledger.observe_node(self._node(name, *offer))

    def _node(self, name: str, gpus: tuple[GPU, ...], cpu_milli: int, memory_bytes: int) -> Node:
        inventory = Inventory(generation=0, unit_bytes=self._unit_bytes, gpus=gpus)
        # it is advertised, or the node would have a problem
        offered: dict[str, str | int] = {"cpu": f"{cpu_milli}m", "memory": memory_bytes, self._names.gpu_mem: 1}
        return Node(
            metadata=Node.Metadata(name=name, annotations={self._names.inventory: inventories.encode(inventory)}),
            status=Node.Status(allocatable=offered),
        )

    def _place(self, hold: Hold, asked: PodRequest) -> None:
        ranking = self._rankings.of(asked, self.policy)
        table, needs = self._rankings.table, asked.compute
        able = (table.cpu_free >= needs.cpu_milli) & (table.memory_free >= needs.memory_bytes)
        costs = np.where(able, ranking.costs(), np.inf)
        if not np.isfinite(costs.min()):
            self._refused.add(hold.uid)
            self.agreements[Agreement.REFUSED] += 1
            return
        # the first by name of those that are equal, as filter has it where it decides
        row = min(np.flatnonzero(costs == costs.min()).tolist(), key=table.names.__getitem__)
        node = table.names[row]
        prefer = ranking.preference(node)
        found = self._ledger.assume(hold.uid, hold.key, node, choosing(asked, prefer), needs)
        if not isinstance(found, Hold):
            self._refused.add(hold.uid)
            self.agreements[Agreement.REFUSED] += 1
            return
        self._ledger.confirm(hold.uid)
        if node != hold.node:
            self.agreements[Agreement.OTHER_NODE] += 1
        else:
            same = found.charges.keys() == hold.charges.keys()
            self.agreements[Agreement.SAME_GPUS if same else Agreement.SAME_NODE] += 1


def _offer(view: NodeView, ours: Iterable[Compute]) -> tuple[tuple[GPU, ...], int, int]:
    """Say what a node offers to pods of ours: its GPUs, and the CPU and memory that the others leave."""
    cpu, memory = view.free_compute.cpu_milli, view.free_compute.memory_bytes
    for compute in ours:
        cpu, memory = cpu + compute.cpu_milli, memory + compute.memory_bytes
    return tuple(state.gpu for state in view.gpus), cpu, memory


def free_of(table: Table, mix: Mix) -> Free:
    """Sum up what is free in a table; fragmentation is FGD's, for the pods of *mix*."""
    fragments = 0.0
    if mix.counts:
        found = Fragmentation(mix, table).of(table.free_milli, table.cpu_free, table.node_model)
        fragments = float(found.sum()) * table.largest_bytes / MILLI
    return Free(
        free_bytes=int(table.free_bytes.sum()),
        fragmented_bytes=int(fragments),
        largest_bytes=int(table.free_bytes.max()),
        empty_gpus=int((table.empty & (table.usable_bytes > 0)).sum()),
    )


def _request_of(hold: Hold, compute: Compute) -> PodRequest:
    """Say what a pod must have asked to get its grant; which models it would have taken is not in there."""
    given = grants.decode(hold.grant)
    first = given.containers[0]
    containers = tuple(
        ContainerRequest(
            name=one.name, role=one.role, units=one.units, share_bytes=min(share.bytes for share in one.gpus)
        )
        for one in given.containers
    )
    wishes = Wishes(gpu_count=len(first.gpus), isolation=first.isolation.asked, threads=first.threads)
    return PodRequest(containers=containers, wishes=wishes, compute=compute)


def _bound(hold: Hold, compute: Compute, names: Names) -> Pod:
    namespace, _, name = hold.key.partition("/")
    asked: dict[str, str | int] = {"cpu": f"{compute.cpu_milli}m", "memory": compute.memory_bytes}
    return Pod(
        metadata=Metadata(name=name, namespace=namespace, uid=hold.uid, annotations={names.grant: hold.grant}),
        spec=Spec(containers=(Container(name="main"),), node_name=hold.node, resources=Resources(requests=asked)),
    )
