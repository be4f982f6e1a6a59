"""`cotenant mig`: what GPUs can be cut into, and where instances would lie."""

import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import click

from cotenant.cli.options import examples, warn_on_stderr
from cotenant.contract.boards import UnknownBoardError, board, boards
from cotenant.contract.configuration import ConfigurationError
from cotenant.contract.inventory import MIGInstance, MIGProfile
from cotenant.contract.mig import Geometry, PlacementError
from cotenant.contract.units import GIB

# An instance is a letter in the picture, in the order asked; what was there before is this.
_BEFORE = "#"
_FREE = "."
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class _BoardName(click.ParamType[str]):
    """Read the name of a board, or the model that NVML calls it."""

    name = "name"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            found = board(value)
        except UnknownBoardError as error:
            self.fail(str(error), param, ctx)
        return next(name for name, known in boards().items() if known is found)


@click.group(short_help="Plan MIG partitions: no GPU is needed.")
def mig() -> None:
    """Plan the partitions of GPUs: no GPU is needed, none is touched."""


@mig.command(
    short_help="List MIG profiles, and where instances can lie.",
    epilog=examples("cotenant mig profiles --board A100-SXM4-40GB"),
)
@click.option("--board", "name", type=_BoardName(), help="This board alone.")
@click.option(
    "--fake-gpus",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The GPUs of the device plugin's file of made-up ones, as NVML tells of them.",
)
def profiles(*, name: str | None, fake_gpus: Path | None) -> None:
    """List MIG profiles, and where their instances can lie: of all boards that are known, unless one is named."""
    if name is not None and fake_gpus is not None:
        raise click.UsageError("--board and --fake-gpus exclude each other: the profiles are of one or the other.")
    if fake_gpus is not None:
        pages = _made_up(fake_gpus)
    else:
        names = boards() if name is None else [name]
        pages = [(f"{known}  {board(known).model}", table(board(known).geometry)) for known in names]
    click.echo("\n\n".join("\n".join([title, *lines]) for title, lines in pages))


@mig.command(
    short_help="Say where instances would lie on one GPU.",
    epilog=examples("cotenant mig plan --board A100-SXM4-40GB --place 3g.20gb,2g.10gb,2g.10gb"),
)
@click.option(
    "--board",
    "name",
    type=_BoardName(),
    required=True,
    help="The board or its model, as `cotenant mig profiles` lists.",
)
@click.option("--place", required=True, help="Profiles in the order asked: 3g.20gb,2g.10gb,2g.10gb")
@click.option("--have", default="", help="Instances that are there, with their starts: 1g.5gb@0,1g.5gb@6")
@click.option("--together", is_flag=True, help="All are known beforehand: find starts for all, whatever the order.")
@click.option("--json", "as_json", is_flag=True, help='Print [{"profile", "start", "size"}]; start is null if refused.')
@click.pass_context
def plan(
    context: click.Context,
    *,
    name: str,
    place: str,
    have: str,
    together: bool,
    as_json: bool,
) -> None:
    """Say where each of several instances would lie on one GPU, each placed as it comes and none moved.

    Stops at the first that has no room, with status 1.
    """
    geometry = board(name).geometry
    asked = _profiles(geometry, _items(place, "--place"))
    before = _existing(geometry, _items(have, "--have") if have else ())
    placed, refusal = _together(geometry, asked, before) if together else _one_by_one(geometry, asked, before)
    if as_json:
        answer = [{"profile": i.profile, "start": i.start, "size": i.size} for i in placed]
        answer += [{"profile": p.name, "start": None, "size": p.size} for p in asked[len(placed) :][:1]]
        click.echo(json.dumps(answer))
    else:
        refused = asked[len(placed)].name if refusal else None
        click.echo("\n".join([f"{name}  {board(name).model}", *steps(geometry, before, placed, refused)]))
    if refusal:
        click.echo(refusal, err=True)
        context.exit(1)


def table(geometry: Geometry) -> list[str]:
    """Draw the profiles of a GPU, a line each: its numbers, and its places side by side."""
    if not geometry.profiles:
        return ["  no MIG profiles of this model are known here; a `board` in the file gives it those of another"]
    head = ("profile", "id", "max", "memory", "compute", "slices", "starts", _ruler(geometry.slices))
    rows = [
        (
            profile.name,
            str(profile.profile_id),
            str(profile.max_instances),
            f"{profile.bytes / GIB:.2f} GiB" if profile.bytes else "?",
            str(profile.compute_slices),
            str(profile.size),
            ",".join(map(str, profile.starts)),
            _places(profile, geometry.slices),
        )
        for profile in geometry.profiles
    ]
    return _aligned([head, *rows], right={1, 2, 3, 4, 5})


