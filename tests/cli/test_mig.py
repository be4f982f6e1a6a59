"""`cotenant mig`: what it prints, and that nothing it is given makes it fail without a sentence."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from cotenant.cli.main import main
from cotenant.contract.boards import boards

A100 = "A100-SXM4-40GB"


def cotenant(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["mig", *arguments])


def plan(place: str, *more: str, board: str = A100) -> Result:
    return cotenant("plan", "--board", board, "--place", place, *more)


def planned(place: str, *more: str) -> list[dict[str, Any]]:
    result: list[dict[str, Any]] = json.loads(plan(place, "--json", *more).stdout)
    return result


class TestPlan:
    """`cotenant mig plan`."""

    def test_each_gets_a_start_in_the_order_asked(self) -> None:
        result = plan("3g.20gb,2g.10gb,2g.10gb", "--json")
        assert 0 == result.exit_code
        assert [
            {"profile": "3g.20gb", "start": 4, "size": 4},
            {"profile": "2g.10gb", "start": 2, "size": 2},
            {"profile": "2g.10gb", "start": 0, "size": 2},
        ] == json.loads(result.stdout)

    def test_the_list_ends_with_the_one_that_has_no_room(self) -> None:
        result = plan("4g.20gb,4g.20gb,1g.5gb", "--json")
        assert 1 == result.exit_code
        assert [
            {"profile": "4g.20gb", "start": 0, "size": 4},
            {"profile": "4g.20gb", "start": None, "size": 4},
        ] == json.loads(result.stdout)
        assert "4g.20gb, number 2 of 3, has no room: a GPU has at most 1 of 4g.20gb, and 1 are there\n" == result.stderr

    def test_the_slices_are_drawn_after_each(self) -> None:
        result = plan("3g.20gb,2g.10gb,2g.10gb", "--have", "1g.5gb@6")
        assert [
            "A100-SXM4-40GB  NVIDIA A100-SXM4-40GB",
            "                    01234567",
            "  before            ......#.",
            "  3g.20gb  at 0     AAAA..#.",
            "  2g.10gb  at 4     AAAABB#.",
            "  2g.10gb  no room",
        ] == result.stdout.splitlines()
        assert 1 == result.exit_code

    @pytest.mark.parametrize("model", ["NVIDIA A100-SXM4-40GB", "A100-PCIE-40GB"])
    def test_a_board_may_be_named_by_its_model(self, model: str) -> None:
        assert plan("3g.20gb").stdout == plan("3g.20gb", board=model).stdout
        assert cotenant("profiles", "--board", A100).stdout == cotenant("profiles", "--board", model).stdout

    def test_what_is_there_is_not_moved(self) -> None:
        # 1g at 4 bars 3g from 4, and 4g has room beside it
        assert [0] == [one["start"] for one in planned("3g.20gb", "--have", "1g.5gb@4")]
        assert [4, None] == [one["start"] for one in planned("3g.20gb,4g.20gb", "--have", "1g.5gb@0")]

    def test_together_the_order_does_not_matter(self) -> None:
        place = "2g.10gb,3g.20gb,2g.10gb"
        assert [4, 0, None] == [one["start"] for one in planned(place)]
        assert [0, 4, 2] == [one["start"] for one in planned(place, "--together")]

    def test_together_the_first_that_is_too_many_is_named(self) -> None:
        result = plan("2g.10gb,3g.20gb,2g.10gb,2g.10gb", "--together")
        assert 1 == result.exit_code
        assert "2g.10gb, number 4 of 4, has no room beside those before it\n" == result.stderr

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (
                ["--board", "A100", "--place", "1g.5gb"],
                "no board is named 'A100'; there are A30-24GB, A100-SXM4-40GB, ",
            ),
            (["--board", A100, "--place", "1g.10gb,1g"], "the board has no profile '1g'; it has 7g.40gb, 4g.20gb, "),
            (["--board", A100, "--place", "1g.5gb,"], "expected names separated by commas, got '1g.5gb,'"),
            (["--board", A100, "--place", "1g.5gb", "--have", "1g.5gb"], "expected PROFILE@START such as 1g.5gb@0"),
            (["--board", A100, "--place", "1g.5gb", "--have", "1g.5gb@²"], "expected PROFILE@START such as 1g.5gb@0"),
            (
                ["--board", A100, "--place", "1g.5gb", "--have", "9g@0"],
                "the GPU has no profile 9g; its profiles are: 7g",
            ),
            (
                ["--board", A100, "--place", "1g.5gb", "--have", "2g.10gb@6"],
                "2g.10gb cannot lie at 6: it takes 2 memory slices from 0, 2, 4",
            ),
            (
                ["--board", A100, "--place", "1g.5gb", "--have", "3g.20gb@0,1g.5gb@3"],
                "1g.5gb at 3 overlaps 3g.20gb at 0, which takes 4 memory slices from there",
            ),
        ],
    )
    def test_what_cannot_be_is_refused_with_a_sentence(self, arguments: list[str], sentence: str) -> None:
        result = cotenant("plan", *arguments)
        assert 2 == result.exit_code
        assert sentence in result.stderr
        assert "" == result.stdout

    @given(
        st.sampled_from([A100, "A30-24GB", "RTX-PRO-6000-Blackwell-96GB"]).flatmap(
            lambda board: st.tuples(st.just(board), names(board), st.just("") | existing(board), st.booleans())
        )
    )
    def test_nothing_makes_it_fail_without_a_sentence(self, given: tuple[str, str, str, bool]) -> None:
        board, place, have, together = given
        more = ["--together"] if together else []
        result = plan(place, "--have", have, "--json", *more, board=board)
        assert result.exception is None or isinstance(result.exception, SystemExit)
        if result.exit_code == 2:
            assert "Error: " in result.stderr
            return
        answer = json.loads(result.stdout)
        refused = [one for one in answer if one["start"] is None]
        assert (1, 1) == (result.exit_code, len(refused)) if refused else 0 == result.exit_code
        asked = [item.strip() for item in place.split(",")]
        assert asked[: len(answer)] == [one["profile"] for one in answer]


def names(board: str) -> st.SearchStrategy[str]:
    known = st.sampled_from([profile.name for profile in boards()[board].profiles])
    return st.lists(known, min_size=1, max_size=9).map(",".join) | st.text(max_size=9)


def existing(board: str) -> st.SearchStrategy[str]:
    one = st.tuples(names(board), st.integers(-1, 12) | st.text(max_size=2)).map(lambda pair: f"{pair[0]}@{pair[1]}")
    return st.lists(one, max_size=3).map(",".join) | st.text(max_size=9)


def made_up() -> st.SearchStrategy[bytes]:
    """Write files of made-up GPUs that are nearly right."""
    symbols = ["nvmlDeviceGetGpuInstanceProfileInfoV", "nvmlDeviceGetGpuInstanceProfileInfo", "nvmlDeviceGetName"]
    gpu = st.fixed_dictionaries(
        {
            "model": st.sampled_from(["NVIDIA A30", "Tesla T4", ""]),
            "memory": st.sampled_from(["24GiB", "1", "0", 1 << 40]),
        },
        optional={
            "board": st.sampled_from([A100, "A30-24GB", "", "A100"]),
            "count": st.integers(0, 3),
            "mig": st.booleans(),
            "lost": st.booleans(),
            "fail": st.dictionaries(st.sampled_from(symbols), st.integers(0, 30), max_size=2),
        },
    )
    return st.lists(gpu, max_size=3).map(lambda gpus: json.dumps({"gpus": gpus}).encode())


class TestProfiles:
    """`cotenant mig profiles`."""

    def test_a_board_is_drawn_with_the_places_of_each_profile(self) -> None:
        assert [
            "A30-24GB  NVIDIA A30",
            "  profile     id  max     memory  compute  slices  starts   0123",
            "  4g.24gb      0    1  23.44 GiB        4       4  0        AAAA",
            "  2g.12gb      5    2  11.69 GiB        2       2  0,2      AABB",
            "  2g.12gb+me   6    1  11.69 GiB        2       2  0,2      AABB",
            "  1g.6gb      14    4   5.81 GiB        1       1  0,1,2,3  ABCD",
            "  1g.6gb+me   21    1   5.81 GiB        1       1  0,1,2,3  ABCD",
        ] == cotenant("profiles", "--board", "A30-24GB").stdout.splitlines()

    def test_without_a_name_all_boards_are_listed(self) -> None:
        lines = cotenant("profiles").stdout.splitlines()
        assert list(boards()) == [line.split()[0] for line in lines if line and not line.startswith(" ")]

    def test_made_up_gpus_tell_theirs_through_nvml(self, tmp_path: Path) -> None:
        file = tmp_path / "gpus.yaml"
        file.write_text(
            "gpus:\n"
            "- {model: NVIDIA A100-SXM4-40GB, memory: 40GiB, count: 2}\n"
            "- {model: Tesla T4, memory: 16GiB}\n"
            "- {model: engineering sample, memory: 24GiB, board: A30-24GB,"
            " fail: {nvmlDeviceGetGpuInstancePossiblePlacements_v2: 4}}\n"
        )
        result = cotenant("profiles", "--fake-gpus", str(file))
        assert 0 == result.exit_code
        a100 = cotenant("profiles", "--board", A100).stdout.splitlines()
        assert [
            "GPU 0, 1  NVIDIA A100-SXM4-40GB",
            *a100[1:],
            "",
            "GPU 2  Tesla T4",
            "  no MIG profiles of this model are known here; a `board` in the file gives it those of another",
            "",
            "GPU 3  engineering sample",
            "  NVML tells the MIG placements of GPU 3 to root only",
        ] == result.stdout.splitlines()

    @pytest.mark.parametrize(
        ("text", "sentence"),
        [
            ("gpus: [{model: A, memory: 8GiB, board: A100}]", "board: no board is named 'A100'; there are A30-24GB"),
            ("gpus: [{model: A, memory: 8GiB, boards: A100}]", "gpus[0].boards: unknown key"),
            ("gpus: [{", "gpus.yaml"),
        ],
    )
    def test_a_bad_file_is_refused_with_the_place(self, tmp_path: Path, text: str, sentence: str) -> None:
        file = tmp_path / "gpus.yaml"
        file.write_text(text)
        result = cotenant("profiles", "--fake-gpus", str(file))
        assert 1 == result.exit_code
        assert sentence in result.stderr

    @given(st.binary(max_size=40) | st.text(max_size=40).map(str.encode) | made_up())
    def test_no_file_makes_it_fail_without_a_sentence(
        self, tmp_path_factory: pytest.TempPathFactory, content: bytes
    ) -> None:
        file = tmp_path_factory.mktemp("fuzz") / "gpus.yaml"
        file.write_bytes(content)
        result = cotenant("profiles", "--fake-gpus", str(file))
        assert result.exception is None or isinstance(result.exception, SystemExit)
        assert result.stdout or "Error: " in result.stderr

    def test_a_file_that_is_not_there_is_named(self, tmp_path: Path) -> None:
        result = cotenant("profiles", "--fake-gpus", str(tmp_path / "none.yaml"))
        assert 1 == result.exit_code
        assert "none.yaml: cannot be read" in result.stderr

    def test_a_board_and_a_file_are_one_too_many(self, tmp_path: Path) -> None:
        result = cotenant("profiles", "--board", A100, "--fake-gpus", str(tmp_path / "gpus.yaml"))
        assert 2 == result.exit_code
        assert "--board and --fake-gpus exclude each other" in result.stderr
