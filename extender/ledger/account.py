"""One node's account: what its inventory says, and the sums of what pods hold there."""

from collections import Counter
from collections.abc import Collection, Mapping
from functools import lru_cache
from hashlib import blake2b
from sys import intern
from typing import Self

import msgspec

from cotenant.contract import inventory as inventories
from cotenant.contract.compute import NOTHING, Compute, allocatable
from cotenant.contract.inventory import GPU, MIG, Family, Inventory, Mode
from cotenant.contract.mig import Geometry
from cotenant.contract.mps import Clients
from cotenant.contract.names import Names
from cotenant.contract.reasons import Reason
from cotenant.contract.units import count_of
from extender.ledger.values import GPUState, Hold, MIGSlot, MIGState, Node, NodeView, Stage


class Account(msgspec.Struct):
    """Keep one node's facts and the sums of its holds; not safe to use from many threads."""

    name: str
    inventory: Inventory | None = None
    problem: Reason | None = Reason.UNKNOWN_NODE
    detail: str = ""
    # what inventory and problem were read from: the annotation, as a digest since the texts of 20,000 nodes are 30 MiB,
    # and allocatable
    read_from: tuple[bytes | None, str | int | None, frozenset[str]] | None = None
    compute: Compute = NOTHING
    # the sums of what its pods take of that, ours or not, and how many they are
    cpu_milli: int = 0
    memory_bytes: int = 0
    residents: int = 0
    sizes: Counter[tuple[int, int]] = msgspec.field(default_factory=Counter)
    held: Counter[str] = msgspec.field(default_factory=Counter)
    pods: Counter[str] = msgspec.field(default_factory=Counter)
    alone: Counter[str] = msgspec.field(default_factory=Counter)
    everywhere: Counter[str] = msgspec.field(default_factory=Counter)
    # what MPS serves: containers by GPU, the pods of each user on it, and what may be on any GPU, by pod
    clients: Counter[str] = msgspec.field(default_factory=Counter)
    users: Counter[tuple[str, int]] = msgspec.field(default_factory=Counter)
    everywhere_clients: dict[str, Clients] = msgspec.field(default_factory=dict)
    # the same for MIG: instances held, how many pods hold some of a GPU, and the pods that may hold any
    mig_problem: Reason | None = Reason.UNKNOWN_NODE
    slots: Counter[MIGSlot] = msgspec.field(default_factory=Counter)
    partitioned: Counter[str] = msgspec.field(default_factory=Counter)
    closing: set[str] = msgspec.field(default_factory=set)
    # what is kept for pods that are to come, beside what is held: both together may be more than there is
    promised: Counter[str] = msgspec.field(default_factory=Counter)
    labels: dict[str, str] = msgspec.field(default_factory=dict)
    # the GPUs of gpu-mem as they were shown last, None where all may look otherwise by now, and those that do
    shown: tuple[GPUState, ...] | None = None
    changed: frozenset[str] = frozenset()

    def read(self, node: Node, names: Names, unit_bytes: int, labels: Collection[str] = ()) -> bool:
        """Take over what the API server says of the node, of its labels those named; tell whether that is news.

        Kubelets update their Nodes every few seconds; most updates say nothing new about GPUs.
        """
        annotation = (node.metadata.annotations or {}).get(names.inventory)
        advertised = (node.status.allocatable or {}).get(names.gpu_mem)
        compute = allocatable(node.status.allocatable)
        instances = _advertised_instances(node, names)
        kept = {key: value for key, value in (node.metadata.labels or {}).items() if key in labels}
        digest = (
            None if annotation is None else blake2b(annotation.encode(errors="surrogatepass"), digest_size=16).digest()
        )
        read_from = digest, advertised, instances
        if (self.read_from, self.compute, self.labels) == (read_from, compute, kept):
            return False
        self.compute, self.read_from, self.labels = compute, read_from, kept
        self.shown = None
        self.inventory, problem, self.detail = _inventory(annotation, unit_bytes)
        self.problem = self.mig_problem = problem
        if self.inventory is not None and problem is None:
            gpus = self.inventory.gpus
            # What is not in allocatable the kubelet starts a pod with without asking the plugin
            # (pkg/kubelet/lifecycle/predicate.go, removeMissingExtendedResources). A node whose GPUs are all of other
            # families need not have any gpu-mem.
            by_memory = not gpus or any(gpu.family is Family.MEMORY for gpu in gpus)
            named = any(name.startswith(names.mig_prefix) for name in node.status.allocatable or {})
            lacks_instances = not instances and self.inventory.gives_instances(named=named)
            if lacks_instances:
                self.mig_problem = Reason.NOT_ADVERTISED
            lacking = count_of(advertised) <= 0 if by_memory else lacks_instances
            if lacking:
                self.problem = Reason.NOT_ADVERTISED
        return True

    def gone(self) -> None:
        """Note that the API server has no such node."""
        self.inventory, self.problem, self.read_from, self.shown = None, Reason.UNKNOWN_NODE, None, None
        self.mig_problem = Reason.UNKNOWN_NODE

    @property
    def idle(self) -> bool:
        """Tell whether the node is gone and nothing is held on it, so that nobody needs to remember it."""
        return self.read_from is None and not (self.pods or self.everywhere or self.residents or self.closing)

    def copied(self) -> Self:
        """Give one that can be counted on beside this; what is only ever replaced is the same in both."""
        fields = {name: getattr(self, name) for name in self.__struct_fields__}
        sums = {name: value.copy() for name, value in fields.items() if isinstance(value, (dict, set))}
        return msgspec.structs.replace(self, **sums)

    def settle_in(self, compute: Compute) -> None:
        """Count what a pod takes of the node besides GPUs."""
        self.cpu_milli += compute.cpu_milli
        self.memory_bytes += compute.memory_bytes
        self.residents += 1

    def leave(self, compute: Compute) -> None:
        """Take back what settle_in counted."""
        self.cpu_milli -= compute.cpu_milli
        self.memory_bytes -= compute.memory_bytes
        self.residents -= 1

    def put(self, hold: Hold) -> None:
        """Count what a pod holds."""
        self._note(hold)
        promised = hold.stage is Stage.PROMISED
        if hold.charges and not hold.slots and not promised:
            self.sizes[_size(hold)] += 1
        for uuid, amount in hold.charges.items():
            (self.promised if promised else self.held)[uuid] += amount
            self.pods[uuid] += 1
        if hold.alone and not promised:
            self.alone.update(hold.alone)
        for uuid, clients in hold.clients.items():
            self.clients[uuid] += clients.count
            self.users.update((uuid, user) for user in clients.users)
        if hold.everywhere_clients.count:
            self.everywhere_clients[hold.uid] = hold.everywhere_clients
        if hold.everywhere_bytes:
            self.everywhere[hold.uid] = hold.everywhere_bytes
        if hold.slots:
            self.slots.update(hold.slots)
            self.partitioned.update({slot.uuid for slot in hold.slots})
        if hold.closes_mig:
            self.closing.add(hold.uid)

    def drop(self, hold: Hold) -> None:
        """Take back what put counted."""
        self._note(hold)
        promised = hold.stage is Stage.PROMISED
        for uuid, amount in hold.charges.items():
            (self.promised if promised else self.held)[uuid] -= amount
            self.pods[uuid] -= 1
            if not self.pods[uuid]:
                del self.held[uuid], self.pods[uuid], self.promised[uuid]
        if hold.charges and not hold.slots and not promised:
            self.sizes -= Counter([_size(hold)])
        if not promised:
            self.alone -= Counter(hold.alone)
        for uuid, clients in hold.clients.items():
            self.clients -= Counter({uuid: clients.count})
            self.users -= Counter((uuid, user) for user in clients.users)
        self.everywhere_clients.pop(hold.uid, None)
        self.everywhere.pop(hold.uid, None)
        if hold.slots:
            self.slots -= Counter(hold.slots)
            self.partitioned -= Counter({slot.uuid for slot in hold.slots})
        self.closing.discard(hold.uid)

    def view(self) -> NodeView:
        """Show the node as it is now."""
        gpus = self._states()
        return NodeView(
            name=self.name,
            gpus=gpus,
            healthy=gpus if all(state.healthy for state in gpus) else tuple(s for s in gpus if s.healthy),
            problem=self.problem,
            detail=self.detail,
            compute=self.compute,
            free_compute=Compute(
                cpu_milli=max(0, self.compute.cpu_milli - self.cpu_milli),
                memory_bytes=max(0, self.compute.memory_bytes - self.memory_bytes),
            ),
            sizes=tuple(sorted(self.sizes.items())),
            mig=self._partitioned(),
            mig_problem=self.mig_problem,
            advertised=self.read_from[2] if self.read_from else frozenset(),
            labels=self.labels,
        )

    def _note(self, hold: Hold) -> None:
        """Remember which GPUs look otherwise with *hold* or without it: those charged, or of MPS's and unknown, any."""
        if hold.clients or hold.everywhere_clients.count or hold.everywhere_bytes:
            self.shown = None
        elif self.shown is not None:
            self.changed |= hold.charges.keys()

    def _states(self) -> tuple[GPUState, ...]:
        """Show the GPUs that gpu-mem counts; those that nothing has changed of are as they were: 8 us and not 30."""
        everywhere = self.everywhere.total() if self.everywhere else 0
        users = self._users() if self.users or self.everywhere_clients else {}
        if self.shown is None:
            gpus = [gpu for gpu in (self.inventory.gpus if self.inventory else ()) if gpu.family is Family.MEMORY]
            self.shown = tuple(self._state(gpu, everywhere, users) for gpu in gpus)
        else:
            changed = self.changed
            self.shown = tuple(
                self._state(state.gpu, everywhere, users) if state.gpu.uuid in changed else state
                for state in self.shown
            )
        self.changed = frozenset()
        return self.shown

    def _users(self) -> dict[str, frozenset[int]]:
        """Tell as whom the clients of each MPS daemon run, by its pipe."""
        anywhere = frozenset().union(*(clients.users for clients in self.everywhere_clients.values()))
        found: dict[str, frozenset[int]] = {}
        for gpu in self.inventory.gpus if self.inventory else ():
            if gpu.mode is Mode.MPS:
                here = (user for uuid, user in self.users if uuid == gpu.uuid)
                found[gpu.mps_pipe] = found.get(gpu.mps_pipe, anywhere) | frozenset(here)
        return found

    def _partitioned(self) -> tuple[MIGState, ...]:
        """Show the MIG GPUs; of nodes without any nothing is looked at."""
        found = []
        for gpu in self.inventory.gpus if self.inventory else ():
            if gpu.mode is Mode.MIG:
                mig = gpu.mig or MIG()
                here = [slot.instance for slot in self.slots.elements() if slot.uuid == gpu.uuid]
                # one that is there without a grant may be on its way out, and its place be given to the next pod
                there = [msgspec.structs.replace(one, uuid="") for one in mig.unexplained]
                # where an instance was that met a trouble of the hardware, the next one would
                there += [one.place for one in mig.unhealthy if one.place is not None]
                there = [one for one in dict.fromkeys(there) if one not in here]
                taken = sorted([*here, *there], key=lambda one: (one.start, one.size, one.profile))
                pods = self.pods.get(gpu.uuid, 0)
                found.append(
                    MIGState(
                        gpu=gpu,
                        geometry=_geometry(mig.profiles),
                        taken=tuple(taken),
                        closed=bool(self.closing) or pods > self.partitioned.get(gpu.uuid, 0),
                        held_bytes=self.held.get(gpu.uuid, 0),
                        pods=pods + len(self.closing),
                    )
                )
        return tuple(found)

    def _state(self, gpu: GPU, everywhere_bytes: int, users: Mapping[str, frozenset[int]]) -> GPUState:
        held = self.held.get(gpu.uuid, 0) + everywhere_bytes
        if self.alone and self.alone.get(gpu.uuid, 0):
            held = max(held, gpu.usable_bytes)
        promised = self.promised.get(gpu.uuid, 0)
        state = GPUState(
            gpu=gpu,
            held_bytes=held,
            free_bytes=max(0, gpu.usable_bytes - held - promised - gpu.foreign_bytes),
            pods=self.pods.get(gpu.uuid, 0) + len(self.everywhere),
            promised_bytes=promised,
        )
        if gpu.mode is not Mode.MPS or not users:
            return state
        anywhere = sum(clients.count for clients in self.everywhere_clients.values())
        clients = self.clients.get(gpu.uuid, 0) + anywhere
        return msgspec.structs.replace(state, clients=clients, users=users[gpu.mps_pipe])


