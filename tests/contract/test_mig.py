"""Placements against brute force, over every board whose profiles are known."""

import json
from collections.abc import Sequence
from functools import cache
from itertools import permutations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotenant.contract.boards import Board, BoardProfile, UnknownBoardError, board, board_of, boards
from cotenant.contract.inventory import MIGInstance, MIGProfile
from cotenant.contract.mig import Geometry, PlacementError
from tests.contract.brute_force import Placed, Rules
from tests.contract.strategies import instances as any_instances
from tests.contract.strategies import profiles as any_profiles

A100 = "A100-SXM4-40GB"
A30 = "A30-24GB"
RTX = "RTX-PRO-6000-Blackwell-96GB"
SEVEN_SLICES = [name for name, known in boards().items() if known.profiles[-1].compute_slices == 7]

STUDY = Path(__file__).parents[3] / "shared" / "data" / "mig-profiles.json"


def of(name: str, *, only: set[str] | None = None) -> Geometry:
    return Geometry([p.profile for p in boards()[name].profiles if only is None or p.name in only])


def on(name: str, *placed: Placed) -> list[MIGInstance]:
    sizes = {profile.name: profile.size for profile in boards()[name].profiles}
    return [MIGInstance(profile=profile, start=start, size=sizes[profile]) for profile, start in placed]


def starts(geometry: Geometry, *profiles: str) -> list[int | None]:
    """Place one after the other, none moved; None for one that was refused."""
    placed: list[MIGInstance] = []
    found: list[int | None] = []
    for profile in profiles:
        instance = geometry.place(profile, placed)
        found.append(None if instance is None else instance.start)
        placed += [instance] if instance is not None else []
    return found


@cache
def sets(name: str) -> list[tuple[Placed, ...]]:
    """List every set of instances that brute force allows."""
    return sorted(tuple(sorted(held)) for held in Rules(name).sets())


@cache
def mixes(name: str) -> frozenset[tuple[str, ...]]:
    """List the profiles of every such set."""
    return frozenset(tuple(sorted(profile for profile, _ in held)) for held in sets(name))


@cache
def maximal(name: str, only: frozenset[str]) -> tuple[int, int]:
    """Count the sets of instances beside which nothing fits, and how many mixes of profiles those are."""
    geometry = of(name, only=set(only))
    seen: set[frozenset[Placed]] = set()
    full: set[frozenset[Placed]] = set()
    edge: list[frozenset[Placed]] = [frozenset()]
    while edge:
        held = edge.pop()
        taken = on(name, *held)
        more = [(p.name, start) for p in geometry.profiles for start in geometry.starts(p.name, taken)]
        if not more:
            full.add(held)
        for one in more:
            if held | {one} not in seen:
                seen.add(held | {one})
                edge.append(held | {one})
    return len(full), len({tuple(sorted(profile for profile, _ in held)) for held in full})


def chosen_by_brute_force(rules: Rules, profile: str, held: Sequence[Placed]) -> int | None:
    """Give the start that leaves the most, once Geometry has been seen to choose the same."""
    geometry = rules.board.geometry
    taken = [MIGInstance(profile=p, start=start, size=rules.profiles[p].size) for p, start in held]
    largest_first = sorted(
        rules.profiles.values(), key=lambda p: (-p.size, -p.compute_slices, -(p.memory_mib or 0), p.name)
    )
    ways = [
        ([rules.most(p.name, (*held, (profile, start))) for p in largest_first], start)
        for other, start in rules.further(held)
        if other == profile
    ]
    left, best = max(ways, default=(None, None))
    instance = geometry.place(profile, taken)
    assert best == (None if instance is None else instance.start)
    if instance is not None:
        assert left == list(geometry.room([*taken, instance]).values())
    return best


def made_up_boards() -> st.SearchStrategy[Board]:
    """Make boards up whose profiles overlap as no real ones do, and whose numbers are limited below what has room."""

    def profile(number: int) -> st.SearchStrategy[BoardProfile]:
        return st.builds(
            BoardProfile,
            name=st.just(f"p{number}"),
            nvml_profile=st.just(number),
            profile_id=st.just(number),
            compute_slices=st.integers(1, 3),
            size=st.integers(1, 3),
            starts=st.sets(st.integers(0, 5), min_size=1, max_size=5).map(lambda starts: tuple(sorted(starts))),
            max_instances=st.integers(1, 3),
        )

    return st.integers(1, 3).flatmap(
        lambda count: st.builds(
            Board,
            model=st.just("made up"),
            memory_mib=st.just(1),
            compute_capability=st.just((9, 0)),
            profiles=st.tuples(*map(profile, range(count))),
        )
    )


