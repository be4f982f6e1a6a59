"""The screen takes what the terminal can do, and no more."""

import io
import re

from cotenant.cli.demo.screen import TIE, Screen


class Terminal(io.TextIOWrapper):
    """Be a terminal of some encoding, and remember what was written."""

    def __init__(self, encoding: str = "utf-8", *, tty: bool = True) -> None:
        self.written = io.BytesIO()
        self._tty = tty
        super().__init__(self.written, encoding=encoding)

    def isatty(self) -> bool:
        return self._tty

    @property
    def text(self) -> str:
        return self.written.getvalue().decode(self.encoding)


def test_plain_is_ascii_without_colours_on_any_terminal() -> None:
    terminal = Terminal()
    screen = Screen(terminal, plain=True)
    screen.line(f"{screen.good('✓')} GPU-1234… │ {screen.bold('a')}·")
    assert "= GPU-1234~ | a.\n" == terminal.text


def test_a_file_gets_no_colours() -> None:
    terminal = Terminal(tty=False)
    screen = Screen(terminal, plain=False)
    screen.line(screen.bad("✗") + screen.tag("a-pod"))
    assert "✗A\n" == terminal.text


def test_a_terminal_that_knows_only_ascii_gets_ascii() -> None:
    terminal = Terminal("ascii", tty=False)
    Screen(terminal, plain=False).line("✓ …")
    assert "= ~\n" == terminal.text


def test_every_pod_keeps_its_letter() -> None:
    screen = Screen(Terminal(tty=False), plain=False)
    assert ["A", "B", "A"] == [screen.tag(pod) for pod in ("x", "y", "x")]
    assert "BBB" == screen.brush.part("y", 3)


def test_a_legend_never_parts_a_letter_from_its_pod() -> None:
    terminal = Terminal(tty=False)
    screen = Screen(terminal, plain=False)
    for n in range(26):
        screen.tag(f"some-pod-{n}")
    screen.wrapped(screen.legend(), indent=2)
    lines = terminal.text.splitlines()
    assert len(lines) > 1
    assert all(re.search(r" [A-Z] some-pod-\d+$", line) for line in lines)
    assert TIE not in terminal.text
    assert max(map(len, lines)) <= screen.width


def test_text_that_is_wrapped_stays_within_the_width() -> None:
    terminal = Terminal(tty=False)
    screen = Screen(terminal, plain=False)
    screen.wrapped("word " * 60, indent=4)
    assert max(map(len, terminal.text.splitlines())) <= screen.width
    assert all(line.startswith("    word") for line in terminal.text.splitlines())
