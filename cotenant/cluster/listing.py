"""All objects of one kind as they are now, read once: for commands, which follow nothing."""

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from cotenant.cluster.connection import Cluster
from cotenant.cluster.errors import Unreachable
from cotenant.cluster.nesting import decoded

_PAGE_OBJECTS = 500  # as client-go
_TIMEOUT_SECONDS = 60.0


class _Metadata(msgspec.Struct, frozen=True):
    continue_: str = msgspec.field(name="continue", default="")


class _Page(msgspec.Struct, frozen=True):
    metadata: _Metadata = _Metadata()
    items: list[msgspec.Raw] | None = None


_page = msgspec.json.Decoder(_Page)


def every(cluster: Cluster, path: str, query: Mapping[str, str] | None = None) -> Iterator[msgspec.Raw]:
    """Give each object under *path* (``/api/v1/pods``) as JSON, the pages of one snapshot; raise ClusterError.

    A *query* selects some of them by labels or fields.
    """
    page_query: dict[str, Any] = {"resourceVersion": ""}
    while True:
        asked = {**(query or {}), **page_query, "limit": str(_PAGE_OBJECTS)}
        body = cluster.get(path, query=asked, timeout=_TIMEOUT_SECONDS).body
        try:
            page = decoded(_page.decode, body)
        except msgspec.MsgspecError as error:
            raise Unreachable(f"the API server's list of {path} is not JSON: {error}") from error
        yield from page.items or ()
        if not page.metadata.continue_:
            return
        page_query = {"continue": page.metadata.continue_}
