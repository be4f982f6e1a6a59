"""Decode what the API server answers, however deeply an object of it is nested.

msgspec recurses, over what it skips too, and raises RecursionError some 1,000 levels down; the API server takes 10,000.
Whoever may write a pod may nest its ``metadata.managedFields`` so. Nothing that is read here lies nearly as deep, so
the depths are cut off, and the object is read like any other one: were it only skipped, what a pod holds would count
no more after a restart. A higher recursion limit would not do: from Python 3.12 on it says nothing of C.
"""

import re
from collections.abc import Callable
from typing import TypeVar

import msgspec

# No object is read to half of it, and a list or an event around one adds three.
_LEVELS = 100
# Strings, whose brackets count for nothing, and brackets. Possessive, and without need of the last quote: in half a
# string nothing is looked at twice.
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[{\]}]', re.DOTALL)

T = TypeVar("T")


def decoded(decode: Callable[[bytes | msgspec.Raw], T], body: bytes | msgspec.Raw) -> T:
    """Give what *decode*, of a msgspec decoder, makes of *body*; it is called again without the depths if need be."""
    try:
        return decode(body)
    except RecursionError:
        return decode(_shallow(bytes(body)))


def _shallow(body: bytes) -> bytes:
    """Put null for every object and list that lies too deep."""
    kept, depth, start = [], 0, 0
    for token in _TOKEN.finditer(body):
        bracket = token.group()
        if bracket in {b"{", b"["}:
            depth += 1
            if depth == _LEVELS + 1:
                kept += [body[start : token.start()], b"null"]
        elif bracket in {b"}", b"]"}:
            depth -= 1
            if depth == _LEVELS:
                start = token.end()
    return b"".join([*kept, body[start:]] if depth <= _LEVELS else kept)