def steps(
    geometry: Geometry, before: Sequence[MIGInstance], placed: Sequence[MIGInstance], refused: str | None
) -> list[str]:
    """Draw the memory slices after each instance that was placed, and name the one that was not."""
    cells = [_FREE] * geometry.slices
    for instance in before:
        cells[instance.start : instance.start + instance.size] = _BEFORE * instance.size
    rows = [("", "", _ruler(geometry.slices)), ("before", "", "".join(cells))]
    for number, instance in enumerate(placed):
        cells[instance.start : instance.start + instance.size] = _LETTERS[number % len(_LETTERS)] * instance.size
        rows.append((instance.profile, f"at {instance.start}", "".join(cells)))
    if refused is not None:
        rows.append((refused, "no room", ""))
    return _aligned(rows, right=set())


def _made_up(file: Path) -> list[tuple[str, list[str]]]:
    """Title and draw the GPUs of *file*, those side by side that are alike together."""
    from device_plugin.nvml import NVML, NVMLUnavailableError  # noqa: PLC0415 - and no NVML

    warn_on_stderr()
    try:
        nvml = NVML.open(fake=file)
        gpus = nvml.gpus()
    except (ConfigurationError, NVMLUnavailableError) as error:
        raise click.ClickException(str(error)) from error
    drawn = []
    for gpu in gpus:
        try:
            lines = table(Geometry(nvml.mig_profiles(gpu.index)))
        except NVMLUnavailableError as error:
            lines = [f"  {error}"]
        drawn.append((gpu, lines))
    pages = []
    for (model, lines), group in groupby(drawn, key=lambda pair: (pair[0].model, pair[1])):
        pages.append((f"GPU {', '.join(str(gpu.index) for gpu, _ in group)}  {model}", lines))
    return pages or [(f"{file} has no GPU that answers", [])]


def _items(text: str, option: str) -> list[str]:
    items = [item.strip() for item in text.split(",")]
    if not all(items):
        raise click.BadParameter(f"expected names separated by commas, got {text!r}", param_hint=option)
    return items


def _profiles(geometry: Geometry, names: Sequence[str]) -> list[MIGProfile]:
    """Find profiles by name; raise click.BadParameter for one that the board has not."""
    known = {profile.name: profile for profile in geometry.profiles}
    for name in names:
        if name not in known:
            raise click.BadParameter(
                f"the board has no profile {name!r}; it has {', '.join(known)}", param_hint="--place"
            )
    return [known[name] for name in names]


def _existing(geometry: Geometry, have: Sequence[str]) -> list[MIGInstance]:
    """Read instances written as 1g.5gb@0; raise click.BadParameter where they cannot be there together."""
    sizes = {profile.name: profile.size for profile in geometry.profiles}
    instances: list[MIGInstance] = []
    for text in have:
        profile, at, start = text.rpartition("@")
        if not at or not start.isascii() or not start.isdecimal() or len(start) > len("64"):
            raise click.BadParameter(f"expected PROFILE@START such as 1g.5gb@0, got {text!r}", param_hint="--have")
        instance = MIGInstance(profile=profile, start=int(start), size=sizes.get(profile, 1))
        try:
            geometry.check(instance, instances)
        except PlacementError as error:
            raise click.BadParameter(str(error), param_hint="--have") from error
        instances.append(instance)
    return instances


def _one_by_one(
    geometry: Geometry, asked: Sequence[MIGProfile], before: Sequence[MIGInstance]
) -> tuple[list[MIGInstance], str]:
    """Place each as it comes; give those placed, and why the next was refused."""
    placed: list[MIGInstance] = []
    for number, profile in enumerate(asked, 1):
        instance = geometry.place(profile.name, [*before, *placed])
        if instance is None:
            why = geometry.explain(profile.name, [*before, *placed])
            return placed, f"{profile.name}, number {number} of {len(asked)}, has no room: {why}"
        placed.append(instance)
    return placed, ""


def _together(
    geometry: Geometry, asked: Sequence[MIGProfile], before: Sequence[MIGInstance]
) -> tuple[list[MIGInstance], str]:
    """Place as many as fit together, from the first; give those placed, and which one is too many."""
    fitting: tuple[MIGInstance, ...] = ()
    for count, profile in enumerate(asked, 1):
        found = geometry.place_together([each.name for each in asked[:count]], before)
        if found is None:
            return list(fitting), f"{profile.name}, number {count} of {len(asked)}, has no room beside those before it"
        fitting = found
    return list(fitting), ""


def _ruler(slices: int) -> str:
    return "".join(str(n % 10) for n in range(slices))


def _places(profile: MIGProfile, slices: int) -> str:
    """Draw where instances can lie, side by side: a letter a place, in turn."""
    cells = [_FREE] * slices
    for number, start in enumerate(sorted(profile.starts)):
        cells[start : start + profile.size] = _LETTERS[number % len(_LETTERS)] * profile.size
    return "".join(cells)


def _aligned(rows: Sequence[Sequence[str]], right: set[int]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  "
        + "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
