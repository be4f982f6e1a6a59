"""Compare ways to choose where MIG instances lie: `python -m e2e.measure_mig` prints the tables of docs/decisions/0012.

Nothing of it needs a GPU. *rightmost* takes the highest free start, which is the fixed order that is often advised:
3g at 4 first, 1g at 6. *mixes* keeps the most profiles possible, from the largest, and then the most mixes of them.
"""

import argparse
import random
import time
from collections.abc import Callable, Sequence
from functools import cache

from cotenant.contract.boards import boards
from cotenant.contract.inventory import MIGInstance
from cotenant.contract.mig import Geometry

# Chooses a start for one more instance beside those there, or says that there is none.
Choose = Callable[[Geometry, str, Sequence[MIGInstance]], MIGInstance | None]

SEQUENCES = 2_000
ARRIVALS = 10_000
# instances that would be there on average, were there room for all
OFFERED = 3.0


def ours(geometry: Geometry, profile: str, taken: Sequence[MIGInstance]) -> MIGInstance | None:
    """Choose as the product does."""
    return geometry.place(profile, taken)


def first_fit(geometry: Geometry, profile: str, taken: Sequence[MIGInstance]) -> MIGInstance | None:
    """Choose the lowest free start."""
    return _at(geometry, profile, geometry.starts(profile, taken)[:1])


def rightmost(geometry: Geometry, profile: str, taken: Sequence[MIGInstance]) -> MIGInstance | None:
    """Choose the highest free start."""
    return _at(geometry, profile, geometry.starts(profile, taken)[-1:])


def most_mixes(geometry: Geometry, profile: str, taken: Sequence[MIGInstance]) -> MIGInstance | None:
    """Choose the start after which most profiles still fit, from the largest; then most mixes."""

    def left(start: int) -> tuple[list[bool], int, int]:
        (instance,) = (_at(geometry, profile, (start,)),)
        after = [*taken, instance] if instance is not None else [*taken]
        return [count > 0 for count in geometry.room(after).values()], len(_mixes(geometry, _key(after))), start

    best = max(geometry.starts(profile, taken), key=left, default=None)
    return None if best is None else _at(geometry, profile, (best,))


OBJECTIVES: dict[str, Choose] = {
    "first fit": first_fit,
    "rightmost": rightmost,
    "mixes": most_mixes,
    "ours": ours,
}


def filled(geometry: Geometry, names: Sequence[str], choose: Choose) -> tuple[float, float]:
    """Give the shares of requests refused and of slices unused, for eight random requests on an empty GPU."""
    chance = random.Random(1)
    refused = used = 0
    for _ in range(SEQUENCES):
        placed = _place(geometry, [chance.choice(names) for _ in range(8)], choose)
        refused += 8 - len(placed)
        used += sum(instance.size for instance in placed)
    return refused / SEQUENCES / 8, 1 - used / SEQUENCES / geometry.slices


def completable(geometry: Geometry, names: Sequence[str], choose: Choose) -> float:
    """Give the share of full mixes that are not completed when their profiles come in a random order."""
    chance = random.Random(2)
    failed = 0
    for _ in range(SEQUENCES):
        held: list[MIGInstance] = []
        while possible := [(name, start) for name in names for start in geometry.starts(name, held)]:
            name, start = chance.choice(possible)
            held += [_at(geometry, name, (start,)) or held[0]]
        asked = [instance.profile for instance in held]
        chance.shuffle(asked)
        failed += len(_place(geometry, asked, choose)) < len(asked)
    return failed / SEQUENCES


def churn(geometry: Geometry, names: Sequence[str], choose: Choose) -> tuple[float, float]:
    """Give the share of requests and of requested slices refused, where instances come and go at random."""
    chance = random.Random(3)
    sizes = {profile.name: profile.size for profile in geometry.profiles}
    there: list[tuple[float, MIGInstance]] = []
    refused = refused_slices = asked_slices = 0
    for now in range(ARRIVALS):
        there = [(end, instance) for end, instance in there if end > now]
        name, end = chance.choice(names), now + chance.expovariate(1 / OFFERED)
        asked_slices += sizes[name]
        instance = choose(geometry, name, [instance for _, instance in there])
        if instance is None:
            refused += 1
            refused_slices += sizes[name]
        else:
            there.append((end, instance))
    return refused / ARRIVALS, refused_slices / asked_slices


