"""The side of an HTTP extender that kube-scheduler 1.36 has: what it sends, and what it makes of the answers.

Functions name what they follow in pkg/scheduler/extender.go. The extender gets nodes by name (nodeCacheCapable).
"""

import http.client
import select
import threading
from collections.abc import Sequence
from typing import TypeVar
from urllib.parse import urlsplit

import msgspec

from cotenant.contract.names import Names
from cotenant.standins.scheduler_rules import Pod

# The resource that has the extender asked, which the scheduler itself ignores (managedResources, ignoredByScheduler).
MANAGED = Names().managed
# Go's default for http.Transport, which the scheduler does not change: more calls at once mean more new connections.
_IDLE_CONNECTIONS = 2
_OK = 200

T = TypeVar("T")


class FilterResult(msgspec.Struct, frozen=True):
    """Read filter's answer; no list at all means that no node is left."""

    NodeNames: list[str] | None = None
    FailedNodes: dict[str, str] | None = None
    FailedAndUnresolvableNodes: dict[str, str] | None = None
    Error: str = ""


class HostPriority(msgspec.Struct, frozen=True):
    """Read the score of one node; a float is no int64, so the whole list fails to decode."""

    Host: str = ""
    Score: int = 0


class BindResult(msgspec.Struct, frozen=True):
    """Read bind's answer."""

    Error: str = ""


_filter_result = msgspec.json.Decoder(FilterResult)
_priorities = msgspec.json.Decoder(list[HostPriority])
_bind_result = msgspec.json.Decoder(BindResult)


class ExtenderError(Exception):
    """Say why a call failed, in the words that kube-scheduler puts into the pod's condition."""


class HTTPExtender:
    """Call one extender; safe to use from many threads.

    *url* is the prefix of the verbs. *timeout* is httpTimeout in seconds; it counts for each read, while Go's counts
    for the whole request.
    """

    def __init__(self, url: str, *, timeout: float = 5.0) -> None:
        self._url = url.rstrip("/")
        self._timeout = timeout
        self._idle: list[http.client.HTTPConnection] = []
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close the idle connections."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def is_interested(self, pod: Pod) -> bool:
        """Tell whether any container names the managed resource, were it with quantity 0 (IsInterested)."""
        containers = [*(pod.spec.get("containers") or ()), *(pod.spec.get("initContainers") or ())]
        resources = [container.get("resources") or {} for container in containers]
        return any(MANAGED in (r.get(key) or ()) for r in resources for key in ("requests", "limits"))

    def filter(self, pod: Pod, nodes: Sequence[str]) -> tuple[list[str], dict[str, str]]:
        """Give the nodes that are left, and the message for others that has one (Filter); raise ExtenderError."""
        result = self._send("filter", {"Pod": pod, "Nodes": None, "NodeNames": nodes}, _filter_result)
        if result.Error:
            raise ExtenderError(result.Error)
        for node in result.NodeNames or ():
            if node not in nodes:
                raise ExtenderError(
                    f'extender "{self._url}" claims a filtered node "{node}" which is not found in the input node list'
                )
        # in both maps, unresolvable wins (findNodesThatPassExtenders)
        return result.NodeNames or [], {**(result.FailedNodes or {}), **(result.FailedAndUnresolvableNodes or {})}

    def prioritize(self, pod: Pod, nodes: Sequence[str]) -> dict[str, int]:
        """Give the score of each node that has one, with weight 1 (Prioritize); raise ExtenderError."""
        args = {"Pod": pod, "Nodes": None, "NodeNames": nodes}
        scores: dict[str, int] = {}
        for priority in self._send("prioritize", args, _priorities):
            scores[priority.Host] = scores.get(priority.Host, 0) + priority.Score
        return scores

    def bind(self, pod: Pod, node: str) -> None:
        """Have the extender bind the pod (Bind); raise ExtenderError."""
        metadata = pod.metadata
        args = {
            "PodName": metadata.name,
            "PodNamespace": metadata.namespace,
            "PodUID": metadata.uid,
            "Node": node,
        }
        if error := self._send("bind", args, _bind_result).Error:
            raise ExtenderError(error)

    def _send(self, verb: str, args: object, decoder: msgspec.json.Decoder[T]) -> T:
        """POST and decode (send): of an answer that is not 200 the body is not looked at."""
        url = f"{self._url}/{verb}"
        connection = self._connection()
        headers = {"Content-Type": "application/json"}
        try:
            connection.request("POST", urlsplit(url).path, msgspec.json.encode(args), headers)
            answer = connection.getresponse()
            body = answer.read()
        except TimeoutError:
            connection.close()
            raise ExtenderError(
                f'Post "{url}": context deadline exceeded (Client.Timeout exceeded while awaiting headers)'
            ) from None
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise ExtenderError(f'Post "{url}": {error or type(error).__name__}') from error
        self._give_back(connection)
        if answer.status != _OK:
            raise ExtenderError(f"failed {verb} with extender at URL {url}, code {answer.status}")
        try:
            return decoder.decode(body)
        except (msgspec.MsgspecError, UnicodeError) as error:
            raise ExtenderError(f"json: cannot unmarshal the answer of {url}: {error}") from error

    def _connection(self) -> http.client.HTTPConnection:
        with self._lock:
            while self._idle:
                connection = self._idle.pop()
                # readable without a request: the other end has closed it
                if connection.sock is not None and not select.select([connection.sock], [], [], 0)[0]:
                    return connection
                connection.close()
        address = urlsplit(self._url)
        return http.client.HTTPConnection(address.hostname or "", address.port or 80, timeout=self._timeout)

    def _give_back(self, connection: http.client.HTTPConnection) -> None:
        with self._lock:
            if connection.sock is not None and len(self._idle) < _IDLE_CONNECTIONS:
                self._idle.append(connection)
                return
        connection.close()
