"""The stand-in against the original: each behaviour that our programs count on, asked of both.

kube-apiserver takes part where its binary and etcd are found (`e2e/build.sh` builds it); otherwise only the stand-in is
asked, whose answers below are those that the original gave.
"""

import json
import tempfile
import threading
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import urllib3
import yaml

from cotenant.cluster import Reflector, Unreadable, connect, writes
from cotenant.contract.pods import Pod
from cotenant.standins.api_server import ApiServer
from e2e.cluster import ControlPlane
from e2e.processes import MissingProgramError, find_program

PODS = "/api/v1/namespaces/default/pods"
MERGE = "application/merge-patch+json"
STRATEGIC = "application/strategic-merge-patch+json"
Json = dict[str, Any]


class Server:
    """Ask one API server, whichever it is."""

    def __init__(self, kubeconfig: Path) -> None:
        config = yaml.safe_load(kubeconfig.read_text())
        cluster = config["clusters"][0]["cluster"]
        self.kubeconfig = str(kubeconfig)
        self._url = cluster["server"]
        self._headers = {"Authorization": f"Bearer {config['users'][0]['user']['token']}"}
        self._pool = urllib3.PoolManager(ca_certs=cluster.get("certificate-authority"))

    def ask(self, method: str, path: str, body: object = None, content: str = "application/json") -> tuple[int, Json]:
        answer = self._pool.request(
            method,
            self._url + path,
            body=None if body is None else json.dumps(body),
            headers={**self._headers, "Content-Type": content},
            timeout=30,
        )
        return answer.status, answer.json()

    def watch(self, path: str) -> list[Json]:
        """Give the events of a watch that ends by itself."""
        answer = self._pool.request("GET", self._url + path, headers=self._headers, timeout=30)
        return [json.loads(line) for line in answer.data.splitlines()]

    def a_pod(self, name: str, *, annotations: Json | None = None, **spec: object) -> Json:
        body = {
            "metadata": {"name": name, "annotations": annotations or {}, "labels": {"app": name}},
            "spec": {
                "containers": [
                    {"name": "main", "image": "none", "resources": {"limits": {"cotenant.io/gpu-mem": "8"}}}
                ],
                "automountServiceAccountToken": False,
                **spec,
            },
        }
        status, pod = self.ask("POST", PODS, body)
        assert 201 == status, pod
        return pod

    def bind(self, name: str, *, uid: str = "", node: str = "n1", **metadata: object) -> tuple[int, Json]:
        body = {
            "metadata": {"name": name, **({"uid": uid} if uid else {}), **metadata},
            "target": {"kind": "Node", "name": node},
        }
        return self.ask("POST", f"{PODS}/{name}/binding", body)


