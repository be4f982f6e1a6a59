"""Admission on a real kube-apiserver: the policies, and the webhook that stands in for them on older clusters.

Both are held to the table of tests/admission, which the webhook's functions are held to in unit tests as well.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from msgspec.structs import replace

from e2e.cluster import ControlPlane, User
from e2e.kustomize import MANIFESTS, build
from e2e.processes import MissingProgramError, wait_until
from e2e.rest import APPLY_PATCH, MERGE_PATCH, Api, ApiError, Object
from e2e.webhook import WebhookServer
from tests.admission.cases import ATTACHED_CREATIONS, CREATIONS, UNMUTATED_CREATIONS, WRITES
from tests.admission.forgery import BINDINGS, BOUND_ANNOTATIONS, DROPPING, FORGEABLE, Route, Write
from tests.admission.outcomes import ALICE, EXTENDER, KUBELET, Creation, Ready, Refused, Untouched, seen
from tests.admission.pods import SCHEDULER, as_decoded, asking, container, injected, pod
from tests.admission.settings import SETTINGS

# All of them administrators: admission holds where RBAC lets everything pass.
USERS = tuple(User(name, name, ("system:masters",)) for name in ("admin", ALICE, EXTENDER, KUBELET))
PODS = "/api/v1/namespaces/default/pods"
DRY_RUN = {"dryRun": "All"}
FORGERIES = [case for case in WRITES if case.refused]


@dataclass(frozen=True)
class Cluster:
    """A kube-apiserver with admission installed, and a bound and an unbound pod."""

    control_plane: ControlPlane
    webhook: WebhookServer | None

    def api(self, user: str) -> Api:
        return self.control_plane.api(user)

    def create(self, new: Object, user: str = ALICE) -> Object:
        """Create a pod in a dry run: through all of admission, but not stored."""
        return self.api(user).call("POST", PODS, new, query=DRY_RUN)

    def refuses(self, new: Object) -> bool:
        try:
            self.create(new)
        except ApiError:
            return True
        return False


def started(
    stack: ExitStack, directory: Path, manifests: str, *, scheduler: str | None, mutating: bool = True
) -> Cluster:
    """Start a control plane with the admission of *manifests*, and wait until it has taken effect.

    Without *mutating* only the validating half is installed.
    """
    try:
        control_plane = stack.enter_context(ControlPlane(directory, users=USERS))
    except MissingProgramError as missing:
        pytest.skip(str(missing))
    webhook = None
    if manifests == "webhook":
        webhook = stack.enter_context(WebhookServer(directory / "webhook", replace(SETTINGS, scheduler=scheduler)))
    admin = control_plane.api("admin")
    for document in build(MANIFESTS / "admission" / manifests):
        if document["kind"].startswith("Mutating") and not mutating:
            continue
        admin.apply_object(webhook.turned_here(document) if webhook else document)
    cluster = Cluster(control_plane, webhook)
    effects: list[Callable[[], bool]] = [
        lambda: cluster.refuses(pod(asking(0))),
        lambda: cluster.refuses(pod(container(), annotations={"cotenant.io/grant": "x"})),
        lambda: cluster.refuses(pod(asking())) is not mutating,
    ]
    assert wait_until(lambda: all(effect() for effect in effects), timeout_s=60), f"{manifests} did not take effect"
    return cluster


def store_pods(cluster: Cluster) -> None:
    """Store a pod that the extender has bound, and one that it has not."""
    for name in ("bound", "unbound"):
        cluster.api("admin").create(pod(asking()) | {"metadata": {"name": name}})
    cluster.api(EXTENDER).bind("bound", "n1", annotations=BOUND_ANNOTATIONS)


@pytest.fixture(scope="module", params=["policies", "webhook"])
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The second-scheduler layout."""
    with ExitStack() as stack:
        directory = tmp_path_factory.mktemp("second-scheduler")
        running = started(stack, directory, request.param, scheduler=SCHEDULER)
        store_pods(running)
        yield running


