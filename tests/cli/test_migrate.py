"""`cotenant migrate`: what other systems' manifests say is said in our words, and what is not kept is told."""

import re
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest
import yaml
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from cotenant.cli.main import main
from cotenant.cli.manifests import written
from cotenant.cli.migrate import Options, migrated
from cotenant.cli.migrate.kai import KAI
from cotenant.cli.migrate.systems import SYSTEMS
from cotenant.contract.names import Names
from cotenant.contract.pods import Pod
from cotenant.contract.request import parse
from cotenant.contract.units import GIB
from tests.docs.markdown import DOCS, blocks

PAGES = sorted((DOCS / "moving-in").glob("[!i]*.md"))
FLAGS = {"nvidia": ["--gpu-memory", "39GiB"], "kai": ["--gpu-memory", "79GiB"]}
NAMES = Names()


def migrate(text: str, *flags: str) -> Result:
    return CliRunner().invoke(main, ["migrate", *flags, "-"], input=text)


def a_pod(limits: dict[str, Any], **annotations: str) -> str:
    metadata = {"name": "p", "annotations": {key.replace("__", "/"): value for key, value in annotations.items()}}
    containers = [{"name": "main", "image": "x", "resources": {"limits": limits}}]
    return written([{"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": {"containers": containers}}])


def asked(text: str, *flags: str) -> tuple[int, dict[str, str]]:
    """What our admission will read of the migrated pod: units, and wishes."""
    result = migrate(text, *flags)
    assert 0 == result.exit_code, result.output
    pod = yaml.safe_load(result.stdout)
    pod["metadata"]["uid"] = "u"
    request = parse(msgspec.convert(pod, Pod), NAMES, GIB)
    assert request is not None
    return request.containers[0].units, pod["metadata"].get("annotations", {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.stem))
def test_each_page_shows_what_is_printed(page: Path) -> None:
    text = page.read_text()
    before, after = blocks(text, "yaml")
    (said,) = blocks(text, "text")
    result = migrate(before, *FLAGS.get(page.stem, []))
    assert (after, said) == (result.stdout, result.stderr)


def test_there_is_a_page_for_each_system() -> None:
    listed = re.findall(r"\((\w+)\.md\)", (DOCS / "moving-in" / "index.md").read_text())
    assert sorted(listed) == [page.stem for page in PAGES]


