"""A real Chromium, driven by its own chromedriver over the W3C WebDriver protocol; no library in between.

Debian has both; axe-core, which judges accessibility, comes from npm by e2e/build.sh.
"""

import base64
import http.client
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from e2e.processes import Program, bin_directory, find_program, free_ports

_PATIENCE_SECONDS = 120


class Browser:
    """One headless window."""

    def __init__(self, directory: Path, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Prepare it; its log and its profile go to `directory`."""
        self._directory = directory
        self._size = width, height
        self._dark = dark
        (self._port,) = free_ports(1)
        self._session = ""

    def __enter__(self) -> Self:
        self._driver = Program(
            [find_program("chromedriver"), f"--port={self._port}"], log=self._directory / "chromedriver.log"
        )
        try:
            self._driver.wait_ready(self._answers)
            arguments = ["--headless=new", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
            arguments += [
                f"--user-data-dir={self._directory / 'profile'}",
                f"--window-size={'{},{}'.format(*self._size)}",
            ]
            arguments += ["--no-sandbox"] if os.geteuid() == 0 else []
            arguments += ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if self._dark else []
            options = {"binary": str(find_program("chromium")), "args": arguments}
            always = {"browserName": "chrome", "goog:chromeOptions": options}
            self._session = self._call("POST", "/session", {"capabilities": {"alwaysMatch": always}})["sessionId"]
        except BaseException:
            self._driver.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._call("DELETE", f"/session/{self._session}")
        self._driver.stop()

    def _answers(self) -> bool:
        try:
            return bool(self._call("GET", "/status")["ready"])
        except OSError:
            return False

    def _call(self, method: str, path: str, body: object = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=_PATIENCE_SECONDS)
        try:
            connection.request(method, path, None if method == "GET" else json.dumps(body or {}))
            answer = json.load(connection.getresponse())["value"]
        finally:
            connection.close()
        if isinstance(answer, dict) and "error" in answer:
            raise RuntimeError(f"chromedriver: {answer['message']}")
        return answer

    def open(self, url: str) -> None:
        """Load a page, and wait until it is there."""
        self._call("POST", f"/session/{self._session}/url", {"url": url})

    def run(self, script: str, *arguments: object) -> Any:
        """Run JavaScript in the page and return what it returns, a promise's value as well."""
        code = f"const done = arguments[arguments.length - 1]; Promise.resolve((() => {{ {script} }})()).then(done)"
        return self._call("POST", f"/session/{self._session}/execute/async", {"script": code, "args": list(arguments)})

    def press(self, key: str) -> None:
        """Press one key, by its WebDriver code, and let it go."""
        actions = [{"type": kind, "value": key} for kind in ("keyDown", "keyUp")]
        keyboard = {"type": "key", "id": "keyboard", "actions": actions}
        self._call("POST", f"/session/{self._session}/actions", {"actions": [keyboard]})

    def screenshot(self, path: Path) -> None:
        """Write what the window shows, as PNG."""
        path.write_bytes(base64.b64decode(self._call("GET", f"/session/{self._session}/screenshot")))

    def console(self) -> list[str]:
        """Return what the browser complained of since the last call."""
        entries = self._call("POST", f"/session/{self._session}/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries]

    def violations(self) -> list[str]:
        """Judge the page by axe-core: name what is serious or critical, with the elements."""
        axe = (bin_directory() / "axe.min.js").read_text()
        self.run(axe + "; window.__axe = window.axe;")
        result = self.run("return window.axe.run(document)")
        return [
            f"{one['id']} ({one['impact']}): {one['help']}: {[node['html'][:120] for node in one['nodes'][:3]]}"
            for one in result["violations"]
            if one["impact"] in {"serious", "critical"}
        ]
