"""What the ledger has to say to Prometheus, as text: made anew for what has changed since the last scrape, and no more.

A cluster of 5,000 nodes with 8 GPUs has some 200,000 samples. prometheus_client takes seconds to write them, in which
kube-scheduler's filter would wait; so each node's lines are kept until the node changes.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import starmap

import msgspec
import numpy as np
import numpy.typing as npt

from cotenant.contract.inventory import MIG, Mode
from extender.ledger import GPUState, Hold, Ledger, MIGState, NodeView, Stage
from extender.placement.partition import free_slices

# Of every GPU, by name: what it says, and how the ledger knows.
_OF_GPUS = {
    "cotenant_gpu_memory_capacity_bytes": "What pods may be given of a GPU.",
    "cotenant_gpu_memory_allocated_bytes": "What pods hold of a GPU.",
    "cotenant_gpu_health": "1 where new pods may be placed on a GPU.",
    "cotenant_gpu_pods": "Pods that hold something of a GPU.",
}
# Of GPUs that are shared in one of these ways alone: under MPS, and cut by MIG.
_OF_SOME = {
    "cotenant_gpu_mps_clients": "Containers that the MPS daemon serves on a GPU.",
    "cotenant_gpu_mps_clients_limit": "How many the MPS daemon of a GPU may serve.",
    "cotenant_mig_instances": "MIG instances of a GPU by profile: held by pods, or unheld, there for nobody.",
    "cotenant_mig_slices_free": "Memory slices of a MIG GPU that a pod could be given.",
}
_LARGEST = "cotenant_node_largest_free_block_bytes"
_OF_PODS = "cotenant_pod_gpu_memory_bytes"


class _NodeLines:
    """Keep what is said of one node as it was seen."""

    __slots__ = ("free", "largest", "lines", "sizes", "some", "sums", "view")

    def __init__(self, view: NodeView, *, per_gpu: bool) -> None:
        self.view = view
        open_gpus = view.healthy if view.problem is None else ()
        self.free = tuple(state.free_bytes for state in open_gpus)
        self.sizes = view.sizes
        # by model and mode: GPUs, those that are open, their capacity, and what is held
        self.sums: dict[tuple[str, str], list[int]] = {}
        for state in view.states:
            total = self.sums.setdefault((state.gpu.model, str(state.gpu.mode)), [0, 0, 0, 0])
            total[0] += 1
            total[1] += state.healthy and view.problem_of(state) is None
            total[2] += state.gpu.usable_bytes
            total[3] += state.held_bytes
        self.largest = self._largest() if view.gpus else ""
        self.lines = tuple(map("".join, zip(*self._gpus(), strict=True))) if per_gpu and self.sums else ()
        self.some: dict[str, str] = {}
        for name, labels, value in self._some() if per_gpu else ():
            self.some[name] = self.some.get(name, "") + f"{name}{{{labels}}} {value:g}\n"

    def _largest(self) -> str:
        return f'{_LARGEST}{{node="{_escaped(self.view.name)}"}} {max(self.free, default=0)}\n'

    def _gpus(self) -> Iterator[tuple[str, ...]]:
        for state in self.view.states:
            labels = _labels(self.view.name, state)
            model = f'{labels},model="{_escaped(state.gpu.model)}",mode="{state.gpu.mode}"'
            well = int(state.healthy and self.view.problem_of(state) is None)
            yield (
                f"cotenant_gpu_memory_capacity_bytes{{{model}}} {state.gpu.usable_bytes}\n",
                f"cotenant_gpu_memory_allocated_bytes{{{labels}}} {state.held_bytes}\n",
                f"cotenant_gpu_health{{{labels}}} {well}\n",
                f"cotenant_gpu_pods{{{labels}}} {state.pods}\n",
            )

    def _some(self) -> Iterator[tuple[str, str, float]]:
        for state in self.view.states:
            labels = _labels(self.view.name, state)
            if isinstance(state, MIGState):
                yield "cotenant_mig_slices_free", labels, free_slices(state)
                for (profile, how), count in sorted(_instances(state).items()):
                    yield "cotenant_mig_instances", f'{labels},profile="{_escaped(profile)}",state="{how}"', count
            elif state.gpu.mode is Mode.MPS:
                yield "cotenant_gpu_mps_clients", labels, state.clients
                if state.gpu.max_clients:
                    yield "cotenant_gpu_mps_clients_limit", labels, state.gpu.max_clients


class LedgerSamples:
    """Write the ledger's samples; not safe to use from many threads."""

    def __init__(self, ledger: Ledger, *, per_gpu: bool) -> None:
        """Prepare; *per_gpu* asks for samples of every GPU and pod, else there are sums and nodes alone."""
        self._ledger = ledger
        self._per_gpu = per_gpu
        self._nodes: dict[str, _NodeLines] = {}
        self._pods: dict[str, tuple[Hold, str]] = {}

    def write(self) -> Iterator[bytes]:
        """Yield one metric after the other, in Prometheus' text format."""
        holds = self._ledger.holds()
        self._look(self._ledger.views())
        nodes = self._nodes.values()
        yield from self._sums()
        yield _family("cotenant_nodes", "GPU nodes, by why nothing can be placed on them; none is no problem.")
        problems = Counter(node.view.problem for node in nodes if node.sums or node.view.problem != "NoInventory")
        yield "".join(
            f'cotenant_nodes{{problem="{problem or "none"}"}} {count}\n' for problem, count in problems.items()
        ).encode()
        yield _family(
            "cotenant_fragmentation_ratio",
            "Share of the free memory that lies in pieces too small for pods of the sizes that run.",
        )
        yield f"cotenant_fragmentation_ratio {_fragmentation(nodes):.6g}\n".encode()
        yield _family(_LARGEST, "The largest piece of one GPU that a pod could be given on a node.")
        yield "".join(node.largest for node in nodes).encode()
        if self._per_gpu:
            for n, (name, meaning) in enumerate(_OF_GPUS.items()):
                yield _family(name, meaning)
                yield "".join(node.lines[n] for node in nodes if node.lines).encode()
            for name, meaning in _OF_SOME.items():
                yield _family(name, meaning)
                yield "".join(node.some.get(name, "") for node in nodes if node.some).encode()
            yield from self._assumed(holds)
            yield _family(_OF_PODS, "What a pod holds of a GPU, whose UUID other exporters know as well.")
            yield "".join(self._pod_lines(holds)).encode()

    def _look(self, views: Iterable[NodeView]) -> None:
        before, self._nodes = self._nodes, {}
        for view in views:
            known = before.get(view.name)
            # a node that changed has another view, and one that did not has the same
            fresh = known if known is not None and known.view is view else _NodeLines(view, per_gpu=self._per_gpu)
            self._nodes[view.name] = fresh

    def _sums(self) -> Iterator[bytes]:
        sums: dict[tuple[str, str], list[int]] = {}
        for node in self._nodes.values():
            for key, values in node.sums.items():
                total = sums.setdefault(key, [0, 0, 0, 0])
                for n, value in enumerate(values):
                    total[n] += value
        meanings = ("GPUs.", "GPUs that new pods may be placed on.", "What pods may be given.", "What pods hold.")
        names = ("gpus", "gpus_open", "memory_capacity_bytes", "memory_allocated_bytes")
        for n, (name, meaning) in enumerate(zip(names, meanings, strict=True)):
            yield _family(f"cotenant_cluster_{name}", f"{meaning[:-1]}, by model and mode.")
            lines = (
                f'cotenant_cluster_{name}{{model="{_escaped(model)}",mode="{mode}"}} {values[n]}\n'
                for (model, mode), values in sums.items()
            )
            yield "".join(lines).encode()

    def _assumed(self, holds: Iterable[Hold]) -> Iterator[bytes]:
        assumed: Counter[tuple[str, str]] = Counter()
        for hold in holds:
            if hold.stage is Stage.ASSUMED:
                assumed.update({(hold.node, uuid): amount for uuid, amount in hold.charges.items()})
        yield _family("cotenant_gpu_memory_assumed_bytes", "Of what pods hold, what is not known to be bound yet.")
        line = 'cotenant_gpu_memory_assumed_bytes{{node="{}",uuid="{}"}} {}\n'.format
        rows = ((_escaped(node), _escaped(uuid), amount) for (node, uuid), amount in assumed.items())
        yield "".join(starmap(line, rows)).encode()

    def _pod_lines(self, holds: Iterable[Hold]) -> Iterator[str]:
        before, self._pods = self._pods, {}
        for hold in holds:
            known = before.get(hold.uid)
            text = known[1] if known is not None and known[0] is hold else _pod_line(hold)
            self._pods[hold.uid] = hold, text
            yield text


