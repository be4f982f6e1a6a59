"""Debian's Chromium, driven by Playwright, and its pages judged by axe-core, which axe-playwright-python brings."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from e2e.processes import find_program

_PATIENCE_MS = 120_000


@contextmanager
def browsing(*, width: int = 1280, dark: bool = False) -> Iterator[Any]:
    """Open a window of so many pixels; gives Playwright's page, with what it complained of in `complaints`."""
    from playwright.sync_api import sync_playwright  # noqa: PLC0415 - a group of its own, which not everybody has

    with sync_playwright() as playwright:
        # as root Chromium has no sandbox, and /dev/shm is small in containers
        flags = ["--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"]
        browser = playwright.chromium.launch(executable_path=str(find_program("chromium")), args=flags)
        try:
            page: Any = browser.new_page(
                viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light"
            )
            page.set_default_timeout(_PATIENCE_MS)
            page.complaints = []
            page.on("console", lambda message: page.complaints.append(message.text))
            page.on("pageerror", lambda error: page.complaints.append(str(error)))
            yield page
        finally:
            browser.close()


def violations(page: Any) -> list[str]:
    """Judge a page by axe-core: name what is serious or critical, with the elements."""
    from axe_playwright_python.sync_playwright import Axe  # noqa: PLC0415 - as above

    return [
        f"{one['id']} ({one['impact']}): {one['help']}: {[node['html'][:120] for node in one['nodes'][:3]]}"
        for one in Axe().run(page).response["violations"]
        if one["impact"] in {"serious", "critical"}
    ]
