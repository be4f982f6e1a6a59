"""What the demo is shown on: lines with colours where the terminal has them, in ASCII where it must be."""

import os
import shutil
import textwrap
from string import ascii_letters
from typing import TextIO

from cotenant.cli.demo.strips import Brush

_NARROWEST, _WIDEST = 80, 110
# Backgrounds from the 256 colours on which black text is easy to read, neighbours far apart.
_PALETTE = (80, 215, 150, 183, 222, 117, 210, 114, 180, 152, 217, 186, 146, 223, 109, 174)
# Holds words together where lines are wrapped; textwrap breaks at no other blank than ASCII's.
TIE = "\N{NO-BREAK SPACE}"
_ASCII = str.maketrans({"→": ">", "✓": "=", "✗": "!", "│": "|", "·": ".", "…": "~", "─": "-"})


class Screen:
    """Write lines to *out*; *plain* is without colours and in ASCII, whatever the terminal can do."""

    def __init__(self, out: TextIO, *, plain: bool) -> None:
        self._out = out
        self.ascii = plain or not _can_write(out, "→✓│·…")
        self.colour = not plain and out.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self.width = max(_NARROWEST, min(_WIDEST, shutil.get_terminal_size((_NARROWEST, 24)).columns))
        self._letters: dict[str, str] = {}

    def line(self, text: str = "") -> None:
        """Write one line at once."""
        self._out.write((text.translate(_ASCII) if self.ascii else text) + "\n")
        self._out.flush()

    def wrapped(self, text: str, *, indent: int, code: str = "") -> None:
        """Write a text over as many lines as it takes."""
        for line in textwrap.wrap(text, self.width - indent, break_on_hyphens=False):
            self.line(" " * indent + self.styled(line.replace(TIE, " "), code))

    def heading(self, text: str) -> None:
        """Write a line that begins something new."""
        self.line()
        self.line(self.bold(text))

    def styled(self, text: str, code: str) -> str:
        """Wrap a text in an SGR code, where there are colours."""
        return f"\x1b[{code}m{text}\x1b[0m" if self.colour and code and text else text

    def bold(self, text: str) -> str:
        """Make a text stand out."""
        return self.styled(text, "1")

    def dim(self, text: str) -> str:
        """Make a text stand back."""
        return self.styled(text, "2")

    def label(self, text: str) -> str:
        """Colour what names the text after it."""
        return self.styled(text, "36")

    def good(self, text: str) -> str:
        """Colour what is well."""
        return self.styled(text, "32")

    def bad(self, text: str) -> str:
        """Colour what is not."""
        return self.styled(text, "1;31")

    def waiting(self, text: str) -> str:
        """Colour what is not there yet."""
        return self.styled(text, "33")

    def tag(self, pod: str) -> str:
        """Give the pod's letter on its colour; letters are given out in the order they are asked for."""
        return self.styled(self._letter(pod), self._code(pod))

    def legend(self) -> str:
        """List the letters and whose they are, to be wrapped()."""
        return "  ".join(f"{letter}{TIE}{pod}" for pod, letter in self._letters.items())

    @property
    def brush(self) -> Brush:
        """Draw strips: with colours and names where there are colours, else with letters."""
        free = "." if self.ascii else "·"
        return Brush(part=self._part, free=lambda n: self.dim(free * n), dim=self.dim, border="│")

    def _part(self, pod: str, width: int) -> str:
        letter = self._letter(pod)
        if not self.colour:
            return letter * width
        text = pod if len(pod) <= width else letter
        return self.styled(text.center(width)[:width], self._code(pod))

    def _letter(self, pod: str) -> str:
        return self._letters.setdefault(pod, ascii_letters[26:][len(self._letters) % 26])

    def _code(self, pod: str) -> str:
        self._letter(pod)
        return f"30;48;5;{_PALETTE[list(self._letters).index(pod) % len(_PALETTE)]}"


def _can_write(out: TextIO, text: str) -> bool:
    try:
        text.encode(out.encoding or "ascii")
    except (UnicodeError, LookupError):
        return False
    return True
