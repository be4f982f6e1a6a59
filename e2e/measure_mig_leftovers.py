"""Compare prices of MIG placements: `python -m e2e.measure_mig_leftovers` prints the tables of docs/decisions/0066.

Sixteen GPUs, a mix of profiles that is known. *room* takes the GPU and start that lose the fewest instances that could
still be made, the largest profile first (docs/decisions/0012); *room, asked* counts those of the mix's profiles alone,
as the product does where it has learned which are asked. *leftovers* prices what is left of
a GPU by what the mix is expected to waste of it: priced-leftovers' table, with legal starts in the place of "fits".
*and blocks* adds that policy's price of an empty GPU, for what asks a whole one.
Nothing of it needs a GPU.
"""

import argparse
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from statistics import mean

from cotenant.contract.boards import boards
from cotenant.contract.inventory import MIGInstance
from cotenant.contract.mig import Geometry
from cotenant.simulator.churn import half_width

GPUS = 16
ARRIVALS = 3_000
LOADS = (0.9, 1.1)

Taken = tuple[MIGInstance, ...]
# Says what one GPU would lose by an instance, and what an empty one costs besides, given the part of what is free that
# lies on empty ones: the least is taken, over all GPUs and starts.
Lost = Callable[[Taken, MIGInstance], tuple[float, ...]]
Price = tuple[Lost, Callable[[float], float]]

MIXES: dict[str, dict[str, float]] = {
    "even": {"1g": 0.2, "2g": 0.2, "3g": 0.2, "4g": 0.2, "7g": 0.2},
    "small": {"1g": 0.5, "2g": 0.25, "3g": 0.15, "4g": 0.05, "7g": 0.05},
    "large": {"1g": 0.1, "2g": 0.1, "3g": 0.3, "4g": 0.1, "7g": 0.4},
    "1g and 3g": {"1g": 0.5, "3g": 0.5},
    "1g and 4g": {"1g": 0.5, "4g": 0.5},
    "2g and 3g": {"2g": 0.5, "3g": 0.5},
}


class Board:
    """One kind of GPU, and prices of its instances."""

    def __init__(self, name: str) -> None:
        self.geometry: Geometry = boards()[name].geometry
        self.sizes = {profile.name: profile.size for profile in self.geometry.profiles}
        plain = [profile.name for profile in self.geometry.profiles if not set("+-") & set(profile.name)]
        # 1g.5gb before 1g.10gb, which has twice the memory
        self.plain = {name.partition(".")[0]: name for name in plain if self.sizes[name] != 2 or name[0] != "1"}

    def mix(self, parts: Mapping[str, float]) -> dict[str, float]:
        """Name the profiles as the board does."""
        return {self.plain[short]: part for short, part in parts.items()}

    def ways(self, taken: Taken, profile: str) -> list[MIGInstance]:
        """List the instances of *profile* that could be made."""
        size = self.sizes[profile]
        return [MIGInstance(profile=profile, start=at, size=size) for at in self.geometry.starts(profile, taken)]

    def first(self, _taken: Taken, instance: MIGInstance) -> tuple[float, ...]:
        """Price as first fit does."""
        return (float(instance.start),)

    def room(self, asked: Collection[str] | None = None) -> Lost:
        """Price as the product does: `Geometry.place` for the start, extender.placement.partition for the GPU."""
        profiles = [one for one in self.geometry.profiles if asked is None or one.name in asked]
        geometry = Geometry(profiles)

        @cache
        def price(taken: Taken, instance: MIGInstance) -> tuple[float, ...]:
            chosen = geometry.place(instance.profile, taken)
            if chosen is None or chosen.start != instance.start:
                return (float("inf"),)
            before, after = geometry.room(taken), geometry.room((*taken, instance))
            left = self.geometry.slices - sum(one.size for one in (*taken, instance))
            return (sum((before[one.name] - after[one.name]) * one.size for one in profiles) + left / 1000,)

        return price

    def leftovers(self, mix: Mapping[str, float], offers: int, scale: float = 0.0) -> Price:
        """Price by the growth of expected waste and, with a *scale*, by empty GPUs; then as `room` does."""

        room = self.room()

        @cache
        def waste(taken: Taken, left: int) -> float:
            if not left:
                return float(self.geometry.slices - sum(one.size for one in taken))
            stays = waste(taken, left - 1)
            return sum(
                part * min([stays, *(waste(_with(taken, way), left - 1) for way in self.ways(taken, profile))])
                for profile, part in mix.items()
            )

        @cache
        def price(taken: Taken, instance: MIGInstance) -> tuple[float, ...]:
            grown = waste(_with(taken, instance), offers) - waste(taken, offers)
            return (round(grown, 6), *room(taken, instance))

        # of what is asked, the part that takes a whole GPU
        whole = sum(part * self.sizes[name] for name, part in mix.items() if self.sizes[name] == self.geometry.slices)
        demand = whole / sum(part * self.sizes[name] for name, part in mix.items())

        def of_empty(supply: float) -> float:
            return self.geometry.slices * scale * min(1, demand / max(supply, 1e-9)) ** 1.5 if demand else 0.0

        return price, of_empty


def _nothing(_supply: float) -> float:
    return 0.0


def _with(taken: Taken, instance: MIGInstance) -> Taken:
    return tuple(sorted((*taken, instance), key=lambda one: (one.start, one.profile)))


