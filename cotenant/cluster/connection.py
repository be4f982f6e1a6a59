"""One API server: who we are to it, and raw requests to it.

The kubernetes client does what is tedious to do right: kubeconfig files, in-cluster tokens and their rotation, client
certificates, exec plugins, proxies, TLS. Its typed models are not used, since they cost 70 times what msgspec does on a
watch line; so requests go straight to the urllib3 pool that it sets up. Nothing throttles: the API server's own
priority and fairness does (429), and a client that queues silently only hides that from its metrics.
"""

import contextlib
import os
import ssl
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self
from urllib.parse import urlencode

import structlog
import urllib3
from kubernetes.client import ApiClient, Configuration
from kubernetes.config import ConfigException, load_incluster_config, load_kube_config
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    NewConnectionError,
    ProxyError,
    ReadTimeoutError,
)

from cotenant import __version__
from cotenant.cluster.errors import ApiError, ClusterError, TimedOut, Unauthorized, Unreachable, error_of

_log = structlog.get_logger(__name__)

Query = Mapping[str, str]

JSON = "application/json"
MERGE_PATCH = "application/merge-patch+json"
STRATEGIC_MERGE_PATCH = "application/strategic-merge-patch+json"

_CONNECT_TIMEOUT_SECONDS = 5.0
_FIRST_ERROR = 400
# Nothing was sent yet when one of these is raised, so a write has certainly not been applied.
_NEVER_SENT = (NewConnectionError, ConnectTimeoutError, ProxyError)


class NoCluster(ClusterError):  # noqa: N818 - named for what happened
    """Be raised when it is not known which API server to use, or as whom."""


class Reply(NamedTuple):
    """Hold a successful answer: the HTTP status below 400, and the body as it came."""

    status: int
    body: bytes


def connect(kubeconfig: str | None = None, *, context: str | None = None, pool_size: int = 16) -> "Cluster":
    """Find the API server and the credentials for it; send nothing yet.

    *kubeconfig* is a file, and *context* one of its contexts instead of the current one; None means the service account
    of the pod that we run in. The user's own ~/.kube/config is never fallen back to: a daemon started in the wrong
    place would act on whatever cluster was last looked at. *pool_size* is the number of idle connections kept; more are
    opened when more threads ask at once.

    Raises:
        NoCluster: with a sentence that names what is missing.

    """
    if kubeconfig is not None:
        path = Path(kubeconfig).expanduser()
        if not path.is_file():
            raise NoCluster(f"the kubeconfig file {path} does not exist: give another, or none inside a pod")
        return Cluster(_FromFile(path, context, pool_size))
    if not os.environ.get("KUBERNETES_SERVICE_HOST"):
        raise NoCluster(
            "no API server is known: no kubeconfig file was given, and KUBERNETES_SERVICE_HOST is not set, so this is"
            " not a pod of a cluster"
        )
    return Cluster(_FromPod(pool_size))


class _Source:
    """Know where credentials come from, so that they can be read again."""

    def __init__(self, pool_size: int) -> None:
        self._pool_size = pool_size

    def client(self) -> Any:
        configuration = Configuration()
        try:
            self.read_into(configuration)
        except Exception as error:  # the loader indexes whatever the file holds, and raises what that gives
            raise NoCluster(f"{self} cannot be used: {error}") from error
        configuration.connection_pool_maxsize = self._pool_size
        # Outcomes must be known: a write that urllib3 sends again could be answered 409 by its own first copy.
        configuration.retries = False
        configuration.keep_alive = True
        client: Any = ApiClient(configuration)
        client.user_agent = f"cotenant/{__version__}"
        return client

    def read_into(self, configuration: Any) -> None:
        raise NotImplementedError


class _FromFile(_Source):
    def __init__(self, path: Path, context: str | None, pool_size: int) -> None:
        super().__init__(pool_size)
        self._path = path
        self._context = context

    def __str__(self) -> str:
        return f"the kubeconfig file {self._path}"

    def read_into(self, configuration: Any) -> None:
        load_kube_config(  # type: ignore[no-untyped-call]
            str(self._path), context=self._context, client_configuration=configuration, persist_config=False
        )
        if not configuration.api_key and not configuration.cert_file:
            # An exec plugin that fails is only logged by the client, which then goes on without credentials.
            _log.warning("no credentials were found, requests are anonymous", source=str(self))


class _FromPod(_Source):
    def __str__(self) -> str:
        return "the pod's service account"

    def read_into(self, configuration: Any) -> None:
        load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]


