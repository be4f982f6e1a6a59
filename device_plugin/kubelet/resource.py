"""One resource that this node offers: its device ids, who answers for them, and its registration with the kubelet."""

from collections.abc import Callable, Mapping
from pathlib import Path

from device_plugin.admission.refusal import RefusedError
from device_plugin.kubelet.devices import DeviceList
from device_plugin.kubelet.registration import Registration
from device_plugin.kubelet.service import Allocator, DevicePluginService


class Resource:
    """Serve the resource called *name* until stop(); a kubelet may come and go meanwhile.

    *refused*, *answered*, *serving_changed* and *connected* are the service's and the registration's.
    """

    def __init__(
        self,
        name: str,
        allocator: Allocator,
        folder: Path,
        *,
        refused: Callable[[str, RefusedError], None],
        serving_changed: Callable[[], None],
        connected: Callable[[], None],
        answered: Callable[[str, str, float], None],
    ) -> None:
        self.name = name
        self._devices = DeviceList()
        self._registration = Registration(folder, name, serving_changed=serving_changed, connected=connected)
        self._service = DevicePluginService(
            devices=self._devices, allocator=allocator, streams=self._registration, refused=refused, answered=answered
        )

    @property
    def serving(self) -> bool:
        """Tell whether a kubelet follows the devices now."""
        return self._registration.serving

    def offer(self, devices: Mapping[str, bool]) -> None:
        """Replace the device ids, each with whether it is healthy."""
        self._devices.set(devices)

    def start(self) -> None:
        """Begin to serve and to register; return at once."""
        self._registration.start(self._service)

    def stop(self) -> None:
        """Withdraw from the kubelet and end."""
        self._registration.retire()
        self._devices.close()
        self._registration.stop()