class Cluster:
    """Sixteen GPUs that a price places instances on."""

    def __init__(self, board: Board, price: Price) -> None:
        self.board = board
        self._price, self._of_empty = price
        self.gpus: list[Taken] = [()] * GPUS

    def place(self, profile: str) -> tuple[int, MIGInstance] | None:
        """Make an instance, and say on which GPU; None where there is no room."""
        seen: dict[Taken, tuple[tuple[float, ...], MIGInstance] | None] = {}
        slices = self.board.geometry.slices
        free = sum(slices - sum(one.size for one in taken) for taken in self.gpus)
        of_empty = self._of_empty(slices * self.gpus.count(()) / max(1, free))
        for taken in self.gpus:
            if taken not in seen:
                ways = [(self._price(taken, way), -way.start, way) for way in self.board.ways(taken, profile)]
                best = min(ways, key=lambda one: one[:2], default=None)
                first = of_empty if not taken else 0.0
                seen[taken] = None if best is None else ((best[0][0] + first, *best[0][1:]), best[2])
        found = [(way[0], n) for n, taken in enumerate(self.gpus) if (way := seen[taken]) is not None]
        if not found:
            return None
        _, gpu = min(found)
        chosen = seen[self.gpus[gpu]]
        assert chosen is not None
        self.gpus[gpu] = _with(self.gpus[gpu], chosen[1])
        return gpu, chosen[1]

    def end(self, gpu: int, instance: MIGInstance) -> None:
        """Destroy an instance."""
        held = list(self.gpus[gpu])
        held.remove(instance)
        self.gpus[gpu] = tuple(held)


def filled(board: Board, mix: Mapping[str, float], price: Price, seed: int) -> tuple[float, float]:
    """Give percent of slices held, and of what the largest profile asked dropped, when 130 % have been asked."""
    chance, cluster = random.Random(seed), Cluster(board, price)
    capacity = GPUS * board.geometry.slices
    largest = max(mix, key=board.sizes.__getitem__)
    asked = held = large = dropped = 0
    while asked < 1.3 * capacity:
        (profile,) = chance.choices(list(mix), list(mix.values()))
        size = board.sizes[profile]
        placed = cluster.place(profile)
        asked += size
        held += size * (placed is not None)
        large += profile == largest
        dropped += profile == largest and placed is None
    return 100 * held / capacity, 100 * dropped / max(1, large)


def churned(board: Board, mix: Mapping[str, float], price: Price, seed: int, load: float) -> tuple[float, float]:
    """Give percent of slices held over the time, and of requests refused, where instances come and go at random."""
    chance, cluster = random.Random(seed), Cluster(board, price)
    capacity = GPUS * board.geometry.slices
    rate = load * capacity / sum(part * board.sizes[profile] for profile, part in mix.items())
    ends: list[tuple[float, int, MIGInstance]] = []
    now = area = held = 0.0
    refused = 0
    for _ in range(ARRIVALS):
        then = now + chance.expovariate(rate)
        (profile,) = chance.choices(list(mix), list(mix.values()))
        life = chance.expovariate(1)
        for end, gpu, instance in sorted((one for one in ends if one[0] <= then), key=lambda one: one[0]):
            area, now, held = area + held * (end - now), end, held - instance.size
            cluster.end(gpu, instance)
        ends = [one for one in ends if one[0] > then]
        area, now = area + held * (then - now), then
        placed = cluster.place(profile)
        if placed is None:
            refused += 1
            continue
        held += placed[1].size
        ends.append((then + life, *placed))
    return 100 * area / now / capacity, 100 * refused / ARRIVALS


def main() -> None:
    """Print tables: means over seeds, and the difference to `room` with its 95 percent interval."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--board", default="A100-SXM4-40GB", choices=list(boards()))
    parser.add_argument("--seeds", default="1-6", help="such as 7-12")
    parser.add_argument("--offers", type=int, action="append", help="how many requests a leftover is offered")
    chosen = parser.parse_args()
    board, (since, until) = Board(chosen.board), map(int, chosen.seeds.split("-"))
    for title, parts in MIXES.items():
        mix = board.mix(parts)
        prices: dict[str, Price] = {
            "room": (board.room(), _nothing),
            "room, asked": (board.room(mix), _nothing),
            "first fit": (board.first, _nothing),
        }
        prices |= {f"leftovers, {n}": board.leftovers(mix, n) for n in chosen.offers or (12, 36)}
        prices |= {f"and blocks, {scale:g}": board.leftovers(mix, 36, scale) for scale in (0.25, 1.0)}
        print(f"\n{title}: {', '.join(f'{name} {part:.0%}' for name, part in mix.items())}\n")
        print("| price | filled | | largest dropped | | " + " | ".join(f"{load:.0%} held | " for load in LOADS))
        print("|---" * (5 + 2 * len(LOADS)) + "|")
        first: list[list[float]] = []
        for name, price in prices.items():
            runs = [
                [*filled(board, mix, price, seed), *(churned(board, mix, price, seed, load)[0] for load in LOADS)]
                for seed in range(since, until + 1)
            ]
            first = first or runs
            print(f"| {name} | " + " | ".join(_cells(runs, first)) + " |", flush=True)


def _cells(runs: Sequence[Sequence[float]], first: Sequence[Sequence[float]]) -> list[str]:
    cells = []
    for column in range(len(runs[0])):
        less = [run[column] - other[column] for run, other in zip(runs, first, strict=True)]
        cells += [f"{mean(run[column] for run in runs):.2f}", f"{mean(less):+.2f} ± {half_width(less):.2f}"]
    return cells


if __name__ == "__main__":
    main()
