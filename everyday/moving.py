"""The examples of the pages about moving in: run as they were, and as `cotenant migrate` prints them.

As they were, the node advertises what the other system's device plugin would, and kube-scheduler has its profile: so
much that the example is known to be one. How those systems share a GPU is theirs, and not run here.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from cotenant.contract import grant as grants
from cotenant.contract.names import Names
from cotenant.contract.units import GIB
from e2e import image
from e2e.rest import Object
from everyday.cluster import WholeCluster
from tests.docs.markdown import DOCS, blocks

NAMES = Names()
# Of each page: what a node of that system advertises, and what each pod holds here.
PAGES: Mapping[str, tuple[dict[str, str], int]] = {
    "gpushare": ({"aliyun.com/gpu-mem": "30"}, 3 * GIB),
    "hami": ({"nvidia.com/gpu": "20", "nvidia.com/gpumem": "160000", "nvidia.com/gpucores": "200"}, 3 * GIB),
    "volcano": ({"volcano.sh/vgpu-number": "20", "volcano.sh/vgpu-memory": "160000"}, 16 * GIB),
    "nvidia": ({"nvidia.com/gpu": "8"}, 10 * GIB),
    # half of 40 GiB
    "kai": ({"nvidia.com/gpu": "8"}, 20 * GIB),
}
SCHEDULERS = ("default-scheduler", "hami-scheduler", "volcano", "kai-scheduler")
_CRD = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {"name": "jobs.batch.volcano.sh"},
    "spec": {
        "group": "batch.volcano.sh",
        "scope": "Namespaced",
        "names": {"kind": "Job", "plural": "jobs", "singular": "job"},
        "versions": [
            {
                "name": "v1alpha1",
                "served": True,
                "storage": True,
                "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}},
            }
        ],
    },
}


def as_it_was(cluster: WholeCluster, page: str) -> None:
    """Run a page's example on a node as the other system leaves it, and take all of it away again."""
    advertised, _ = PAGES[page]
    status = {"capacity": advertised, "allocatable": advertised}
    _patch_status(cluster, status)
    cluster.run("kubectl", "label", "node", cluster.node.name, "gpushare=true")
    pods = list(_started(cluster, _documents(page), page))
    for name in pods:
        cluster.api().wait("Pod", name, _runs, saying="its start as it was")
    cluster.run("kubectl", "label", "node", cluster.node.name, "gpushare-")
    _removed(cluster, page)
    _patch_status(cluster, {key: dict.fromkeys(advertised) for key in status})


def as_it_becomes(cluster: WholeCluster, page: str) -> None:
    """Run a page's example as it is migrated, and find every pod with the memory that the page promises."""
    _, expected = PAGES[page]
    file = cluster.directory / f"{page}.yaml"
    file.write_text("---\n".join(yaml.safe_dump(one) for one in _documents(page, whole=True)))
    printed = cluster.run("cotenant", "migrate", "--gpu-memory=40GiB", file)
    for name in _started(cluster, [one for one in yaml.safe_load_all(printed) if one], page):
        pod = cluster.api().wait("Pod", name, _runs, saying="its start as migrated")
        (container,) = grants.decode(pod["metadata"]["annotations"][NAMES.grant]).containers
        assert expected == sum(share.bytes for share in container.gpus), page
    _removed(cluster, page)


def unchanged(cluster: WholeCluster) -> None:
    """Run gpushare's example as it is, beside us: its resource is an alias of ours."""
    (pod,) = _documents("gpushare")
    del pod["spec"]["nodeSelector"]  # on a node that is still theirs the label would be there
    (name,) = _started(cluster, [pod], "gpushare")
    bound = cluster.api().wait("Pod", name, _runs, saying="its start")
    (container,) = grants.decode(bound["metadata"]["annotations"][NAMES.grant]).containers
    assert 3 * GIB == sum(share.bytes for share in container.gpus)
    _removed(cluster, "gpushare")


def _documents(page: str, *, whole: bool = False) -> list[Object]:
    """Read a page's example; without what is no object of Kubernetes, unless all of it is asked for."""
    text, _ = blocks((DOCS / "moving-in" / f"{page}.md").read_text(), "yaml")
    return [one for one in yaml.safe_load_all(text) if whole or "kind" in one]


def _started(cluster: WholeCluster, documents: list[Object], page: str) -> Iterator[str]:
    """Create the objects, with an image that there is here; give the names of their pods."""
    for document in documents:
        if "kind" not in document:
            continue
        one = with_image(document)
        one["metadata"]["namespace"] = "default"
        if one["apiVersion"].startswith("batch.volcano.sh"):
            cluster.run("kubectl", "apply", "-f", _written(cluster, _CRD))
            cluster.run("kubectl", "wait", "--for=condition=Established", "crd/jobs.batch.volcano.sh")
            cluster.run("kubectl", "apply", "-f", _written(cluster, one))
            # what Volcano's controller makes of it
            for task in one["spec"]["tasks"]:
                for n in range(task["replicas"]):
                    template = task["template"]
                    metadata = {
                        **template.get("metadata", {}),
                        "name": f"{one['metadata']['name']}-{task['name']}-{n}",
                        "namespace": "default",
                        "labels": {"page": page},
                    }
                    cluster.api().create(
                        {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}
                    )
                    yield metadata["name"]
        elif one["kind"] == "Deployment":
            cluster.run("kubectl", "apply", "-f", _written(cluster, one))
            cluster.run("kubectl", "rollout", "status", f"deployment/{one['metadata']['name']}", "--timeout=240s")
            labels = one["spec"]["selector"]["matchLabels"]
            wanted = ",".join(f"{key}={value}" for key, value in labels.items())
            yield from (
                pod["metadata"]["name"] for pod in cluster.api().list("Pod", namespace="default", labels=wanted)
            )
        else:
            one["metadata"]["labels"] = {"page": page}
            cluster.api().create(one)
            yield one["metadata"]["name"]


def _removed(cluster: WholeCluster, page: str) -> None:
    cluster.run("kubectl", "delete", "deployment", "--all", "-n", "default", "--wait")
    cluster.run("kubectl", "delete", "pod", "--all", "-n", "default", "--wait", "--grace-period=1")
    if page == "volcano":
        cluster.run("kubectl", "delete", "crd", "jobs.batch.volcano.sh")


def with_image(value: Any) -> Any:
    """Return an object whose containers run what there is on this machine, and stay."""
    if isinstance(value, dict):
        made = {key: with_image(one) for key, one in value.items()}
        return made | {"image": image.BUSYBOX, "command": ["sleep", "1000000"]} if "image" in made else made
    return [with_image(one) for one in value] if isinstance(value, list) else value


def _patch_status(cluster: WholeCluster, status: Mapping[str, Any]) -> None:
    patch = json.dumps({"status": status})
    cluster.run("kubectl", "patch", "node", cluster.node.name, "--subresource=status", "--type=merge", "-p", patch)


def _written(cluster: WholeCluster, one: Object) -> str:
    path = cluster.directory / "applied.yaml"
    path.write_text(yaml.safe_dump(one))
    return str(path)


def _runs(pod: Object | None) -> bool:
    return pod is not None and pod["status"].get("phase") == "Running"
