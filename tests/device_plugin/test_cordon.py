"""The cordon of single GPUs, as an administrator writes it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_plugin.health import cordon

KNOWN = {"GPU-1", "GPU-2", "MIG-3"}


@pytest.mark.parametrize("text", [None, "", "  \n"])
def test_nothing_written_cordons_nothing(text: str | None) -> None:
    assert cordon.Cordon() == cordon.read(text, KNOWN)


def test_uuids_are_separated_by_commas_with_or_without_spaces() -> None:
    assert {"GPU-1", "MIG-3"} == cordon.read(" GPU-1 ,MIG-3", KNOWN).uuids


@pytest.mark.parametrize(
    ("part", "problem"),
    [
        ("0", "'0' is an index, which can move: name the GPU by its UUID, as `nvidia-smi -L` shows it"),
        ("GPU-9", "'GPU-9' is no UUID of a GPU or MIG instance of this node, as `nvidia-smi -L` shows them"),
        ("", "a part between two commas is empty"),
        ("all", "'all' is no UUID of a GPU or MIG instance of this node, as `nvidia-smi -L` shows them"),
    ],
)
def test_what_is_no_uuid_of_the_node_is_told_and_takes_nothing_from_the_others(part: str, problem: str) -> None:
    assert cordon.Cordon(frozenset({"GPU-2"}), (problem,)) == cordon.read(f"GPU-2,{part}", KNOWN)


@given(st.text(max_size=300))
def test_no_text_cordons_what_it_does_not_name(text: str) -> None:
    found = cordon.read(text, KNOWN)
    assert found.uuids == {part.strip() for part in text.split(",")} & KNOWN
    # of a part 80 letters are shown, in ten each where they cannot be printed
    assert all(len(problem) < 80 * 10 + 100 for problem in found.problems)