class TestAmounts:
    """Memory is counted as ours."""

    def test_memory_of_each_of_several_gpus_is_asked_in_sum(self) -> None:
        units, wishes = asked(a_pod({"nvidia.com/gpu": 2, "nvidia.com/gpumem": 10240}))
        assert (20, "2") == (units, wishes[NAMES.gpu_count])

    def test_a_whole_gpu_is_asked_for_itself(self) -> None:
        units, wishes = asked(a_pod({"nvidia.com/gpu": 1, "nvidia.com/gpucores": 0}))
        assert (1, "exclusive") == (units, wishes[NAMES.isolation])

    def test_gpushares_memory_is_split_over_as_many_gpus_as_the_pods_label_says(self) -> None:
        """As of ACK's GPU sharing on several GPUs: each of these gives its part of the sum."""
        pod = yaml.safe_load(a_pod({"aliyun.com/gpu-mem": 8, "aliyun.com/gpu-core.percentage": 30}))
        pod["metadata"]["labels"] = {"aliyun.com/gpu-count": "4"}
        wishes = {NAMES.gpu_count: "4", NAMES.compute_percent: "30"}
        assert (8, wishes) == asked(written([pod]))

        pod["metadata"]["labels"] = {"aliyun.com/gpu-count": "3"}
        result = migrate(written([pod]))
        assert pod == yaml.safe_load(result.stdout)
        assert "label aliyun.com/gpu-count: '3' does not divide its memory" in result.stderr

        said = migrate(a_pod({"aliyun.com/gpu-mem": 8, "aliyun.com/gpu-count": 2})).stderr
        assert "aliyun.com/gpu-count: 2 is not kept" in said

    def test_hamis_scheduler_gives_a_whole_gpu_by_its_plain_name(self) -> None:
        pod = yaml.safe_load(a_pod({"nvidia.com/gpu": 1}))
        pod["spec"]["schedulerName"] = "hami-scheduler"
        units, wishes = asked(written([pod]))
        assert (1, "exclusive") == (units, wishes[NAMES.isolation])

        del pod["spec"]["schedulerName"]
        pod["spec"]["containers"].append({"name": "part", "resources": {"limits": {"nvidia.com/gpumem": 3000}}})
        result = migrate(written([pod]))
        limits = [one["resources"]["limits"] for one in yaml.safe_load(result.stdout)["spec"]["containers"]]
        assert [{NAMES.gpu_mem: 1}, {NAMES.gpu_mem: 3}] == limits
        assert "each gets one for itself" in result.stderr

    @pytest.mark.parametrize(
        "annotation",
        [
            "nvidia.com/use-gputype",
            "nvidia.com/use-gpuindexes",
            "nvidia.com/nouse-gpuuuid",
            "hami.io/gpu-scheduler-policy",
        ],
    )
    def test_hamis_annotation_tells_a_whole_gpu_too(self, annotation: str) -> None:
        """As in several of HAMi's own examples, which ask `nvidia.com/gpu` alone and name no scheduler."""
        units, wishes = asked(a_pod({"nvidia.com/gpu": 1}, **{annotation: "spread"}))
        assert (1, "exclusive") == (units, wishes[NAMES.isolation])
        assert annotation not in wishes

    @pytest.mark.parametrize(
        ("expected", "limits"),
        [
            ((2, "2"), {"nvidia.com/gpu": 2, "nvidia.com/gpumem-percentage": 100, "nvidia.com/gpucores": 100}),
            ((2, "2"), {"nvidia.com/gpu": 2, "nvidia.com/gpumem-percentage": 100}),
            # 2 * 3 GiB, which it needs, though it gets all
            ((6, "2"), {"nvidia.com/gpu": 2, "nvidia.com/gpumem": 3000, "nvidia.com/gpucores": 100}),
            ((1, None), {"volcano.sh/vgpu-number": 1, "volcano.sh/vgpu-cores": 100}),
        ],
    )
    def test_all_cores_or_all_memory_are_the_gpu_for_itself(
        self, expected: tuple[int, str | None], limits: dict[str, int]
    ) -> None:
        units, wishes = asked(a_pod(limits))
        assert (*expected, "exclusive") == (units, wishes.get(NAMES.gpu_count), wishes[NAMES.isolation])

    def test_a_percentage_needs_the_gpus_memory(self) -> None:
        pod = a_pod({"nvidia.com/gpu": 1, "nvidia.com/gpumem-percentage": 50})
        # half of 80
        assert 40 == asked(pod, "--gpu-memory", "80GiB")[0]
        # 39.5, and two of them go on one GPU
        assert 39 == asked(pod, "--gpu-memory", "79GiB")[0]
        result = migrate(pod, "--strict")
        assert (1, yaml.safe_load(pod)) == (result.exit_code, yaml.safe_load(result.stdout))
        assert "say with --gpu-memory" in result.stderr

    def test_a_fraction_of_a_gpu_fits_as_often_as_before(self) -> None:
        # half of 79 is 39.5: two times 40 would not fit
        assert (39, {}) == asked(a_pod({}, **{"gpu-fraction": "0.5"}), "--gpu-memory", "79GiB")
        units, wishes = asked(a_pod({}, **{"gpu-memory": "2000", "gpu-fraction-num-devices": "2"}))
        # 2,000 MiB are 2 GiB when rounded up, of each of two GPUs
        assert (4, {NAMES.gpu_count: "2"}) == (units, wishes)

    @pytest.mark.parametrize(
        ("annotations", "said"),
        [
            ({"gpu-fraction": "0.5"}, "0.5 of a GPU's memory: say with --gpu-memory how much that is"),
            ({"gpu-fraction": "1e999"}, "is no number between 0 and 1"),
            ({"gpu-fraction": "nan"}, "is no number between 0 and 1"),
            ({"gpu-memory": "2Gi"}, "is no whole number of MiB"),
            ({"gpu-memory": "1", "gpu-fraction": "0.5"}, "leave out one of them"),
            ({"gpu-memory": "1", "gpu-fraction-container-name": "b"}, "is none of the pod's containers"),
            ({"gpu-memory": "1", "gpu-fraction-num-devices": "65"}, "cannot be had here"),
            ({"nvidia.com/container.main.gpu-memory.request": "1Gi"}, "are not read"),
        ],
    )
    def test_what_cannot_be_said_of_kais_words_is_left_and_told(self, annotations: dict[str, str], said: str) -> None:
        pod = a_pod({"cpu": 1}, **annotations)
        result = migrate(pod, "--strict")
        assert (1, yaml.safe_load(pod)) == (result.exit_code, yaml.safe_load(result.stdout))
        assert said in result.stderr

    def test_the_unit_may_be_another(self) -> None:
        result = migrate(a_pod({"aliyun.com/gpu-mem": 3}), "--unit", "256MiB")
        # 3 * 1024 / 256
        assert {"cotenant.io/gpu-mem": 12} == yaml.safe_load(result.stdout)["spec"]["containers"][0]["resources"][
            "limits"
        ]

    def test_pods_that_share_their_resources_by_an_alias_are_each_written_anew(self) -> None:
        """As of a RayCluster, whose head and workers often ask alike."""
        result = migrate("""
            head: {spec: {schedulerName: hami-scheduler, containers: [{name: head, resources: &gpu
                {limits: {nvidia.com/gpu: 2, nvidia.com/gpumem: 8192}}}]}}
            workers: {spec: {schedulerName: hami-scheduler, containers: [{name: worker, resources: *gpu}]}}
        """)
        head, worker = yaml.safe_load(result.stdout).values()
        for pod in (head, worker):
            assert {NAMES.gpu_count: "2"} == pod["metadata"]["annotations"]
            # 2 * 8
            assert {"limits": {NAMES.gpu_mem: 16}} == pod["spec"]["containers"][0]["resources"]
            assert "schedulerName" not in pod["spec"]

    @pytest.mark.parametrize(
        ("resource", "label", "value", "said"),
        [
            ("aliyun.com/gpu-mem", "gpushare", "true", "affinity names the node label gpushare"),
            ("nvidia.com/gpumem", "gpu", "on", "affinity names the node label gpu"),
            ("nvidia.com/gpu", "nvidia.com/gpu.product", "Tesla-T4-SHARED", "gpu.product: Tesla-T4-SHARED is of nodes"),
            ("nvidia.com/gpu", "nvidia.com/gpu.replicas", "4", "gpu.replicas: 4 is of nodes"),
            ("nvidia.com/gpu", "nvidia.com/gpu.product", "Tesla-T4", ""),
        ],
    )
    def test_nodes_that_are_chosen_by_how_another_system_marks_them_are_told(
        self, resource: str, label: str, value: str, said: str
    ) -> None:
        pod = yaml.safe_load(a_pod({resource: 1}))
        terms = [{"matchExpressions": [{"key": label, "operator": "In", "values": [value]}]}]
        required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}
        pod["spec"]["affinity"] = {"nodeAffinity": required}
        told = migrate(written([pod]), "--replicas", "4", "--gpu-memory", "39GiB").stderr
        assert (said in told, bool(said)) == (True, "take it out" in told)

        if resource == "nvidia.com/gpu":
            pod["spec"] = {"containers": pod["spec"]["containers"], "nodeSelector": {label: value}}
            assert said in migrate(written([pod]), "--replicas", "4", "--gpu-memory", "39GiB").stderr

    @pytest.mark.parametrize(
        ("document", "said"),
        [
            (
                {"kind": "RayCluster", "metadata": {"labels": {"ray.io/scheduler-name": "volcano"}}},
                "ray.io/scheduler-name",
            ),
            ({"kind": "Workflow", "spec": {"schedulerName": "kai-scheduler"}}, "schedulerName: kai-scheduler"),
        ],
    )
    def test_an_object_that_gives_its_pods_another_scheduler_is_told(self, document: dict[str, Any], said: str) -> None:
        pod = yaml.safe_load(a_pod({"nvidia.com/gpumem": 1024}))
        assert said in migrate(written([{**document, "pod": pod}])).stderr
        assert "is left as it is" not in migrate(written([document, pod])).stderr

    def test_what_another_scheduler_reads_of_a_pod_is_told(self) -> None:
        theirs = (
            "scheduling.volcano.sh/queue-name",
            "scheduling.k8s.io/group-name",
            "kai.scheduler/gpu-device-affinity",
        )
        pod = a_pod({"volcano.sh/vgpu-memory": 1024}, **dict.fromkeys(theirs, "x"))
        result = migrate(pod)
        assert "annotations" not in yaml.safe_load(result.stdout)["metadata"]
        for key in theirs:
            assert f"{key} is not kept" in result.stderr

    def test_variables_that_admission_refuses_are_told(self) -> None:
        """As of pods that found an MPS daemon of their own."""
        pod = yaml.safe_load(a_pod({}, **{"gpu-memory": "1024"}))
        variable = {"name": "CUDA_MPS_PIPE_DIRECTORY", "value": "/tmp/nvidia-mps"}
        pod["spec"]["containers"][0]["env"] = [variable]
        assert "container main sets CUDA_MPS_PIPE_DIRECTORY: take it out" in migrate(written([pod])).stderr

    def test_the_unit_of_volcanos_memory_is_told(self) -> None:
        """Its plugin may count in more than a MiB, as large GPUs would be too many ids."""
        said = "if Volcano's plugin ran with --gpu-memory-factor, multiply by that"
        assert said in migrate(a_pod({"volcano.sh/vgpu-number": 1, "volcano.sh/vgpu-memory": 800})).stderr
        assert said not in migrate(a_pod({"volcano.sh/vgpu-number": 1})).stderr

    def test_limits_are_kept_where_that_is_asked_for(self) -> None:
        _, wishes = asked(a_pod({"volcano.sh/vgpu-number": 1, "volcano.sh/vgpu-memory": 1024}), "--keep-limits")
        assert "limited" == wishes[NAMES.isolation]

    def test_what_is_ruled_out_is_said_and_what_is_not_theirs_stays(self) -> None:
        pod = a_pod(
            {"nvidia.com/gpu": 1, "nvidia.com/gpumem": 1024},
            **{"nvidia.com__nouse-gputype": "T4", "mine": "kept", "hami.io__gpu-scheduler-policy": "spread"},
            **{"nvidia.com__use-gpuindexes": "0,1", "nvidia.com__mig-profile-preference": "4g"},
        )
        result = migrate(pod)
        for said in ("nouse-gputype: T4", "use-gpuindexes: 0,1", "mig-profile-preference: 4g"):
            assert f"nvidia.com/{said} is not kept" in result.stderr
        annotations = yaml.safe_load(result.stdout)["metadata"]["annotations"]
        assert {"mine": "kept", NAMES.policy: "spread"} == annotations

    @pytest.mark.parametrize(
        "document",
        [
            {"kind": "ResourceQuota", "spec": {"hard": {"requests.nvidia.com/gpumem": 100000}}},
            {"kind": "LimitRange", "spec": {"limits": [{"max": {"nvidia.com/gpumem": 1}}]}},
            {"kind": "InferenceService", "spec": {"model": {"resources": {"limits": {"nvidia.com/gpumem": 3000}}}}},
            {"kind": "ConfigMap", "data": {"pod.yaml": "spec: {containers: [{limits: {nvidia.com/gpumem: 3000}}]}"}},
            {"kind": "ClusterQueue", "spec": {"resources": [{"name": "nvidia.com/gpumem", "nominalQuota": 80000}]}},
        ],
    )
    def test_what_another_system_is_asked_outside_of_pods_is_told(self, document: dict[str, Any]) -> None:
        result = migrate(written([document, yaml.safe_load(a_pod({"nvidia.com/gpumem": 3000}))]), "--strict")
        assert 1 == result.exit_code
        assert f"{document['kind']}/?: nvidia.com/gpumem is left as it is: it stands in no pod" in result.stderr
        assert "Pod/p: nvidia.com/gpumem is left" not in result.stderr

    def test_a_part_of_a_gpu_that_kai_is_asked_outside_of_pods_is_told(self) -> None:
        pods_of = {"kind": "InferenceService", "metadata": {"annotations": {"gpu-fraction": "0.5"}}}
        assert "gpu-fraction is left as it is: it stands in no pod" in migrate(written([pods_of])).stderr
        assert "stands in no pod" not in migrate(a_pod({}, **{"gpu-fraction": "0.5"})).stderr

    def test_a_quota_of_shares_is_told(self) -> None:
        quota = {"kind": "ResourceQuota", "spec": {"hard": {"requests.nvidia.com/gpu": 4}}}
        pod = yaml.safe_load(a_pod({"nvidia.com/gpu": 1}))
        said = "ResourceQuota/?: nvidia.com/gpu is left as it is: it stands in no pod"
        assert said in migrate(written([quota, pod]), "--replicas", "4", "--gpu-memory", "39GiB").stderr
        # of whole GPUs it goes on
        assert said not in migrate(written([quota, pod])).stderr

    def test_a_pod_whose_containers_ask_different_numbers_of_gpus_is_left_whole(self) -> None:
        pod = yaml.safe_load(a_pod({"nvidia.com/gpu": 2, "nvidia.com/gpumem": 3000}))
        pod["spec"]["containers"].append({"name": "one", "resources": {"limits": {"nvidia.com/gpumem": 3000}}})
        result = migrate(written([pod]))
        assert pod == yaml.safe_load(result.stdout)
        assert "its containers ask different numbers of GPUs" in result.stderr

    def test_an_init_container_of_several_gpus_is_left(self) -> None:
        """Admission refuses it: the kubelet would mix up the ids that main containers hold."""
        pod = yaml.safe_load(a_pod({"nvidia.com/gpu": 2, "nvidia.com/gpumem": 3000}))
        pod["spec"]["initContainers"] = [{**pod["spec"]["containers"][0], "name": "warm"}]
        result = migrate(written([pod]))
        assert pod == yaml.safe_load(result.stdout)
        assert "init container warm asks several GPUs" in result.stderr

    def test_pods_of_nobody_and_whole_gpus_are_left_alone(self) -> None:
        for limits, said in (({"cpu": 1}, "nothing was changed"), ({"nvidia.com/gpu": 1}, "is left as it is")):
            pod = a_pod(limits)
            result = migrate(pod)
            assert yaml.safe_load(pod) == yaml.safe_load(result.stdout)
            assert said in result.stderr

    @pytest.mark.parametrize(
        ("limits", "said"),
        [
            ({"nvidia.com/gpumem": "abc"}, "nvidia.com/gpumem: 'abc' cannot be read"),
            ({"nvidia.com/gpumem": 1.5}, "nvidia.com/gpumem: '1.5' cannot be read"),
            ({"nvidia.com/gpumem": None}, "nvidia.com/gpumem: 'null' cannot be read"),
            ({"nvidia.com/gpumem": True}, "nvidia.com/gpumem: 'True' cannot be read"),
            ({"nvidia.com/gpu": "-5", "nvidia.com/gpumem": 1024}, "nvidia.com/gpu: '-5' cannot be read"),
            ({"nvidia.com/gpumem": 1024, "nvidia.com/gpucores": "x"}, "nvidia.com/gpucores: 'x' cannot be read"),
            ({"nvidia.com/gpumem": 1024, "nvidia.com/gpucores": 150}, "150 percent of a GPU are more than it has"),
            ({"nvidia.com/gpumem-percentage": 150}, "150 percent of a GPU are more than it has"),
            ({"volcano.sh/vgpu-memory": "abc"}, "volcano.sh/vgpu-memory: 'abc' cannot be read"),
            ({"volcano.sh/vgpu-number": 1, "nvidia.com/gpumem": "abc"}, "nvidia.com/gpumem: 'abc' cannot be read"),
            ({"volcano.sh/vgpu-number": 1, "nvidia.com/gpumem": 1024}, "asks Volcano and HAMi in one pod"),
            ({"volcano.sh/gpu-memory": -5}, "volcano.sh/gpu-memory: '-5' cannot be read"),
            ({"nvidia.com/gpu": 0, "nvidia.com/gpumem": 1024}, "0 is nothing to ask for: take it out"),
            ({"volcano.sh/vgpu-number": 0}, "volcano.sh/vgpu-number: 0 is nothing to ask for: take it out"),
            ({"nvidia.com/gpu": 65, "nvidia.com/gpumem": 1024}, "asks 65 GPUs, and no pod can have more than 64"),
            ({"volcano.sh/gpu-number": 0}, "volcano.sh/gpu-number: 0 is nothing to ask for"),
            ({"aliyun.com/gpu-mem": 1, "aliyun.com/gpu-core.percentage": 101}, "101 percent of a GPU are more than"),
            ({"aliyun.com/gpu-mem": "abc"}, "aliyun.com/gpu-mem: 'abc' cannot be read"),
        ],
    )
    def test_a_pod_whose_amounts_cannot_be_read_is_left_and_told(self, limits: dict[str, Any], said: str) -> None:
        pod = a_pod(limits)
        result = migrate(pod, "--strict")
        assert (1, yaml.safe_load(pod)) == (result.exit_code, yaml.safe_load(result.stdout))
        assert said in result.stderr

    def test_what_is_missing_is_not_told_as_nothing_asked(self) -> None:
        for pod in (a_pod({"nvidia.com/gpumem-percentage": 50}), a_pod({}, **{"gpu-fraction": "0.5"})):
            said = migrate(pod).stderr
            assert "say with --gpu-memory how much that is" in said
            assert "no pod here asks another system" not in said

    def test_a_pod_of_which_one_container_cannot_be_said_is_left_whole(self) -> None:
        pod = yaml.safe_load(a_pod({"nvidia.com/gpumem": 1024}))
        second = {"name": "b", "image": "x", "resources": {"limits": {"nvidia.com/gpumem-percentage": 10}}}
        pod["spec"]["containers"].append(second)
        assert pod == yaml.safe_load(migrate(yaml.safe_dump(pod)).stdout)


