"""What the extender and the device plugin tell each other: names, units, annotations, requests, reasons, configuration.

Everything here is pure: no clock, no Flask, no Kubernetes client, no NVML, and no I/O but reading a configuration file.
"""