@pytest.fixture(scope="module", params=["policies-attached", "webhook"])
def attached(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The attached layout."""
    with ExitStack() as stack:
        yield started(stack, tmp_path_factory.mktemp("attached"), request.param, scheduler=None)


@pytest.fixture(scope="module", params=["policies", "webhook"])
def unmutated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The second-scheduler layout with its mutating half missing."""
    with ExitStack() as stack:
        directory = tmp_path_factory.mktemp("unmutated")
        yield started(stack, directory, request.param, scheduler=SCHEDULER, mutating=False)


def check_creation(cluster: Cluster, case: Creation) -> None:
    match case.outcome:
        case Refused(sentence):
            with pytest.raises(ApiError) as refusal:
                cluster.create(case.pod, case.user)
            assert sentence in refusal.value.message
            assert 403 == refusal.value.code
        case Untouched():
            assert seen(as_decoded(case.pod)) == seen(cluster.create(case.pod, case.user))
        case Ready() as outcome:
            assert outcome == seen(cluster.create(case.pod, case.user))


def by_saying(case: Creation | Write) -> str:
    return case.saying


def write(cluster: Cluster, case: Write, *, dry_run: bool) -> Object:
    """Make the write, and return what the API server answers; raises ApiError where it refuses."""
    api = cluster.api(case.user)
    metadata: Object = {"annotations": case.changes}
    query = DRY_RUN if dry_run else None
    if case.route in BINDINGS:
        legacy = case.route is Route.LEGACY_BINDING
        path = "/api/v1/namespaces/default/bindings" if legacy else f"{PODS}/unbound/binding"
        binding = {"apiVersion": "v1", "kind": "Binding", "target": {"kind": "Node", "name": "n1"}}
        return api.call("POST", path, binding | {"metadata": metadata | {"name": "unbound"}}, query=query)
    subresource = case.route.value[1]
    path = f"{PODS}/bound/{subresource}" if subresource else f"{PODS}/bound"
    return api.call("PATCH", path, {"metadata": metadata}, query=query, content=MERGE_PATCH)


def annotations(cluster: Cluster, name: str) -> Object:
    found: Object = cluster.api("admin").get("Pod", name)["metadata"].get("annotations", {})
    return found


class TestCreation:
    """A pod is readied, left alone, or refused, as the table says."""

    @pytest.mark.parametrize("case", CREATIONS, ids=by_saying)
    def test_in_the_second_scheduler_layout(self, cluster: Cluster, case: Creation) -> None:
        check_creation(cluster, case)

    def test_a_grant_forged_by_server_side_apply_is_refused(self, cluster: Cluster) -> None:
        forged = pod(asking(), annotations={"cotenant.io/grant": "x"})
        forged["metadata"] |= {"name": "applied"}
        del forged["metadata"]["generateName"]
        query = {"fieldManager": "alice", "force": "true"}
        with pytest.raises(ApiError, match="written only by Cotenant's extender"):
            cluster.api(ALICE).call("PATCH", f"{PODS}/applied", forged, query=query, content=APPLY_PATCH)

    def test_a_forged_grant_is_refused_even_where_the_mutation_has_nothing_to_do(self, cluster: Cluster) -> None:
        stored = cluster.create(pod(asking()))
        again = {"apiVersion": "v1", "kind": "Pod", "spec": stored["spec"]}
        again["metadata"] = {"generateName": "again-", "annotations": {"mps-pipe.cotenant.io/main": "/tmp/x"}}
        with pytest.raises(ApiError, match=r"annotation mps-pipe.cotenant.io/main is written only by"):
            cluster.create(again)

    def test_a_pod_that_went_through_once_goes_through_unchanged(self, cluster: Cluster) -> None:
        once = cluster.create(pod(asking(env=[{"name": "A", "value": "b"}]), init=[asking(1, "warm")]))
        again = {"apiVersion": "v1", "kind": "Pod", "metadata": {"generateName": "again-"}, "spec": once["spec"]}
        assert once["spec"] == cluster.create(again)["spec"]

    def test_a_pod_with_very_much_environment_is_readied_too(self, cluster: Cluster) -> None:
        """The API server stops an expression that takes too many steps, and with it the pod."""
        env = [{"name": f"N{n}", "value": "x"} for n in range(300)]
        names = [f"c{n}" for n in range(64)]
        stored = cluster.create(pod(*(asking(1, name, env=env) for name in names)))
        assert [[*injected(name), *env] for name in names] == [one["env"] for one in stored["spec"]["containers"]]


class TestWritesToStoredPods:
    """Whoever is not the extender cannot write, change or remove what it wrote at bind, on any way there is."""

    @pytest.mark.parametrize("case", [case for case in FORGERIES if case.route not in DROPPING], ids=by_saying)
    def test_a_forger_is_refused_and_nothing_changes(self, cluster: Cluster, case: Write) -> None:
        with pytest.raises(ApiError) as refusal:
            write(cluster, case, dry_run=False)
        assert case.refused in refusal.value.message
        assert 403 == refusal.value.code
        assert BOUND_ANNOTATIONS == annotations(cluster, "bound")
        assert {} == annotations(cluster, "unbound")

    @pytest.mark.parametrize("case", [case for case in FORGERIES if case.route in DROPPING], ids=by_saying)
    def test_what_the_api_server_drops_changes_nothing(self, cluster: Cluster, case: Write) -> None:
        write(cluster, case, dry_run=False)
        assert BOUND_ANNOTATIONS == annotations(cluster, "bound")

    @pytest.mark.parametrize("case", [case for case in WRITES if not case.refused], ids=by_saying)
    def test_what_is_not_ours_and_what_the_extender_writes_passes(self, cluster: Cluster, case: Write) -> None:
        write(cluster, case, dry_run=True)

    def test_replacing_the_whole_pod_without_its_grant_is_refused(self, cluster: Cluster) -> None:
        replaced = cluster.api(ALICE).get("Pod", "bound")
        replaced["metadata"]["annotations"] = {}
        with pytest.raises(ApiError, match="leave it as it is"):
            cluster.api(ALICE).call("PUT", f"{PODS}/bound", replaced)
        assert BOUND_ANNOTATIONS == annotations(cluster, "bound")

    def test_an_ephemeral_container_may_be_added_beside_a_grant(self, cluster: Cluster) -> None:
        debugger = {"spec": {"ephemeralContainers": [{"name": "debug", "image": "example/image:1"}]}}
        answer = cluster.api(ALICE).call(
            "PATCH",
            f"{PODS}/bound/ephemeralcontainers",
            debugger,
            query=DRY_RUN,
            content="application/strategic-merge-patch+json",
        )
        assert "debug" == answer["spec"]["ephemeralContainers"][0]["name"]

    def test_an_ephemeral_container_can_ask_for_nothing(self, cluster: Cluster) -> None:
        greedy = {"name": "debug", "image": "x", "resources": {"limits": {"cotenant.io/gpu-mem": "1"}}}
        with pytest.raises(ApiError, match="ephemeralContainers"):
            cluster.api(ALICE).call(
                "PATCH",
                f"{PODS}/bound/ephemeralcontainers",
                {"spec": {"ephemeralContainers": [greedy]}},
                content="application/strategic-merge-patch+json",
            )

    def test_the_environment_cannot_be_changed_afterwards(self, cluster: Cluster) -> None:
        env = [{"name": "NVIDIA_VISIBLE_DEVICES", "value": "all"}]
        with pytest.raises(ApiError, match="pod updates may not change fields other than"):
            cluster.api(ALICE).patch(
                "Pod",
                "bound",
                {"spec": {"containers": [{"name": "main", "env": env}]}},
                content="application/strategic-merge-patch+json",
            )


class TestAttachedLayout:
    """Any scheduler may have the pod; all else holds."""

    @pytest.mark.parametrize("case", ATTACHED_CREATIONS, ids=by_saying)
    def test_creation(self, attached: Cluster, case: Creation) -> None:
        check_creation(attached, case)


class TestWithoutMutation:
    """Where the mutating half is missing, or was undone by another webhook, nothing gets past the validating half."""

    @pytest.mark.parametrize("case", UNMUTATED_CREATIONS, ids=by_saying)
    def test_creation(self, unmutated: Cluster, case: Creation) -> None:
        check_creation(unmutated, case)


class TestOtherPods:
    """They do not notice us."""

    @pytest.mark.parametrize("cluster", ["webhook"], indirect=True)
    def test_the_webhook_is_asked_about_no_other_write(self, cluster: Cluster) -> None:
        assert cluster.webhook
        before = list(cluster.webhook.calls)
        cluster.create(pod(container(), annotations={"cotenant.io/note": "x", "other": "y"}))
        cluster.api(KUBELET).patch("Pod", "bound", {"status": {"phase": "Running"}}, subresource="status")
        cluster.api(ALICE).patch("Pod", "bound", {"metadata": {"labels": {"a": "b"}}})
        cluster.api(EXTENDER).call(
            "POST",
            f"{PODS}/unbound/binding",
            {
                "apiVersion": "v1",
                "kind": "Binding",
                "metadata": {"name": "unbound", "annotations": dict.fromkeys(FORGEABLE, "x")},
                "target": {"kind": "Node", "name": "n1"},
            },
            query=DRY_RUN,
        )
        assert before == cluster.webhook.calls

    def test_a_pod_without_containers_hears_so_from_kubernetes(self, cluster: Cluster) -> None:
        with pytest.raises(ApiError, match="containers: Required value"):
            cluster.create(pod())

    def test_very_many_annotations_hold_nobody_up(self, cluster: Cluster) -> None:
        """To look through 20,000 of them would take the API server longer than it has for an answer."""
        crowded = pod(container(), annotations={f"n{n}": "" for n in range(20_000)})
        if cluster.webhook is None:
            with pytest.raises(ApiError, match="20000 annotations are more than the 1000 that are looked through"):
                cluster.create(crowded)
            return
        crowded["metadata"] = {"name": "crowded", "annotations": crowded["metadata"]["annotations"]}
        cluster.api(ALICE).create(crowded)
        before = list(cluster.webhook.calls)
        cluster.api(KUBELET).patch("Pod", "crowded", {"status": {"phase": "Running"}}, subresource="status")
        assert before == cluster.webhook.calls
        with pytest.raises(ApiError, match="written only by Cotenant's extender"):
            cluster.api(ALICE).patch("Pod", "crowded", {"metadata": {"annotations": {"cotenant.io/grant": "x"}}})