def a_share(replicas: int, name: str = "nvidia.com/gpu") -> dict[str, Any]:
    """An entry of NVIDIA's sharing configuration."""
    return {"name": name, "replicas": replicas}


def sharing(*resources: dict[str, Any]) -> str:
    """NVIDIA's sharing configuration."""
    return written([{"version": "v1", "sharing": {"timeSlicing": {"resources": list(resources)}}}])


class TestSharing:
    """NVIDIA's sharing configuration says what a share is worth, and only that is one."""

    @pytest.mark.parametrize(
        "resources",
        [
            (a_share(2, "nvidia.com/mig-1g.5gb"), a_share(4)),
            (a_share(4), a_share(2, "nvidia.com/mig-1g.5gb")),
            (a_share(4, "gpu"), a_share(2, "mig-1g.5gb")),
        ],
    )
    def test_shares_of_mig_instances_stand_beside_those_of_gpus(self, resources: tuple[dict[str, Any], ...]) -> None:
        pods = a_pod({"nvidia.com/gpu": 1}), a_pod({"nvidia.com/mig-1g.5gb": 1})
        result = migrate("---\n".join([sharing(*resources), *pods]), "--gpu-memory", "39GiB")
        limits = [one["spec"]["containers"][0]["resources"]["limits"] for one in yaml.safe_load_all(result.stdout)]
        # 39 / 4, rounded down
        assert [{NAMES.gpu_mem: 9}, {"nvidia.com/mig-1g.5gb": 1}] == limits
        assert "nvidia.com/mig-1g.5gb stays: give the file to our device plugin" in result.stderr

    def test_a_number_of_shares_that_differs_by_node_is_not_guessed(self) -> None:
        """As of NVIDIA's own example of a ConfigMap with a key for each kind of node."""
        files = {"a100-40gb": sharing(a_share(8)), "tesla-t4": sharing(a_share(4))}
        fine = {"kind": "ConfigMap", "metadata": {"name": "fine"}, "data": files}
        pod = a_pod({"nvidia.com/gpu": 1})
        text = written([fine]) + "---\n" + pod
        result = migrate(text, "--gpu-memory", "39GiB")
        assert yaml.safe_load(pod) == yaml.safe_load(result.stdout)
        assert "ConfigMap/fine: 4 or 8 shares a GPU, by node: say --replicas" in result.stderr
        result = migrate(text, "--gpu-memory", "39GiB", "--replicas", "8")
        # 39 / 8, rounded down
        assert {NAMES.gpu_mem: 4} == yaml.safe_load(result.stdout)["spec"]["containers"][0]["resources"]["limits"]
        assert "ConfigMap/fine: 8 shares a GPU become memory" in result.stderr

    def test_objects_of_a_list_are_told_by_their_names_and_may_be_a_sharing_configuration(self) -> None:
        """As `kubectl get -o yaml` prints them."""
        config = {"kind": "ConfigMap", "metadata": {"name": "all"}, "data": {"any": sharing(a_share(4))}}
        pod = yaml.safe_load(a_pod({"nvidia.com/gpu": 2}))
        result = migrate(written([{"kind": "List", "items": [config, pod]}]), "--gpu-memory", "39GiB")
        # 2 * (39 / 4, rounded down)
        assert {NAMES.gpu_mem: 18} == yaml.safe_load(result.stdout)["spec"]["containers"][0]["resources"]["limits"]
        assert ["ConfigMap/all", "Pod/p"] == [line.partition(":")[0] for line in result.stderr.splitlines()]

    @pytest.mark.parametrize(
        "document",
        [
            {"kind": "ConfigMap", "data": {"config.yaml": "sharing: {enabled: true}"}},
            {"sharing": {"enabled": True}, "replicaCount": 1},
        ],
    )
    def test_what_others_call_sharing_is_printed_as_it_was(self, document: dict[str, Any]) -> None:
        result = migrate(written([document]))
        assert (document, 0) == (yaml.safe_load(result.stdout), result.exit_code)
        assert "nothing was changed" in result.stderr


