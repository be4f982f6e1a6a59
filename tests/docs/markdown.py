"""Reads tables and code blocks out of our pages."""

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"


def section(page: str, heading: str) -> str:
    """Give the text below *heading*, up to the next heading of its level or above."""
    text = (DOCS / page).read_text()
    found = re.search(rf"^(#+) {re.escape(heading)}$(?P<body>.*?)(?=^#{{1,2}} |\Z)", text, re.MULTILINE | re.DOTALL)
    if found is None:
        raise LookupError(f"{page} has no heading {heading!r}")
    return found["body"]


def tables(text: str) -> list[list[list[str]]]:
    """List the tables of a text, each a list of rows without its header, the cells without backquotes."""
    found: list[list[list[str]]] = []
    for block in re.findall(r"(?:^\|.*\|\n?)+", text, re.MULTILINE):
        rows = [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in block.splitlines()]
        found.append(rows[2:])
    return found


def blocks(text: str, language: str) -> list[str]:
    """List the code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
