"""What choosing costs: each policy over all nodes of a cluster, and a round of shadow scoring. No cluster is needed.

As in the extender, a pod was bound since, so that one node is to be weighed anew; pods of that shape have been seen.
"""

import random
import time
from collections.abc import Iterator, Sequence
from typing import Any

from cotenant.contract.request import PodRequest
from cotenant.simulator import cluster
from cotenant.simulator.trace import TraceNode, TracePod
from extender.ledger import Hold, Ledger
from extender.placement.fit import Placement, choosing, place, tightest
from extender.policies import scores
from extender.shadow.live import Shadowing
from extender.verbs.judge import Judge
from extender.verbs.wire import Candidates

POLICIES = ("priced-leftovers", "fgd", "best-fit", "binpack")
SHADOWS = ("fgd", "priced-leftovers", "binpack")
_MODELS = ("A", "B", "C", "D")
_GPUS = 8
_SHAPES = 6
# what comes between two rounds of the shadow, at ten pods a second
_BETWEEN = 50


def measure(nodes: int, bound: int, *, rounds: int) -> dict[str, Any]:
    """Give milliseconds by policy: of ranking all nodes for one pod, and of the shadow's rounds."""
    ledger, asked = _filled(nodes, bound)
    found: dict[str, Any] = {}
    for policy in POLICIES:
        found[f"{policy}: one pod, {nodes} nodes"] = _ranked(ledger, asked, policy, rounds)
    for policy in SHADOWS:
        found[f"shadow of {policy}: a round of {_BETWEEN} pods"] = _shadowed(
            ledger, asked, policy, max(5, rounds // 10)
        )
    return found


def pods() -> list[TracePod]:
    """List pods of 60 sizes, mixed as a real cluster's: parts of a GPU, whole ones, several, some by model."""
    parts = [TracePod(f"part-{n}", 1000 * (1 + n % 8), 1024, 1, 50 + 45 * (n % 20)) for n in range(30)]
    whole = [TracePod(f"whole-{n}", 2000 * (1 + n), 4096, 1, 1000) for n in range(10)]
    several = [TracePod(f"several-{n}", 8000 * (1 + n % 3), 4096, (2, 4, 8)[n % 3], 1000) for n in range(9)]
    typed = [TracePod(f"typed-{n}", 4000, 4096, 1, 100 + 300 * (n % 4), (_MODELS[n % 4],)) for n in range(8)]
    plain = [TracePod(f"plain-{n}", 2000 * (n + 1), 1024, 0, 0) for n in range(3)]
    return parts + whole + several + typed + plain


def _filled(nodes: int, bound: int) -> tuple[Ledger, list[PodRequest]]:
    chance = random.Random(1)
    ledger = cluster.new_ledger(
        [TraceNode(f"node-{n:05}", 128_000, 1 << 20, _GPUS, _MODELS[n % len(_MODELS)]) for n in range(nodes)]
    )
    asked = [cluster.request(pod) for pod in pods()]
    for n in range(bound):
        _bind(ledger, f"first-{n}", chance.choice(asked), f"node-{chance.randrange(nodes):05}")
    return ledger, asked


def _bind(ledger: Ledger, uid: str, request: PodRequest, node: str) -> bool:
    view = ledger.view(node)
    if view is None or not request.containers or not isinstance(place(view, request, tightest), Placement):
        return False
    return isinstance(ledger.assume(uid, uid, node, choosing(request), request.compute), Hold)


def _bindings(ledger: Ledger, asked: Sequence[PodRequest], prefix: str) -> Iterator[tuple[str, PodRequest]]:
    """Bind pods one after the other, each where there is room, without end."""
    chance, names = random.Random(2), [view.name for view in ledger.views()]
    n = 0
    while True:
        n += 1
        request, uid = chance.choice(asked), f"{prefix}-{n}"
        if _bind(ledger, uid, request, chance.choice(names)):
            yield uid, request


def _ranked(ledger: Ledger, asked: Sequence[PodRequest], policy: str, rounds: int) -> dict[str, float]:
    judge = Judge(ledger, cluster.NAMES, cluster.UNIT_BYTES, policy)
    for n in range(2000):
        request = asked[n % len(asked)]
        judge.bound(f"seen-{n}", request)
    judge.learn()
    shapes = [request for request in asked if request.containers][:: max(1, len(asked) // _SHAPES)][:_SHAPES]
    candidates = Candidates([view.name for view in ledger.views()])
    bindings = _bindings(ledger, asked, policy)
    for request in shapes:
        judge.weigh(request, candidates)
    seconds, cpu, gone = [], [], []
    for n in range(rounds):
        gone.append(next(bindings)[0])
        began, before = time.perf_counter(), time.process_time()
        scores(judge.weigh(shapes[n % len(shapes)], candidates).costs)
        seconds.append(time.perf_counter() - began)
        cpu.append(time.process_time() - before)
    for uid in gone:
        ledger.pod_gone(uid)
    return _figures(seconds, cpu)


def _shadowed(ledger: Ledger, asked: Sequence[PodRequest], policy: str, rounds: int) -> dict[str, float]:
    judge = Judge(ledger, cluster.NAMES, cluster.UNIT_BYTES, "priced-leftovers")
    judge.learn()
    shadowing = Shadowing(
        ledger,
        cluster.NAMES,
        cluster.UNIT_BYTES,
        live="priced-leftovers",
        shadow=policy,
        mix=lambda: judge.mix,
    )
    bindings = _bindings(ledger, asked, f"shadow-{policy}")
    shadowing.follow()
    seconds, cpu, gone = [], [], []
    # the first round meets every shape for the first time
    for n in range(rounds + 1):
        for _ in range(_BETWEEN):
            uid, request = next(bindings)
            shadowing.note(uid, request)
            gone.append(uid)
        began, before = time.perf_counter(), time.process_time()
        shadowing.follow()
        if n:
            seconds.append(time.perf_counter() - began)
            cpu.append(time.process_time() - before)
    for uid in gone:
        ledger.pod_gone(uid)
    return _figures(seconds, cpu)


def _figures(seconds: Sequence[float], cpu: Sequence[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        "p50_ms": round(ordered[len(ordered) // 2] * 1e3, 3),
        "p99_ms": round(ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)] * 1e3, 3),
        "max_ms": round(ordered[-1] * 1e3, 3),
        "cpu_ms": round(sum(cpu) / len(cpu) * 1e3, 3),
    }
