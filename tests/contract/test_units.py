import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotenant.contract.units import (
    GIB,
    KIB,
    MAX_BYTES,
    MIB,
    device_ids,
    format_bytes,
    id_prefix,
    parse_bytes,
    parse_quantity,
    usable_bytes,
)

uuids = st.text("0123456789abcdef-GPU", min_size=1, max_size=40)


class TestQuantity:
    """Quantities are read as Kubernetes writes them, whole and below an exbibyte, or refused with a sentence."""

    @pytest.mark.parametrize(
        ("expected", "text"),
        [
            (8, "8"),
            (8, 8),
            (0, "0"),
            (0, 0),
            (8, "+8"),
            (-8, "-8"),
            (8, "8."),
            (8, "8.0"),
            (1, "1000m"),
            (1, "1000000000n"),
            (1, "1000000u"),
            (2_000, "2k"),
            (3_000_000, "3M"),
            (4 * 10**9, "4G"),
            (10**12, "1T"),
            (10**15, "1P"),
            (10**18, "1E"),
            (KIB, "1Ki"),
            (MIB, "1Mi"),
            (80 * GIB, "80Gi"),
            (1536, "1.5Ki"),
            (512, ".5Ki"),
            (1 << 40, "1Ti"),
            (1 << 50, "1Pi"),
            (1 << 60, "1Ei"),
            (1_000, "1e3"),
            (1_000, "1E3"),
            (12, "1200e-2"),
            (0, "0e999"),
            (8, "8." + "0" * 38),  # 40 characters
            (MAX_BYTES, str(MAX_BYTES)),
        ],
    )
    def test_a_whole_quantity_is_read_exactly(self, expected: object, text: str | int) -> None:
        assert expected == parse_quantity(text)

    @pytest.mark.parametrize(
        "text",
        [
            "",
            " ",
            " 8",
            "8 ",
            "8\n",
            "eight",
            "0x10",
            "1_000",
            "1,000",
            "--8",
            "8GB",
            "8 Gi",
            "8gi",
            "8K",
            "8KI",
            "8ki",
            "Gi",
            ".",
            "+",
            "1e",
            "1ee3",
            "1e3Gi",
            "NaN",
            "Infinity",
            "٨",  # an Arabic 8, a digit to Python
            "8" * 41,
        ],
    )
    def test_what_is_no_quantity_is_refused_by_name(self, text: str | int) -> None:
        with pytest.raises(ValueError, match="is not a quantity such as 8, 2k or 80Gi"):
            parse_quantity(text)

    @pytest.mark.parametrize(
        "text",
        ["0.5", "1.5", "1m", "1n", "1e-3", "1e-999", ".1Ki", "1.0000000000000000000000000000000000001", "-0.5"],
    )
    def test_a_fraction_is_refused_however_small(self, text: str | int) -> None:
        with pytest.raises(ValueError, match="is not a whole number"):
            parse_quantity(text)

    @pytest.mark.parametrize(
        "text",
        [
            "1e999",
            "-1e999",
            "2Ei",
            "99999999999999999999",
            "9e999",
            MAX_BYTES + 1,
            -MAX_BYTES - 1,
            10**400,
            pytest.param(10**5000, id="ten to the 5000th"),
        ],
    )
    def test_an_absurd_amount_is_refused_without_being_reckoned_with(self, text: str | int) -> None:
        with pytest.raises(ValueError, match="more than any GPU has"):
            parse_quantity(text)

    @given(st.one_of(st.text(max_size=60), st.text("0123456789eE.+-KMGTPinumk", max_size=45), st.integers()))
    def test_anything_is_read_or_refused_with_a_value_error(self, text: str | int) -> None:
        try:
            amount = parse_quantity(text)
        except ValueError:
            return
        assert abs(amount) <= MAX_BYTES


