"""One API server: who we are to it, and raw requests to it.

The kubernetes client does what is tedious to do right: kubeconfig files, in-cluster tokens and their rotation, client
certificates, exec plugins, proxies, TLS. Its typed models are not used, since they cost 70 times what msgspec does on a
watch line; so requests go straight to the urllib3 pool that it sets up, and those that a pod waits for past that
(exchange). Nothing throttles: the API server's own priority and fairness does (429), and a client that queues silently
only hides that from its metrics.
"""

import contextlib
import os
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar
from urllib.parse import urlencode, urlsplit

import structlog
import urllib3
import yaml
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
from cotenant.cluster.errors import ClusterError, TimedOut, TooLong, Unauthorized, Unreachable, error_of
from cotenant.cluster.exchange import ANY, Exchange, NotSentError, TooLongError, to_the_end

_log = structlog.get_logger(__name__)

T = TypeVar("T")

Query = Mapping[str, str]

JSON = "application/json"
MERGE_PATCH = "application/merge-patch+json"
STRATEGIC_MERGE_PATCH = "application/strategic-merge-patch+json"

_POD_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_CONNECT_TIMEOUT_SECONDS = 5.0
# client-go takes no other one for a success either (rest/request.go, transformResponse)
_FIRST_ERROR = 300
# The client looks through the environment for proxies whenever it is asked for the token of a kubeconfig file: 0.06 ms.
_TOKEN_SECONDS = 1.0
# Nothing was sent yet when one of these is raised, so a write has certainly not been applied.
_NEVER_SENT = (NewConnectionError, ConnectTimeoutError, ProxyError)


class NoCluster(ClusterError):  # noqa: N818 - named for what happened
    """Be raised when it is not known which API server to use, or as whom."""


class Reply(NamedTuple):
    """Hold a successful answer: the HTTP status below 300, and the body as it came."""

    status: int
    body: bytes


def connect(kubeconfig: str | None = None, *, context: str | None = None, pool_size: int = 16) -> "Cluster":
    """Find the API server and the credentials for it; send nothing yet.

    *kubeconfig* is a file, or several as $KUBECONFIG may have them, and *context* one of its contexts instead of the
    current one; None means the service account of the pod that we run in. The user's own ~/.kube/config is never fallen
    back to: a daemon started in the wrong place would act on whatever cluster was last looked at. *pool_size* is the
    number of idle connections kept; more are opened when more threads ask at once.

    Raises:
        NoCluster: with a sentence that names what is missing.

    """
    if kubeconfig is not None:
        files = _files(kubeconfig)
        if not files:
            raise NoCluster(
                f"the kubeconfig file {kubeconfig} does not exist, or is no file: name one with --kubeconfig;"
                " a pod needs none"
            )
        return Cluster(_FromFile(files, context, pool_size))
    if not os.environ.get("KUBERNETES_SERVICE_HOST"):
        raise NoCluster(
            "no API server is known: no kubeconfig file was given, and KUBERNETES_SERVICE_HOST is not set, so this is"
            " not a pod of a cluster"
        )
    return Cluster(_FromPod(pool_size))


def namespace_of(kubeconfig: str | None, *, context: str | None) -> str:
    """Name the namespace that a kubeconfig's context, or our pod, is for, as kubectl takes it; else "default"."""
    try:
        if kubeconfig is None:
            return _POD_NAMESPACE.read_text().strip()
        current, namespaces = _contexts(_files(kubeconfig))
        return namespaces[context or current] or "default"
    except Exception:  # noqa: BLE001 - it indexes whatever the file holds; who connects with that is told
        return "default"


def _files(kubeconfig: str) -> list[str]:
    """List the files that are named and there; kubectl too looks over the others."""
    named = (Path(one).expanduser() for one in kubeconfig.split(os.pathsep) if one)
    return [str(path) for path in named if path.is_file()]


def _contexts(files: Iterable[str]) -> tuple[str, dict[str, str]]:
    """Read the current context, and each one's namespace; of several files the first that says something counts."""
    current, namespaces = "", dict[str, str]()
    for file in files:
        found = yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}
        current = current or found.get("current-context") or ""
        for one in found.get("contexts") or ():
            namespaces.setdefault(one["name"], one["context"].get("namespace") or "")
    return current, namespaces


