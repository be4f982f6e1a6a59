"""Images of the end-to-end ground, as docker archives made here, so that no registry is needed."""

import hashlib
import io
import json
import platform
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

BUSYBOX = "localhost/busybox:1"
PAUSE = "localhost/pause:1"

_APPLETS = ("sh", "sleep", "env", "cat", "echo", "ls", "true", "false")


def write_archive(path: Path, *, busybox: Path) -> None:
    """Write a docker archive that holds a statically linked busybox under both names."""
    layer = path.with_suffix(".layer")
    layer.write_bytes(
        _tar({"bin/busybox": busybox.read_bytes()}, links={f"bin/{name}": "busybox" for name in _APPLETS})
    )
    archive(path, layer, config={"Cmd": ["/bin/sleep", "1000000"], "Env": ["PATH=/bin"]}, tags=[PAUSE, BUSYBOX])
    layer.unlink()


def write_program(path: Path, *, program: Path, tag: str) -> None:
    """Write a docker archive that holds one statically linked program in /usr/local/bin."""
    layer = path.with_suffix(".layer")
    layer.write_bytes(_tar({f"usr/local/bin/{program.name}": program.read_bytes()}))
    archive(path, layer, config={"Cmd": [program.name], "Env": ["PATH=/usr/local/bin"]}, tags=[tag])
    layer.unlink()


def native() -> str:
    """Name this machine's architecture as images do."""
    return {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()]


def archive(
    path: Path, layer: Path, *, config: Mapping[str, Any], tags: Sequence[str], architecture: str | None = None
) -> None:
    """Write a docker archive of one layer, a tar file; for this machine's architecture where none is given.

    The format is what `docker save` writes: manifest.json names the image's configuration and its layers.
    """
    with layer.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    whole = json.dumps(
        {
            "architecture": architecture or native(),
            "os": "linux",
            "config": config,
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
        }
    ).encode()
    config_name = f"{hashlib.sha256(whole).hexdigest()}.json"
    manifest = [{"Config": config_name, "RepoTags": list(tags), "Layers": [f"{digest}.tar"]}]
    with tarfile.open(path, mode="w") as tar:
        tar.add(layer, f"{digest}.tar")
        for name, data in {config_name: whole, "manifest.json": json.dumps(manifest).encode()}.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), 0o644
            tar.addfile(entry, io.BytesIO(data))


def _tar(files: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), 0o755
            tar.addfile(entry, io.BytesIO(data))
        for name, target in (links or {}).items():
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.SYMTYPE, target
            tar.addfile(entry)
    return buffer.getvalue()
