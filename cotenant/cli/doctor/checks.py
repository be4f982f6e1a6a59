"""What can be wrong with the wiring of a cluster: each check looks at the facts and says what it finds.

A check has one name, which never changes, so that scripts and pages can refer to it.
"""

from collections.abc import Callable, Iterator
from enum import StrEnum

import msgspec

from cotenant.cli.doctor.facts import Facts

Check = Callable[[Facts], Iterator["Finding"]]
CHECKS: dict[str, Check] = {}


class Severity(StrEnum):
    """Say how bad it is: BROKEN keeps pods from running or grants from holding; SUSPECT may be meant so."""

    BROKEN = "broken"
    SUSPECT = "suspect"


class Finding(msgspec.Struct, frozen=True):
    """Say what is wrong, and what to do; *check* is the name of the check that found it."""

    check: str
    severity: Severity
    what: str
    do: str


Said = Iterator[tuple[Severity, str, str]]


def check(name: str) -> Callable[[Callable[[Facts], Said]], Callable[[Facts], Said]]:
    """Enter a check under its name."""

    def enter(function: Callable[[Facts], Said]) -> Callable[[Facts], Said]:
        CHECKS[name] = lambda facts: (Finding(name, *said) for said in function(facts))
        return function

    return enter


def examine(facts: Facts) -> list[Finding]:
    """Run all checks; the worst findings first, else in the order of the checks."""
    found = [finding for run in CHECKS.values() for finding in run(facts)]
    return sorted(found, key=lambda finding: finding.severity is not Severity.BROKEN)


def some(names: list[str]) -> str:
    """Name a few of many."""
    shown = 3
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


# What they check is theirs; they enter themselves above.
from cotenant.cli.doctor import installed, nodes, scheduler  # noqa: E402, F401 - each needs the names above
