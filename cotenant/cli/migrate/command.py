"""The command line of `cotenant migrate`."""

from collections.abc import Iterable
from typing import IO, Any

import click

from cotenant.cli import manifests
from cotenant.cli.migrate.documents import migrated
from cotenant.cli.migrate.systems import Options
from cotenant.contract.configuration import ConfigurationError
from cotenant.contract.units import MIB, parse_bytes


def read(files: Iterable[IO[str]]) -> list[Any]:
    """Read the documents of some files; raise click.ClickException for one that is no text, or no YAML."""
    documents: list[Any] = []
    for file in files:
        text = ""
        try:
            text = file.read()
            documents += manifests.read(text)
        except ConfigurationError as error:
            what_to_do = "; a chart's templates have to be rendered first: helm template" if "{{" in text else ""
            raise click.ClickException(f"{file.name}: {error}{what_to_do}") from error
        except UnicodeDecodeError as error:
            raise click.ClickException(
                f"{file.name}: is not text in UTF-8: {error.reason} at byte {error.start}"
            ) from error
    return documents


def run(
    documents: Iterable[Any],
    *,
    unit: str,
    gpu_memory: str | None,
    replicas: int | None,
    keep_limits: bool,
    strict: bool,
) -> int:
    """Print the manifests in our words, and say on standard error what is not kept; give the exit status."""
    options = Options(
        unit_bytes=_size("--unit", unit),
        gpu_bytes=_size("--gpu-memory", gpu_memory) if gpu_memory else None,
        replicas=replicas,
        keep_limits=keep_limits,
    )
    result = migrated(documents, options)
    click.echo(manifests.written(result.documents), nl=False)
    for where, sentence in result.notes:
        click.echo(f"{where}: {sentence}", err=True)
    if not result.changed and result.notes:
        click.echo("no pod was changed", err=True)
    elif not result.changed:
        click.echo("no pod here asks another system for a GPU's memory; nothing was changed", err=True)
    return int(strict and bool(result.notes))


def _size(flag: str, text: str) -> int:
    try:
        size = parse_bytes(text)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint=flag) from error
    if size < MIB:
        raise click.BadParameter(f"{text} is less than 1 MiB", param_hint=flag)
    return size
