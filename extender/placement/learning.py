"""What pods to expect: learned from those of the live cluster, or as the configuration says."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol, TypeVar

from cotenant.contract.configuration import TypicalPod
from cotenant.contract.names import mig_suffix
from cotenant.contract.request import PodRequest
from extender.ledger import Ledger
from extender.placement.ranking import FEWEST_PODS, Rankings, ask
from extender.policies.mix import PodClass
from extender.policies.table import MILLI, Table

V = TypeVar("V")

# How many of the latest pods count, and after how many new ones the mix is taken anew.
WINDOW = 5_000
_STEP = 250


def pod_class(request: PodRequest, table: Table) -> PodClass:
    """Say which pods a request is like."""
    asked, wishes = ask(request, table), request.wishes
    return PodClass(asked.cpu_milli, asked.gpus, asked.share_milli, wishes.models, wishes.isolation.whole_gpu)


class Learning(Protocol):
    """Be what knows of which pods the mix is to be taken."""

    def note(self, uid: str, request: PodRequest) -> None:
        """Take a pod in, once."""

    @property
    def due(self) -> bool:
        """Tell whether the mix should be taken anew."""

    def pods(self) -> list[PodClass]:
        """Give the pods that the mix is to be taken of now."""

    @property
    def asked(self) -> frozenset[str] | None:
        """Name the MIG profiles that pods ask, None for all there are."""


class Pinned:
    """Expect the pods that the configuration names, whatever comes; not safe to use from many threads.

    Classes count in thousandths of the cluster's largest GPU, so the mix is taken anew when that becomes another one.
    """

    def __init__(self, pods: Sequence[TypicalPod], rankings: Rankings) -> None:
        self._pods = pods
        self._rankings = rankings
        self._largest_bytes = -1

    asked = None

    def note(self, uid: str, request: PodRequest) -> None:
        """Learn nothing."""

    @property
    def due(self) -> bool:
        """Tell whether the largest GPU has become another one."""
        return self._rankings.table.largest_bytes != self._largest_bytes

    def pods(self) -> list[PodClass]:
        """Give each kind of pod as often as its weight says, and all of them so often that the mix counts."""
        table = self._rankings.table
        table.refresh()
        self._largest_bytes = table.largest_bytes
        found: list[PodClass] = []
        times = -(-FEWEST_PODS // sum(pod.weight for pod in self._pods))
        for pod in self._pods:
            share = MILLI if pod.alone else min(MILLI, table.milli(pod.memory_bytes))
            of_gpu = (share, pod.models, pod.alone) if pod.gpus else (0, (), False)
            found += [PodClass(pod.cpu_milli, pod.gpus, *of_gpu)] * (pod.weight * times)
        return found


class Learner:
    """Keep the latest pods that asked for GPUs in mind; not safe to use from many threads.

    Those that wait count like those that got some: nobody would keep room for a kind of pod that never got any. After a
    restart, the pods that hold something stand for those that came before.
    """

    def __init__(self, ledger: Ledger, rankings: Rankings, *, window: int = WINDOW) -> None:
        self._ledger = ledger
        self._rankings = rankings
        self._window = window
        self._latest: OrderedDict[str, PodClass] = OrderedDict()
        # of those that ask MIG instances, the profiles
        self._partitioned: OrderedDict[str, frozenset[str]] = OrderedDict()
        self._news = 0
        self._started = False

    def note(self, uid: str, request: PodRequest) -> None:
        """Take a pod in, once."""
        if uid in self._latest or uid in self._partitioned:
            return
        if request.profiles:
            self._add(self._partitioned, uid, frozenset(request.profiles))
            return
        table = self._rankings.table
        found = pod_class(request, table)
        if found.cpu_milli > table.most_cpu:
            return  # it waits for a node that there is not, and others are to be placed as if it never came
        self._add(self._latest, uid, found)

    @property
    def due(self) -> bool:
        """Tell whether so many pods have come since that the mix should be taken anew."""
        return not self._started or self._news >= min(_STEP, 1 + (len(self._latest) + len(self._partitioned)) // 4)

    def pods(self) -> list[PodClass]:
        """Give the pods that the mix is to be taken of now."""
        if not self._started:
            self._started = True
            self._read_holds()
        for waiting in self._ledger.all_waiting():
            if isinstance(waiting.request, PodRequest):
                self.note(waiting.uid, waiting.request)
        self._news = 0
        return list(self._latest.values())

    @property
    def asked(self) -> frozenset[str] | None:
        """Name the MIG profiles that pods ask, None for all there are, as long as too few have come to tell."""
        if len(self._partitioned) < FEWEST_PODS:
            return None
        return frozenset[str]().union(*self._partitioned.values())

    def _read_holds(self) -> None:
        table = self._rankings.table
        table.refresh()
        for hold in self._ledger.holds():
            if hold.slots:
                profiles = frozenset(mig_suffix(one.instance.profile) for one in hold.slots)
                self._add(self._partitioned, hold.uid, profiles)
            elif hold.charges:
                alone = bool(hold.alone)
                share = MILLI if alone else min(MILLI, table.milli(max(hold.charges.values())))
                cpu = self._ledger.takes(hold.uid).cpu_milli
                self._add(self._latest, hold.uid, PodClass(cpu, len(hold.charges), share, alone=alone))

    def _add(self, latest: OrderedDict[str, V], uid: str, what: V) -> None:
        latest[uid] = what
        self._news += 1
        if len(latest) > self._window:
            latest.popitem(last=False)
