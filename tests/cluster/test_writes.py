import re
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from cotenant.cluster import Cluster, Conflict, Invalid, NotFound, writes
from cotenant.contract.pods import Pod
from cotenant.standins.api_server import ApiServer

HOSTILE_NAMES = ["", "..", "../nodes", "a/b", "a%2fb", "a?x=1", "a#b", "Upper", "-a", "a\n", "é", "a" * 254, "a..b"]


def uid_of(obj: dict[str, Any]) -> str:
    uid: str = obj["metadata"]["uid"]
    return uid


def record(cluster: Cluster, regarding: writes.Regarding, *, instance: str = "plugin-0") -> None:
    """Record an Event of which only that matters."""
    writes.record_event(
        cluster,
        regarding=regarding,
        kind="Normal",
        reason="Tested",
        action="Testing",
        note="it is told",
        at=datetime.now(UTC),
        reporter="cotenant.io/device-plugin",
        instance=instance,
    )


class TestBind:
    """A pod gets its node and its annotations together, or nothing."""

    def test_node_and_annotations_arrive_in_one_write(self, api: ApiServer, cluster: Cluster) -> None:
        pod = api.add_pod("one", annotations={"stays": "1", "cotenant.io/grant": "forged"})

        writes.bind(
            cluster,
            namespace="default",
            name="one",
            uid=uid_of(pod),
            node="n1",
            annotations={"cotenant.io/grant": "{}", "visible-devices.cotenant.io/main": "GPU-1"},
        )

        bound = api.pod("one")
        assert bound is not None
        assert "n1" == bound["spec"]["nodeName"]
        assert {
            "stays": "1",
            "cotenant.io/grant": "{}",
            "visible-devices.cotenant.io/main": "GPU-1",
        } == bound["metadata"]["annotations"]
        assert [("create", "binding", 201)] == [(w.verb, w.subresource, w.status) for w in api.writes]

    def test_another_pod_of_the_same_name_is_left_alone(self, api: ApiServer, cluster: Cluster) -> None:
        api.add_pod("one")

        with pytest.raises(Conflict, match="UID in precondition: of-the-old-one"):
            writes.bind(
                cluster, namespace="default", name="one", uid="of-the-old-one", node="n1", annotations={"a": "b"}
            )

        assert "nodeName" not in api.pods()[0]["spec"]
        assert {} == api.pods()[0]["metadata"]["annotations"]

    def test_a_pod_that_is_gone_is_not_found(self, cluster: Cluster) -> None:
        with pytest.raises(NotFound):
            writes.bind(cluster, namespace="default", name="one", uid="u", node="n1", annotations={})

    @pytest.mark.parametrize(
        "key",
        [
            "",
            "/",
            "/name",
            "prefix/",
            "a/b/c",
            "Upper.example/name",
            "white space",
            "cotenant.io/-main",
            "cotenant.io/" + "n" * 64,
            "p" * 254 + "/name",
            "under_score.io/name",
            "cotenant.io/a\n",
        ],
    )
    def test_an_annotation_that_would_break_the_pod_for_ever_is_never_sent(
        self, key: str, api: ApiServer, cluster: Cluster
    ) -> None:
        pod = api.add_pod("one")

        with pytest.raises(Invalid, match="cannot be the key of an annotation"):
            writes.bind(cluster, namespace="default", name="one", uid=uid_of(pod), node="n1", annotations={key: "v"})

        assert [] == api.writes

    def test_annotations_over_256_kib_are_never_sent(self, api: ApiServer, cluster: Cluster) -> None:
        pod = api.add_pod("one")
        # key 1 byte + value: 262,144 are allowed, one more is not
        fits, over = {"k": "v" * 262_143}, {"k": "v" * 262_144}

        with pytest.raises(Invalid, match="annotations of 262145 bytes"):
            writes.bind(cluster, namespace="default", name="one", uid=uid_of(pod), node="n1", annotations=over)
        writes.bind(cluster, namespace="default", name="one", uid=uid_of(pod), node="n1", annotations=fits)

        assert [201] == [write.status for write in api.writes]

    @pytest.mark.parametrize("name", HOSTILE_NAMES)
    def test_no_name_reaches_another_path(self, name: str, api: ApiServer, cluster: Cluster) -> None:
        for names in ({"name": name}, {"namespace": name}, {"node": name}):
            arguments: dict[str, Any] = {"namespace": "default", "name": "one", "node": "n1", **names}
            with pytest.raises(Invalid, match="is not the name of a Kubernetes object"):
                writes.bind(cluster, uid="u", annotations={}, **arguments)

        assert [] == api.writes


