"""`cotenant doctor`: look at a cluster's wiring from outside, and say what is wrong with it and what to do."""

from cotenant.cli.doctor.checks import CHECKS, Finding, Severity, examine
from cotenant.cli.doctor.facts import Facts, gather
from cotenant.cli.doctor.report import run

__all__ = ["CHECKS", "Facts", "Finding", "Severity", "examine", "gather", "run"]
