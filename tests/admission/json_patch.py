"""JSON patch (RFC 6902), as much of it as admission uses: add and remove."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any


def apply(document: Mapping[str, Any], operations: Sequence[Mapping[str, Any]]) -> Any:
    """Return the patched document; raises KeyError or IndexError where the RFC says that the patch fails."""
    patched: Any = copy.deepcopy(dict(document))
    for operation in operations:
        *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
        target = patched
        for part in parents:
            target = target[int(part)] if isinstance(target, list) else target[part]
        match operation["op"], target:
            case "add", list():
                if int(last) > len(target):
                    raise IndexError(operation["path"])
                target.insert(int(last), copy.deepcopy(operation["value"]))
            case "add", dict():
                target[last] = copy.deepcopy(operation["value"])
            case "remove", dict():
                del target[last]
            case _:
                raise KeyError(f"{operation['op']} {operation['path']}")
    return patched
