"""The read-only /v1 routes: what the ledger knows, as JSON or as text in columns, page by page."""

import re
from collections.abc import Callable
from functools import partial

import msgspec
import yaml
from flask import Flask, Response, request

from cotenant.contract.pods import pod_decoder
from cotenant.contract.reasons import Reason
from extender.http.app import SIMULATE, status
from extender.inspect.inspector import Inspector
from extender.inspect.rows import MixPage, NamespacePage, NodePage, PodExplanation, PodPage, State
from extender.inspect.tables import Page, explanation_table, written

PAGE = 500
# 1,000 nodes of 8 GPUs are 3 MB; more at a time would keep kube-scheduler's filter waiting.
MAX_PAGE = 1_000
MAX_QUERY = 100
_LONGEST_CONTINUE = 400

_encode = msgspec.json.Encoder().encode
# some ten times as fast where PyYAML was built with libyaml, as its wheels are
_Dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


class _Kind(msgspec.Struct, frozen=True):
    """Hold what an object calls itself."""

    kind: str = "Pod"


_kind = msgspec.json.Decoder(_Kind)


class QueryError(ValueError):
    """Say what is wrong with a query parameter."""


def inspection(app: Flask, *, inspector: Inspector, synced: Callable[[], bool]) -> None:
    """Add /v1/nodes, pods, namespaces, mix, explain/<namespace>/<pod> and, for a pod that is posted, simulate."""
    forms = ("json", "yaml", "table", "wide", "csv")

    def answer(make: Callable[..., Page | PodExplanation | Response], **path: str) -> Response:
        if not synced():
            return status(f"{Reason.CACHE_NOT_SYNCED.sentence}; ask again in a moment", 503)
        try:
            form = one_of("as", forms, default="json")
            made = make(inspector, **path)
            return made if isinstance(made, Response) else _answered(made, form)
        except QueryError as error:
            return status(str(error), 400)

    for rule, make in (
        ("nodes", _nodes),
        ("pods", _pods),
        ("namespaces", _namespaces),
        ("mix", _mix),
        ("explain/<namespace>/<pod>", _explain),
    ):
        app.add_url_rule(f"/v1/{rule}", endpoint=f"v1 {rule}", view_func=partial(answer, make))
    app.add_url_rule(SIMULATE, endpoint="v1 simulate", view_func=partial(answer, _simulate), methods=["POST"])


def _nodes(inspector: Inspector) -> NodePage:
    return inspector.nodes(
        limit=number("limit", PAGE, most=MAX_PAGE),
        after=bounded("continue", _LONGEST_CONTINUE),
        query=bounded("filter", MAX_QUERY),
        everything=one_of("all", ("0", "1"), default="0") == "1",
    )


def _pods(inspector: Inspector) -> PodPage:
    return inspector.pods(
        limit=number("limit", PAGE, most=MAX_PAGE),
        after=bounded("continue", _LONGEST_CONTINUE),
        query=bounded("filter", MAX_QUERY),
        namespace=namespace(),
        state=state(),
    )


def _namespaces(inspector: Inspector) -> NamespacePage:
    return inspector.namespaces(
        limit=number("limit", PAGE, most=MAX_PAGE),
        after=bounded("continue", _LONGEST_CONTINUE),
        query=bounded("filter", MAX_QUERY),
    )


def _mix(inspector: Inspector) -> MixPage:
    return inspector.mix()


def _explain(inspector: Inspector, *, namespace: str, pod: str) -> PodExplanation | Response:
    told = inspector.explain(
        namespace,
        pod,
        limit=number("limit", 50, most=MAX_PAGE),
        start=number("continue", 0, least=0, most=1_000_000),
    )
    return status(not_ours(namespace, pod), 404) if told is None else told


def _simulate(inspector: Inspector) -> PodExplanation:
    posted = request.get_data(cache=False)
    try:
        kind = _kind.decode(posted).kind
        if kind != "Pod":
            raise QueryError(
                f"what was posted is a {kind[:60]!r} and no Pod: `cotenant plan fit --file` takes Deployments and Jobs"
            )
        pod = pod_decoder.decode(posted)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise QueryError(f"what was posted is no Pod as the API server has it, in JSON: {error}") from error
    told = inspector.simulate(pod, limit=number("limit", 50, most=MAX_PAGE))
    if told is None:
        raise QueryError(f"pod {pod.key} asks for nothing of ours in its containers' resources.limits")
    return told


def not_ours(namespace: str, pod: str) -> str:
    """Say that a pod is none of ours, and what to check."""
    return (
        f"no pod {pod!r} in namespace {namespace!r} asks for shared GPU memory now: check the names, whether it has "
        "ended, and what its containers' resources.limits ask for"
    )


def number(name: str, default: int, *, least: int = 1, most: int) -> int:
    """Read a whole number from the query; raise QueryError for anything else."""
    given = request.args.get(name)
    if not given:
        return default
    if not (given.isascii() and given.isdigit() and len(given) < 10 and least <= int(given) <= most):  # noqa: PLR2004
        raise QueryError(f"{name}={given[:20]!r} is not a whole number from {least} to {most}")
    return int(given)


def bounded(name: str, longest: int) -> str:
    """Read a text from the query; raise QueryError for a longer one."""
    given = request.args.get(name, "")
    if len(given) > longest:
        raise QueryError(f"{name} has {len(given)} letters, more than the {longest} allowed")
    return given.strip()


def one_of(name: str, values: tuple[str, ...], *, default: str) -> str:
    """Read one of a few words from the query; raise QueryError for any other."""
    given = request.args.get(name) or default
    if given not in values:
        raise QueryError(f"{name}={given[:20]!r} is none of {', '.join(values)}")
    return given


def state() -> State | None:
    """Read which state of pods is asked for, None for all."""
    found = one_of("state", ("all", *State), default="all")
    return None if found == "all" else State(found)


def namespace() -> str:
    """Read a namespace from the query, "" for all; raise QueryError for what can be no namespace's name."""
    given = bounded("namespace", MAX_QUERY)
    if not re.fullmatch("[a-z0-9-]*", given):
        raise QueryError(f"namespace={given[:20]!r} can be no namespace's name")
    return given


def text(body: str) -> Response:
    """Answer in plain text."""
    return Response(body, mimetype="text/plain")


def _answered(made: Page | PodExplanation, form: str) -> Response:
    """Answer with what was asked for, in the form that was asked for."""
    if form == "json":
        return Response(_encode(made), mimetype="application/json")
    if form == "yaml":
        document = yaml.dump(msgspec.to_builtins(made), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
        return Response(document, mimetype="application/yaml")
    if isinstance(made, PodExplanation):
        if form == "csv":
            raise QueryError("as=csv: an explanation is no table; ask as json, yaml, table or wide")
        return text(explanation_table(made, wide=form == "wide"))
    after = made.continue_ if form == "csv" and not isinstance(made, MixPage) else ""
    # kubectl get --raw shows no headers, so a last line says where the next page begins
    return text(written(made, form) + (f"# continue {after}\n" if after else ""))
