"""A no of the device plugin: one Reason, one sentence, and the pod it is about where that is known."""

from cotenant.contract.pods import Pod
from cotenant.contract.reasons import Reason


class RefusedError(Exception):
    """Say why a container does not get its GPU; the text reaches the pod's status through the kubelet."""

    def __init__(self, reason: Reason, sentence: str, pod: Pod | None = None) -> None:
        super().__init__(sentence)
        self.reason = reason
        self.pod = pod


class PodResourcesError(Exception):
    """Say why the kubelet does not tell who holds what."""
