"""What the stand-in can do that the original cannot: go wrong on demand, and be looked into."""

import threading
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pytest

from cotenant.cluster import (
    ApiError,
    Cluster,
    Conflict,
    Forbidden,
    Gone,
    NotFound,
    ServerError,
    Unauthorized,
    Unreachable,
    connect,
)
from cotenant.standins.api_rules import EVENTS, LEASES, NODES, PODS, RESOURCES
from cotenant.standins.api_server import ApiServer, Refused, Write

PATH = "/api/v1/namespaces/default/pods"
A_POD = b'{"metadata":{"name":"one"},"spec":{"containers":[]}}'


class TestFaults:
    """A fault meets as many requests as it was made for, of the kind that it was made for, and no other."""

    def test_a_refusal_meets_its_requests_only(self, api: ApiServer, cluster: Cluster) -> None:
        api.faults.refuse(500, method="POST", path=r"/pods$", times=2)

        cluster.get(PATH)
        for _ in range(2):
            with pytest.raises(ServerError):
                cluster.post(PATH, A_POD)

        assert 201 == cluster.post(PATH, A_POD).status

    def test_faults_strike_in_the_order_in_which_they_were_made(self, api: ApiServer, cluster: Cluster) -> None:
        api.faults.refuse(404)
        api.faults.refuse(403)

        with pytest.raises(NotFound):
            cluster.get(PATH)
        with pytest.raises(Forbidden):
            cluster.get(PATH)

    def test_a_fault_that_was_taken_back_does_not_strike(self, api: ApiServer, cluster: Cluster) -> None:
        api.faults.refuse(500)
        api.faults.clear()

        assert 200 == cluster.get(PATH).status

    def test_a_held_request_does_nothing_until_it_is_released(self, api: ApiServer, cluster: Cluster) -> None:
        held = api.faults.hold(method="POST")
        request = threading.Thread(target=cluster.post, args=(PATH, A_POD))
        request.start()

        assert held.reached.wait(20)
        assert api.pod("one") is None
        held.release()
        request.join(20)

        assert api.pod("one") is not None

    def test_a_delayed_request_is_done_all_the_same(self, api: ApiServer, cluster: Cluster) -> None:
        api.faults.delay(0.01)

        assert 201 == cluster.post(PATH, A_POD).status

    def test_a_lost_request_is_not_done_and_a_lost_reply_is(self, api: ApiServer, cluster: Cluster) -> None:
        api.faults.lose_request()
        with pytest.raises(Unreachable):
            cluster.post(PATH, A_POD)
        assert api.pod("one") is None

        api.faults.lose_reply()
        with pytest.raises(Unreachable):
            cluster.post(PATH, A_POD)
        assert api.pod("one") is not None

    def test_a_continued_list_is_gone_after_a_compaction(self, api: ApiServer, cluster: Cluster) -> None:
        for name in ("a", "b"):
            api.add_pod(name)
        token = cluster.get(PATH, query={"limit": "1"}).body.partition(b'"continue":"')[2].partition(b'"')[0].decode()
        api.compact()

        with pytest.raises(Gone):
            cluster.get(PATH, query={"limit": "1", "continue": token})


class TestRecord:
    """Every request that wants to change something is written down with its answer."""

    def test_writes_are_recorded_with_their_answers(self, api: ApiServer, cluster: Cluster) -> None:
        cluster.post(PATH, A_POD)
        cluster.get(f"{PATH}/one")
        cluster.patch(f"{PATH}/one/status", b'{"status":{"phase":"Running"}}')
        with pytest.raises(Conflict):
            cluster.post(PATH, A_POD)
        api.faults.lose_request()
        with pytest.raises(Unreachable):
            cluster.post(f"{PATH}/one/binding", b"{}")

        assert [
            Write("create", "pods", "", "default", "", 201),
            Write("patch", "pods", "status", "default", "one", 200),
            Write("create", "pods", "", "default", "", 409),
            Write("create", "pods", "binding", "default", "one", 0),
        ] == api.writes

    def test_writes_tell_whose_they_are(self, api: ApiServer, tmp_path: Path) -> None:
        for user in ("", "alice"):
            with connect(api.kubeconfig(tmp_path / f"{user}.kubeconfig", user=user)) as own:
                own.post(PATH, A_POD.replace(b"one", f"of-{user or 'nobody'}".encode()))

        assert ["", "alice"] == [write.user for write in api.writes]

    def test_a_token_that_is_required_may_be_a_users(self, tmp_path: Path) -> None:
        with (
            ApiServer(token="secret") as server,
            connect(server.kubeconfig(tmp_path / "kubeconfig", user="alice")) as own,
        ):
            own.get(PATH)


