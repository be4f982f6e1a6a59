"""Priced leftovers: take what leaves the least that nobody will want, and pay for what others will miss."""

import numpy as np

from extender.policies import gpu_level, waste
from extender.policies.mix import Mix, PodClass
from extender.policies.policy import Ask, Policy
from extender.policies.table import MILLI, Bools, Floats, Ints, Table

# Weights of the node's expected waste and of GPU memory that its CPU cannot serve, against the GPUs' expected waste.
_NODE_WEIGHT = 0.2
_STARVED_WEIGHT = 0.5
# What an idle GPU that a pod of several GPUs could miss costs at most, in parts of it, and how fast that rises.
_BLOCK_PRICE = 0.25
_BLOCK_EXPONENT = 1.5
# How fast the price of a model rises that some pods cannot do without.
_MODEL_EXPONENT = 2


class PricedLeftovers(Policy):
    """Price a placement by what it does to three things, all in milli of a GPU.

    - **Waste**: Phi = expected waste of each GPU's leftover + 0.2 x that of the node as a fluid + 0.5 x GPU memory that
      the node's CPU cannot serve. The price is how Phi grows.
    - **Blocks**: idle GPUs that pods of several GPUs could use, for each group of such pods that the same nodes could
      run. Their price is 0.25 x min(1, demand / supply) ^ 1.5.
    - **Models**: memory on a model that some pods insist on, at min(1, demand / supply) ^ 2.

    Demand is the part of all demand, supply the part of all free memory: what is scarcer than it is wanted costs more.
    Read docs/policies.md for why, and how well it does.

    The terms (T) are: Phi; one per group of blocks; one per model, where any pod of the mix insists on one.
    """

    name = "priced-leftovers"
    step = 5.0
    needs_mix = True
    priced = True
    candidates = 2

    def __init__(self, table: Table, mix: Mix) -> None:
        super().__init__(table, mix)
        rows, _ = table.shape
        # (different sizes, milli left): what is wasted of each size of GPU; and which size each GPU is, (N, G)
        sizes, size = np.unique(table.usable_milli, return_inverse=True)
        self._waste = np.zeros((len(sizes), MILLI + 1))
        for n, milli in enumerate(sizes.tolist()):
            self._waste[n, : milli + 1] = waste.of_gpu(mix, milli)
        self._size: Ints = size.reshape(table.usable_milli.shape)
        self._node_waste = waste.of_node(mix, most_milli=table.most_milli, most_cpu=table.most_cpu)
        asking = [(c, f) for c, f in zip(mix.classes, mix.frequencies, strict=True) if c.gpus]
        self._demand = sum(f * c.milli for c, f in asking)
        cpu_asked = sum(f * c.cpu_milli for c, f in asking)
        self._milli_per_cpu = self._demand / cpu_asked if cpu_asked else np.inf
        self._blocks = _Blocks(table, asking, self._demand)
        self._masks, self._mask_demand = _masks(table, asking, self._demand)
        self._potential = np.zeros(rows)
        self._supply = np.zeros((rows, self._blocks.groups))
        self._free = np.zeros(rows, np.int64)
        self._free_by_model = np.zeros(len(table.models) + 1, np.int64)
        self._prices: Floats | None = None

    @classmethod
    def foresee(cls, mix: Mix, *, most_milli: int, most_cpu: int) -> None:
        """Tabulate leftovers: 0.01 s for ten classes of pods, 0.2 s for 400."""
        waste.of_gpu(mix, MILLI)
        waste.of_node(mix, most_milli=most_milli, most_cpu=most_cpu)

    def changed(self, rows: Ints) -> None:
        """Count anew what these nodes waste, how many blocks they have, and so the prices."""
        table = self.table
        free, model = table.free_milli[rows], table.node_model[rows]
        cpu = table.cpu_free[rows]
        self._potential[rows] = self._phi(rows, free, cpu)
        self._supply[rows] = self._blocks.of(self._idle(free, rows), cpu, model)
        total = free.sum(axis=1)
        np.add.at(self._free_by_model, model, total - self._free[rows])
        self._free[rows] = total
        self._prices = None

    def gpus(self, rows: Ints, fits: Bools, ask: Ask) -> Ints:
        """List the GPU in use whose waste grows least, then the first idle one."""
        free = self.table.free_milli[rows]
        idle = (free == self.table.usable_milli[rows]) & fits
        used = fits & ~idle
        size, left = self._size[rows], np.maximum(0, free - ask.share_milli)
        grown = np.where(used, self._waste[size, left] - self._waste[size, free], np.inf)
        best = np.where(used.any(axis=1), grown.argmin(axis=1), -1)
        return np.stack([best, gpu_level.tightest(free, idle)[:, 0]], axis=1)

    def weigh(self, rows: Ints, after: Ints, ask: Ask) -> Floats:
        """Give the growth of Phi, the blocks lost, and the milli asked of the node's model, (P, T)."""
        cpu, model = self.cpu_after(rows, ask), self.table.node_model[rows]
        terms = np.zeros((len(rows), 1 + self._blocks.groups + (len(self.table.models) if len(self._masks) else 0)))
        terms[:, 0] = self._phi(rows, after, cpu) - self._potential[rows]
        blocks = slice(1, 1 + self._blocks.groups)
        terms[:, blocks] = self._supply[rows] - self._blocks.of(self._idle(after, rows), cpu, model)
        if len(self._masks):
            known = np.flatnonzero(model >= 0)
            terms[known, blocks.stop + model[known]] = ask.milli
        return terms

    def prices(self) -> Floats:
        """Give 1, the price of a block of each group, and that of each model, (T,)."""
        if self._prices is None:
            # the last place counts nodes without a GPU
            free = self._free_by_model[:-1].sum()
            blocks = (
                _BLOCK_PRICE
                * np.minimum(1, self._blocks.demand * free / np.maximum(1, self._supply.sum(axis=0))) ** _BLOCK_EXPONENT
            )
            prices = [np.ones(1), blocks]
            if len(self._masks):
                scarce = self._mask_demand * free / np.maximum(1, self._masks @ self._free_by_model[:-1])
                prices.append(np.minimum(1, scarce @ self._masks) ** _MODEL_EXPONENT)
            self._prices = np.concatenate(prices)
        return self._prices

    def _phi(self, rows: Ints, free: Ints, cpu: Ints) -> Floats:
        total = free.sum(axis=1)
        starved = np.maximum(0, total - cpu * self._milli_per_cpu) if np.isfinite(self._milli_per_cpu) else 0
        phi: Floats = (
            self._waste[self._size[rows], free].sum(axis=1)
            + _NODE_WEIGHT * self._node_waste(total, cpu)
            + _STARVED_WEIGHT * starved
        )
        return phi

    def _idle(self, free: Ints, rows: Ints) -> Ints:
        usable = self.table.usable_milli[rows]
        idle: Ints = ((free == usable) & (usable > 0)).sum(axis=1)
        return idle


