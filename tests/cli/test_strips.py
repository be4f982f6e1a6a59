"""Strips of GPU memory are in proportion, and the same text on every terminal of the same width."""

from hypothesis import given
from hypothesis import strategies as st

from cotenant.cli.demo.strips import Brush, GPUPicture, NodePicture, Part, cells, overview, picture, strip
from cotenant.contract.units import GIB

LETTERS = Brush(part=lambda pod, width: pod[0].upper() * width, free=lambda n: "." * n, dim=str, border="|")


def gpu(usable: int, index: int = 0, **parts: int) -> GPUPicture:
    return GPUPicture(index, usable * GIB, tuple(Part(pod, amount * GIB) for pod, amount in parts.items()))


class TestCells:
    """Cells are shared out in proportion, without any left over."""

    def test_halves_are_halves(self) -> None:
        assert [5, 5] == cells([40, 40], 10)

    def test_what_is_left_over_goes_to_the_largest_remainder(self) -> None:
        # 10 * 2/6 = 3.3, 10 * 1/6 = 1.7, 10 * 3/6 = 5
        assert [3, 2, 5] == cells([2, 1, 3], 10)

    def test_a_little_is_seen_too(self) -> None:
        # 10 * 1/140 = 0.07 would be none
        assert [1, 9] == cells([1, 139], 10)

    def test_nothing_is_not_seen(self) -> None:
        assert [10, 0] == cells([8, 0], 10)
        assert [0, 0] == cells([0, 0], 10)

    @given(
        st.lists(st.integers(min_value=0, max_value=1 << 40), min_size=1, max_size=12).filter(any),
        st.integers(min_value=12, max_value=200),
    )
    def test_all_cells_are_used_and_nobody_is_lost(self, amounts: list[int], width: int) -> None:
        shared = cells(amounts, width)
        assert width == sum(shared)
        assert [bool(amount) for amount in amounts] == [bool(share) for share in shared]

    @given(st.lists(st.integers(min_value=0, max_value=9), min_size=1, max_size=30).filter(any))
    def test_more_parts_than_cells_are_no_error(self, amounts: list[int]) -> None:
        assert 5 == sum(cells(amounts, 5))


def test_a_strip_shows_parts_free_memory_and_figures() -> None:
    # 80 columns - 18 of frame = 62 cells for 79 GiB: 30 GiB are 23.5 of them, 40 are 31.4, 9 free are 7.1
    line = strip(gpu(79, 1, train=30, chat=40), 80, LETTERS)
    assert f"  1 |{'T' * 24}{'C' * 31}{'.' * 7}|  70/79 GiB" == line


def test_a_full_strip_has_no_free_cell_and_an_empty_one_only_those() -> None:
    assert f"  0 |{'A' * 62}|  14/14 GiB" == strip(gpu(14, a=14), 80, LETTERS)
    assert f"  0 |{'.' * 62}|   0/14 GiB" == strip(gpu(14), 80, LETTERS)


def test_a_gpu_that_holds_more_than_it_has_says_so() -> None:
    assert strip(gpu(14, a=20), 80, LETTERS).endswith(f"{'A' * 62}|  20/14 GiB")


def test_a_picture_has_a_heading_for_each_node_and_a_strip_for_each_gpu() -> None:
    nodes = [
        NodePicture("gpu-t4-1", "Tesla T4", (gpu(14, 0, notebook=2, tagger=6), gpu(14, 1, render=14))),
        NodePicture("gpu-h200-1", "NVIDIA H200", (gpu(139, 0, legacy=50, summary=80),)),
    ]
    # of 22 cells: 2/14 are 3.1, 6/14 are 9.4; 50/139 are 7.9, 80/139 are 12.7, 9/139 are 1.4
    assert [
        "  gpu-t4-1  2 x Tesla T4",
        "  0 |NNNTTTTTTTTTT.........|   8/14 GiB",
        "  1 |RRRRRRRRRRRRRRRRRRRRRR|  14/14 GiB",
        "  gpu-h200-1  NVIDIA H200",
        "  0 |LLLLLLLLSSSSSSSSSSSSS.| 130/139 GiB",
    ] == picture(nodes, 40, LETTERS)


def test_an_overview_names_nodes_and_what_pods_can_have_there() -> None:
    nodes = [
        NodePicture("gpu-t4-1", "Tesla T4", (gpu(14, 0), gpu(14, 1))),
        NodePicture("gpu-h200-1", "NVIDIA H200", (gpu(139, 0),)),
    ]
    assert [
        "  gpu-t4-1    2 x Tesla T4                14 GiB each for pods",
        "  gpu-h200-1  NVIDIA H200                 139 GiB for pods",
    ] == overview(nodes, LETTERS)
