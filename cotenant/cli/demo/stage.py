"""Everything the demo runs: the real extender and device plugins as processes, and stand-ins for all around them."""

import contextlib
import functools
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Self

import msgspec
import structlog

from cotenant.cli.demo.children import Children, DemoError
from cotenant.cli.demo.scene import Node
from cotenant.cli.options import SERVICE
from cotenant.cluster import Cluster, connect
from cotenant.contract import inventory as inventories
from cotenant.contract.inventory import Family, Health, Inventory, InventoryError
from cotenant.contract.names import Names
from cotenant.standins.api_server import ApiServer
from cotenant.standins.kubelet import Kubelet
from cotenant.standins.kubelet_api import ApiLink
from cotenant.standins.scheduler import Scheduler
from cotenant.standins.scheduler_extender import ExtenderError, HTTPExtender
from cotenant.standins.scheduler_rules import Pod, PodMetadata
from cotenant.standins.webhooks import Webhooks

EXTENDER = "cotenant-extender"
PLUGIN = "cotenant-device-plugin"

_ANY_PORT = "127.0.0.1:0"
_SEEN_SECONDS = 20.0
_ASK_AGAIN_SECONDS = 0.02
# The path of a socket has at most 107 bytes (unix(7)); ours end in
# /cotenant-demo-12345678/gpu-a100-1/device-plugins/cotenant.io-gpu-mem-12.sock
_LONGEST_TEMP = 28


