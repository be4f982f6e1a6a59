"""Upgrade and rollback: an earlier release's programs beside the present ones, on real components.

One release after the other runs the extender and the device plugin, in every pairing that a rollout or a rollback goes
through. Each pairing places pods among those that the others placed, and one of these ends. In the end exactly as much
is free as nobody holds.
"""

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from cotenant import __version__
from cotenant.contract.units import GIB
from e2e import policies, releases
from e2e.agreement import disagreements, phase
from e2e.cluster import ControlPlane
from e2e.faults.invariants import Picture, broken, leaks
from e2e.node import RealNode
from e2e.processes import wait_until
from e2e.programs import Ground, RunningExtender, RunningPlugin, RunningProgram
from e2e.releases import MissingRevisionError, Release
from e2e.rest import Api
from e2e.test_main_job import asking, submit, wait_settled

GPUS = "gpus: [{model: NVIDIA H100 80GB HBM3, memory: 24GiB, count: 4}]"
CAPACITY = 96


class Pairing(NamedTuple):
    """Say of which release the extender and the device plugin are; None is the present one."""

    extender: Path | None
    plugin: Path | None


@pytest.fixture
def api(control_plane: ControlPlane) -> Iterator[Api]:
    """A client as admin of a cluster with our admission policies."""
    client = control_plane.api()
    with policies.installed(client):
        yield client


@pytest.mark.parametrize("release", releases.listed(), ids=lambda release: release.version)
def test_each_release_keeps_what_the_other_gave_and_nothing_is_given_twice(
    control_plane: ControlPlane, real_node: RealNode, api: Api, tmp_path: Path, release: Release
) -> None:
    try:
        old = releases.unpack(release, tmp_path)
    except MissingRevisionError as missing:
        pytest.skip(str(missing))
    plugin = RunningPlugin(real_node, tmp_path / "plugin", gpus=GPUS)
    extender = RunningExtender(control_plane, tmp_path / "extender")
    extender.source = plugin.source = old
    ground = Ground(api, real_node, extender, plugin)
    with extender, plugin, control_plane.scheduling(extender.scheduler_config()):
        there: list[str] = []
        # as it was; plugins first; upgraded; a plugin rolled back first; rolled back; extender first; upgraded again
        for n, pairing in enumerate(
            Pairing(*both) for both in [(old, old), (old, None), (None, None), (None, old), (old, old), (None, old)]
        ):
            change(extender, pairing.extender)
            change(plugin, pairing.plugin)
            assert (release.version if pairing.extender else __version__) == version_of(extender)
            # 3 + 3 + (2 + 2) + 2 on each of two GPUs: 14 units
            pods = [asking(f"p{n}-{k}", 3) for k in range(2)]
            pods += [asking(f"p{n}-2", 2, 2), asking(f"p{n}-3", 4, annotations={"cotenant.io/gpu-count": "2"})]
            submit(ground, pods)
            there += [one["metadata"]["name"] for one in pods]
            seen = wait_settled(ground, there, timeout_s=90)
            assert ["Running"] * len(there) == [phase(one) for one in seen]
            compared, wrong = disagreements(ground.node, seen)
            # one container each, but for one pod of each pairing that has two
            assert ([], len(there) + n + 1) == (wrong, compared)
            assert [] == broken(Picture.of(api))
            assert wait_until(lambda: [] == told_wrongly(ground), timeout_s=30), told_wrongly(ground)
            # a pod of the pairing before ends, and its 3 units are free again
            if n:
                there.remove(f"p{n - 1}-0")
                api.delete("Pod", f"p{n - 1}-0")
                api.gone(f"p{n - 1}-0")
        fill(ground, there)


def change(program: RunningProgram, source: Path | None) -> None:
    """Go on with another release's program, as a rollout does."""
    if program.source != source:
        program.stop()
        program.source = source
        program.start()


def version_of(extender: RunningExtender) -> str:
    with urllib.request.urlopen(f"http://{extender.serve}/version", timeout=10) as answer:
        return str(json.load(answer)["version"])


def told_wrongly(ground: Ground) -> list[str]:
    """Say where the extender counts otherwise than the API server's pods and nodes do."""
    with urllib.request.urlopen(f"http://{ground.extender.serve}/metrics", timeout=10) as answer:
        return leaks(Picture.of(ground.api), answer.read().decode())


def fill(ground: Ground, there: list[str]) -> None:
    """Find exactly so many units free as nobody holds: that many pods of one run, and one more waits."""
    held = sum(Picture.of(ground.api).held().values()) // GIB
    ones = [asking(f"one-{k}", 1) for k in range(CAPACITY - held)]
    submit(ground, ones)
    names = [one["metadata"]["name"] for one in ones]
    assert ["Running"] * len(ones) == [phase(one) for one in wait_settled(ground, names, timeout_s=90)]
    assert {0} == set(Picture.of(ground.api).free().values())
    ground.api.create(asking("too-many", 1))
    ground.api.unschedulable("too-many")
    assert [] == broken(Picture.of(ground.api))
    for name in [*there, *names, "too-many"]:
        ground.api.delete("Pod", name)
    for name in [*there, *names]:
        ground.api.gone(name)
