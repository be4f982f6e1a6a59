"""The one way by which the extender evicts: by the eviction API, so within disruption budgets, and by UID."""

import re
from collections.abc import Callable
from enum import StrEnum

import structlog

from cotenant.cluster import Cluster, ClusterError, Conflict, Forbidden, NotFound, writes

_log = structlog.get_logger(__name__)

_REQUEST_SECONDS = 5.0
# What a budget does not allow is a 429, as is an API server that is too busy, and a pod under several budgets is a 500:
# they differ by their words alone (pkg/registry/core/pod/storage/eviction.go).
_BUDGET = re.compile("disruption ?budget", re.IGNORECASE)


class Cause(StrEnum):
    """Say why a pod is evicted."""

    OVERUSE = "overuse"
    PREEMPTION = "preemption"


class Outcome(StrEnum):
    """Say what became of an eviction; GONE is no news to count, since nothing was left to evict."""

    OK = "ok"
    BLOCKED = "blocked"
    FORBIDDEN = "forbidden"
    GONE = "gone"
    ERROR = "error"


class Evictions:
    """Evict pods, and have *counted* told the cause and the outcome of each try."""

    def __init__(self, cluster: Cluster, counted: Callable[[Cause, Outcome], None]) -> None:
        self._cluster = cluster
        self._counted = counted

    def evict(self, uid: str, key: str, cause: Cause) -> Outcome:
        """Evict the pod *key* (namespace/name) if it is the one of that UID."""
        namespace, _, name = key.partition("/")
        outcome, why = Outcome.OK, ""
        try:
            writes.evict(self._cluster, namespace=namespace, name=name, uid=uid, timeout=_REQUEST_SECONDS)
        except Forbidden as error:
            outcome, why = Outcome.FORBIDDEN, str(error)
        except (NotFound, Conflict):
            return Outcome.GONE  # perhaps another pod of its name has come
        except ClusterError as error:
            why = str(error)
            outcome = Outcome.BLOCKED if _BUDGET.search(why) else Outcome.ERROR
        self._counted(cause, outcome)
        _log.warning("eviction", pod=key, pod_uid=uid, cause=str(cause), outcome=str(outcome), why=why)
        return outcome
