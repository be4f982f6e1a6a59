"""The JSON that kube-scheduler 1.36 sends and reads (k8s.io/kube-scheduler/extender/v1/types.go).

The Go types have no JSON tags, so the names are Go's. A decoder ignores fields that it does not know.
"""

import msgspec

from cotenant.contract.pods import Pod


class _ObjectMeta(msgspec.Struct, frozen=True):
    name: str


class _Named(msgspec.Struct, frozen=True):
    metadata: _ObjectMeta


class NodeList(msgspec.Struct, frozen=True):
    """Hold whole Nodes as they came: nothing in them is read but their names."""

    items: list[msgspec.Raw] | None = None


class ExtenderArgs(msgspec.Struct, frozen=True):
    """Hold what filter and prioritize are called with: a pod, and nodes by name or whole."""

    Pod: Pod
    NodeNames: list[str] | None = None
    Nodes: NodeList | None = None

    def names(self) -> list[str]:
        """Give the nodes' names in the order sent."""
        return self.NodeNames if self.NodeNames is not None else list(self.whole_nodes())

    def whole_nodes(self) -> dict[str, msgspec.Raw]:
        """Give the nodes that were sent whole, by name."""
        items = (self.Nodes.items if self.Nodes else None) or []
        return {_node.decode(item).metadata.name: item for item in items}


_node = msgspec.json.Decoder(_Named)


class FilterResult(msgspec.Struct, frozen=True):
    """Answer filter: the nodes that fit, in the form they were sent, and for each other node why not."""

    NodeNames: list[str] | None = None
    Nodes: NodeList | None = None
    FailedNodes: dict[str, str] = {}
    FailedAndUnresolvableNodes: dict[str, str] = {}
    Error: str = ""


class HostPriority(msgspec.Struct, frozen=True):
    """Answer prioritize for one node; anything but a whole number would make kube-scheduler drop the whole list."""

    Host: str
    Score: int


class BindArgs(msgspec.Struct, frozen=True):
    """Hold what bind is called with."""

    PodName: str
    PodNamespace: str
    PodUID: str
    Node: str

    @property
    def key(self) -> str:
        """Name the pod for people."""
        return f"{self.PodNamespace}/{self.PodName}"


class BindResult(msgspec.Struct, frozen=True):
    """Answer bind: an empty Error is a success."""

    Error: str = ""
