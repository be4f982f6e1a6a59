"""Run our Dockerfile without a container engine: a stage is a folder, RUN is a chroot, the base image is debootstrap's.

`python -m e2e.dockerfile OUT.tar [amd64|arm64]` writes what `docker save` would of the last stage, in one layer. It
knows the instructions that our Dockerfile has, and stops at any other. Needs root and debootstrap; for an architecture
that is not this machine's also Debian's qemu-user-static, by which the kernel then runs its programs.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from e2e import image
from e2e.processes import bin_directory, find_program

ROOT = Path(__file__).resolve().parent.parent
# What lets a build reach the registries that this machine reaches, as --build-arg and --secret would: variables, and
# files that are lent under /run/lent for as long as a RUN takes, so that none of them stays in the image.
_LENT = "/run/lent"
_BINFMT = Path("/proc/sys/fs/binfmt_misc")
_VARIABLES = ("PIP_", "UV_", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")
_FILES = {
    "/etc/ssl/certs/ca-certificates.crt": ("SSL_CERT_FILE", "PIP_CERT", "REQUESTS_CA_BUNDLE"),
    "/etc/pip.conf": ("PIP_CONFIG_FILE",),
    "/etc/uv/uv.toml": ("UV_CONFIG_FILE",),
}


class InstructionError(ValueError):
    """Say which line of the Dockerfile is not understood."""


@dataclass(frozen=True)
class Stage:
    """A root file system, and the configuration of an image made from it."""

    root: Path
    environment: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    user: str = "0:0"
    command: tuple[str, ...] = ()

    def config(self) -> dict[str, Any]:
        """Give the image's configuration as `docker inspect` shows it."""
        environment = [f"{name}={value}" for name, value in self.environment.items()]
        return {"Env": environment, "WorkingDir": self.workdir, "User": self.user, "Cmd": list(self.command)}


class Build:
    """Run a Dockerfile's stages below a folder, on a copy of `base` wherever one starts FROM an image."""

    def __init__(self, context: Path, base: Path, folder: Path) -> None:
        self._context, self._base, self._folder = context, base, folder
        self._stages: dict[str, Stage] = {}

    @classmethod
    def of(cls, context: Path, folder: Path, architecture: str | None = None) -> Self:
        """Prepare a build of `context` on Debian as debootstrap makes it."""
        return cls(context, debian(architecture or image.native()), folder)

    def run(self) -> Stage:
        """Run all stages, and return the last."""
        stage: Stage | None = None
        for word, rest in instructions(self._context / "Dockerfile"):
            stage = self._from(rest) if word == "FROM" else self._step(stage, word, rest)
            if word == "FROM" and (named := re.search(r" AS (\S+)$", rest)):
                self._stages[named[1]] = stage
            for name, known in self._stages.items():
                if known.root == stage.root:
                    self._stages[name] = stage
        if stage is None:
            raise InstructionError("the Dockerfile has no FROM")
        return stage

    def _from(self, rest: str) -> Stage:
        name = rest.split(maxsplit=1)[0]
        before = self._stages.get(name, Stage(self._base))
        root = self._folder / f"stage-{len(list(self._folder.iterdir()))}"
        subprocess.run(["cp", "-a", "--reflink=auto", str(before.root), str(root)], check=True)
        return replace(before, root=root)

    def _step(self, stage: Stage | None, word: str, rest: str) -> Stage:
        if stage is None:
            raise InstructionError(f"{word} stands before FROM")
        if word == "RUN":
            self._run(stage, rest)
        elif word == "COPY":
            self._copy(stage, rest)
        elif word == "ENV":
            pairs = dict(pair.split("=", 1) for pair in rest.split())
            return replace(stage, environment=stage.environment | pairs)
        elif word == "WORKDIR":
            (stage.root / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
            return replace(stage, workdir=rest)
        elif word == "USER":
            return replace(stage, user=rest)
        elif word == "CMD":
            return replace(stage, command=tuple(json.loads(rest)))
        else:
            raise InstructionError(f"{word} {rest}: not known to e2e/dockerfile.py; teach it")
        return stage

    def _run(self, stage: Stage, command: str) -> None:
        root = shlex.quote(str(stage.root))
        variables = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "DEBIAN_FRONTEND": "noninteractive"}
        variables |= {name: value for name, value in os.environ.items() if name.startswith(_VARIABLES)}
        script = [
            "set -e",
            "mount --make-rprivate /",
            f"mount -t proc proc {root}/proc",
            f"mount -t tmpfs tmpfs {root}/run && mkdir {root}{_LENT}",
            f"[ -e {root}/etc/resolv.conf ] || : >{root}/etc/resolv.conf",
            f"mount --bind /etc/resolv.conf {root}/etc/resolv.conf",
        ]
        for path, names in _FILES.items():
            if Path(path).is_file():
                inside = f"{_LENT}/{Path(path).name}"
                script.append(f"cp {path} {root}{inside}")
                variables |= dict.fromkeys(names, inside)
        script.append(f'exec chroot {root} /bin/sh -c "cd {stage.workdir} && $COMMAND"')
        # in mount and pid namespaces of its own: what it lends and whatever it starts end with it
        subprocess.run(
            ["unshare", "--mount", "--pid", "--fork", "/bin/sh", "-c", "\n".join(script)],
            check=True,
            env={**variables, **stage.environment, "COMMAND": command},
        )

    def _copy(self, stage: Stage, rest: str) -> None:
        *sources, target = [word for word in rest.split() if not word.startswith("--")]
        origin = re.match(r"--from=(\S+) ", rest)
        root = self._stages[origin[1]].root if origin else self._context
        where = Path(target) if target.startswith("/") else Path(stage.workdir) / target
        goal = stage.root / str(where).lstrip("/")
        for source in sources:
            path = root / source.lstrip("/")
            into = goal / path.name if target.endswith("/") else goal
            into.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                shutil.copytree(
                    path, into, symlinks=True, ignore=None if origin else shutil.ignore_patterns("__pycache__")
                )
            else:
                shutil.copy2(path, into)


