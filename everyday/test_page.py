"""The web page in a real Chromium: no serious fault of accessibility, usable by keyboard, and how it looks.

`make pictures` keeps the screenshots in docs/pictures.
"""

import importlib.util
import os
import random
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cotenant.contract import used as notes_of_use
from cotenant.contract.request import parse
from cotenant.contract.units import GIB
from cotenant.contract.used import UsedMemory
from e2e.processes import MissingProgramError, find_program
from everyday.browser import browsing, violations
from extender.http import app as routes
from extender.http.call_server import CallServer
from extender.http.pages import pages
from extender.http.wsgi import Application
from extender.inspect.inspector import Inspector
from extender.ledger import Hold, Ledger
from extender.placement.fit import choosing
from extender.shadow.placements import Agreement, Comparison, Side
from extender.used import Used
from extender.verbs.judge import Judge
from tests.builders import NAMES, PodBuilder, a_grant, a_node, a_pod, granted
from tests.extender.test_shadow import Both

PICTURES = Path(__file__).resolve().parent.parent / "docs" / "pictures"
KEEP = os.environ.get("COTENANT_PICTURES") == "keep"


def a_ledger(nodes: int) -> Ledger:
    """A cluster of A100s, T4s and A100s that are cut, 8 of each node, most of them busy.

    One node in nine has trouble, and some pods wait.
    """
    draw = random.Random(nodes)
    ledger = Ledger(NAMES, GIB)
    for n in range(nodes):
        size = 15 if n % 3 == 2 else 79
        if n % 3 == 1:
            node = a_node(f"mig-{n:04}")
            for _ in range(8):
                node = node.with_mig()
        elif n % 3 == 2:
            node = a_node(f"t4-{n:04}").with_gpus(8, "15GiB", model="Tesla T4")
        else:
            node = a_node(f"a100-{n:04}").with_gpus(8, "79GiB", model="NVIDIA A100-SXM4-80GB")
        if n % 9 == 5:
            node = node.unhealthy(1)
        if n % 18 == 10:
            node = node.not_serving()
        ledger.observe_node(node.build())
        for gpu in range(8):
            cut(ledger, node.name, draw) if n % 3 == 1 else share(ledger, node.name, gpu, size, draw)
    for n, units in enumerate((79, 24, 100)):
        ledger.observe_pod(a_pod().named(f"waits-{n}").in_namespace("team-1").asking(units).build())
    keep(ledger, "team-1/waits-1", 24, "a100-0000")
    return ledger


def keep(ledger: Ledger, key: str, units: int, node: str) -> None:
    """Keep memory for a pod that waits, as if pods that were evicted for it had just gone."""
    request = parse(a_pod().asking(units).build(), NAMES, GIB)
    assert request is not None
    assert isinstance(ledger.promise(f"uid-of-{key.partition('/')[2]}", key, node, (), choosing(request)), Hold)


def in_use(ledger: Ledger) -> Used:
    """Have most GPUs in use for a part of what pods were given, and some beyond it; one node in five tells nothing."""
    draw, used = random.Random(7), Used(NAMES)
    for n, view in enumerate(ledger.views()):
        if n % 5 != 4:
            told = {
                state.gpu.uuid: int(state.held_bytes * draw.choice([0.3, 0.6, 0.9, 1.0]))
                + (draw.randint(3, 9) * GIB if draw.random() < 0.08 else 0)
                for state in view.states
            }
            used.node_seen(view.name, {NAMES.used: notes_of_use.encode(UsedMemory(used=told))})
    return used


def named(draw: random.Random, name: str) -> PodBuilder:
    kind = draw.choice(["train", "serve", "notebook"])
    return a_pod().named(f"{kind}-{name}").in_namespace(f"team-{draw.randint(1, 5)}")


