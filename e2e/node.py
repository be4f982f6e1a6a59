"""A real node on this machine: containerd 2.x and a kubelet that joins a `ControlPlane`; root only, cgroup v1.

Its containerd, images, cgroups and kubelet directory are its own; the device-plugin directory cannot be, since the
kubelet has that path built in. So there is one such node per machine at a time, held by a lock.
"""

import fcntl
import os
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import grpc
import yaml

from device_plugin.families.occupants import is_served
from e2e import image, leftovers
from e2e.cluster import NODE_NAME, ControlPlane
from e2e.processes import MissingProgramError, Program, bin_directory, find_program, free_ports, wait_until
from e2e.rest import Object

DEVICE_PLUGINS = Path("/var/lib/kubelet/device-plugins")
"""Where the kubelet listens for plugins, whatever its root directory (devicemanager/manager.go, NewManagerImpl)."""

_MADE_BY_PROGRAMS = (
    DEVICE_PLUGINS,
    DEVICE_PLUGINS.parent,
    Path("/var/log/containers"),
    Path("/run/containerd/s"),
    Path("/run/containerd"),
)
"""Directories that the kubelet and the shims make at fixed paths, inner ones first."""

LOCK_PATIENCE_S = 300.0
"""How long a node waits for another one on this machine to end."""

_LOCK = Path("/run/cotenant-e2e-node.lock")
_CGROUP = "cotenant-e2e"
_CONTAINERD_NAMESPACE = "k8s.io"


def container(
    name: str = "main",
    script: str = "sleep 1000000",
    *,
    limits: Mapping[str, str | int] | None = None,
    env: Sequence[Object] = (),
) -> Object:
    """Return a busybox container that runs a shell script; `limits` are its extended resources."""
    return {
        "name": name,
        "image": image.BUSYBOX,
        "imagePullPolicy": "Never",
        "command": ["/bin/sh", "-c", script],
        "env": list(env),
        "resources": {"limits": {resource: str(amount) for resource, amount in (limits or {}).items()}},
    }


def env_from_annotation(variable: str, annotation: str) -> Object:
    """Return the env entry that resolves to one of the pod's annotations when the container starts."""
    return {
        "name": variable,
        "valueFrom": {"fieldRef": {"fieldPath": f"metadata.annotations['{annotation}']"}},
    }


def pod(
    name: str,
    *containers: Object,
    init: Sequence[Object] = (),
    annotations: Mapping[str, str] | None = None,
    spec: Mapping[str, Any] | None = None,
) -> Object:
    """Return a pod of `default` that can run on the real node: host network, no token, tolerates every taint.

    It ends within a second of its deletion. `spec` overrides single fields, such as schedulerName or nodeName.
    """
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "default", "annotations": dict(annotations or {})},
        "spec": {
            "hostNetwork": True,
            "dnsPolicy": "Default",
            "enableServiceLinks": False,
            "automountServiceAccountToken": False,
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 1,
            "tolerations": [{"operator": "Exists"}],
            "initContainers": list(init),
            "containers": list(containers) or [container()],
            **(spec or {}),
        },
    }


def why_not() -> str | None:
    """Return the sentence why this machine cannot be a node, or None: the reason of a skipped test."""
    if os.geteuid() != 0:
        return "the real node needs root: it mounts, makes cgroups and runs a kubelet"
    if not leftovers.cgroup_v1_controllers():
        return "the real node has only been made to work on cgroup v1, and none is mounted in /sys/fs/cgroup"
    try:
        for program in ("kubelet", "containerd", "containerd-shim-runc-v2", "ctr", "runc", "busybox"):
            find_program(program)
    except MissingProgramError as missing:
        return str(missing)
    return None


