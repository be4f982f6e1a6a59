"""Histories of whole extenders, drawn by a seed: pods, nodes and GPUs come and go, and everything fails that may.

A kube-scheduler of sorts asks, binds and preempts meanwhile, in every other history at two extenders that elect the
writer, each behind a wire of its own which stands still now and then, as a process does that is suspended. Every
Binding is judged as the API server takes it. In the end nothing fails any more, and the extender that binds has to
know what one does that was told nothing but what the API server has.

COTENANT_HISTORIES says how many, COTENANT_SEED which is the first; `make histories` runs a hundred. Threads go as they
will: a seed may have to be run a few times until it fails again.
"""

import contextlib
import os
import random
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import msgspec
import pytest

from cotenant.contract import grant as grants
from cotenant.contract.configuration import NamespaceLimits
from cotenant.contract.inventory import MIGInstance, Mode
from cotenant.contract.mig import overlap
from cotenant.contract.pods import Pod
from cotenant.contract.request import RequestError, parse
from cotenant.contract.units import GIB
from cotenant.standins.api_rules import LEASES, NODES, PODS, Refused
from cotenant.standins.api_server import ApiServer
from cotenant.standins.api_store import Selection, event_line
from extender.ledger import Ledger, Node
from extender.placement.fit import Placement, place
from extender.placement.tenants import Tenants
from tests.builders import NAMES, Json, NodeBuilder, a_node, a_pod
from tests.cluster.wire import Wire
from tests.extender.running import PATIENCE, Running, add, eventually

if TYPE_CHECKING:
    from collections.abc import Callable

SEED = int(os.environ.get("COTENANT_SEED", "0"))
COUNT = int(os.environ.get("COTENANT_HISTORIES", "0"))
SEEDS = range(SEED, SEED + (COUNT or 2))
STEPS = 150 if COUNT else 40
NAMES_OF_NODES = ("n1", "n2", "n3")
BINDING, WATCH, LIST = r"/binding", r"watch=1", r"resourceVersion=&"
ENDED = {"Succeeded", "Failed"}
LIMITS = {"default": {}, "limited": {"gpuMemory": "20GiB", "gpus": 3}}
MOST = {"bytes": 20 * GIB, "gpus": 3}
TENANTS = Tenants(msgspec.convert(LIMITS, dict[str, NamespaceLimits]), NAMES)
ELECTION = {
    "layout": "attached",
    "writer": {
        "lease": "cotenant-system/writer",
        "settle": 0.01,
        "leaseDuration": 1.0,
        "renewDeadline": 0.8,
        "retryPeriod": 0.05,
    },
}
PREEMPTION = {"preemptFragmented": {"after": 0.05, "holdFor": 0.5, "perMinute": 1000}}
MAX_CLIENTS, SHARES, SHARED = 3, 2, "MIG-3g.20gb@4"


class Replica:
    """Be one extender behind a wire of its own, which may be killed, and comes again."""

    def __init__(self, api: ApiServer, directory: Path, configuration: Json, pool: ThreadPoolExecutor) -> None:
        self._api = api
        self._directory = directory
        self._configuration = configuration
        self._pool = pool
        self._ends: list[Future[None]] = []
        directory.mkdir()

    def __enter__(self) -> Self:
        self.wire = Wire(int(self._api.url.rpartition(":")[2])).__enter__()
        self.running = Running(self, self._directory, wait=False, **self._configuration).__enter__()  # type: ignore[arg-type]
        return self

    def __exit__(self, *_: object) -> None:
        self.running.__exit__()
        self.wire.__exit__()
        for end in self._ends:
            end.result()

    def kubeconfig(self, path: Path) -> str:
        """Be an API server to Running."""
        text = Path(self._api.kubeconfig(path)).read_text(encoding="utf-8")
        path.write_text(text.replace(self._api.url, f"http://127.0.0.1:{self.wire.port}"), encoding="utf-8")
        return str(path)

    def restart(self, *, killed: bool) -> None:
        """End it, and have another one begin; of one that is *killed* nothing is heard any more before."""
        if killed:
            self.wire.__exit__()
            self._ends.append(self._pool.submit(self.running.__exit__))
        else:
            self.running.__exit__()
            self.wire.__exit__()
        self.__enter__()


