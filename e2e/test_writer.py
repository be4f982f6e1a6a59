"""One writer of grants: who was it before is refused by the API server, and the next one goes on."""

import json
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from cotenant.contract.names import Names
from cotenant.contract.units import GIB
from e2e import nodes
from e2e.cluster import ControlPlane
from e2e.faults import failover
from e2e.faults.invariants import Picture, broken
from e2e.faults.load import pod
from e2e.processes import MissingProgramError, wait_until
from e2e.replicas import NAMESPACE, fence, why_not
from e2e.rest import Api, ApiError, Object

LEASES = "coordination.k8s.io/v1"
NAMES = Names()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A control plane with the fence of the attached layout."""
    with ExitStack() as stack:
        try:
            started = stack.enter_context(ControlPlane(tmp_path_factory.mktemp("writer")))
        except MissingProgramError as missing:
            pytest.skip(str(missing))
        api = started.api()
        api.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})
        nodes.register(api, 1, nodes.Shape(), prefix="lab")
        api.apply(fence("attached"))
        yield started


@pytest.fixture
def api(cluster: ControlPlane) -> Iterator[Api]:
    """The API with nobody holding the Lease, which is not even there."""
    yield cluster.api()
    for one in cluster.api().list("Pod", namespace="default"):
        cluster.api().delete("Pod", one["metadata"]["name"], grace_s=0)
    for one in cluster.api().list("Lease", namespace=NAMESPACE, api_version=LEASES):
        cluster.api().delete("Lease", one["metadata"]["name"], namespace=NAMESPACE, api_version=LEASES)


def holds(api: Api, holder: str, transitions: int) -> None:
    """Have somebody hold the Lease."""
    spec = {"holderIdentity": holder, "leaseTransitions": transitions, "leaseDurationSeconds": 4}
    metadata = {"name": "cotenant-extender", "namespace": NAMESPACE}
    api.apply_object({"apiVersion": LEASES, "kind": "Lease", "metadata": metadata, "spec": spec})


def binding(name: str, term: str | None) -> Object:
    annotations = {NAMES.grant: "x"} | ({} if term is None else {NAMES.writer: term})
    metadata = {"name": name, "annotations": annotations, "labels": {NAMES.granted: "true"}}
    return {"apiVersion": "v1", "kind": "Binding", "metadata": metadata, "target": {"kind": "Node", "name": "lab-0"}}


def bind(api: Api, term: str | None, *, legacy: bool = False, dry: bool = False) -> int:
    """Create a pod and bind it in a term; give the status that the API server answers with."""
    created = api.create({**pod("p", 1), "metadata": {"generateName": "p-", "namespace": "default"}})
    name = created["metadata"]["name"]
    path = "/api/v1/namespaces/default/" + ("bindings" if legacy else f"pods/{name}/binding")
    try:
        api.call("POST", path, binding(name, term), query={"dryRun": "All"} if dry else None)
    except ApiError as refused:
        return refused.code
    return 201


def acts(api: Api) -> bool:
    """Whether the API server follows the fence, and the Lease as it is now, a moment after they were stored."""
    return 403 == bind(api, "never/0", dry=True) and 201 == bind(api, "b_2/8", dry=True)


class TestFence:
    """The API server takes grants in the term of the Lease alone."""

    @pytest.mark.parametrize("legacy", [False, True], ids=["pods/binding", "bindings"])
    def test_after_a_take_over_the_word_of_the_one_before_counts_no_more(self, api: Api, *, legacy: bool) -> None:
        holds(api, "a_1", 7)
        assert wait_until(lambda: 201 == bind(api, "a_1/7", dry=True), timeout_s=30)

        holds(api, "b_2", 8)

        assert wait_until(lambda: acts(api), timeout_s=30)
        assert 403 == bind(api, "a_1/7", legacy=legacy)
        assert 201 == bind(api, "b_2/8", legacy=legacy)

    def test_neither_does_an_earlier_term_of_the_same_holder_nor_none(self, api: Api) -> None:
        holds(api, "b_2", 8)
        assert wait_until(lambda: acts(api), timeout_s=30)

        assert 403 == bind(api, "b_2/7")
        assert 403 == bind(api, None)

    def test_without_the_lease_no_grant_is_taken_and_other_schedulers_bind_as_always(self, api: Api) -> None:
        holds(api, "b_2", 8)
        assert wait_until(lambda: acts(api), timeout_s=30)

        api.delete("Lease", "cotenant-extender", namespace=NAMESPACE, api_version=LEASES)

        assert wait_until(lambda: 201 != bind(api, "b_2/8", dry=True), timeout_s=30)
        api.create(pod("others", 1))
        api.bind("others", "lab-0")
        assert "lab-0" == api.get("Pod", "others")["spec"]["nodeName"]


@pytest.mark.parametrize("layout", sorted(failover.LAYOUTS))
def test_when_the_writer_is_killed_or_frozen_under_load_the_other_goes_on_and_nothing_is_given_twice(
    layout: str, tmp_path: Path
) -> None:
    if reason := why_not():
        pytest.skip(reason)
    with ExitStack() as stack:
        try:
            ground = failover.Ground(stack, tmp_path, layout)
        except MissingProgramError as missing:
            pytest.skip(str(missing))
        outcome = failover.Outcome()
        for how, gap, so_far in failover.take_overs(ground, 2):
            print(f"\n{layout}, {how}: {gap}")
            outcome = so_far
        assert [] == outcome.broken
        # one by kill -9, one by SIGSTOP
        assert [1, 1] == [len(gaps) for gaps in outcome.gaps.values()]


class TestLateBinding:
    """A Binding that was sent before a take-over and arrives after it."""

    def test_it_is_refused_and_its_memory_goes_to_another_pod(self, tmp_path: Path) -> None:
        assert 403 == arrives_late(tmp_path, fenced=True)

    def test_without_the_fence_it_is_taken_which_is_what_clusters_without_the_policy_lose(self, tmp_path: Path) -> None:
        assert 201 == arrives_late(tmp_path, fenced=False)


def post(url: str, body: object) -> Object:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        decoded: Object = json.load(answer)
    return decoded


def arrives_late(directory: Path, *, fenced: bool) -> int:
    """Have a Binding of the first of two extenders arrive after the second one has bound; give what was answered.

    One node has one GPU of 80 units, and two pods ask for all of it.
    """
    if reason := why_not():
        pytest.skip(reason)
    with ExitStack() as stack:
        try:
            ground = failover.Ground(stack, directory, "attached", through_proxy=["replica-a"])
        except MissingProgramError as missing:
            pytest.skip(str(missing))
        api = ground.api
        if not fenced:
            for kind in ("ValidatingAdmissionPolicyBinding", "ValidatingAdmissionPolicy"):
                api.delete(kind, "cotenant-writer", api_version="admissionregistration.k8s.io/v1")
        assert ground.proxy
        held = ground.proxy.faults.hold(method="POST", path=r"/pods/early/binding$")
        nodes.register(api, 1, nodes.Shape(gpus=1, gpu_bytes=80 * GIB), prefix="one")
        api.create(pod("early", 80, node="one-0"))
        assert held.reached.wait(60), "no Binding was sent"
        first = ground.active()
        assert first is ground.replicas["replica-a"]
        # From here on this test is the scheduler: a real one would try the first pod again as well.
        assert ground.scheduler
        ground.cluster.stop_scheduler(ground.scheduler)
        first.kill()
        assert wait_until(lambda: ground.active() is ground.replicas["replica-b"], timeout_s=30)

        # What the second one finds is an empty GPU.
        late = api.create(pod("late", 80, node="one-0"))
        args = {"PodName": "late", "PodNamespace": "default", "PodUID": late["metadata"]["uid"], "Node": "one-0"}
        verbs = f"http://127.0.0.1:{ground.replicas['replica-b'].verbs}"
        assert wait_until(lambda: {"Error": ""} == post(f"{verbs}/bind", args), timeout_s=30)
        _, offset = ground.cluster.audit()
        held.release()

        def answered() -> list[int]:
            return [one.code for one in ground.bindings(offset)[0] if one.name == "early"]

        assert wait_until(lambda: bool(answered()), timeout_s=30)
        # the judge sees what the fence has prevented
        assert fenced is not bool(broken(Picture.of(api)))
        return answered()[0]
