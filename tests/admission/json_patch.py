"""JSON patch (RFC 6902), as much of it as admission and its kustomizations use."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any


class PatchError(Exception):
    """The RFC says that the patch fails as a whole."""


def apply(document: Mapping[str, Any], operations: Sequence[Mapping[str, Any]]) -> Any:
    """Return the patched document; raises PatchError where it cannot be patched."""
    patched: Any = copy.deepcopy(dict(document))
    for operation in operations:
        *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
        target = patched
        try:
            for part in parents:
                target = target[int(part)] if isinstance(target, list) else target[part]
            _ACTIONS[operation["op"]](target, last, copy.deepcopy(operation.get("value")))
        except (KeyError, IndexError) as error:
            raise PatchError(f"{operation['op']} {operation['path']}") from error
    return patched


def _add(target: Any, key: str, value: Any) -> None:
    if isinstance(target, dict):
        target[key] = value
    elif key == "-":
        target.append(value)
    elif int(key) > len(target):
        raise IndexError(key)
    else:
        target.insert(int(key), value)


def _remove(target: Any, key: str, _: Any) -> None:
    del target[key]


def _replace(target: Any, key: str, value: Any) -> None:
    del target[key]
    target[key] = value


def _test(target: Any, key: str, value: Any) -> None:
    if target[key] != value:
        raise KeyError(key)


_ACTIONS = {"add": _add, "remove": _remove, "replace": _replace, "test": _test}
