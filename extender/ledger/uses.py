"""What the pods of each namespace hold together."""

from extender.ledger.values import Hold, Use

_NOTHING = Use()


class Uses:
    """Add up holds by namespace; not safe to change from many threads."""

    def __init__(self) -> None:
        self._uses: dict[str, Use] = {}

    def of(self, namespace: str) -> Use:
        """Say what the pods of one namespace hold."""
        return self._uses.get(namespace, _NOTHING)

    def all(self) -> dict[str, Use]:
        """Say it of every namespace whose pods hold anything."""
        return dict(self._uses)

    def put(self, hold: Hold) -> None:
        """Count what a pod holds."""
        self._add(hold, 1)

    def drop(self, hold: Hold) -> None:
        """Take back what put counted."""
        self._add(hold, -1)

    def _add(self, hold: Hold, sign: int) -> None:
        before = self.of(hold.namespace)
        after = Use(
            bytes=before.bytes + sign * hold.bytes, gpus=before.gpus + sign * hold.gpus, pods=before.pods + sign
        )
        if after.pods:
            self._uses[hold.namespace] = after
        else:
            self._uses.pop(hold.namespace, None)
