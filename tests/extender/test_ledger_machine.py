"""Drive the ledger through everything an API server can do to it, beside a model that knows only plain dicts.

The model keeps the truth (what the API server stores), what of it the ledger has been told, and what the ledger was
asked to assume. From these it works out anew after every step what each pod must hold.
"""

import json
from collections import Counter, deque
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from cotenant.contract.mps import UNSET_USER
from cotenant.contract.request import RequestError, parse
from cotenant.contract.units import GIB
from extender.ledger import Hold, Ledger, NodeView, Stage, Use
from extender.placement.fit import choosing
from tests.builders import NAMES, NodeBuilder, PodBuilder, a_grant, a_node, a_pod, granted

# no inventory has a larger GPU
EVERYTHING = 1 << 44

names = st.sampled_from(["a", "b", "c", "d"])
node_names = st.sampled_from(["n1", "n2"])


@dataclass(frozen=True)
class Told:
    """What the ledger knows of a bound pod: the node, and the grant's text, None where it has none."""

    node: str
    text: str | None


@dataclass
class Flight:
    """A Binding on its way, or come back without a word."""

    pod: PodBuilder
    node: str
    text: str
    state: Literal["sent", "done", "gone", "elsewhere"] = "sent"


@dataclass
class Listing:
    """A LIST that was asked for and has not arrived yet; it may wait before the API server takes it."""

    started: int
    step: int
    pods: dict[str, PodBuilder] | None = None


def containers_of(text: str) -> list[dict[str, Any]] | None:
    """Read a grant as anybody could who knows only that it is JSON; None where it is not one of ours."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value["containers"] if isinstance(value, dict) and value.get("version") == 1 else None


def held_by(text: str) -> dict[str, int]:
    """Play the pod's life and note the most it holds of each GPU at any moment; a GPU of its own is held whole."""
    containers = containers_of(text) or []
    before: Counter[str] = Counter()
    peak: Counter[str] = Counter()
    whole: Counter[str] = Counter()
    for container in containers:
        amounts = Counter({gpu["uuid"]: gpu["bytes"] for gpu in container["gpus"]})
        if container["mode"] == "exclusive":
            whole |= amounts
        elif container["role"] == "init":
            peak |= before + amounts
        else:
            before += amounts
            peak |= before
    return dict(peak + whole)


def clients_in(text: str) -> dict[str, int]:
    """Count the containers that use each GPU at once through MPS."""
    before: Counter[str] = Counter()
    peak: Counter[str] = Counter()
    for container in containers_of(text) or []:
        mine = Counter(gpu["uuid"] for gpu in container["gpus"] if "mpsPipe" in container)
        peak |= before + mine
        if container["role"] != "init":
            before += mine
    return dict(peak)


def users_in(text: str, uuids: set[str]) -> set[int | None]:
    """Say as whom containers use any of these GPUs through MPS."""
    under = [c for c in containers_of(text) or [] if "mpsPipe" in c]
    return {c.get("user") for c in under for gpu in c["gpus"] if gpu["uuid"] in uuids}


def alone_in(text: str) -> set[str]:
    return {
        gpu["uuid"] for c in containers_of(text) or [] if c["mode"] == "exclusive" for gpu in c["gpus"]
    }  # fmt: skip


def most_of_one_gpu(pod: PodBuilder) -> int:
    """Bound what a pod whose grant nobody can read may hold of any one GPU."""
    if dict(pod.annotations).get("cotenant.io/isolation") in {"strict", "exclusive"}:
        return EVERYTHING
    return sum(int(c["resources"]["limits"]["cotenant.io/gpu-mem"]) for c in (*pod.init, *pod.main)) * GIB


def is_bound(pod: PodBuilder) -> bool:
    return "nodeName" in dict(pod.spec)


def is_ended(pod: PodBuilder) -> bool:
    return dict(pod.status).get("phase") in {"Succeeded", "Failed"}


