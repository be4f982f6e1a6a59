"""The API server's audit log: its policy (writes, metadata only) and the records a test reads from it."""

from datetime import datetime
from pathlib import Path

import msgspec

POLICY = """\
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
- level: Metadata
  verbs: [create, update, patch, delete, deletecollection]
- level: None
"""


class Write(msgspec.Struct, frozen=True):
    """One call that could change the cluster, refused ones included (`code` is the HTTP status)."""

    user: str
    verb: str
    resource: str
    subresource: str
    namespace: str
    name: str
    code: int
    agent: str
    at: datetime


class _Reference(msgspec.Struct, frozen=True):
    resource: str = ""
    subresource: str = ""
    namespace: str = ""
    name: str = ""


class _User(msgspec.Struct, frozen=True):
    username: str = ""


class _Status(msgspec.Struct, frozen=True):
    code: int = 0


class _Record(msgspec.Struct, frozen=True, rename="camel"):
    verb: str
    user: _User
    stage_timestamp: datetime
    user_agent: str = ""
    object_ref: _Reference = _Reference()
    response_status: _Status = _Status()


_decoder = msgspec.json.Decoder(_Record)


def read(log: Path, *, offset: int) -> tuple[list[Write], int]:
    """Return the writes logged from byte `offset` on, and the offset to go on from; a line half written is left."""
    with log.open("rb") as file:
        file.seek(offset)
        data = file.read()
    data = data[: data.rfind(b"\n") + 1]
    return [_write(_decoder.decode(line)) for line in data.splitlines()], offset + len(data)


def _write(record: _Record) -> Write:
    target = record.object_ref
    return Write(
        user=record.user.username,
        verb=record.verb,
        resource=target.resource,
        subresource=target.subresource,
        namespace=target.namespace,
        name=target.name,
        code=record.response_status.code,
        agent=record.user_agent,
        at=record.stage_timestamp,
    )
