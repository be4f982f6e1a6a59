"""The mix of pods that a cluster gets: what policies expect to come next."""

from collections import Counter
from collections.abc import Iterable
from functools import cached_property
from typing import Self

import msgspec

TYPICAL_PERCENT = 95


class PodClass(msgspec.Struct, frozen=True):
    """Name pods that are alike: *gpus* GPUs, *share_milli* thousandths of the largest GPU on each, and CPU.

    *models* are the pod's wishes, empty for any; a pod without GPUs has none of either. One that wants its GPUs *alone*
    takes all of them, however large they are, if nobody else holds anything there.
    """

    cpu_milli: int
    gpus: int
    share_milli: int
    models: tuple[str, ...] = ()
    alone: bool = False

    @property
    def milli(self) -> int:
        """Count all GPU thousandths together."""
        return self.gpus * self.share_milli


class Mix(msgspec.Struct, frozen=True, dict=True):
    """Hold classes of pods and how many of each came, the most frequent first."""

    classes: tuple[PodClass, ...] = ()
    counts: tuple[int, ...] = ()

    @classmethod
    def of(cls, pods: Iterable[PodClass]) -> Self:
        """Count pods."""

        def key(item: tuple[PodClass, int]) -> tuple[int, int, int, int, str, bool]:
            c, count = item
            return count, c.cpu_milli, c.share_milli, c.gpus, "|".join(c.models), c.alone

        counted = sorted(Counter(pods).items(), key=key, reverse=True)
        return cls(classes=tuple(c for c, _ in counted), counts=tuple(count for _, count in counted))

    @cached_property
    def frequencies(self) -> tuple[float, ...]:
        """Say how much of all pods each class is; the sum is 1."""
        total = sum(self.counts)
        return tuple(count / total for count in self.counts)

    @cached_property
    def typical(self) -> tuple[tuple[PodClass, float], ...]:
        """Keep the most frequent classes that are 95 of 100 pods together, with their frequencies among those.

        Divided in the order of the FGD paper's artifact (hkust-adsl/kubernetes-scheduler-simulator, pkg/utils/frag.go,
        GetTypicalPods): its results hang on the last bit.
        """
        total, kept, covered = sum(self.counts), 0, 0
        while covered * 100 < total * TYPICAL_PERCENT:
            covered += self.counts[kept]
            kept += 1
        if kept == len(self.classes):
            return tuple(zip(self.classes, self.frequencies, strict=True))
        return tuple(
            (c, f / (covered / total)) for c, f in zip(self.classes[:kept], self.frequencies[:kept], strict=True)
        )
