"""Put the extender together from its parts, and take it apart again."""

import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import structlog

from cotenant.cluster import Cluster
from cotenant.contract.configuration import TLS, ExtenderConfiguration, Layout, Placement, VerbsTLS
from cotenant.contract.request import PodRequest
from cotenant.threads import Threads
from extender.admission import Settings, mutating_review, validating_review
from extender.cluster.binder import Binder
from extender.cluster.election import Elect, Election, Follow
from extender.cluster.events import Events
from extender.cluster.evictions import Evictions
from extender.cluster.evictor import Evictor
from extender.cluster.feed import Feed
from extender.cluster.neighbourhood import Neighbourhood
from extender.cluster.nominator import Nominator
from extender.cluster.preemptor import Preemptor
from extender.cluster.writership import Sole, Writership
from extender.http import app as routes
from extender.http.api import inspection
from extender.http.bodies import Limits
from extender.http.call_server import CallServer, Request
from extender.http.calls import MAX_BODY, Answer, Calls
from extender.http.certificates import Certificates
from extender.http.pages import pages
from extender.http.wsgi import Application
from extender.inspect.holdings import Lasts, not_told
from extender.inspect.inspector import Inspector
from extender.ledger import Ledger
from extender.metrics.registry import Metrics, TenantSamples
from extender.placement.choices import Choices
from extender.placement.tenants import Tenants
from extender.shadow.live import Shadowing
from extender.used import Used
from extender.verbs.bind import Bind
from extender.verbs.expected import Expected
from extender.verbs.filter import Filter
from extender.verbs.judge import Judge
from extender.verbs.lessons import Lessons
from extender.verbs.preempt import Preempt
from extender.verbs.prioritize import Prioritize
from extender.verbs.victims import Search

_log = structlog.get_logger(__name__)

# How much of its time a bind may wait for the end of a take-over, which takes `settle` and a LIST of all pods.
_TAKE_OVER_SHARE = 0.5
# What the bodies of requests under way may have together. A webhook's is decoded whole, which takes up to 25 times as
# much: 152 MiB for 6 MiB of empty objects.
_VERB_BYTES = 2 * MAX_BODY
_REVIEW_BYTES = 8 << 20