class RealNode:
    """This machine as a node of a control plane: pods bound to it run."""

    def __init__(
        self,
        control_plane: ControlPlane,
        directory: Path,
        *,
        kubelet: Mapping[str, Any] | None = None,
        network: str = "",
        images: Sequence[Path] = (),
    ) -> None:
        """Prepare a node in `directory`; `kubelet` overrides fields of its KubeletConfiguration.

        The control plane needs a user `kubelet` that may act for the node. `network` is a CNI configuration
        list; without one all pods have to be on the host's network. `images` are docker archives, besides busybox.
        """
        self.name = NODE_NAME
        self.control_plane = control_plane
        self.directory = directory.resolve()
        self.cdi_directory = self.directory / "cdi"
        self.kubelet_directory = self.directory / "kubelet"
        self.static_pods = self.directory / "static-pods"
        """Pods that are put here as files run without anybody being asked."""
        self.containers_directory = self.directory / "containerd" / "root" / "io.containerd.grpc.v1.cri" / "containers"
        """Where containerd makes a folder for each container before it makes the container."""
        self.pod_resources_socket = self.kubelet_directory / "pod-resources" / "kubelet.sock"
        self._logs = self.directory / "pod-logs"
        self._state = self.directory / "containerd" / "state"
        self._socket = self.directory / "containerd.sock"
        self._overrides = dict(kubelet or {})
        # The Node is Ready once some network is configured.
        self._network = network or '{"cniVersion": "0.4.0", "name": "none", "plugins": [{"type": "none"}]}'
        self._images = list(images)
        self._containerd: Program | None = None
        self._kubelet: Program | None = None
        self._sysctls: dict[Path, str] = {}
        self._made: list[Path] = []
        self._lock: int | None = None
        self.port = 0
        """Where the kubelet serves its metrics, by HTTPS; another one after each start."""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start containerd and the kubelet and wait until the Node is Ready; on failure nothing stays.

        Raises MissingProgramError with the sentence of `why_not`, RuntimeError where the machine is a node already.
        """
        if reason := why_not():
            raise MissingProgramError(reason)
        self._take_machine()
        try:
            for directory in (self.cdi_directory, self._logs, self.kubelet_directory, self.static_pods):
                directory.mkdir(parents=True, exist_ok=True)
            self._sysctls = leftovers.read_sysctls()
            self._made = [path for path in _MADE_BY_PROGRAMS if not path.exists()]
            leftovers.remove_cgroup(_CGROUP)  # of a run that was killed: the lock is ours now
            leftovers.make_cgroup(_CGROUP)
            self._start_containerd()
            self.import_images()
            self.start_kubelet()
            self.control_plane.api().wait("Node", self.name, _is_ready, saying="Ready", timeout_s=90)
        except BaseException:
            self.stop()
            raise

    def _take_machine(self) -> None:
        lock = os.open(_LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        if not wait_until(lambda: _locks(lock), timeout_s=LOCK_PATIENCE_S):
            os.close(lock)
            raise RuntimeError(f"another end-to-end node has held {_LOCK} for {LOCK_PATIENCE_S:.0f} s")
        if is_served(DEVICE_PLUGINS / "kubelet.sock"):
            os.close(lock)
            raise RuntimeError(f"a kubelet that is not ours serves {DEVICE_PLUGINS}: this machine is a node already")
        leftovers.empty_directory(DEVICE_PLUGINS)
        self._lock = lock

    def _start_containerd(self) -> None:
        network = self.directory / "cni"
        network.mkdir(exist_ok=True)
        (network / "pods.conflist").write_text(self._network)
        config = self.directory / "containerd.toml"
        config.write_text(f"""\
version = 3
root = "{self.directory}/containerd/root"
state = "{self._state}"
[grpc]
  address = "{self._socket}"
[ttrpc]
  address = "{self._socket}.ttrpc"
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "native"
  [plugins."io.containerd.cri.v1.images".pinned_images]
    sandbox = "{image.PAUSE}"
