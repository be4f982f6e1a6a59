"""The JSON that kube-scheduler 1.36 sends and reads (k8s.io/kube-scheduler/extender/v1/types.go).

The Go types have no JSON tags, so the names are Go's. A decoder ignores fields that it does not know.
"""

import msgspec

from cotenant.contract.pods import Pod

_CALLS_KEPT = 2
_LISTS_KEPT = 4


class _ObjectMeta(msgspec.Struct, frozen=True):
    name: str


class _Named(msgspec.Struct, frozen=True):
    metadata: _ObjectMeta


class NodeList(msgspec.Struct, frozen=True):
    """Hold whole Nodes as they came: nothing in them is read but their names."""

    items: list[msgspec.Raw] | None = None


class Candidates:
    """Be the nodes that filter or prioritize is asked about, by name, in the order sent.

    *raw* is the JSON that they came as, empty where they came as whole nodes. *located* is for the judge, which keeps
    here where in its table they are.
    """

    __slots__ = ("located", "names", "raw")

    def __init__(self, names: list[str], raw: bytes = b"") -> None:
        self.names = names
        self.raw = raw
        self.located: object = None

    @property
    def raw_names(self) -> list[str] | msgspec.Raw:
        """Give the names to answer with all of them, in the bytes that they came as; none is a list without any."""
        return msgspec.Raw(self.raw) if self.names else []


class ExtenderArgs:
    """Hold what filter and prioritize are called with: a pod, and nodes by name or *whole*.

    *weighed* is for the verbs: what filter has found out and prioritize need not find out again.
    """

    __slots__ = ("candidates", "pod", "weighed", "whole")

    def __init__(self, pod: Pod, candidates: Candidates, whole: dict[str, msgspec.Raw] | None = None) -> None:
        self.pod = pod
        self.candidates = candidates
        self.whole = whole
        self.weighed: object = None


class _ExtenderArgs(msgspec.Struct, frozen=True):
    Pod: Pod
    NodeNames: msgspec.Raw = msgspec.Raw(b"null")
    Nodes: NodeList | None = None


class ArgsReader:
    """Read what filter and prioritize are called with; safe to use from many threads.

    The last calls are kept as they were read: where filter has refused no node, prioritize is sent the same bytes
    again. So are the last lists of names, which a scheduler that looks at all nodes sends for every pod: 0.5 of 0.8 ms
    at 5,000 names. They are compared, not looked up by a hash: bytes that differ do so early, and to hash 12 KB twice
    took a fifteenth of a filter (docs/decisions/0104).
    """

    def __init__(self) -> None:
        # replaced as a whole; of two threads that do so at once one is not remembered
        self._calls: tuple[tuple[bytes, ExtenderArgs], ...] = ()
        self._candidates: tuple[Candidates, ...] = ()

    def __call__(self, body: bytes) -> ExtenderArgs:
        """Read a body; raise MsgspecError where it is no such call."""
        for known, call in self._calls:
            if known == body:
                return call
        call = self._read(body)
        if call.whole is None:  # whole nodes are megabytes
            self._calls = (body, call), *self._calls[: _CALLS_KEPT - 1]
        return call

    def _read(self, body: bytes) -> ExtenderArgs:
        args = _args.decode(body)
        raw = bytes(args.NodeNames)
        if raw == b"null":
            whole = {_node.decode(item).metadata.name: item for item in (args.Nodes and args.Nodes.items) or ()}
            return ExtenderArgs(args.Pod, Candidates(list(whole)), whole)
        for candidates in self._candidates:
            if candidates.raw == raw:
                return ExtenderArgs(args.Pod, candidates)
        candidates = Candidates(_names.decode(raw), raw)
        self._candidates = candidates, *self._candidates[: _LISTS_KEPT - 1]
        return ExtenderArgs(args.Pod, candidates)


_args = msgspec.json.Decoder(_ExtenderArgs)
_names = msgspec.json.Decoder(list[str])
_node = msgspec.json.Decoder(_Named)


class FilterResult(msgspec.Struct, frozen=True):
    """Answer filter: the nodes that fit, in the form they were sent, and for each other node why not."""

    NodeNames: list[str] | msgspec.Raw | None = None
    Nodes: NodeList | None = None
    FailedNodes: dict[str, str] = {}
    FailedAndUnresolvableNodes: dict[str, str] = {}
    Error: str = ""


class HostPriority(msgspec.Struct, frozen=True, gc=False):
    """Answer prioritize for one node; anything but a whole number would make kube-scheduler drop the whole list."""

    Host: str
    Score: int


class MetaPod(msgspec.Struct, frozen=True):
    """Name a pod by its UID."""

    UID: str


class MetaVictims(msgspec.Struct, frozen=True):
    """Name the pods to evict from one node, and say how many of them against a disruption budget."""

    Pods: list[MetaPod] | None = None
    NumPDBViolations: int = 0


class _Victims(msgspec.Struct, frozen=True):
    Pods: list[Pod] | None = None
    NumPDBViolations: int = 0


class PreemptionArgs(msgspec.Struct, frozen=True):
    """Hold what preempt is called with: the pod, and victims by node, by UID or, without nodeCacheCapable, whole."""

    Pod: Pod
    NodeNameToMetaVictims: dict[str, MetaVictims] | None = None
    NodeNameToVictims: dict[str, _Victims] | None = None

    def proposed(self) -> dict[str, MetaVictims]:
        """Give kube-scheduler's own victims by node."""
        if self.NodeNameToMetaVictims is not None:
            return self.NodeNameToMetaVictims
        return {
            node: MetaVictims([MetaPod(pod.uid) for pod in one.Pods or ()], one.NumPDBViolations)
            for node, one in (self.NodeNameToVictims or {}).items()
        }


class PreemptionResult(msgspec.Struct, frozen=True):
    """Answer preempt: nodes that are left out are no candidates any more; each must have a victim."""

    NodeNameToMetaVictims: dict[str, MetaVictims]


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