class TestBytes:
    """People may write bytes as they speak of them; what we write they can hand back."""

    @pytest.mark.parametrize(
        ("expected", "text"),
        [
            (80 * GIB, "80GiB"),
            (80 * GIB, "80 GiB"),
            (80 * GIB, " 80Gi "),
            (256 * MIB, "256MiB"),
            (80 * 10**9, "80GB"),
            (7, "7B"),
            (7, "7"),
            (7, 7),
            (0, "0"),
        ],
    )
    def test_an_amount_is_read_with_or_without_its_b(self, expected: object, text: str | int) -> None:
        assert expected == parse_bytes(text)

    @pytest.mark.parametrize("text", ["-1GiB", -1])
    def test_a_negative_amount_is_refused(self, text: str | int) -> None:
        with pytest.raises(ValueError, match="is negative"):
            parse_bytes(text)

    @pytest.mark.parametrize("text", ["8 0GiB", "80 G iB", "80GiBB", "B", "", "GiB", "80 gib"])
    def test_a_slip_of_the_pen_is_refused(self, text: str | int) -> None:
        with pytest.raises(ValueError, match="is not a quantity"):
            parse_bytes(text)

    @given(st.integers(0, 1023), st.sampled_from([1, KIB, MIB, GIB, 1 << 40]))
    def test_what_we_write_of_whole_units_we_read_again(self, count: int, size: int) -> None:
        assert count * size == parse_bytes(format_bytes(count * size))

    @pytest.mark.parametrize(
        ("expected", "amount"),
        [
            ("0 B", 0),
            ("1023 B", 1023),
            ("1 KiB", 1024),
            ("1.5 KiB", 1536),
            ("80 GiB", 80 * GIB),
            ("79.6 GiB", 81559 * MIB),  # 81559 / 1024 = 79.65
            ("-8 GiB", -8 * GIB),
        ],
    )
    def test_an_amount_is_written_exactly_or_with_one_digit(self, expected: object, amount: int) -> None:
        assert expected == format_bytes(amount)


class TestUsable:
    """What pods may be given is what is left after all reserves, in whole units."""

    def test_an_80_gb_board_gives_79_units(self) -> None:
        # 81559 MiB - 551 MiB of the driver's = 81008 MiB = 79.1 GiB
        assert 79 * GIB == usable_bytes(total=81559 * MIB, reserved=551 * MIB, reserve_per_gpu=0, unit_bytes=GIB)

    def test_a_reserve_larger_than_the_gpu_leaves_nothing(self) -> None:
        assert 0 == usable_bytes(total=GIB, reserved=0, reserve_per_gpu=2 * GIB, unit_bytes=GIB)

    @given(*[st.integers(0, 1 << 45)] * 3, st.integers(1, 1 << 40))
    def test_it_is_whole_units_and_never_more_than_is_left(
        self, total: int, reserved: int, reserve: int, unit: int
    ) -> None:
        usable = usable_bytes(total=total, reserved=reserved, reserve_per_gpu=reserve, unit_bytes=unit)

        left = max(0, total - reserved - reserve)
        assert 0 == usable % unit
        assert usable <= left < usable + unit


class TestDeviceIds:
    """Ids are short, all different, and depend on nothing but the GPU's UUID and their number."""

    def test_an_id_is_eight_digits_of_the_uuids_digest_and_a_number(self) -> None:
        digest = hashlib.blake2s(b"GPU-1", digest_size=4).hexdigest()

        assert [f"{digest}-0", f"{digest}-1"] == device_ids("GPU-1", 2)

    def test_a_gpu_without_units_has_no_ids(self) -> None:
        assert [] == device_ids("GPU-1", 0)

    @given(st.sets(uuids, min_size=1, max_size=16), st.integers(1, 200))
    def test_the_ids_of_a_node_are_all_different_and_short(self, gpus: set[str], count: int) -> None:
        ids = [one for uuid in gpus for one in device_ids(uuid, count)]

        assert len(gpus) * count == len(set(ids))
        # 8 digits, a dash, and up to 3 digits
        assert 12 >= max(map(len, ids))

    @given(uuids, st.integers(1, 100), st.integers(1, 100))
    def test_growing_a_gpu_renames_none_of_its_ids(self, uuid: str, few: int, more: int) -> None:
        grown = device_ids(uuid, few + more)

        assert device_ids(uuid, few) == grown[:few]
        assert {id_prefix(uuid)} == {one.partition("-")[0] for one in grown}
