"""The page about policies: its example works as it stands there, and every policy is in its table."""

import contextlib
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from cotenant.cli.main import main
from cotenant.contract.request import parse
from cotenant.contract.units import GIB
from cotenant.simulator import document
from cotenant.simulator.scene import scene
from cotenant.simulator.timeline import Timeline
from cotenant.simulator.trace import _NODE_COLUMNS, _POD_COLUMNS
from extender.ledger import Ledger
from extender.placement.ranking import Ranking, ask
from extender.policies import POLICIES, Policy, with_others
from extender.policies.binpack import Binpack
from extender.policies.mix import Mix
from extender.policies.table import Table
from tests.builders import NAMES, a_grant, a_node, a_pod, granted
from tests.docs.markdown import DOCS, blocks, section, tables


class AnotherBinpack(Binpack):
    """A policy of another package that takes our name."""


class Other(Binpack):
    """A policy of another package."""

    name = "other"


EXAMPLE = DOCS.parent / "examples" / "policy"
SAMPLE = DOCS.parent / "examples" / "trace"


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
    # and is the one that can be copied
    assert code in (EXAMPLE / "cores_last.py").read_text()
    ledger = Ledger(NAMES, GIB)
    ledger.observe_node(a_node("many").with_gpus(2, "10GiB").build())
    ledger.observe_node(a_node("few").with_gpus(2, "10GiB").build())
    used = a_pod().with_container({NAMES.gpu_mem: 1}, {NAMES.gpu_mem: 1, "cpu": 60})
    ledger.observe_pod(used.bound_to("few", a_grant(granted({"GPU-few-0": GIB}))).build())
    request = parse(a_pod().asking(2).build(), NAMES, GIB)
    assert request is not None
    table = Table(ledger)

    ranking = Ranking(ledger, table, policy(table, Mix()), request, ask(request, table))
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


def test_the_example_to_be_copied_passes_its_own_tests(tmp_path: Path) -> None:
    """Installed as pip would, as far as entry points go: by a .dist-info on the path."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    points = [
        f"[{group}]\n{name} = {value}\n" for group, of in project["entry-points"].items() for name, value in of.items()
    ]
    installed = tmp_path / "cores_last-0.1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    (installed / "entry_points.txt").write_text("".join(points))

    ran = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "--rootdir",
            str(EXAMPLE),
            str(EXAMPLE / "tests"),
        ],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{EXAMPLE}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )

    assert 0 == ran.returncode, ran.stdout
    assert "8 passed" in ran.stdout


def test_the_trace_of_the_page_on_capacity_plays() -> None:
    (text,) = blocks(section("capacity-planning.md", "Traces in JSON"), "json")
    assert text == (SAMPLE / "trace.json").read_text()
    found = scene(document.read(SAMPLE / "trace.json"))
    played = Timeline(found.scheduler("priced-leftovers"), found.mix, found.node).play(
        found.jobs, found.losses, until=100_000
    )

    # when mixed is lost, chat has nowhere to go
    assert {"train": 0, "chat": 100_000 - 9000, "batch": 0} == {
        job.uid.removeprefix("default/"): waited for job, waited in zip(played.jobs, played.waited, strict=True)
    }


def shown() -> Iterator[tuple[str, str]]:
    """Yield the commands of the pages that read files of a trace, and what the pages say that they print."""
    for page in ("policies.md", "capacity-planning.md"):
        for block in blocks((DOCS / page).read_text(), "console"):
            for part in block.split("$ ")[1:]:
                command, _, output = part.partition("\n")
                if re.search(r"--(nodes|trace|snapshot) examples/", command):
                    yield command, output


@pytest.mark.parametrize(("command", "output"), list(shown()), ids=lambda value: value.split(" --")[0])
def test_a_command_with_a_trace_runs_from_a_clean_clone(command: str, output: str, tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(DOCS.parent / "examples")
    with contextlib.chdir(tmp_path):  # where it writes its tables and plots
        done = CliRunner().invoke(main, shlex.split(command)[1:])
    assert ("the next one fits on none" in output) == done.exit_code, done.output
    assert done.stdout.startswith(output)


def test_every_column_of_a_trace_in_csv_is_explained() -> None:
    nodes, pods = tables(section("capacity-planning.md", "Traces in CSV"))
    assert [*_NODE_COLUMNS] == [row[0] for row in nodes]
    assert [*_POD_COLUMNS, "gpu_spec", "creation_time, scheduled_time, deletion_time"] == [row[0] for row in pods]


def test_every_command_of_the_pages_is_one() -> None:
    """Options are checked as they would be typed; files need not be there."""
    typed = re.compile(r"(?:^\$ |`)(cotenant (?:plan|snapshot|simulate|sweep|churn) [^`\n]+)", re.MULTILINE)
    for page in ("policies.md", "capacity-planning.md"):
        for line in typed.findall((DOCS / page).read_text()):
            command: click.Command = main
            arguments = shlex.split(line)[1:]
            while isinstance(command, click.Group):
                command, arguments = command.commands[arguments[0]], arguments[1:]
            known = {option for parameter in command.params for option in parameter.opts}
            assert [] == [word for word in arguments if word.startswith("-") and word not in known], line