class TestVolcanoJobs:
    """The scheduler of a Job is that of its pods, wherever the Job stands."""

    JOB: ClassVar = {
        "schedulerName": "volcano",
        "tasks": [{"template": {"spec": {"containers": [{"resources": {"limits": {"volcano.sh/vgpu-memory": 1}}}]}}}],
    }
    OTHER: ClassVar = {"schedulerName": "volcano", "tasks": [{"template": {"spec": {"containers": [{"name": "a"}]}}}]}

    @pytest.mark.parametrize(
        "document",
        [
            {"apiVersion": "flow.volcano.sh/v1alpha1", "kind": "JobTemplate", "spec": JOB},
            {"apiVersion": "batch.volcano.sh/v1alpha1", "kind": "CronJob", "spec": {"jobTemplate": {"spec": JOB}}},
            {"kind": "JobList", "items": [{"apiVersion": "batch.volcano.sh/v1alpha1", "kind": "Job", "spec": JOB}]},
        ],
    )
    def test_a_job_of_our_pods_names_no_scheduler_of_volcanos(self, document: dict[str, Any]) -> None:
        printed = yaml.safe_load(migrate(written([document])).stdout)
        assert {"schedulerName: default-scheduler"} == set(re.findall("schedulerName: .*", written([printed])))
        # and nothing is added elsewhere
        assert document.keys() == printed.keys()
        assert document.get("spec", {}).keys() == printed.get("spec", {}).keys()

    def test_a_job_of_other_pods_stays_volcanos(self) -> None:
        other = {"apiVersion": "batch.volcano.sh/v1alpha1", "kind": "Job", "spec": self.OTHER}
        both = {"kind": "List", "items": [other, {**other, "spec": self.JOB}]}
        printed = yaml.safe_load_all(migrate(written([both])).stdout)
        assert ["volcano", "default-scheduler"] == [one["spec"]["schedulerName"] for one in printed]