class Extender:
    """Be one running extender."""

    def __init__(self, configuration: ExtenderConfiguration, cluster: Cluster) -> None:
        names, unit_bytes = configuration.names, configuration.unit_bytes
        pod = os.environ.get("POD_NAME") or socket.gethostname()
        choices = Choices.configured(configuration)
        self._ledger = Ledger(names, unit_bytes, labels=choices.labels)
        self._threads = threads = Threads()
        self._events = Events(cluster, instance=pod, may_write=self._writes, threads=threads)
        evictions = Evictions(cluster, self._evicted)
        self._evictor = Evictor(
            cluster,
            self._ledger,
            names,
            self._events.complain,
            evictions,
            grace=configuration.evict_overusers_after,
            may_write=self._writes,
            threads=threads,
        )
        used = Used(names)
        self._feed = Feed(cluster, self._ledger, self._events.complain, self._evictor, used)
        self._writer, self._election = self._election_of(configuration, cluster, pod)
        self._binder = Binder(
            cluster,
            self._ledger,
            names=names,
            bind_timeout=configuration.bind_timeout,
            writer=self._writer,
            threads=threads,
        )
        self._metrics = metrics = Metrics(
            self._ledger,
            self._feed.synced,
            self._binder.unsettled,
            watches={"nodes": self._feed.nodes, "pods": self._feed.pods},
            per_gpu=configuration.gpu_metrics,
        )
        tenants = Tenants(configuration.namespaces, names)
        judge = Judge(self._ledger, names, unit_bytes, choices, mix=configuration.mix, tenants=tenants)
        search = Search(self._ledger, judge, Neighbourhood(cluster))
        # who sees to pods that fit nowhere, beside the verbs
        self._nominator = self._preemptor = None
        lasts: Lasts = not_told
        if configuration.nominate:
            self._nominator = Nominator(cluster, self._ledger, judge, nominated=metrics.nominated, threads=threads)
        if configuration.preempt_fragmented is not None:
            self._preemptor = Preemptor(
                cluster,
                self._ledger,
                judge,
                search,
                evictions=evictions,
                tell=self._events.complain,
                configuration=configuration.preempt_fragmented,
                may_write=self._writes,
                threads=threads,
            )
            lasts = self._preemptor.lasts
        self._shadowing = None
        if configuration.shadow:
            self._shadowing = Shadowing(
                self._ledger,
                names,
                unit_bytes,
                live=configuration.policy,
                shadow=configuration.shadow,
                mix=lambda: judge.mix,
                threads=threads,
            )
            metrics.also(self._shadowing)
        # what goes on beside the verbs, and never holds one up
        self._beside: list[Lessons | Shadowing] = [
            Lessons(judge, threads),
            *([self._shadowing] if self._shadowing else []),
        ]
        metrics.also(TenantSamples(self._ledger, tenants))
        metrics.show_threads(threads.failures)
        metrics.show_writer(self._writes)
        calls = self._verbs(configuration, judge, search)
        inspector = Inspector(self._ledger, judge, used=used, lasts=lasts)
        application = self._everything_else(configuration, tenants, inspector)
        self._servers = self._servers_of(configuration, calls, application)

    def _verbs(self, configuration: ExtenderConfiguration, judge: Judge, search: Search) -> Calls:
        """Make what answers kube-scheduler."""
        synced, expected = self._feed.synced, Expected()
        return Calls(
            filter_=Filter(
                self._ledger,
                judge,
                synced=synced,
                decide=configuration.placement is Placement.DECIDE,
                expected=expected,
                nominator=self._nominator,
                preemptor=self._preemptor,
                rejected=self._metrics.rejected,
            ),
            prioritize=Prioritize(judge),
            preempt=Preempt(judge, search, synced=synced),
            bind=Bind(
                self._ledger,
                judge,
                self._binder,
                configuration.names,
                synced=synced,
                writing=lambda: self._writer.wait(_TAKE_OVER_SHARE * configuration.bind_timeout),
                heard=self._shadowing.note if self._shadowing else _heard_by_nobody,
                expected=expected,
            ),
            metrics=self._metrics,
            catch_up=judge.catch_up,
        )

    def _everything_else(
        self, configuration: ExtenderConfiguration, tenants: Tenants, inspector: Inspector
    ) -> Application:
        """Make what answers everybody else: probes, metrics, admission, and people."""
        synced = self._feed.synced
        settings = Settings(
            names=configuration.names,
            unit_bytes=configuration.unit_bytes,
            scheduler=configuration.scheduler_name if configuration.layout is Layout.SECOND_SCHEDULER else None,
            profiles=frozenset(configuration.profile_policies or {}),
            extender_user=configuration.extender_user,
            tenants=tenants,
        )
        app = routes.new_app()
        routes.everything_else(
            app,
            synced=synced,
            ended=self._ended,
            metrics=self._metrics,
            review={
                "mutate": lambda body: mutating_review(body, settings),
                "validate": lambda body: validating_review(body, settings),
            },
        )
        inspection(app, inspector=inspector, synced=synced)
        compared = self._shadowing.compared if self._shadowing else lambda: None
        pages(app, inspector=inspector, synced=synced, compared=compared)
        return Application(app)

    def _servers_of(
        self, configuration: ExtenderConfiguration, calls: Calls, application: Application
    ) -> list[CallServer]:
        """Make what listens: for the verbs, and for everything else."""

        def verbs(request: Request) -> Answer:
            return calls(request.method, request.path, request.body)

        def all_together(request: Request) -> Answer:
            return verbs(request) if request.path in calls.paths else application(request)

        def most(path: str) -> int:
            return MAX_BODY if path in calls.paths else routes.most_of_body(path)

        def server(
            address: str, answer: Callable[[Request], Answer], at_once_bytes: int, tls: TLS | None
        ) -> CallServer:
            limits, certificates = Limits(most, at_once_bytes), _certificates(tls)
            return CallServer(address, answer, limits=limits, certificates=certificates, threads=self._threads)

        # one address for both is one server, as when everything stays on loopback
        if configuration.serve == configuration.listen and not configuration.listen.endswith(":0"):
            return [server(configuration.serve, all_together, _VERB_BYTES, configuration.tls)]
        return [
            server(configuration.listen, verbs, _VERB_BYTES, configuration.verbs_tls),
            server(configuration.serve, application, _REVIEW_BYTES, configuration.tls),
        ]

    def run(self, stopping: threading.Event, ready: Callable[[str], None]) -> None:
        """Serve until *stopping*; call *ready* with a sentence once the cluster has been read."""
        try:
            for server in self._servers:
                server.start()
            self._evictor.start(self._feed.synced)
            self._feed.start()
            if isinstance(self._writer, Writership):
                self._writer.start()
            if self._election is not None:
                self._election.start()
            while not (stopping.wait(0.02) or self._feed.synced()):
                pass
            if not stopping.is_set():
                for part in self._beside:
                    part.start()
                ready(self._sentence())
            stopping.wait()
        finally:
            self._end()

    def _end(self) -> None:
        """Stop everything, what needs the others before them."""
        _log.info("stopping")
        # first no more binds, then no more of what they need; one in doubt would wait longer than we are given
        self._binder.hurry()
        for server in self._servers:
            server.stop()
        for onlooker in (self._nominator, self._preemptor):
            if onlooker is not None:
                onlooker.stop()
        for part in self._beside:
            part.stop()
        self._binder.stop()
        # only now: what was bound until here was bound by the writer
        if isinstance(self._writer, Writership):
            self._writer.stop()
        if self._election is not None:
            self._election.stop()
        self._feed.stop()
        self._evictor.stop()
        self._events.stop()

    def _ended(self) -> list[str]:
        """Name the threads that have ended and should not have."""
        followed = self._election.ended() if isinstance(self._election, Follow) else []
        return [*self._threads.ended(), *self._feed.ended(), *followed]

    def _evicted(self, cause: str, outcome: str) -> None:
        self._metrics.evicted(cause, outcome)

    def _writes(self) -> bool:
        """Tell whether this extender is the one that writes."""
        return self._writer.token() is not None

    def _election_of(
        self, configuration: ExtenderConfiguration, cluster: Cluster, pod: str
    ) -> tuple[Writership | Sole, Election | None]:
        """Say how it is told who binds."""
        lease = configuration.writer
        if lease is None:
            return Sole(), None
        writership = Writership(
            settle=lease.settle,
            list_again=self._feed.pods.list_again,
            begin=self._ledger.forget_assumed,
            threads=self._threads,
        )
        if configuration.layout is Layout.SECOND_SCHEDULER:
            return writership, Follow(cluster, lease, writership, host=socket.gethostname())
        return writership, Elect(
            cluster, lease, writership, pod=pod, label=configuration.names.writer, threads=self._threads
        )

    def _sentence(self) -> str:
        listen, serve = self._servers[0].address, self._servers[-1].address
        where = f"verbs on {listen}, everything else on {serve}" if serve != listen else f"everything on {listen}"
        return f"cotenant-extender ready: {where}; {len(self._ledger.views())} nodes, {len(self._ledger.holds())} pods"


def _certificates(tls: TLS | None) -> Certificates | None:
    if tls is None:
        return None
    clients = Path(tls.client_ca_file) if isinstance(tls, VerbsTLS) else None
    return Certificates(Path(tls.cert_file), Path(tls.key_file), clients)


def _heard_by_nobody(_uid: str, _request: PodRequest) -> None:
    pass


def with_flags(configuration: ExtenderConfiguration, **flags: str | None) -> ExtenderConfiguration:
    """Let flags that were given win over the file; raise ValueError for a value that means nothing."""
    given = {name: value for name, value in flags.items() if value is not None}
    return msgspec.convert(msgspec.to_builtins(msgspec.structs.replace(configuration, **given)), ExtenderConfiguration)
