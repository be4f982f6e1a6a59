"""Programs with threads have msgspec look through types before these run: two that do so at once end the program."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WITH_THREADS = ("extender", "device_plugin", "cotenant/contract", "cotenant/cluster", "cotenant/standins")

AT_ONCE = """
import sys, threading
from cotenant.contract import grant
from tests.builders import a_grant, granted

sys.setswitchinterval(1e-6)
text = grant.encode(a_grant(granted({"GPU-0": 1 << 30}, units=1)))
ready = threading.Barrier(4)

def decode():
    ready.wait()
    for _ in range(50):
        grant.decode(text)

threads = [threading.Thread(target=decode) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""


def test_threads_that_decode_their_first_grants_at_once_all_live() -> None:
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", AT_ONCE], cwd=ROOT, capture_output=True, text=True, check=False)

        assert (0, "") == (done.returncode, done.stderr)


@pytest.mark.parametrize("package", WITH_THREADS)
def test_types_are_decoded_into_by_decoders_that_were_made_at_import(package: str) -> None:
    assert [] == [
        f"{path.relative_to(ROOT)}:{call.lineno}"
        for path in sorted((ROOT / package).rglob("*.py"))
        for call in _calls(ast.parse(path.read_text(encoding="utf-8")))
        if ast.unparse(call.func).endswith(".decode") and any(keyword.arg == "type" for keyword in call.keywords)
    ]


def _calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))
