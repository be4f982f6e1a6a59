"""The ground stands: the real components do what every other end-to-end test relies on."""

import json
from collections.abc import Iterator

import pytest

from e2e import nodes
from e2e.cluster import ControlPlane
from e2e.node import RealNode, container, env_from_annotation, pod
from e2e.plugin import ScriptedPlugin, held
from e2e.rest import Api, ApiError, Object

IDS = ["one", "two", "three", "four"]


@pytest.fixture
def api(control_plane: ControlPlane) -> Iterator[Api]:
    """A client as admin; the pods that a test leaves are deleted after it."""
    client = control_plane.api()
    yield client
    client.delete_pods()


def running(seen: Object | None) -> bool:
    """Whether the pod runs; one that failed never will."""
    phase = seen["status"].get("phase") if seen else None
    assert phase != "Failed", seen
    return phase == "Running"


class TestControlPlane:
    """etcd, kube-apiserver and kube-scheduler."""

    def test_a_binding_writes_its_annotations_and_the_node_in_one_write(
        self, control_plane: ControlPlane, api: Api
    ) -> None:
        created = api.create(pod("bound", annotations={"kept.example/a": "before"}))
        _, offset = control_plane.audit()

        api.bind("bound", "nowhere", uid=created["metadata"]["uid"], annotations={"new.example/b": "at bind"})

        bound = api.get("Pod", "bound")
        writes, _ = control_plane.audit(offset=offset)
        assert "nowhere" == bound["spec"]["nodeName"]
        assert {"kept.example/a": "before", "new.example/b": "at bind"} == bound["metadata"]["annotations"]
        assert [("create", "pods", "binding", 201)] == [
            (write.verb, write.resource, write.subresource, write.code) for write in writes if write.name == "bound"
        ]
        api.delete("Pod", "bound", grace_s=0)  # no kubelet would end it

    def test_a_binding_of_another_pod_of_the_same_name_is_refused(self, api: Api) -> None:
        api.create(pod("renewed"))

        with pytest.raises(ApiError) as refused:
            api.bind("renewed", "nowhere", uid="00000000-0000-0000-0000-000000000000")

        assert 409 == refused.value.code
        assert "nodeName" not in api.get("Pod", "renewed")["spec"]

    def test_the_scheduler_places_a_pod_on_a_fake_node_that_has_the_units(
        self, control_plane: ControlPlane, api: Api
    ) -> None:
        # 2 GPUs of 4 GiB are 8 units of 1 GiB: 8 fit, 9 do not.
        nodes.register(api, 3, nodes.Shape(gpus=2, gpu_bytes=4 << 30), prefix="ground")
        scheduler = control_plane.start_scheduler(
            {
                "apiVersion": "kubescheduler.config.k8s.io/v1",
                "kind": "KubeSchedulerConfiguration",
                "profiles": [{"schedulerName": "ground"}],
            }
        )
        try:
            for name, units in (("fits", 8), ("misses", 9)):
                api.create(
                    pod(
                        name,
                        container(limits={"cotenant.io/gpu-mem": units}),
                        spec={"schedulerName": "ground"},
                    )
                )

            placed = api.bound("fits")
            api.unschedulable("misses", "Insufficient cotenant.io/gpu-mem")
        finally:
            control_plane.stop_scheduler(scheduler)
            nodes.delete(api, prefix="ground")
        assert placed["spec"]["nodeName"].startswith("ground-")
        api.delete("Pod", "fits", grace_s=0)

    def test_a_service_account_may_do_only_what_rbac_gives_it(self, control_plane: ControlPlane, api: Api) -> None:
        api.apply("{apiVersion: v1, kind: ServiceAccount, metadata: {name: nobody, namespace: default}}")

        kubeconfig = control_plane.service_account_kubeconfig("nobody", namespace="default")

        with pytest.raises(ApiError) as refused:
            Api.from_kubeconfig(kubeconfig).list("Node")
        assert 403 == refused.value.code
        assert "system:serviceaccount:default:nobody" in refused.value.message

    def test_two_control_planes_run_at_once(
        self, control_plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        with ControlPlane(tmp_path_factory.mktemp("second")) as second:
            second.api().create(pod("only-here"))

            assert "only-here" in [found["metadata"]["name"] for found in second.api().list("Pod")]
            assert "only-here" not in [found["metadata"]["name"] for found in control_plane.api().list("Pod")]


class TestRealNode:
    """containerd and the kubelet."""

    def test_an_annotation_of_the_binding_reaches_the_container_as_env(self, real_node: RealNode, api: Api) -> None:
        script = "echo CHOSEN=$CHOSEN; sleep 1000"
        api.create(pod("told", container(script=script, env=[env_from_annotation("CHOSEN", "chosen.example/main")])))

        api.bind("told", real_node.name, annotations={"chosen.example/main": "GPU-7"})

        told = api.wait("Pod", "told", running)
        assert "GPU-7" == real_node.environment(told)["CHOSEN"]
        assert "CHOSEN=GPU-7\n" == real_node.logs(told)

    def test_a_cdi_device_that_allocate_names_reaches_the_container(self, real_node: RealNode, api: Api) -> None:
        edits = {"env": ["FROM_CDI=yes"]}
        spec = {
            "cdiVersion": "0.6.0",
            "kind": "example.io/thing",
            "devices": [{"name": "seven", "containerEdits": edits}],
        }
        (real_node.cdi_directory / "thing.json").write_text(json.dumps(spec))
        api.create(pod("given", container(limits={"example.io/things": 3})))

        with ScriptedPlugin(
            "example.io/things", IDS, cdi_device="example.io/thing=seven", env={"FROM_ALLOCATE": "yes"}
        ):
            api.wait("Node", real_node.name, lambda node: shows(node, "example.io/things", 4), saying="4 things")
            api.bind("given", real_node.name)
            given = api.wait("Pod", "given", running)

        environment = real_node.environment(given)
        assert ("yes", "yes") == (environment["FROM_CDI"], environment["FROM_ALLOCATE"])
        assert [3] == [len(ids) for ids in held(real_node.pod_resources_socket, "example.io/things").values()]

    def test_a_killed_kubelet_comes_back_to_its_pods_and_its_plugin(self, real_node: RealNode, api: Api) -> None:
        api.create(pod("stays", container(limits={"example.io/again": 1})))
        with ScriptedPlugin("example.io/again", IDS) as plugin:
            api.wait("Node", real_node.name, lambda node: shows(node, "example.io/again", 4), saying="4 ids")
            api.bind("stays", real_node.name)
            before = api.wait("Pod", "stays", running)
            ids = held(real_node.pod_resources_socket, "example.io/again")

            real_node.restart_kubelet()
            api.create(pod("comes"))
            api.bind("comes", real_node.name)
            api.wait("Pod", "comes", running)

            after = api.get("Pod", "stays")
            assert 2 == len(plugin.registrations)
        assert (
            before["status"]["containerStatuses"][0]["containerID"]
            == (after["status"]["containerStatuses"][0]["containerID"])
        )
        assert ids == held(real_node.pod_resources_socket, "example.io/again")


def shows(node: Object | None, resource: str, count: int) -> bool:
    """Whether the Node has that many of a resource to give."""
    return node is not None and node["status"]["allocatable"].get(resource) == str(count)
