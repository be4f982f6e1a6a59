from collections.abc import Iterator
from pathlib import Path

import pytest

from cotenant.cluster import Cluster, connect
from cotenant.standins.api_server import ApiServer


@pytest.fixture
def api() -> Iterator[ApiServer]:
    with ApiServer() as server:
        yield server


@pytest.fixture
def cluster(api: ApiServer, tmp_path: Path) -> Iterator[Cluster]:
    with connect(api.kubeconfig(tmp_path / "kubeconfig")) as connected:
        yield connected
