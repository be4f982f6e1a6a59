"""docs/explain.md says what the routes and commands do."""

import re

import yaml
from flask import Flask

from cotenant.cli.main import main
from extender.http.api import MAX_PAGE, inspection
from extender.http.pages import _NODES, _REFRESH_SECONDS
from extender.inspect.inspector import Inspector
from extender.inspect.rows import State
from extender.ledger import Ledger
from extender.verbs.judge import Judge
from tests.builders import NAMES
from tests.docs.markdown import DOCS, blocks, section, tables

PAGE = "explain.md"


def test_every_route_stands_there() -> None:
    ledger = Ledger(NAMES, 1 << 30)
    app = Flask("test")
    inspection(app, inspector=Inspector(ledger, Judge(ledger, NAMES, 1 << 30, "best-fit")), synced=lambda: True)
    routes, _ = tables(section(PAGE, "/v1"))
    rules = {rule.rule for rule in app.url_map.iter_rules() if rule.rule.startswith("/v1")}
    assert rules == {row[0] for row in routes}


def test_the_states_and_limits_are_those_of_the_code() -> None:
    text = section(PAGE, "/v1")
    assert all(f"`{state}`" in text or f"{state}" in text for state in State)
    assert f"1 to {MAX_PAGE}." in text
    assert f"shows {_NODES} nodes at a time" in section(PAGE, "The page")
    assert f"every {_REFRESH_SECONDS} s" in section(PAGE, "The page")


def test_the_commands_exist() -> None:
    named = set(re.findall(r"`cotenant ([a-z ]+)`", (DOCS / PAGE).read_text()))
    assert {"inspect nodes", "inspect pods", "inspect namespaces", "inspect mix", "explain", "plan fit"} == named
    inspect = main.commands["inspect"]
    assert {"nodes", "pods", "namespaces", "mix"} == set(inspect.commands)  # type: ignore[attr-defined]
    assert {"explain", "plan"} <= main.commands.keys()


def test_the_role_is_the_one_that_is_shipped() -> None:
    (text,) = blocks(section(PAGE, "Three ways to ask"), "yaml")
    shipped = yaml.safe_load((DOCS.parent / "manifests" / "base" / "viewer.yaml").read_text())
    assert shipped["rules"] == yaml.safe_load(text)["rules"]
