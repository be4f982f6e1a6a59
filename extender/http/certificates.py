"""The certificates that calls are answered under, read again when their files change."""

import os
import ssl
import threading
from pathlib import Path

import structlog

_log = structlog.get_logger(__name__)


class Certificates:
    """Give what a TLS handshake needs: our certificate, and the authority that signed those of the callers, if any.

    Where there is one, whoever calls without a certificate of it is turned away in the handshake. The files are looked
    at for each handshake, as kubelets and cert-manager replace them without telling anybody; what cannot be read leaves
    the last ones in use. Raises OSError or ssl.SSLError where the first ones cannot be read.
    """

    def __init__(self, certificate: Path, key: Path, clients: Path | None = None) -> None:
        self._files = certificate, key, *([clients] if clients is not None else [])
        self._lock = threading.Lock()
        self._seen = self._stamps()
        self._context = self._read()

    def context(self) -> ssl.SSLContext:
        """Give the context for the next handshake."""
        with self._lock:
            try:
                stamps = self._stamps()
                if stamps != self._seen:
                    self._context = self._read()
                    self._seen = stamps
                    _log.info("certificates read again")
            except (OSError, ssl.SSLError) as error:
                _log.warning("the new certificates cannot be read, the last ones stay", why=str(error))
            return self._context

    def _stamps(self) -> list[tuple[int, int]]:
        # through links, by which a Secret's volume is replaced as a whole
        return [(found.st_mtime_ns, found.st_ino) for found in map(os.stat, self._files)]

    def _read(self) -> ssl.SSLContext:
        certificate, key, *clients = self._files
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(certificate, key)
        for authority in clients:
            context.load_verify_locations(authority)
            context.verify_mode = ssl.CERT_REQUIRED
        return context
