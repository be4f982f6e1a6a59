"""The image, for both architectures: built by our Dockerfile, made of the right code, and both programs run in it."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from cotenant import __version__
from e2e import dockerfile, image
from e2e.elf import architectures
from e2e.node import why_not
from e2e.processes import MissingProgramError

ROOT = Path(__file__).resolve().parent.parent
OTHER = {"amd64": "arm64", "arm64": "amd64"}[image.native()]
MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}


@pytest.mark.parametrize("architecture", [image.native(), OTHER])
def test_an_image_runs_both_programs_and_neither_as_root_by_default(tmp_path: Path, architecture: str) -> None:
    if why_not() or shutil.which("debootstrap") is None:
        pytest.skip("building the image needs root and debootstrap")
    if architecture == OTHER and not os.environ.get("COTENANT_IMAGES"):
        pytest.skip(f"the image for {OTHER} takes minutes by emulation: make images")
    try:
        with dockerfile.built(tmp_path, architecture) as stage:
            assert ("65532:65532", ("cotenant", "--help")) == (stage.user, stage.command)
            found = architectures(stage.root)
            assert {architecture} == found.keys()
            ours = [path for path in found[architecture] if "site-packages" in path.parts]
            for program in ("cotenant-extender", "cotenant-device-plugin"):
                assert f"{program} {__version__}" == run(stage.root, program)
            dockerfile.write(stage, tmp_path / "image.tar", architecture)
            size = (tmp_path / "image.tar").stat().st_size >> 20
    except MissingProgramError as missing:
        pytest.skip(str(missing))
    print(f"\n{architecture}: {size} MiB, {len(found[architecture])} ELF files, {len(ours)} of them in Python packages")


def run(root: Path, program: str) -> str:
    """Ask a program of an image for its version."""
    command = ["chroot", "--userspec=65532:65532", str(root), f"/opt/cotenant/bin/{program}", "--version"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_wheels_for_the_other_architecture_have_code_for_it_alone(tmp_path: Path) -> None:
    uv = ROOT / ".uv" / "bin" / "uv"
    if not uv.exists():
        pytest.skip("uv is missing: make environment")
    locked, packages = tmp_path / "requirements.txt", tmp_path / "packages"
    export = ["export", "--quiet", "--frozen", "--no-default-groups", "--no-emit-project", "--output-file", locked]
    install = ["pip", "install", "--quiet", "--target", packages, "--python-version", "3.11", "--only-binary", ":all:"]
    install += ["--python-platform", f"{MACHINES[OTHER]}-unknown-linux-gnu", "--requirement", locked]
    for words in (export, install):
        subprocess.run([str(word) for word in (uv, *words)], check=True, cwd=ROOT)
    found = architectures(packages)
    assert {OTHER} == found.keys()
    names = {path.relative_to(packages).parts[0] for path in found[OTHER]}
    assert {"grpc", "msgspec", "numpy"} <= names
    print(f"\n{OTHER}: {len(found[OTHER])} shared objects, in {', '.join(sorted(names))}")
