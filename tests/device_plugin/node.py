"""One GPU node for tests: a stand-in API server and kubelet, the real device plugin, made-up GPUs."""

import shutil
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from cotenant.cluster import connect
from cotenant.contract import environment, inventory
from cotenant.contract.configuration import DevicePluginConfiguration, convert
from cotenant.contract.grant import ContainerGrant, GPUShare, Grant, Isolation, IsolationRecord, Role
from cotenant.contract.inventory import Family, Inventory, InventoryError, Mode
from cotenant.contract.names import Names
from cotenant.contract.units import GIB
from cotenant.standins.api_server import ApiServer
from cotenant.standins.kubelet import Kubelet
from cotenant.standins.kubelet_api import ApiLink
from device_plugin.nvml import NVML
from device_plugin.plugin import DevicePlugin
from device_plugin.watchdog.proc import Processes

NAMES = Names()
NODE = "gpu-1"
SECONDS = 20.0


def uuid(index: int) -> str:
    """Name the index-th GPU of a test's node."""
    return f"GPU-{index:08x}"


def container_grant(
    name: str = "main", *, gpus: Sequence[int] = (0,), units: int = 8, role: Role = Role.MAIN
) -> ContainerGrant:
    """Grant *units* of 1 GiB, split over the GPUs with these indices."""
    share = units // len(gpus) * GIB
    return ContainerGrant(
        name=name,
        role=role,
        family=Family.MEMORY,
        mode=Mode.TIME_SLICING,
        gpus=tuple(GPUShare(uuid=uuid(index), bytes=share) for index in gpus),
        units=units,
        isolation=IsolationRecord(asked=Isolation.NONE, given=Isolation.NONE, enforced_by="nothing"),
    )


def container(name: str, units: int, **more: Any) -> dict[str, Any]:
    """Make a container as admission leaves it: it asks for units and reads its environment from annotations."""
    fields = {
        environment.VISIBLE_DEVICES: NAMES.visible_devices(name),
        environment.MPS_MEMORY: NAMES.mps_memory(name),
        environment.MPS_THREADS: NAMES.mps_threads(name),
        environment.MPS_PIPE: NAMES.mps_pipe(name),
    }
    env = [
        {"name": variable, "valueFrom": {"fieldRef": {"fieldPath": f"metadata.annotations['{key}']"}}}
        for variable, key in fields.items()
    ]
    return {"name": name, "resources": {"limits": {NAMES.gpu_mem: str(units)}}, "env": env, **more}


def pod_spec(*grants: ContainerGrant) -> dict[str, Any]:
    """Make the spec of a pod whose containers ask exactly for what *grants* give, bound to the node."""
    before = [
        container(g.name, g.units, **({"restartPolicy": "Always"} if g.role is Role.SIDECAR else {}))
        for g in grants
        if g.role is not Role.MAIN
    ]
    mains = [container(g.name, g.units) for g in grants if g.role is Role.MAIN]
    spec: dict[str, Any] = {"nodeName": NODE, "containers": mains or [{"name": "main"}]}
    return spec | ({"initContainers": before} if before else {})


def granted(*grants: ContainerGrant) -> dict[str, str]:
    """Give the annotations that the Binding of a pod with *grants* carries."""
    return environment.annotations(Grant(containers=grants), NAMES)