class _Source:
    """Know where credentials come from, so that they can be read again."""

    def __init__(self, pool_size: int) -> None:
        self._pool_size = pool_size

    def session(self) -> "_Session":
        configuration = Configuration()
        try:
            self.read_into(configuration)
        except Exception as error:  # the loader indexes whatever the file holds, and raises what that gives
            raise NoCluster(f"{self} cannot be used: {' '.join(str(error).split())}") from error
        configuration.connection_pool_maxsize = self._pool_size
        # Outcomes must be known: a write that urllib3 sends again could be answered 409 by its own first copy.
        configuration.retries = False
        configuration.keep_alive = True
        client: Any = ApiClient(configuration)
        client.user_agent = f"cotenant/{__version__}"
        return _Session(client, self._pool_size)

    def read_into(self, configuration: Any) -> None:
        raise NotImplementedError


class _FromFile(_Source):
    def __init__(self, files: list[str], context: str | None, pool_size: int) -> None:
        super().__init__(pool_size)
        self._files = files
        self._context = context

    def __str__(self) -> str:
        return f"the kubeconfig file {os.pathsep.join(self._files)}"

    def read_into(self, configuration: Any) -> None:
        # of several files the client takes the last one's current context, kubectl the first's: another cluster
        context = self._context or (_contexts(self._files)[0] if len(self._files) > 1 else None)
        load_kube_config(  # type: ignore[no-untyped-call]
            os.pathsep.join(self._files), context=context, client_configuration=configuration, persist_config=False
        )
        if not configuration.api_key and not configuration.cert_file:
            # An exec plugin that fails is only logged by the client, which then goes on without credentials.
            _log.warning("no credentials were found, requests are anonymous", source=str(self))


class _FromPod(_Source):
    def __str__(self) -> str:
        return "the pod's service account"

    def read_into(self, configuration: Any) -> None:
        load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]


class _Session:
    """Hold the client of one set of credentials, and its connections."""

    def __init__(self, client: Any, pool_size: int) -> None:
        self.client = client
        self.host: str = client.configuration.host
        # what says who we are, and until when that may be believed
        self.who: tuple[dict[str, str], float] = {}, 0.0
        self.path = urlsplit(self.host).path
        pools: urllib3.PoolManager = client.rest_client.pool_manager
        # what is to be sent by way of a proxy, urllib3 knows best
        direct = type(pools) is urllib3.PoolManager
        pool = pools.connection_from_url(self.host) if direct else None
        self.exchange = Exchange(pool, most_idle=pool_size) if pool is not None else None

    def close(self) -> None:
        if self.exchange is not None:
            self.exchange.close()
        self.client.close()