class TestBoards:
    """The boards' data is the study's, and finds boards by name and by model."""

    def test_every_fact_of_the_study_is_there_unchanged(self) -> None:
        if not STUDY.exists():
            pytest.skip("the study's data is not beside this repository: ../shared/data/mig-profiles.json")
        study = json.loads(STUDY.read_text())["gpus"]
        assert list(study) == list(boards())
        for name, facts in study.items():
            known = boards()[name]
            assert (facts["name"], facts["memory_mib"]) == (known.model, known.memory_mib)
            for expected, got in zip(facts["profiles"], known.profiles, strict=True):
                assert expected["placements"] == [[start, got.size] for start in got.starts]
                names = ("name", "profile_id", "nvml_enum", "compute_slices", "max_instances", "memory_mib", "sm")
                engines = ("ce", "dec", "enc", "jpeg", "ofa")
                assert [expected.get(key) for key in names + engines] == [
                    got.name,
                    got.profile_id,
                    got.nvml_profile,
                    got.compute_slices,
                    got.max_instances,
                    got.memory_mib,
                    got.multiprocessors,
                    got.copy_engines,
                    got.decoders,
                    got.encoders,
                    got.jpeg_engines,
                    got.optical_flow,
                ]

    def test_a_board_is_found_by_what_nvml_calls_it(self) -> None:
        assert boards()[A100] is board_of("NVIDIA A100-SXM4-40GB")
        assert boards()[A100] is board_of("A100-PCIE-40GB")
        assert board_of("Tesla T4") is None

    def test_an_unknown_name_is_answered_with_the_known_ones(self) -> None:
        with pytest.raises(UnknownBoardError, match=r"no board is named 'A100'; there are A30-24GB, A100-SXM4-40GB, "):
            board("A100")


