"""What admission has to know of the cluster."""

import msgspec

from cotenant.contract.names import Names
from extender.placement.tenants import Tenants


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Hold the cluster's names, its unit, and who may do what.

    *scheduler* is the schedulerName of Cotenant's own scheduler, and *profiles* the others that it answers to; None in
    the attached layout, where any will do. *extender_user* is the only user who may write grants. *tenants* says what
    namespaces may have, if anything does.
    """

    names: Names
    unit_bytes: int
    scheduler: str | None
    profiles: frozenset[str] = frozenset()
    extender_user: str
    tenants: Tenants | None = None
