"""For which architecture the programs and shared objects below a folder are made."""

from collections import defaultdict
from pathlib import Path

_MAGIC = b"\x7fELF"
# elf(5): e_machine stands at byte 18.
_MACHINE = slice(18, 20)
_ARCHITECTURES = {62: "amd64", 183: "arm64"}


def architectures(root: Path) -> dict[str, list[Path]]:
    """List every ELF file below *root*, by the architecture it is for, as images name it; links are not followed."""
    found: defaultdict[str, list[Path]] = defaultdict(list)
    for path in root.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                head = file.read(_MACHINE.stop)
            if head.startswith(_MAGIC):
                machine = int.from_bytes(head[_MACHINE], "little")
                found[_ARCHITECTURES.get(machine, f"machine {machine}")].append(path)
    return dict(found)
