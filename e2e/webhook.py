"""The extender's admission behind HTTPS, as a kube-apiserver calls it, and its configuration turned to that server."""

import base64
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Self

from e2e.processes import find_program
from e2e.rest import Object
from extender.admission import Settings, mutating_review, validating_review
from extender.http import app as routes
from extender.http.call_server import CallServer
from extender.http.certificates import Certificates
from extender.http.wsgi import Application
from extender.ledger import Ledger
from extender.metrics.registry import Metrics


class WebhookServer:
    """The extender's server, with everything but its verbs, on loopback.

    `calls` lists the admission webhooks that were asked, in order.
    """

    def __init__(self, directory: Path, settings: Settings) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._certificate, key = _make_certificate(directory)
        self.calls: list[str] = []
        ledger = Ledger(settings.names, settings.unit_bytes)
        app = routes.new_app()
        routes.everything_else(
            app,
            synced=lambda: True,
            ended=list,
            metrics=Metrics(ledger, synced=lambda: True, unsettled=lambda: 0),
            review={
                "mutate": self._counted("mutate", lambda body: mutating_review(body, settings)),
                "validate": self._counted("validate", lambda body: validating_review(body, settings)),
            },
        )
        self._server = CallServer("127.0.0.1:0", Application(app), certificates=Certificates(self._certificate, key))

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop()

    def _counted(self, name: str, review: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
        def counting(body: bytes) -> bytes:
            self.calls.append(name)
            return review(body)

        return counting

    def turned_here(self, configuration: Object) -> Object:
        """Return a webhook configuration that calls this server where it called the extender's Service."""
        bundle = base64.b64encode(self._certificate.read_bytes()).decode()
        webhooks = []
        for webhook in configuration["webhooks"]:
            url = f"https://{self._server.address}{webhook['clientConfig']['service']['path']}"
            webhooks.append(webhook | {"clientConfig": {"url": url, "caBundle": bundle}})
        return configuration | {"webhooks": webhooks}


def _make_certificate(directory: Path) -> tuple[Path, Path]:
    certificate, key = directory / "webhook.crt", directory / "webhook.key"
    subprocess.run(
        [
            *(find_program("openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", key, "-out", certificate),
        ],
        check=True,
        capture_output=True,
    )
    return certificate, key
