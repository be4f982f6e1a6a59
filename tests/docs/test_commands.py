"""Every command that a page shows is one that there is, with flags that it knows and files that exist."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import msgspec
import pytest
import yaml
from click.testing import CliRunner

from cotenant.cli.main import main as cotenant
from cotenant.contract.names import Names
from cotenant.contract.pods import Pod
from cotenant.contract.request import parse
from cotenant.contract.units import GIB
from device_plugin.main import main as device_plugin
from device_plugin.mps.nursery import main as nursery
from extender.main import main as extender
from tests.docs.markdown import DOCS, blocks

ROOT = DOCS.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
PAGES = [page for page in PAGES if "reference" not in page.parts and "decisions" not in page.parts]
# Other people's programs, which the pages' readers have.
OTHERS = {
    "chcon",
    "cp",
    "docker",
    "kind",
    "openssl",
    "base64",
    "nvidia-smi",
    "dmesg",
    "journalctl",
    "git",
    "jq",
    "curl",
}


def commands() -> Iterator[tuple[Path, list[str]]]:
    """Yield the words of every command in the pages' blocks, and of those that stand in a line by themselves."""
    for page in PAGES:
        text = re.sub(r"\\\n\s*", "", page.read_text())
        lines = [line for block in blocks(text, "sh") for line in block.splitlines()]
        lines += [line[2:] for block in blocks(text, "console") for line in block.splitlines() if line.startswith("$ ")]
        lines += re.findall(r"^    (?:sudo )?((?:make|kubectl|cotenant|helm) [^\n]*)$", text, re.MULTILINE)
        for line in lines:
            # of a variable that is set, the command that says to what
            line = re.sub(r"^[A-Z]+=\$\((.*)\)$", r"\1", line)  # noqa: PLW2901
            if line.strip() and not line.lstrip().startswith("#"):
                yield page, shlex.split(line.split(" | ")[0].split(" > ")[0], comments=True)


ALL = list(commands())


def test_there_are_commands() -> None:
    assert len(ALL) > 30


@pytest.mark.parametrize(
    ("page", "words"), ALL, ids=lambda value: value.name if isinstance(value, Path) else " ".join(value)
)
def test_a_command_is_one_that_there_is(page: Path, words: list[str]) -> None:
    del page
    program, *rest = words
    if program == "cotenant":
        known_flags(cotenant, rest)
    elif program == "make":
        targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        assert {word for word in rest if "=" not in word} <= targets
    elif program in {"kubectl", "helm"}:
        if rest[0] == "gpumem":
            script = (ROOT / "scripts" / "kubectl-gpumem").read_text()
            assert f"kubectl gpumem {rest[1]}" in script
        for word in rest:
            if word.startswith(("manifests/", "charts/")):
                assert (ROOT / word).exists(), word
    else:
        assert program in OTHERS | {"e2e/build.sh", "python", "pip"} or (ROOT / program).exists(), program


def known_flags(command: click.Command, words: list[str]) -> None:
    """Follow a command to the one that is meant, and check its flags."""
    rest = list(words)
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        name = rest.pop(0)
        assert name in command.commands, name
        command = command.commands[name]
    opts = {opt for parameter in command.params for opt in (*parameter.opts, *parameter.secondary_opts)} | {
        "--help",
        "-h",
    }
    flags = {word.partition("=")[0] for word in rest if re.match(r"--?[a-z]", word)}
    assert flags <= opts, flags - opts


def helps(command: click.Command, name: str = "cotenant") -> Iterator[tuple[str, click.Command]]:
    """Yield a command and all below it."""
    yield name, command
    for word, below in command.commands.items() if isinstance(command, click.Group) else ():
        yield from helps(below, f"{name} {word}")


@pytest.mark.parametrize(("name", "command"), list(helps(cotenant)), ids=str)
def test_a_help_is_whole_and_its_examples_are_commands_that_there_are(name: str, command: click.Command) -> None:
    said = CliRunner().invoke(cotenant, [*name.split()[1:], "-h"])
    assert 0 == said.exit_code
    assert "..." not in said.output.partition("Commands:")[2], "a summary was cut: give it a short_help"
    for line in (command.epilog or "").splitlines():
        for part in line.split(" > ")[0].split(" | "):
            program, *words = shlex.split(part) or [""]
            if program == "cotenant" and words[0] != "COMMAND":
                known_flags(cotenant, words)
                assert f"cotenant {' '.join(words)} ".startswith(f"{name} "), line


@pytest.mark.parametrize("program", [extender, device_plugin, nursery])
def test_the_other_programs_help_the_same_way(program: click.Command) -> None:
    assert CliRunner().invoke(program, ["--help"]).output == CliRunner().invoke(program, ["-h"]).output


def test_every_pod_of_a_page_asks_for_what_could_be_given() -> None:
    found = 0
    for page in PAGES:
        if page.parent.name == "moving-in":
            continue  # whose pods ask others, and are compared whole
        for text in blocks(page.read_text(), "yaml"):
            for one in yaml.safe_load_all(text):
                if not isinstance(one, dict) or one.get("kind") not in {"Pod", "Deployment"}:
                    continue
                pod = one if one["kind"] == "Pod" else one["spec"]["template"]
                metadata = {"name": "p", "namespace": "default", "uid": "u", **pod["metadata"]}
                request = parse(msgspec.convert({**pod, "metadata": metadata}, Pod), Names(), GIB)
                found += request is not None
    assert found >= 3
