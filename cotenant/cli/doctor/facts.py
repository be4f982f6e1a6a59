"""What the doctor looks at: everything is read once, before anything is judged, and nothing is written."""

import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, TypeVar

import msgspec
import yaml

from cotenant.cluster import ApiError, Cluster, ClusterError, Unreachable
from cotenant.cluster.listing import every
from cotenant.contract.configuration import (
    ConfigurationError,
    DevicePluginConfiguration,
    ExtenderConfiguration,
    convert,
)
from cotenant.contract.names import Names

Json = Mapping[str, Any]
C = TypeVar("C", ExtenderConfiguration, DevicePluginConfiguration)

OURS = {"labelSelector": "app.kubernetes.io/name=cotenant"}
EXTENDER, PLUGIN = "cotenant-extender", "cotenant-device-plugin"
_TIMEOUT_SECONDS = 30.0

# Where objects are listed: below a namespace of ours or of all, and with our label or not.
_ADMISSION = "/apis/admissionregistration.k8s.io/v1"
_LISTED = {
    "deployments": ("/apis/apps/v1/namespaces/{}/deployments", OURS),
    "daemonsets": ("/apis/apps/v1/namespaces/{}/daemonsets", OURS),
    "services": ("/api/v1/namespaces/{}/services", OURS),
    "configmaps": ("/api/v1/namespaces/{}/configmaps", {}),
    "networkpolicies": ("/apis/networking.k8s.io/v1/namespaces/{}/networkpolicies", OURS),
    "mutatingadmissionpolicies": (f"{_ADMISSION}/mutatingadmissionpolicies", OURS),
    "mutatingadmissionpolicybindings": (f"{_ADMISSION}/mutatingadmissionpolicybindings", OURS),
    "validatingadmissionpolicies": (f"{_ADMISSION}/validatingadmissionpolicies", OURS),
    "validatingadmissionpolicybindings": (f"{_ADMISSION}/validatingadmissionpolicybindings", OURS),
    "mutatingwebhookconfigurations": (f"{_ADMISSION}/mutatingwebhookconfigurations", OURS),
    "validatingwebhookconfigurations": (f"{_ADMISSION}/validatingwebhookconfigurations", OURS),
    "nodes": ("/api/v1/nodes", {}),
    "pods": ("/api/v1/pods", {}),
    "leases": ("/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases", {}),
    "writers": ("/apis/coordination.k8s.io/v1/namespaces/{}/leases", {}),
    "refusals": ("/apis/events.k8s.io/v1/events", {"fieldSelector": "reason=FailedScheduling"}),
}


class Workload(msgspec.Struct, frozen=True):
    """Hold a Deployment or DaemonSet, its pods' specification, and the files that its ConfigMaps mount, by name."""

    body: Json
    files: Mapping[str, str]

    @property
    def name(self) -> str:
        """Name it."""
        return str(self.body["metadata"]["name"])

    @property
    def spec(self) -> Json:
        """Give the specification of its pods."""
        spec: Json = self.body["spec"]["template"]["spec"]
        return spec

    @property
    def containers(self) -> list[Json]:
        """List its containers, sidecars first."""
        return [*self.spec.get("initContainers", ()), *self.spec["containers"]]

    def container(self, program: str) -> Json | None:
        """Find the container that runs *program*."""
        return next((one for one in self.containers if one.get("command", [""])[0] == program), None)