def _instances(state: MIGState) -> Counter[tuple[str, str]]:
    """Count the instances of a MIG GPU by profile, those that pods hold and the others; one in shares is one."""
    mig = state.gpu.mig or MIG()
    there = {msgspec.structs.replace(one, uuid="") for one in (*mig.instances, *mig.unexplained)}
    # where one is unwell nobody is, though the place is taken
    nobodys = {msgspec.structs.replace(one, uuid="") for one in mig.unexplained}
    nobodys |= {one.place for one in mig.unhealthy if one.place is not None}
    held = set(state.taken) - nobodys
    return Counter((one.profile, "held" if one in held else "unheld") for one in held | there)


def _pod_line(hold: Hold) -> str:
    namespace, _, name = hold.key.partition("/")
    labels = f'namespace="{_escaped(namespace)}",pod="{_escaped(name)}",node="{_escaped(hold.node)}"'
    return "".join(
        f'{_OF_PODS}{{{labels},uuid="{_escaped(uuid)}"}} {amount}\n' for uuid, amount in hold.charges.items()
    )


def _labels(node: str, state: GPUState | MIGState) -> str:
    return f'node="{_escaped(node)}",gpu="{state.gpu.index}",uuid="{_escaped(state.gpu.uuid)}"'


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n") if not value.isalnum() else value


def _family(name: str, meaning: str) -> bytes:
    return f"# HELP {name} {meaning}\n# TYPE {name} gauge\n".encode()


def _fragmentation(nodes: Iterable[_NodeLines]) -> float:
    """Weigh the pieces that are too small by how many pods have each size: FGD's measure, of memory alone (ATC'23)."""
    pieces: list[int] = []
    sizes: Counter[int] = Counter()
    for node in nodes:
        pieces += node.free
        for (_, largest), count in node.sizes:
            sizes[largest] += count
    free: npt.NDArray[np.float64] = np.sort(np.array(pieces, np.float64))
    total = free.sum()
    if not sizes or not total:
        return 0.0
    below = np.concatenate(([0.0], np.cumsum(free)))
    wanted = np.array(list(sizes), np.float64)
    lost = below[np.searchsorted(free, wanted, side="left")]
    return float((lost * np.array(list(sizes.values()))).sum() / (total * sizes.total()))