class Cluster:
    """Send raw requests to one API server, from any number of threads.

    Paths are absolute and already escaped (``/api/v1/nodes``), bodies are bytes. Timeouts are in seconds and bound the
    silence on the connection, not the length of a long answer. Every method raises a ClusterError: an ApiError for
    any answer from 400 on, Unreachable for none.
    """

    def __init__(self, source: _Source) -> None:
        self._source = source
        self._client = source.client()
        self._credentials = threading.Lock()

    def get(self, path: str, *, query: Query | None = None, timeout: float = 30.0) -> Reply:
        """Read one object, or one page of a list."""
        return self._send("GET", path, query=query, timeout=timeout)

    def post(self, path: str, body: bytes, *, timeout: float = 10.0) -> Reply:
        """Create what *body*, JSON, describes."""
        return self._send("POST", path, body=body, content_type=JSON, timeout=timeout)

    def patch(self, path: str, body: bytes, *, content_type: str = MERGE_PATCH, timeout: float = 10.0) -> Reply:
        """Merge *body*, JSON, into the object."""
        return self._send("PATCH", path, body=body, content_type=content_type, timeout=timeout)

    def stream(self, path: str, *, query: Query | None = None, silence: float) -> "Stream":
        """Open a long answer; *silence* is how many seconds may pass without a byte before it is Unreachable."""
        return Stream(self._open("GET", path, query=query, timeout=silence))

    def close(self) -> None:
        """Drop the idle connections; requests under way end as they will."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(
        self,
        method: str,
        path: str,
        *,
        timeout: float,
        query: Query | None = None,
        body: bytes | None = None,
        content_type: str | None = None,
    ) -> Reply:
        response = self._open(method, path, query=query, body=body, content_type=content_type, timeout=timeout)
        with _translated(method):
            # reading to the end also gives the connection back to the pool
            return Reply(response.status, response.read())

    def _open(
        self,
        method: str,
        path: str,
        *,
        timeout: float,
        query: Query | None = None,
        body: bytes | None = None,
        content_type: str | None = None,
    ) -> urllib3.BaseHTTPResponse:
        client = self._client
        try:
            return self._try(client, method, path, query, body, content_type, timeout)
        except Unauthorized:
            # A 401 was not applied, so it is safe to send again. Token files, exec plugins without an expiry and client
            # certificates are renewed without anybody telling us; client-go reads them again here, too.
            self._renew(client)
            return self._try(self._client, method, path, query, body, content_type, timeout)

    def _try(  # noqa: PLR0917 - only _open calls it, twice
        self,
        client: Any,
        method: str,
        path: str,
        query: Query | None,
        body: bytes | None,
        content_type: str | None,
        timeout: float,
    ) -> urllib3.BaseHTTPResponse:
        headers = {"Accept": JSON, **client.default_headers}
        if content_type is not None:
            headers["Content-Type"] = content_type
        with self._credentials:  # an expired exec token is fetched in here, once, not by every thread
            try:
                client.update_params_for_auth(headers, [], ["BearerToken"], path, method, body)
            except (ConfigException, OSError) as error:
                raise NoCluster(f"the token of {self._source} cannot be read again: {error}") from error
        with _translated(method):
            response: urllib3.BaseHTTPResponse = client.rest_client.pool_manager.request(
                method,
                client.configuration.host + path + (f"?{urlencode(query)}" if query else ""),
                body=body,
                headers=headers,
                timeout=urllib3.Timeout(connect=min(timeout, _CONNECT_TIMEOUT_SECONDS), read=timeout),
                preload_content=False,
                redirect=False,
            )
            if response.status < _FIRST_ERROR:
                return response
            raise _error_of(method, response)

    def _renew(self, refused: Any) -> None:
        with self._credentials:
            if self._client is refused:  # else another thread has renewed them while this one waited
                _log.info("the API server refused our credentials, reading them again", source=str(self._source))
                self._client = self._source.client()


class Stream:
    """Give the lines of a long answer; closing it from another thread ends a read that waits."""

    def __init__(self, response: urllib3.BaseHTTPResponse) -> None:
        self._response = response
        self._closed = threading.Event()

    def lines(self) -> Iterator[bytes]:
        """Yield each line that is not empty, without its end; end when the server, or close(), ends the answer.

        Raises:
            TimedOut: when the connection is silent for too long.
            Unreachable: when it is lost.

        """
        begun: list[bytes] = []  # pieces of a line that has not ended yet
        with contextlib.closing(self._response):
            for chunk in self._chunks():
                head, *tails = chunk.split(b"\n")
                begun.append(head)
                for tail in tails:
                    if line := b"".join(begun):
                        yield line
                    begun = [tail]

    def close(self) -> None:
        """End the answer now. May be called from any thread, and twice."""
        self._closed.set()
        # a close alone would wait for the read that it should end (urllib3#2868)
        with contextlib.suppress(ValueError, RuntimeError, OSError):
            self._response.shutdown()

    def _chunks(self) -> Iterator[bytes]:
        try:
            with _translated("GET"):
                yield from self._response.stream(1 << 16, decode_content=False)
        except Unreachable:
            if not self._closed.is_set():
                raise


@contextlib.contextmanager
def _translated(method: str) -> Iterator[None]:
    """Turn what urllib3 raises into Unreachable."""
    try:
        yield
    except (HTTPError, OSError) as error:
        if isinstance(error, ReadTimeoutError):
            message = "the API server did not answer in time"
            raise TimedOut(message, outcome_unknown=method != "GET") from error
        distrusted = any(isinstance(cause, ssl.SSLCertVerificationError) for cause in error.args)
        if distrusted or isinstance(error, _NEVER_SENT):
            raise Unreachable(f"the API server cannot be reached: {error}") from error
        raise Unreachable(
            f"the connection to the API server was lost: {type(error).__name__}", outcome_unknown=method != "GET"
        ) from error


def _error_of(method: str, response: urllib3.BaseHTTPResponse) -> ApiError:
    return error_of(
        response.read(),
        status=response.status,
        retry_after=response.headers.get("Retry-After"),
        write=method != "GET",
    )
