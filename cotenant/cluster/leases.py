"""Leases of coordination.k8s.io/v1: who of several programs is the one that acts, as for client-go's elections."""

import math
from datetime import datetime
from typing import Any

import msgspec

from cotenant.cluster.connection import Cluster
from cotenant.cluster.errors import NotFound
from cotenant.cluster.reading import answered


class Lease(msgspec.Struct, frozen=True):
    """Hold what a Lease says: who holds it, and in which term."""

    class Metadata(msgspec.Struct, frozen=True, rename="camel"):
        """Hold the version that an update has to name."""

        name: str = ""
        resource_version: str | None = None

    class Spec(msgspec.Struct, frozen=True, rename="camel"):
        """Hold who holds the Lease; None where the field is not there."""

        holder_identity: str | None = None
        lease_duration_seconds: int | None = None
        lease_transitions: int | None = None

    metadata: Metadata = Metadata()
    spec: Spec = Spec()

    @property
    def holder(self) -> str:
        """Name who holds it, "" for nobody."""
        return self.spec.holder_identity or ""

    @property
    def transitions(self) -> int:
        """Count how often it has changed hands."""
        return self.spec.lease_transitions or 0


_lease = msgspec.json.Decoder(Lease)


def collection(namespace: str) -> str:
    """Give the path of the Leases of a namespace, for a reflector."""
    return f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"


def read(cluster: Cluster, namespace: str, name: str, *, timeout: float) -> Lease | None:
    """Read the Lease as it is now; None where there is none."""
    try:
        return answered(_lease, cluster.get(f"{collection(namespace)}/{name}", timeout=timeout).body)
    except NotFound:
        return None


def create(cluster: Cluster, namespace: str, name: str, spec: dict[str, Any], *, timeout: float) -> Lease:
    """Create the Lease; raises Conflict where somebody was faster."""
    body = {
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": {"name": name, "namespace": namespace},
        "spec": spec,
    }
    return answered(_lease, cluster.post(collection(namespace), msgspec.json.encode(body), timeout=timeout).body)


def update(
    cluster: Cluster, namespace: str, name: str, spec: dict[str, Any], *, version: str | None, timeout: float
) -> Lease:
    """Change fields of the Lease as it was in *version*; raises Conflict where it has changed since."""
    body = {"metadata": {"resourceVersion": version}, "spec": spec}
    reply = cluster.patch(f"{collection(namespace)}/{name}", msgspec.json.encode(body), timeout=timeout)
    return answered(_lease, reply.body)


def spec(*, holder: str, transitions: int, seconds: float, now: datetime, acquired: bool = False) -> dict[str, Any]:
    """Say who holds a Lease, for so many *seconds* from *now* on; *acquired* marks the beginning of a term."""
    stamp = now.isoformat(timespec="microseconds").replace("+00:00", "Z")
    fields: dict[str, Any] = {
        "holderIdentity": holder,
        "leaseTransitions": transitions,
        "leaseDurationSeconds": max(1, math.ceil(seconds)),
        "renewTime": stamp,
    }
    return fields | ({"acquireTime": stamp} if acquired else {})