@st.composite
def pods_with_odd_parts(draw: st.DrawFn) -> object:
    """Pods of which any part may be something else than it should be."""
    odd = st.none() | st.integers() | st.text(max_size=3) | st.lists(st.integers(), max_size=2)
    amount = st.integers() | st.text(max_size=3) | st.none() | st.lists(st.none(), max_size=1)
    names = st.sampled_from([name for system in SYSTEMS for name in system.resources])
    amounts = st.dictionaries(names, amount, max_size=3) | odd
    resources = st.fixed_dictionaries({"limits": amounts, "requests": amounts}) | odd
    env = st.lists(st.fixed_dictionaries({"name": odd}) | odd, max_size=2) | odd
    container = st.fixed_dictionaries({"name": odd, "resources": resources, "env": env}) | odd
    annotations = st.dictionaries(st.sampled_from(["nvidia.com/use-gputype", "a", *KAI.annotations]), odd) | odd
    metadata = st.fixed_dictionaries({"name": odd, "annotations": annotations}) | odd
    spec = st.fixed_dictionaries(
        {
            "containers": st.lists(container, max_size=2),
            "initContainers": st.lists(container, max_size=1) | odd,
            "nodeSelector": odd,
        }
    )
    return draw(st.fixed_dictionaries({"kind": odd, "metadata": metadata, "spec": spec}))


