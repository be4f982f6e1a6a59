"""The verbs by TLS: who shows no certificate of the right authority gets no answer; new files need no restart."""

import http.client
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cotenant.standins.api_server import ApiServer
from tests.builders import Json, a_pod
from tests.extender.certificates import Authority, why_not
from tests.extender.running import PATIENCE, Running, filter_args, submit


class Ground:
    """An extender whose verbs are behind TLS, and the authorities around it."""

    def __init__(self, folder: Path, start: Callable[..., Running]) -> None:
        self.authority, self.stranger = Authority(folder / "ours"), Authority(folder / "theirs")
        self.server = self.authority.sign("server")
        self.scheduler = self.authority.sign("scheduler")
        files = dict(zip(("certFile", "keyFile"), map(str, self.server), strict=True))
        self.extender = start(verbsTLS=files | {"clientCAFile": str(self.authority.certificate)})

    def filter(self, pod: Json, client: tuple[Path, Path] | None) -> list[str]:
        """Ask as a caller with that certificate; raises OSError where it is turned away."""
        context = ssl.create_default_context(cafile=str(self.authority.certificate))
        if client is not None:
            context.load_cert_chain(*client)
        host, _, port = self.extender.address.rpartition(":")
        connection = http.client.HTTPSConnection(host, int(port), context=context, timeout=PATIENCE)
        try:
            connection.request("POST", "/filter", msgspec.json.encode(filter_args(pod, "n1")))
            found: Any = msgspec.json.decode(connection.getresponse().read())
        except http.client.RemoteDisconnected as error:
            raise ConnectionError from error
        finally:
            connection.close()
        nodes: list[str] = found["NodeNames"]
        return nodes

    def shown(self) -> str:
        """Give the certificate that the extender shows."""
        host, _, port = self.extender.address.rpartition(":")
        context = ssl.create_default_context(cafile=str(self.authority.certificate))
        context.load_cert_chain(*self.scheduler)
        connection = http.client.HTTPSConnection(host, int(port), context=context, timeout=PATIENCE)
        connection.connect()
        found = ssl.DER_cert_to_PEM_cert(connection.sock.getpeercert(binary_form=True) or b"")
        connection.close()
        return found


@pytest.fixture
def ground(tmp_path: Path, unchecked: Callable[..., Running]) -> Ground:
    if reason := why_not():
        pytest.skip(reason)
    return Ground(tmp_path / "certificates", unchecked)


@pytest.fixture
def unchecked(api: ApiServer, tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Start extenders that the plain calls of other tests cannot reach."""
    started: list[Running] = []

    def begin(**configuration: Any) -> Running:
        started.append(Running(api, tmp_path, **configuration).__enter__())
        return started[-1]

    yield begin
    for running in started:
        running.__exit__()


def test_the_scheduler_is_answered_and_nobody_else(api: ApiServer, ground: Ground) -> None:
    pod = submit(api, a_pod().asking(8))

    assert ["n1"] == ground.filter(pod, ground.scheduler)
    with pytest.raises(OSError):  # noqa: PT011 - which one is up to when the client learns of it
        ground.filter(pod, None)
    with pytest.raises(OSError):  # noqa: PT011
        ground.filter(pod, ground.stranger.sign("scheduler"))
    with pytest.raises((OSError, http.client.HTTPException)):
        ground.extender.filter(pod, "n1")  # without TLS
    assert ["n1"] == ground.filter(pod, ground.scheduler)


def test_new_certificates_are_shown_without_a_restart_and_broken_ones_are_not(api: ApiServer, ground: Ground) -> None:
    pod = submit(api, a_pod().asking(8))
    before = ground.shown()

    ground.authority.sign("server")
    after = ground.shown()
    assert before != after
    ground.server[0].write_text("half a certifi")

    assert after == ground.shown()
    assert ["n1"] == ground.filter(pod, ground.scheduler)


def test_another_authority_turns_the_old_callers_away(api: ApiServer, ground: Ground) -> None:
    pod = submit(api, a_pod().asking(8))
    newcomer = ground.stranger.sign("newcomer")

    ground.authority.certificate.with_suffix(".old").write_bytes(ground.authority.certificate.read_bytes())
    trusted = ground.authority.certificate
    ours = trusted.read_bytes()
    trusted.write_bytes(ground.stranger.certificate.read_bytes())
    old_scheduler = ground.scheduler

    # they go on trusting us
    trusted_by_callers = trusted.with_name("callers.crt")
    trusted_by_callers.write_bytes(ours)
    ground.authority.certificate = trusted_by_callers
    assert ["n1"] == ground.filter(pod, newcomer)
    with pytest.raises(OSError):  # noqa: PT011
        ground.filter(pod, old_scheduler)


def test_everything_else_asks_callers_for_none_and_shows_a_new_one_without_a_restart(
    tmp_path: Path, unchecked: Callable[..., Running]
) -> None:
    if reason := why_not():
        pytest.skip(reason)
    authority = Authority(tmp_path / "ours")
    certificate, key = authority.sign("server")
    extender = unchecked(tls={"certFile": str(certificate), "keyFile": str(key)})
    host, _, port = extender.other_address.rpartition(":")

    def ask(method: str, path: str) -> tuple[int, str]:
        context = ssl.create_default_context(cafile=str(authority.certificate))
        connection = http.client.HTTPSConnection(host, int(port), context=context, timeout=PATIENCE)
        connection.request(method, path, b"{}" if method == "POST" else None)
        shown = ssl.DER_cert_to_PEM_cert(connection.sock.getpeercert(binary_form=True) or b"")
        status = connection.getresponse().status
        connection.close()
        return status, shown

    status, before = ask("POST", "/admission/validate")
    assert 200 == status
    authority.sign("server")
    status, after = ask("GET", "/readyz")
    assert 200 == status
    assert before != after


def test_where_a_certificate_cannot_be_read_it_does_not_start(api: ApiServer, tmp_path: Path) -> None:
    missing = {"certFile": "/nowhere", "keyFile": "/nowhere", "clientCAFile": "/nowhere"}
    with pytest.raises(FileNotFoundError):
        Running(api, tmp_path, verbsTLS=missing)