class LedgerMachine(RuleBasedStateMachine):
    pods = Bundle("pods")

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(NAMES, GIB)
        # the truth: what the API server stores
        self.stored: dict[str, PodBuilder] = {}
        self.nodes: dict[str, NodeBuilder] = {}
        # what the watch has still to tell, in order
        self.pod_news: deque[tuple[str, PodBuilder]] = deque()
        self.node_news: deque[tuple[str, NodeBuilder]] = deque()
        self.listing: Listing | None = None
        # what the ledger was told
        self.told: dict[str, Told] = {}
        self.told_pods: dict[str, PodBuilder] = {}
        self.told_nodes: dict[str, NodeBuilder] = {}
        # what it was asked to assume: by UID, node and grant, and the step it happened in
        self.assumed: dict[str, tuple[Told, int]] = {}
        self.flights: dict[str, Flight] = {}
        # what is kept for pods that wait for others to go
        self.promises: dict[str, Told] = {}
        # pods that the last word on did not decode
        self.unread: set[str] = set()
        self.reads: deque[PodBuilder] = deque()
        self.serial = 0
        self.step = 0

    # --- the cluster lives ---

    @initialize(target=pods, amounts=st.lists(st.integers(1, 6), max_size=3), mps=st.booleans())
    def a_cluster_is_there_and_known(self, amounts: list[int], *, mps: bool) -> MultipleResults[str]:
        """Without it most runs end before a pod is bound anywhere."""
        node = a_node("n1").with_gpus(2, "8GiB")
        self.put_node(node.under_mps(max_clients=2) if mps else node)
        self.the_watch_tells_of_a_node()
        for name, amount in zip("abc", amounts, strict=False):
            self.put_pod("ADDED", a_pod().named(name).with_uid(f"{name}-0").asking(amount))
            self.the_watch_tells_of_a_pod()
        return multiple(*self.stored)

    @rule(name=node_names, sizes=st.lists(st.integers(2, 10), min_size=1, max_size=3), mps=st.booleans())
    def a_node_appears_or_is_made_anew(self, name: str, sizes: list[int], *, mps: bool) -> None:
        """GPUs vanish, come, shrink and grow under the pods on them."""
        node = a_node(name)
        for size in sizes:
            node = node.with_gpu(f"{size}GiB")
        self.put_node(node.under_mps(max_clients=2) if mps else node)

    @precondition(lambda self: self.nodes)
    @rule(data=st.data())
    def a_node_falls_ill(self, data: st.DataObject) -> None:
        node = data.draw(st.sampled_from(list(self.nodes.values())))
        self.put_node(
            data.draw(
                st.sampled_from(
                    [
                        node.annotated_as("not json"),
                        node.annotated_as('{"version":2,"gpus":"who knows"}'),
                        node.without_inventory(),
                        node.not_serving(),
                        node.advertising(None),
                        node.advertising("0"),
                        node.unhealthy(0),
                        node.counting_in(1 << 20),
                        a_node(node.name).with_gpus(len(node.gpus), "8GiB"),
                    ]
                )
            )
        )

    @precondition(lambda self: self.nodes)
    @rule(data=st.data())
    def a_node_goes(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(list(self.nodes)))
        self.node_news.append(("DELETED", self.nodes.pop(name)))

    @rule(
        target=pods,
        name=names,
        main=st.lists(st.integers(1, 6), min_size=1, max_size=2),
        init=st.none() | st.integers(1, 6),
        sidecar=st.none() | st.integers(1, 3),
        wish=st.sampled_from([{}, {}, {"isolation": "exclusive"}, {"gpu_count": "2"}]),
        user=st.sampled_from([None, 7]),
    )
    def a_pod_is_created(
        self,
        name: str,
        main: list[int],
        init: int | None,
        sidecar: int | None,
        *,
        wish: dict[str, str],
        user: int | None,
    ) -> Any:
        if any(pod.name == name for pod in self.stored.values()):
            return multiple()
        self.serial += 1
        # the same name again is another pod: its UID is new
        pod = a_pod().named(name).with_uid(f"{name}-{self.serial}").wishing(**wish).running_as(user)
        for amount in main:
            pod = pod.asking(amount * 2 if "gpu_count" in wish else amount)
        if sidecar and not wish:
            pod = pod.with_sidecar(sidecar)
        if init and not wish:
            pod = pod.with_init(init)
        self.put_pod("ADDED", pod)
        return pod.uid

    @rule(uid=pods)
    def a_pod_is_touched(self, uid: str) -> None:
        """Its conditions change, say: news that tells nothing new."""
        pod = self.stored.get(uid)
        if pod is not None:
            self.put_pod("MODIFIED", pod)

    @rule(uid=pods, phase=st.sampled_from(["Running", "Succeeded", "Failed"]))
    def the_kubelet_reports(self, uid: str, phase: str) -> None:
        """Failed is also how the kubelet rejects a pod."""
        pod = self.stored.get(uid)
        if pod is not None and is_bound(pod) and not is_ended(pod):
            self.put_pod("MODIFIED", pod.in_phase(phase))

    @rule(uid=pods)
    def a_pod_is_asked_to_end(self, uid: str) -> None:
        pod = self.stored.get(uid)
        if pod is not None and is_bound(pod):
            self.put_pod("MODIFIED", pod.terminating())

    @rule(uid=consumes(pods))
    def a_pod_goes(self, uid: str) -> None:
        pod = self.stored.pop(uid, None)
        if pod is not None:
            self.pod_news.append(("DELETED", pod))

    @rule(
        uid=pods,
        node=node_names,
        text=st.sampled_from([None, "not json", '{"version":2}', '{"version":1,"containers":[]}', "readable"]),
        amount=st.integers(1, 4),
    )
    def somebody_else_binds_a_pod(self, uid: str, node: str, text: str | None, amount: int) -> None:
        pod = self.stored.get(uid)
        if pod is None or is_bound(pod):
            return
        if text == "readable":
            self.put_pod("MODIFIED", pod.bound_to(node, a_grant(granted({f"GPU-{node}-0": amount * GIB}))))
        else:
            self.put_pod("MODIFIED", pod.bound_to(node, text))

    # --- the extender binds ---

    def unplaced(self) -> list[str]:
        """Name the pods that a bind may be asked for: not bound, or not as far as the ledger has heard."""
        free = {uid for uid, pod in self.stored.items() if not is_bound(pod)}
        free |= {uid for uid in self.told_pods if self.ledger.waiting(uid) is not None}
        return sorted(uid for uid in free if self.ledger.hold(uid) is None)

    @precondition(lambda self: self.told_nodes and self.unplaced())
    @rule(data=st.data())
    def a_bind_is_reserved(self, data: st.DataObject) -> None:
        self.reserve(data.draw(st.sampled_from(self.unplaced())), data.draw(st.sampled_from(sorted(self.told_nodes))))

    def reserve(self, uid: str, node: str) -> None:
        pod = self.stored.get(uid)
        waiting = self.ledger.waiting(uid)
        if waiting is not None:
            # what the watch last told may be old: the pod may be gone, or bound
            assert not isinstance(waiting.request, RequestError)
            request = waiting.request
            pod = pod or self.told_pods[uid]
        else:
            assert pod is not None
            found = parse(pod.build(), NAMES, GIB)
            assert found is not None
            request = found
        hold = self.ledger.assume(uid, f"default/{pod.name}", node, choosing(request))
        if not isinstance(hold, Hold):
            return
        self.flights[uid] = Flight(pod, node, hold.grant)
        self.assumed[uid] = Told(node, hold.grant), self.step
        self.check_that_no_gpu_is_over_committed_by(uid, node, hold.grant)

    @precondition(lambda self: self.told_nodes and self.unplaced())
    @rule(data=st.data())
    def a_bind_goes_well_and_the_watch_tells_of_it(self, data: st.DataObject) -> None:
        """Step by step few runs get so far, and what can happen to a bound pod would hardly be tried."""
        uid = data.draw(st.sampled_from(self.unplaced()))
        self.reserve(uid, data.draw(st.sampled_from(sorted(self.told_nodes))))
        if uid not in self.flying("sent"):
            return
        self.reach_the_api_server(uid)
        self.come_back(uid)
        while self.pod_news and self.listing is None:
            self.the_watch_tells_of_a_pod()

    # --- the extender evicts for a pod ---

    @precondition(lambda self: self.told_nodes)
    @rule(uid=pods, node=node_names, data=st.data())
    def a_pod_is_promised_what_others_hold(self, uid: str, node: str, data: st.DataObject) -> None:
        waiting = self.ledger.waiting(uid)
        free = self.ledger.hold(uid) is None and uid not in self.promises
        if waiting is None or isinstance(waiting.request, RequestError) or not free or not self.ledger.view(node):
            return
        request = waiting.request
        there = [hold.uid for hold in self.ledger.holds() if hold.node == node]
        gone = data.draw(st.sets(st.sampled_from(there))) if there else set()
        promised = self.ledger.promise(uid, waiting.key, node, gone, choosing(request))
        if isinstance(promised, Hold):
            self.promises[uid] = Told(node, promised.grant)

    @precondition(lambda self: self.promises)
    @rule(data=st.data())
    def a_promise_is_taken_back(self, data: st.DataObject) -> None:
        uid = data.draw(st.sampled_from(sorted(self.promises)))
        self.ledger.release(uid)
        del self.promises[uid]

    def check_that_no_gpu_is_over_committed_by(self, uid: str, node: str, text: str) -> None:
        """I1: all that lives on the GPUs of the new grant, and all on its way there, fits in what is usable."""
        usable = {gpu.uuid: gpu.usable_bytes for gpu in self.told_nodes[node].gpus}
        there: dict[str, str] = {}
        strangers = 0
        for other, pod in self.stored.items():
            spec, annotations = dict(pod.spec), dict(pod.annotations)
            found = annotations.get("cotenant.io/grant")
            ours = other in self.assumed and self.assumed[other][0].text == found
            # what somebody else has just bound nobody could know of
            known = other != uid and (other in self.told or ours)
            if spec.get("nodeName") != node or is_ended(pod) or not known:
                continue
            if found is not None and containers_of(found):
                there[other] = found
            elif found is not None:
                strangers += most_of_one_gpu(pod)
        for other, flight in self.flights.items():
            meant = self.stored.get(other)
            # that of a pod which somebody else has bound, or which is gone, comes to nothing
            if flight.node == node and flight.state == "sent" and meant is not None and not is_bound(meant):
                there[other] = flight.text
        there[uid] = text
        sums = sum((Counter(held_by(one)) for one in there.values()), Counter())
        for gpu in held_by(text):
            assert sums[gpu] + strangers <= usable[gpu]
            neighbours = [other for other, one in there.items() if gpu in held_by(one)]
            # a GPU for the pod itself has no other pod on it
            assert not any(gpu in alone_in(one) for one in there.values()) or [uid] == neighbours
        self.check_that_mps_serves_them_all(node, there)

    def check_that_mps_serves_them_all(self, node: str, there: dict[str, str]) -> None:
        """One user for all GPUs of the one daemon here, and two containers at once on each."""
        most = {gpu.uuid: gpu.max_clients for gpu in self.told_nodes[node].gpus if gpu.mode == "mps"}
        clients = sum((Counter(clients_in(text)) for text in there.values()), Counter())
        assert [] == [uuid for uuid, limit in most.items() if clients[uuid] > limit]
        known = {uid for uid in there if uid in self.assumed and self.assumed[uid][0].text == there[uid]}
        assert len({user for uid in known for user in users_in(there[uid], set(most))}) <= 1

    def flying(self, *states: str) -> list[str]:
        return [uid for uid, flight in self.flights.items() if flight.state in states]

    @precondition(lambda self: self.flying("sent"))
    @rule(data=st.data())
    def a_binding_reaches_the_api_server(self, data: st.DataObject) -> None:
        self.reach_the_api_server(data.draw(st.sampled_from(self.flying("sent"))))

    def reach_the_api_server(self, uid: str) -> None:
        flight = self.flights[uid]
        pod = self.stored.get(uid)
        if pod is None:
            flight.state = "gone"
        elif is_bound(pod):
            flight.state = "elsewhere"
        else:
            flight.state = "done"
            self.put_pod("MODIFIED", pod.bound_to(flight.node, flight.text))

    @precondition(lambda self: self.flying("done", "gone", "elsewhere"))
    @rule(data=st.data())
    def an_answer_comes_back(self, data: st.DataObject) -> None:
        self.come_back(data.draw(st.sampled_from(self.flying("done", "gone", "elsewhere"))))

    def come_back(self, uid: str) -> None:
        state = self.flights.pop(uid).state
        if state == "done":
            self.ledger.confirm(uid)
            self.promises.pop(uid, None)
            return
        pod = self.stored.get(uid)
        if pod is None:
            self.ledger.forget(uid)
            if uid not in self.told:
                self.assumed.pop(uid, None)
            return
        self.reads.append(pod)

    @precondition(lambda self: self.reads)
    @rule()
    def a_read_arrives(self) -> None:
        """It was made because of an answer, and the watch may have told more since."""
        pod = self.reads.popleft()
        self.ledger.settle(pod.build())
        if pod.uid in self.assumed and pod.uid not in self.told:
            self.tell("MODIFIED", pod)

    @precondition(lambda self: self.flying("done", "gone", "elsewhere"))
    @rule(data=st.data())
    def an_answer_is_lost_and_the_binding_sent_again(self, data: st.DataObject) -> None:
        uid = data.draw(st.sampled_from(self.flying("done", "gone", "elsewhere")))
        self.flights[uid].state = "sent"

    @precondition(lambda self: self.flying("sent"))
    @rule(data=st.data())
    def a_binding_is_refused_before_anything_happened(self, data: st.DataObject) -> None:
        uid = data.draw(st.sampled_from(self.flying("sent")))
        flight = self.flights[uid]
        pod = self.stored.get(uid)
        if pod is not None and dict(pod.annotations).get("cotenant.io/grant") == flight.text:
            return  # an earlier one has been done: a refusal of this one is no word about it
        del self.flights[uid]
        self.ledger.forget(uid)
        if uid not in self.told:
            self.assumed.pop(uid, None)

    # --- the ledger is told ---

    @precondition(lambda self: self.node_news)
    @rule()
    def the_watch_tells_of_a_node(self) -> None:
        change, node = self.node_news.popleft()
        self.tell_node(change, node)

    @precondition(lambda self: self.pod_news and self.listing is None)
    @rule()
    def the_watch_tells_of_a_pod(self) -> None:
        change, pod = self.pod_news.popleft()
        if change == "DELETED":
            self.ledger.pod_gone(pod.build().uid)
        else:
            self.ledger.observe_pod(pod.build())
        self.tell(change, pod)

    @precondition(lambda self: self.listing is None)
    @rule()
    def the_watch_breaks_and_a_list_is_asked_for(self) -> None:
        self.listing = Listing(self.ledger.mark(), self.step)

    @precondition(lambda self: self.listing is not None and self.listing.pods is None)
    @rule()
    def the_list_is_taken(self) -> None:
        assert self.listing is not None
        self.listing.pods = dict(self.stored)
        # the next watch goes on from the list
        self.pod_news.clear()

    @precondition(lambda self: self.listing is not None and self.listing.pods is not None)
    @rule(data=st.data())
    def the_list_arrives(self, data: st.DataObject) -> None:
        listing = self.listing
        assert listing is not None
        assert listing.pods is not None
        self.listing = None
        unreadable = data.draw(st.sets(st.sampled_from(sorted(listing.pods)))) if listing.pods else set()
        self.unread |= unreadable
        readable = {uid: pod for uid, pod in listing.pods.items() if uid not in unreadable}
        self.ledger.observe_pods(pod.build() for pod in readable.values())
        self.ledger.pods_replaced(listing.pods.keys(), listing.started)
        for uid in {*self.told, *self.told_pods, *self.assumed, *self.promises} - set(listing.pods):
            # younger than the list: it may not be in it
            if uid not in self.assumed or self.assumed[uid][1] <= listing.step:
                self.untell(uid)
        for pod in readable.values():
            self.tell("MODIFIED", pod)
        # those that it lacks all the same are asked for: they are younger, or went before it was taken
        for uid in {hold.uid for hold in self.ledger.holds()} - set(listing.pods) - set(self.stored):
            self.ledger.pod_gone(uid)
            self.untell(uid)

    @precondition(lambda self: self.flights or self.promises or self.told)
    @rule(data=st.data())
    def the_extender_restarts(self, data: st.DataObject) -> None:
        """What was on its way is cut off, and LISTs tell the rest: I4."""
        self.flights.clear()
        self.assumed.clear()
        self.promises.clear()
        self.told.clear()
        self.told_pods.clear()
        self.told_nodes.clear()
        self.pod_news.clear()
        self.node_news.clear()
        self.unread.clear()
        self.reads.clear()
        self.listing = None
        self.ledger = self.fresh(pods_first=data.draw(st.booleans()))
        for node in self.nodes.values():
            self.told_nodes[node.name] = node
        for pod in self.stored.values():
            self.tell("ADDED", pod)

    @rule()
    def all_is_told_and_a_restart_would_change_nothing(self) -> None:
        """I4: once the ledger has heard everything, one that knows nothing but the API server's lists equals it."""
        if self.listing is not None or self.flights or self.unread or self.reads:
            return
        while self.node_news:
            self.the_watch_tells_of_a_node()
        while self.pod_news:
            self.the_watch_tells_of_a_pod()
        # the one thing that is not rebuilt: whom a promise was made to competes with the others
        while self.promises:
            self.ledger.release(self.promises.popitem()[0])
        fresh = self.fresh(pods_first=False)

        def holds(ledger: Ledger) -> dict[str, Hold]:
            return {hold.uid: msgspec.structs.replace(hold, since=0) for hold in ledger.holds()}

        assert holds(fresh) == holds(self.ledger)
        assert {view.name: view for view in fresh.views()} == {view.name: view for view in self.ledger.views()}
        assert fresh.ungranted() == self.ledger.ungranted()
        assert {uid: fresh.waiting(uid) for uid in self.stored} == {
            uid: self.ledger.waiting(uid) for uid in self.stored
        }

    def fresh(self, *, pods_first: bool) -> Ledger:
        ledger = Ledger(NAMES, GIB)
        if pods_first:
            ledger.observe_pods(pod.build() for pod in self.stored.values())
        for node in self.nodes.values():
            ledger.observe_node(node.build())
        if not pods_first:
            ledger.observe_pods(pod.build() for pod in self.stored.values())
        return ledger

    # --- the model's side ---

    def put_node(self, node: NodeBuilder) -> None:
        self.nodes[node.name] = node
        self.node_news.append(("MODIFIED", node))

    def put_pod(self, change: str, pod: PodBuilder) -> None:
        self.stored[pod.build().uid] = pod
        self.pod_news.append((change, pod))

    def tell_node(self, change: str, node: NodeBuilder) -> None:
        if change == "DELETED":
            self.ledger.node_gone(node.name)
            self.told_nodes.pop(node.name, None)
        else:
            self.ledger.observe_node(node.build())
            self.told_nodes[node.name] = node

    def tell(self, change: str, pod: PodBuilder) -> None:
        uid = pod.build().uid
        self.unread.discard(uid)
        if change == "DELETED" or is_ended(pod):
            self.untell(uid)
            return
        self.told_pods[uid] = pod
        if is_bound(pod):
            annotations = dict(pod.annotations)
            self.promises.pop(uid, None)
            self.told[uid] = Told(dict(pod.spec)["nodeName"], annotations.get("cotenant.io/grant"))
        elif uid in self.told and self.told[uid].text is None:
            # a read told that it is bound without a grant, and an older LIST does not: what is assumed counts again
            del self.told[uid]

    def untell(self, uid: str) -> None:
        self.told.pop(uid, None)
        self.told_pods.pop(uid, None)
        self.assumed.pop(uid, None)
        self.promises.pop(uid, None)
        self.unread.discard(uid)

    def expected(self) -> dict[str, Told]:
        """Say who must hold something: those told to be bound with a grant, and those assumed and not refused."""
        held = {uid: told for uid, (told, _) in self.assumed.items()}
        held |= self.told
        return {uid: told for uid, told in held.items() if told.text is not None}

    @invariant()
    def every_pod_holds_what_it_must_and_nobody_else_does(self) -> None:
        """I3: until it is gone or has ended, whatever else happens."""
        self.step += 1
        expected = self.expected()
        holds = {hold.uid: hold for hold in self.ledger.holds()}
        assert set(expected) == set(holds)
        assert self.promises.keys() == {uid for uid in [*self.stored, *self.promises] if self.ledger.promised(uid)}
        for uid, told in expected.items():
            hold = holds[uid]
            assert (told.node, told.text) == (hold.node, hold.grant)
            if containers_of(told.text or ""):
                assert held_by(told.text or "") == dict(hold.charges)
                assert 0 == hold.everywhere_bytes
            else:
                assert {} == hold.charges
                assert most_of_one_gpu(self.told_pods[uid]) <= hold.everywhere_bytes
                assert hold.problem
            if uid in self.told:
                assert Stage.BOUND is hold.stage

    @invariant()
    def namespaces_hold_what_their_pods_do(self) -> None:
        holds = self.ledger.holds()
        assert {hold.namespace for hold in holds} == set(self.ledger.uses())
        for namespace, use in self.ledger.uses().items():
            theirs = [hold for hold in holds if hold.namespace == namespace]
            assert use == Use(sum(one.bytes for one in theirs), sum(one.gpus for one in theirs), len(theirs))

    @invariant()
    def every_node_shows_what_is_held_on_it(self) -> None:
        expected = self.expected()
        assert set(self.told_nodes) == {view.name for view in self.ledger.views()}
        for name, node in self.told_nodes.items():
            view = self.ledger.view(name)
            assert view is not None
            here = [told.text or "" for told in expected.values() if told.node == name]
            # a promise counts beside what its victims hold until they are gone, but not beside what it has become
            kept = [told.text or "" for uid, told in self.promises.items() if told.node == name and uid not in expected]
            held = sum((Counter(held_by(text)) for text in [*here, *kept]), Counter())
            closed = set().union(*map(alone_in, here))
            strangers = sum(
                most_of_one_gpu(self.told_pods[uid])
                for uid, told in expected.items()
                if told.node == name and not containers_of(told.text or "")
            )
            readable = not node.bare and node.text is None
            assert ([gpu.uuid for gpu in node.gpus] if readable else []) == [state.gpu.uuid for state in view.gpus]
            for state in view.gpus:
                usable = state.gpu.usable_bytes
                left = 0 if state.gpu.uuid in closed else max(0, usable - held[state.gpu.uuid] - strangers)
                assert left == state.free_bytes
            if not strangers:
                self.check_what_mps_serves(view, [*here, *kept])
            assert (view.problem is None) == (
                readable and node.serving and node.unit_bytes == GIB and node.advertised == "1000"
            )

    def check_what_mps_serves(self, view: NodeView, texts: list[str]) -> None:
        """One daemon serves all GPUs of a node here; a user that a pod does not name is not known."""
        clients = sum((Counter(clients_in(text)) for text in texts), Counter())
        there = {state.gpu.uuid for state in view.gpus}
        users = frozenset(UNSET_USER if user is None else user for text in texts for user in users_in(text, there))
        for state in view.gpus:
            under_mps = state.gpu.mode == "mps"
            assert (clients[state.gpu.uuid], users) == (state.clients, state.users) or not under_mps

    @invariant()
    def nobody_who_waits_is_told_to_be_bound(self) -> None:
        assert [] == [uid for uid in self.told if self.ledger.waiting(uid) is not None and not self.heard_older(uid)]

    def heard_older(self, uid: str) -> bool:
        """Tell whether the last word on a pod was older than what settled its bind."""
        pod = self.told_pods.get(uid)
        return pod is not None and not is_bound(pod)


TestLedger = LedgerMachine.TestCase
