"""What a device plugin keeps of the pods of its node, whoever made them."""

from pathlib import Path

from cotenant.cluster import connect
from cotenant.contract.pods import STATIC_UID
from cotenant.standins.api_rules import PODS
from cotenant.standins.api_server import ApiServer
from device_plugin.admission.identity import PodName
from device_plugin.cluster.pods import NodePods
from tests.builders import NAMES, a_grant, a_pod, granted
from tests.extender.running import PATIENCE, eventually


def create(api: ApiServer, name: str) -> None:
    body = a_pod().named(name).bound_to("n1", a_grant(granted({"GPU-0": 1 << 30}, units=1))).as_json()
    body["metadata"]["annotations"] |= {STATIC_UID: "hash", "note": "x"}
    api.store.create(PODS, body, namespace="default", keep_status=True)


def test_of_annotations_only_those_are_kept_that_are_read(tmp_path: Path) -> None:
    """Anybody may put a node's name into pods: a thousand with 240 KiB each took more than the plugin may have."""
    with ApiServer() as api, connect(api.kubeconfig(tmp_path / "kubeconfig")) as cluster:
        pods = NodePods(cluster, "n1", NAMES)
        create(api, "listed")
        pods.start(wait_seconds=PATIENCE)
        create(api, "watched")
        assert eventually(lambda: pods.known(PodName("default", "watched")) is not None)
        kept = {pod.metadata.name: set(pod.annotations) for pod in pods.all_known()}
        pods.stop()

    assert {key: {NAMES.grant, STATIC_UID} for key in ("listed", "watched")} == kept
