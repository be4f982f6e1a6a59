"""The layouts for MPS and time slicing as they are shipped, with their examples, on made-up GPUs.

MIG's is held against the API server alone here: its instances are made in e2e/test_mig.py.
"""

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import yaml

from cotenant.contract.names import Names
from e2e.kustomize import MANIFESTS
from e2e.processes import find_program
from e2e.rest import Object
from everyday import moving
from everyday.cluster import WholeCluster

# NVIDIA's daemon needs a GPU; this one comes in our image, is a process too, and speaks the same commands.
MPS_CONFIGURATION = {
    **yaml.safe_load((MANIFESTS / "mps" / "device-plugin-config.yaml").read_text()),
    "mps": {"control": "cotenant-fake-mps-control"},
}
ON_THE_NODE = Path("/run/cotenant")


def could_be_applied(cluster: WholeCluster) -> None:
    """Ask the API server whether it would take each layout as it is shipped."""
    for layout in ("mig", "mps", "time-slicing", "memory-watchdog"):
        cluster.run("kubectl", "apply", "--dry-run=server", "-k", MANIFESTS / layout)


def twelve_servers_run_under_mps(cluster: WholeCluster) -> None:
    """Apply the example of MPS; each of its containers gets its limits and the pipe of its GPU's daemon."""
    pods = _started(cluster, "mps.yaml")
    assert 12 == len(pods)
    for pod in pods:
        found = cluster.node.environment(pod)
        assert {
            "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": "0=6144M",  # 6 GiB
            "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "25",
            "CUDA_MPS_PIPE_DIRECTORY": f"{ON_THE_NODE}/mps/{found['NVIDIA_VISIBLE_DEVICES']}/pipe",
            "COTENANT_ENFORCED_BY": "MPS memory limit, per process",
        }.items() <= found.items()


def eight_notebooks_run_in_turns(cluster: WholeCluster) -> None:
    """Apply the example of time slicing; its pods need neither our scheduler nor a grant."""
    pods = _started(cluster, "time-slicing.yaml")
    assert 8 == len(pods)
    for pod in pods:
        assert Names().grant not in pod["metadata"].get("annotations", {})
        found = cluster.node.environment(pod)
        assert found["NVIDIA_VISIBLE_DEVICES"].startswith("GPU-")
        assert ("time-slicing", "nothing") == (found["COTENANT_MODE"], found["COTENANT_ENFORCED_BY"])


@contextlib.contextmanager
def a_folder_whose_mounts_are_seen() -> Iterator[None]:
    """Have what a pod mounts below the folder of MPS be seen by the node, as systemd has it; remove it after."""
    mount, umount = find_program("mount"), find_program("umount")
    ON_THE_NODE.mkdir(exist_ok=True)
    subprocess.run([mount, "--bind", ON_THE_NODE, ON_THE_NODE], check=True)
    subprocess.run([mount, "--make-shared", ON_THE_NODE], check=True)
    try:
        yield
    finally:
        subprocess.run([umount, "--recursive", "--lazy", ON_THE_NODE], check=True)
        shutil.rmtree(ON_THE_NODE)


def _started(cluster: WholeCluster, example: str) -> list[Object]:
    """Apply an example's Deployment, with an image that there is here; give its pods once all run."""
    (deployment,) = (one for one in yaml.safe_load_all((MANIFESTS / "examples" / example).read_text()) if one)
    name, labels = deployment["metadata"]["name"], deployment["spec"]["selector"]["matchLabels"]
    path = cluster.directory / example
    path.write_text(yaml.safe_dump(moving.with_image(deployment)))
    cluster.run("kubectl", "apply", "-f", path)
    cluster.run("kubectl", "rollout", "status", f"deployment/{name}", "--timeout=240s")
    wanted = ",".join(f"{key}={value}" for key, value in labels.items())
    return list(cluster.api().list("Pod", namespace="default", labels=wanted))