class TestAdmission:
    """The hook sees each new pod and has the last word."""

    def test_the_hook_changes_a_pod_however_it_is_created(self, tmp_path: Path) -> None:
        def admit(pod: dict[str, Any]) -> dict[str, Any]:
            return {**pod, "spec": {**pod["spec"], "schedulerName": "cotenant"}}

        with ApiServer(admit=admit) as api:
            connect(api.kubeconfig(tmp_path / "kubeconfig")).post(PATH, A_POD)
            api.add_pod("two")
            api.add_node("n1")

            assert ["cotenant", "cotenant"] == [pod["spec"]["schedulerName"] for pod in api.pods()]

    def test_the_hook_refuses_a_pod_with_a_sentence(self, tmp_path: Path) -> None:
        def admit(_: dict[str, Any]) -> dict[str, Any]:
            raise Refused(403, "Forbidden", "the annotation cotenant.io/grant is not yours to set")

        with ApiServer(admit=admit) as api:
            with pytest.raises(Forbidden, match="not yours to set"):
                connect(api.kubeconfig(tmp_path / "kubeconfig")).post(PATH, A_POD)

            assert [] == api.pods()


class TestLife:
    """It can be waited for, it goes away and comes back."""

    def test_a_wait_ends_when_the_condition_comes_to_hold(self, api: ApiServer) -> None:
        creator = threading.Thread(target=api.add_pod, args=("one",))
        creator.start()

        assert api.wait_until(lambda: api.pod("one"), timeout=20)
        assert not api.wait_until(lambda: api.pod("two"), timeout=0.01)
        creator.join()

    def test_after_an_outage_everything_is_still_there(self, api: ApiServer, cluster: Cluster) -> None:
        api.add_node("n1")
        url = api.url

        api.stop()
        with pytest.raises(Unreachable):
            cluster.get("/api/v1/nodes")
        api.start()

        assert url == api.url
        assert b'"n1"' in cluster.get("/api/v1/nodes").body

    def test_a_stop_ends_frozen_watches_too(self, api: ApiServer, cluster: Cluster) -> None:
        stream = cluster.stream(PATH, query={"watch": "1"}, silence=20)
        assert api.wait_until(lambda: api.watching == 1)
        api.freeze_watches()

        api.stop()

        assert api.wait_until(lambda: api.watching == 0)
        stream.close()

    def test_only_the_right_token_is_let_in(self, tmp_path: Path) -> None:
        with ApiServer(token="right") as api:
            good = connect(api.kubeconfig(tmp_path / "good"))
            api.token = "other"
            bad = connect(api.kubeconfig(tmp_path / "bad"))
            api.token = "right"

            assert 200 == good.get(PATH).status
            with pytest.raises(Unauthorized):
                bad.get(PATH)


class TestRequestsThatMakeNoSense:
    """They get a Status, never a broken connection."""

    @pytest.mark.parametrize(
        "path", ["/", "/api/v1/secrets", "/apis/apps/v1/deployments", f"{PATH}/one/exec", "/api/v2"]
    )
    def test_an_unknown_path_is_not_found(self, path: str, cluster: Cluster) -> None:
        with pytest.raises(NotFound):
            cluster.patch(path, b"{}")

    @pytest.mark.parametrize("body", [b"", b"[]", b"{", b"\xff"])
    def test_a_body_that_is_no_object_is_a_bad_request(self, body: bytes, cluster: Cluster) -> None:
        with pytest.raises(Exception, match=r"400 BadRequest"):
            cluster.post(PATH, body)

    def test_a_patch_of_an_unknown_type_is_refused(self, api: ApiServer, cluster: Cluster) -> None:
        api.add_pod("one")

        with pytest.raises(Exception, match=r"415 UnsupportedMediaType"):
            cluster.patch(f"{PATH}/one", b"{}", content_type="application/json-patch+json")