class TestOtherWrites:
    """Each does its one thing."""

    def test_a_pod_is_read_as_it_is_now(self, api: ApiServer, cluster: Cluster) -> None:
        api.add_pod("one", annotations={"a": "b"})

        pod = msgspec.json.decode(writes.get_pod(cluster, namespace="default", name="one"), type=Pod)

        assert ("default/one", {"a": "b"}) == (pod.key, pod.annotations)

    def test_a_nomination_leaves_the_rest_of_the_status(self, api: ApiServer, cluster: Cluster) -> None:
        pod = api.add_pod("one", status={"phase": "Pending", "conditions": [{"type": "PodScheduled"}]})

        writes.nominate(cluster, namespace="default", name="one", uid=uid_of(pod), node="n7")

        assert {
            "phase": "Pending",
            "conditions": [{"type": "PodScheduled"}],
            "nominatedNodeName": "n7",
        } == api.pods()[0]["status"]

    def test_a_nomination_does_not_reach_another_pod_of_the_same_name(self, api: ApiServer, cluster: Cluster) -> None:
        api.add_pod("one")

        with pytest.raises(Invalid, match=r"metadata\.uid"):
            writes.nominate(cluster, namespace="default", name="one", uid="of-the-old-one", node="n7")

        assert "nominatedNodeName" not in api.pods()[0]["status"]

    def test_annotations_of_a_node_are_set_and_taken_away(self, api: ApiServer, cluster: Cluster) -> None:
        api.add_node("n1", annotations={"stays": "1", "goes": "2"})

        writes.annotate_node(cluster, "n1", {"cotenant.io/gpus": "{}", "goes": None})

        assert {"stays": "1", "cotenant.io/gpus": "{}"} == api.nodes()[0]["metadata"]["annotations"]

    def test_an_event_says_what_happened_to_which_object(self, api: ApiServer, cluster: Cluster) -> None:
        pod = api.add_pod("one")

        writes.record_event(
            cluster,
            regarding=writes.Regarding(kind="Pod", name="one", namespace="default", uid=uid_of(pod)),
            kind="Warning",
            reason="NoGPUFits",
            action="Scheduling",
            note="é" * 1000,  # 2,000 bytes: 1,024 may stay, 512 letters
            at=datetime(2026, 11, 22, 12, 0, 0, 5, tzinfo=UTC),
            reporter="cotenant.io/extender",
            instance="extender-0",
        )

        (event,) = api.events("default")
        assert event["metadata"]["name"].startswith("one.")
        assert {
            "kind": "Pod",
            "name": "one",
            "namespace": "default",
            "uid": uid_of(pod),
            "apiVersion": "v1",
        } == event["regarding"]
        assert ("Warning", "NoGPUFits", "Scheduling") == (event["type"], event["reason"], event["action"])
        assert "é" * 512 == event["note"]
        assert "2026-11-22T12:00:00.000005Z" == event["eventTime"]

    def test_an_event_of_a_node_lies_in_the_default_namespace(self, api: ApiServer, cluster: Cluster) -> None:
        record(cluster, writes.Regarding(kind="Node", name="n1"))

        assert [("Node", "n1")] == [(e["regarding"]["kind"], e["regarding"]["name"]) for e in api.events("default")]

    def test_an_event_has_an_instance_that_kubernetes_takes(self, api: ApiServer, cluster: Cluster) -> None:
        # The device plugin's is its node, whose name may have 253 letters; kube-apiserver takes 128 and no more.
        node = "a" * 253
        record(cluster, writes.Regarding(kind="Node", name=node), instance=node)

        assert ["a" * 128] == [event["reportingInstance"] for event in api.events("default")]

    @pytest.mark.parametrize("name", ["one", "a" * 253, "a" * 199 + "-" + "a" * 20, "a" * 199 + ".b"])
    def test_an_event_has_a_name_that_kubernetes_takes(self, api: ApiServer, cluster: Cluster, name: str) -> None:
        # The stand-in takes any name, and kube-apiserver no generateName that ends in a dot.
        record(cluster, writes.Regarding(kind="Pod", name=name, namespace="default", uid="u"))

        (event,) = api.events("default")
        assert "generateName" not in event["metadata"]
        assert re.fullmatch(
            r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*", event["metadata"]["name"]
        )
        assert len(event["metadata"]["name"]) <= 253
