"""Admission as it is configured where nothing is configured."""

import msgspec

from cotenant.contract.configuration import ExtenderConfiguration
from extender.admission import Settings

_DEFAULT = ExtenderConfiguration()

SETTINGS = Settings(
    names=_DEFAULT.names,
    unit_bytes=_DEFAULT.unit_bytes,
    scheduler=_DEFAULT.scheduler_name,
    extender_user=_DEFAULT.extender_user,
)
ATTACHED = msgspec.structs.replace(SETTINGS, scheduler=None)
