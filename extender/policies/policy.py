"""The interface of every policy: what it is given, what it answers, in which shapes and units."""

from abc import ABC, abstractmethod
from typing import ClassVar

import msgspec
import numpy as np

from extender.policies import gpu_level
from extender.policies.mix import Mix
from extender.policies.table import Bools, Floats, Ints, Table


class Ask(msgspec.Struct, frozen=True):
    """Say what one pod asks for in a policy's terms; *milli* are thousandths of the cluster's largest GPU."""

    gpus: int
    share_milli: int
    cpu_milli: int

    @property
    def milli(self) -> int:
        """Count all GPU thousandths together."""
        return self.gpus * self.share_milli


class Policy(ABC):
    """Rank placements that are all feasible; made for one table and one mix, and asked pod by pod.

    A policy sees no pods and no nodes, only rows of the table before and after; it changes nothing but what it keeps
    for itself. What `weigh` says of a placement must depend on that row of the table alone, since it is remembered
    until the row changes; whatever depends on the whole cluster goes into `prices`, which are asked for each pod.
    """

    name: ClassVar[str]
    # Costs are rounded to whole steps before they are compared; 0 compares them as they are.
    step: ClassVar[float] = 0.0
    # True where it weighs what pods are to come, and knows nothing without any
    needs_mix: ClassVar[bool] = False
    # True where prices() differs from one, or the GPU may depend on it
    priced: ClassVar[bool] = False
    # how many GPUs of a node gpus() names at most, where it is priced
    candidates: ClassVar[int] = 1

    def __init__(self, table: Table, mix: Mix) -> None:
        self.table = table
        self.mix = mix

    @classmethod  # noqa: B027 (most tabulate nothing)
    def foresee(cls, mix: Mix, *, most_milli: int, most_cpu: int) -> None:
        """Make what hangs on the mix and the largest node alone, for whoever is made next; may take long.

        Called from another thread than everything else, while policies of another mix are in use: what is found must be
        kept by a cache that many threads may use.
        """

    def changed(self, rows: Ints) -> None:  # noqa: B027 (most keep nothing)
        """Take over that these rows of the table changed; called first with all of them, in one call or several."""

    def gpus(self, rows: Ints, fits: Bools, ask: Ask) -> Ints:  # noqa: ARG002
        """Name the GPUs worth weighing for a pod that takes one; the first of equal costs is taken.

        *rows* (B,), *fits* (B, G): which GPUs could take it. Returns (B, K): columns of the table, -1 for none.
        """
        return gpu_level.tightest(self.table.free_milli[rows], fits)

    @abstractmethod
    def weigh(self, rows: Ints, after: Ints, ask: Ask) -> Floats:
        """Price P placements: the lower, the better.

        *rows* (P,), one may stand there more than once; *after* (P, G): the GPUs' free milli if the pod were placed so.
        Returns (P, T): T terms of the cost, of which `prices` says what each is worth.
        """

    def prices(self) -> Floats:
        """Say what each term is worth just now, (T,); the first is always worth one."""
        return np.ones(1)

    # --- what several policies want to know ---

    def cpu_after(self, rows: Ints, ask: Ask) -> Ints:
        """Count the CPU left free on each row if the pod were placed there, (P,), never negative."""
        return np.maximum(0, self.table.cpu_free[rows] - ask.cpu_milli)
