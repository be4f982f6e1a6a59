"""Have a WSGI application answer what the HTTP server has read."""

import io
import sys
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import unquote_to_bytes

from cotenant.threads import giving_way
from extender.http.call_server import Request
from extender.http.calls import TEXT, Answer, BodyError

# The server says these itself, or they are about a connection that the application does not have.
_NOT_PASSED_ON = frozenset({"content-type", "content-length", "connection", "transfer-encoding"})


class Application:
    """Answer requests by a WSGI application (PEP 3333)."""

    def __init__(self, app: Callable[..., Iterable[bytes]]) -> None:
        self._app = app

    def __call__(self, request: Request) -> Answer:
        """Answer one request."""
        if isinstance(request.body, BodyError):
            return Answer(request.body.status, f"{request.body}\n".encode(), TEXT)
        begun: list[tuple[str, list[tuple[str, str]]]] = []

        def start_response(status: str, headers: list[tuple[str, str]], _error: object = None) -> Callable[..., None]:
            begun.append((status, headers))
            return lambda _: None  # nothing writes by it

        # metrics and pages of a large cluster take tens of milliseconds
        with giving_way():
            given = self._app(_environ(request, request.body), start_response)
            try:
                body, *more = [*given] or [b""]
            finally:
                close: Callable[[], None] | None = getattr(given, "close", None)
                if close is not None:
                    close()
        status, headers = begun[-1]
        kind = next((value for name, value in headers if name.lower() == "content-type"), TEXT)
        passed = tuple((name, value) for name, value in headers if name.lower() not in _NOT_PASSED_ON)
        return Answer(int(status.partition(" ")[0]), body, kind, more=tuple(more), headers=passed)


def _environ(request: Request, body: bytes) -> dict[str, Any]:
    fields = {name.decode("latin-1"): value.decode("latin-1") for name, value in request.fields.items()}
    # headers are named as variables: user-agent is HTTP_USER_AGENT; one with an underscore would pass for another
    named = {f"HTTP_{name.upper().replace('-', '_')}": value for name, value in fields.items() if "_" not in name}
    return {
        **named,
        "REQUEST_METHOD": request.method,
        "SCRIPT_NAME": "",
        "PATH_INFO": unquote_to_bytes(request.path).decode("latin-1"),
        "QUERY_STRING": request.query,
        "CONTENT_TYPE": fields.get("content-type", ""),
        "CONTENT_LENGTH": str(len(body)),
        "SERVER_NAME": "cotenant",
        "SERVER_PORT": "0",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": "http",
        "wsgi.input": io.BytesIO(body),
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": True,
        "wsgi.multiprocess": False,
        "wsgi.run_once": False,
    }
