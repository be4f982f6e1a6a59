"""The rules of MIG spelled out from the boards' data, without anything of Geometry: slow, and plain to read."""

from collections.abc import Collection, Iterable, Iterator
from itertools import combinations

from cotenant.contract.boards import Board, BoardProfile, boards

# profile and start
Placed = tuple[str, int]

ENGINES = ("decoders", "encoders", "jpeg_engines", "optical_flow")


class Rules:
    """Tell which sets of instances one board can have."""

    def __init__(self, board: str | Board) -> None:
        self.board = boards()[board] if isinstance(board, str) else board
        self.profiles: dict[str, BoardProfile] = {profile.name: profile for profile in self.board.profiles}
        self.budgets = {engine: self._budget(engine) for engine in ENGINES}

    def _budget(self, engine: str) -> int | None:
        """Give how many of an engine there are: as many as the profile with the most has.

        None where the data itself lets one profile's instances have more: seven 1g of an A100-SXM4-80GB say one decoder
        each, and the whole board says five.
        """
        amounts = [(getattr(profile, engine) or 0, profile.max_instances) for profile in self.board.profiles]
        most = max(amount for amount, _ in amounts)
        return None if any(amount * number > most for amount, number in amounts) else most

    def valid(self, placed: Collection[Placed]) -> bool:
        held = [self.profiles[name] for name, _ in placed]
        return (
            all(start in self.profiles[name].starts for name, start in placed)
            and all(apart(self.slices(a), self.slices(b)) for a, b in combinations(placed, 2))
            and all(held.count(profile) <= profile.max_instances for profile in held)
            and all(
                budget is None or sum(getattr(profile, engine) or 0 for profile in held) <= budget
                for engine, budget in self.budgets.items()
            )
        )

    def slices(self, placed: Placed) -> set[int]:
        name, start = placed
        return set(range(start, start + self.profiles[name].size))

    def further(self, placed: Collection[Placed]) -> Iterator[Placed]:
        """List what could be made beside *placed*."""
        for name, profile in self.profiles.items():
            for start in profile.starts:
                if self.valid([*placed, (name, start)]):
                    yield name, start

    def most(self, name: str, placed: tuple[Placed, ...], starts: Iterable[int] | None = None) -> int:
        """Count how many of one profile could be made beside *placed*, trying every subset of its starts."""
        left = list(self.profiles[name].starts if starts is None else starts)
        best = 0
        for position, start in enumerate(left):
            more = (*placed, (name, start))
            if self.valid(more):
                best = max(best, 1 + self.most(name, more, left[position + 1 :]))
        return best

    def sets(self) -> set[frozenset[Placed]]:
        """List every set of instances that can be there together, the empty one too."""
        found: set[frozenset[Placed]] = set()
        edge: set[frozenset[Placed]] = {frozenset()}
        while edge:
            found |= edge
            edge = {held | {more} for held in edge for more in self.further(held) if more not in held} - found
        return found


def apart(one: set[int], other: set[int]) -> bool:
    return not one & other
