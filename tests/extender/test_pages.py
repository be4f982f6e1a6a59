"""The pages over HTTP: links lead somewhere, nothing from the cluster becomes markup, and all can be read aloud."""

import base64
import hashlib
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from urllib.parse import urljoin, urlsplit

import pytest

from cotenant.contract import used as notes_of_use
from cotenant.contract.grant import Grant
from cotenant.contract.request import parse
from cotenant.contract.used import UsedMemory
from cotenant.standins.api_server import ApiServer
from extender.http import app as routes
from extender.http.pages import pages
from extender.inspect.inspector import Inspector
from extender.ledger import Ledger, NodeView
from extender.placement.fit import Placement, grant, place
from extender.shadow.placements import Agreement, Comparison, Free, Side
from extender.used import Used
from extender.verbs.judge import Judge
from tests.builders import NAMES, NodeBuilder, PodBuilder, a_grant, a_node, a_pod, granted
from tests.extender.running import Answer, Running, add, eventually, submit

GIB = 1 << 30
MARKUP = "</svg><script>alert(1)</script>\"'&"
VOID = {"meta", "input", "br", "link"}


class Page(HTMLParser):
    """One page, taken apart; text outside of style and the attributes of every element."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self._open: list[str] = []
        self.unbalanced: list[str] = []
        self.feed(html)
        self.close()
        self.unbalanced += self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, data: str) -> None:
        if not self._open or self._open[-1] != "style":
            self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def links(self) -> list[str]:
        return [a["href"] for a in self.all("a") if not a["href"].startswith("#")]


def page(answer: Answer) -> Page:
    assert "text/html; charset=utf-8" == answer.headers["content-type"]
    return Page(answer.body.decode())


@pytest.fixture
def busy(api: ApiServer, extender: Running) -> Running:
    """An extender with pods that are bound, wait, and are written badly, and a node that is unwell."""
    add(
        api,
        a_node("n3").with_gpus(2, "10GiB", model=MARKUP, detail=MARKUP).unhealthy(1),
        a_node("gone").with_gpu().not_serving(),
    )
    for name in ("a", "b"):
        assert "" == extender.bind(submit(api, a_pod().named(name).in_namespace("team-a").asking(6)), "n1")
    for pod in (
        a_pod().named("big").asking(11),
        a_pod().named("hostile").asking(1).wishing(policy=MARKUP),
        a_pod().named("around").asking(1).bound_to("n2"),
        a_pod().named("unreadable").asking(1).bound_to("n2", MARKUP),
        a_pod().named("lost").asking(2).bound_to("n2", a_grant(granted({"GPU/<lost>": 2 * GIB}))),
    ):
        submit(api, pod)
    assert eventually(lambda: len(extender.ledger.holds()) == 4 and len(extender.ledger.all_waiting()) == 2)
    assert eventually(extender.ledger.ungranted)
    assert eventually(lambda: len(extender.ledger.views()) == 4)
    return extender


def crawled(extender: Running) -> Iterator[tuple[str, Answer]]:
    """Follow every link from / on."""
    seen, ahead = {"/"}, ["/"]
    while ahead:
        path = ahead.pop()
        answer = extender.get(path)
        yield path, answer
        for link in page(answer).links:
            parts = urlsplit(urljoin(f"http://h{path}", link))
            target = f"{parts.path}?{parts.query}" if parts.query else parts.path
            if target not in seen:
                seen.add(target)
                ahead.append(target)


class TestPages:
    """The pages as a person meets them."""

    def test_every_link_leads_to_a_page(self, busy: Running) -> None:
        answers = dict(crawled(busy))
        assert {"/", "/pods", "/nodes/n1", "/nodes/n1/gpus/GPU-n1-0", "/pods/team-a/a"} <= answers.keys()
        assert {200} == {answer.status for answer in answers.values()}

    def test_links_hold_behind_a_proxy_that_adds_a_path(self, busy: Running) -> None:
        for path, answer in crawled(busy):
            prefix = "/api/v1/namespaces/x/services/y/proxy"
            links = [urljoin(f"http://h{prefix}{path}", link) for link in page(answer).links]
            assert [] == [link for link in links if not link.startswith(f"http://h{prefix}/")]

    def test_nothing_from_the_cluster_becomes_markup(self, busy: Running) -> None:
        found = ""
        for _, answer in crawled(busy):
            shown = page(answer)
            assert [] == shown.all("script")
            assert [] == shown.unbalanced
            assert not [key for _, attributes in shown.elements for key in attributes if key.startswith("on")]
            found += shown.text
        # it is there, as text
        assert found.count("<script>alert(1)</script>") > 3

    def test_a_browser_is_told_to_run_and_load_nothing(self, busy: Running) -> None:
        answer = busy.get("/")
        (style,) = re.findall("<style>(.*?)</style>", answer.body.decode(), re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
        policy = answer.headers["content-security-policy"]
        assert policy.startswith(f"default-src 'none'; style-src 'sha256-{digest}';")
        assert "prefers-color-scheme:dark" in style
        assert [] == [element for element, attributes in page(answer).elements if "style" in attributes]

    def test_every_picture_and_field_can_be_read_aloud(self, busy: Running) -> None:
        for _, answer in crawled(busy):
            shown = page(answer)
            pictures = [svg for svg in shown.all("svg") if "strip" in svg.get("class", "")]
            assert all(svg["role"] == "img" and svg["aria-label"] for svg in pictures)
            labelled = {label["for"] for label in shown.all("label") if "for" in label}
            fields = [f for f in (*shown.all("input"), *shown.all("select")) if f.get("type") != "checkbox"]
            assert labelled == {field["id"] for field in fields}
            assert [{"lang": "en"}] == shown.all("html")
            assert 1 == len(shown.all("h1")) == len(shown.all("main"))
            assert all("scope" in cell for cell in shown.all("th"))

    def test_a_strip_says_who_holds_what(self, busy: Running) -> None:
        labels = [svg["aria-label"] for svg in page(busy.get("/nodes/n1")).all("svg") if "aria-label" in svg]
        assert "GPU 0: 4 GiB of 10 GiB free, held by team-a/a 6 GiB; use unknown" == labels[0]

    def test_a_waiting_pod_says_why_and_what_would_help(self, busy: Running) -> None:
        assert "the request is larger than any GPU" in page(busy.get("/")).text
        assert "10 GiB fit now on n" in page(busy.get("/pods/default/big")).text

    def test_it_can_be_made_to_stand_still(self, busy: Running) -> None:
        moving, still = page(busy.get("/?filter=n1&refresh=1")), page(busy.get("/?filter=n1"))
        refreshes = [[m for m in shown.all("meta") if m.get("http-equiv") == "refresh"] for shown in (moving, still)]
        assert [1, 0] == [len(found) for found in refreshes]
        assert "?filter=n1&refresh=1" in still.links
        assert "?filter=n1" in moving.links

    def test_a_thousand_nodes_are_shown_page_by_page(self) -> None:
        ledger = Ledger(NAMES, GIB)
        for n in range(1000):
            ledger.observe_node(a_node(f"n{n:03}").with_gpus(8).build())
        app = routes.new_app()
        inspector = Inspector(ledger, Judge(ledger, NAMES, GIB, "best-fit"))
        pages(app, inspector=inspector, synced=lambda: True)
        seen, path, client = [], "/", app.test_client()
        while path:
            shown = Page(client.get(path).text)
            seen += [a["href"] for a in shown.all("a") if re.fullmatch(r"\./nodes/n\d+", a["href"])]
            path = next((f"/{link}" for link in shown.links if "continue=" in link and link.endswith("#nodes")), "")
        assert [f"./nodes/n{n:03}" for n in range(1000)] == seen

    @pytest.mark.parametrize(
        ("path", "status", "why"),
        [
            ("/nodes/nowhere", 404, "The API server has no node 'nowhere' now."),
            ("/nodes/n1/gpus/GPU-x", 404, "Node 'n1' lists no GPU 'GPU-x' now."),
            ("/pods/default/nobody", 404, "No pod 'nobody' in namespace 'default' asks for shared GPU memory now"),
            ("/pods?state=lost", 400, "state='lost' is none of"),
            (f"/?filter={'x' * 101}", 400, "filter has 101 letters"),
        ],
    )
    @pytest.mark.usefixtures("api")
    def test_what_cannot_be_shown_is_said(self, extender: Running, path: str, status: int, why: str) -> None:
        answer = extender.get(path)
        assert status == answer.status
        assert why in page(answer).text


def nodes_of(*builders: NodeBuilder) -> Ledger:
    ledger = Ledger(NAMES, GIB)
    for node in builders:
        ledger.observe_node(node.build())
    return ledger


def page_of(ledger: Ledger, path: str) -> Page:
    app = routes.new_app()
    pages(app, inspector=Inspector(ledger, Judge(ledger, NAMES, GIB, "best-fit")), synced=lambda: True)
    return Page(app.test_client().get(path).text)


def held(name: str, amount: int) -> PodBuilder:
    return a_pod().named(name).asking(amount).bound_to("n", a_grant(granted({"GPU-n-0": amount * GIB})))


def leaving(free: int, fragmented: int) -> Free:
    """Leave so many GiB free, and so many of them in pieces."""
    return Free(free_bytes=free * GIB, fragmented_bytes=fragmented * GIB, largest_bytes=8 * GIB, empty_gpus=1)


class TestPolicies:
    """The live policy and its shadow, beside each other."""

    def test_both_are_drawn_to_one_scale_and_compared_in_words(self) -> None:
        live = Side(
            "best-fit", Free(free_bytes=40 * GIB, fragmented_bytes=10 * GIB, largest_bytes=8 * GIB, empty_gpus=0)
        )
        shadow = Side("fgd", Free(free_bytes=20 * GIB, fragmented_bytes=4 * GIB, largest_bytes=9 * GIB, empty_gpus=1))
        agreements = dict(zip(Agreement, (5, 2, 3, 1), strict=True))
        shown = self.overview(Comparison(live=live, shadow=shadow, refused=1, agreements=agreements))
        strips = [svg["aria-label"] for svg in shown.all("svg") if "aria-label" in svg]
        assert [
            "best-fit (live): 40 GiB free, of which 10 GiB lie in pieces",
            "fgd (shadow): 20 GiB free, of which 4 GiB lie in pieces",
        ] == strips
        # of 40 GiB: 30 and 10, 16 and 4
        parts = [(svg["x"], svg["width"]) for svg in shown.all("svg") if "x" in svg]
        assert [("0.00%", "75.00%"), ("75.00%", "25.00%"), ("0.00%", "40.00%"), ("40.00%", "10.00%")] == parts
        assert "fgd would leave 6 GiB less of it in pieces." in shown.text
        assert "Of 11 pods placed since the extender was started, fgd had 5 on the same GPUs" in shown.text

    def test_of_policies_that_leave_the_same_nothing_else_is_said(self) -> None:
        side = Side("fgd", leaving(0, 0))
        shown = self.overview(Comparison(live=side, shadow=side, refused=0, agreements=dict.fromkeys(Agreement, 0)))
        assert "Both leave as much of it in pieces." in shown.text

    def test_without_a_shadow_the_page_has_nothing_of_it(self) -> None:
        assert "policies" not in {h["id"] for h in self.overview(None).all("h2")}

    @staticmethod
    def overview(told: Comparison | None) -> Page:
        ledger = nodes_of()
        app = routes.new_app()
        inspector = Inspector(ledger, Judge(ledger, NAMES, GIB, "best-fit"))
        pages(app, inspector=inspector, synced=lambda: True, compared=lambda: told)
        return Page(app.test_client().get("/").text)


class TestUse:
    """Below a strip of 80 GiB stands what is in use, and how much of it nobody was given."""

    def shown(self, note: dict[str, int] | str | None, *, held_gib: int = 40, serving: bool = True) -> Page:
        node = a_node("n").with_gpu("80GiB")
        ledger, used = nodes_of(node if serving else node.not_serving()), Used(NAMES)
        ledger.observe_pod(held("p", held_gib).build())
        text = notes_of_use.encode(UsedMemory(used=note)) if isinstance(note, dict) else note
        used.node_seen("n", {} if text is None else {NAMES.used: text})
        app = routes.new_app()
        inspector = Inspector(ledger, Judge(ledger, NAMES, GIB, "best-fit"), used=used)
        pages(app, inspector=inspector, synced=lambda: True)
        client = app.test_client()
        self.overview = Page(client.get("/").text)
        return Page(client.get("/nodes/n/gpus/GPU-n-0").text)

    @staticmethod
    def line(found: Page) -> list[tuple[str, str, str]]:
        lines = [(one["class"], one.get("x", ""), one["width"]) for one in found.all("rect")]
        return [(kind.removeprefix("use "), x, width) for kind, x, width in lines if kind.startswith("use ") and x]

    @pytest.mark.parametrize(
        ("gib", "lines", "said"),
        [
            (0, [], "0 in use"),
            # 20 of 80
            (20, [("within", "0.00%", "25.00%")], "20 GiB in use"),
            # of 60 in use 40 are granted
            (60, [("within", "0.00%", "50.00%"), ("beyond", "50.00%", "25.00%")], "60 GiB in use, 20 GiB of it beyond"),
            # NVML counts more than pods may be given
            (84, [("within", "0.00%", "50.00%"), ("beyond", "50.00%", "50.00%")], "84 GiB in use, 44 GiB of it beyond"),
        ],
    )
    def test_it_is_drawn_to_scale_and_said(self, gib: int, lines: list[tuple[str, str, str]], said: str) -> None:
        found = self.shown({"GPU-n-0": gib * GIB})
        assert [("track", "0%", "100%"), *lines] == self.line(found)
        (strip,) = [svg["aria-label"] for svg in found.all("svg") if "aria-label" in svg]
        assert f"held by default/p 40 GiB; {said}" in strip
        assert "In use" in self.overview.text
        assert "on 1 of 1 GPUs" in self.overview.text

    @pytest.mark.parametrize("note", [None, "{", {"GPU-other": GIB}])
    def test_what_no_plugin_has_told_is_unknown_and_not_0(self, note: dict[str, int] | str | None) -> None:
        found = self.shown(note)
        assert [] == self.line(found)
        assert "use unknown" in next(svg["aria-label"] for svg in found.all("svg") if "aria-label" in svg)

    def test_what_a_plugin_said_that_has_gone_is_not_shown(self) -> None:
        found = self.shown({"GPU-n-0": GIB}, serving=False)
        assert [] == self.line(found)
        assert "In useunknown" in self.overview.text


def choice_of(pod: PodBuilder) -> Callable[[NodeView], Grant]:
    """Grant a pod what it would get of a node, which has room for it."""
    request = parse(pod.build(), NAMES, GIB)
    assert request is not None

    def choose(view: NodeView) -> Grant:
        placed = place(view, request)
        assert isinstance(placed, Placement)
        return grant(request, placed)

    return choose


class TestStrips:
    """A strip shows what is held in proportion."""

    def test_what_is_kept_for_a_pod_is_drawn_behind_what_is_held_and_listed(self) -> None:
        ledger = nodes_of(a_node("n").with_gpu("80GiB"))
        ledger.observe_pod(held("a", 40).build())
        vip = a_pod().named("vip").asking(20)
        ledger.observe_pod(vip.build())
        ledger.promise("uid-of-vip", "default/vip", "n", (), choice_of(vip))
        found = page_of(ledger, "/nodes/n")
        parts = [svg for svg in found.all("svg") if "x" in svg]
        # 40 held and 20 kept of 80
        assert [("0.00%", "50.00%"), ("50.00%", "25.00%")] == [(part["x"], part["width"]) for part in parts]
        (strip,) = [svg for svg in found.all("svg") if "aria-label" in svg]
        assert "20 GiB of 80 GiB free, held by default/a 40 GiB, 20 GiB kept for default/vip;" in strip["aria-label"]
        assert "kept for default/vip" in found.text
        assert "20 GiB of GPU 0 on n is kept for default/vip until it is bound" in page_of(ledger, "/").text

    def test_parts_lie_side_by_side_the_largest_first(self) -> None:
        ledger = nodes_of(a_node("n").with_gpu("80GiB"))
        for pod in (held("small", 20), held("large", 40)):
            ledger.observe_pod(pod.build())
        parts = [svg for svg in page_of(ledger, "/nodes/n").all("svg") if "x" in svg]
        # 40 and 20 of 80
        assert [("0.00%", "50.00%"), ("50.00%", "25.00%")] == [(part["x"], part["width"]) for part in parts]

    def test_what_shrank_under_its_pods_is_drawn_full_and_not_beyond(self) -> None:
        ledger = nodes_of(a_node("n").with_gpu("80GiB"))
        for pod in (held("a", 40), held("b", 40)):
            ledger.observe_pod(pod.build())
        ledger.observe_node(a_node("n").with_gpu("40GiB").build())
        parts = [svg for svg in page_of(ledger, "/nodes/n").all("svg") if "x" in svg]
        assert ["50.00%", "50.00%"] == [part["width"] for part in parts]

    def test_mig_instances_are_drawn_where_they_lie_held_or_not(self) -> None:
        ledger = nodes_of(a_node("n").with_mig().with_unexplained("1g.5gb@6"))
        pod = a_pod().named("model").asking("1", of=NAMES.mig("3g.20gb"))
        ledger.observe_pod(pod.build())
        ledger.assume("uid-of-model", "default/model", "n", choice_of(pod))
        found = page_of(ledger, "/nodes/n")
        parts = [svg for svg in found.all("svg") if "x" in svg]
        # 3g takes slices 0 to 3 of 8, beside the one at 6 that nobody holds
        assert [("0.00%", "50.00%"), ("75.00%", "12.50%")] == [(part["x"], part["width"]) for part in parts]
        (strip,) = [svg for svg in found.all("svg") if "aria-label" in svg]
        assert "held by default/model 3g.20gb on slices 0 to 3, no pod 1g.5gb on slice 6" in strip["aria-label"]
        assert ["/pods/default/model"] == [link.lstrip(".") for link in found.links if "model" in link]

    def test_an_instance_that_is_kept_is_drawn_where_it_will_lie_and_nobody_holds_it(self) -> None:
        ledger = nodes_of(a_node("n").with_mig())
        pod = a_pod().named("model").asking("1", of=NAMES.mig("3g.20gb"))
        ledger.observe_pod(pod.build())
        ledger.promise("uid-of-model", "default/model", "n", (), choice_of(pod))
        found = page_of(ledger, "/nodes/n")
        assert [("50.00%", "50.00%")] == [(part["x"], part["width"]) for part in found.all("svg") if "x" in part]
        assert ["kept edge"] == [one["class"] for one in found.all("rect") if one["class"].endswith(" edge")]
        (strip,) = [svg for svg in found.all("svg") if "aria-label" in svg]
        assert "held by nobody, " in strip["aria-label"]
        assert "kept for default/model: 3g.20gb on slices 4 to 7" in found.text

    def test_a_page_is_empty_before_the_cluster_has_been_read(self) -> None:
        app = routes.new_app()
        ledger = nodes_of()
        pages(app, inspector=Inspector(ledger, Judge(ledger, NAMES, GIB, "best-fit")), synced=lambda: False)
        answer = app.test_client().get("/")
        assert (503, True) == (answer.status_code, "has not read the cluster yet" in answer.text)
