"""What a leftover is worth: expected waste of one GPU's, and of a whole node's, if pods of the mix keep coming."""

from functools import lru_cache

import numpy as np

from extender.policies.mix import Mix
from extender.policies.table import MILLI, Floats, Ints

# How many pods that take part of a GPU a leftover is offered, on average, before the cluster is full; and the least
# part of all pods that these are taken to be, so that the table stays finite where there are none.
SHARE_OFFERS = 36
_FEWEST_SHARES = 0.05
# How many pods a node as a whole is offered, and how finely its table is made.
NODE_OFFERS = 16
GPU_GRID = 50
CPU_GRID = 500
# 512 cores; whatever is left beyond them counts as these. Virtual nodes claim 10,000: a table of that takes seconds.
_MOST_CPU_STEPS = 1024


# Nodes come and go more often than the mix changes: a policy that is made anew finds its tables again.
@lru_cache(maxsize=32)
def of_gpu(mix: Mix, size: int = MILLI) -> Floats:
    """Tabulate the milli expected to be wasted of a leftover of a GPU of *size*, (size + 1,), by what is left of it.

    The leftover is offered pods of the mix one after the other, and takes one that asks one GPU only where that lowers
    what is wasted in the end. One that wants its GPU alone takes the whole of it, and nothing less.
    """
    frequency: dict[int, float] = {}
    alone = 0.0
    for pod_class, part in zip(mix.classes, mix.frequencies, strict=True):
        if pod_class.gpus == 1 and pod_class.alone:
            alone += part
        elif pod_class.gpus == 1:
            share = min(MILLI, pod_class.share_milli)
            frequency[share] = frequency.get(share, 0.0) + part
    left = np.arange(size + 1)
    waste: Floats = left.astype(float)
    if not frequency and not alone:
        return waste
    shares, parts = np.array(list(frequency), np.int64), np.array(list(frequency.values()))
    offers = round(SHARE_OFFERS / max(_FEWEST_SHARES, parts[shares < MILLI].sum()))
    rest = left - shares[:, None]
    fits = rest >= 0
    rest = np.maximum(rest, 0)
    for _ in range(offers):
        best = np.where(fits, np.minimum(waste, waste[rest]), waste)
        following: Floats = parts @ best + (1 - parts.sum()) * waste
        if alone:
            # the empty GPU is wasted no more
            following[size] -= alone * waste[size]
        waste = following
    return waste


@lru_cache(maxsize=4)
def of_node(mix: Mix, *, most_milli: int, most_cpu: int) -> "OfNode":
    """Tabulate what is expected to be left of a node of at most so much GPU and CPU."""
    return OfNode(mix, most_milli=most_milli, most_cpu=most_cpu)


class OfNode:
    """Tabulate the milli expected to be left of a node whose GPUs are taken to be one fluid, by GPU and CPU left."""

    def __init__(self, mix: Mix, *, most_milli: int, most_cpu: int) -> None:
        gpu_steps, cpu_steps = -(-most_milli // GPU_GRID), min(_MOST_CPU_STEPS, -(-most_cpu // CPU_GRID))
        sizes: dict[tuple[int, int], float] = {}
        for pod_class, part in zip(mix.classes, mix.frequencies, strict=True):
            size = (pod_class.milli + GPU_GRID // 2) // GPU_GRID, -(-pod_class.cpu_milli // CPU_GRID)
            sizes[size] = sizes.get(size, 0.0) + part
        left = np.repeat(np.arange(gpu_steps + 1.0)[:, None] * GPU_GRID, cpu_steps + 1, axis=1)
        for _ in range(NODE_OFFERS):
            following = left.copy()
            for (gpu, cpu), part in sizes.items():
                if gpu <= gpu_steps and cpu <= cpu_steps:
                    # those that fit leave what a smaller node leaves, the others what they would have left anyway
                    smaller = left[: gpu_steps + 1 - gpu, : cpu_steps + 1 - cpu]
                    following[gpu:, cpu:] += part * (smaller - left[gpu:, cpu:])
            left = following
        self._left = left

    def __call__(self, milli: Ints, cpu_milli: Ints) -> Floats:
        """Look nodes up, (P,): GPU milli and CPU milli left of each."""
        gpu_steps, cpu_steps = self._left.shape
        found: Floats = self._left[
            np.minimum(milli // GPU_GRID, gpu_steps - 1), np.minimum(cpu_milli // CPU_GRID, cpu_steps - 1)
        ]
        return found
