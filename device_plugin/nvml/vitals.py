"""Reads from NVML how a GPU is: memory errors, what the driver says must be done, and the licence of a vGPU."""

from collections.abc import Callable
from enum import IntEnum
from typing import Any

import msgspec
import pynvml

# NVML's call with its arguments; None where NVML does not say
Optional = Callable[..., Any]


class Recovery(IntEnum):
    """Say what the driver wants done with a GPU (nvmlDeviceGpuRecoveryAction_t)."""

    NONE = pynvml.NVML_GPU_RECOVERY_ACTION_NONE
    GPU_RESET = pynvml.NVML_GPU_RECOVERY_ACTION_GPU_RESET
    NODE_REBOOT = pynvml.NVML_GPU_RECOVERY_ACTION_NODE_REBOOT
    DRAIN_P2P = pynvml.NVML_GPU_RECOVERY_ACTION_DRAIN_P2P
    DRAIN_AND_RESET = pynvml.NVML_GPU_RECOVERY_ACTION_DRAIN_AND_RESET
    RECOVER_IMEX_DOMAIN = pynvml.NVML_GPU_RECOVERY_ACTION_RECOVER_IMEX_DOMAIN
    BUS_RESET = pynvml.NVML_GPU_RECOVERY_ACTION_BUS_RESET
    SYSTEM_REBOOT = pynvml.NVML_GPU_RECOVERY_ACTION_SYSTEM_REBOOT
    # newer than this program knows
    UNKNOWN = -1

    @classmethod
    def _missing_(cls, value: object) -> "Recovery":  # noqa: ARG003 - whatever it is
        return cls.UNKNOWN


class Vitals(msgspec.Struct, frozen=True, kw_only=True):
    """Show how a GPU is; None is what NVML does not say, as to vGPU guests and by older drivers."""

    # by whomever, without what the driver reserves where it tells that apart
    used_bytes: int | None = None
    # since the driver was loaded
    uncorrected_ecc: int | None = None
    remap_pending: bool | None = None
    remap_failed: bool | None = None
    recovery: Recovery | None = None
    # of a vGPU guest: whether any feature of it is licensed
    licensed: bool | None = None


def read(ask: Optional, handle: Any, *, used_bytes: int | None, guest: bool) -> Vitals:
    """Read the vitals of the GPU behind *handle*; raise pynvml.NVMLError where it fails, and not where it is silent."""
    ecc = ask(
        pynvml.nvmlDeviceGetTotalEccErrors,
        handle,
        pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
        pynvml.NVML_VOLATILE_ECC,
    )
    remapped = ask(pynvml.nvmlDeviceGetRemappedRows, handle)
    return Vitals(
        used_bytes=used_bytes,
        uncorrected_ecc=ecc,
        remap_pending=None if remapped is None else bool(remapped[2]),
        remap_failed=None if remapped is None else bool(remapped[3]),
        recovery=_recovery(ask, handle),
        licensed=_licensed(ask, handle) if guest else None,
    )


def _recovery(ask: Optional, handle: Any) -> Recovery | None:
    fields = ask(pynvml.nvmlDeviceGetFieldValues, handle, [pynvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION])
    if fields is None or fields[0].nvmlReturn != pynvml.NVML_SUCCESS:
        return None
    return Recovery(fields[0].value.uiVal)


def _licensed(ask: Optional, handle: Any) -> bool | None:
    """Tell whether a vGPU has a licence; a GPU that needs none says so by isGridLicenseSupported."""
    found = ask(pynvml.nvmlDeviceGetGridLicensableFeatures, handle)
    if found is None or not found.isGridLicenseSupported:
        return None
    count = min(found.licensableFeaturesCount, len(found.gridLicensableFeatures))
    return any(feature.featureState for feature in found.gridLicensableFeatures[:count])