def share(ledger: Ledger, node: str, gpu: int, size: int, draw: random.Random) -> None:
    """Bind a few pods that hold parts of a GPU."""
    left = size
    for k in range(draw.randint(0, 4)):
        units = draw.randint(1, max(1, size // 3))
        if units <= left:
            left -= units
            pod = named(draw, f"{node}-{gpu}-{k}").asking(units)
            ledger.observe_pod(pod.bound_to(node, a_grant(granted({f"GPU-{node}-{gpu}": units * GIB}))).build())


def cut(ledger: Ledger, node: str, draw: random.Random) -> None:
    """Have up to three instances more on a node, where there is room."""
    for k in range(draw.randint(0, 3)):
        profile = draw.choice(["1g.5gb", "2g.10gb", "3g.20gb"])
        pod = named(draw, f"{node}-{len(ledger.holds())}-{k}").asking("1", of=NAMES.mig(profile)).build()
        request = parse(pod, NAMES, GIB)
        assert request is not None
        ledger.observe_pod(pod)
        if isinstance(ledger.assume(pod.uid, pod.key, node, choosing(request)), Hold):
            ledger.confirm(pod.uid)
        else:
            ledger.pod_gone(pod.uid)


def two_policies() -> tuple[Ledger, Comparison]:
    """Have 500 pods come and go on 40 nodes of 4 GPUs by the policy spread, and their shadow by priced-leftovers."""
    both = Both("spread", "priced-leftovers", nodes=40, gpus=4)
    both.follow()
    draw = random.Random(1)
    there: list[str] = []
    for n in range(500):
        if there and draw.random() < 0.3:
            both.ledger.pod_gone(there.pop(draw.randrange(len(there))))
        elif (uid := both.place(a_pod().named(f"p{n}").asking(draw.choice([2, 3, 5, 10])))) is not None:
            there.append(uid)
        both.follow()
    return both.ledger, Comparison(
        live=Side(both.live, both.free_live()),
        shadow=Side(both.shadow.policy, both.shadow.free()),
        refused=both.shadow.refused,
        agreements={one: both.shadow.agreements[one] for one in Agreement},
    )


@contextmanager
def served(ledger: Ledger, told: Comparison | None = None) -> Iterator[str]:
    """Serve the pages of a made-up cluster; gives their address."""
    app = routes.new_app()
    inspector = Inspector(ledger, Judge(ledger, NAMES, GIB, "priced-leftovers"), used=in_use(ledger))
    pages(app, inspector=inspector, synced=lambda: True, compared=lambda: told)
    server = CallServer("127.0.0.1:0", Application(app))
    server.start()
    try:
        yield f"http://{server.address}"
    finally:
        server.stop()


@pytest.fixture(scope="module", autouse=True)
def _programs() -> None:
    try:
        find_program("chromium")
    except MissingProgramError as missing:
        pytest.skip(f"{missing}; Debian's package is chromium")
    if importlib.util.find_spec("axe_playwright_python") is None:
        pytest.skip("Playwright and axe-core are missing: make everyday, or uv sync --inexact --group browser")


def kept(shot: Path) -> None:
    """Put a picture into docs/ where that is asked for."""
    if KEEP:
        PICTURES.mkdir(exist_ok=True)
        shutil.copy(shot, PICTURES / shot.name)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("nodes", [3, 50, 1000])
def test_no_page_has_a_serious_fault_of_accessibility_or_complains(tmp_path: Path, nodes: int, *, dark: bool) -> None:
    with served(a_ledger(nodes)) as address, browsing(dark=dark) as page:
        for path in ("/", "/nodes/a100-0000", "/nodes/a100-0000/gpus/GPU-a100-0000-0", "/pods", "/pods/team-1/waits-1"):
            page.goto(address + path)
            assert "en" == page.evaluate("document.documentElement.lang")
            # nothing stands outside of the window
            assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), path
            assert [] == page.complaints, path
            assert [] == violations(page), path
        page.goto(address)
        shot = tmp_path / f"page-{nodes}-nodes{'-dark' if dark else ''}.png"
        page.screenshot(path=shot)
        kept(shot)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_policies_beside_each_other_have_no_serious_fault_either(tmp_path: Path, *, dark: bool) -> None:
    ledger, told = two_policies()
    with served(ledger, told) as address, browsing(dark=dark) as page:
        page.goto(address)
        assert "priced-leftovers" in page.locator("#policies + div").inner_text()
        assert [] == violations(page)
        shot = tmp_path / f"page-policies{'-dark' if dark else ''}.png"
        page.screenshot(path=shot)
        kept(shot)


def test_a_fault_that_is_planted_is_found() -> None:
    with served(a_ledger(3)) as address, browsing() as page:
        page.goto(address)
        page.evaluate("document.documentElement.removeAttribute('lang')")
        assert ["html-has-lang"] == [found.partition(" ")[0] for found in violations(page)]


def test_a_small_window_shows_all_of_it() -> None:
    with served(a_ledger(3)) as address, browsing(width=500) as page:
        page.goto(address)
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert [] == violations(page)


def test_the_longest_name_leaves_the_columns_beside_it_in_the_window() -> None:
    ledger = Ledger(NAMES, GIB)
    ledger.observe_node(a_node("n").with_gpus(1, "79GiB").build())
    # Kubernetes' longest, with nothing at which a line would break
    ledger.observe_pod(a_pod().named("w" * 253).in_namespace("t" * 63).asking(100).build())
    with served(ledger) as address, browsing() as page:
        page.goto(address)
        table = page.locator(".scroll").first
        assert table.evaluate("one => one.scrollWidth <= one.clientWidth")


def test_all_of_it_is_reached_by_keyboard_and_shows_where_one_is() -> None:
    with served(a_ledger(3)) as address, browsing() as page:
        page.goto(address)
        reachable = page.locator("a[href],input,select,button").count()
        seen = []
        for _ in range(reachable):
            page.keyboard.press("Tab")
            one = page.evaluate_handle("document.activeElement")
            seen.append(one.evaluate("one => [one.tagName, getComputedStyle(one).outlineStyle]"))
        assert "A" == seen[0][0]  # to the content, past what every page repeats
        assert [] == [one for one in seen if one[1] == "none"]
        assert {"BODY"} & {one[0] for one in seen[:-1]} == set()
        # the filter finds by Enter alone
        page.locator("#filter").focus()
        page.keyboard.type("t4-")
        page.keyboard.press("Enter")
        page.wait_for_url("**filter=t4-**")
        assert ["t4-0002"] == page.locator(".node h3").all_inner_texts()


def test_how_long_a_page_of_a_thousand_nodes_takes() -> None:
    ledger = a_ledger(1000)
    app = routes.new_app()
    inspector = Inspector(ledger, Judge(ledger, NAMES, GIB, "priced-leftovers"), used=in_use(ledger))
    pages(app, inspector=inspector, synced=lambda: True)
    client, spent = app.test_client(), []
    for _ in range(15):
        before = time.process_time()
        client.get("/")
        spent.append(1000 * (time.process_time() - before))
    # 40 of them are shown at a time
    with served(ledger) as address, browsing() as page:
        page.goto(address)
        timing = page.evaluate("performance.getEntriesByType('navigation')[0].toJSON()")
        assert 40 == page.locator(".node").count()
    rendered, laid_out = sorted(spent)[7], timing["domContentLoadedEventEnd"] - timing["responseEnd"]
    print(
        f"\n1,000 nodes of 8 GPUs: {rendered:.0f} ms of CPU to render "
        f"(median of 15; {spent[0]:.0f} the first time), {laid_out:.0f} ms until Chromium has laid it out"
    )
