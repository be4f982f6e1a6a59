"""Put the extender together from its parts, and take it apart again."""

import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import structlog

from cotenant.cluster import Cluster
from cotenant.contract.configuration import ExtenderConfiguration, Layout, Placement
from extender.admission import review
from extender.admission.settings import Settings
from extender.cluster.binder import Binder
from extender.cluster.events import Events
from extender.cluster.evictor import Evictor
from extender.cluster.feed import Feed
from extender.cluster.nominator import Nominator
from extender.http import app as routes
from extender.http.api import inspection
from extender.http.pages import pages
from extender.http.server import Server
from extender.inspector import Inspector
from extender.ledger import Ledger
from extender.metrics import Metrics
from extender.verbs.bind import Bind
from extender.verbs.filter import Filter
from extender.verbs.judge import Judge
from extender.verbs.prioritize import Prioritize

_log = structlog.get_logger(__name__)


class Extender:
    """Be one running extender."""

    def __init__(self, configuration: ExtenderConfiguration, cluster: Cluster) -> None:
        names, unit_bytes = configuration.names, configuration.unit_bytes
        self._ledger = Ledger(names, unit_bytes)
        self._events = Events(cluster, instance=os.environ.get("POD_NAME") or socket.gethostname())
        self._evictor = Evictor(
            cluster,
            self._ledger,
            names,
            self._events.complain,
            grace=configuration.evict_overusers_after,
        )
        self._feed = Feed(cluster, self._ledger, self._events.complain, self._evictor)
        self._binder = Binder(cluster, self._ledger, bind_timeout=configuration.bind_timeout)
        judge = Judge(self._ledger, names, unit_bytes, configuration.policy)
        self._nominator = Nominator(cluster, self._ledger, judge) if configuration.nominate else None
        self._metrics = metrics = Metrics(self._ledger, self._feed.synced, self._binder.unsettled)

        verbs = routes.new_app()
        routes.verbs(
            verbs,
            filter_=Filter(
                self._ledger,
                judge,
                synced=self._feed.synced,
                decide=configuration.placement is Placement.DECIDE,
                nominator=self._nominator,
                rejected=metrics.rejected,
            ),
            prioritize=Prioritize(judge),
            bind=Bind(self._ledger, judge, self._binder, names, synced=self._feed.synced),
            metrics=metrics,
        )
        settings = Settings(
            names=names,
            unit_bytes=unit_bytes,
            scheduler=configuration.scheduler_name if configuration.layout is Layout.SECOND_SCHEDULER else None,
            extender_user=configuration.extender_user,
        )
        # one address for both is one server, as when everything stays on loopback
        together = configuration.serve == configuration.listen and not configuration.listen.endswith(":0")
        rest = verbs if together else routes.new_app()
        routes.everything_else(
            rest,
            synced=self._feed.synced,
            metrics=metrics,
            review={
                "mutate": lambda body: review.mutating_review(body, settings),
                "validate": lambda body: review.validating_review(body, settings),
            },
        )
        inspector = Inspector(self._ledger, judge)
        inspection(rest, inspector=inspector, synced=self._feed.synced)
        pages(rest, inspector=inspector, synced=self._feed.synced)
        tls = configuration.tls
        certificate = (Path(tls.cert_file), Path(tls.key_file)) if tls else None
        self._servers = [Server(configuration.listen, verbs, certificate=certificate if together else None)]
        if not together:
            self._servers.append(Server(configuration.serve, rest, certificate=certificate))

    def run(self, stopping: threading.Event, ready: Callable[[str], None]) -> None:
        """Serve until *stopping*; call *ready* with a sentence once the cluster has been read."""
        try:
            for server in self._servers:
                server.start()
            self._evictor.start(self._feed.synced, self._metrics.evicted)
            self._feed.start()
            while not (stopping.wait(0.02) or self._feed.synced()):
                pass
            if not stopping.is_set():
                ready(self._sentence())
            stopping.wait()
        finally:
            _log.info("stopping")
            # first no more binds, then no more of what they need; one in doubt would wait longer than we are given
            self._binder.hurry()
            for server in self._servers:
                server.stop()
            if self._nominator is not None:
                self._nominator.stop()
            self._binder.stop()
            self._feed.stop()
            self._evictor.stop()
            self._events.stop()

    def _sentence(self) -> str:
        listen, serve = self._servers[0].address, self._servers[-1].address
        where = f"verbs on {listen}, everything else on {serve}" if serve != listen else f"everything on {listen}"
        return f"cotenant-extender ready: {where}; {len(self._ledger.views())} nodes, {len(self._ledger.holds())} pods"


def with_flags(configuration: ExtenderConfiguration, **flags: str | None) -> ExtenderConfiguration:
    """Let flags that were given win over the file; raise ValueError for a value that means nothing."""
    given = {name: value for name, value in flags.items() if value is not None}
    return msgspec.convert(msgspec.to_builtins(msgspec.structs.replace(configuration, **given)), ExtenderConfiguration)
