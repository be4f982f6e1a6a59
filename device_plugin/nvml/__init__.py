"""What NVML says about the GPUs of this node, as plain facts; the only place that knows pynvml."""

from device_plugin.nvml.events import Events, GPUEvent
from device_plugin.nvml.library import NVML, MIGError, NVMLUnavailableError, PhysicalGPU
from device_plugin.nvml.mig import GPUInstance
from device_plugin.nvml.processes import GPUProcess
from device_plugin.nvml.vitals import Recovery, Vitals

__all__ = [
    "NVML",
    "Events",
    "GPUEvent",
    "GPUInstance",
    "GPUProcess",
    "MIGError",
    "NVMLUnavailableError",
    "PhysicalGPU",
    "Recovery",
    "Vitals",
]
