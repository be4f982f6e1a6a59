"""Sphinx: the pages as they lie here, and the command line's reference, written from the commands themselves."""

import re
import sys
from pathlib import Path
from typing import Any

import click

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from cotenant import __version__  # noqa: E402
from cotenant.cli.main import main as cotenant  # noqa: E402
from device_plugin.main import main as device_plugin  # noqa: E402
from extender.main import main as extender  # noqa: E402

project = "Cotenant"
author = "The Cotenant authors"
copyright = "the Cotenant authors, Apache-2.0"  # noqa: A001 - Sphinx's name
version = release = __version__

extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"Cotenant {__version__}"
html_static_path: list[str] = []
html_extra_path = [path.name for path in HERE.glob("pictures")]
myst_enable_extensions = ["deflist", "attrs_block"]
myst_heading_anchors = 3
nitpicky = True
pygments_dark_style = "monokai"
# `console` shows what people type; a name of a lexer that is not known is a warning, and so an error.
highlight_language = "text"

# Files of the repository that pages link to: the site has no copy of them.
REPOSITORY = "https://cotenant.io/source/"
_ABOVE = re.compile(r"\]\((\.\./[^)#]+)(#[^)]*)?\)")


def _command(name: str, command: click.Command, above: click.Context | None = None) -> list[str]:
    """Write the help of a command and of those below it."""
    context = click.Context(command, info_name=name.rpartition(" ")[2], parent=above, **command.context_settings)
    lines = [f"## {name}", "", "```text", command.get_help(context), "```", ""]
    if isinstance(command, click.Group):
        for below in command.list_commands(context):
            found = command.get_command(context, below)
            if found is not None:
                lines += _command(f"{name} {below}", found, context)
    return lines


def _write_reference(_app: Any, _config: Any) -> None:
    commands = {"cotenant": cotenant, "cotenant-extender": extender, "cotenant-device-plugin": device_plugin}
    body = [line for name, command in commands.items() for line in _command(name, command)]
    target = HERE / "reference" / "commands.md"
    target.parent.mkdir(exist_ok=True)
    target.write_text("\n".join(["# Commands", "", "As the commands say themselves.", "", *body]))


def _read(_app: Any, page: str, source: list[str]) -> None:
    def led(link: re.Match[str]) -> str:
        file = (HERE / page).parent.joinpath(link[1]).resolve()
        if file.is_relative_to(HERE):
            return link[0]
        return f"]({REPOSITORY}{file.relative_to(HERE.parent)}{link[2] or ''})"

    source[0] = _ABOVE.sub(led, source[0])


def setup(app: Any) -> None:
    """Write the reference before anything is read, and lead links out of docs/ to the repository."""
    app.connect("config-inited", _write_reference)
    app.connect("source-read", _read)
