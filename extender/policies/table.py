"""The ledger as arrays: one row per node, one column per GPU, for policies that weigh thousands of nodes at once."""

from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from cotenant.contract.inventory import GPU, Mode
from cotenant.contract.request import model_wished
from extender.ledger import GPUState, Ledger, NodeView
from extender.policies.mix import PodClass

T = TypeVar("T", str, int)

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]

# Policies count memory in thousandths of the cluster's largest GPU, so that one table prices every size.
MILLI = 1000
_FIRST_ROWS = 64
# So many changes of nodes that nobody asks about are put off at most: what policies know of the whole cluster, such as
# what is scarce, is as old as that.
_MOST_PUT_OFF = 32
# As whom the clients of a GPU's MPS daemon run: no client there, so anybody may come; or several users, so nobody may.
NO_USER = -2
MANY_USERS = -3
_NO_LIMIT = np.iinfo(np.int64).max


class Table:
    """Keep the ledger's nodes as arrays; work is proportional to what changed.

    N rows, G columns: the GPUs of the node with the most. A GPU that nothing may be placed on (unhealthy, or its node
    has a problem) is as if it were not there: all zeros. Rows of nodes that are gone are zeros too, until reused.

    free_bytes, usable_bytes (N, G): int64, what a pod could be given, and what an empty GPU could give.
    free_milli, usable_milli (N, G): int64, the same in thousandths of the largest GPU of the cluster, rounded down.
    empty, mps (N, G): bool, whether no pod holds any of it, and whether MPS shares it.
    mps_user, mps_left (N, G): int64, as whom its clients run, and how many more there may be; for MPS only.
    model (N, G): int64, an index into models, -1 where there is no GPU; node_model (N,): that of the first GPU.
    cpu_free, cpu_total (N,): int64, thousandths of a core; memory_free, memory_total (N,): int64, bytes.
    known (N,): bool, whether the row is a node's.
    kinds (N, G + 1): int64, how many pods hold so many whole GPUs; column 0 counts those that hold parts.

    Not safe to use from many threads.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._seen = 0
        self._spare: list[int] = []
        self._hardware: list[tuple[GPU, ...]] = []
        self._any_mps: list[bool] = []
        self.rows: dict[str, int] = {}
        # the same, close together in memory, and each row's place by name, as of some membership
        self._close: dict[str, int] = {}
        self._by_name: Ints = np.zeros(0, np.int64)
        self._close_at = -1
        self.names: list[str] = []
        self.models: list[str] = []
        # the largest GPU of the cluster, which 1000 milli stand for
        self.largest_bytes = 1
        # the most CPU and the most GPU milli that one node offers, at least 1
        self.most_cpu = 1
        self.most_milli = 1
        # grows whenever nodes or GPUs come or go, so that indices or the worth of a milli may be others
        self.epoch = 0
        # grows whenever a node gets a row or loses it
        self.membership = 0
        # how often rows have changed in all, and how many of these changes there had been when each row last did
        self.version = 0
        # the rows that changed last, as most often only these are asked for
        self.latest: Ints = np.zeros(0, np.int64)
        self._allocate(_FIRST_ROWS, 1)
        self.refresh()

    def _allocate(self, rows: int, gpus: int) -> None:
        """Make larger arrays, and keep what the old ones held."""
        old: dict[str, Any] = self.__dict__.copy() if self.epoch else {}

        def grown(name: str, shape: tuple[int, ...], fill: int = 0, dtype: type = np.int64) -> Any:
            new: npt.NDArray[Any] = np.full(shape, fill, dtype)
            if name in old:
                before = old[name]
                new[tuple(slice(0, n) for n in before.shape)] = before
            return new

        square = (rows, gpus)
        self.free_bytes: Ints = grown("free_bytes", square)
        self.usable_bytes: Ints = grown("usable_bytes", square)
        self.free_milli: Ints = grown("free_milli", square)
        self.usable_milli: Ints = grown("usable_milli", square)
        self.empty: Bools = grown("empty", square, dtype=np.bool_)
        self.mps: Bools = grown("mps", square, dtype=np.bool_)
        self.mps_user: Ints = grown("mps_user", square, fill=NO_USER)
        self.mps_left: Ints = grown("mps_left", square, fill=_NO_LIMIT)
        self.model: Ints = grown("model", square, fill=-1)
        self.node_model: Ints = grown("node_model", (rows,), fill=-1)
        self.kinds: Ints = grown("kinds", (rows, gpus + 1))
        self.cpu_free: Ints = grown("cpu_free", (rows,))
        self.cpu_total: Ints = grown("cpu_total", (rows,))
        self.memory_free: Ints = grown("memory_free", (rows,))
        self.memory_total: Ints = grown("memory_total", (rows,))
        self.known: Bools = grown("known", (rows,), dtype=np.bool_)
        self.changed_at: Ints = grown("changed_at", (rows,))
        # is false throughout, but while one asks whether changes can wait
        self._changed: Bools = np.zeros(rows, np.bool_)
        self.epoch += 1

    @property
    def shape(self) -> tuple[int, int]:
        """Give N and G."""
        rows, gpus = self.free_bytes.shape
        return rows, gpus

    def changed_since(self, version: int) -> Ints:
        """Name the rows that have changed after the table had this version, ascending."""
        return self.latest if version == self.version - 1 else np.flatnonzero(self.changed_at > version)

    def locate(self, names: Sequence[str]) -> Ints:
        """Find the rows of nodes, (B,), -1 for one that is unknown.

        They are looked up in a copy whose names and numbers lie side by side, in the order of the rows, which is nearly
        the order that kube-scheduler asks in: 500 names take 70 us and not 180 where others use the processor's caches
        meanwhile (docs/decisions/0087).
        """
        if self._close_at != self.membership:
            ordered = sorted(self.rows, key=self.rows.__getitem__)
            numbers = [self.rows[name] for name in ordered]
            self._close = dict(zip(_copied(ordered), _copied(numbers), strict=True))
            self._by_name = np.zeros(len(self.names), np.int64)
            self._by_name[[self.rows[name] for name in sorted(ordered)]] = np.arange(len(ordered))
            self._close_at = self.membership
        try:
            return np.fromiter(map(self._close.__getitem__, names), np.int64, len(names))
        except KeyError:
            return np.array([self._close.get(name, -1) for name in names], np.int64)

    def places(self, rows: Ints) -> Ints:
        """Give the place among all nodes by name of each of *rows*, as located last, (B,); of -1 any."""
        return self._by_name[rows] if len(self._by_name) else np.zeros_like(rows)

    def allowed(self, wishes: Sequence[str]) -> Bools:
        """Tell of each model, and in the last place of no model, whether a pod that wishes for *wishes* may have it."""
        return np.array([*(model_wished(model, wishes) for model in self.models), False])

    def allowed_each(self, classes: Sequence[PodClass]) -> Bools:
        """Tell the same for each of several classes of pods, (classes, models + 1)."""
        found = np.zeros((len(classes), len(self.models) + 1), np.bool_)
        for n, pod_class in enumerate(classes):
            found[n] = self.allowed(pod_class.models)
        return found

    def milli(self, amount_bytes: int) -> int:
        """Count thousandths of the largest GPU, rounded up."""
        return -(-amount_bytes * MILLI // self.largest_bytes)

    def refresh(self, asked: Ints | None = None) -> None:
        """Take over what has changed in the ledger, or put that off where it concerns none of the rows *asked* for.

        kube-scheduler asks about a tenth of a large cluster at a time, and rarely about the node that it chose just
        before; and ten nodes are taken over, and weighed, in little more time than one (docs/decisions/0102).
        """
        seen, names = self._ledger.changes(self._seen)
        if names is None:
            names = [*self.rows, *(view.name for view in self._ledger.views())]
        elif not names or (asked is not None and self._can_wait(names, asked)):
            return
        views = {name: self._ledger.view(name) for name in names}
        self._make_room([view for view in views.values() if view is not None])
        self.version += 1
        epoch, written = self.epoch, []
        for name, view in views.items():
            if view is not None:
                written.append(self._row(name))
                self._write(written[-1], view)
            elif name in self.rows:
                written.append(self.rows[name])
                self._remove(name)
        self.latest = np.array(sorted(set(written)), np.int64)
        if self.epoch != epoch:
            self._scale()
        # not before: should any of it fail, nothing is taken for taken over
        self._seen = seen

    @property
    def put_off(self) -> int:
        """Count the changes of nodes that have not been taken over."""
        _, names = self._ledger.changes(self._seen)
        return len(self.names) if names is None else len(names)

    def _can_wait(self, names: list[str], asked: Ints) -> bool:
        if len(names) > _MOST_PUT_OFF:
            return False
        rows = [self.rows.get(name, -1) for name in names]
        if -1 in rows:
            return False
        if len(asked) == 1:  # bind's
            return asked[0] not in rows
        self._changed[rows] = True
        concerned = self._changed[asked].any()
        self._changed[rows] = False
        return not concerned

    def _make_room(self, views: list[NodeView]) -> None:
        rows, gpus = self.shape
        new = sum(view.name not in self.rows for view in views) - len(self._spare)
        most = max((len(view.gpus) for view in views), default=0)
        needed = len(self.names) + max(0, new)
        if needed > rows or most > gpus:
            # rows by half as many again, so that a cluster that grows node by node does not start over each time
            self._allocate(max(needed, rows + rows // 2) if needed > rows else rows, max(most, gpus))

    def _scale(self) -> None:
        """Find the largest GPU and the largest node, and count milli of the former."""
        self.largest_bytes = max(1, int(self.usable_bytes.max()))
        self.free_milli[:] = self.free_bytes * MILLI // self.largest_bytes
        self.usable_milli[:] = self.usable_bytes * MILLI // self.largest_bytes
        self.most_milli = max(1, int(self.usable_milli.sum(axis=1).max()))
        self.most_cpu = max(1, int(self.cpu_total.max()))

    def _row(self, name: str) -> int:
        row = self.rows.get(name)
        if row is None:
            if self._spare:
                row = self._spare.pop()
                self.names[row] = name
            else:
                row = len(self.names)
                self.names.append(name)
                self._hardware.append(())
                self._any_mps.append(False)
            self.rows[name] = row
            self.membership += 1
            self.known[row] = True
        return row

    def _remove(self, name: str) -> None:
        row = self.rows.pop(name)
        self.membership += 1
        self._spare.append(row)
        self.names[row] = ""
        self.known[row] = False
        self._write(row, NodeView(name=name, gpus=(), healthy=(), problem=None))

    def _write(self, row: int, view: NodeView) -> None:
        states = view.gpus if view.problem is None else ()
        hardware = tuple(state.gpu for state in states)
        if hardware != self._hardware[row]:
            self._hardware[row] = hardware
            self._write_hardware(row, hardware)
        count = len(states)
        if count:
            free = [state.free_bytes if state.healthy else 0 for state in states]
            self.free_bytes[row, :count] = free
            self.free_milli[row, :count] = [amount * MILLI // self.largest_bytes for amount in free]
            self.empty[row, :count] = [state.empty and state.healthy for state in states]
            if self._any_mps[row]:
                self.mps_user[row, :count] = [_user(state) for state in states]
                self.mps_left[row, :count] = [_clients_left(state) for state in states]
        cpu_total = view.compute.cpu_milli
        # of a node without GPUs nothing is kept by row, and such nodes come and go with an autoscaler
        if self.cpu_total[row] != cpu_total and (hardware or cpu_total > self.most_cpu):
            self.epoch += 1
        self.cpu_free[row], self.cpu_total[row] = view.free_compute.cpu_milli, cpu_total
        self.memory_free[row], self.memory_total[row] = view.free_compute.memory_bytes, view.compute.memory_bytes
        self.kinds[row] = 0
        # a pod is one of whole GPUs where it holds all of the smallest one that the node has
        whole_bytes = min((gpu.usable_bytes for gpu in hardware), default=0)
        for (gpus, most_bytes), pods in view.sizes:
            self.kinds[row, gpus if most_bytes >= whole_bytes and gpus < self.kinds.shape[1] else 0] += pods
        self.changed_at[row] = self.version

    def _write_hardware(self, row: int, hardware: tuple[GPU, ...]) -> None:
        self.epoch += 1
        for array in (self.free_bytes, self.free_milli, self.usable_bytes, self.usable_milli, self.empty, self.mps):
            array[row] = 0
        self.model[row] = -1
        self._any_mps[row] = any(gpu.mode is Mode.MPS for gpu in hardware)
        for column, gpu in enumerate(hardware):
            if not gpu.is_open:
                continue
            self.usable_bytes[row, column] = gpu.usable_bytes
            self.mps[row, column] = gpu.mode is Mode.MPS
            if gpu.model not in self.models:
                self.models.append(gpu.model)
            self.model[row, column] = self.models.index(gpu.model)
        known = self.model[row][self.model[row] >= 0]
        self.node_model[row] = known[0] if known.size else -1


def _copied(values: list[T]) -> list[T]:
    copied: list[T] = msgspec.json.decode(msgspec.json.encode(values))
    return copied


def _user(state: GPUState) -> int:
    if len(state.users) > 1:
        return MANY_USERS
    return next(iter(state.users), NO_USER)


def _clients_left(state: GPUState) -> int:
    most = state.gpu.max_clients
    return max(0, most - state.clients) if most else int(_NO_LIMIT)
