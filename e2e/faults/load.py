"""Pods that come and go: one container each, of random size, as fast as asked, by seed."""

import random
import threading
import time
from typing import Self

from cotenant.contract.names import Names
from e2e.rest import Api, ApiError, Object

NAMES = Names()
SIZES = (1, 2, 4, 8, 8, 16, 24, 40)


def pod(name: str, units: int, *, node: str = "") -> Object:
    """Return a pod that asks for so many units, as a user writes it, on one node where that is named."""
    resources = {"limits": {NAMES.gpu_mem: str(units)}}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {
            "containers": [{"name": "main", "image": "x", "resources": resources}],
            "automountServiceAccountToken": False,
            "nodeSelector": {"kubernetes.io/hostname": node} if node else {},
        },
    }


class Churn:
    """Create pods at a rate, and delete one that is bound for each that would be too many; a thread of its own.

    Some are deleted with a grace period, in which they still hold what they have, and as no kubelet ends them, are
    deleted for good a moment later; others at once, as a controller does that forces it.
    """

    def __init__(self, api: Api, *, rate: float, keep: int, seed: int) -> None:
        """Prepare to create *rate* pods a second and keep about *keep* of them."""
        self._api = api
        self._rate = rate
        self._keep = keep
        self._rng = random.Random(seed)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._named = 0
        self.created = 0
        self.errors: list[str] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Create and delete no more."""
        self._stopping.set()
        self._thread.join(30)

    def _run(self) -> None:
        due = time.monotonic()
        while not self._stopping.is_set():
            due = max(due + 1 / self._rate, time.monotonic() - 1)
            try:
                self._turn()
            except (ApiError, OSError) as error:
                self.errors.append(str(error))
            self._stopping.wait(due - time.monotonic())

    def _turn(self) -> None:
        # each name once: a create whose answer was lost may have been carried out
        name, self._named = f"p{self._named}", self._named + 1
        self._api.create(pod(name, self._rng.choice(SIZES)))
        self.created += 1
        if self.created % 10:
            return
        pods = self._api.list("Pod", namespace="default")
        for one in pods:
            if "deletionTimestamp" in one["metadata"]:
                self._delete(one, 0)
        bound = [one for one in pods if one["spec"].get("nodeName") and "deletionTimestamp" not in one["metadata"]]
        # those that wait count as well: where too many do, more is deleted than created
        excess = len(pods) - self._keep
        for one in self._rng.sample(bound, min(len(bound), max(0, excess))):
            self._delete(one, self._rng.choice([0, 30]))

    def _delete(self, one: Object, grace_s: int) -> None:
        try:
            self._api.delete("Pod", one["metadata"]["name"], grace_s=grace_s)
        except ApiError as error:
            if error.code != 404:
                raise
