"""A real extender, in threads of this process, over HTTP against the stand-in API server."""

import http.client
import re
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Self

import msgspec

from cotenant.cluster import connect
from cotenant.contract import grant as grants
from cotenant.contract import inventory as inventories
from cotenant.contract.configuration import ExtenderConfiguration
from cotenant.standins.api_rules import NODES, PODS
from cotenant.standins.api_server import ApiServer
from extender.ledger import Stage
from extender.program import Extender
from tests.builders import NAMES, Json, NodeBuilder, PodBuilder, a_pod

# Far longer than anything takes, also on a busy machine: a wait that reaches it is a failure.
PATIENCE = 30.0


class Answer(NamedTuple):
    """What came back over HTTP."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.body)


def call(address: str, method: str, path: str, body: bytes | Json | None = None, **headers: str) -> Answer:
    """Make one request on a connection of its own."""
    host, _, port = address.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=PATIENCE)
    try:
        raw = body if isinstance(body, bytes | None) else msgspec.json.encode(body)
        connection.request(method, path, raw, {"Content-Type": "application/json", **headers})
        reply = connection.getresponse()
        return Answer(reply.status, {key.lower(): value for key, value in reply.getheaders()}, reply.read())
    finally:
        connection.close()


def eventually(predicate: Callable[[], object]) -> bool:
    """Wait until *predicate* holds; tell whether it came to hold before our patience ended."""
    pause = threading.Event()
    for _ in range(int(PATIENCE / 0.01)):
        if predicate():
            return True
        pause.wait(0.01)
    return False


def submit(api: ApiServer, pod: PodBuilder) -> Json:
    """Create the pod and give it as kube-scheduler sends it: without apiVersion and kind."""
    stored = api.create(PODS, pod.as_json(), pod.namespace)
    return {key: value for key, value in stored.items() if key not in {"apiVersion", "kind"}}


def add(api: ApiServer, *nodes: NodeBuilder) -> None:
    """Create the nodes."""
    for node in nodes:
        api.create(NODES, node.as_json())


def nominee(api: ApiServer, name: str, namespace: str = "default") -> str | None:
    """Say which node a pod is nominated to."""
    pod = api.pod(name, namespace=namespace)
    assert pod is not None
    node: str | None = pod["status"].get("nominatedNodeName")
    return node


def filter_args(pod: Json, *nodes: str) -> Json:
    """Ask as kube-scheduler 1.36 does with nodeCacheCapable."""
    return {"Pod": pod, "Nodes": None, "NodeNames": list(nodes)}


def bind_args(pod: Json, node: str) -> Json:
    metadata = pod["metadata"]
    return {
        "PodName": metadata["name"],
        "PodNamespace": metadata["namespace"],
        "PodUID": metadata["uid"],
        "Node": node,
    }


class Running:
    """Be one running extender; leaving it stops it."""

    def __init__(self, api: ApiServer, directory: Path, *, wait: bool = True, **configuration: Any) -> None:
        self._api = api
        self._cluster = connect(api.kubeconfig(directory / "kubeconfig"))
        fields = {"listen": "127.0.0.1:0", "serve": "127.0.0.1:0", "bindTimeout": 1.0, **configuration}
        self.extender = Extender(msgspec.convert(fields, ExtenderConfiguration), self._cluster)
        self.ledger = self.extender._ledger
        self._wait = wait
        self._stopping = threading.Event()
        self._ready = threading.Event()
        self.sentence = ""
        self._thread = threading.Thread(target=self.extender.run, args=(self._stopping, self._be_ready))

    def _be_ready(self, sentence: str) -> None:
        self.sentence = sentence
        self._ready.set()

    def __enter__(self) -> Self:
        self._thread.start()
        if self._wait:
            assert self._ready.wait(PATIENCE)
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(PATIENCE)
        self._cluster.close()
        assert not self._thread.is_alive()

    @property
    def address(self) -> str:
        """Where the verbs are answered."""
        return self.extender._servers[0].address

    @property
    def other_address(self) -> str:
        """Where everything else is."""
        return self.extender._servers[-1].address

    def get(self, path: str) -> Answer:
        return call(self.other_address, "GET", path)

    def post(self, path: str, body: bytes | Json, **headers: str) -> Answer:
        return call(self.address, "POST", path, body, **headers)

    def filter(self, pod: Json, *nodes: str) -> Json:
        answer = self.post("/filter", filter_args(pod, *nodes))
        assert 200 == answer.status
        result: Json = answer.json
        return result

    def fitting(self, pod: Json, *nodes: str) -> list[str]:
        """Give the nodes that filter lets the pod onto, in order."""
        return sorted(self.filter(pod, *nodes)["NodeNames"])

    def prioritize(self, pod: Json, *nodes: str) -> dict[str, int]:
        return {one["Host"]: one["Score"] for one in self.post("/prioritize", filter_args(pod, *nodes)).json}

    def bind(self, pod: Json, node: str) -> str:
        """Bind, and give the error, "" for none."""
        answer = self.post("/bind", bind_args(pod, node))
        assert 200 == answer.status
        error: str = answer.json["Error"]
        return error

    def metric(self, sample: str) -> float:
        """Read one sample, given with its labels."""
        found = re.search(rf"^{re.escape(sample)} (\S+)$", self.get("/metrics").body.decode(), re.MULTILINE)
        return float(found[1]) if found else 0.0

    def stage(self, pod: Json) -> Stage | None:
        hold = self.ledger.hold(pod["metadata"]["uid"])
        return hold.stage if hold else None

    def check_unharmed(self) -> None:
        """Find nothing lost, nothing over-committed, one write per bound pod, and an extender that answers."""
        assert 200 == self.get("/healthz").status
        stranger = a_pod().named("somebody-else").as_json()
        assert ["anywhere"] == self.filter(stranger, "anywhere")["NodeNames"]
        assert [] == over_committed(self._api)
        assert eventually(self._knows_all)
        bindings = Counter(
            (write.namespace, write.name)
            for write in self._api.writes
            if (write.resource, write.subresource, write.status) == ("pods", "binding", 201)
        )
        # a name may have been bound once for each pod of that name
        assert [] == [key for key, count in bindings.items() if count > 1]
        assert [] == [
            write
            for write in self._api.writes
            if write.resource == "pods"
            and write.subresource not in {"binding", "status", "eviction"}
            and write.namespace != "cotenant-system"  # the extender labels its own pod
        ]

    def _knows_all(self) -> bool:
        """Tell whether every pod that is bound with a grant holds it in the ledger."""
        bound = {
            pod["metadata"]["uid"]
            for pod in self._api.pods()
            if pod["spec"].get("nodeName")
            and NAMES.grant in pod["metadata"].get("annotations", {})
            and pod["status"].get("phase") not in {"Succeeded", "Failed"}
        }
        return bound == {hold.uid for hold in self.ledger.holds() if hold.stage is Stage.BOUND}


def over_committed(api: ApiServer) -> list[str]:
    """Add up what the API server's pods were granted, and name the GPUs of which that is more than there is."""
    held: Counter[str] = Counter()
    for pod in api.pods():
        text = pod["metadata"].get("annotations", {}).get(NAMES.grant)
        if text and pod["spec"].get("nodeName") and pod["status"].get("phase") not in {"Succeeded", "Failed"}:
            try:
                held.update(grants.decode(text).charges())
            except grants.GrantError:
                continue
    usable: Counter[str] = Counter()
    for node in api.nodes():
        try:
            inventory = inventories.decode(node["metadata"].get("annotations", {}).get(NAMES.inventory, ""))
        except inventories.InventoryError:
            continue
        usable.update({gpu.uuid: gpu.usable_bytes for gpu in inventory.gpus})
    return [uuid for uuid, amount in held.items() if uuid in usable and amount > usable[uuid]]