class OverheardExtender(HTTPExtender):
    """Remember the last scores that the scheduler got for each pod."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.scores: dict[str, dict[str, int]] = {}

    def prioritize(self, pod: Pod, nodes: Sequence[str]) -> dict[str, int]:
        """Score, and remember."""
        self.scores[pod.metadata.name] = super().prioritize(pod, nodes)
        return self.scores[pod.metadata.name]


class Stage:
    """Hold all parts, in a folder of their own; a context manager that leaves neither processes nor files behind."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self._nodes = nodes
        self._closing = contextlib.ExitStack()
        self.names = Names()
        self.api = ApiServer()
        self.kubelets: dict[str, Kubelet] = {}
        self.folder = Path()
        self.kubeconfig = Path()
        # HOST:PORT of the extender
        self.verbs = ""
        self.serve = ""
        self.extender: OverheardExtender

    def __enter__(self) -> Self:
        # what fails half-way is taken apart as well
        with contextlib.ExitStack() as stack:
            try:
                self._begin(stack)
            except OSError as error:
                sentence = f"its files cannot be written: {error.strerror}; set TMPDIR to a folder with room"
                raise DemoError(sentence) from error
            self._closing = stack.pop_all()
        return self

    def _begin(self, stack: contextlib.ExitStack) -> None:
        temporary = tempfile.gettempdir()
        if len(temporary) > _LONGEST_TEMP:
            raise DemoError(f"the folder {temporary} is too long a name for sockets: set TMPDIR to a shorter")
        self.folder = Path(tempfile.mkdtemp(prefix="cotenant-demo-"))
        stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
        self.logs = self.folder / "logs"
        self.logs.mkdir()
        log = stack.enter_context((self.logs / "standins.log").open("w"))
        structlog.configure(logger_factory=structlog.PrintLoggerFactory(log))
        self.api.start()
        stack.callback(self.api.stop)
        self.kubeconfig = Path(self._kubeconfig("you"))
        self.children = Children(self.logs)
        stack.callback(self.children.end)

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def start(self, told: Callable[[str, str], None]) -> None:
        """Start all parts, side by side where they allow it, and wait until each knows of the others.

        *told* gets each program's name and what it said when it was ready. Raises DemoError with what did not come up.
        """
        with ThreadPoolExecutor(len(self._nodes) + 1) as starters, contextlib.ExitStack() as ending:
            # when this is left by an exception, the threads must not go on waiting for what they start
            ending.callback(self.children.end)
            parts = [starters.submit(self._start_extender)]
            for node in self._nodes:
                self._start_kubelet(node)
                parts.append(starters.submit(self._start_plugin, node))
            for part in as_completed(parts):
                told(*part.result())
            ending.pop_all()
        self._wait_for_nodes()
        scheduler = Scheduler(self._cluster("kube-scheduler"), self.extender)
        self._closing.callback(scheduler.stop)
        scheduler.start()

    def inventory(self, node: str) -> Inventory | None:
        """Read what a node's device plugin has published."""
        found = self.api.node(node) or {"metadata": {}}
        try:
            return inventories.decode(found["metadata"]["annotations"][self.names.inventory])
        except (KeyError, InventoryError):
            return None

    def _start_extender(self) -> tuple[str, str]:
        ready = self.children.start(
            EXTENDER,
            EXTENDER,
            *("--kubeconfig", self._kubeconfig(EXTENDER), "--listen", _ANY_PORT, "--serve", _ANY_PORT),
            ready=r"ready: (?:verbs on (\S+), everything else|everything) on ([^\s;]+)",
        )
        self.serve = ready[2]
        self.verbs = ready[1] or self.serve
        self.api.services[SERVICE.replace("/", "/services/")] = self.serve
        self.extender = OverheardExtender(f"http://{self.verbs}")
        self._closing.callback(self.extender.close)
        self.api.store.admit = Webhooks(f"http://{self.serve}/admission", user="you")
        return EXTENDER, f"HTTP on {self.verbs}"

    def _start_kubelet(self, node: Node) -> None:
        self.api.add_node(node.name)
        cluster = self._cluster(f"kubelet-{node.name}")
        link = ApiLink(cluster, node.name, delete=lambda ns, name: self.api.delete_pod(name, namespace=ns, grace=0))
        kubelet = Kubelet(node.name, self.folder / node.name, reporter=link)
        kubelet.start()
        self._closing.callback(kubelet.stop)
        link.start(kubelet)
        self._closing.callback(link.stop)
        self.kubelets[node.name] = kubelet

    def _start_plugin(self, node: Node) -> tuple[str, str]:
        fake_gpus = self.folder / f"{node.name}.gpus.yaml"
        fake_gpus.write_bytes(node.fake_gpus())
        config = self.folder / f"{node.name}.yaml"
        config.write_bytes(node.configuration(self.folder))
        ready = self.children.start(
            f"{PLUGIN}-{node.name}",
            PLUGIN,
            *("--kubeconfig", self._kubeconfig(f"{PLUGIN}-{node.name}"), "--node-name", node.name),
            *("--config", str(config), "--kubelet-dir", str(self.folder / node.name), "--fake-gpus", str(fake_gpus)),
            *("--pod-resources", str(self.kubelets[node.name].pod_resources.socket)),
            ready=r"ready: .* (\d+ units of \S+ \S+) on",
        )
        return PLUGIN, f"gRPC on {node.name}: {ready[1]}"

    def _wait_for_nodes(self) -> None:
        """Wait until every node advertises its memory and the extender has seen it."""
        for node in self._nodes:
            if not self.api.wait_until(functools.partial(self._advertises, node.name), _SEEN_SECONDS):
                raise DemoError(
                    f"node {node.name} does not advertise its GPUs; the device plugin's last words:\n"
                    f"{self.children.last_words(f'{PLUGIN}-{node.name}')}"
                )
        one = {"resources": {"limits": {self.names.gpu_mem: 1, self.names.managed: 0}}, "name": "probe"}
        probe = Pod(PodMetadata(name="probe", uid="probe"), {"containers": [one]})
        names = [node.name for node in self._nodes]
        for _ in self._patience():
            try:
                left, failed = self.extender.filter(probe, names)
            except ExtenderError as error:
                left, failed = [], {"all nodes": str(error)}
            if len(left) == len(names):
                return
        raise DemoError(f"the extender does not see the nodes: {failed}")

    def _advertises(self, node: str) -> bool:
        inventory = self.inventory(node)
        if inventory is None or not inventory.serving:
            return False
        if any(gpu.health is Health.UNHEALTHY for gpu in inventory.gpus):
            return False  # its MPS daemon is not there yet
        memory = [gpu.usable_bytes for gpu in inventory.gpus if gpu.family is Family.MEMORY]
        wanted = {self.names.gpu_mem: str(sum(memory) // inventory.unit_bytes)}
        for gpu in inventory.gpus:
            for profile in gpu.mig.profiles if gpu.mig is not None else ():
                wanted[self.names.mig(profile.name)] = str(profile.max_instances)
        status: dict[str, Any] = (self.api.node(node) or {}).get("status", {})
        return bool(wanted.items() <= status.get("allocatable", {}).items())

    def _patience(self) -> Iterator[None]:
        ends = time.monotonic() + _SEEN_SECONDS
        while time.monotonic() < ends:
            yield
            time.sleep(_ASK_AGAIN_SECONDS)

    def _kubeconfig(self, user: str) -> str:
        return self.api.kubeconfig(self.folder / f"{user}.kubeconfig", user=user)

    def _cluster(self, user: str) -> Cluster:
        return self._closing.enter_context(connect(self._kubeconfig(user)))


def submit(stage: Stage, pod: dict[str, Any]) -> dict[str, Any]:
    """Create a pod as a user does; raises ApiError with the API server's refusal."""
    with connect(str(stage.kubeconfig)) as you:
        body = you.post("/api/v1/namespaces/default/pods", msgspec.json.encode(pod)).body
    created: dict[str, Any] = msgspec.json.decode(body)
    return created
