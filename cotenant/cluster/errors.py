"""What can go wrong between us and the API server, by what a caller can do about it.

The exceptions of urllib3 and of the kubernetes client stay inside this package: they change with its major versions,
and their text holds headers and whole bodies, which may carry tokens and Secrets. A message here comes only from a body
that is a Status, which the API server wrote for people to read.
"""
# ruff: noqa: N818 - they are named for what happened

import msgspec

from cotenant.cluster.nesting import decoded


class ClusterError(Exception):
    """Be raised for any request that did not end in a plain success.

    *outcome_unknown* says that a write may have been applied all the same; only a GET or the watch can tell.
    """

    outcome_unknown: bool = False

    @property
    def sentence(self) -> str:
        """Say what happened to a person, without the status of HTTP."""
        return str(self)


class Unreachable(ClusterError):
    """Be raised when no answer came: no connection, a timeout, or a connection lost on the way."""

    def __init__(self, message: str, *, outcome_unknown: bool = False) -> None:
        super().__init__(message)
        self.outcome_unknown = outcome_unknown


class TimedOut(Unreachable):
    """Be raised when the connection stands but says nothing for too long."""


class TooLong(ClusterError):
    """Be raised when an answer is longer than its caller would take; nothing of it is kept."""


class ApiError(ClusterError):
    """Be raised when the API server answered with an error; *reason* and *message* are those of its Status."""

    def __init__(
        self,
        status: int,
        reason: str,
        message: str,
        *,
        retry_after: float | None = None,
        outcome_unknown: bool = False,
    ) -> None:
        super().__init__(status, reason, message)
        self.status = status
        self.reason = reason
        self.message = message
        self.retry_after = retry_after
        self.outcome_unknown = outcome_unknown

    def __str__(self) -> str:
        return f"{self.message} ({self.status} {self.reason})"

    @property
    def sentence(self) -> str:
        """Give the server's own."""
        return self.message


class Unauthorized(ApiError):
    """401: the credentials are missing, wrong or expired."""

    @property
    def sentence(self) -> str:
        """Say more than the server, which has one word for it."""
        return f"{self.message}: the kubeconfig's credentials are missing, wrong or expired"


class Forbidden(ApiError):
    """403: RBAC or an admission policy does not allow it."""


class NotFound(ApiError):
    """404: the object, or the whole resource, is not there."""


class Conflict(ApiError):
    """409: the object is not in the state that the request counted on; the message alone says which."""


class Gone(ApiError):
    """410: the resourceVersion or the continue token is older than the server remembers."""


class Invalid(ApiError):
    """422: the server, or we before it, found the request itself wrong; sending it again cannot help."""


class TooManyRequests(ApiError):
    """429: come back after *retry_after* seconds, where the server named them."""


class ServerError(ApiError):
    """5xx: the server failed; a write may have been applied (a 504, or a 500 from etcd, says nothing about it)."""


class Status(msgspec.Struct, frozen=True):
    """Hold what we read of a Status (apimachinery/pkg/apis/meta/v1/types.go)."""

    class Details(msgspec.Struct, frozen=True, rename="camel"):
        """Hold the wait that the server asks for, in seconds."""

        retry_after_seconds: float | None = None

    kind: str = ""
    code: int | None = None
    reason: str | None = None
    message: str | None = None
    details: Details | None = None


_BY_STATUS: dict[int, type[ApiError]] = {
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    410: Gone,
    422: Invalid,
    429: TooManyRequests,
}
_SERVER_ERRORS = range(500, 600)
# An API server asks for seconds. What stands before it may name an hour, for which nothing would be followed, or a
# number that no wait takes.
_LONGEST_WAIT_SECONDS = 60.0
_DECODER = msgspec.json.Decoder(Status)


def error_of(body: bytes, *, status: int = 0, retry_after: str | None = None, write: bool = False) -> ApiError:
    """Make the typed error for an answer.

    *body* is read only if it is a Status: who knows what else it may hold. *status* is that of HTTP, 0 for an ERROR
    event of a watch, where the Status carries it. *retry_after* is the header of that name, believed up to a minute.
    """
    try:
        told = decoded(_DECODER.decode, body)
    except msgspec.MsgspecError:
        told = Status()
    if told.kind != "Status":
        told = Status()
    status = status or told.code or 500
    seconds = told.details.retry_after_seconds if told.details else None
    if seconds is None and retry_after is not None and retry_after.isdecimal():
        seconds = float(retry_after)
    kind = ServerError if status in _SERVER_ERRORS else _BY_STATUS.get(status, ApiError)
    return kind(
        status,
        told.reason or "Unknown",
        told.message or f"the server answered {status} without saying why",
        retry_after=None if seconds is None else min(seconds, _LONGEST_WAIT_SECONDS),
        outcome_unknown=write and status in _SERVER_ERRORS,
    )