class _Blocks:
    """Count the idle GPUs that pods of several GPUs could use.

    Classes of such pods are one group where they ask equally many GPUs and the same nodes could run them when empty.
    """

    def __init__(self, table: Table, asking: list[tuple[PodClass, float]], demand: float) -> None:
        several = [(c, f) for c, f in asking if c.gpus > 1]
        gpus = (table.usable_milli > 0).sum(axis=1)
        grouped: dict[tuple[int, bytes], list[int]] = {}
        for n, (c, _) in enumerate(several):
            runs = (gpus >= c.gpus) & (table.cpu_total >= c.cpu_milli) & table.allowed(c.models)[table.node_model]
            grouped.setdefault((c.gpus, runs.tobytes()), []).append(n)
        self.groups = len(grouped)
        self._gpus = np.array([c.gpus for c, _ in several], np.int64)
        self._cpu = np.array([c.cpu_milli for c, _ in several], np.int64)
        self._allowed = table.allowed_each([c for c, _ in several]).T
        # (classes, groups): how much of its group each class is, in milli of an idle GPU
        self._weight = np.zeros((len(several), self.groups))
        # (groups,): how much of all demand each group is
        self.demand = np.zeros(self.groups)
        for group, members in enumerate(grouped.values()):
            together = sum(several[n][1] for n in members)
            for n in members:
                self._weight[n, group] = 1000 * several[n][1] / together
            self.demand[group] = sum(several[n][1] * several[n][0].milli for n in members) / demand

    def of(self, idle: Ints, cpu: Ints, model: Ints) -> Floats:
        """Count the milli of blocks on P nodes for each group, (P, groups)."""
        usable = (idle[:, None] >= self._gpus) & (cpu[:, None] >= self._cpu) & self._allowed[model]
        blocks: Floats = idle[:, None] * (usable @ self._weight)
        return blocks


def _masks(table: Table, asking: list[tuple[PodClass, float]], demand: float) -> tuple[Floats, Floats]:
    """List the different sets of models that pods insist on, (masks, models), and how much of all demand each is."""
    wanted: dict[bytes, float] = {}
    for c, f in asking:
        allowed = table.allowed(c.models)[:-1]
        if not allowed.all():
            wanted[allowed.tobytes()] = wanted.get(allowed.tobytes(), 0.0) + f * c.milli / demand
    masks = np.array([np.frombuffer(mask, np.bool_) for mask in wanted], float).reshape(len(wanted), len(table.models))
    return masks, np.array(list(wanted.values()))