[plugins."io.containerd.cri.v1.runtime"]
  enable_cdi = true
  cdi_spec_dirs = ["{self.cdi_directory}"]
  restrict_oom_score_adj = true
  tolerate_missing_hugetlb_controller = true
  disable_apparmor = true
  [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
      BinaryName = "{find_program("runc")}"
      Root = "{self.directory}/runc"
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = ["{bin_directory()}"]
    conf_dir = "{network}"
""")
        binary = find_program("containerd")
        search = f"{binary.parent}{os.pathsep}{os.environ.get('PATH', '')}"
        self._containerd = Program(
            [binary, "--config", config], log=self.directory / "containerd.log", environment={"PATH": search}
        )
        self._containerd.wait_ready(lambda: _runs_pods(self._socket))

    def import_images(self) -> None:
        """Have the images of all containers in the node's store."""
        archive = self.directory / "busybox.tar"
        image.write_archive(archive, busybox=find_program("busybox"))
        # --local: ctr itself unpacks, into the snapshotter that it is told; the daemon would take its default.
        for one in (archive, *self._images):
            self._ctr("images", "import", "--local", "--snapshotter", "native", str(one))

    def _ctr(self, *command: str) -> None:
        daemon = ["--address", str(self._socket), "--namespace", _CONTAINERD_NAMESPACE]
        subprocess.run([str(find_program("ctr")), *daemon, *command], check=True, capture_output=True)

    def start_kubelet(self) -> None:
        """Start the kubelet and wait until it says it is healthy."""
        self.port, healthz_port = free_ports(2)
        settings = {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "address": "127.0.0.1",
            "port": self.port,
            "healthzPort": healthz_port,
            "failCgroupV1": False,
            "failSwapOn": False,
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": f"/{_CGROUP}",
            "enforceNodeAllocatable": [],
            "containerRuntimeEndpoint": f"unix://{self._socket}",
            "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
            "authorization": {"mode": "AlwaysAllow"},
            "evictionHard": {"memory.available": "0%", "nodefs.available": "0%", "imagefs.available": "0%"},
            "imageGCHighThresholdPercent": 100,
            "localStorageCapacityIsolation": False,
            "makeIPTablesUtilChains": False,
            "podLogsDir": str(self._logs),
            "staticPodPath": str(self.static_pods),
            "volumePluginDir": str(self.directory / "volume-plugins"),
            "maxPods": 250,
            **self._overrides,
        }
        config = self.directory / "kubelet.yaml"
        config.write_text(yaml.safe_dump(settings))
        self._kubelet = Program(
            [
                find_program("kubelet"),
                f"--config={config}",
                f"--kubeconfig={self.control_plane.kubeconfig('kubelet')}",
                f"--root-dir={self.kubelet_directory}",
                f"--cert-dir={self.kubelet_directory / 'pki'}",
                f"--hostname-override={self.name}",
                "--v=2",
            ],
            log=self.directory / "kubelet.log",
        )
        self._kubelet.wait_ready(lambda: _listens(healthz_port))

    def kill_kubelet(self) -> None:
        """Kill the kubelet as a crash would (SIGKILL); its containers go on running."""
        if self._kubelet is not None:
            self._kubelet.kill()
            self._kubelet = None

    def restart_kubelet(self) -> None:
        """Kill the kubelet and start it again."""
        self.kill_kubelet()
        self.start_kubelet()

    def restart_containerd(self) -> None:
        """Kill containerd and start it again; containers go on running, kept by their shims."""
        if self._containerd is not None:
            self._containerd.kill()
        self._start_containerd()

    def reboot(self, *, keep_checkpoint: bool, keep_images: bool = True) -> None:
        """Lose what a machine loses that reboots: every process, mounts, /run; disks stay.

        The kubelet's checkpoint of who holds which devices is on disk; *keep_checkpoint* False is a node whose disk was
        lost or wiped; without *keep_images* no container starts until import_images(). Plugins are not ours to end, nor
        to start again.
        """
        self.kill_kubelet()
        leftovers.kill_cgroup(_CGROUP)
        if self._containerd is not None:
            self._containerd.kill()
        leftovers.remove_files(leftovers.shim_sockets(self._state))
        leftovers.kill_shims(self._socket)
        leftovers.unmount_below(self.directory)
        shutil.rmtree(self._state, ignore_errors=True)
        shutil.rmtree(self.directory / "runc", ignore_errors=True)
        if not keep_checkpoint:
            (DEVICE_PLUGINS / "kubelet_internal_checkpoint").unlink(missing_ok=True)
        self._start_containerd()
        if not keep_images:
            self._ctr("images", "remove", image.BUSYBOX)
        self.start_kubelet()

    def kubelet_cpu_seconds(self) -> float:
        """Return the CPU time that the running kubelet has used (proc(5), fields utime and stime)."""
        if self._kubelet is None:
            raise RuntimeError("the kubelet does not run")
        fields = Path(f"/proc/{self._kubelet.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        """Stop everything and remove what it left: containers, shims, mounts, cgroups, links, plugin sockets."""
        if self._lock is None:
            return
        with ExitStack() as steps:  # each is tried, whatever becomes of the others; the last one named comes first
            steps.callback(os.close, self._lock)
            steps.callback(leftovers.remove_if_empty, self._made)
            steps.callback(leftovers.empty_directory, DEVICE_PLUGINS)
            steps.callback(leftovers.restore_sysctls, self._sysctls)
            steps.callback(leftovers.remove_links, Path("/var/log/containers"), to=self._logs)
            for name in ("containerd", "kubelet", "runc"):
                steps.callback(shutil.rmtree, self.directory / name, ignore_errors=True)
            steps.callback(leftovers.unmount_below, self.directory)
            steps.callback(leftovers.remove_cgroup, _CGROUP)
            # Asked for now: a containerd that stops may still remove a killed shim's bundle, and leave its socket.
            steps.callback(leftovers.remove_files, leftovers.shim_sockets(self._state))
            steps.callback(leftovers.kill_shims, self._socket)
            if self._containerd is not None:
                steps.callback(self._containerd.stop)
            steps.callback(leftovers.kill_cgroup, _CGROUP)
            steps.callback(self.kill_kubelet)
        self._containerd = self._lock = None

    def logs(self, pod: Object, container: str = "main") -> str:
        """Return what a container wrote, over all its restarts; empty where it has not started.

        A line of the file is `time stream F|P text` (CRI log format).
        """
        metadata = pod["metadata"]
        directory = self._logs / f"{metadata['namespace']}_{metadata['name']}_{metadata['uid']}" / container
        files = sorted(directory.glob("*.log"), key=lambda file: int(file.stem))
        lines = (line.split(" ", 3)[3] for file in files for line in file.read_text().splitlines(keepends=True))
        return "".join(lines)

    def pid(self, pod: Object, container: str = "main") -> int:
        """Return the number of a running container's first process."""
        statuses = pod["status"].get("containerStatuses", []) + pod["status"].get("initContainerStatuses", [])
        ids = [status["containerID"] for status in statuses if status["name"] == container]
        bundle = self._state / "io.containerd.runtime.v2.task" / _CONTAINERD_NAMESPACE / ids[0].split("//")[1]
        return int((bundle / "init.pid").read_text())

    def environment(self, pod: Object, container: str = "main") -> dict[str, str]:
        """Return the environment that a running container's first process was started with."""
        pid = self.pid(pod, container)
        found: dict[str, str] = {}

        def read() -> bool:
            """Read it, and tell whether it is the container's: until it executes, the process is runc's own."""
            words = Path(f"/proc/{pid}/environ").read_text().split("\0")
            found.clear()
            found.update({word.partition("=")[0]: word.partition("=")[2] for word in words if word})
            return bool(found) and not any(variable.startswith("_LIBCONTAINER_") for variable in found)

        if not wait_until(read, timeout_s=10):
            raise TimeoutError(f"process {pid} of container {container} was still runc's after 10 s: {sorted(found)}")
        return found


def _is_ready(node: Object | None) -> bool:
    conditions = node["status"].get("conditions", []) if node else []
    return any(condition["type"] == "Ready" and condition["status"] == "True" for condition in conditions)


def _locks(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _runs_pods(containerd: Path) -> bool:
    """Tell whether containerd answers the kubelet's first question: its socket is there before its plugins are."""
    with grpc.insecure_channel(f"unix://{containerd}") as channel:
        version = channel.unary_unary(
            "/runtime.v1.RuntimeService/Version", request_serializer=bytes, response_deserializer=bytes
        )
        try:
            version(b"", timeout=5)
        except grpc.RpcError:
            return False
    return True


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