class Cluster:
    """An API server, its extenders, and what may happen to them and to all that is there."""

    def __init__(self, api: ApiServer, rng: random.Random) -> None:
        self.api = api
        self.rng = rng
        self.extenders: list[Replica] = []
        self.kinds = {name: rng.choice(["memory", "memory", "mps", "mig", "static"]) for name in NAMES_OF_NODES}
        self.grows = rng.random() < 0.5
        self.elects = rng.random() < 0.5
        self.evicts = rng.random() < 0.5
        self.wrong: list[str] = []
        self.usable: Counter[str] = Counter()
        self.restore: Callable[[], None] | None = None
        self.risen: set[str] = set()
        self._bind = api.store.bind
        api.store.bind = self.bind  # type: ignore[method-assign]
        add(api, *map(self.a_node, NAMES_OF_NODES))

    @property
    def configuration(self) -> Json:
        return {"namespaces": LIMITS} | (ELECTION if self.elects else {}) | (PREEMPTION if self.evicts else {})

    def a_node(self, name: str) -> NodeBuilder:
        """Have one of its kind with two GPUs, most of the time."""
        rng, node = self.rng, a_node(name)
        size = f"{rng.choice([6, 10, 14]) if self.grows else 10}GiB"
        match self.kinds[name]:
            case "mig":
                node = node.with_mig()
                if rng.random() < 0.3:
                    node = node.with_ill_places(f"1g.5gb@{rng.randint(0, 6)}")
            case "static":
                node = node.with_mig(static=["2g.10gb@0", "1g.5gb@2", "3g.20gb@4"]).with_shares("3g.20gb", SHARES)
            case _:
                node = node.with_gpu(size)
        node = node.with_gpu(size)
        if self.kinds[name] == "mps":
            node = node.under_mps(max_clients=MAX_CLIENTS)
        # the most that each ever had: who binds may not have heard yet that it has less
        self.usable |= Counter({gpu.uuid: gpu.usable_bytes for gpu in node.gpus})
        lost = replace(node, gpus=node.gpus[:1])
        return rng.choice([node, node, node, node.unhealthy(rng.randint(0, 1)), lost])

    # What may happen.

    def step(self) -> None:
        """Do one thing, or have one go wrong."""
        rng, api = self.rng, self.api
        pods = api.pods()
        bound = [pod for pod in pods if is_bound(pod)]
        nodes = [node["metadata"]["name"] for node in api.nodes()]
        extender = rng.choice(self.extenders)
        deeds: list[tuple[int, Callable[[], object]]] = [
            (12, self.create),
            (6, lambda: pods and self.delete(rng.choice(pods), rng.choice([None, 0, 0]))),
            (4, self.end_those_that_are_to),
            (4, lambda: bound and self.set_phase(rng.choice(bound), rng.choice(["Running", "Succeeded", "Failed"]))),
            (3, lambda: nodes and self.change(rng.choice(nodes))),
            (1, lambda: len(nodes) > 1 and api.store.delete(NODES, ("", rng.choice(nodes)))),
            (2, self.bring_back),
            (3, lambda: api.faults.lose_reply(path=BINDING, times=rng.randint(1, 3))),
            (2, lambda: api.faults.lose_request(path=BINDING)),
            (2, lambda: api.faults.refuse(rng.choice([409, 429, 500, 503, 504]), path=BINDING, retry_after=1)),
            (1, lambda: api.faults.delay(rng.uniform(0.2, 1.5), path=BINDING)),
            (1, lambda: api.faults.refuse(rng.choice([410, 429, 500, 503]), path=WATCH)),
            (1, lambda: api.faults.refuse(rng.choice([410, 429, 500]), path=LIST)),
            (1, lambda: api.faults.lose_reply(path=rng.choice([LIST, "/status", "/eviction", "pods/[^/]+$"]))),
            (2, api.cut_watches),
            (1, api.drop_connections),
            (1, api.compact),
            (1, api.send_bookmarks),
            (1, self.say_what_is_no_event),
            (2, self.tell_again),
            (1, self.say_an_old_version),
            (1, lambda: api.freeze_watches(frozen=rng.random() < 0.5)),
            (1, self.restart),
            (1, self.back_up_or_restore),
            # found out after 15 s, which is too long for every day
            (1 if COUNT else 0, extender.wire.vanish),
            (1, lambda: extender.restart(killed=self.elects)),
            (len(self.extenders) - 1, lambda: extender.wire.stall(stalled=rng.random() < 0.5)),
        ]
        with contextlib.suppress(Refused):  # it is there already, or gone
            rng.choices([deed for _, deed in deeds], [weight for weight, _ in deeds])[0]()

    def create(self) -> None:
        """Few names, so that a pod often comes again under one that has just gone."""
        rng = self.rng
        none: dict[str, Any] = {}
        wish = rng.choice([none, none, none, {"isolation": "exclusive"}, {"isolation": "limited"}, {"gpu_count": 2}])
        pod = a_pod().named(rng.choice("abcdefghijkl")).of_priority(rng.choice([0, 0, 100])).wishing(**wish)
        pod = pod.running_as(rng.choice([None, 1000, 1001])).with_container({"cpu": "1"})
        if {"mig", "static"}.isdisjoint(self.kinds.values()) or rng.random() < 0.7:
            pod = pod.asking(2 * rng.randint(1, 4))
        else:
            for _ in range(rng.randint(1, 2)):
                pod = pod.asking(1, of=f"nvidia.com/mig-{rng.choice(['1g.5gb', '2g.10gb', '3g.20gb'])}")
        if rng.random() < 0.05:  # somebody else's, with a grant that is none
            pod = pod.bound_to(rng.choice(NAMES_OF_NODES), rng.choice([None, "{}"]))
        body = pod.as_json()
        body["spec"]["terminationGracePeriodSeconds"] = rng.choice([0, 30])
        del body["metadata"]["uid"], body["metadata"]["namespace"]
        self.api.create(PODS, body, rng.choice([*LIMITS]))

    def delete(self, pod: Json, grace: int | None) -> None:
        self.api.delete_pod(pod["metadata"]["name"], namespace=pod["metadata"]["namespace"], grace=grace)

    def end_those_that_are_to(self) -> None:
        """Be the kubelet of pods that are being deleted."""
        for pod in self.api.pods():
            if pod["metadata"].get("deletionTimestamp"):
                self.delete(pod, 0)

    def set_phase(self, pod: Json, phase: str) -> None:
        name, namespace = pod["metadata"]["name"], pod["metadata"]["namespace"]
        self.api.patch(PODS, name, {"status": {"phase": phase}}, namespace=namespace, subresource="status")

    def change(self, name: str) -> None:
        """Publish another inventory, or none that can be read."""
        node = self.a_node(name)
        node = self.rng.choice([node] * 4 + [node.annotated_as("not json"), node.not_serving(), node.counting_in(1)])
        self.api.patch(NODES, node.name, {"metadata": {"annotations": node.node_annotations}})

    def bring_back(self) -> None:
        for name in NAMES_OF_NODES:
            if self.api.node(name) is None:
                add(self.api, self.a_node(name))

    def say_what_is_no_event(self) -> None:
        """Have the watches say half an object, or what nobody knows."""
        line = next(iter(self.said(1)), b"{}")
        # the stand-in tells it again to a watch from before, which would hear nothing else for half a minute
        self.api.send_bookmarks()
        self.api.say_to_watches(self.rng.choice([b'{"type":"NEW","object":{}}', line[: len(line) // 2]]))

    def said(self, count: int) -> list[bytes]:
        """Give the last lines that watches of pods were told."""
        changes = [one for one in self.api.store._history if one.resource == PODS and one.now][-count:]
        return [line for one in changes if (line := event_line(one, Selection(PODS, "")))]

    def tell_again(self) -> None:
        """Have the watches tell what they told before, from somewhere on, as one that is resumed from too early."""
        with self.api.store.changed:
            for line in self.said(self.rng.randint(1, 20)):
                self.api.store.say(line, PODS)

    def say_an_old_version(self) -> None:
        """Have a bookmark come from the past, and the watch end after it."""
        version = max(1, self.api.store.version - self.rng.randint(0, 30))
        self.api.say_to_watches(b'{"type":"BOOKMARK","object":{"metadata":{"resourceVersion":"%d"}}}' % version)
        self.api.cut_watches()
        # what is said the stand-in tells again to a watch from the past, which must come out of there in the end
        self.api.send_bookmarks()

    def restart(self) -> None:
        self.api.stop()
        self.api.start()

    def back_up_or_restore(self) -> None:
        """Of the GPUs of pods that come back with a backup others may be given some before anybody has heard of it."""
        if self.restore is None:
            self.restore = self.api.back_up()
            return
        with self.api.store.changed:
            before = {pod["metadata"]["uid"] for pod in self.api.pods() if granted(pod)}
            self.restore()
            for pod in self.api.pods():
                grant = granted(pod)
                if grant is not None and pod["metadata"]["uid"] not in before:
                    self.risen |= {pod["metadata"]["namespace"], pod["spec"]["nodeName"], *grant.charges()}
        self.restore = None

    def heal(self) -> None:
        """Have nothing fail any more, and all nodes be there."""
        self.api.faults.clear()
        self.api.freeze_watches(frozen=False)
        for extender in self.extenders:
            extender.wire.stall(stalled=False)
        self.bring_back()

    # What must not happen.

    def bind(self, key: tuple[str, str], binding: Json) -> None:
        """Be the API server's bind: refuse one of another term, as the policy cotenant-writer does, and judge it."""
        api = self.api
        with api.store.changed:
            if self.elects:
                spec = api.store.get(LEASES, ("cotenant-system", "writer")).body["spec"]
                term = f"{spec['holderIdentity']}/{spec['leaseTransitions']}"
                if binding["metadata"]["annotations"][NAMES.writer] != term:
                    raise Refused(403, "Forbidden", "the Binding is of another term than the Lease's")
            self._bind(key, binding)
            self.wrong += [f"{key} on {binding['target']['name']}: too much of {one}" for one in self.given_twice()]

    def given_twice(self) -> list[str]:
        """Say of what the pods that are bound now have more than there is."""
        held, pods, clients = Counter[str](), Counter[str](), Counter[str]()
        alone, users, limited = set[str](), dict[str, set[int]](), Counter[str]()
        cut: dict[str, Counter[MIGInstance]] = {}
        for pod in self.api.pods():
            grant = granted(pod)
            if grant is None:
                continue
            charges = grant.charges()
            held.update(charges)
            pods.update([*charges])
            if pod["metadata"]["namespace"] == "limited":
                limited.update(gpus=grant.gpus, bytes=sum(charges.values()))
            for uuid, one in grant.clients().items():
                clients[uuid] += one.count
                users.setdefault(pod["spec"]["nodeName"], set()).update(one.users)
            for given in grant.containers:
                if given.mode is Mode.EXCLUSIVE:
                    alone |= charges.keys()
                if given.mig is not None:
                    cut.setdefault(given.gpus[0].uuid, Counter())[given.mig.instance] += 1
        over = {
            *(uuid for uuid in held if held[uuid] > self.usable[uuid]),
            *(uuid for uuid in alone if pods[uuid] > 1),
            *(uuid for uuid in clients if clients[uuid] > MAX_CLIENTS),
            *(node for node in users if len(users[node]) > 1),
            *(
                uuid
                for uuid, there in cut.items()
                for one in there
                if there[one] > (SHARES if one.uuid == SHARED else 1)
            ),
            *(uuid for uuid, there in cut.items() if any(overlap(a, b) for a, b in combinations(there, 2))),
            *("limited" for what, amount in limited.items() if amount > MOST[what]),
        }
        return sorted(over - self.risen)


def is_bound(pod: Json) -> bool:
    return bool(pod["spec"].get("nodeName")) and pod["status"].get("phase") not in ENDED


def granted(pod: Json) -> grants.Grant | None:
    """Give what a pod holds."""
    text = pod["metadata"].get("annotations", {}).get(NAMES.grant, "{}")
    return None if not is_bound(pod) or text == "{}" else grants.decode(text)


class Scheduler:
    """Ask and bind as kube-scheduler does, in no order, several pods at once."""

    def __init__(self, cluster: Cluster, pool: ThreadPoolExecutor) -> None:
        self._cluster = cluster
        self._api = cluster.api
        self._rng = random.Random(cluster.rng.random())
        self._pool = pool
        self._under_way: dict[str, Future[None]] = {}

    def turn(self) -> None:
        self._under_way = {uid: one for uid, one in self._under_way.items() if not one.done() or one.result()}
        waiting = [pod for pod in waiting_in(self._api) if pod["metadata"]["uid"] not in self._under_way]
        if waiting and len(self._under_way) < 4:
            pod = self._rng.choice(waiting)
            self._under_way[pod["metadata"]["uid"]] = self._pool.submit(self._attempt, pod)

    def _attempt(self, pod: Json) -> None:
        names = [node["metadata"]["name"] for node in self._api.nodes()]
        extender = self._rng.choice(self._cluster.extenders).running
        # an extender may be killed, and what is to be done to a pod or a node come too late
        with contextlib.suppress(OSError, Refused):
            fitting = extender.filter(pod, *names)["NodeNames"]
            if fitting:
                extender.bind(pod, self._rng.choice(fitting))
            elif fitting is not None and pod["spec"]["priority"] and self._rng.random() < 0.3:
                self._preempt(extender, pod, self._rng.choice(names))

    def _preempt(self, extender: Running, pod: Json, node: str) -> None:
        there = [one for one in self._api.pods() if is_bound(one) and one["spec"]["nodeName"] == node]
        lower = {one["metadata"]["uid"]: one for one in there if not one["spec"]["priority"]}
        proposed = {node: {"Pods": [{"UID": uid} for uid in lower]}}
        answer = extender.post("/preempt", {"Pod": pod, "NodeNameToMetaVictims": proposed})
        if answer.status != 200:  # the API server could not be asked for budgets
            return
        for chosen, victims in answer.json["NodeNameToMetaVictims"].items():
            for one in victims["Pods"]:
                self._cluster.delete(lower[one["UID"]], None)
            told = {"status": {"nominatedNodeName": chosen}}
            name, namespace = pod["metadata"]["name"], pod["metadata"]["namespace"]
            self._api.patch(PODS, name, told, namespace=namespace, subresource="status")


def waiting_in(api: ApiServer) -> list[Json]:
    return [pod for pod in api.pods() if not pod["spec"].get("nodeName") and "deletionTimestamp" not in pod["metadata"]]


def knowing_all(api: ApiServer) -> Ledger:
    """Make a ledger that was told what the API server has, and nothing else ever."""
    ledger = Ledger(NAMES, GIB)
    for node in api.nodes():
        ledger.observe_node(msgspec.convert(node, Node))
    ledger.observe_pods(msgspec.convert(pod, Pod) for pod in api.pods())
    return ledger


def told_apart(extender: Running, api: ApiServer) -> list[str]:
    """Say in what the extender's picture differs from that of one which knows nothing but what the API server has."""
    mine, true = extender.ledger, knowing_all(api)
    pictures: dict[str, Callable[[Ledger], Any]] = {
        "holds": lambda one: {hold.uid: msgspec.structs.replace(hold, since=0) for hold in one.holds()},
        "views": lambda one: {view.name: view for view in one.views()},
        "waiting": lambda one: {waiting.uid: waiting.key for waiting in one.all_waiting()},
        "ungranted": lambda one: one.ungranted(),
        "promises": lambda one: one.promises(),
        "uses": lambda one: one.uses(),
    }
    return [
        f"{name}: {picture(mine)} and not {picture(true)}"
        for name, picture in pictures.items()
        if picture(mine) != picture(true)
    ]


def could_be_bound(api: ApiServer) -> list[str]:
    """Name the pods that wait although there is room for them."""
    ledger = knowing_all(api)
    found = []
    for pod in waiting_in(api):
        namespace = pod["metadata"]["namespace"]
        with contextlib.suppress(RequestError):
            asked = parse(msgspec.convert(pod, Pod), NAMES, GIB)
            assert asked is not None
            request = TENANTS.hold(namespace, asked)
            use = ledger.use_of(namespace)
            if any(
                isinstance(place(view, request), Placement) and TENANTS.excess(namespace, request, use, view) is None
                for view in ledger.views()
            ):
                found.append(f"{namespace}/{pod['metadata']['name']}")
    return found


@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_happens_nothing_is_given_twice_nothing_is_lost_and_every_pod_that_fits_is_bound(
    seed: int, tmp_path: Path
) -> None:
    rng = random.Random(seed)
    with ExitStack() as stack:
        api = stack.enter_context(ApiServer())
        pool = stack.enter_context(ThreadPoolExecutor(16))
        cluster = Cluster(api, rng)
        for name in "ab"[: 1 + cluster.elects]:
            extender = Replica(api, tmp_path / name, cluster.configuration, pool)
            cluster.extenders.append(stack.enter_context(extender))
        scheduler = Scheduler(cluster, pool)
        for _ in range(STEPS):
            cluster.step()
            scheduler.turn()
            api.wait_until(lambda: False, rng.choice([0.0, 0.01, 0.05]))
        cluster.heal()
        assert all(one.running._ready.wait(PATIENCE) for one in cluster.extenders)
        who_binds: list[Running] = []

        def is_well() -> bool:
            cluster.end_those_that_are_to()
            scheduler.turn()
            who_binds[:] = [one.running for one in cluster.extenders if one.running.metric("cotenant_writer") == 1]
            return bool(who_binds) and not could_be_bound(api) and not told_apart(who_binds[0], api)

        eventually(is_well) or eventually(is_well)
        assert [] == cluster.wrong
        assert [] == could_be_bound(api)
        assert [] == told_apart(who_binds[0], api)
        assert eventually(lambda: who_binds[0].metric("cotenant_bindings_unsettled") == 0)
        written = {write.subresource for write in api.writes if write.resource == "pods" and write.namespace in LIMITS}
        assert written <= {"binding", "status", "eviction"}
        for one in cluster.extenders:
            assert 200 == one.running.get("/healthz").status
            assert {} == {name: count for name, count in one.running.extender._threads.failures().items() if count}