class Facts(msgspec.Struct, frozen=True):
    """Hold all that was read; what could not be is said in *unread*, by what it was."""

    namespace: str
    version: str
    objects: Mapping[str, list[Json]]
    unread: Mapping[str, str]
    # what the extender answered by path, or why it did not
    extender: Mapping[str, str | ClusterError]
    # seconds since 1970, here
    now: float

    def of(self, what: str) -> list[Json]:
        """List objects of one kind; none where they could not be read."""
        return self.objects.get(what, [])

    def workload(self, program: str) -> Workload | None:
        """Find what runs one of our programs."""
        for body in (*self.of("deployments"), *self.of("daemonsets")):
            found = Workload(body, self._files(body))
            if found.container(program) is not None:
                return found
        return None

    def extender_configuration(self) -> ExtenderConfiguration | ConfigurationError | None:
        """Read the extender's configuration, as it would itself; None where there is none."""
        return self._configuration(EXTENDER, ExtenderConfiguration)

    def plugin_configuration(self) -> DevicePluginConfiguration | ConfigurationError | None:
        """Read the device plugins' configuration, as they would themselves; None where there is none."""
        return self._configuration(PLUGIN, DevicePluginConfiguration)

    def _configuration(self, program: str, kind: type[C]) -> C | ConfigurationError | None:
        workload = self.workload(program)
        text = workload.files.get(f"{program.removeprefix('cotenant-')}-config.yaml") if workload else None
        if text is None:
            return None
        try:
            return convert(text, kind)
        except ConfigurationError as error:
            return error

    def scheduler_configuration(self) -> Json | None:
        """Read the second scheduler's configuration; None where there is none, as in the attached layout."""
        workload = self.workload(EXTENDER)
        text = workload.files.get("scheduler-config.yaml") if workload else None
        found = yaml.safe_load(text) if text else None
        return found if isinstance(found, dict) else None

    @property
    def names(self) -> Names:
        """Give the names under the configured domain."""
        found = self.extender_configuration()
        return found.names if isinstance(found, ExtenderConfiguration) else Names()

    @property
    def gpu_nodes(self) -> list[Json]:
        """List the nodes that have our label or publish an inventory."""
        label = f"{self.names.domain}/device-plugin"
        return [
            node
            for node in self.of("nodes")
            if labels(node).get(label) == "true" or self.names.inventory in annotations(node)
        ]

    def _files(self, body: Json) -> dict[str, str]:
        volumes = body["spec"]["template"]["spec"].get("volumes", ())
        wanted = {volume["configMap"]["name"] for volume in volumes if "configMap" in volume}
        maps = [one for one in self.of("configmaps") if one["metadata"]["name"] in wanted]
        return {name: text for one in maps for name, text in (one.get("data") or {}).items()}


def labels(body: Json) -> Json:
    """Give an object's labels."""
    return body["metadata"].get("labels") or {}


def annotations(body: Json) -> Json:
    """Give an object's annotations."""
    return body["metadata"].get("annotations") or {}


def gather(cluster: Cluster, *, service: str) -> Facts:
    """Read everything; what may not be read, or is not there on this version of Kubernetes, is noted, not raised.

    Raises ClusterError only where the API server does not answer at all, or not as one.
    """
    namespace, _, name = service.partition("/")
    version = _version(cluster)
    objects: dict[str, list[Json]] = {}
    unread: dict[str, str] = {}
    for what, (path, query) in _LISTED.items():
        try:
            objects[what] = [msgspec.json.decode(raw) for raw in every(cluster, path.format(namespace), query)]
        except ApiError as error:
            unread[what] = error.message
    proxy = f"/api/v1/namespaces/{namespace}/services/{name}/proxy"
    answers = dict(_asked(cluster, proxy, ("/readyz", "/version")))
    return Facts(
        namespace=namespace, version=version, objects=objects, unread=unread, extender=answers, now=time.time()
    )


class _Version(msgspec.Struct, frozen=True, rename="camel"):
    git_version: str


def _version(cluster: Cluster) -> str:
    body = cluster.get("/version", timeout=_TIMEOUT_SECONDS).body
    try:
        return msgspec.json.decode(body, type=_Version).git_version
    except msgspec.MsgspecError as error:
        raise Unreachable(f"what the kubeconfig names is no API server, by its answer to /version: {error}") from error


def _asked(cluster: Cluster, root: str, paths: Iterable[str]) -> Iterator[tuple[str, str | ClusterError]]:
    for path in paths:
        try:
            yield path, cluster.get(root + path, timeout=_TIMEOUT_SECONDS).body.decode(errors="replace")
        except ClusterError as error:
            yield path, error


def seconds(timestamp: str) -> float:
    """Read a time as the API writes it, in seconds since 1970."""
    return datetime.fromisoformat(timestamp).timestamp()
