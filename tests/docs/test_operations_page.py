"""docs/operations.md."""

from cotenant.cli.doctor import CHECKS
from tests.docs.markdown import section, tables


def test_every_check_of_the_doctor_is_listed_in_its_order() -> None:
    (rows,) = tables(section("operations.md", "Is it wired as it should be"))
    assert [*CHECKS] == [row[0] for row in rows]
