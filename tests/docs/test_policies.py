"""The page about policies: its example works as it stands there, and every policy is in its table."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Any

import pytest

from cotenant.contract.request import parse
from cotenant.contract.units import GIB
from extender.ledger import Ledger
from extender.mix import Mix
from extender.policies import POLICIES, Policy, with_others
from extender.policies.binpack import Binpack
from extender.ranking import Ranking, ask
from extender.table import Table
from tests.builders import NAMES, a_grant, a_node, a_pod, granted
from tests.docs.markdown import blocks, section, tables


class AnotherBinpack(Binpack):
    """A policy of another package that takes our name."""


class Other(Binpack):
    """A policy of another package."""

    name = "other"


def named(name: str, value: str) -> EntryPoint:
    return EntryPoint(name=name, value=value, group="cotenant.policies")


def test_every_policy_has_a_row() -> None:
    (rows, *_) = tables(section("policies.md", "Policies: which node, and which of its GPUs"))
    assert set(POLICIES) == {row[0].removesuffix(" (default)") for row in rows}


def test_the_example_ranks() -> None:
    (code,) = blocks(section("policies.md", "Write one"), "python")
    module: dict[str, Any] = {}
    exec(code, module)
    policy: type[Policy] = module["CoresLast"]
    ledger = Ledger(NAMES, GIB)
    ledger.observe_node(a_node("many").with_gpus(2, "10GiB").build())
    ledger.observe_node(a_node("few").with_gpus(2, "10GiB").build())
    used = a_pod().with_container({NAMES.gpu_mem: 1}, {NAMES.gpu_mem: 1, "cpu": 60})
    ledger.observe_pod(used.bound_to("few", a_grant(granted({"GPU-few-0": GIB}))).build())
    request = parse(a_pod().asking(2).build(), NAMES, GIB)
    assert request is not None
    table = Table(ledger)

    ranking = Ranking(ledger, table, policy(table, Mix()), request, ask(request, table))
    ranking.update()
    costs = ranking.costs()
    assert costs[table.rows["few"]] < costs[table.rows["many"]]
    view = ledger.view("few")
    assert view is not None
    # the emptiest of the two is the second
    prefer = ranking.preference("few")
    assert 1 == min(view.gpus, key=lambda state: prefer(state, 2 * GIB)).gpu.index


class TestEntryPoints:
    def test_a_policy_of_another_package_stands_beside_ours(self) -> None:
        assert {*POLICIES, "other"} == set(with_others([named("other", "tests.docs.test_policies:Other")]))

    @pytest.mark.parametrize(
        ("name", "value", "problem"),
        [
            ("gone", "no_such_package:Policy", "cannot be loaded"),
            ("gone", "tests.docs.test_policies:NoSuchName", "cannot be loaded"),
            ("odd", "tests.docs.test_policies:named", "is no subclass"),
            ("fine", "tests.docs.test_policies:Other", "calls itself 'other'"),
            ("binpack", "tests.docs.test_policies:AnotherBinpack", "has a name that is taken"),
        ],
    )
    def test_what_is_none_is_left_out_with_a_sentence(self, name: str, value: str, problem: str) -> None:
        with pytest.warns(UserWarning, match=problem):
            found = with_others([named(name, value)])

        assert POLICIES == found