def test_leases_and_events_are_kept_as_they_are(api: ApiServer) -> None:
    api.create(LEASES, {"metadata": {"name": "leader"}, "spec": {"holderIdentity": "a"}}, "kube-system")
    api.create(EVENTS, {"metadata": {"generateName": "pod-"}, "reason": "Bound"}, "default")

    lease = api.patch(LEASES, "leader", {"spec": {"holderIdentity": "b"}}, namespace="kube-system")

    assert "b" == lease["spec"]["holderIdentity"]
    assert ["Bound"] == [event["reason"] for event in api.events()]


def test_a_scene_is_set_in_one_call(api: ApiServer) -> None:
    api.add_node("n1", allocatable={"cotenant.io/gpu-mem": "79"}, labels={"gpu": "yes"})
    api.add_pod("old", spec={"nodeName": "n1"}, status={"phase": "Running"})
    api.set_phase("old", "Succeeded", reason="Completed")
    api.patch(NODES, "n1", {"metadata": {"annotations": {"a": "b"}}})

    assert ("Succeeded", "Completed") == (api.pods()[0]["status"]["phase"], api.pods()[0]["status"]["reason"])
    assert ("79", {"a": "b"}) == (
        api.nodes()[0]["status"]["allocatable"]["cotenant.io/gpu-mem"],
        api.nodes()[0]["metadata"]["annotations"],
    )
    assert [PODS.kind] == [pod["kind"] for pod in api.pods()]


class TestKubectl:
    """What kubectl asks for besides what our programs do, so that the demo can be asked as a cluster is."""

    def test_it_tells_of_every_resource_where_it_answers(self, cluster: Cluster) -> None:
        groups = msgspec.json.decode(cluster.get("/apis").body)["groups"]
        roots = ["/api/v1", *(f"/apis/{one['preferredVersion']['groupVersion']}" for one in groups)]

        told = [(root, one) for root in roots for one in msgspec.json.decode(cluster.get(root).body)["resources"]]

        assert {(one.root, one.plural) for one in RESOURCES} == {(root, one["name"]) for root, one in told}
        for root, one in told:
            assert f"{one['kind']}List" == msgspec.json.decode(cluster.get(f"{root}/{one['name']}").body)["kind"]

    def test_it_checks_fields_by_itself_so_that_kubectl_needs_no_schema(self, cluster: Cluster) -> None:
        paths = msgspec.json.decode(cluster.get("/openapi/v3").body)["paths"]

        (pods,) = (
            path["patch"]
            for path in msgspec.json.decode(cluster.get(paths["api/v1"]["serverRelativeURL"]).body)["paths"].values()
            if path["patch"]["x-kubernetes-group-version-kind"]["kind"] == "Pod"
        )
        assert "fieldValidation" in {one["name"] for one in pods["parameters"]}

    def test_a_dry_run_shows_the_pod_as_admission_has_it_and_keeps_nothing(self, tmp_path: Path) -> None:
        readied = {"kind": "Pod", "metadata": {"name": "one", "uid": "u"}, "spec": {"schedulerName": "ours"}}
        with ApiServer(admit=lambda _: readied) as api, connect(api.kubeconfig(tmp_path / "kubeconfig")) as cluster:
            shown = cluster.post(f"{PATH}?dryRun=All", A_POD)

            assert "ours" == msgspec.json.decode(shown.body)["spec"]["schedulerName"]
            assert [] == api.pods()

    def test_a_body_in_chunks_is_read_as_one_of_a_length_is(self, api: ApiServer) -> None:
        connection = HTTPConnection(urlsplit(api.url).netloc)
        connection.request("POST", PATH, iter([A_POD[:9], A_POD[9:]]), encode_chunked=True)

        assert 201 == connection.getresponse().status
        assert api.pod("one")

    def test_a_watch_that_would_begin_with_a_list_is_refused_so_that_clients_list(self, cluster: Cluster) -> None:
        with pytest.raises(ApiError, match="sendInitialEvents"):
            cluster.get(f"{PATH}?watch=true&sendInitialEvents=true")
