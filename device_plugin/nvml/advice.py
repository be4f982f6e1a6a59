"""What NVML's errors mean to people, and what to do about them."""

from typing import Any

import pynvml

from device_plugin.nvml.patience import Unanswered

_ADVICE = {
    pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: (
        "libnvidia-ml.so.1 is not found: install the NVIDIA driver, run the container with the NVIDIA runtime, "
        "or name the library with --nvml-library"
    ),
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: (
        "the NVIDIA driver is not loaded: run `modprobe nvidia`, then check with `nvidia-smi`"
    ),
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: (
        "libnvidia-ml.so.1 and the loaded kernel module are of different driver versions: reload the module or reboot"
    ),
    pynvml.NVML_ERROR_NO_PERMISSION: "NVML may not reach the GPUs: /dev/nvidia* are not readable by this user",
    pynvml.NVML_ERROR_GPU_IS_LOST: "the GPU has fallen off the bus: reset it or reboot",
    pynvml.NVML_ERROR_RESET_REQUIRED: "the GPU needs a reset: drain it and run `nvidia-smi --gpu-reset`",
}
# What a container needs beyond others where a GPU is to be cut, and what is on it to be seen.
_PRIVILEGE = (
    "give the plugin's container the capability SYS_ADMIN, and NVIDIA_MIG_CONFIG_DEVICES=all in its environment, as "
    "manifests/mig does"
)
# Of a GPU in MIG mode NVML gives what all of it uses "only if the caller has appropriate privileges" (nvml.h,
# nvmlDeviceGetMemoryInfo); which these are in a container stands with NVIDIA's runtime, NVIDIA_MIG_CONFIG_DEVICES.
UNPRIVILEGED = (
    f"MIG mode is on, and the driver tells its memory to a privileged program alone: {_PRIVILEGE}; or switch MIG mode "
    "off, where the GPU is not to be cut"
)
# Nor does it let others list, make or destroy instances, or switch MIG mode, however readable the GPUs are to them.
MIG_UNPRIVILEGED = f"the driver lets a privileged program alone do that: {_PRIVILEGE}"


def sentence(error: Any) -> str:
    """Say what went wrong: NVML's error, no answer, or an answer that cannot be read."""
    if isinstance(error, Unanswered):
        return str(error)
    if not isinstance(error, pynvml.NVMLError):
        return f"what NVML says cannot be read: {error!r}"
    return _ADVICE.get(error.value, f"NVML says: {error} (code {error.value})")
