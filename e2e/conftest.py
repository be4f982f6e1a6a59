"""Fixtures of the end-to-end tests: one control plane and one real node, skipped where a program is missing."""

import signal
from collections.abc import Iterator

import pytest

from e2e.cluster import ControlPlane
from e2e.node import RealNode, why_not
from e2e.processes import MissingProgramError


def pytest_configure() -> None:
    """Take SIGTERM for a Ctrl-C, so that a run that is told to end stops what it started."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.fixture(scope="session")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A running etcd and kube-apiserver."""
    try:
        with ControlPlane(tmp_path_factory.mktemp("control-plane")) as cluster:
            yield cluster
    except MissingProgramError as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def real_node(control_plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealNode]:
    """This machine as a node of the control plane."""
    if reason := why_not():
        pytest.skip(reason)
    with RealNode(control_plane, tmp_path_factory.mktemp("node")) as node:
        yield node
