"""kube-scheduler and the extender behind it, as far as placing goes: rank all nodes, take the best, bind."""

import time
from collections.abc import Mapping

import numpy as np

from cotenant.contract.request import PodRequest
from cotenant.simulator import cluster
from cotenant.simulator.sampling import Sampler
from extender.ledger import Ledger, Node
from extender.placement.choices import Choices
from extender.placement.learning import WINDOW, Learner
from extender.placement.pooled_ranking import NodeRanking
from extender.placement.ranking import Rankings
from extender.policies.mix import Mix
from extender.policies.table import Bools, Floats, Ints

# More than any trace has different sizes of pods.
_SHAPES = 4096


class Scheduler:
    """Place pods one by one on a ledger of its own.

    *choices* are the policies, a name for one alone; a pod that wishes for another gets that. *ranks* says by name
    which node comes first where a policy holds several for equal: the smaller. *sample* shows the policy only the nodes
    that kube-scheduler would. With *learn* the mix of pods is learned as in production, from the latest *window* pods,
    else *mix* is known from the start and stays.
    """

    def __init__(
        self,
        ledger: Ledger,
        choices: Choices | str,
        *,
        ranks: Mapping[str, int],
        mix: Mix | None,
        sample: bool = False,
        learn: bool = False,
        window: int = WINDOW,
    ) -> None:
        self.ledger = ledger
        self._choices = Choices(choices) if isinstance(choices, str) else choices
        self.rankings = Rankings(ledger, mix, shapes=_SHAPES)
        self.table = self.rankings.table
        self.last_decision = 0.0
        self._ranks = ranks
        self._learner = Learner(ledger, self.rankings, window=window) if learn else None
        self._sample = sample
        self._sampler: Sampler | None = None
        self._rank: Ints = np.zeros(0, np.int64)
        self._epoch = -1

    def place(self, uid: str, asked: PodRequest, among: frozenset[str] | None = None) -> int:
        """Bind a pod where the policy has it best; return the row of the table, -1 where it fits nowhere.

        `last_decision` is then how many seconds the choice took, without the binding. *among* names the nodes that are
        open to the pod, None for all.
        """
        before = time.perf_counter()
        ranking = self._ranking(asked)
        shown = self._shown(ranking, self._able(asked, among), asked)
        row = _cheapest(ranking.costs(), shown, self._rank)
        self.last_decision = time.perf_counter() - before
        if row >= 0:
            name = self.table.names[row]
            cluster.bind(self.ledger, uid, asked, name, ranking.preference(name))
            self.table.refresh()
        return row

    def came(self, uid: str, asked: PodRequest) -> None:
        """Learn of a pod that has come, whether there is a place for it or not."""
        if self._learner is not None and asked.containers:
            self._learner.note(uid, asked)

    def fitting(self, asked: PodRequest, among: frozenset[str] | None = None) -> Bools:
        """Tell which rows could take a pod now, (N,)."""
        return self._ranking(asked).fits() & self._able(asked, among)

    def remove(self, uid: str) -> None:
        """End a pod."""
        self.ledger.pod_gone(uid)
        self.table.refresh()

    def observe(self, node: Node) -> None:
        """Take over a node that came or changed."""
        self.ledger.observe_node(node)
        self.table.refresh()

    def lose(self, node: str) -> None:
        """Take over that a node is gone."""
        self.ledger.node_gone(node)
        self.table.refresh()

    def _ranking(self, asked: PodRequest) -> NodeRanking:
        if asked.profiles:
            raise TypeError("traces ask memory, and no MIG instances")
        if self._learner is not None and self._learner.due:
            self.rankings.mix = Mix.of(self._learner.pods())
        choice = self._choices.of(asked)
        ranking = self.rankings.of(asked, choice.policy, choice.pools)
        if self._epoch != self.table.epoch:
            self._epoch = self.table.epoch
            self._rank = np.full(self.table.shape[0], len(self._ranks))
            for name, row in self.table.rows.items():
                self._rank[row] = self._ranks.get(name, len(self._ranks))
            if self._sample:
                rows = np.array([row for _, row in sorted(self.table.rows.items())])
                self._sampler = Sampler(self.table, rows)
        return ranking

    def _able(self, asked: PodRequest, among: frozenset[str] | None) -> Bools:
        """Tell what kube-scheduler's own filters let through before it asks an extender."""
        table, needs = self.table, asked.compute
        able = (table.cpu_free >= needs.cpu_milli) & (table.memory_free >= needs.memory_bytes)
        if among is None:
            return able
        open_to = np.zeros_like(able)
        open_to[[row for name, row in table.rows.items() if name in among]] = True
        return able & open_to

    def _shown(self, ranking: NodeRanking, able: Bools, asked: PodRequest) -> Bools:
        if self._sampler is None:
            return able
        amount = sum(container.share_bytes for container in asked.containers) * asked.wishes.gpu_count
        return self._sampler.shown(able, ranking.fits(), amount)


def _cheapest(costs: Floats, shown: Bools, rank: Ints) -> int:
    """Find the row of the least cost, the one of the smallest rank where several are equal; -1 where none fits."""
    costs = np.where(shown, costs, np.inf)
    least = costs.min()
    if least == np.inf:
        return -1
    equal = np.flatnonzero(costs == least)
    return int(equal[rank[equal].argmin()])
