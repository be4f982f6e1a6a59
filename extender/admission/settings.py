"""What admission has to know of the cluster."""

import msgspec

from cotenant.contract.names import Names
from cotenant.contract.units import GIB


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Hold the cluster's names, its unit, and who may do what.

    *scheduler* is the schedulerName of Cotenant's own scheduler; None in the attached layout, where any will do.
    *extender_user* is the only user who may write grants.
    """

    names: Names = Names()
    unit_bytes: int = GIB
    scheduler: str | None = "cotenant-scheduler"
    extender_user: str = "system:serviceaccount:cotenant-system:cotenant-extender"
