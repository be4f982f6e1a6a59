"""Boards whose MIG profiles are known without asking one: for planning, for made-up GPUs, and for tests.

Never for a GPU that is there: NVML knows its profiles, and names and sizes change between drivers.
"""

from functools import cache
from importlib import resources
from typing import Annotated

import msgspec

from cotenant.contract.inventory import MIGProfile
from cotenant.contract.mig import Geometry
from cotenant.contract.units import MIB

_Count = Annotated[int, msgspec.Meta(ge=0)]
_Positive = Annotated[int, msgspec.Meta(ge=1)]


class UnknownBoardError(ValueError):
    """Say that no board has this name, and which there are."""


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """Refuse unknown keys."""


class BoardProfile(_File, frozen=True, kw_only=True):
    """Describe a profile of a board; None is what no capture shows."""

    name: str
    # NVML_GPU_INSTANCE_PROFILE_*, by which NVML is asked; not the id, by which instances are made
    nvml_profile: _Count
    profile_id: _Count = msgspec.field(name="id")
    compute_slices: _Positive
    size: _Positive
    starts: tuple[_Count, ...]
    max_instances: _Positive
    memory_mib: _Positive | None = msgspec.field(name="memoryMiB", default=None)
    multiprocessors: _Positive | None = None
    copy_engines: _Count | None = None
    decoders: _Count | None = None
    encoders: _Count | None = None
    jpeg_engines: _Count | None = None
    optical_flow: _Count | None = None

    @property
    def profile(self) -> MIGProfile:
        """Give the profile as the inventory has it; its bytes are 0 where they are not known."""
        return MIGProfile(
            name=self.name,
            profile_id=self.profile_id,
            bytes=(self.memory_mib or 0) * MIB,
            compute_slices=self.compute_slices,
            max_instances=self.max_instances,
            size=self.size,
            starts=self.starts,
        )


class Board(_File, frozen=True, kw_only=True):
    """Describe a board: its name as NVML gives it, other boards that are cut alike, and its profiles."""

    model: str
    also: tuple[str, ...] = ()
    memory_mib: _Positive = msgspec.field(name="memoryMiB")
    compute_capability: tuple[_Count, _Count]
    profiles: tuple[BoardProfile, ...]

    @property
    def geometry(self) -> Geometry:
        """Give what the board can be cut into."""
        return Geometry([profile.profile for profile in self.profiles])


class _Boards(_File, frozen=True, kw_only=True):
    about: str
    boards: dict[str, Board]


_decoder = msgspec.json.Decoder(_Boards)


@cache
def boards() -> dict[str, Board]:
    """Read the boards, by name."""
    text = resources.files(__package__).joinpath("boards.json").read_bytes()
    return _decoder.decode(text).boards


def board(name: str) -> Board:
    """Find the board of that name, or that NVML calls so; raise UnknownBoardError with a sentence."""
    found = boards().get(name) or board_of(name)
    if found is None:
        raise UnknownBoardError(f"no board is named {name!r}; there are {', '.join(boards())}")
    return found


def board_of(model: str) -> Board | None:
    """Find the board that NVML calls *model*, such as "NVIDIA A100-SXM4-40GB" (nvmlDeviceGetName)."""
    for known in boards().values():
        if model.removeprefix("NVIDIA ") in {name.removeprefix("NVIDIA ") for name in (known.model, *known.also)}:
            return known
    return None
