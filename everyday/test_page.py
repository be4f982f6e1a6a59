"""The web page in a real Chromium: no serious fault of accessibility, usable by keyboard, and how it looks.

`make pictures` keeps the screenshots in docs/pictures.
"""

import os
import random
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cotenant.contract.units import GIB
from e2e.processes import MissingProgramError, bin_directory, find_program
from everyday.browser import Browser
from extender.http import app as routes
from extender.http.call_server import CallServer
from extender.http.pages import pages
from extender.http.wsgi import Application
from extender.inspector import Inspector
from extender.ledger import Ledger
from extender.verbs.judge import Judge
from tests.builders import NAMES, a_grant, a_node, a_pod, granted

PICTURES = Path(__file__).resolve().parent.parent / "docs" / "pictures"
KEEP = os.environ.get("COTENANT_PICTURES") == "keep"
TAB = "\ue004"
ENTER = "\ue007"


def a_ledger(nodes: int) -> Ledger:
    """A cluster of A100s and T4s, most of them busy: one node in nine has trouble, some pods wait."""
    draw = random.Random(nodes)
    ledger = Ledger(NAMES, GIB)
    for n in range(nodes):
        if n % 3 == 2:
            node, size, gpus = a_node(f"t4-{n:04}").with_gpus(4, "15GiB", model="Tesla T4"), 15, 4
        else:
            node, size, gpus = a_node(f"a100-{n:04}").with_gpus(8, "79GiB", model="NVIDIA A100-SXM4-80GB"), 79, 8
        if n % 9 == 5:
            node = node.unhealthy(1)
        if n % 18 == 10:
            node = node.not_serving()
        ledger.observe_node(node.build())
        for gpu in range(gpus):
            left = size
            for k in range(draw.randint(0, 4)):
                units = draw.randint(1, max(1, size // 3))
                if units <= left:
                    left -= units
                    name = f"{draw.choice(['train', 'serve', 'notebook'])}-{n}-{gpu}-{k}"
                    grant = a_grant(granted({f"GPU-{node.name}-{gpu}": units * GIB}))
                    team = f"team-{draw.randint(1, 5)}"
                    ledger.observe_pod(
                        a_pod().named(name).in_namespace(team).asking(units).bound_to(node.name, grant).build()
                    )
    for n, units in enumerate((79, 24, 100)):
        ledger.observe_pod(a_pod().named(f"waits-{n}").in_namespace("team-1").asking(units).build())
    return ledger


@contextmanager
def served(nodes: int) -> Iterator[str]:
    """Serve the pages of a made-up cluster; gives their address."""
    ledger = a_ledger(nodes)
    app = routes.new_app()
    pages(app, inspector=Inspector(ledger, Judge(ledger, NAMES, GIB, "priced-leftovers")), synced=lambda: True)
    server = CallServer("127.0.0.1:0", Application(app))
    server.start()
    try:
        yield f"http://{server.address}"
    finally:
        server.stop()


@pytest.fixture(scope="module", autouse=True)
def _programs() -> None:
    try:
        for name in ("chromium", "chromedriver"):
            find_program(name)
    except MissingProgramError as missing:
        pytest.skip(f"{missing}; Debian's packages are chromium and chromium-driver")
    if not (bin_directory() / "axe.min.js").exists():
        pytest.skip(f"axe-core is missing: e2e/build.sh {bin_directory()} axe")


def kept(shot: Path) -> None:
    """Put a picture into docs/ where that is asked for."""
    if KEEP:
        PICTURES.mkdir(exist_ok=True)
        shutil.copy(shot, PICTURES / shot.name)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("nodes", [3, 50, 1000])
def test_no_page_has_a_serious_fault_of_accessibility_or_complains(tmp_path: Path, nodes: int, *, dark: bool) -> None:
    with served(nodes) as address, Browser(tmp_path, dark=dark) as browser:
        for path in ("/", "/nodes/a100-0000", "/nodes/a100-0000/gpus/GPU-a100-0000-0", "/pods", "/pods/team-1/waits-1"):
            browser.open(address + path)
            assert [] == browser.violations(), path
            assert [] == browser.console(), path
            assert browser.run("return document.documentElement.lang") == "en"
            # nothing stands outside of the window
            assert browser.run("return document.documentElement.scrollWidth <= window.innerWidth"), path
        browser.open(address)
        shot = tmp_path / f"page-{nodes}-nodes{'-dark' if dark else ''}.png"
        browser.screenshot(shot)
        kept(shot)


def test_a_small_window_shows_all_of_it(tmp_path: Path) -> None:
    with served(3) as address, Browser(tmp_path, width=500, height=900) as browser:
        browser.open(address)
        assert browser.run("return document.documentElement.scrollWidth <= window.innerWidth")
        assert [] == browser.violations()


def test_all_of_it_is_reached_by_keyboard_and_shows_where_one_is(tmp_path: Path) -> None:
    with served(3) as address, Browser(tmp_path) as browser:
        browser.open(address)
        reachable = browser.run("return document.querySelectorAll('a[href],input,select,button').length")
        seen = []
        for _ in range(reachable):
            browser.press(TAB)
            seen.append(
                browser.run(
                    "const one = document.activeElement; const style = getComputedStyle(one);"
                    "return [one.tagName, one.textContent.trim().slice(0, 30), style.outlineStyle]"
                )
            )
        assert "A" == seen[0][0]  # to the content, past what every page repeats
        assert [] == [one for one in seen if one[2] == "none"]
        assert {"BODY"} & {one[0] for one in seen[:-1]} == set()
        # the filter finds by Enter alone
        browser.run("document.getElementById('filter').focus()")
        for letter in "t4-":
            browser.press(letter)
        browser.press(ENTER)
        deadline = time.monotonic() + 20
        while "filter=t4-" not in browser.run("return location.search") and time.monotonic() < deadline:
            threading.Event().wait(0.05)
        assert ["t4-0002"] == browser.run(
            "return [...document.querySelectorAll('.node h3')].map(e => e.textContent.trim())"
        )


def test_how_long_a_page_of_a_thousand_nodes_takes(tmp_path: Path) -> None:
    with served(1000) as address, Browser(tmp_path) as browser:
        browser.open(address)
        took = []
        for _ in range(5):
            browser.open(address)
            took.append(
                browser.run(
                    "const t = performance.getEntriesByType('navigation')[0];"
                    "return [t.responseEnd - t.requestStart, t.domContentLoadedEventEnd - t.responseEnd]"
                )
            )
        server, layout = (sorted(column)[2] for column in zip(*took, strict=True))
        print(f"\n1,000 nodes: {server:.0f} ms to answer, {layout:.0f} ms to lay out (medians of 5)")
        assert browser.run("return document.querySelectorAll('.node').length") == 40
