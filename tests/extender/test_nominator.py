"""When the nominator looks at a pod again, and for whom; what it does in a whole extender is in test_verbs_http.py."""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from cotenant.cluster import Cluster, connect
from cotenant.contract.configuration import NamespaceLimits
from cotenant.contract.pods import Pod
from cotenant.contract.request import PodRequest
from cotenant.contract.units import GIB
from cotenant.standins.api_server import ApiServer
from extender.cluster.nominator import Nominator
from extender.ledger import Ledger
from extender.placement.tenants import Tenants
from extender.verbs.filter import Filter
from extender.verbs.judge import Judge
from extender.verbs.wire import Candidates, ExtenderArgs
from tests.builders import NAMES, PodBuilder, a_node, a_pod, request_of
from tests.extender.running import PATIENCE, nominee, submit

CROWD = frozenset(f"small-{n}" for n in range(100))


class Ground:
    """A nominator, a ledger that hears what a test tells it, and a clock that stands still until a test moves it."""

    def __init__(self, api: ApiServer, cluster: Cluster) -> None:
        self.api = api
        self.now = 0.0
        self.ledger = Ledger(NAMES, GIB)
        tenants = Tenants({"team": NamespaceLimits(gpu_memory="10GiB")}, NAMES)
        judge = Judge(self.ledger, NAMES, GIB, "binpack", tenants=tenants)
        self.nominator = Nominator(cluster, self.ledger, judge, clock=lambda: self.now)
        self._others = 0

    def look(self, pod: PodBuilder, *, sampled: frozenset[str] = frozenset({"n1"})) -> None:
        """Have kube-scheduler try a pod in vain."""
        self.look_at(msgspec.convert(submit(self.api, pod), Pod), sampled)

    def look_at(self, pod: Pod, sampled: frozenset[str] = frozenset({"n1"})) -> None:
        self.ledger.observe_pod(pod)
        self.nominator.look(pod, request_of(pod), sampled)

    def pass_time(self, seconds: float) -> None:
        """Let time pass, and wait until what is due has been looked at."""
        self.now += seconds
        # one pod after the other, that which is due first before the rest: when this one is nominated, the others were
        # looked at
        self._others += 1
        name = f"other-{self._others}"
        self.ledger.observe_node(a_node(name).with_gpu("1GiB").build())
        self.look(a_pod().named(name).asking(1), sampled=frozenset({name}))
        self.now += 0.06
        assert self.api.wait_until(lambda: nominee(self.api, name) == name, PATIENCE)


@pytest.fixture
def ground(api: ApiServer, tmp_path: Path) -> Iterator[Ground]:
    with connect(api.kubeconfig(tmp_path / "kubeconfig")) as cluster:
        ground = Ground(api, cluster)
        yield ground
        ground.nominator.stop()


def test_news_bring_a_nomination_however_late_they_are(ground: Ground) -> None:
    # a dead watch is found out after 15 s, one after an outage later; a promise may be kept for minutes
    ground.ledger.observe_node(a_node("n1").with_gpu("2GiB").build())
    ground.look(a_pod().named("waits").asking(8))
    for seconds in (0.05, 0.5, 2, 5, 10, 10, 10, 300):
        ground.pass_time(seconds)
    assert nominee(ground.api, "waits") is None

    ground.ledger.observe_node(a_node("n1").with_gpu("10GiB").build())
    ground.pass_time(10)

    assert "n1" == nominee(ground.api, "waits")


def test_late_news_of_a_node_outside_of_the_sample_bring_a_nomination_too(ground: Ground) -> None:
    ground.ledger.observe_node(a_node("n1").with_gpu("2GiB").build())
    ground.look(a_pod().named("waits").asking(8), sampled=CROWD)
    ground.pass_time(0.05)

    ground.ledger.observe_node(a_node("n1").with_gpu("10GiB").build())
    ground.pass_time(0.5)

    assert "n1" == nominee(ground.api, "waits")


def test_a_nomination_that_could_not_be_written_is_tried_again(ground: Ground) -> None:
    ground.ledger.observe_node(a_node("n1").with_gpu("10GiB").build())
    ground.api.faults.refuse(500, method="PATCH", path="/pods/waits/status", times=1)
    ground.look(a_pod().named("waits").asking(8))
    ground.pass_time(0.05)
    assert nominee(ground.api, "waits") is None

    ground.pass_time(0.5)

    assert "n1" == nominee(ground.api, "waits")


def test_what_a_namespaces_limit_leaves_has_one_nominee_at_a_time(ground: Ground) -> None:
    # 10 GiB for one of them, though each could have a node of its own
    for node in ("n1", "n2"):
        ground.ledger.observe_node(a_node(node).with_gpu("10GiB").build())
    for name in ("a", "b"):
        ground.look(a_pod().named(name).in_namespace("team").asking(6), sampled=frozenset({"n1", "n2"}))

    ground.pass_time(0.05)

    assert [None, "n1"] == sorted((nominee(ground.api, name, "team") for name in ("a", "b")), key=str)


@pytest.mark.parametrize(("policy", "expected"), [("Never", ""), ("PreemptLowerPriority", "n1")])
def test_a_nomination_in_vain_is_taken_from_a_pod_from_which_kube_scheduler_takes_none(
    ground: Ground, policy: str, expected: str
) -> None:
    submit(ground.api, a_pod().named("waits").asking(8))
    pod = msgspec.convert(ground.api.set_phase("waits", "Pending", nominatedNodeName="n1"), Pod)
    ground.look_at(msgspec.structs.replace(pod, spec=msgspec.structs.replace(pod.spec, preemption_policy=policy)))

    ground.pass_time(0.05)

    assert expected == nominee(ground.api, "waits")


def test_where_too_many_wait_the_one_that_has_waited_for_longest_gives_way(ground: Ground) -> None:
    ground.ledger.observe_node(a_node("n1").with_gpu("2GiB").build())
    ground.look(a_pod().named("first").asking(8))
    ground.pass_time(0.05)
    for n in range(1000):
        ground.look_at(a_pod().with_uid(f"uid-{n}").asking(8).build())

    # neither the first, which has been looked at, nor more than there is room for
    assert {f"uid-{n}" for n in range(1000)} == {*ground.nominator._asked}


def test_the_annotations_of_those_that_wait_are_not_kept() -> None:
    kept: list[Pod] = []

    class Onlooker:
        def look(self, pod: Pod, _request: PodRequest, _sampled: frozenset[str]) -> None:
            kept.append(pod)

    ledger = Ledger(NAMES, GIB)
    ledger.observe_node(a_node("n1").with_gpu("10GiB").build())
    judge = Judge(ledger, NAMES, GIB, "binpack")
    waits = a_pod().named("waits").asking(11).wishing(gpu_model="*").build()
    Filter(ledger, judge, synced=lambda: True, nominator=Onlooker())(ExtenderArgs(waits, Candidates(["n1"])))

    assert [("default/waits", {})] == [(pod.key, pod.annotations) for pod in kept]
