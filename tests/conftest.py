"""How hard Hypothesis tries, by HYPOTHESIS_PROFILE: thorough tries longer than the default; logs; an API server."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from hypothesis import HealthCheck, settings

from cotenant.cluster import Cluster, connect
from cotenant.standins.api_server import ApiServer

# The machines that run this are shared: a deadline would fail on a neighbour's noise.
_CALM = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

settings.register_profile("modest", _CALM, max_examples=60, stateful_step_count=40)
settings.register_profile("thorough", _CALM, max_examples=2_000, stateful_step_count=100)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "modest"))

# On stderr, as both programs do: what a thread of a test logs is no part of what a command prints meanwhile.
structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.__stderr__))


@pytest.fixture
def api() -> Iterator[ApiServer]:
    with ApiServer() as server:
        yield server


@pytest.fixture
def cluster(api: ApiServer, tmp_path: Path) -> Iterator[Cluster]:
    with connect(api.kubeconfig(tmp_path / "kubeconfig")) as connected:
        yield connected
