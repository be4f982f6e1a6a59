"""Earlier releases, as e2e/releases.txt names them, taken out of this repository's history."""

import subprocess
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Release(NamedTuple):
    """Name a version and the revision that it was made from."""

    version: str
    revision: str


class MissingRevisionError(Exception):
    """Say that the history does not reach back to a release."""


def listed() -> list[Release]:
    """List the earlier releases, the oldest first."""
    lines = (ROOT / "e2e" / "releases.txt").read_text().splitlines()
    return [Release(*line.split()) for line in lines if line and not line.startswith("#")]


def unpack(release: Release, directory: Path) -> Path:
    """Write the tree of a release below *directory*, and return it; raise MissingRevisionError in a shallow clone."""
    archive = subprocess.run(["git", "-C", str(ROOT), "archive", release.revision], check=False, capture_output=True)
    if archive.returncode:
        raise MissingRevisionError(
            f"release {release.version} cannot be taken out of the history: {archive.stderr.decode().strip()}; "
            "this needs a full clone"
        )
    tree = directory / release.version
    tree.mkdir()
    subprocess.run(["tar", "--extract", "--directory", tree], input=archive.stdout, check=True)
    return tree
