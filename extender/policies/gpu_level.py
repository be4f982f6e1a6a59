"""Which GPUs of a node are worth weighing for a pod that takes one of them.

Each function is given *free* (B, G), a free amount per GPU, and *fits* (B, G), which of them could take the pod, and
gives (B, K) columns in order of preference, -1 for none.
"""

import numpy as np

from extender.policies.table import Bools, Ints

_NEVER = np.iinfo(np.int64).max


def tightest(free: Ints, fits: Bools) -> Ints:
    """Choose the one that has the least free, the first of equals."""
    return _first(np.where(fits, free, _NEVER).argmin(axis=1), fits)


def emptiest(free: Ints, fits: Bools) -> Ints:
    """Choose the one that has the most free, the first of equals."""
    return _first(np.where(fits, free, -1).argmax(axis=1), fits)


def every_different(free: Ints, fits: Bools) -> Ints:
    """List one of each free amount, the first of equals, by column."""
    columns = fits.shape[1]
    earlier = np.tri(columns, k=-1, dtype=np.bool_)
    repeated = ((free[:, :, None] == free[:, None, :]) & fits[:, None, :] & earlier).any(axis=2)
    return np.where(fits & ~repeated, np.arange(columns), -1)


def _first(column: Ints, fits: Bools) -> Ints:
    return np.where(fits.any(axis=1), column, -1)[:, None]
