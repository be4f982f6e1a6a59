"""`cotenant inspect` and `cotenant explain`: ask a running extender, and print what it says."""

import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import TypeVar
from urllib.parse import quote, urlencode, urlsplit

import click
import msgspec

from cotenant.cli import manifests
from cotenant.cluster import ApiError, ClusterError, Unreachable, connect, namespace_of
from cotenant.cluster.errors import error_of
from extender.inspect import tables
from extender.inspect.rows import MixPage, NamespacePage, NodePage, PodExplanation, PodPage

# The most that the extender gives at a time; all pages are asked for, one after the other.
PAGE = 1000
_TIMEOUT_SECONDS = 30.0

# Said by the API server where it cannot hand a request on (K/pkg/registry/core/service/storage; apimachinery).
_OF_THE_PROXY = {
    re.compile("^services .* not found"): "name it by --service where Cotenant was installed under another name",
    re.compile("^services .* is forbidden"): "the Role cotenant-viewer of namespace {} allows it",
    re.compile("^(no endpoints available for|error trying to reach) service"): (
        "the extender does not run, or is not ready; see kubectl -n {} get pods, and cotenant doctor"
    ),
}

T = TypeVar("T")
Page = TypeVar("Page", NodePage, PodPage, NamespacePage, PodExplanation)
Listed = TypeVar("Listed", NodePage, PodPage, NamespacePage)
# From a path below /v1 and a query to the body of the answer; raises ClusterError with a sentence.
Ask = Callable[[str, dict[str, str]], bytes]


def by_url(server: str) -> Ask:
    """Ask an extender at its own address, HOST:PORT or a URL."""
    root = server if "://" in server else f"http://{server}"
    try:
        known = urlsplit(root).scheme in {"http", "https"}
    except ValueError:
        known = False
    if not known:
        raise click.BadParameter(f"{server!r} is not a URL such as http://127.0.0.1:9481", param_hint="--server")

    def ask(path: str, query: dict[str, str]) -> bytes:
        url = f"{root.rstrip('/')}/v1/{path}?{urlencode(query)}"
        try:
            with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as reply:  # noqa: S310 - http(s), see above
                body: bytes = reply.read()
                return body
        except urllib.error.HTTPError as error:
            raise error_of(error.read(), status=error.code) from error
        except (OSError, ValueError) as error:
            raise Unreachable(f"{root} does not answer: {getattr(error, 'reason', error)}") from error

    return ask


def by_proxy(kubeconfig: str | None, context: str | None, service: str) -> Ask:
    """Ask through the API server's proxy to a Service, with the user's own rights."""
    namespace, _, name = service.partition("/")
    cluster = connect(kubeconfig, context=context, pool_size=1)
    root = f"/api/v1/namespaces/{quote(namespace, safe='')}/services/{quote(name, safe=':')}/proxy/v1"

    def ask(path: str, query: dict[str, str]) -> bytes:
        try:
            return cluster.get(f"{root}/{path}", query=query, timeout=_TIMEOUT_SECONDS).body
        except ApiError as error:
            # what the extender itself answers is left as it is
            advice = next((advice for said, advice in _OF_THE_PROXY.items() if said.search(error.message)), "")
            raise (Unreachable(f"{error.message}: {advice.format(namespace)}") if advice else error) from error

    return ask


def nodes(ask: Ask, output: str, query: dict[str, str]) -> str:
    """Give all nodes that the query finds, as *output* says."""
    return _written(_whole(ask, "nodes", query, NodePage), output)


def pods(ask: Ask, output: str, query: dict[str, str]) -> str:
    """Give all pods that the query finds, as *output* says."""
    return _written(_whole(ask, "pods", query, PodPage), output)


def namespaces(ask: Ask, output: str, query: dict[str, str]) -> str:
    """Give the namespaces that the query finds, as *output* says."""
    return _written(_whole(ask, "namespaces", query, NamespacePage), output)


def mix(ask: Ask, output: str) -> str:
    """Give the pods that policies expect, as *output* says."""
    return _written(_decode(ask("mix", {}), MixPage), output)


def explanation(ask: Ask, output: str, namespace: str, pod: str) -> str:
    """Explain one pod, as *output* says."""
    path = f"explain/{quote(namespace, safe='')}/{quote(pod, safe='')}"
    if output == "table":  # which shows no single nodes
        return tables.explanation_table(_decode(ask(path, {"limit": "1"}), PodExplanation))
    pages = list(_pages(ask, path, {}, PodExplanation))
    nodes_of_all = tuple(node for page in pages for node in page.nodes)
    told = msgspec.structs.replace(pages[0], nodes=nodes_of_all, remaining=0, continue_="")
    return _document(told, output) or tables.explanation_table(told, wide=True)


def _whole(ask: Ask, path: str, query: dict[str, str], kind: type[Listed]) -> Listed:
    """Ask for all pages, and make one of them."""
    pages = list(_pages(ask, path, query, kind))
    items = tuple(item for page in pages for item in page.items)
    return msgspec.structs.replace(pages[-1], items=items, remaining=0, continue_="")


def _pages(ask: Ask, path: str, query: dict[str, str], kind: type[Page]) -> Iterator[Page]:
    after = ""
    while True:
        page = _decode(ask(path, {"limit": str(PAGE), **query, "continue": after}), kind)
        yield page
        after = page.continue_
        if not after:
            return


def _decode(body: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.MsgspecError as error:
        raise Unreachable(f"that is no extender of this version: its answer cannot be read: {error}") from error


def _written(page: tables.Page, output: str) -> str:
    return _document(page, output) or tables.written(page, output)


def _document(value: object, output: str) -> str:
    """Write *value* as JSON or YAML; nothing for other outputs."""
    if output == "json":
        return msgspec.json.format(msgspec.json.encode(value), indent=2).decode() + "\n"
    if output == "yaml":
        return manifests.written([msgspec.to_builtins(value)])
    return ""


def current_namespace(*, kubeconfig: str | None, context: str | None, **_: str | None) -> str:
    """Name the namespace that kubectl would take."""
    return namespace_of(kubeconfig, context=context)


def answer(
    make: Callable[[Ask], str], *, server: str | None, kubeconfig: str | None, context: str | None, service: str
) -> None:
    """Ask where the options say and print the answer; end with status 1 and a sentence where none comes."""
    try:
        ask = by_url(server) if server else by_proxy(kubeconfig, context, service)
        click.echo(make(ask), nl=False)
    except ClusterError as error:
        raise click.ClickException(error.sentence) from error
