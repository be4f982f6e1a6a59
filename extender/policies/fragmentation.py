"""Fragmentation as FGD defines it: the free GPU milli of a node that the next typical pod could not use."""

import numpy as np

from extender.policies.mix import Mix
from extender.policies.table import Bools, Floats, Ints, Table


class Fragmentation:
    """Count the fragmentation of nodes for the typical pods of one mix.

    F = sum over typical pods of their frequency times: all free milli of the node where the pod does not fit (and for
    pods without GPUs), else the free milli of the GPUs that are each too small for it. Sorted into cases and added up
    in the order of the paper's artifact (hkust-adsl/kubernetes-scheduler-simulator, pkg/utils/frag.go): FGD's whole
    scores hang on the last bit.
    """

    def __init__(self, mix: Mix, table: Table) -> None:
        with_gpus = [(c, f) for c, f in mix.typical if c.gpus]
        without = [(c, f) for c, f in mix.typical if not c.gpus]
        self._frequency = np.array([f for _, f in with_gpus])[:, None]
        self._gpus = np.array([c.gpus for c, _ in with_gpus], np.int64)[:, None]
        self._cpu = np.array([c.cpu_milli for c, _ in with_gpus], np.int64)[:, None]
        self._access = table.allowed_each([c for c, _ in with_gpus])
        self._typed = not self._access[:, :-1].all()
        shares = sorted({c.share_milli for c, _ in with_gpus})
        self._shares = np.array(shares, np.int64)[:, None, None]
        self._share = np.array([shares.index(c.share_milli) for c, _ in with_gpus], np.int64)
        self._cpu_only = np.array([c.cpu_milli for c, _ in without], np.int64)[:, None]
        self._cpu_only_frequency = np.array([f for _, f in without])[:, None]

    def of(self, free: Ints, cpu: Ints, model: Ints) -> Floats:
        """Count F of P nodes in milli, (P,): free milli (P, G), free CPU milli (P,), model (P,), -1 for none."""
        count = len(free)
        if count == 1:
            # numpy adds a single column up in another order
            return self.of(np.repeat(free, 2, axis=0), np.repeat(cpu, 2), np.repeat(model, 2))[:1]
        large_enough = free >= self._shares  # (different shares, P, G)
        fitting = large_enough.sum(axis=2)[self._share] >= self._gpus
        total = free.sum(axis=1)
        too_small = (total - (free * large_enough).sum(axis=2))[self._share]
        cpu_fits = cpu >= self._cpu
        lacking = ~fitting
        if self._typed:
            access = self._access[:, model]
            fitting, lacking = fitting & access, lacking & access
        amount = self._frequency * np.where(fitting & cpu_fits, too_small, total)
        elsewhere = _sum(amount, ~access) if self._typed else np.zeros(count)
        lacks_both = _sum(amount, lacking & ~cpu_fits)
        lacks_gpu = _sum(amount, cpu_fits & (fitting | lacking))
        lacks_cpu = _sum(amount, fitting & ~cpu_fits)
        cpu_only, cpu_only_fits = self._cpu_only_frequency * total, cpu >= self._cpu_only
        return (
            lacks_both
            + lacks_gpu
            + lacks_cpu
            + _sum(cpu_only, cpu_only_fits)
            + _sum(cpu_only, ~cpu_only_fits)
            + elsewhere
        )


def _sum(amount: Floats, mask: Bools) -> Floats:
    """Add up over the typical pods one after the other, not in numpy's pairs."""
    together: Floats = np.add.reduce(np.where(mask, amount, 0.0), axis=0)
    return together