class Cluster:
    """Send raw requests to one API server, from any number of threads.

    Paths are absolute and already escaped (``/api/v1/nodes``), bodies are bytes. Timeouts are in seconds and bound the
    silence on the connection, not the length of a long answer. Every method raises a ClusterError: an ApiError for
    any answer from 300 on, Unreachable for none.
    """

    def __init__(self, source: _Source) -> None:
        self._source = source
        self._session = source.session()
        self._credentials = threading.Lock()

    def get(self, path: str, *, query: Query | None = None, timeout: float = 30.0, most: int = ANY) -> Reply:
        """Read one object, or one page of a list; raise TooLong where that is more than *most* bytes."""
        return self._send("GET", path, query=query, timeout=timeout, most=most)

    def post(self, path: str, body: bytes, *, timeout: float = 10.0) -> Reply:
        """Create what *body*, JSON, describes."""
        return self._send("POST", path, body=body, content_type=JSON, timeout=timeout)

    def patch(self, path: str, body: bytes, *, content_type: str = MERGE_PATCH, timeout: float = 10.0) -> Reply:
        """Merge *body*, JSON, into the object."""
        return self._send("PATCH", path, body=body, content_type=content_type, timeout=timeout)

    def stream(self, path: str, *, query: Query | None = None, silence: float) -> "Stream":
        """Open a long answer; *silence* is how many seconds may pass without a byte before it is Unreachable."""
        target = _target(path, query)
        return Stream(self._authorized(lambda session: self._open(session, "GET", target, None, None, silence)))

    def close(self) -> None:
        """Drop the idle connections; requests under way end as they will."""
        self._session.close()

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
        most: int = ANY,
    ) -> Reply:
        target = _target(path, query)

        def once(session: _Session) -> Reply:
            if session.exchange is not None:
                return self._exchange(session, session.exchange, method, target, body, content_type, timeout, most)
            response = self._open(session, method, target, body, content_type, timeout)
            # reading to the end also gives the connection back to the pool
            with _translated(method), contextlib.closing(response):
                return Reply(response.status, to_the_end(response, most))

        return self._authorized(once)

    def _authorized(self, once: Callable[[_Session], T]) -> T:
        session = self._session
        try:
            return once(session)
        except Unauthorized:
            # A 401 was not applied, so it is safe to send again. Token files, exec plugins without an expiry and client
            # certificates are renewed without anybody telling us; client-go reads them again here, too.
            self._renew(session)
            return once(self._session)

    def _exchange(  # noqa: PLR0917 - only _send calls it
        self,
        session: _Session,
        exchange: Exchange,
        method: str,
        target: str,
        body: bytes | None,
        content_type: str | None,
        timeout: float,
        most: int,
    ) -> Reply:
        fields = self._fields(session, content_type)
        with _translated(method):
            status, fields_back, answer = exchange.send(method, session.path + target, fields, body, timeout, most)
        if status < _FIRST_ERROR:
            return Reply(status, answer)
        retry_after = fields_back.get(b"retry-after", b"").decode("latin-1") or None
        raise error_of(answer, status=status, retry_after=retry_after, write=method != "GET")

    def _open(  # noqa: PLR0917 - only _send and stream call it
        self,
        session: _Session,
        method: str,
        target: str,
        body: bytes | None,
        content_type: str | None,
        timeout: float,
    ) -> urllib3.BaseHTTPResponse:
        fields = self._fields(session, content_type)
        with _translated(method):
            response: urllib3.BaseHTTPResponse = session.client.rest_client.pool_manager.request(
                method,
                session.host + target,
                body=body,
                headers=fields,
                timeout=urllib3.Timeout(connect=min(timeout, _CONNECT_TIMEOUT_SECONDS), read=timeout),
                preload_content=False,
                redirect=False,
            )
            if response.status < _FIRST_ERROR:
                return response
            raise error_of(
                response.read(),
                status=response.status,
                retry_after=response.headers.get("Retry-After"),
                write=method != "GET",
            )

    def _fields(self, session: _Session, content_type: str | None) -> dict[str, str]:
        fields = self._who(session)
        return fields if content_type is None else {**fields, "Content-Type": content_type}

    def _who(self, session: _Session) -> dict[str, str]:
        """Give the fields that say who asks; the token is looked at anew once a second, and after a 401."""
        fields, until = session.who
        if time.monotonic() < until:
            return fields
        fields = {"Accept": JSON, **session.client.default_headers}
        with self._credentials:  # an expired exec token is fetched in here, once, not by every thread
            try:
                session.client.update_params_for_auth(fields, [], ["BearerToken"], "", "", None)
            except (ConfigException, OSError) as error:
                raise NoCluster(f"the token of {self._source} cannot be read again: {error}") from error
        session.who = fields, time.monotonic() + _TOKEN_SECONDS
        return fields

    def _renew(self, refused: _Session) -> None:
        with self._credentials:
            if self._session is refused:  # else another thread has renewed them while this one waited
                _log.info("the API server refused our credentials, reading them again", source=str(self._source))
                self._session = self._source.session()
                if refused.exchange is not None:
                    refused.exchange.close()


def _target(path: str, query: Query | None) -> str:
    return f"{path}?{urlencode(query)}" if query else path


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
    except NotSentError as error:
        raise Unreachable(f"the API server cannot be reached: {error}") from error
    except TooLongError as error:
        raise TooLong("the API server's answer is longer than was asked for") from error
    except (HTTPError, OSError) as error:
        if isinstance(error, ReadTimeoutError | TimeoutError):
            message = "the API server did not answer in time"
            raise TimedOut(message, outcome_unknown=method != "GET") from error
        distrusted = any(isinstance(cause, ssl.SSLCertVerificationError) for cause in error.args)
        if distrusted or isinstance(error, _NEVER_SENT):
            raise Unreachable(f"the API server cannot be reached: {error}") from error
        raise Unreachable(
            f"the connection to the API server was lost: {type(error).__name__}", outcome_unknown=method != "GET"
        ) from error
