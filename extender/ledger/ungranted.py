"""Pods that are bound to a node and ask for ours without a grant: somebody went around the extender."""

from collections.abc import Callable

from cotenant.contract.pods import Pod
from cotenant.contract.request import PodRequest


class Ungranted:
    """Keep them by UID."""

    def __init__(self, cuts: Callable[[str], bool]) -> None:
        """Ask *cuts* whether a node has MIG GPUs of ours: where none is, another plugin serves its instances."""
        self._cuts = cuts
        self._keys: dict[str, str] = {}
        # those that ask MIG instances, with the node
        self._without_slots: dict[str, tuple[str, str]] = {}

    def note(self, pod: Pod, node: str, request: PodRequest | None) -> None:
        """Note a pod that is bound to *node* without a grant; None stands for a request that cannot be read."""
        if request is not None and request.profiles:
            self._without_slots[pod.uid] = pod.key, node
        else:
            self._keys[pod.uid] = pod.key

    def drop(self, uid: str) -> None:
        """Take over that the pod of that UID is gone, or has a grant."""
        self._keys.pop(uid, None)
        self._without_slots.pop(uid, None)

    def all(self) -> dict[str, str]:
        """Name them, namespace/name by UID."""
        return self._keys | {uid: key for uid, (key, node) in self._without_slots.items() if self._cuts(node)}

    def uids(self) -> set[str]:
        """Give the UIDs of all that were noted, of whatever node."""
        return {*self._keys, *self._without_slots}

    def __contains__(self, uid: str) -> bool:
        """Tell whether the pod of that UID is one."""
        _, node = self._without_slots.get(uid, ("", ""))
        return uid in self._keys or self._cuts(node)
