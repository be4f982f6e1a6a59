from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cotenant.contract.units import GIB
from cotenant.standins.api_rules import EVENTS, NODES
from cotenant.standins.api_server import ApiServer
from tests.builders import a_node
from tests.extender.running import Running, add, eventually


@pytest.fixture(scope="module")
def server() -> Iterator[ApiServer]:
    with ApiServer() as server:
        yield server


@pytest.fixture(scope="module")
def shared(server: ApiServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with Running(server, tmp_path_factory.mktemp("shared")) as running:
        yield running


@pytest.fixture
def api(server: ApiServer) -> Iterator[ApiServer]:
    """An API server with the nodes n1 and n2 of two GPUs of 10 GiB each, and nothing else."""
    add(server, a_node("n1").with_gpus(2, "10GiB"), a_node("n2").with_gpus(2, "10GiB"))
    server.writes.clear()
    yield server
    server.faults.clear()
    server.freeze_watches(frozen=False)
    for pod in server.pods():
        server.delete_pod(pod["metadata"]["name"], namespace=pod["metadata"]["namespace"], grace=0)
    for node in server.nodes():
        server.store.delete(NODES, ("", node["metadata"]["name"]))
    for event in server.events():
        server.store.delete(EVENTS, (event["metadata"]["namespace"], event["metadata"]["name"]))


@pytest.fixture
def start(api: ApiServer, tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Start extenders, and find the last of them unharmed in the end."""
    started: list[Running] = []

    def begin(**configuration: Any) -> Running:
        running = Running(api, tmp_path, **configuration).__enter__()
        started.append(running)
        return running

    yield begin
    try:
        recovered(api, started[-1])
    finally:
        for running in started:
            running.__exit__()


@pytest.fixture
def extender(api: ApiServer, shared: Running) -> Iterator[Running]:
    """An extender that many tests have been at, each of which found it unharmed."""
    ledger = shared.ledger
    # They look as those of the test before, and may still be those: what the watch tells after them settles it.
    add(api, a_node("last"))
    assert eventually(lambda: ledger.view("last") is not None)
    api.store.delete(NODES, ("", "last"))
    assert eventually(
        lambda: (
            [] == ledger.holds()
            and {"n1", "n2"} == {view.name for view in ledger.views()}
            and [("n1", 10 * GIB)] * 2 + [("n2", 10 * GIB)] * 2
            == sorted((view.name, state.free_bytes) for view in ledger.views() for state in view.gpus)
        )
    )
    api.writes.clear()
    yield shared
    recovered(api, shared)


def recovered(api: ApiServer, extender: Running) -> None:
    """Once nothing goes wrong any more, find that nothing did."""
    api.freeze_watches(frozen=False)
    api.faults.clear()
    extender.check_unharmed()