class TestGeometry:
    """What fits is what the rules say, no more and no less."""

    @pytest.mark.parametrize("name", SEVEN_SLICES)
    def test_a_board_of_seven_slices_can_be_filled_in_19_ways_and_78_with_double_memory(self, name: str) -> None:
        plain = {p.name for p in boards()[name].profiles if not p.name.endswith("+me")}
        double = {p.name for p in boards()[name].profiles if (p.compute_slices, p.size) == (1, 2)}
        assert (19, 14) == maximal(name, frozenset(plain - double))
        assert (78, 38) == maximal(name, frozenset(plain))

    def test_an_a30_can_be_filled_in_5_ways_and_so_can_an_rtx_pro(self) -> None:
        assert (5, 4) == maximal(A30, frozenset({"1g.6gb", "2g.12gb", "4g.24gb"}))
        assert (5, 4) == maximal(RTX, frozenset({"1g.24gb", "2g.48gb", "4g.96gb"}))

    @pytest.mark.parametrize("name", [A30, A100, RTX])
    def test_after_every_set_that_can_be_there_the_free_starts_are_those_of_brute_force(self, name: str) -> None:
        rules, geometry = Rules(name), of(name)
        assert len(sets(name)) > 50
        for held in sets(name):
            taken = on(name, *held)
            got = {(p.name, start) for p in geometry.profiles for start in geometry.starts(p.name, taken)}
            assert set(rules.further(held)) == got

    @given(st.data())
    def test_a_sequence_is_refused_only_where_no_placement_exists_and_none_is_moved(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(list(boards())))
        rules, geometry = Rules(name), of(name)
        placed: list[Placed] = []
        for profile in data.draw(st.lists(st.sampled_from(list(rules.profiles)), max_size=12)):
            possible = [start for other, start in rules.further(placed) if other == profile]
            instance = geometry.place(profile, on(name, *placed))
            if instance is None:
                assert [] == possible
                assert geometry.explain(profile, on(name, *placed))
            else:
                assert instance.start in possible
                assert "" == geometry.explain(profile, on(name, *placed))
                placed.append((profile, instance.start))
                assert rules.valid(placed)

    @given(st.data())
    def test_the_start_keeps_the_most_of_the_largest_then_of_the_next(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from([A30, A100, RTX]))
        rules, held = Rules(name), data.draw(st.sampled_from(sets(name)))
        for profile in {profile for profile, _ in rules.further(held)}:
            chosen_by_brute_force(rules, profile, held)

    @given(made_up_boards(), st.data())
    def test_it_does_on_boards_that_nobody_makes(self, made_up: Board, data: st.DataObject) -> None:
        rules = Rules(made_up)
        held: list[Placed] = []
        for profile in data.draw(st.lists(st.sampled_from(list(rules.profiles)), max_size=5)):
            start = chosen_by_brute_force(rules, profile, held)
            held += [] if start is None else [(profile, start)]

    def test_the_upper_half_is_for_3g_and_the_last_slice_for_1g(self) -> None:
        assert [4, 0] == starts(of(A100), "3g.20gb", "4g.20gb")
        # 3g lies at 4, so both pairs below are whole
        assert [4, 2, 0] == starts(of(A100), "3g.20gb", "2g.10gb", "2g.10gb")
        # slice 6 is in no pair of a 2g; 5 and 4 are one pair, and 4g keeps its place to the last
        assert [6, 5, 4, 0] == starts(of(A100), "1g.5gb", "1g.5gb", "1g.5gb", "4g.20gb")
        assert [6, 4, 2, 0] == starts(of(A100), "1g.5gb", "2g.10gb", "2g.10gb", "2g.10gb")
        assert [6, 5, 4, 3, 2, 1, 0, None] == starts(of(A100), *["1g.5gb"] * 8)

    def test_slices_count_as_taken_by_whatever_lies_there(self) -> None:
        foreign = MIGInstance(profile="made by hand", start=2, size=3)
        assert (0, 1, 5, 6) == of(A100).starts("1g.5gb", [foreign])
        assert {"7g.40gb": 0, "4g.20gb": 0, "3g.20gb": 0, "2g.10gb": 1} == {
            name: count for name, count in of(A100).room([foreign]).items() if not name.startswith("1g")
        }

    def test_media_engines_are_given_once(self) -> None:
        # an A30 has one optical flow accelerator and one JPEG engine, and both +me profiles take them
        assert () == of(A30).starts("2g.12gb+me", on(A30, ("1g.6gb+me", 3)))
        # +me.all takes all four decoders, so only profiles without any can be beside it
        everything = on(RTX, ("2g.48gb+me.all", 0))
        assert {"2g.48gb-me": 1, "1g.24gb-me": 2} == {
            name: count for name, count in of(RTX).room(everything).items() if count
        }
        assert "1g.24gb cannot be beside 2g.48gb+me.all: they need the same media engines" == of(RTX).explain(
            "1g.24gb", everything
        )

    def test_room_that_the_number_of_a_profile_forbids_to_use_counts_for_nothing(self) -> None:
        pair, single = (
            MIGProfile(name=name, profile_id=0, bytes=1, compute_slices=1, max_instances=most, size=size, starts=starts)
            for name, most, size, starts in (("pair", 2, 2, (0, 1, 2, 4)), ("single", 3, 1, (0, 3, 4)))
        )
        # one more pair is all there may be, and each start leaves it; the singles have all of theirs beside 1 alone
        assert [1] == starts(Geometry([pair, single]), "pair")

    def test_of_profiles_with_one_name_the_first_counts(self) -> None:
        first, second = (
            MIGProfile(name="1g", profile_id=n, bytes=1, compute_slices=1, max_instances=2, size=1, starts=(n,))
            for n in (0, 1)
        )
        assert (first,) == Geometry([first, second]).profiles

    def test_one_instance_alone_has_the_media_extensions_whatever_their_number_is_said_to_be(self) -> None:
        profile = MIGProfile(
            name="1g+me", profile_id=0, bytes=1, compute_slices=1, max_instances=4, size=1, starts=(0, 1, 2, 3)
        )
        assert {"1g+me": 1} == Geometry([profile]).room([])

    @given(
        st.lists(any_profiles, max_size=4),
        st.lists(any_instances, max_size=4),
        st.text(max_size=3),
    )
    def test_whatever_an_annotation_says_is_no_error(
        self, profiles: list[MIGProfile], taken: list[MIGInstance], other: str
    ) -> None:
        geometry = Geometry(profiles)
        for name in [*(profile.name for profile in geometry.profiles), other]:
            instance = geometry.place(name, taken)
            if instance is None:
                assert geometry.explain(name, taken)
            else:
                geometry.check(instance, taken)
                assert geometry.room(taken)[name] >= 1


