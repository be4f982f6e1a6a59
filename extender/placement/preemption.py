"""Whom to evict so that a pod fits: the least that frees GPUs that hold it, not only sums of a node."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import msgspec

# Makes every priority positive, so that of negative ones, too, fewer are less (math.MaxInt32 + 1).
_SHIFT = 1 << 31

Operator = Literal["In", "NotIn", "Exists", "DoesNotExist"]


class Requirement(msgspec.Struct, frozen=True, rename="camel"):
    """Hold one expression of a label selector."""

    key: str
    operator: Operator
    values: tuple[str, ...] | None = None

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Tell whether *labels* meet it (apimachinery/pkg/labels/selector.go, Requirement.Matches)."""
        there, value = self.key in labels, labels.get(self.key, "")
        match self.operator:
            case "In":
                return there and value in (self.values or ())
            case "NotIn":
                return not there or value not in (self.values or ())
            case "Exists":
                return there
            case "DoesNotExist":
                return not there


class Selector(msgspec.Struct, frozen=True, rename="camel"):
    """Hold a label selector; an empty one matches everything, as for the eviction API.

    kube-scheduler's dry run passes budgets with an empty one over, and pods that stand in a budget's disruptedPods, and
    counts a pod under several budgets by what these allow (defaultpreemption, filterPodsWithPDBViolation): to those
    that it protects the verb preempt may add some.
    """

    match_labels: dict[str, str] | None = None
    match_expressions: tuple[Requirement, ...] | None = None

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Tell whether *labels* meet all of it."""
        return all(labels.get(key) == value for key, value in (self.match_labels or {}).items()) and all(
            one.matches(labels) for one in self.match_expressions or ()
        )


class Budget(msgspec.Struct, frozen=True):
    """Hold a disruption budget: which pods of a namespace it is about, and how many of them may go now."""

    namespace: str
    # None matches nothing
    selector: Selector | None
    allowed: int

    def covers(self, pod: "Neighbour") -> bool:
        """Tell whether it is about *pod*; a pod without labels is about none, as for kube-scheduler."""
        return (
            self.selector is not None
            and bool(pod.labels)
            and self.namespace == pod.namespace
            and self.selector.matches(pod.labels)
        )


class Neighbour(msgspec.Struct, frozen=True):
    """Hold a pod of a node, as far as it matters whether it is the one to go."""

    uid: str
    namespace: str
    priority: int
    # RFC 3339, "" for one that has not started
    started: str
    labels: Mapping[str, str]
    # what it holds of all GPUs
    bytes: int = 0


class Victims(msgspec.Struct, frozen=True):
    """Say whom to evict, the most important first, and how many of them against their budgets."""

    pods: tuple[Neighbour, ...]
    violations: int


def victims(
    neighbours: Sequence[Neighbour],
    budgets: Sequence[Budget],
    fits: Callable[[frozenset[str]], bool],
    always: frozenset[str] = frozenset(),
) -> Victims | None:
    """Choose whom to evict of *neighbours*, or None where the pod would not fit without all of them.

    *neighbours* may all be evicted, and those of *always* have to be. *fits* tells whether the pod would fit on the
    node without the pods of those UIDs. None of the chosen could stay.

    As kube-scheduler does (defaultpreemption, SelectVictimsOnNode) all are taken away, and given back one after the
    other where the pod fits all the same: those that a budget protects first, then by priority. Of equal ones those
    come back first that hold least, so that few large ones go rather than many small ones.
    """
    everyone = frozenset(one.uid for one in neighbours)
    if not fits(everyone):
        return None
    protected = _protected(neighbours, budgets)
    gone = everyone
    order = sorted(
        (one for one in neighbours if one.uid not in always),
        key=lambda one: (one.uid not in protected, -one.priority, one.bytes, one.started or "~", one.uid),
    )
    for one in order:
        if fits(gone - {one.uid}):
            gone -= {one.uid}
    chosen = tuple(one for one in sorted(neighbours, key=_importance) if one.uid in gone)
    return Victims(chosen, sum(one.uid in protected for one in chosen))


def least(found: Mapping[str, Victims]) -> str:
    """Choose the node where evicting does the least harm, as kube-scheduler does (pickOneNodeForPreemption).

    The fewest victims against their budgets, then the lowest highest priority, then the lowest sum of priorities, then
    the fewest victims, then those that started last. *found* is not empty, and each has a victim.
    """
    tied = sorted(found)
    for harm in (
        lambda one: one.violations,
        lambda one: max(pod.priority for pod in one.pods),
        lambda one: sum(pod.priority + _SHIFT for pod in one.pods),
        lambda one: len(one.pods),
    ):
        fewest = min(harm(found[node]) for node in tied)
        tied = [node for node in tied if harm(found[node]) == fewest]
    return max(tied, key=lambda node: _started(found[node]))


def _started(victims: Victims) -> str:
    """Say when the first of the most important started; times sort as text, and what has not started comes last."""
    highest = max(one.priority for one in victims.pods)
    return min(one.started or "~" for one in victims.pods if one.priority == highest)


def _importance(one: Neighbour) -> tuple[int, str, str]:
    return -one.priority, one.started or "~", one.uid


def _protected(neighbours: Sequence[Neighbour], budgets: Sequence[Budget]) -> frozenset[str]:
    """Name those whose eviction a budget does not allow, were all evicted, the most important first.

    Under several budgets nobody can be evicted, whatever they allow (pkg/registry/core/pod/storage/eviction.go).
    """
    left = [budget.allowed for budget in budgets]
    found = set()
    for one in sorted(neighbours, key=_importance):
        covering = [n for n, budget in enumerate(budgets) if budget.covers(one)]
        for n in covering:
            left[n] -= 1
        if len(covering) > 1 or any(left[n] < 0 for n in covering):
            found.add(one.uid)
    return frozenset(found)