# GPUs that are alike share one geometry, and what it remembers.
_geometry = lru_cache(maxsize=256)(Geometry)


def _inventory(annotation: str | None, unit_bytes: int) -> tuple[Inventory | None, Reason | None, str]:
    """Read a node's inventory, and say why the node cannot be used where it cannot."""
    if annotation is None:
        return None, Reason.NO_INVENTORY, ""
    try:
        inventory = inventories.decode(annotation)
    except inventories.InventoryError as error:
        return None, Reason.BAD_INVENTORY, str(error)
    if inventory.unit_bytes != unit_bytes:
        return (
            inventory,
            Reason.UNIT_MISMATCH,
            f"the plugin's unit is {inventory.unit_bytes} bytes, the extender's {unit_bytes}",
        )
    if not inventory.serving:
        return inventory, Reason.PLUGIN_GONE, ""
    return inventory, None, _others(inventory)


def _advertised_instances(node: Node, names: Names) -> frozenset[str]:
    """Name the MIG profiles of which the kubelet has some, as they stand in the resources' names."""
    allocatable = node.status.allocatable or {}
    prefix = names.mig_prefix
    return frozenset(
        intern(name.removeprefix(prefix))
        for name, amount in allocatable.items()
        if name.startswith(prefix) and count_of(amount) > 0
    )


def _others(inventory: Inventory) -> str:
    """Name the GPUs that are given away without the extender, for people who wonder why nothing is placed on them."""
    shared = [str(gpu.index) for gpu in inventory.gpus if gpu.family is Family.REPLICAS]
    return f"GPU {', '.join(shared)}: family {Family.REPLICAS}, not counted by memory" if shared else ""


def _size(hold: Hold) -> tuple[int, int]:
    return len(hold.charges), max(hold.charges.values())