class TestTogether:
    """Instances known beforehand find their starts whatever the order."""

    @pytest.mark.parametrize(
        "mix", [("3g.20gb", "2g.10gb", "2g.10gb"), ("4g.20gb", "2g.10gb", "1g.5gb"), ("3g.20gb", *["1g.5gb"] * 4)]
    )
    def test_the_known_mixes_come_out_whatever_the_order(self, mix: tuple[str, ...]) -> None:
        for order in set(permutations(mix)):
            placed = of(A100).place_together(order)
            assert placed is not None
            assert list(order) == [instance.profile for instance in placed]
            assert Rules(A100).valid([(instance.profile, instance.start) for instance in placed])

    def test_no_way_of_placing_one_by_one_could_do_both_mixes_in_every_order(self) -> None:
        rules = Rules(A100)
        # where may a first 2g lie, for the other two to find room after it?
        for_4g = {s for s in (0, 2, 4) if rules.valid([("2g.10gb", s), ("4g.20gb", 0), ("1g.5gb", 6)])}
        for_3g = {
            s
            for s in (0, 2, 4)
            for other in (0, 2, 4)
            for half in (0, 4)
            if rules.valid([("2g.10gb", s), ("2g.10gb", other), ("3g.20gb", half)])
        }
        assert ({4}, {0, 2}) == (for_4g, for_3g)

    @given(st.data())
    def test_they_are_refused_only_where_no_set_of_brute_force_has_them(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from([A30, A100, RTX]))
        asked = data.draw(st.lists(st.sampled_from(list(Rules(name).profiles)), max_size=5))
        placed = of(name).place_together(asked)
        assert (tuple(sorted(asked)) in mixes(name)) == (placed is not None)
        if placed is not None:
            assert Rules(name).valid([(instance.profile, instance.start) for instance in placed])

    @given(st.data())
    def test_one_alone_lies_where_it_would_on_arrival(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from([A30, A100, RTX]))
        taken = on(name, *data.draw(st.sampled_from(sets(name))))
        profile = data.draw(st.sampled_from(list(Rules(name).profiles)))
        placed = of(name).place(profile, taken)
        assert of(name).place_together([profile], taken) == (None if placed is None else (placed,))

    def test_a_gpu_of_more_slices_than_any_is_not_searched(self) -> None:
        profile = MIGProfile(
            name="1g", profile_id=0, bytes=1, compute_slices=1, max_instances=17, size=1, starts=tuple(range(17))
        )
        with pytest.raises(PlacementError, match="the GPU has 17 memory slices, and a full search ends at 16"):
            Geometry([profile]).place_together(["1g"] * 17)

    def test_what_is_there_stays_where_it_is(self) -> None:
        taken = on(A100, ("1g.5gb", 0))
        (placed,) = of(A100).place_together(["3g.20gb"], taken) or [None]
        assert placed is not None
        assert 4 == placed.start
        assert of(A100).place_together(["3g.20gb", "4g.20gb"], taken) is None


class TestCheck:
    """An instance that is said to be there can be there, or the sentence says why not."""

    @pytest.mark.parametrize(
        ("profile", "start", "sentence"),
        [
            ("9g.1gb", 0, "the GPU has no profile 9g.1gb; its profiles are: 7g.40gb, 4g.20gb, "),
            ("2g.10gb", 1, "2g.10gb cannot lie at 1: it takes 2 memory slices from 0, 2, 4"),
            ("2g.10gb", 4, "2g.10gb at 4 overlaps 3g.20gb at 4, which takes 4 memory slices from there"),
            ("1g.5gb+me", 1, "a GPU has at most 1 of 1g.5gb+me, and 1 are there"),
        ],
    )
    def test_what_cannot_be_is_refused_with_the_reason(self, profile: str, start: int, sentence: str) -> None:
        size = 2 if profile.startswith("2g") else 1
        with pytest.raises(PlacementError) as refused:
            of(A100).check(
                MIGInstance(profile=profile, start=start, size=size), on(A100, ("3g.20gb", 4), ("1g.5gb+me", 0))
            )
        assert str(refused.value).startswith(sentence)

    def test_the_size_has_to_be_the_profiles(self) -> None:
        with pytest.raises(PlacementError, match=r"2g\.10gb cannot lie at 0: it takes 2 memory slices from 0, 2, 4"):
            of(A100).check(MIGInstance(profile="2g.10gb", start=0, size=4), [])

    def test_what_can_be_is_not(self) -> None:
        of(A100).check(MIGInstance(profile="2g.10gb", start=2, size=2), on(A100, ("3g.20gb", 4), ("1g.5gb+me", 0)))