def instructions(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the instructions of a Dockerfile, continued lines joined, comments left out."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        if line.strip():
            word, _, rest = line.partition(" ")
            yield word, rest.strip()


def debian(architecture: str) -> Path:
    """Return a Debian root like that of debian:bookworm-slim, made once beside the binaries."""
    foreign = architecture != image.native()
    if foreign:
        emulated(architecture)
    root = bin_directory().parent / f"debian-bookworm{f'-{architecture}' if foreign else ''}"
    if not (root / "etc/debian_version").exists():
        root.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=root.parent, prefix="debian-"))
        command = [str(find_program("debootstrap")), f"--arch={architecture}", "--variant=minbase"]
        subprocess.run([*command, "bookworm", str(made)], check=True, stdout=subprocess.DEVNULL)
        for part in (
            "var/cache/apt/archives",
            "usr/share/doc",
            "usr/share/man",
            "usr/share/locale",
            "var/lib/apt/lists",
        ):
            shutil.rmtree(made / part, ignore_errors=True)
            (made / part).mkdir(parents=True)
        made.chmod(0o755)
        made.rename(root)
    return root


def emulated(architecture: str) -> None:
    """Have the kernel run programs of an architecture by QEMU from now on, in chroots as well (binfmt_misc).

    Raises MissingProgramError where qemu-user-static is not installed.
    """
    name = f"qemu-{ {'amd64': 'x86_64', 'arm64': 'aarch64'}[architecture] }"
    find_program(f"{name}-static")
    if not (_BINFMT / "register").exists():
        subprocess.run(["mount", "-t", "binfmt_misc", "binfmt_misc", str(_BINFMT)], check=True)
    if not (_BINFMT / name).exists():
        (_BINFMT / "register").write_text(Path(f"/usr/lib/binfmt.d/{name}.conf").read_text())


@contextmanager
def built(directory: Path, architecture: str | None) -> Iterator[Stage]:
    """Build the image of this repository below *directory*; gives the last stage, whose root is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="cotenant-image-", dir=directory) as folder:
        yield Build.of(ROOT, Path(folder), architecture).run()


def write(stage: Stage, archive: Path, architecture: str | None) -> None:
    """Write a stage as a docker archive, under the name that the manifests have."""
    layer = archive.with_suffix(".layer")
    subprocess.run(["tar", "--create", "--file", str(layer), "--directory", str(stage.root), "."], check=True)
    tags = [f"docker.io/library/cotenant:{version()}"]
    image.archive(archive, layer, config=stage.config(), tags=tags, architecture=architecture)
    layer.unlink()


def build(archive: Path, architecture: str | None = None) -> None:
    """Build the image of this repository into a docker archive."""
    with built(archive.parent, architecture) as stage:
        write(stage, archive, architecture)


def version() -> str:
    """Return the version that the manifests name."""
    found = re.search(r'__version__ = "(.+)"', (ROOT / "cotenant/__init__.py").read_text())
    if found is None:
        raise InstructionError("cotenant/__init__.py names no version")
    return found[1]


if __name__ == "__main__":
    build(Path(sys.argv[1]), *sys.argv[2:])