def speed(geometry: Geometry, names: Sequence[str]) -> tuple[float, float]:
    """Give the milliseconds of one placement on an 8-GPU node: with nothing remembered, and then."""
    chance = random.Random(4)
    node = [_place(geometry, [chance.choice(names) for _ in range(chance.randrange(6))], ours) for _ in range(8)]
    times: list[list[float]] = [[], []]
    for _ in range(50):
        for name in names:
            fresh = Geometry(geometry.profiles)
            for kind in times:
                began = time.perf_counter()
                for taken in node:
                    fresh.place(name, taken)
                kind.append((time.perf_counter() - began) * 1e3)
    cold, warm = (sorted(kind)[len(kind) // 2] for kind in times)
    return cold, warm


def main() -> None:
    """Print a table for each board, of all its profiles and of those without endings."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--board", action="append", choices=list(boards()), help="this board alone")
    chosen = parser.parse_args().board or ["A30-24GB", "A100-SXM4-40GB", "RTX-PRO-6000-Blackwell-96GB"]
    for board in chosen:
        # NVML always lists all profiles of a GPU, whatever pods ask
        geometry = boards()[board].geometry
        cold, warm = speed(geometry, [profile.name for profile in geometry.profiles])
        print(f"\n{board}: one placement on 8 GPUs takes {cold:.2f} ms, {warm:.3f} ms remembered")
        every = [profile.name for profile in geometry.profiles]
        double = {profile.name for profile in geometry.profiles if (profile.compute_slices, profile.size) == (1, 2)}
        plain = [name for name in every if name not in double and not set("+-") & set(name)]
        for title, names in (("plain profiles", plain), ("all profiles", every)):
            print(f"\n{title}: {', '.join(names)}\n")
            print("| objective | filling: refused | slices unused | not completed | churn: refused | slices refused |")
            print("|---|---|---|---|---|---|")
            for objective, choose in OBJECTIVES.items():
                refused, unused = filled(geometry, names, choose)
                churned, slices = churn(geometry, names, choose)
                figures = (refused, unused, completable(geometry, names, choose), churned, slices)
                print(
                    f"| {objective} | " + " | ".join(f"{100 * figure:.1f} %" for figure in figures) + " |", flush=True
                )


def _at(geometry: Geometry, profile: str, starts: Sequence[int]) -> MIGInstance | None:
    sizes = {known.name: known.size for known in geometry.profiles}
    return MIGInstance(profile=profile, start=starts[0], size=sizes[profile]) if starts else None


def _place(geometry: Geometry, asked: Sequence[str], choose: Choose) -> list[MIGInstance]:
    placed: list[MIGInstance] = []
    for name in asked:
        instance = choose(geometry, name, placed)
        if instance is not None:
            placed.append(instance)
    return placed


def _key(instances: Sequence[MIGInstance]) -> tuple[tuple[str, int, int], ...]:
    return tuple(sorted((instance.profile, instance.start, instance.size) for instance in instances))


@cache
def _mixes(geometry: Geometry, held: tuple[tuple[str, int, int], ...]) -> frozenset[tuple[str, ...]]:
    """List the mixes of profiles that the GPU can come to have."""
    taken = [MIGInstance(profile=profile, start=start, size=size) for profile, start, size in held]
    found = {tuple(sorted(instance.profile for instance in taken))}
    for profile in geometry.profiles:
        for start in geometry.starts(profile.name, taken):
            found |= _mixes(geometry, tuple(sorted([*held, (profile.name, start, profile.size)])))
    return frozenset(found)


if __name__ == "__main__":
    main()
