"""The one image of the end-to-end ground: busybox, as a docker archive made here, so that no registry is needed."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

BUSYBOX = "localhost/busybox:1"
PAUSE = "localhost/pause:1"

_APPLETS = ("sh", "sleep", "env", "cat", "echo", "ls", "true", "false")


def write_archive(path: Path, *, busybox: Path) -> None:
    """Write a docker archive that holds a statically linked busybox under both names.

    The format is what `docker save` writes: manifest.json names the image's configuration and its one layer.
    """
    layer = _tar({"bin/busybox": busybox.read_bytes()}, links={f"bin/{name}": "busybox" for name in _APPLETS})
    digest = hashlib.sha256(layer).hexdigest()
    config = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Cmd": ["/bin/sleep", "1000000"], "Env": ["PATH=/bin"]},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
        }
    ).encode()
    config_name = f"{hashlib.sha256(config).hexdigest()}.json"
    manifest = [{"Config": config_name, "RepoTags": [PAUSE, BUSYBOX], "Layers": [f"{digest}.tar"]}]
    files = {config_name: config, f"{digest}.tar": layer, "manifest.json": json.dumps(manifest).encode()}
    path.write_bytes(_tar(files))


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