@pytest.fixture(scope="module", params=["stand-in", "kube-apiserver"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as directory:
        if request.param == "stand-in":
            with ApiServer() as api:
                yield Server(Path(api.kubeconfig(Path(directory) / "kubeconfig")))
            return
        try:
            find_program("kube-apiserver")
            find_program("etcd")
        except MissingProgramError as missing:
            pytest.skip(str(missing))
        with ControlPlane(Path(directory)) as plane:
            yield Server(plane.kubeconfig())


@pytest.fixture
def name() -> str:
    return f"pod-{uuid.uuid4().hex[:8]}"


class TestBinding:
    """POST pods/<p>/binding: node, annotations and condition in one transaction, or a 409 that says why."""

    def test_a_pod_is_bound_with_its_annotations(self, server: Server, name: str) -> None:
        pod = server.a_pod(name, annotations={"stays": "1", "changes": "old"})

        status, answer = server.bind(name, uid=pod["metadata"]["uid"], annotations={"changes": "new", "comes": "2"})

        assert (201, "Status", "Success") == (status, answer["kind"], answer["status"])
        _, bound = server.ask("GET", f"{PODS}/{name}")
        assert "n1" == bound["spec"]["nodeName"]
        assert {"stays": "1", "changes": "new", "comes": "2"} == bound["metadata"]["annotations"]
        assert [("PodScheduled", "True")] == [(c["type"], c["status"]) for c in bound["status"]["conditions"]]
        assert int(bound["metadata"]["resourceVersion"]) > int(pod["metadata"]["resourceVersion"])

    def test_a_nomination_is_cleared(self, server: Server, name: str) -> None:
        server.a_pod(name)
        patch = {"status": {"nominatedNodeName": "n7"}}
        assert "n7" == server.ask("PATCH", f"{PODS}/{name}/status", patch, MERGE)[1]["status"]["nominatedNodeName"]

        server.bind(name)

        assert "nominatedNodeName" not in server.ask("GET", f"{PODS}/{name}")[1]["status"]

    def test_a_bound_pod_is_not_bound_again(self, server: Server, name: str) -> None:
        server.a_pod(name)
        server.bind(name)

        status, answer = server.bind(name, node="n2")

        assert (409, "Conflict") == (status, answer["reason"])
        assert (
            f'Operation cannot be fulfilled on pods/binding "{name}": pod {name} is already assigned to node "n1"'
            == answer["message"]
        )

    def test_another_uid_is_a_conflict(self, server: Server, name: str) -> None:
        server.a_pod(name)

        status, answer = server.bind(name, uid="another")

        assert (409, "Conflict") == (status, answer["reason"])
        assert "Precondition failed: UID in precondition: another" in answer["message"]

    def test_an_old_version_is_a_conflict(self, server: Server, name: str) -> None:
        server.a_pod(name)

        status, answer = server.bind(name, resourceVersion="1")

        assert (409, "Conflict") == (status, answer["reason"])
        assert "Precondition failed: ResourceVersion in precondition: 1" in answer["message"]

    def test_a_pod_that_is_not_there_is_not_found(self, server: Server, name: str) -> None:
        status, answer = server.bind(name)

        assert (404, "NotFound") == (status, answer["reason"])
        assert f'pods "{name}" not found' == answer["message"]

    def test_a_gated_pod_is_a_conflict(self, server: Server, name: str) -> None:
        server.a_pod(name, schedulingGates=[{"name": "example.com/wait"}])

        status, answer = server.bind(name)

        assert (409, "Conflict") == (status, answer["reason"])
        assert answer["message"].endswith(f"pod {name} has non-empty .spec.schedulingGates")

    def test_a_target_without_a_name_is_refused(self, server: Server, name: str) -> None:
        server.a_pod(name)

        status, answer = server.bind(name, node="")

        assert (500, "target.name: Required value") == (status, answer["message"])

    def test_a_bad_annotation_key_is_taken_and_breaks_every_later_update(self, server: Server, name: str) -> None:
        server.a_pod(name)

        assert 201 == server.bind(name, annotations={"white space": "v"})[0]

        status, answer = server.ask("PATCH", f"{PODS}/{name}/status", {"status": {"phase": "Running"}}, MERGE)
        assert (422, "Invalid") == (status, answer["reason"])
        assert "metadata.annotations: Invalid value" in answer["message"]

    def test_the_case_of_an_annotation_key_does_not_matter(self, server: Server, name: str) -> None:
        server.a_pod(name)

        server.bind(name, annotations={"Upper.Example/Name": "v"})

        assert 200 == server.ask("PATCH", f"{PODS}/{name}/status", {"status": {"phase": "Running"}}, MERGE)[0]


class TestPods:
    """Creating, patching and deleting."""

    def test_what_the_client_says_of_the_status_is_dropped_and_requests_are_filled_in(
        self, server: Server, name: str
    ) -> None:
        body = {
            "metadata": {"generateName": f"{name}-"},
            "spec": {
                "containers": [{"name": "main", "image": "none", "resources": {"limits": {"cotenant.io/gpu-mem": "8"}}}]
            },
            "status": {"phase": "Running"},
        }

        status, pod = server.ask("POST", PODS, body)

        assert 201 == status
        assert pod["metadata"]["name"].startswith(f"{name}-")
        assert "default" == pod["metadata"]["namespace"]
        assert "Pending" == pod["status"]["phase"]
        assert {"cotenant.io/gpu-mem": "8"} == pod["spec"]["containers"][0]["resources"]["requests"]
        assert "default-scheduler" == pod["spec"]["schedulerName"]

    def test_a_name_is_given_once(self, server: Server, name: str) -> None:
        pod = server.a_pod(name)

        status, answer = server.ask("POST", PODS, {"metadata": {"name": name}, "spec": pod["spec"]})

        assert (409, "AlreadyExists") == (status, answer["reason"])
        assert f'pods "{name}" already exists' == answer["message"]

    def test_a_merge_patch_removes_what_is_null(self, server: Server, name: str) -> None:
        server.a_pod(name, annotations={"goes": "1", "stays": "2"})

        _, pod = server.ask("PATCH", f"{PODS}/{name}", {"metadata": {"annotations": {"goes": None, "a": "b"}}}, MERGE)

        assert {"stays": "2", "a": "b"} == pod["metadata"]["annotations"]

    def test_a_strategic_patch_merges_conditions_by_type(self, server: Server, name: str) -> None:
        server.a_pod(name)
        server.bind(name)
        ready = {"type": "Ready", "status": "False"}

        _, pod = server.ask("PATCH", f"{PODS}/{name}/status", {"status": {"conditions": [ready]}}, STRATEGIC)

        assert {"PodScheduled": "True", "Ready": "False"} == {
            c["type"]: c["status"] for c in pod["status"]["conditions"]
        }

    def test_the_status_and_the_rest_are_changed_apart(self, server: Server, name: str) -> None:
        server.a_pod(name)
        both = {"metadata": {"annotations": {"a": "b"}}, "status": {"phase": "Running"}}

        _, pod = server.ask("PATCH", f"{PODS}/{name}", both, MERGE)
        assert ("Pending", {"a": "b"}) == (pod["status"]["phase"], pod["metadata"]["annotations"])

        both["metadata"] = {"annotations": {"a": "c"}}
        _, pod = server.ask("PATCH", f"{PODS}/{name}/status", both, MERGE)
        # the status strategy does not keep annotations from changing
        assert ("Running", {"a": "c"}) == (pod["status"]["phase"], pod["metadata"]["annotations"])

    def test_the_node_cannot_be_set_by_a_patch(self, server: Server, name: str) -> None:
        server.a_pod(name)

        status, answer = server.ask("PATCH", f"{PODS}/{name}", {"spec": {"nodeName": "n1"}}, MERGE)

        assert (422, "Invalid") == (status, answer["reason"])

    def test_a_patch_for_another_uid_is_refused(self, server: Server, name: str) -> None:
        server.a_pod(name)

        status, answer = server.ask(
            "PATCH", f"{PODS}/{name}/status", {"metadata": {"uid": "x"}, "status": {"nominatedNodeName": "n"}}, MERGE
        )

        assert (422, "Invalid") == (status, answer["reason"])
        assert "metadata.uid: Invalid value" in answer["message"]

    def test_a_patch_of_an_old_version_is_a_conflict(self, server: Server, name: str) -> None:
        server.a_pod(name)

        status, _ = server.ask("PATCH", f"{PODS}/{name}", {"metadata": {"resourceVersion": "1"}}, MERGE)

        assert 409 == status

    def test_a_patch_that_changes_nothing_makes_no_version(self, server: Server, name: str) -> None:
        pod = server.a_pod(name, annotations={"a": "b"})

        _, same = server.ask("PATCH", f"{PODS}/{name}", {"metadata": {"annotations": {"a": "b"}}}, MERGE)

        assert pod["metadata"]["resourceVersion"] == same["metadata"]["resourceVersion"]

    def test_a_bound_pod_stays_until_the_kubelet_lets_it_go(self, server: Server, name: str) -> None:
        server.a_pod(name)
        server.bind(name)

        _, pod = server.ask("DELETE", f"{PODS}/{name}")
        assert 30 == pod["metadata"]["deletionGracePeriodSeconds"]
        assert "deletionTimestamp" in server.ask("GET", f"{PODS}/{name}")[1]["metadata"]
        assert 409 == server.bind(name)[0]

        server.ask("DELETE", f"{PODS}/{name}", {"gracePeriodSeconds": 0})
        assert 404 == server.ask("GET", f"{PODS}/{name}")[0]

    def test_a_pod_that_was_never_bound_goes_at_once(self, server: Server, name: str) -> None:
        server.a_pod(name)

        server.ask("DELETE", f"{PODS}/{name}")

        assert 404 == server.ask("GET", f"{PODS}/{name}")[0]

    def test_a_pod_that_has_ended_goes_at_once(self, server: Server, name: str) -> None:
        server.a_pod(name)
        server.bind(name)
        server.ask("PATCH", f"{PODS}/{name}/status", {"status": {"phase": "Failed"}}, MERGE)

        server.ask("DELETE", f"{PODS}/{name}")

        assert 404 == server.ask("GET", f"{PODS}/{name}")[0]

    def test_a_pod_being_deleted_cannot_be_bound(self, server: Server, name: str) -> None:
        server.a_pod(name)
        server.bind(name)
        server.ask("DELETE", f"{PODS}/{name}")

        status, answer = server.bind(name)

        assert 409 == status
        assert answer["message"].endswith(f"pod {name} is being deleted, cannot be assigned to a host")

    def test_a_deletion_for_another_uid_is_a_conflict(self, server: Server, name: str) -> None:
        server.a_pod(name)

        assert 409 == server.ask("DELETE", f"{PODS}/{name}", {"preconditions": {"uid": "x"}})[0]
        assert 200 == server.ask("GET", f"{PODS}/{name}")[0]


class TestNodes:
    """Nodes keep the status that they are created with, so that a scene is quickly set."""

    def test_a_node_is_created_with_its_status_and_patched_by_halves(self, server: Server, name: str) -> None:
        status, node = server.ask(
            "POST",
            "/api/v1/nodes",
            {"metadata": {"name": name}, "status": {"allocatable": {"cotenant.io/gpu-mem": "9"}}},
        )
        assert 201 == status
        assert {"cotenant.io/gpu-mem": "9"} == node["status"]["allocatable"]
        assert "namespace" not in node["metadata"]

        both = {"metadata": {"annotations": {"a": "b"}}, "status": {"allocatable": {"cotenant.io/gpu-mem": "1"}}}
        _, node = server.ask("PATCH", f"/api/v1/nodes/{name}", both, MERGE)
        assert ({"a": "b"}, "9") == (
            {key: value for key, value in node["metadata"]["annotations"].items() if key == "a"},
            node["status"]["allocatable"]["cotenant.io/gpu-mem"],
        )
        _, node = server.ask("PATCH", f"/api/v1/nodes/{name}/status", both, MERGE)
        assert "1" == node["status"]["allocatable"]["cotenant.io/gpu-mem"]


class TestLists:
    """Pages are one snapshot; selectors select."""

    def test_pages_show_what_was_there_when_the_first_was_asked_for(self, server: Server, name: str) -> None:
        for number in range(5):
            server.a_pod(f"{name}-{number}")
        path = f"{PODS}?limit=2&resourceVersion="

        _, page = server.ask("GET", path)
        version = page["metadata"]["resourceVersion"]
        server.a_pod(f"{name}-later")
        names = [item["metadata"]["name"] for item in page["items"]]
        while token := page["metadata"].get("continue"):
            assert 2 == len(page["items"])
            _, page = server.ask("GET", f"{PODS}?limit=2&continue={token}")
            assert version == page["metadata"]["resourceVersion"]
            names += [item["metadata"]["name"] for item in page["items"]]

        assert [f"{name}-{number}" for number in range(5)] == [n for n in names if n.startswith(name)]
        assert len(set(names)) == len(names)

    def test_fields_and_labels_select(self, server: Server, name: str) -> None:
        for suffix in ("a", "b"):
            server.a_pod(f"{name}-{suffix}")
        server.bind(f"{name}-a", node=f"node-{name}")

        def names(query: str) -> list[str]:
            return [item["metadata"]["name"] for item in server.ask("GET", f"/api/v1/pods?{query}")[1]["items"]]

        assert [f"{name}-a"] == names(f"fieldSelector=spec.nodeName%3Dnode-{name}")
        assert [f"{name}-b"] == names(f"fieldSelector=metadata.name%3D{name}-b,spec.nodeName%3D")
        assert [f"{name}-b"] == names(f"labelSelector=app%3D{name}-b")


class TestWatches:
    """A watch shows what happens after its version, as its selector sees it."""

    def test_changes_follow_the_version(self, server: Server, name: str) -> None:
        version = server.a_pod(name)["metadata"]["resourceVersion"]
        server.bind(name)
        server.ask("DELETE", f"{PODS}/{name}?gracePeriodSeconds=0")

        events = server.watch(f"{PODS}?watch=1&timeoutSeconds=2&resourceVersion={version}")

        # bound, marked, gone
        told = [event["type"] for event in events if event["object"]["metadata"]["name"] == name]
        assert ["MODIFIED", "MODIFIED", "DELETED"] == told

    def test_what_enters_a_selection_is_added_and_what_leaves_it_is_deleted(self, server: Server, name: str) -> None:
        version = server.a_pod(name)["metadata"]["resourceVersion"]
        server.bind(name)
        query = f"watch=1&timeoutSeconds=2&resourceVersion={version}&fieldSelector=metadata.name%3D{name},spec.nodeName"

        assert ["ADDED"] == [event["type"] for event in server.watch(f"{PODS}?{query}%3Dn1")]
        assert ["DELETED"] == [event["type"] for event in server.watch(f"{PODS}?{query}%3D")]

    def test_a_watch_from_nowhere_begins_with_what_is_there(self, server: Server, name: str) -> None:
        server.a_pod(name)

        events = server.watch(f"{PODS}?watch=1&timeoutSeconds=1&fieldSelector=metadata.name%3D{name}")

        assert ["ADDED"] == [event["type"] for event in events]


class Seen:
    """A sink that counts."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.unread: list[Unreadable] = []
        self.told = threading.Condition()

    def replaced(self, objects: list[Pod], _: int, unreadable: list[Unreadable]) -> None:
        self.names = {pod.metadata.name for pod in objects}
        self.unread += unreadable

    def changed(self, _: str, obj: Pod) -> None:
        with self.told:
            self.names.add(obj.metadata.name)
            self.told.notify_all()

    def unreadable(self, _: str, obj: Unreadable) -> None:
        self.unread.append(obj)


def test_our_writes_are_taken(server: Server, name: str) -> None:
    uid = server.a_pod(name)["metadata"]["uid"]
    server.ask("POST", "/api/v1/nodes", {"metadata": {"name": name}})
    with connect(server.kubeconfig) as cluster:
        writes.nominate(cluster, namespace="default", name=name, uid=uid, node=name)
        writes.bind(
            cluster, namespace="default", name=name, uid=uid, node=name, annotations={"cotenant.io/grant": "{}"}
        )
        writes.annotate_node(cluster, name, {"cotenant.io/gpus": "{}"})
        writes.annotate_node(cluster, name, {"cotenant.io/gpus": None})
        writes.record_event(
            cluster,
            regarding=writes.Regarding(kind="Pod", name=name, namespace="default", uid=uid),
            kind="Warning",
            reason="NoGPUFits",
            action="Scheduling",
            note="é" * 1000,
            at=datetime.now(UTC),
            reporter="cotenant.io/extender",
            instance="extender-0",
        )
        pod = json.loads(writes.get_pod(cluster, namespace="default", name=name))

    assert (name, "{}") == (pod["spec"]["nodeName"], pod["metadata"]["annotations"]["cotenant.io/grant"])
    _, events = server.ask("GET", "/apis/events.k8s.io/v1/namespaces/default/events")
    assert ["é" * 512] == [event["note"] for event in events["items"] if event["regarding"].get("uid") == uid]


@pytest.mark.parametrize("prefix", ["pod.", "-", "Pod-", "a_b"])
def test_a_generated_name_must_begin_as_a_name(prefix: str, server: Server, name: str) -> None:
    pod = server.a_pod(name)

    status, answer = server.ask("POST", PODS, {"metadata": {"generateName": prefix}, "spec": pod["spec"]})

    assert (422, "Invalid") == (status, answer["reason"])
    assert "metadata.generateName: Invalid value" in answer["message"]


def test_a_reflector_follows_it_and_stops_at_once(server: Server, name: str) -> None:
    server.a_pod(name)
    seen = Seen()
    with connect(server.kubeconfig) as cluster:
        reflector = Reflector(cluster, "/api/v1/pods", Pod, seen, silence=1000.0)
        reflector.start()
        assert reflector.synced.wait(20)
        assert name in seen.names
        server.a_pod(f"{name}-later")
        with seen.told:
            assert seen.told.wait_for(lambda: f"{name}-later" in seen.names, 20)

        assert reflector.stop(timeout=20)
    assert [] == seen.unread
    assert 0 == reflector.counts.errors
