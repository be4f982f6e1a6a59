"""Access to the API server for both programs: the only package that imports the kubernetes client."""

from cotenant.cluster.connection import Cluster, NoCluster, Reply, connect, namespace_of
from cotenant.cluster.errors import (
    ApiError,
    ClusterError,
    Conflict,
    Forbidden,
    Gone,
    Invalid,
    NotFound,
    ServerError,
    TimedOut,
    TooManyRequests,
    Unauthorized,
    Unreachable,
)
from cotenant.cluster.reading import Change, Unreadable
from cotenant.cluster.reflector import Counts, Reflector, Sink

__all__ = [
    "ApiError",
    "Change",
    "Cluster",
    "ClusterError",
    "Conflict",
    "Counts",
    "Forbidden",
    "Gone",
    "Invalid",
    "NoCluster",
    "NotFound",
    "Reflector",
    "Reply",
    "ServerError",
    "Sink",
    "TimedOut",
    "TooManyRequests",
    "Unauthorized",
    "Unreachable",
    "Unreadable",
    "connect",
    "namespace_of",
]
