"""The verbs by TLS, called by a real kube-scheduler that shows a certificate of its own."""

import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from cotenant.contract.units import GIB
from e2e import nodes, policies
from e2e.cluster import ControlPlane
from e2e.faults.load import pod
from e2e.processes import MissingProgramError
from e2e.programs import RunningExtender
from tests.extender.certificates import Authority, why_not


@dataclass
class Ground:
    """A control plane, and an extender that answers callers of one authority alone."""

    cluster: ControlPlane
    extender: RunningExtender
    authority: Authority
    stranger: Authority

    @contextmanager
    def scheduler(self, client: tuple[Path, Path] | None) -> Iterator[None]:
        """Run a kube-scheduler that shows this certificate."""
        config: dict[str, Any] = self.extender.scheduler_config()
        tls = {"caFile": str(self.authority.certificate)}
        if client is not None:
            tls |= {"certFile": str(client[0]), "keyFile": str(client[1])}
        config["extenders"][0] |= {
            "urlPrefix": f"https://{self.extender.listen}",
            "enableHTTPS": True,
            "tlsConfig": tls,
        }
        with self.cluster.scheduling(config):
            yield

    def bound(self, name: str) -> None:
        """Create a pod and wait until it is placed."""
        api = self.cluster.api()
        api.create(pod(name, 1))
        api.bound(name)

    def refused(self, name: str) -> None:
        """Create a pod and wait until its attempt has failed for the extender's sake."""
        api = self.cluster.api()
        api.create(pod(name, 1))
        api.wait(
            "Pod",
            name,
            lambda seen: any(
                one["reason"] == "SchedulerError" for one in (seen or {}).get("status", {}).get("conditions", [])
            ),
            saying="that the extender does not answer",
            timeout_s=60,
        )
        assert "nodeName" not in (api.get("Pod", name)["spec"])
        api.delete("Pod", name, grace_s=0)

    def shown(self) -> str:
        """Give the certificate that the extender shows to a new caller."""
        context = ssl.create_default_context(cafile=str(self.authority.certificate))
        context.load_cert_chain(*self.authority.sign("somebody"))
        host, _, port = self.extender.listen.rpartition(":")
        with (
            socket.create_connection((host, int(port)), 10) as plain,
            context.wrap_socket(plain, server_hostname=host) as secured,
        ):
            return ssl.DER_cert_to_PEM_cert(secured.getpeercert(binary_form=True) or b"")


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    tmp_path = tmp_path_factory.mktemp("verbs-tls")
    if reason := why_not():
        pytest.skip(reason)
    authority, stranger = Authority(tmp_path / "ours"), Authority(tmp_path / "theirs")
    certificate, key = authority.sign("server")
    tls = {"certFile": str(certificate), "keyFile": str(key), "clientCAFile": str(authority.certificate)}
    config = tmp_path / "extender.yaml"
    config.write_text(yaml.safe_dump({"verbsTLS": tls}))
    try:
        with ControlPlane(tmp_path / "control-plane") as cluster, policies.installed(cluster.api()):
            nodes.register(cluster.api(), 2, nodes.Shape(gpus=2, gpu_bytes=10 * GIB), prefix="lab")
            with RunningExtender(cluster, tmp_path / "extender", flags=[f"--config={config}"]) as extender:
                yield Ground(cluster, extender, authority, stranger)
    except MissingProgramError as missing:
        pytest.skip(str(missing))


@pytest.mark.parametrize("caller", ["none", "of another authority"])
def test_a_scheduler_without_one_of_the_authority_places_nothing(ground: Ground, caller: str) -> None:
    with ground.scheduler(ground.stranger.sign("scheduler") if caller != "none" else None):
        ground.refused(f"waits-{len(caller)}")


def test_a_scheduler_with_a_certificate_binds_also_while_the_extenders_is_replaced(ground: Ground) -> None:
    with ground.scheduler(ground.authority.sign("scheduler")):
        ground.bound("first")
        first = ground.shown()
        ground.authority.sign("server")  # over the files of the first
        second = ground.shown()
        assert first != second

        # binds beside each other open connections of their own, by the new certificate
        for n in range(5):
            ground.bound(f"after-{n}")

        (ground.authority.folder / "server.crt").write_text("-----BEGIN CERT")
        assert second == ground.shown()
        ground.bound("with-the-last-good-one")
