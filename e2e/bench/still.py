"""An API server that stands still, for the sizes that a real one takes minutes to be filled to.

`python -m e2e.bench.still NODES PODS PORT`: LISTs of nodes and bound pods in pages, as large as a real server's;
watches that say nothing; any pod that is asked for; Bindings that always succeed. A thread per connection, plain HTTP.
"""

import json
import socketserver
import time
import uuid
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import click

from cotenant.contract import inventory as inventories
from e2e import nodes
from e2e.bench import load
from e2e.rest import Object

_STAMP = "2026-01-01T00:00:00Z"
# What the server keeps of who wrote which field: a good part of an object, and nothing that anybody here reads.
_MANAGED = [
    {
        "manager": "cotenant-e2e",
        "operation": "Update",
        "apiVersion": "v1",
        "time": _STAMP,
        "fieldsType": "FieldsV1",
        "fieldsV1": {
            "f:metadata": {"f:annotations": {f"f:{n}": {} for n in range(40)}},
            "f:spec": {"f:containers": {}},
        },
    }
]


def node_and_gpus(number: int) -> tuple[Object, list[str]]:
    """Return a node as the server stores it, and its GPUs' UUIDs."""
    node = nodes.node(f"bench-{number}", nodes.Shape(), prefix="bench")
    inventory = inventories.decode(node["metadata"]["annotations"][load.NAMES.inventory])
    return _stored(node, number), [gpu.uuid for gpu in inventory.gpus]


def bound_pod(number: int, node: str, gpu: str) -> Object:
    """Return a running pod as the server stores it."""
    pod = _stored(load.a_pod(f"bound-{number}", 8, bound_to=(node, gpu)), 1 << 32 | number)
    pod["spec"] |= {
        "restartPolicy": "Always",
        "terminationGracePeriodSeconds": 30,
        "dnsPolicy": "ClusterFirst",
        "schedulerName": "cotenant-scheduler",
        "tolerations": [
            {"key": f"node.kubernetes.io/{why}", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300}
            for why in ("not-ready", "unreachable")
        ],
    }
    pod["status"] = {
        "phase": "Running",
        "conditions": [
            {"type": kind, "status": "True", "lastTransitionTime": _STAMP}
            for kind in ("Initialized", "Ready", "ContainersReady", "PodScheduled")
        ],
        "startTime": _STAMP,
        "containerStatuses": [
            {
                "name": "main",
                "state": {"running": {"startedAt": _STAMP}},
                "ready": True,
                "started": True,
                "restartCount": 0,
                "image": "x",
                "imageID": f"sha256:{0:064}",
                "containerID": f"containerd://{1:064}",
            }
        ],
    }
    return pod


def waiting_pod(name: str) -> Object:
    """Return a pod that is not bound; whichever is asked for is there, and asks for one unit."""
    pod = load.a_pod(name, 1)
    pod["metadata"]["uid"] = f"uid-of-{name}"
    return pod


def _stored(obj: Object, number: int) -> Object:
    obj["metadata"] |= {
        "uid": str(uuid.UUID(int=number)),
        "resourceVersion": "1",
        "creationTimestamp": _STAMP,
        "managedFields": _MANAGED,
    }
    return obj


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    objects: dict[str, list[bytes]]

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - http.server's signature
        pass

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = dict(parse_qsl(url.query))
        if "watch" in query:
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            while True:
                time.sleep(3600)
        if "/namespaces/" in url.path:
            self._answer(200, json.dumps(waiting_pod(url.path.rpartition("/")[2])).encode())
            return
        items = self.objects[url.path.rpartition("/")[2]]
        start, limit = int(query.get("continue", 0)), int(query.get("limit", 0)) or len(items)
        more = str(start + limit) if start + limit < len(items) else ""
        page = b",".join(items[start : start + limit])
        self._answer(200, b'{"metadata":{"resourceVersion":"9","continue":"%s"},"items":[%s]}' % (more.encode(), page))

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(201, b'{"kind":"Status","status":"Success"}')

    def _answer(self, code: int, body: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@click.command()
@click.argument("node_count", type=int)
@click.argument("pods", type=int)
@click.argument("port", type=int)
def main(node_count: int, pods: int, port: int) -> None:
    """Serve until killed."""
    stored, gpus = [], []
    for number in range(node_count):
        node, uuids = node_and_gpus(number)
        stored.append(json.dumps(node).encode())
        gpus += [(node["metadata"]["name"], one) for one in uuids]
    # 7919 is a prime: evenly over all GPUs, and no two neighbours after one another
    bound = [json.dumps(bound_pod(n, *gpus[n * 7919 % len(gpus)])).encode() for n in range(pods)]
    _Handler.objects = {"nodes": stored, "pods": bound}
    with socketserver.ThreadingTCPServer(("127.0.0.1", port), _Handler) as server:
        server.daemon_threads = True
        click.echo("still ready")
        server.serve_forever()


if __name__ == "__main__":
    main()
