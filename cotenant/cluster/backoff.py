"""How long to wait before asking again."""

import random


class Backoff:
    """Give waits in seconds that double with each failure up to *longest*, less up to a half of each by chance."""

    def __init__(self, rng: random.Random, *, shortest: float = 0.5, longest: float = 30.0) -> None:
        self._rng = rng
        self._shortest = shortest
        self._longest = longest
        self.failures = 0

    def next(self) -> float:
        """Count a failure and return how long to wait after it."""
        # past 2^16 only the cap matters, and the power must not grow for ever
        step = min(self._longest, self._shortest * 2.0 ** min(self.failures, 16))
        self.failures += 1
        return self._rng.uniform(step / 2, step)

    def reset(self) -> None:
        """Begin again with the shortest wait."""
        self.failures = 0
