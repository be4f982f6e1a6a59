"""An extender that answers what a test tells it to, and remembers what it was asked."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, Self

from cotenant.standins.api_server import ApiServer

Json = dict[str, Any]


class Call(NamedTuple):
    """Hold one request."""

    verb: str
    body: Json
    connection: int


class ScriptedExtender:
    """Pass all nodes, score them 0, bind through *api*; each of these can be replaced by a function of the body.

    A function gives what is encoded as the answer; bytes are sent as they are, a number is an empty answer of that
    status.
    """

    def __init__(self, api: ApiServer) -> None:
        self.calls: list[Call] = []
        self.answers: dict[str, Callable[[Json], Any]] = {
            "filter": lambda body: {"NodeNames": body["NodeNames"]},
            "prioritize": lambda body: [{"Host": node, "Score": 0} for node in body["NodeNames"]],
            "bind": self.bind,
        }
        self._api = api
        self._changed = threading.Condition()
        script = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = 1 << 16
            disable_nagle_algorithm = True

            def do_POST(self) -> None:
                verb = self.path.rpartition("/")[2]
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                script.remember(Call(verb, body, self.client_address[1]))
                answer = script.answers[verb](body)
                status, answer = (answer, b"not to be read") if isinstance(answer, int) else (200, answer)
                raw = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - http.server's signature
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def bind(self, body: Json) -> Json:
        binding = {"metadata": {"uid": body["PodUID"]}, "target": {"kind": "Node", "name": body["Node"]}}
        self._api.store.bind((body["PodNamespace"], body["PodName"]), binding)
        return {"Error": ""}

    def reject(self, message: str | Callable[[], str], *nodes: str, unresolvable: bool = False) -> None:
        """Have filter refuse *nodes*, or all when none are named."""

        def answer(body: Json) -> Json:
            refused = nodes or body["NodeNames"]
            text = message if isinstance(message, str) else message()
            left = [node for node in body["NodeNames"] if node not in refused]
            field = "FailedAndUnresolvableNodes" if unresolvable else "FailedNodes"
            return {"NodeNames": left, field: {n: text for n in body["NodeNames"] if n in refused}}

        self.answers["filter"] = answer

    def score(self, **scores: float) -> None:
        """Have prioritize give these scores, and no other."""
        self.answers["prioritize"] = lambda _: [{"Host": node, "Score": score} for node, score in scores.items()]

    def remember(self, call: Call) -> None:
        with self._changed:
            self.calls.append(call)
            self._changed.notify_all()

    def of(self, verb: str, pod: str | None = None) -> list[Call]:
        """List the calls of a verb, or only those about one pod."""
        return [call for call in self.calls if call.verb == verb and pod in {None, _pod_name(call.body)}]

    def wait_for(self, verb: str, count: int, pod: str | None = None) -> bool:
        """Wait until the verb was called so often; tell whether it was."""
        with self._changed:
            return self._changed.wait_for(lambda: len(self.of(verb, pod)) >= count, timeout=10)


def _pod_name(body: Json) -> str:
    name: str = body["PodName"] if "PodName" in body else body["Pod"]["metadata"]["name"]
    return name
