"""What NVML says about the GPUs of this node, as plain facts; the only place that knows pynvml."""

from device_plugin.nvml.library import NVML, NVMLUnavailableError, PhysicalGPU

__all__ = ["NVML", "NVMLUnavailableError", "PhysicalGPU"]
