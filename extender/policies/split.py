"""Two policies for one pod: one chooses the node, the other which of its GPUs."""

import numpy as np

from extender.policies.mix import Mix
from extender.policies.policy import Ask, Policy
from extender.policies.table import Bools, Floats, Ints, Table


class Split(Policy):
    """Weigh nodes by one policy, after another has chosen the GPU on each."""

    node_level: type[Policy]
    gpu_level: type[Policy]

    def __init__(self, table: Table, mix: Mix) -> None:
        super().__init__(table, mix)
        self._node = self.node_level(table, mix)
        self._gpu = self.gpu_level(table, mix)

    @classmethod
    def of(cls, node: type[Policy], gpu: type[Policy]) -> type[Policy]:
        """Make the policy that is *node* for nodes and *gpu* for the GPUs of one."""
        name = f"{node.name}/{gpu.name}"
        levels = {"node_level": node, "gpu_level": gpu, "name": name, "step": node.step, "priced": node.priced}
        return type(name, (cls,), levels | {"needs_mix": node.needs_mix or gpu.needs_mix})

    @classmethod
    def foresee(cls, mix: Mix, *, most_milli: int, most_cpu: int) -> None:
        """Have both make what hangs on the mix alone."""
        for level in (cls.node_level, cls.gpu_level):
            level.foresee(mix, most_milli=most_milli, most_cpu=most_cpu)

    def changed(self, rows: Ints) -> None:
        """Tell both."""
        self._node.changed(rows)
        self._gpu.changed(rows)

    def gpus(self, rows: Ints, fits: Bools, ask: Ask) -> Ints:
        """Name the one GPU of each node that its policy has for the best, by the first term of what it costs.

        The other terms have prices that change with the whole cluster, and belong to the choice of the node.
        """
        named = self._gpu.gpus(rows, fits, ask)
        row, k = np.nonzero(named >= 0)
        after = self.table.free_milli[rows[row]]
        after[np.arange(len(row)), named[row, k]] -= ask.share_milli
        costs = np.full(named.shape, np.inf)
        costs[row, k] = self._gpu.weigh(rows[row], np.maximum(0, after), ask)[:, 0]
        best: Ints = named[np.arange(len(rows)), costs.argmin(axis=1)][:, None]
        return best

    def weigh(self, rows: Ints, after: Ints, ask: Ask) -> Floats:
        """Weigh as the node's policy does."""
        return self._node.weigh(rows, after, ask)

    def prices(self) -> Floats:
        """Give the prices of the node's policy."""
        return self._node.prices()