class Node:
    """Run it all; leave with everything stopped."""

    def __init__(
        self,
        gpus: Sequence[str] = ("80GiB",) * 2,
        *,
        plugin: bool = True,
        config: str = "",
        patience: float = SECONDS,
    ) -> None:
        """Take the memory of each GPU, whether the plugin runs from the start, and the plugin's configuration.

        *patience* are the seconds that a GPU may take to answer.
        """
        # a socket's path has 107 characters at most, which pytest's folders can exceed
        self.folder = Path(tempfile.mkdtemp(prefix="cotenant-"))
        self.gpu_file = self.folder / "gpus.yaml"
        self.proc = self.folder / "proc"
        self.config_file = self.folder / "configuration.yaml"
        self.write_gpus([{"memory": memory} for memory in gpus])
        self.patience = patience
        self.configure(config)
        self.api = ApiServer().start()
        self.api.add_node(NODE)
        self.kubeconfig = self.api.kubeconfig(self.folder / "kubeconfig")
        self._cluster = connect(self.kubeconfig)
        self._link = ApiLink(self._cluster, NODE, delete=self._delete)
        self.kubelet = Kubelet(NODE, self.folder / "kubelet", reporter=self._link, retry_seconds=0.02).start()
        self._link.start(self.kubelet)
        self.plugin: DevicePlugin | None = None
        self._nvml: NVML | None = None
        if plugin:
            self.start_plugin()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop_plugin()
        self._link.stop()
        self.kubelet.stop()
        self._cluster.close()
        self.api.stop()
        shutil.rmtree(self.folder)

    def configure(self, config: str) -> None:
        """Configure the next plugin that is started."""
        text = f"inventoryInterval: 0.05\n{config}"
        self.configuration = convert(text, DevicePluginConfiguration)
        self.edit(text)

    def edit(self, text: str) -> None:
        """Write the plugin's configuration file, good or bad, which a plugin that runs reads again."""
        written = self.config_file.with_suffix(".new")
        written.write_text(text)
        written.rename(self.config_file)

    def write_gpus(self, gpus: Sequence[Mapping[str, Any]]) -> None:
        """Write the file of made-up GPUs, which the plugin reads while it runs."""
        lines = []
        for index, gpu in enumerate(gpus):
            values = {"model": "NVIDIA H100 80GB HBM3", "memory": "80GiB", "uuid": uuid(index), **gpu}
            lines.append("  - {" + ", ".join(f"{key}: {value}" for key, value in values.items()) + "}")
        written = self.gpu_file.with_suffix(".new")
        written.write_text("gpus:\n" + "\n".join(lines) + "\n")
        written.rename(self.gpu_file)

    def add_process(self, pid: int, cgroup: str) -> None:
        """Have a process in that cgroup."""
        folder = self.proc / str(pid)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cgroup").write_text(f"0::{cgroup}\n")
        (folder / "stat").write_text(f"{pid} (python3 (x)) S 1 {pid}\n")

    def start_plugin(self, *, wait: bool = True) -> None:
        """Start the plugin and, unless told otherwise, wait until the kubelet has its devices."""
        ready = threading.Event()
        self._nvml = NVML.open(fake=self.gpu_file, patience=self.patience)
        self.plugin = DevicePlugin(
            configuration=self.configuration,
            cluster=self._cluster,
            nvml=self._nvml,
            node=NODE,
            plugin_folder=self.folder / "kubelet" / "device-plugins",
            pod_resources=self.kubelet.pod_resources.socket,
            ready=lambda _gpus: ready.set(),
            processes=Processes(self.proc),
            config_file=self.config_file,
        )
        self.plugin.start()
        if not wait:
            return
        if not ready.wait(SECONDS):
            raise TimeoutError("the plugin did not become ready")
        self.kubelet.wait(lambda: any(self.kubelet.devices.capacity()[1].values()), "the devices")

    def stop_plugin(self) -> None:
        """Stop the plugin as SIGTERM does."""
        if self.plugin is not None:
            self.plugin.stop()
            self.plugin = None
        if self._nvml is not None:
            self._nvml.close()

    def add_pod(
        self,
        name: str,
        *grants: ContainerGrant,
        annotations: Mapping[str, str] | None = None,
        spec: Mapping[str, Any] | None = None,
    ) -> str:
        """Bind a pod with *grants*, or with other *annotations* and *spec*; return its UID."""
        if annotations is None:
            annotations = granted(*grants)
        pod = self.api.add_pod(name, spec=spec or pod_spec(*grants), annotations=annotations)
        return str(pod["metadata"]["uid"])

    def running(self, uid: str) -> None:
        """Wait until a pod runs."""
        self.kubelet.wait(lambda: self.kubelet.phase(uid) == "Running", f"pod {uid} to run")

    def reconnected(self, disturb: Callable[[], None]) -> None:
        """Do what makes the kubelet lose the plugin; wait until it has all its devices again."""
        devices, before = self.kubelet.devices, self.kubelet.allocatable(NAMES.gpu_mem)
        lists = devices.lists
        disturb()

        def back() -> bool:
            return devices.lists > lists and devices.capacity()[1].get(NAMES.gpu_mem) == before

        self.kubelet.wait(back, "the plugin to register again")

    def settled(self, *uids: str) -> None:
        """Wait until each of these pods runs or has failed."""
        phases = {"Running", "Failed", "Succeeded"}
        self.kubelet.wait(lambda: all(self.kubelet.phase(uid) in phases for uid in uids), "pods to settle")

    def gpus_seen(self, uid: str, name: str = "main") -> str:
        """Give the UUIDs that a container sees in its environment."""
        started = self.kubelet.started(uid, name)
        assert started is not None, f"container {name} of pod {uid} has not started"
        return started.env[environment.VISIBLE_DEVICES]

    def ids(self, uid: str, name: str = "main") -> frozenset[str]:
        """Give the device ids that a container holds."""
        return self.kubelet.devices.held(uid, name).get(NAMES.gpu_mem, frozenset())

    def published(self) -> Inventory | None:
        """Give the inventory on the node; None when there is none to read."""
        node = self.api.node(NODE) or {}
        text = (node.get("metadata", {}).get("annotations") or {}).get(NAMES.inventory)
        try:
            return None if text is None else inventory.decode(text)
        except InventoryError:
            return None

    def wait_published(self, what: str, condition: Any) -> Inventory:
        """Wait until the node's inventory meets *condition*."""
        if not self.api.wait_until(lambda: (i := self.published()) is not None and condition(i), SECONDS):
            raise TimeoutError(f"the node's inventory never was {what}: {self.published()}")
        found = self.published()
        assert found is not None
        return found

    def _delete(self, namespace: str, name: str) -> None:
        if self.api.pod(name, namespace) is not None:
            self.api.delete_pod(name, namespace=namespace, grace=0)
