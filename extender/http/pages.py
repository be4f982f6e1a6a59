"""Pages for people: who holds what of which GPU, drawn here as SVG, and why pods wait. Read-only, and without scripts.

Links are relative to the page, so that they hold behind any proxy, such as the API server's to a Service. Jinja escapes
whatever comes from the cluster, and the Content-Security-Policy lets nothing run or load that slipped through.
"""

import base64
import hashlib
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from functools import partial
from importlib.resources import files
from typing import Any
from urllib.parse import quote, urlencode

import msgspec
from flask import Flask, Response, request
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from cotenant.contract.inventory import Health
from cotenant.contract.reasons import Reason
from cotenant.contract.units import format_bytes
from extender.http import comparison
from extender.http.api import MAX_QUERY, QueryError, bounded, not_ours, number, one_of, state
from extender.http.strip import Part, Use, amount, part
from extender.inspect.inspector import Inspector
from extender.inspect.rows import GPURow, Holder, NodeRow, Slot, State
from extender.inspect.tables import percent, problem, slots
from extender.shadow.placements import Comparison

_NODES = 40
_PODS = 200
# Each may ask another size, and each size is judged for every node.
_WAITING = 10
_EXPLAINED_NODES = 50
_REFRESH_SECONDS = 15
_COLOURS = 8
# Who holds an instance that is there without a pod: one on its way out, or made by somebody else.
NOBODY = "no pod"
_STYLE = files("extender.http").joinpath("templates", "style.css").read_text()
_STYLE_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
_HEADERS = {
    "Content-Security-Policy": f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Bar(msgspec.Struct, frozen=True):
    """Hold one GPU as it is drawn; *label* says to a screen reader what the picture shows.

    Parts of memory lie side by side, the largest first; MIG instances where they are.
    """

    gpu: GPURow
    index: int
    uuid: str
    healthy: bool
    amount: str
    label: str
    # MPS clients, or MIG instances, in words; empty where neither is there
    slots: str
    parts: tuple[Part, ...]
    # what is in use, along the strip: its track, how far it is granted, and beyond; empty where it is not known
    used: tuple[Use, ...] = ()


class NodeCard(msgspec.Struct, frozen=True):
    """Hold one node as it is drawn."""

    name: str
    models: str
    problem: str
    bars: tuple[Bar, ...]


class Pages:
    """Answer the pages."""

    def __init__(self, inspector: Inspector, compared: Callable[[], Comparison | None]) -> None:
        self._inspector = inspector
        self._compared = compared
        self._jinja = Environment(
            loader=PackageLoader("extender.http", "templates"),
            autoescape=select_autoescape(default=True, default_for_string=True),
            undefined=StrictUndefined,
            trim_blocks=True,
            auto_reload=False,
        )
        self._jinja.filters.update(amount=amount, colour=colour, segment=partial(quote, safe=""), sentence=_sentence)

        # compiled now: the first who looks does not wait for it
        for template in self._jinja.list_templates(extensions=["html"]):
            self._jinja.get_template(template)

    def overview(self) -> Response:
        """Show the cluster's sums, the first pods that wait, and a page of nodes."""
        query = bounded("filter", MAX_QUERY)
        everything = one_of("all", ("0", "1"), default="0") == "1"
        page = self._inspector.nodes(
            limit=_NODES, after=bounded("continue", MAX_QUERY * 4), query=query, everything=everything
        )
        waiting = self._inspector.pods(limit=_WAITING, state=State.WAITING)
        return self._show(
            "overview.html",
            total=page.cluster,
            percent=percent(page.cluster.held_bytes, page.cluster.usable_bytes),
            compared=comparison.drawn(self._compared()),
            waiting={"items_": waiting.items, "remaining": waiting.remaining},
            query=query,
            everything=everything,
            nodes=[card(node) for node in page.items],
            remaining=page.remaining,
            more=_more(page.continue_),
        )

    def node(self, name: str) -> Response:
        """Show one node."""
        found = self._inspector.node(name)
        if found is None:
            return self.message("No such node", f"The API server has no node {name!r} now.", 404)
        return self._show("node.html", node=card(found))

    def gpu(self, name: str, uuid: str) -> Response:
        """Show one GPU."""
        found = self._inspector.node(name)
        shown = card(found) if found else None
        bar = next((bar for bar in shown.bars if bar.uuid == uuid), None) if shown else None
        if bar is None:
            return self.message("No such GPU", f"Node {name!r} lists no GPU {uuid!r} now.", 404)
        return self._show("gpu.html", node=shown, bar=bar)

    def pods(self) -> Response:
        """Show a page of pods."""
        chosen, query = state(), bounded("filter", MAX_QUERY)
        page = self._inspector.pods(limit=_PODS, after=bounded("continue", MAX_QUERY * 4), query=query, state=chosen)
        return self._show(
            "pods.html",
            page={"items_": page.items, "remaining": page.remaining},
            query=query,
            state=chosen or "all",
            states=["all", *State],
            more=_more(page.continue_),
        )

    def pod(self, namespace: str, name: str) -> Response:
        """Show one pod, and why it waits."""
        start = number("continue", 0, least=0, most=1_000_000)
        told = self._inspector.explain(namespace, name, limit=_EXPLAINED_NODES, start=start)
        if told is None:
            sentence = not_ours(namespace, name)
            return self.message("No such pod", f"{sentence[0].upper()}{sentence[1:]}.", 404)
        return self._show("pod.html", told=told, more=_more(told.continue_))

    def message(self, heading: str, sentence: str, status: int) -> Response:
        """Say something instead of a page."""
        response = self._show("message.html", heading=heading, sentence=sentence)
        response.status_code = status
        return response

    def _show(self, template: str, **values: Any) -> Response:
        asked = request.args.get("refresh")
        without = {key: value for key, value in request.args.items() if key != "refresh"}
        # as many steps up as the page lies deep; not counted in the path, where a name may hold an escaped slash
        rule = request.url_rule.rule if request.url_rule else "/"
        root = "../" * (rule.count("/") - 1) or "./"
        body = self._jinja.get_template(template).render(
            root=root,
            style=Markup(_STYLE),  # noqa: S704 - our own file
            now=f"{datetime.now(UTC):%H:%M:%S} UTC",
            # only where it was asked for: a page that moves by itself takes a screen reader's place away (WCAG 2.2.1)
            refresh=_REFRESH_SECONDS if asked == "1" else 0,
            seconds=_REFRESH_SECONDS,
            still=urlencode(without),
            moving=urlencode({**without, "refresh": "1"}),
            **values,
        )
        return Response(body, mimetype="text/html", headers=_HEADERS)


def pages(
    app: Flask,
    *,
    inspector: Inspector,
    synced: Callable[[], bool],
    compared: Callable[[], Comparison | None] = lambda: None,
) -> None:
    """Add the pages: /, /nodes/<node>, /nodes/<node>/gpus/<uuid>, /pods, /pods/<namespace>/<pod>."""
    made = Pages(inspector, compared)

    def answer(make: Callable[..., Response], **path: str) -> Response:
        if not synced():
            return made.message("Not yet", f"{Reason.CACHE_NOT_SYNCED.sentence.capitalize()}.", 503)
        try:
            return make(**path)
        except QueryError as error:
            return made.message("That cannot be shown", str(error), 400)

    for rule, make in (
        ("/", made.overview),
        ("/nodes/<name>", made.node),
        ("/nodes/<name>/gpus/<path:uuid>", made.gpu),
        ("/pods", made.pods),
        ("/pods/<namespace>/<name>", made.pod),
    ):
        app.add_url_rule(rule, endpoint=f"page {rule}", view_func=partial(answer, make))


def card(node: NodeRow) -> NodeCard:
    """Draw a node."""
    kinds: dict[tuple[str, int], int] = {}
    for gpu in node.gpus:
        kinds[gpu.model, gpu.usable_bytes] = kinds.get((gpu.model, gpu.usable_bytes), 0) + 1
    return NodeCard(
        name=node.node,
        models=", ".join(f"{count} x {model}, {format_bytes(size)}" for (model, size), count in kinds.items()),
        problem=f"{_sentence(node.problem)} ({problem(node)})" if node.problem else "",
        bars=tuple(_bar(gpu) for gpu in node.gpus),
    )


def _bar(gpu: GPURow) -> Bar:
    healthy = gpu.health is Health.HEALTHY and not gpu.fenced
    closed = "fenced" if gpu.fenced else "unhealthy"
    if gpu.slices:
        held = ", ".join(f"{slot.pod or NOBODY} {_place(slot)}" for slot in gpu.slots if not slot.kept) or "nobody"
        parts = tuple(_instances(gpu.slots, gpu.slices))
        whole = max(gpu.usable_bytes, 1)
    else:
        held = ", ".join(f"{holder.pod} {format_bytes(holder.bytes)}" for holder in gpu.holders) or "nobody"
        whole = max(gpu.usable_bytes, gpu.foreign_bytes + sum(holder.bytes for holder in gpu.holders), 1)
        parts = (*_parts(gpu.holders, whole), *_kept(gpu, whole), *_others(gpu, whole))
    if gpu.foreign:
        held += f", {gpu.foreign}"
    for one in gpu.kept:
        held += f", {format_bytes(one.bytes)} kept for {one.pod}"
    held_in = slots(gpu).removeprefix("-")
    clients = f", {held_in}" if gpu.max_clients else ""
    return Bar(
        gpu=gpu,
        index=gpu.index,
        uuid=gpu.uuid,
        healthy=healthy,
        amount=f"{amount(gpu.held_bytes)} / {format_bytes(gpu.usable_bytes)}" if healthy else closed,
        label=f"GPU {gpu.index}{'' if healthy else f', {closed}'}: {format_bytes(gpu.free_bytes)} of "
        f"{format_bytes(gpu.usable_bytes)} free, held by {held}{clients}; {_in_use(gpu)}",
        slots=held_in,
        parts=parts,
        used=tuple(_used(gpu, whole)),
    )


def _in_use(gpu: GPURow) -> str:
    """Say how much is in use, and how much of it nobody was granted."""
    if gpu.used_bytes is None:
        return "use unknown"
    beyond = f", {format_bytes(gpu.beyond_bytes)} of it beyond what is granted" if gpu.beyond_bytes else ""
    return f"{amount(gpu.used_bytes)} in use{beyond}"


def _used(gpu: GPURow, whole: int) -> Iterable[Use]:
    """Draw what is in use below the strip, in its scale: what is beyond all grants stands out."""
    if gpu.used_bytes is None:
        return
    yield Use(x="0", width="100", kind="track")
    within = gpu.used_bytes - gpu.beyond_bytes
    for start, size, kind in ((0, within, "within"), (within, gpu.beyond_bytes, "beyond")):
        # NVML counts more than pods may be given: what is kept back, and what lies below a whole unit
        x, width = (min(100.0, 100 * part / whole) for part in (start, size))
        width = min(width, 100 - x)
        if width:
            yield Use(x=f"{x:.2f}", width=f"{width:.2f}", kind=kind)


def _kept(gpu: GPURow, whole: int) -> Iterable[Part]:
    """Draw what is kept for pods to come, as far as those evicted for them do not hold it any more."""
    x = sum(holder.bytes for holder in gpu.holders)
    room = gpu.usable_bytes - gpu.foreign_bytes - x
    for one in gpu.kept:
        size = min(one.bytes, room)
        if size > 0:
            title = f"{format_bytes(one.bytes)} kept for {one.pod} {one.until}"
            yield part(x, size, whole, colour="kept", title=title, text=f"kept for {one.pod.partition('/')[2]}")
            x, room = x + size, room - size


def _parts(holders: Iterable[Holder], whole: int) -> Iterable[Part]:
    x = 0
    for holder in holders:
        title = f"{holder.pod}: {format_bytes(holder.bytes)}, {holder.state}"
        # what does not fit into the part ends in an ellipsis
        yield part(x, holder.bytes, whole, colour=colour(holder.pod), title=title, text=holder.pod.partition("/")[2])
        x += holder.bytes


def _others(gpu: GPURow, whole: int) -> Iterable[Part]:
    """Draw what others than our pods have, at the right end."""
    if gpu.foreign_bytes:
        title = f"{format_bytes(gpu.foreign_bytes)} {gpu.foreign}"
        yield part(whole - gpu.foreign_bytes, gpu.foreign_bytes, whole, colour="unheld", title=title, text="others")


def _instances(slots: Iterable[Slot], slices: int) -> Iterable[Part]:
    for slot in slots:
        yield part(
            slot.start,
            slot.size,
            slices,
            colour="kept" if slot.kept else colour(slot.pod) if slot.pod else "unheld",
            title=_title(slot),
            # a name alone where a single slice has no room for both
            text=slot.profile if slot.size == 1 else f"{slot.profile} {_who(slot)}",
        )


def _title(slot: Slot) -> str:
    who = f"kept for {slot.pod}" if slot.kept else slot.pod or NOBODY
    return f"{who}: {_place(slot)}" + (f"; no new pods: {slot.detail}" if slot.detail else "")


def _place(slot: Slot) -> str:
    last = slot.start + slot.size - 1
    where = f"{slot.profile} on slice{f's {slot.start} to {last}' if slot.size > 1 else f' {slot.start}'}"
    return f"{where}, {slot.held} of {slot.shares} shares" if slot.shares > 1 else where


def _who(slot: Slot) -> str:
    return f"{slot.held} of {slot.shares}" if slot.shares > 1 else slot.pod.partition("/")[2]


def colour(pod: str) -> str:
    """Give a pod the same colour on every page, and after a restart."""
    return f"c{hashlib.blake2s(pod.encode(), digest_size=2).digest()[0] % _COLOURS}"


def _sentence(reason: Reason | None) -> str:
    return reason.sentence if reason is not None else "fits"


def _more(after: str) -> str:
    """Give the query that shows the next page."""
    kept = {key: value for key, value in request.args.items() if key != "continue"}
    return urlencode({**kept, "continue": after}) if after else ""