class TestInput:
    """Whatever is given, nothing crashes, and nothing of others' is lost."""

    def test_what_is_no_yaml_is_one_sentence_with_its_file(self, tmp_path: Path) -> None:
        (tmp_path / "good.yaml").write_text("a: 1")
        (tmp_path / "bad.yaml").write_text("a: [")
        result = CliRunner().invoke(main, ["migrate", str(tmp_path / "good.yaml"), str(tmp_path / "bad.yaml")])
        assert (1, "") == (result.exit_code, result.stdout)
        assert result.stderr.startswith(f"Error: {tmp_path}/bad.yaml: is not valid YAML: line 1, column 5: ")

    def test_a_charts_template_is_to_be_rendered_first(self) -> None:
        result = migrate("kind: Pod\n{{- if .Values.gpu }}\nspec: {}\n{{- end }}\n")
        assert 1 == result.exit_code
        assert result.stderr.endswith("; a chart's templates have to be rendered first: helm template\n")

    def test_what_is_no_text_is_one_sentence(self, tmp_path: Path) -> None:
        (tmp_path / "pod.yaml").write_bytes(b"kind: Pod\xff")
        result = CliRunner().invoke(main, ["migrate", str(tmp_path / "pod.yaml")])
        # 9 letters stand before it
        said = f"Error: {tmp_path}/pod.yaml: is not text in UTF-8: invalid start byte at byte 9\n"
        assert (1, "", said) == (result.exit_code, result.stdout, result.stderr)

    @given(
        pods_with_odd_parts()
        | st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(max_size=8),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(
                        ["spec", "containers", "metadata", "resources", "limits", "aliyun.com/gpu-mem", "env", "data"]
                    ),
                    inner,
                    max_size=4,
                )
            ),
            max_leaves=12,
        )
    )
    def test_any_document_is_migrated(self, document: object) -> None:
        assert 1 >= len(migrated([document], Options()).documents)
